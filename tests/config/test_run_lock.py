"""One start at a time in a run directory, on one machine and on several, whatever their clocks say."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from indistill.config import UserError, run_lock
from indistill.config.run_dir import RunDir

# Takes the lock, says so, and keeps it until its input ends; or says why not.
HOLDER = """
import sys
from pathlib import Path
from indistill.config import UserError, run_lock

run_lock.BEAT_SECONDS = 0.05
try:
    run_lock.take(Path(sys.argv[1]), lambda reason: print("lost:", reason, flush=True))
    print("held", flush=True)
    sys.stdin.read()
    run_lock.release_all()
except UserError as error:
    print(error, flush=True)
"""


def ignore(reason: str) -> None:
    raise AssertionError(reason)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(run_lock, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(run_lock, "STALE_SECONDS", 1.0)
    yield
    run_lock.release_all()


@pytest.fixture
def hold(tmp_path: Path) -> Iterator[Callable[[], Any]]:
    """Start processes that take the lock of `tmp_path`."""
    processes = []

    def start() -> Any:
        command = [sys.executable, "-c", HOLDER, str(tmp_path)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def rewrite(folder: Path, **changed: Any) -> None:
    """Change the record in the lock, as if another process or machine had written it."""
    path = RunDir(folder).lock
    record = json.loads(path.read_text()) | changed
    path.write_text(json.dumps({key: value for key, value in record.items() if value is not None}))


def abandoned(folder: Path, **changed: Any) -> None:
    """A lock whose holder no longer beats."""
    run_lock.take(folder, ignore)
    path = RunDir(folder).lock
    text = path.read_text()
    run_lock.release_all()
    path.write_text(text)
    rewrite(folder, id="another", **changed)


def test_a_second_start_is_refused_until_the_first_ends(tmp_path, hold):
    first, second = hold(), None
    assert first.stdout.readline() == "held\n"
    second = hold()
    line = second.stdout.readline()
    assert f"run_dir {tmp_path}: another start of this run is at work there" in line
    assert f"process {first.pid}, since 2" in line
    assert "choose another run_dir" in line
    with pytest.raises(UserError, match=f"process {first.pid}"):
        run_lock.take(tmp_path, ignore)
    first.communicate("")
    assert not RunDir(tmp_path).lock.exists()
    run_lock.take(tmp_path, ignore)
    run_lock.take(tmp_path, ignore)  # this process has it already


def test_after_sigkill_the_same_machine_starts_at_once(tmp_path, hold, capsys):
    first = hold()
    assert first.stdout.readline() == "held\n"
    first.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, first.pid, os.WEXITED | os.WNOWAIT)  # it is a zombie: its parent has not noticed yet
    run_lock.take(tmp_path, ignore)
    assert "waiting" not in capsys.readouterr().err


def test_a_process_that_has_the_number_of_an_earlier_one_is_another(tmp_path, capsys):
    abandoned(tmp_path, pid=os.getppid(), start="1")
    run_lock.take(tmp_path, ignore)
    assert "waiting" not in capsys.readouterr().err


@pytest.mark.parametrize("clock", ["1990-01-01 00:00:00 +0000", "2090-01-01 00:00:00 +0000"])
@pytest.mark.parametrize("changed", [{"machine": "another"}, {"machine": None}, {"start": "unknown"}])
def test_a_lost_machine_is_waited_for_and_then_replaced(tmp_path, capsys, changed, clock):
    abandoned(tmp_path, time=clock, **changed)
    began = time.monotonic()
    run_lock.take(tmp_path, ignore)
    assert time.monotonic() - began >= 1.0
    assert "may be at work there" in (line := capsys.readouterr().err)
    assert "waiting up to 1 s for a sign of life" in line
    assert json.loads(RunDir(tmp_path).lock.read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("content", ["", "{", "[1]", "x" * 100_000, '{"pid": -1}'])
def test_a_damaged_lock_does_not_refuse_the_run_for_good(tmp_path, content):
    RunDir(tmp_path).lock.write_text(content)
    run_lock.take(tmp_path, ignore)
    assert json.loads(RunDir(tmp_path).lock.read_text())["pid"] == os.getpid()


def test_a_start_on_another_machine_is_recognised_by_its_signs_of_life(tmp_path, hold):
    """Its clock may stand still or go back; what counts is that the file changes."""
    abandoned(tmp_path, machine="another", host="node-7")
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(0.2):
            rewrite(tmp_path, beat=time.monotonic())

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(UserError, match=r"at work there \(host node-7, process"):
            run_lock.take(tmp_path, ignore)
    finally:
        stop.set()
        thread.join()


def test_a_holder_that_was_suspended_and_replaced_ends(tmp_path, hold):
    first = hold()
    assert first.stdout.readline() == "held\n"
    first.send_signal(signal.SIGSTOP)
    rewrite(tmp_path, machine="another")  # as another machine sees it
    run_lock.take(tmp_path, ignore)
    first.send_signal(signal.SIGCONT)
    assert "taken over by host" in (line := first.stdout.readline())
    assert f"process {os.getpid()}" in line
    first.communicate("")
    assert RunDir(tmp_path).lock.exists()  # that of this process


def test_a_lock_that_somebody_deleted_comes_back(tmp_path):
    run_lock.take(tmp_path, ignore)
    RunDir(tmp_path).lock.unlink()
    deadline = time.monotonic() + 60
    while not RunDir(tmp_path).lock.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("stale", [False, True])
def test_of_many_starts_at_once_one_gets_it(tmp_path, hold, stale):
    if stale:
        abandoned(tmp_path, pid=os.getppid(), start="1")
    lines = [process.stdout.readline() for process in [hold() for _ in range(8)]]
    assert sorted(lines).count("held\n") == 1
    assert sum("at work there" in line for line in lines) == 7


def test_the_second_of_two_that_found_a_lock_stale_puts_the_first_ones_back(tmp_path):
    abandoned(tmp_path, machine="another")
    seen = run_lock._read(RunDir(tmp_path).lock)
    rewrite(tmp_path, id="of the first")
    run_lock._take_away(RunDir(tmp_path).lock, seen)
    assert json.loads(RunDir(tmp_path).lock.read_text())["id"] == "of the first"
    assert [path.name for path in tmp_path.iterdir()] == ["run.lock"]


def test_a_full_disk_does_not_take_the_lock_away(tmp_path, monkeypatch):
    run_lock.take(tmp_path, ignore)
    holder = run_lock._held[RunDir(tmp_path).lock]
    before = run_lock._read(holder.path)

    def full(_: int) -> bytes:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_lock, "_text", full)
    time.sleep(0.02)
    holder._beat_once(1)
    after = run_lock._read(holder.path)
    assert after.record == before.record
    assert after != before


def test_a_link_in_its_place_is_an_error_and_not_followed(tmp_path):
    RunDir(tmp_path).lock.symlink_to("nowhere")
    with pytest.raises(OSError, match="symbolic link"):
        run_lock.take(tmp_path, ignore)
