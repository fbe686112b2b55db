"""Keeps two starts of a run out of one run directory: `run.lock`, a file that its holder keeps alive.

The file is created with O_EXCL and taken away with rename, which are atomic on NFS too; flock is not needed.
Its holder writes it anew every BEAT_SECONDS. A process of the same machine is looked up by its number and its
start time. Of any other machine nobody can tell whether a process lives, and clocks differ: a start watches
the file by its own clock, and takes it over if nothing has changed in it for STALE_SECONDS. A holder that was
stopped for longer (suspended, cut off from the file system) finds another one in its place, and ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from indistill.config.base import UserError
from indistill.config.run_dir import RunDir

BEAT_SECONDS = 10.0
STALE_SECONDS = 60.0  # without a sign of life; a start on another machine waits this long after a crash
_RECORD_BYTES = 512  # of a fixed length, so that it can be overwritten on a full disk


class _Seen(NamedTuple):
    """The lock file as it was read; any change of it is a sign of life."""

    content: bytes
    changed: int  # st_mtime_ns

    @property
    def record(self) -> dict[str, Any]:
        """What its holder wrote; empty if it is not readable, as while it is being written."""
        with contextlib.suppress(ValueError, RecursionError):
            if isinstance(record := json.loads(self.content), dict):
                return record
        return {}


# --- taking and releasing -----------------------------------------------------------------------------------
_held: dict[Path, _Holder] = {}


def take(run_dir: Path, lost: Callable[[str], None]) -> None:
    """Lock a run directory, which is created, for this process; it may hold it already.

    `lost` is called in a thread if another start has taken the directory over. Raises UserError if another
    start holds it, and OSError if the file cannot be written.
    """
    path = RunDir(run_dir).lock.absolute()
    holder = _held.get(path)
    if (
        holder is not None and holder.own == own_record()
    ):  # not that of a process that this one was forked from
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    while not _created(path):
        seen = _read(path)
        if seen is None:  # released since
            continue
        alive = is_alive(seen.record)
        if alive is None:
            alive = _gives_sign(path, seen, run_dir)
        if alive:
            raise UserError(
                f"run_dir {run_dir}: another start of this run is at work there ({described(seen.record)}): "
                "stop it or wait until it has ended, or choose another run_dir"
            )
        _take_away(path, seen)
    _held[path] = _Holder(path, lost)


def _gives_sign(path: Path, first: _Seen, run_dir: Path) -> bool:
    """Wait until the holder on another machine gives a sign of life; False if it does not, or lets go."""
    print(
        f"indistill: run_dir {run_dir}: another start of this run may be at work there "
        f"({described(first.record)}): waiting up to {STALE_SECONDS:.0f} s for a sign of life",
        file=sys.stderr,
        flush=True,
    )
    end = time.monotonic() + STALE_SECONDS
    while time.monotonic() < end:
        time.sleep(min(1.0, BEAT_SECONDS))
        seen = _read(path)
        if seen is None:
            return False
        # An unreadable record may be one that is being written.
        if seen != first and first.record:
            return True
        first = seen
    return False


def is_free(run_dir: Path) -> bool:
    """Whether no start is known to be at work in a run directory."""
    seen = _read(RunDir(run_dir).lock)
    return seen is None or is_alive(seen.record) is False


def release_all() -> None:
    """Release all locks that this process holds."""
    _release(tuple(_held))


def _release(paths: Iterable[Path]) -> None:
    for path in paths:
        holder = _held.pop(path, None)
        if holder is not None and holder.own == own_record():  # not in a forked process
            holder.release()


@contextlib.contextmanager
def released_after() -> Iterator[None]:
    """Release the locks that are taken within the context."""
    before = set(_held)
    try:
        yield
    finally:
        _release(set(_held) - before)


class _Holder:
    """A lock that this process holds, and the thread that keeps it alive."""

    def __init__(self, path: Path, lost: Callable[[str], None]) -> None:
        self.path = path
        self.lost = lost
        self.own = own_record()
        self.released = threading.Event()
        self.guard = threading.Lock()  # a beat and a release do not overlap
        threading.Thread(target=self._beat, name="run lock", daemon=True).start()

    def _beat(self) -> None:
        count = 0
        while not self.released.wait(BEAT_SECONDS):
            count += 1
            holder = None
            with self.guard, contextlib.suppress(OSError):
                if self.released.is_set():
                    return
                holder = self._beat_once(count)
            if holder is not None:
                self.lost(f"{self.path}: taken over by {described(holder)}, while this process was stopped")
                return

    def _beat_once(self, count: int) -> dict[str, Any] | None:
        """Give a sign of life; return the record of the start that has taken the lock, if one has."""
        seen = _read(self.path)
        if seen is None:  # deleted by hand
            _created(self.path)
            return None
        record = seen.record
        if record and record.get("id") != self.own["id"]:
            return record
        with open(self.path, "r+b", buffering=0) as file:
            try:
                file.write(_text(count))
                os.fsync(file.fileno())
            except OSError:  # a full disk, on a file system that never writes in place
                os.utime(file.fileno())
        return None

    def release(self) -> None:
        self.released.set()
        with self.guard, contextlib.suppress(OSError):
            seen = _read(self.path)
            if seen and seen.record.get("id") == self.own["id"]:
                self.path.unlink()


# --- the file -----------------------------------------------------------------------------------------------
def _created(path: Path) -> bool:
    """Create the file; False if it exists."""
    try:
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
    except FileExistsError:
        return False
    try:
        os.write(file, _text(0))
        os.fsync(file)
    finally:
        os.close(file)
    return True


def _read(path: Path) -> _Seen | None:
    """Read the file; opening it makes NFS ask the server. None if it is not there; a link is an OSError."""
    flags = os.O_NONBLOCK | os.O_NOFOLLOW
    try:
        with open(path, "rb", opener=lambda name, mode: os.open(name, mode | flags)) as file:
            return _Seen(file.read(2 * _RECORD_BYTES), os.fstat(file.fileno()).st_mtime_ns)
    except FileNotFoundError:
        return None


def _take_away(path: Path, seen: _Seen) -> None:
    """Delete the lock of a start that is gone, unless another start has been quicker.

    Of two starts that find it stale, the second would take away the lock of the first: it puts that back.
    """
    aside = path.with_name(f".{path.name}.{os.urandom(8).hex()}")
    with contextlib.suppress(FileNotFoundError):
        path.rename(aside)
        moved = _read(aside)
        if moved is not None and moved.record.get("id") != seen.record.get("id"):
            with contextlib.suppress(OSError):
                os.link(aside, path)
        aside.unlink()


def _text(count: int) -> bytes:
    """The record: a fixed number of bytes, which differ with each beat."""
    text = json.dumps({**own_record(), "beat": count}).encode()
    return text.ljust(_RECORD_BYTES - 1)[: _RECORD_BYTES - 1] + b"\n"


# --- processes ----------------------------------------------------------------------------------------------
def _machine() -> str:
    """Identify the set of processes that can see each other: a boot of a machine, and a container on it."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{socket.gethostname()} {psutil.boot_time():.0f}"


