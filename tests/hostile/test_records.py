"""Damaged records of a run: every command that reads one says so in one line, or goes on without it.

The commands run in this process, on copies of one small finished run, so that many can be tried.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import random
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import CLASSES, data_section
from safetensors.torch import load_file, save_file

from indistill.commands.cli import main
from indistill.commands.report import networks
from indistill.config import UserError, records
from indistill.config.run_dir import CheckpointDir, RunDir

STEP = "step-00000002"
RAW = [b"", b"[]", b"3", b"{}", b"null", b"[" * 50_000, b'{"a":' * 50_000, b"\xff\xfe\0", b"\0" * 99, b"NaN"]
VALUES = [None, -1, 10**30, float("nan"), 1e308, "x", "\x1b[31m\nx", [], [[1]], {}, {"a": {"b": 1}}, True]
REMOVED = object()
MOST = 16  # damages of each record that a test draws
MOST_TRAINED = 6  # for commands that run a network, which take half a second


@pytest.fixture(scope="module")
def base(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 3 steps, all of them warm-up but the last, and the targets of its teacher."""
    folder = tmp_path_factory.mktemp("base")
    for kind in ("train", "eval"):
        (folder / kind).mkdir()
        for file in data_dir.glob(f"{kind}-*"):
            (folder / kind / file.name).symlink_to(file)
        names = [f"class {i}" for i in range(CLASSES)]
        (folder / kind / "dataset.json").write_text(json.dumps({"plan": "1", "classes": names}))
    data = data_section(folder) | {"train": "train/train-*.tar", "eval": "eval/eval-*.tar"}
    data["augment"] = {"recipe": "pad_crop", "views": 1}
    tree = {
        "run_dir": str(folder / "run"),
        "duration": "3 steps",
        "data": data,
        "student": {"name": "cnn32_student"},
        "teacher": {"name": "cnn32_auxiliary", "pretrained": False, "random": True},
        "warmup": {
            "curriculum": "sequential",
            "pairs": [[0, 0], [1, 1]],
            "durations": ["1 steps", "1 steps"],
        },
        "kd": {"losses": [{"name": "ce"}, {"name": "kd"}]},
        "optimizer": {"name": "sgd", "lr": 0.01},
        "ema": {"decay": 0.9},
        "checkpoint": {"every_steps": 2},
        "log": {"every_steps": 1},
        "trackers": [],
        "targets": {"dir": str(folder / "targets")},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    tree["targets"]["source"] = "cached"
    (folder / "cached.yaml").write_text(yaml.safe_dump(tree))
    main(["train", str(folder / "config.yaml")])
    main(["report", str(folder / "run")])
    main(["targets", str(folder / "config.yaml")])
    shutil.rmtree(folder / "run" / "checkpoints" / "step-00000003")
    return folder


@dataclass(frozen=True)
class Reader:
    """A record, and a command that reads it."""

    record: str  # below the folder of `base`
    command: str  # FOLDER: a copy of that folder
    unfinished: bool = False  # without the result, so that training goes on and an export takes a checkpoint
    goes_on: bool = False  # the record is only shown


TRAIN = "train FOLDER/config.yaml run_dir=FOLDER/run"
REPORT = "report FOLDER/run"
READERS = [
    *(Reader(f"run/{name}", REPORT, goes_on=True) for name in ("summary.json", "metrics.jsonl")),
    *(Reader(f"run/{name}", REPORT, goes_on=True) for name in ("history.jsonl", "prune_plan.json")),
    Reader("run/networks.json", REPORT, goes_on=True),
    Reader(f"run/checkpoints/{STEP}/state.json", REPORT, goes_on=True),
    Reader("run/status", REPORT, goes_on=True),
    Reader("run/summary.json", "export FOLDER/run FOLDER/out"),
    Reader(f"run/checkpoints/{STEP}/state.json", "export FOLDER/run FOLDER/out", unfinished=True),
    Reader(f"run/checkpoints/{STEP}/manifest.json", "export FOLDER/run FOLDER/out", unfinished=True),
    Reader("run/classes.json", "eval FOLDER/config.yaml FOLDER/run"),
    Reader(f"run/checkpoints/{STEP}/state.json", TRAIN, unfinished=True),
    Reader(f"run/checkpoints/{STEP}/manifest.json", TRAIN, unfinished=True),
    Reader("run/prune_plan.json", TRAIN, unfinished=True),
    Reader("run/metrics.jsonl", TRAIN, unfinished=True, goes_on=True),
    Reader("run/status", TRAIN, unfinished=True, goes_on=True),
    Reader("targets/manifest.json", "train FOLDER/cached.yaml run_dir=FOLDER/new targets.dir=FOLDER/targets"),
    Reader("targets/manifest.json", "targets FOLDER/cached.yaml targets.dir=FOLDER/targets"),
    Reader("eval/dataset.json", "eval FOLDER/config.yaml FOLDER/run data.root=FOLDER"),
    Reader("train/dataset.json", "shards pack FOLDER/eval/eval-000000.tar FOLDER/train --workers 1"),
]


def variants(content: bytes, name: str) -> Iterator[bytes]:
    """The content of a record with one damage each."""
    yield from RAW
    yield content[: len(content) // 2]
    draw = random.Random(0)
    for _ in range(3):
        flipped = bytearray(content)
        flipped[draw.randrange(len(flipped))] ^= 1 << draw.randrange(8)
        yield bytes(flipped)
    if name.endswith(".json"):
        tree = json.loads(content)
        changes = [(path, value) for path in paths(tree) for value in [*VALUES, REMOVED] if path]
        for path, value in draw.sample(changes, min(MOST, len(changes))):
            yield json.dumps(changed(tree, path, value)).encode()
    if name.endswith(".jsonl"):
        first, rest = content.split(b"\n", 1)
        for path in paths(json.loads(first)):
            for value in draw.sample(VALUES, 2):
                yield json.dumps(changed(json.loads(first), path, value)).encode() + b"\n" + rest


def paths(tree: Any, above: tuple = ()) -> Iterator[tuple]:
    """The path of every value in a tree; of a list's, the first two."""
    yield above
    inside = tree.items() if isinstance(tree, dict) else enumerate(tree[:2]) if isinstance(tree, list) else ()
    for key, value in inside:
        yield from paths(value, (*above, key))


def changed(tree: Any, path: tuple, value: Any) -> Any:
    if not path:
        return value
    tree = copy.deepcopy(tree)
    node = tree
    for key in path[:-1]:
        node = node[key]
    if value is REMOVED:
        del node[path[-1]]
    else:
        node[path[-1]] = value
    return tree


def copied(base: Path, folder: Path, unfinished: bool = False) -> Path:
    shutil.copytree(base, folder, symlinks=True)
    if unfinished:
        (folder / "run" / "summary.json").unlink()
        (folder / "run" / "student.safetensors").unlink()
    return folder


def sign(checkpoint: Path) -> None:
    """Write a manifest that fits the files, so that a changed one is read."""
    manifest = CheckpointDir(checkpoint).manifest
    entries = {
        name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name in json.loads(manifest.read_text())
        for content in [(checkpoint / name).read_bytes()]
    }
    manifest.write_text(json.dumps(entries))


def run(command: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, list[str]]:
    """Run a command; returns its exit code and the lines on stderr. A traceback is the test's own."""
    capsys.readouterr()
    code = 0
    try:
        main([part.replace("FOLDER", str(folder)) for part in command.split()])
    except SystemExit as exit_:
        code = int(exit_.code or 0)
    return code, capsys.readouterr().err.strip().splitlines()


@pytest.mark.parametrize(
    "reader", READERS, ids=lambda reader: f"{reader.record} in {reader.command.split()[0]}"
)
def test_a_damaged_record_is_one_line(reader, base, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(networks, "_SPEED_SECONDS", 0.0)  # a report measures what `networks.json` lacks
    content = (base / reader.record).read_bytes()
    outcomes = set()
    most = MOST_TRAINED if reader.command.startswith(("train", "eval", "targets")) else MOST
    drawn = list(variants(content, reader.record))
    drawn = [drawn[0], *random.Random(0).sample(drawn[1:], min(most, len(drawn)) - 1)]
    for number, damaged in enumerate(drawn):
        folder = copied(base, tmp_path / str(number), reader.unfinished)
        file = folder / reader.record
        file.write_bytes(damaged)
        if file.name == "state.json":
            sign(file.parent)
        code, lines = run(reader.command, folder, capsys)
        assert code in ((0,) if reader.goes_on else (0, 2)), (damaged[:500], lines)
        if code == 2:
            assert len([line for line in lines if "error" in line]) == 1, lines
            assert file.name in lines[-1] or file.parent.name in lines[-1], lines
        outcomes.add(code)
        shutil.rmtree(folder)
    assert outcomes & ({0} if reader.goes_on else {2})


@pytest.mark.parametrize("kind", ["fifo", "endless", "folder"])
@pytest.mark.parametrize("name", ["metrics.jsonl", "history.jsonl", "prune_plan.json", "status"])
def test_what_is_no_file_is_not_waited_for(name, kind, base, tmp_path, capsys):
    folder = copied(base, tmp_path / "copy")
    file = folder / "run" / name
    file.unlink()
    {"fifo": os.mkfifo, "endless": lambda file: file.symlink_to("/dev/zero"), "folder": Path.mkdir}[kind](
        file
    )
    code, lines = run(REPORT, folder, capsys)
    assert code == 0
    assert name == "status" or name in lines[0]


def test_a_history_that_nothing_reads_does_not_stop_a_run(base, tmp_path, capsys):
    folder = copied(base, tmp_path / "copy", unfinished=True)
    history = folder / "run" / "history.jsonl"
    history.unlink()
    os.mkfifo(history)
    assert run(TRAIN, folder, capsys)[0] == 0


def test_one_damaged_run_does_not_hide_the_others(base, tmp_path, capsys):
    for name in ("whole", "damaged"):
        copied(base, tmp_path / name)
    (tmp_path / "damaged" / "run" / "config.yaml").write_text("a: [")
    both = f"report {tmp_path}/damaged/run {tmp_path}/whole/run --output {tmp_path}/page.html"
    code, lines = run(both, tmp_path, capsys)
    assert code == 0
    assert [line for line in lines if "damaged/run/config.yaml" in line and "leaves this run out" in line]
    assert "whole" in (tmp_path / "page.html").read_text()
    code, lines = run(f"report {tmp_path}/damaged/run", tmp_path, capsys)
    assert (code, len(lines)) == (2, 1)


def test_whole_records_are_read_as_they_were_written(base):
    """The schemas lose and change nothing, or a resumed run would be another one."""
    run_dir = RunDir(base / "run")
    for file, schema in (
        (run_dir.summary, records.Summary),
        (run_dir.networks, records.Networks),
        (run_dir.pruning_plan, records.PlanRecord),
        (CheckpointDir(run_dir.checkpoints / STEP).state, records.State),
        (CheckpointDir(run_dir.checkpoints / STEP).manifest, records.CheckpointManifest),
    ):
        content = json.loads(file.read_text())
        assert records.load(file, schema, "").model_dump(exclude_unset=True) == content
    for file, schema in ((run_dir.metrics, records.MetricsLine), (run_dir.history, records.HistoryLine)):
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        assert list(records.lines(file, schema)) == lines
        assert lines


def test_a_log_keeps_its_whole_lines(tmp_path, capsys):
    log = tmp_path / "metrics.jsonl"
    lines = [
        '{"step": 1}',
        "[" * 50_000,
        '{"step": -1}',
        '{"step": 2, "a": "b"}',
        '{"step": 3, "loss": null}',
    ]
    log.write_text("\n".join([*lines, "x" * 3_000_000, '{"step": 4, "a": NaN}', '{"step": 5, "lo']))
    kept = list(records.lines(log, records.MetricsLine))
    assert [line["step"] for line in kept] == [1, 3, 4]
    assert "5 lines are damaged" in capsys.readouterr().err
    assert list(records.lines(tmp_path / "none", records.MetricsLine)) == []


def test_a_large_record_is_refused_and_a_report_shows_the_end_of_a_large_log(tmp_path, monkeypatch):
    log = tmp_path / "metrics.jsonl"
    log.write_text("".join(f'{{"step": {step}}}\n' for step in range(1000)))
    monkeypatch.setattr(records, "MAX_REPORTED_BYTES", 140)
    shown = [line["step"] for line in records.lines(log, records.MetricsLine, reported=True)]
    assert shown == [*range(990, 1000)]  # each has 14 bytes
    monkeypatch.setattr(records, "MAX_RECORD_BYTES", 99)
    with pytest.raises(UserError, match="Larger than 99 bytes"):
        records.load(log, records.Summary, "")


CHANGES: dict[str, Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]] = {
    "one is missing": lambda tensors: dict([*tensors.items()][1:]),
    "one too many": lambda tensors: tensors | {"other": torch.zeros(1)},
    "shape": lambda tensors: tensors | {next(iter(tensors)): torch.zeros(7)},
    "integers": lambda tensors: {name: tensor.to(torch.int8) for name, tensor in tensors.items()},
    "complex": lambda tensors: {name: tensor.to(torch.complex64) for name, tensor in tensors.items()},
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["model", "ema"])
def test_tensors_of_another_network_are_refused(name, change, base, tmp_path, capsys):
    folder = copied(base, tmp_path / "copy", unfinished=True)
    file = folder / "run" / "checkpoints" / STEP / f"{name}.safetensors"
    try:
        save_file(CHANGES[change](load_file(file)), file)
    except KeyError:
        pytest.skip("this version of safetensors writes no complex numbers")
    sign(file.parent)
    code, lines = run(TRAIN, folder, capsys)
    assert code == 2
    assert re.search(rf"{name}.safetensors (lacks|has)", lines[-1])
