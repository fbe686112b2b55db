"""Labels in other forms, and images without any: what members, maps and tables say ends in one line."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

from hostile import Case, Inputs
from tars import picture, write_tar

JSON = {"key": "json", "field": "label"}


def of_member(name: str, content: bytes, label: dict[str, Any], **data: Any) -> Callable[[Inputs], list[str]]:
    """Train on one image with a label in another member."""

    def arguments(inputs: Inputs) -> list[str]:
        write_tar(inputs.folder / "x.tar", [("a.jpg", picture(0)), (name, content)])
        more = {"root": None, "train": str(inputs.folder / "x.tar"), "eval": None, "global_batch": 1}
        return inputs.train(label=label, streams=1, **more, **data)

    return arguments


def of_large_member(inputs: Inputs) -> list[str]:
    return of_member("a.json", b'{"label": "' + b" " * 300_000_000, JSON)(inputs)


def of_map(write: Callable[[str], None]) -> Callable[[Inputs], list[str]]:
    """Train with a class list of hostile content."""

    def arguments(inputs: Inputs) -> list[str]:
        path = str(inputs.folder / "map.json")
        write(path)
        return of_member("a.txt", b"cat", {"key": "txt", "map": path})(inputs)

    return arguments


def text(content: str) -> Callable[[str], None]:
    def write(path: str) -> None:
        with open(path, "w") as file:
            file.write(content)

    return write


def in_index(inputs: Inputs) -> list[str]:
    """An index whose texts are as many as fit, of which no label is one."""
    command = of_member("a.txt", b"1", {"key": "txt"})(inputs)
    content = {"version": 1, "bytes": 10240, "keys": ["a"], "offsets": [512], "sizes": [900], "labels": [7]}
    name = "x.tar.label-" + _digest() + ".index.json"
    (inputs.folder / name).write_text(json.dumps(content | {"texts": ["1"]}))
    return command


def _digest() -> str:
    from indistill import config
    from indistill.data.index import index_files

    return index_files("x", None, config.Label(key="txt"))[0].split("-")[1].partition(".")[0]


def unlabelled(**changes: Any) -> Callable[[Inputs], list[str]]:
    def arguments(inputs: Inputs) -> list[str]:
        tree = inputs.tree()
        tree["data"] |= {"num_classes": 0, "eval": None}
        return ["train", inputs.write(tree | changes)]

    return arguments


def table(inputs: Inputs) -> list[str]:
    (inputs.folder / "a.parquet").write_bytes(b"PAR1" + b"\xff" * 1000 + b"\xff\xff\xff\x7fPAR1")
    return ["shards", "pack", str(inputs.folder / "a.parquet"), str(inputs.folder / "out"), "--workers", "1"]


CASES = [
    Case(
        "label: JSON in JSON without end",
        of_member("a.json", b'{"label": ' + b"[" * 10**5, JSON),
        r"a\.json (is not valid JSON|too many lists or mappings)",
    ),
    Case(
        "label: JSON of 300 MB",
        of_large_member,
        r"a\.json has more than 1048576 bytes, so it holds no label",
    ),
    Case(
        "label: a number of 100,000 digits",
        of_member("a.json", b'{"label": ' + b"9" * 10**5 + b"}", JSON),
        r"a\.json (Exceeds the limit|has a label of more than 1024 characters)",
    ),
    Case(
        "label: streamed text that clears the screen",
        of_member("a.txt", b"\x1b[2J", {"key": "txt"}, access="stream", epoch_samples=1, workers=0),
        r"sample 'a' has the label .*x1b\[2J', which is no number",
    ),
    Case(
        "label.map: a FIFO",
        of_map(os.mkfifo),
        r"map\.json: cannot be read \(Not a regular file\)",
    ),
    Case(
        "label.map: one label of 16 million",
        of_map(text('{"cat": 16000000}')),
        r"map\.json: no class has the label 0, and others have larger ones",
    ),
    Case(
        "label.map: a class missing",
        of_map(text(json.dumps({f"class {label}": label for label in range(10)}))),
        r"x\.tar: sample 'a' has the label 'cat', which is no class in .*map\.json: add it to the file",
    ),
    Case("index of labels: a text that is not there", in_index, r"a label is the position of no text"),
    Case(
        "num_classes 0: a loss that reads labels",
        unlabelled(),
        r"kd\.losses: ce reads labels, and data\.num_classes: 0 says that the images have none",
    ),
    Case(
        "num_classes 0: a probe without labels",
        unlabelled(
            kd={"losses": [{"name": "feature"}]},
            teacher={"name": "cnn32_auxiliary", "random": True},
            evaluate={"linear_probe": {}},
        ),
        r"evaluate\.linear_probe needs query shards: set data\.eval",
    ),
    Case("Parquet: a footer of 2 GB", table, r"(Parquet needs pyarrow|is not a readable Parquet file)"),
]
