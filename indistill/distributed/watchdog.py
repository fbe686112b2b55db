"""Names the rank that stalls a run, and ends a run whose processes lost each other with one line.

Each rank notes its current place in the program. A thread publishes it every few seconds, even while the main
thread waits in a collective, in the store of the rendezvous. When rank 0 makes no progress for half of
`collective_timeout_minutes`, it names the rank that the others wait for. After the whole timeout every rank
exits: gloo would raise an error then, and NCCL would abort the process without a message.

Whoever reaches the port of the store can write into it, and make it hang: torch's client then waits without a
limit. The time is therefore kept by a thread of its own, and what the store says is checked.
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
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

from pydantic import AllowInfNan, TypeAdapter, ValidationError

from indistill.config import limits
from indistill.config.base import UserError
from indistill.config.ranks import Ranks
from indistill.config.run_dir import RunDir, keep_traceback
from indistill.distributed import preemption

if TYPE_CHECKING:
    from torch.distributed import TCPStore

_MOST_NAMED = 8  # ranks in one message; a lost node often has this many
# gloo raises a plain RuntimeError.
_COLLECTIVE = re.compile(
    r"/gloo/|nccl|timed out waiting|pair closure|connection (closed|reset)|broken pipe", re.I
)


Seconds = Annotated[float, AllowInfNan(False)]


class Place(NamedTuple):
    """Where in the program a rank is. All run the same program: the lowest `passed` is behind."""

    passed: int  # the number of places that the rank has reached so far
    step: int
    phase: str
    doing: str
    since: Seconds  # time.monotonic of the last progress; a long evaluation updates it with each batch

    def __str__(self) -> str:
        return f"step {self.step}, phase {self.phase}, {self.doing}" if self.phase else self.doing


class Report(NamedTuple):
    """The data that a rank publishes."""

    host: str
    place: Place
    still_seconds: Seconds  # since the last progress


_START = Place(0, 0, "", "starting", 0.0)
_place = _START
_run_dir: Path | None = None
_closed = threading.Event()


# --- the place of this rank: assigning a new tuple is atomic, so the thread can read it ---------------------
def begin_step(step: int, phase: str) -> None:
    """Note that a step begins; `step` counts from 1, as in metrics.jsonl."""
    global _place
    _place = Place(_place.passed + 1, step, phase, "training", time.monotonic())


def at(doing: str) -> None:
    """Note what this rank does now, within the step and phase."""
    global _place
    _place = Place(_place.passed + 1, _place.step, _place.phase, doing, time.monotonic())


def alive() -> None:
    """Signal progress within a place; ranks may call this different numbers of times."""
    global _place
    _place = _place._replace(since=time.monotonic())


# --- the thread ---------------------------------------------------------------------------------------------
def open(run_dir: Path, timeout_minutes: float) -> None:
    """Watch this process until `close`, if the run has several processes."""
    global _place, _run_dir, _closed
    close()
    _place = _START._replace(since=time.monotonic())
    _run_dir = run_dir
    _closed = threading.Event()
    ranks = Ranks.from_environment()
    if ranks.world_size > 1:
        watch = _Watch(ranks, timeout_minutes)
        for name, work in (("watchdog", watch.keep_time), ("watchdog-store", watch.tell)):
            threading.Thread(target=work, args=(_closed,), name=name, daemon=True).start()


def close() -> None:
    """Stop watching this process."""
    global _place, _run_dir
    _closed.set()
    _place = _START
    _run_dir = None


class _Watch:
    """The threads' work: end the run in time, publish this rank's place, and on rank 0 name the late rank."""

    def __init__(self, ranks: Ranks, timeout_minutes: float) -> None:
        self.rank = ranks.rank
        self.world_size = ranks.world_size
        self.timeout_minutes = timeout_minutes
        self.timeout = 60 * timeout_minutes  # seconds
        self.interval = min(10.0, self.timeout / 20)  # seconds
        # All groups of ranks share a store (groups.py).
        self.prefix = f"indistill/{os.environ.get('INDISTILL_GROUP', '')}"
        self.named_at = -1  # `passed` of the place at which the late rank was last named
        # By rank: the latest text, and when it was first seen.
        self.heard: dict[int, tuple[bytes | None, float]] = {}
        self.store: TCPStore | None = None

    def keep_time(self, closed: threading.Event) -> None:
        """Exit when this rank has made no progress for the whole timeout."""
        while not closed.wait(self.interval):
            place = _place
            if time.monotonic() - place.since > self.timeout:
                preemption.leave(
                    f"{place}: not finished within collective_timeout_minutes ({self.timeout_minutes:g}); "
                    f"{_next()}"
                )

    def tell(self, closed: threading.Event) -> None:
        """Publish this rank's place; on rank 0, name the rank that the others wait for."""
        self.store = self._connect()
        pause = 0.0
        while not closed.wait(pause):
            pause = self.interval
            place = _place
            now = time.monotonic()
            still = now - place.since
            if self._exchange(place, now) and still > self.timeout / 2 and place.passed != self.named_at:
                self.named_at = place.passed
                print(f"indistill: {self._verdict(now)}", file=sys.stderr, flush=True)

    def _connect(self) -> TCPStore | None:
        """Open a connection to the store: the one of the process group may be waiting.

        Returns None if that fails: then no rank is named, but the run still ends with a message.
        """
        import torch.distributed as dist

        timeout = timedelta(seconds=self.interval)
        address = os.environ["MASTER_ADDR"]
        port = int(os.environ["MASTER_PORT"])
        try:
            return dist.TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timeout)
        except RuntimeError:  # DistError, or one of the protocol
            return None

    def _exchange(self, place: Place, now: float) -> bool:
        """Publish this place; a rank 0 without progress also reads all places. Return whether it did so."""

        if self.store is None:
            return False
        still = now - place.since
        report = Report(socket.gethostname(), place, still)
        try:
            # The store is on rank 0's node. For the other ranks this sends without an answer: it cannot wait.
            self.store.set(f"{self.prefix}{self.rank}", json.dumps(report))
            if self.rank != 0 or still < self.timeout / 4:
                return False
            for other in range(self.world_size):
                key = f"{self.prefix}{other}"
                text = self.store.get(key) if self.store.check([key]) else None
                if other not in self.heard or self.heard[other][0] != text:
                    self.heard[other] = text, now
        except RuntimeError:  # DistError, or one of the protocol
            self.store = None
            return False
        return True

    def _verdict(self, now: float) -> str:
        reports = {rank: _parse(text) for rank, (text, _) in self.heard.items()}
        silent = {
            rank: now - since
            for rank, (text, since) in self.heard.items()
            if now - since > self.timeout / 5 or reports[rank] is None
        }
        return verdict(reports, silent)


