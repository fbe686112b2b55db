"""Names from outside, of files and of samples, that would change a terminal, a line, or cannot be written."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from hostile import CONTROL, Case, Inputs
from tars import picture, write_tar

ESCAPE = "\x1b[2J\x1b]0;title\x07"
FORGED = "0\nindistill: error: all is well\r\x1b[1A\u202e\x9b31m"
NOT_UTF8 = os.fsdecode(b"caf\xe9")


def _shard(inputs: Inputs, *keys: str, label: bytes = b"1", name: str = "x") -> str:
    """Write a shard of 32 images, and one that cannot be decoded for each key; returns its path."""
    members = []
    for i in range(32):
        members += [(f"{i:04d}.jpg", picture(i, size=(32, 32))), (f"{i:04d}.cls", b"1")]
    for key in keys:
        members += [(f"{key}.jpg", b"no image"), (f"{key}.cls", label)]
    (inputs.folder / "shards").mkdir()
    return write_tar(inputs.folder / "shards" / f"{name}.tar", members)


def _train(inputs: Inputs, label: bytes = b"1", **data: Any) -> list[str]:
    shard = _shard(inputs, FORGED, ESCAPE, NOT_UTF8, label=label)
    tree = inputs.tree()
    tree["data"] |= {"root": None, "train": shard, "eval": None, "max_bad_fraction": 1.0, **data}
    tree["trackers"] = ["tensorboard"]
    return ["train", inputs.write(tree)]


def _printable_files(inputs: Inputs) -> None:
    """The report names the bad samples; no text that the run wrote has a control character."""
    run = inputs.folder / "run"
    for file in ("report.html", "metrics.jsonl", "history.jsonl", "config.yaml", "status"):
        assert not CONTROL.search((run / file).read_text(encoding="utf-8"))
    assert "caf\\udce9" in (run / "report.html").read_text(encoding="utf-8")


def _with_name(inputs: Inputs) -> list[str]:
    return ["shards", "verify", _shard(inputs, name=f"{ESCAPE}{NOT_UTF8}"), "--workers", "1"]


def _class_names(inputs: Inputs) -> list[str]:
    for name in (ESCAPE.replace("/", ""), NOT_UTF8, FORGED):
        (inputs.folder / "images" / name).mkdir(parents=True)
        (inputs.folder / "images" / name / "1.jpg").write_bytes(picture(1))
    return ["shards", "pack", str(inputs.folder / "images"), str(inputs.folder / "packed"), "--workers", "1"]


def _name_of_a_folder(inputs: Inputs) -> list[str]:
    folder = Path(os.fsdecode(os.fsencode(inputs.folder) + b"/\xff\x1b[2J\nx"))
    folder.mkdir()
    return ["report", str(folder)]


CASES = [
    Case("keys of bad samples in training and its report", _train, after=_printable_files),
    Case(
        "keys of bad samples in stream access",
        lambda inputs: _train(inputs, access="stream", epoch_samples=32, workers=0),
        after=_printable_files,
    ),
    Case(
        "the label of a sample whose key is an error line",
        lambda inputs: _train(inputs, label=b"99"),
        error=r"x\.tar: .*all is well.*label 99",
    ),
    Case("a shard whose name is no text", _with_name),
    Case("class folders whose names are no text", _class_names, output=r"caf\\udce9"),
    Case("a folder whose name is no text", _name_of_a_folder, error=r"no config\.yaml|there is no"),
]
