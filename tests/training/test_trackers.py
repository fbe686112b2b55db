"""Trackers: what arrives in TensorBoard, and that none can end a run."""

from __future__ import annotations

import importlib.util
import json
import os
import pty
import re
import shutil
import struct
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator, tracking
from accelerate.utils import LoggerType
from conftest import EPS, run_ranks, train_until
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from indistill import config
from indistill.config import UserError
from indistill.config.files import read_lines
from indistill.training import trackers


def test_the_names_are_accelerates():
    assert sorted(config.TRACKERS) == sorted(set(LoggerType.list()) - {"all"})
    assert sorted(config.TRACKERS) == sorted(tracking.LOGGER_TYPE_TO_CLASS)


@pytest.mark.parametrize(
    ("name", "nearest"), [("tensorbord", "tensorboard"), ("w&b", "wandb"), ("all", "mlflow")]
)
def test_an_unknown_name_is_told_the_nearest(tree, name, nearest):
    with pytest.raises(
        UserError, match=rf"trackers.1: unknown tracker '{name}'; the nearest valid one is '{nearest}'"
    ):
        config.parse(tree | {"trackers": ["tensorboard", name]}, "test")


class Failing(tracking.GeneralTracker):
    """Raises in one of its methods."""

    name, requires_logging_directory, tracker = "", False, None
    fails_in = ""

    def __init__(self, project: str, *folder: Any, **options: Any) -> None:
        super().__init__()
        self.logged.clear()

    def start(self) -> None:
        self._maybe_fail("start")

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        self.logged.append(step)
        if step in (5, 6):
            time.sleep(0.2 * (self.fails_in == "slow"))
            self._maybe_fail("log", "slow")

    def finish(self) -> None:
        self._maybe_fail("finish", "log")

    def _maybe_fail(self, *where: str) -> None:
        if self.fails_in == "input":
            input("API key: ")
        if self.fails_in in where:
            raise OSError(5, "no route\nto it")


def scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_a_run_with_trackers_that_fail(tree, capsys, monkeypatch):
    """Each is reported once; the run goes on, and TensorBoard has the lines of metrics.jsonl."""
    fails_in = {"wandb": "start", "aim": "log", "comet_ml": "finish", "clearml": "input", "swanlab": "slow"}
    monkeypatch.setattr(trackers, "_PATIENCE_SECONDS", 0.1)
    logged = {name: [] for name in fails_in}
    for name, where in fails_in.items():
        kind = type(name, (Failing,), {"fails_in": where, "logged": logged[name]})
        monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, name, kind)
    installed = [LoggerType(name) for name in ("tensorboard", *fails_in)]
    monkeypatch.setattr(trackers, "get_available_trackers", lambda: installed)
    tree |= {
        "trackers": ["mlflow", "tensorboard", *fails_in],
        "checkpoint": {"every_steps": 8, "keep_last": 9},
    }
    tree["evaluate"] = {"every": "10 steps", "similarity_samples": 0}
    run_dir = Path(tree["run_dir"])

    train_until(tree, step=11)
    told = [line for line in capsys.readouterr().err.splitlines() if "tracker" in line]
    reason = r"OSError: \[Errno 5\] no route to it"
    expected = [
        r"mlflow: not installed \(pip install mlflow\): the run goes on without it",
        rf"wandb could not be started \({reason}\): the run goes on without it",
        r"clearml could not be started \(EOFError: .*\): the run goes on without it",
        rf"aim failed at step 5 \({reason}\): the run goes on, and tries again at each line",
        rf"swanlab failed at step 5 \({reason}\): the run goes on without it",
        rf"comet_ml failed at the end \({reason}\): metrics.jsonl has what it may lack",
    ]
    assert len(told) == len(expected)
    for line, pattern in zip(told, expected):
        assert re.fullmatch(f"indistill: tracker {pattern}", line), line
    assert logged["wandb"] == logged["clearml"] == []
    assert logged["swanlab"] == [1, 2, 3, 4, 5]
    assert sorted(set(logged["aim"])) == list(range(1, 12))

    folder = run_dir / "tensorboard"
    assert [step for step, _ in scalars(folder, "loss")] == list(range(1, 12))
    tree["trackers"] = ["tensorboard"]
    train_until(tree, step=14, resume=str(run_dir / "checkpoints" / "step-00000008"))
    train_until(tree)
    lines = read_lines(run_dir / "metrics.jsonl")
    for tag in ("loss", "images_per_second", "top1", "checkpoint_stall_seconds"):
        wanted = [(line["step"], line[tag]) for line in lines if tag in line]
        assert len(wanted) > 1
        assert scalars(folder, tag) == [(step, pytest.approx(value, rel=EPS)) for step, value in wanted]
    assert json.loads((run_dir / "summary.json").read_text())["step"] == 24

    (session,) = folder.glob("*/events.*")  # of three starts
    told = EventAccumulator(str(session.parent)).Reload().PluginTagToContent("hparams")
    start = HParamsPluginData.FromString(told["_hparams_/session_start_info"]).session_start_info
    assert set(start.hparams) == set(config.flatten(config.parse(tree, "test"), without=()))
    assert start.hparams["optimizer.lr"].number_value == 1e-3
    assert start.hparams["teacher.name"].string_value == "cnn32_auxiliary"
    assert start.hparams["compile"].bool_value is False
    assert start.hparams["warmup.durations"].string_value == "['4 steps', '4 steps', '5 steps']"