_REPORT = TypeAdapter(Report)


def _parse(text: bytes | None) -> Report | None:
    """A rank's report; None if there is none, or something else in its place."""
    if text is None or len(text) > limits.MAX_REPORT_BYTES:
        return None
    try:
        return _REPORT.validate_json(text, strict=True)
    except ValidationError:
        return None


def verdict(reports: Mapping[int, Report | None], silent: Mapping[int, float]) -> str:
    """Name the ranks that stall the run, from the latest report of every rank, None for a rank without one.

    `silent` has, by rank, the seconds since a silent rank's last report; it includes every rank without a
    report.
    """
    known = {rank: report for rank, report in reports.items() if report is not None}
    if silent:
        late = sorted(silent)
        last = min((known[rank].place for rank in late if rank in known), key=_passed, default=None)
        problem = f"not been heard from for {max(silent.values()):.0f} s" + (
            f" (last: {last})" if last else ""
        )
    else:
        place = min((report.place for report in known.values()), key=_passed)
        late = sorted(rank for rank, report in known.items() if report.place.passed == place.passed)
        still = max(known[rank].still_seconds for rank in late)
        problem = f"been in {known[late[0]].place}, for {still:.0f} s"
        if len(late) == len(reports):
            return f"all {len(late)} ranks have {problem}: they wait for each other, or one for its device"
    named = [
        f"{rank} ({known[rank].host if rank in known else 'host unknown'})" for rank in late[:_MOST_NAMED]
    ]
    more = f" and {len(late) - _MOST_NAMED} more" if len(late) > _MOST_NAMED else ""
    subject = f"rank {named[0]} has" if len(late) == 1 else f"ranks {', '.join(named)}{more} have"
    others = [rank for rank in sorted(reports) if rank not in late]
    if not others:
        return f"{subject} {problem}"
    waiting = f"rank {others[0]} waits" if len(others) == 1 else f"ranks {_ranges(others)} wait"
    return f"{subject} {problem}; {waiting} for {'it' if len(late) == 1 else 'them'}"


def _passed(place: Place) -> int:
    return place.passed


def _ranges(ranks: Sequence[int]) -> str:
    """Format ascending numbers as in: 0-2, 4."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    return ", ".join(f"{first}-{last}" if last > first else f"{first}" for first, last in runs)


# --- the end ------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def explaining(folder: Path) -> Iterator[None]:
    """End the process with one line if a collective fails within the context.

    The traceback is in `folder`/errors. The other processes are unreachable or gone: only another start
    helps.
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
    """How to continue: a message for the end of a run."""
    newest = None
    with contextlib.suppress(UserError):  # a folder that cannot be read now
        newest = max(RunDir(_run_dir).saved_checkpoints(), default=None) if _run_dir else None
    return f"the same command goes on from {newest}" if newest else "the same command starts it again"