def _start_of(pid: int) -> str | None:
    """The start time of a process, in the machine's own count where there is one; None if it has ended."""
    try:
        # Fields from the third on, behind the name in brackets: the state, and 19 later the start in ticks.
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if state in "ZX" else fields[18]
    except (OSError, ValueError, IndexError):
        pass
    try:
        os.kill(pid, 0)
        return f"{psutil.Process(pid).create_time():.0f}"
    except ProcessLookupError:
        return None
    except (OSError, OverflowError, psutil.Error):  # another user's, and hidden
        return "unknown"


def is_alive(record: dict[str, Any]) -> bool | None:
    """Whether the process that wrote a record lives; None if this machine cannot tell."""
    own, pid, start = own_record(), record.get("pid"), record.get("start")
    if record.get("machine") != own["machine"] or not isinstance(pid, int) or pid < 1 or start == "unknown":
        return None
    found = _start_of(pid)
    return None if found == "unknown" else found == start


def own_record() -> dict[str, Any]:
    return _record(os.getpid())


@cache
def _record(pid: int) -> dict[str, Any]:
    """What this process writes into its locks; a forked one has another number and another id."""
    return {
        "id": os.urandom(8).hex(),
        "host": socket.gethostname()[:100],
        "pid": pid,
        "start": _start_of(pid),
        "machine": _machine(),
        "time": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }


def described(record: dict[str, Any]) -> str:
    """Name the holder of a lock."""
    host, pid, begun = (str(record.get(key, "unknown"))[:100] for key in ("host", "pid", "time"))
    return f"host {host}, process {pid}, since {begun}"