def test_tensorboard_on_a_disk_that_is_lost(tree, monkeypatch):
    monkeypatch.setattr(threading, "excepthook", lambda _: None)  # of its thread that writes
    said = []
    mine = trackers.Trackers(said.append)
    mine.start(config.parse(tree | {"trackers": ["tensorboard"]}, "test"), "run", 0)
    mine.log({"loss": 1.0}, 1)
    assert said == []
    shutil.rmtree(tree["run_dir"])
    for step in (2, 3):
        mine.log({"loss": 1.0}, step)
    mine.finish()
    (line,) = said
    assert re.fullmatch(
        r"tracker tensorboard failed at step 2 \(.*Error: .*\): the run goes on without it", line
    )


# --- the real wandb, where it is installed ------------------------------------------------------------------


def use_wandb(trees: list[dict[str, Any]], folder: Path, offline: bool) -> None:
    """At a terminal, without a login; or offline: a run that goes back to step 3, and two runs at once."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        os.environ.pop(name)
    os.environ |= {"HOME": str(folder), "WANDB_CONFIG_DIR": str(folder), "NETRC": str(folder / "netrc")}
    os.environ |= {"WANDB_MODE": "offline"} if offline else {}
    Accelerator()
    first, second = (config.parse(tree | {"trackers": ["wandb"]}, "test") for tree in trees)

    def begin(settings: config.Config, run_id: str, after: int, last: int) -> trackers.Trackers:
        Path(settings.run_dir).mkdir(exist_ok=True)
        with (folder / "said").open("a") as said:
            begun = trackers.Trackers(said.write)
            begun.start(settings, run_id, after)
            for step in range(after + 1, last + 1):
                begun.log({"loss": 1.0 / step}, step)
                begun.log({"top1": 0.5}, step)
        return begun

    if not offline:
        _, terminal = pty.openpty()
        sys.stdin, sys.stderr = os.fdopen(terminal), os.fdopen(os.dup(terminal), "w")
        begin(first, "0" * 32, 0, 1)
        return
    begin(first, "1" * 32, 0, 4).finish()
    both = begin(first, "1" * 32, 3, 6), begin(second, "2" * 32, 0, 2)
    both[0].log({"loss": 7.0}, 7)
    for one in both:
        one.finish()


def wandb_records(path: Path) -> Iterator[Any]:
    """Of an offline run: protocol buffers in blocks of 32 KiB, as LevelDB logs them."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, record = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (room := -at % 32768) and room < 7:
            at += room
        _, length, kind = struct.unpack_from("<IHB", data, at)
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or its last part
            yield Record.FromString(record)
            record = b""


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="needs wandb: pip install wandb")
def test_wandb_asks_nobody_and_keeps_runs_apart(tree, tmp_path):
    trees = [tree | {"run_dir": str(tmp_path / name)} for name in ("one", "two")]
    for offline in (False, True):
        run_ranks(use_wandb, None, trees, tmp_path, offline)
    told = (tmp_path / "said").read_text()
    assert re.fullmatch(
        r"tracker wandb could not be started \(.*API key.*\): the run goes on without it", told
    )

    seen = {}
    for path in sorted(tmp_path.glob("*/wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime):
        records = list(wandb_records(path))
        (run,) = (record.run for record in records if record.WhichOneof("record_type") == "run")
        assert (run.project, run.display_name) == ("indistill", path.parents[2].name)
        update = next(record.config.update for record in records if len(record.config.update) > 1)
        assert {item.key or item.nested_key[0]: item.value_json for item in update}["optimizer.lr"] == "0.001"
        lines = [record.history for record in records if record.WhichOneof("record_type") == "history"]
        losses = {
            line.step.num: json.loads(item.value_json)
            for line in lines
            for item in line.item
            if (item.key or item.nested_key[0]) == "loss"
        }
        seen.setdefault(run.run_id, []).append(losses)
    assert seen == {
        "1" * 32: [{1: 1.0, 2: 1 / 2, 3: 1 / 3, 4: 1 / 4}, {4: 1 / 4, 5: 1 / 5, 6: 1 / 6, 7: 7.0}],
        "2" * 32: [{1: 1.0, 2: 1 / 2}],
    }
