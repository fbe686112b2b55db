"""Two starts of the same run, and a broken checkpoint folder, with one process and with two."""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import losses, run_ranks, start_ranks

from indistill.commands.cli import main
from indistill.config.run_dir import RunDir
from indistill.training import checkpoint
from indistill.training.run_log import RunLog


def train(path: str, folder: str, hold_at: int | None = None) -> None:
    """The command line, with stderr in a file; from step `hold_at` on it waits while `folder`/hold exists."""
    end_step = RunLog.end_step

    def waiting_end_step(log: RunLog, step: int, *arguments: Any) -> Any:
        line = end_step(log, step, *arguments)
        if step == hold_at:
            Path(folder, "reached").touch()
            while Path(folder, "hold").exists():
                time.sleep(0.01)
        return line

    RunLog.end_step = waiting_end_step
    with open(f"{folder}/stderr", "a", buffering=1) as sys.stderr:
        main(["train", path])


@pytest.fixture
def config_file(tree: dict[str, Any], tmp_path: Path) -> str:
    tree |= {"duration": "8 steps", "warmup": None, "teacher": None, "kd": {"losses": [{"name": "ce"}]}}
    tree["checkpoint"] = {"every_steps": 1, "keep_last": 2}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(tree))
    return str(path)


def until(what: Path, processes: list) -> None:
    deadline = time.monotonic() + 240
    while not what.exists():
        assert time.monotonic() < deadline
        assert all(process.is_alive() for process in processes)
        time.sleep(0.01)


@pytest.mark.parametrize("world", [None, 2])
def test_a_second_start_ends_with_one_line_and_the_first_goes_on(config_file, tree, tmp_path, world):
    run_dir = RunDir(Path(tree["run_dir"]))
    (tmp_path / "hold").touch()
    first = start_ranks(train, world, config_file, str(tmp_path), 3)
    until(tmp_path / "reached", first)
    second = tmp_path / "second"
    second.mkdir()
    run_ranks(train, world, config_file, str(second), exit_code=2)
    (line,) = (second / "stderr").read_text().splitlines()
    assert line.startswith(f"indistill: error: run_dir {run_dir.path}: another start of this run is at work")
    assert f"process {first[0].pid}" in line
    assert run_dir.status.read_text() == "running\n"
    assert not run_dir.errors.exists()
    (tmp_path / "hold").unlink()
    for process in first:
        process.join(240)
    assert {process.exitcode for process in first} == {0}
    assert run_dir.status.read_text() == "done\n"
    assert len(losses(run_dir.path)) == 8
    assert not run_dir.lock.exists()


@pytest.mark.parametrize("world", [None, 2])
def test_after_sigkill_the_same_command_starts_at_once(config_file, tree, tmp_path, world):
    (tmp_path / "hold").touch()
    first = start_ranks(train, world, config_file, str(tmp_path), 3)
    until(tmp_path / "reached", first)
    for process in first:
        process.kill()  # not joined: they may be zombies
    for process in first:
        process.join()
    assert {process.exitcode for process in first} == {-signal.SIGKILL}
    run_ranks(train, world, config_file, str(tmp_path))
    assert "waiting" not in (tmp_path / "stderr").read_text()
    assert RunDir(Path(tree["run_dir"])).status.read_text() == "done\n"


def test_a_cut_state_of_an_older_checkpoint_does_not_stop_two_ranks(config_file, tree, tmp_path):
    """It ended the writer's thread of rank 0, and the other rank waited for that, at every start."""
    run_dir = RunDir(Path(tree["run_dir"]))
    (tmp_path / "hold").touch()
    first = start_ranks(train, 2, config_file, str(tmp_path), 3)
    until(tmp_path / "reached", first)
    until(run_dir.checkpoint(2), first)
    for process in first:
        process.kill()
    for process in first:
        process.join()
    (run_dir.checkpoint(1) / "state.json").write_text('{"format_ver')
    run_ranks(train, 2, config_file, str(tmp_path))
    assert run_dir.status.read_text() == "done\n"
    assert len(losses(run_dir.path)) == 8


def break_the_writer(path: str, folder: str) -> None:
    def broken(*_: Any) -> None:
        raise ZeroDivisionError("on purpose")

    checkpoint._publish = broken
    train(path, folder)


def test_all_ranks_hear_of_an_error_in_the_writers_thread(config_file, tree, tmp_path):
    processes = start_ranks(break_the_writer, 2, config_file, str(tmp_path))
    for process in processes:
        process.join(120)  # far below the collective timeout
    assert [process.exitcode for process in processes] == [1, 2]
    status = RunDir(Path(tree["run_dir"])).status.read_text()
    assert status.startswith("failed\nZeroDivisionError: on purpose")
    assert (tmp_path / "stderr").read_text().count("Traceback") == 1


def break_the_first_rank(path: str, folder: str) -> None:
    def broken(*_: Any) -> None:
        raise ZeroDivisionError("on purpose")

    checkpoint.Checkpoints.find = broken
    train(path, folder)


def test_no_rank_waits_for_a_first_rank_that_has_failed(config_file, tree, tmp_path):
    processes = start_ranks(break_the_first_rank, 2, config_file, str(tmp_path))
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [1, 2]
    assert RunDir(Path(tree["run_dir"])).status.read_text().startswith("failed\nZeroDivisionError")
