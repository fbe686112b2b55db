"""Who holds a run up, and an end in one line to a run whose processes have lost each other.

Each rank notes what it is at, and a thread publishes that every few seconds, also while the main thread waits in a
collective, in the store where the processes first met. When rank 0 has come no further for half of
`collective_timeout_minutes`, it names the rank that all wait for. After the whole of it every rank leaves: gloo would
raise an error then, and NCCL abort the process without a word from here.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

from indistill.config.run_dir import RunDir, keep_traceback
from indistill.distributed import preemption

_MOST_NAMED = 8  # of the ranks that hold a run up; a node that is lost has as many
# What gloo raises is a plain RuntimeError.
_COLLECTIVE = re.compile(
    r"/gloo/|nccl|timed out waiting|pair closure|connection (closed|reset)|broken pipe", re.I
)


class Place(NamedTuple):
    """What a rank is at. All run the same program: the one that has passed the fewest places is behind the others."""

    passed: int
    step: int
    phase: str
    doing: str
    since: float  # by time.monotonic; a long evaluation moves it on with each batch

    def __str__(self) -> str:
        return f"step {self.step}, phase {self.phase}, {self.doing}" if self.phase else self.doing


class Report(NamedTuple):
    """What a rank publishes."""

    host: str
    place: Place
    still_seconds: float  # at this place


_START = Place(0, 0, "", "starting", 0.0)
_place = _START
_run_dir: Path | None = None
_closed = threading.Event()


# --- what this rank is at: a new tuple is put in place at once, for the thread to read --------------------------------
def begin_step(step: int, phase: str) -> None:
    """`step` counts from 1, as in metrics.jsonl."""
    global _place
    _place = Place(_place.passed + 1, step, phase, "training", time.monotonic())


def at(doing: str) -> None:
    global _place
    _place = Place(_place.passed + 1, _place.step, _place.phase, doing, time.monotonic())


def alive() -> None:
    """Progress at the same place, of which ranks may make different amounts."""
    global _place
    _place = _place._replace(since=time.monotonic())


# --- the thread ------------------------------------------------------------------------------------------------------
def open(run_dir: Path, timeout_minutes: float) -> None:
    """Watch this process until `close`, in a run of several."""
    global _place, _run_dir, _closed
    close()
    _place, _run_dir, _closed = _START._replace(since=time.monotonic()), run_dir, threading.Event()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        threading.Thread(target=_watch, args=(_closed, timeout_minutes), name="watchdog", daemon=True).start()


def close() -> None:
    global _place, _run_dir
    _closed.set()
    _place, _run_dir = _START, None


def _watch(closed: threading.Event, timeout_minutes: float) -> None:
    import torch.distributed as dist

    rank, world, timeout = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), 60 * timeout_minutes
    name = f"indistill/{os.environ.get('INDISTILL_GROUP', '')}"  # the store is that of all groups (groups.py)
    interval = min(10.0, timeout / 20)
    told, heard = -1, {}  # the place that was told of; each rank's latest text, and when it was first seen
    # A connection of its own: the process group's may be waiting.
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        store = dist.TCPStore(
            *address, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=interval)
        )
    except dist.DistError:
        store = None  # then nobody is named; the end is told all the same
    pause = 0.0
    while not closed.wait(pause):
        pause = interval
        place, now = _place, time.monotonic()
        still = now - place.since
        if still > timeout:
            preemption.leave(
                f"{place}: not over within collective_timeout_minutes ({timeout_minutes:g}); {_next()}"
            )
        if store is None:
            continue
        try:
            # The store is on rank 0's node. For the others this is a send without an answer: it cannot wait.
            store.set(f"{name}{rank}", json.dumps(Report(socket.gethostname(), place, still)))
            if rank != 0 or still < timeout / 4:
                continue
            for other in range(world):
                key = f"{name}{other}"
                text = store.get(key) if store.check([key]) else None
                if other not in heard or heard[other][0] != text:
                    heard[other] = text, now
        except dist.DistError:
            store = None
            continue
        if still > timeout / 2 and place.passed != told:
            told = place.passed
            reports = {other: _parse(text) for other, (text, _) in heard.items()}
            silent = {
                other: now - since
                for other, (text, since) in heard.items()
                if now - since > timeout / 5 or not text
            }
            print(f"indistill: {verdict(reports, silent)}", file=sys.stderr, flush=True)


def _parse(text: bytes | None) -> Report | None:
    if text is None:
        return None
    host, place, still = json.loads(text)
    return Report(host, Place(*place), still)


def verdict(reports: dict[int, Report | None], silent: dict[int, float]) -> str:
    """Who holds the run up, of the latest reports of all ranks and the seconds for which some were silent."""
    if silent:
        late = sorted(silent)
        known = [reports[rank] for rank in late if reports[rank]]
        last = f" (last: {min(known, key=lambda report: report.place.passed).place})" if known else ""
        what = f"not been heard from for {max(silent.values()):.0f} s{last}"
    else:
        least = min(report.place.passed for report in reports.values())
        late = sorted(rank for rank, report in reports.items() if report.place.passed == least)
        place, still = reports[late[0]].place, max(reports[rank].still_seconds for rank in late)
        what = f"been in {place}, for {still:.0f} s"
        if len(late) == len(reports):
            return f"all {len(late)} ranks have {what}: they wait for each other, or one for its device"
    named = [
        f"{rank} ({reports[rank].host if reports[rank] else 'host unknown'})" for rank in late[:_MOST_NAMED]
    ]
    more = f" and {len(late) - _MOST_NAMED} more" if len(late) > _MOST_NAMED else ""
    subject = f"rank {named[0]} has" if len(late) == 1 else f"ranks {', '.join(named)}{more} have"
    others = [rank for rank in sorted(reports) if rank not in late]
    if not others:
        return f"{subject} {what}"
    waiting = f"rank {others[0]} waits" if len(others) == 1 else f"ranks {_ranges(others)} wait"
    return f"{subject} {what}; {waiting} for {'it' if len(late) == 1 else 'them'}"


def _ranges(ranks: Sequence[int]) -> str:
    """Of ascending numbers: 0-2, 4."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    return ", ".join(f"{first}-{last}" if last > first else f"{first}" for first, last in runs)


# --- the end ---------------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def explaining(folder: Path) -> Iterator[None]:
    """Where a collective fails in here, leave with one line that says where, and the traceback in `folder`/errors.

    The other processes are out of reach or gone, and nothing but another start would mend that.
    """
    try:
        yield
    except RuntimeError as error:
        if not _of_collective(error):
            raise
        file = keep_traceback(error, folder)
        sentence = re.sub(r"^\[\S+\] ", "", str(error).strip().splitlines()[0]).partition(". ")[0]
        preemption.leave(f"{_place}: lost the other processes: {sentence} (traceback: {file}); {_next()}")
    finally:
        close()


def _of_collective(error: RuntimeError) -> bool:
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or (
        dist.is_initialized() and bool(_COLLECTIVE.search(str(error)))
    )


def _next() -> str:
    newest: Any = _run_dir and max(RunDir(_run_dir).saved_checkpoints(), default=None)
    return f"the same command goes on from {newest}" if newest else "the same command starts it again"
