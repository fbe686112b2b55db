"""Stop in good order when a machine is taken away, or when somebody presses Ctrl-C.

SIGTERM, SIGINT, SIGUSR1, SIGUSR2 or a time limit ask one rank or all of them. The ranks agree at the end of a step,
write a checkpoint, and exit with `exit_code()`. A second signal ends the process at once, and so does the first where
no step is under way: while a run starts, after its last checkpoint, and in every command but `train`. So does the first
if no step ends within PATIENCE_SECONDS. A rank that waits for data is such a case: the others wait for it within the
step, where nothing consistent can be saved. It waits on; if its shard comes too late, all leave without a checkpoint
and the last one counts.

The first line of `status` in the run directory, or in that of the whole chain, tells a launcher what to do next:

    running   killed, if no process is left: start it again, it goes on from its newest checkpoint
    requeue   stopped in good order, or its processes lost each other: start it again
    failed    an error that another start would meet again; the second line gives the reason and the traceback's file
    done      nothing is left to do
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from indistill.config import UserError
from indistill.config.files import replace_text
from indistill.config.run_dir import append_end, describe_error, in_one_line

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h
INTERRUPTED = (
    128 + signal.SIGINT
)  # what shells say of Ctrl-C: whoever pressed it wants no restart by a script
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
PATIENCE_SECONDS = 25.0  # torchrun and Kubernetes kill 30 s after SIGTERM
SAME_SECONDS = (
    1.0  # signals this close are one: a launcher passes on what the scheduler has sent to all processes
)
CHECK_SECONDS = 2.0  # between agreements of the ranks, and between a loader worker's looks at its rank
MARGIN_SECONDS = 120.0  # before SLURM's time limit, or a tenth of what is left if that is less


class Preempted(Exception):
    """The run stopped in good order, on all ranks and with a checkpoint: the same command goes on with it."""


@dataclass
class _Process:
    """What this process knows of its own end: signals come to a process, whichever run or stage it is at."""

    asked_at: float = math.inf  # of the first signal, by time.monotonic
    asked_by: str = "another rank"  # the first signal's name, or the time limit
    deadline: float = math.inf  # by time.time
    began: float | None = None  # by time.time, of this start of a run or chain
    status: Path | None = None
    in_steps: bool = False  # a signal waits for the end of a step
    agreed: bool = False  # a checkpoint is being written, which may take its time


_process = _Process()
_leaving = threading.Lock()


# --- being asked -----------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def listening() -> Iterator[None]:
    """Obey the signals in here; in the main thread only.

    A thread hears them, from the pipe that Python's C handler writes to: a Python handler would have to wait for a main
    thread that waits in a collective.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    threading.Thread(target=_listen, args=(reader,), name="preemption", daemon=True).start()
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    # A shell has its background jobs ignore Ctrl-C: they are to go on.
    heard = [
        number for number in SIGNALS if number != signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN
    ]
    before = {number: signal.signal(number, lambda *_: None) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(-1)
        os.close(writer)
        _process.asked_at, _process.asked_by = math.inf, _Process.asked_by


def _listen(reader: int) -> None:
    while True:
        patience = None
        if _process.asked_at < math.inf and not _process.agreed:
            patience = max(0.0, _process.asked_at + PATIENCE_SECONDS - time.monotonic())
        if not select.select([reader], [], [], patience)[0]:
            if not _process.agreed:
                leave(f"no step ended within {PATIENCE_SECONDS:.0f} s of the signal")
            continue
        numbers = os.read(reader, 64)
        if not numbers:
            os.close(reader)
            return
        for number in numbers:
            if number in SIGNALS:
                _hear(signal.Signals(number).name)


def _hear(name: str) -> None:
    now = time.monotonic()
    if _process.asked_at == math.inf:
        _process.asked_at, _process.asked_by = now, name
        if not _process.in_steps:
            leave(name)
        if os.environ.get("RANK", "0") == "0":
            _say(f"{name}: stopping with a checkpoint when this step ends; a second signal stops without")
    elif now - _process.asked_at > SAME_SECONDS:
        leave(f"a second signal, {name}")


def leave(reason: str) -> NoReturn:
    """End this process at once; its last checkpoint is what counts."""
    _leaving.acquire()  # for good: of several threads the first gives its reason
    _say(f"rank {os.environ.get('RANK', '0')} leaves at once: {reason}")
    if _process.status is not None:
        _end("requeue", f"left at once: {reason}")
    exit_at_once(exit_code())


def exit_at_once(code: int) -> NoReturn:
    """End this process and those that it has started: a pool's would wait for work for ever.

    An orderly exit would wait for ranks that wait for this one, for loaders, and for shards on their way. Nothing is
    flushed: the main thread may hold the streams.
    """
    with contextlib.suppress(Exception):
        for child in multiprocessing.active_children():
            child.kill()
    os._exit(code)


def exit_code() -> int:
    """INTERRUPTED if this process was asked by Ctrl-C, else EXIT_CODE."""
    return INTERRUPTED if _process.asked_by == "SIGINT" else EXIT_CODE


def _say(line: str) -> None:
    """Print to standard error, from any thread, below the live line of a terminal."""
    with contextlib.suppress(OSError):
        begin = "\n" if os.isatty(2) else ""
        os.write(2, f"{begin}indistill: {line}\n".encode())


def asked() -> bool:
    """Whether this process has been asked to stop. The others may know nothing of it yet."""
    return _process.asked_at < math.inf or time.time() >= _process.deadline


def in_worker(worker_id: int) -> None:
    """For a DataLoader's `worker_init_fn`: only the rank that it loads for may end a worker.

    Schedulers and terminals signal every process of a job, and a worker that dies would take the step down with it.
    """
    signal.set_wakeup_fd(-1)
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    rank = multiprocessing.parent_process()

    def obey_the_rank() -> None:
        while True:
            heard = signal.sigtimedwait(SIGNALS, CHECK_SECONDS)
            # A forkserver's processes are not told when the rank is gone.
            if (
                heard and (heard.si_signo, heard.si_pid) == (signal.SIGTERM, rank.pid)
            ) or not rank.is_alive():
                os._exit(0)

    threading.Thread(target=obey_the_rank, daemon=True).start()


@contextlib.contextmanager
def signals_blocked(*numbers: signal.Signals) -> Iterator[None]:
    """Start processes in here that these signals, by default all SIGNALS, are not to end: they inherit the mask.

    A terminal sends Ctrl-C to them too, and a scheduler its SIGTERM.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers or SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# --- agreeing --------------------------------------------------------------------------------------------------------
class Agreement:
    """Whether the ranks stop: decided between two steps, the same on all of them.

    A logged line sums its terms over the ranks anyway and takes the question along. Between lines one number is summed
    every CHECK_SECONDS, counted in steps by the pace that the last line told all ranks; at every step until the first.
    """

    def __init__(self, world: int, mean_over_ranks: Callable[[float], float]) -> None:
        self.world, self.mean_over_ranks, self.every_steps = world, mean_over_ranks, 1

    def open(self, max_hours: float | None) -> None:
        """Steps begin: from here to `close` a signal waits for the end of one."""
        _process.in_steps, _process.agreed = True, False
        _process.deadline = _deadline(max_hours, time.time())

    def close(self) -> None:
        _process.in_steps, _process.deadline = False, math.inf

    def reached(self, step: int, told: tuple[float, float] | None) -> bool:
        """Call on all ranks after each step; `told` at a logged one: their means of `asked` and seconds per step."""
        if self.world == 1:
            return settle(asked())
        if told is not None:
            ranks_asked, step_seconds = told
            self.every_steps = max(1, int(CHECK_SECONDS / max(step_seconds, 1e-3)))
            return settle(ranks_asked)
        return step % self.every_steps == 0 and settle(self.mean_over_ranks(float(asked())))


def settle(ranks_asked: float) -> bool:
    """Whether any rank was asked: then all stop, and take the time that a checkpoint needs."""
    _process.agreed = ranks_asked > 0
    if _process.agreed:
        if time.time() >= _process.deadline and _process.asked_at == math.inf:
            _process.asked_by = "the time limit"
        _process.deadline = math.inf  # met
    return _process.agreed


def _deadline(max_hours: float | None, now: float) -> float:
    """When to stop, by time.time: before the job's time limit, and `max_hours` after this start."""
    deadline = math.inf if max_hours is None else (_process.began or now) + 3600 * max_hours
    job_end = float(os.environ.get("SLURM_JOB_END_TIME", "inf"))
    if now < job_end < math.inf:  # a shell may outlive the job that it began in
        deadline = min(deadline, job_end - min(MARGIN_SECONDS, (job_end - now) / 10))
    return deadline


# --- telling the launcher --------------------------------------------------------------------------------------------
@contextlib.contextmanager
def status_in(run_dir: Path) -> Iterator[None]:
    """Keep `run_dir/status` while a run or a chain goes on in here."""
    _process.status, _process.began = run_dir / "status", time.time()
    _mark("running")
    try:
        yield
        _mark("done")
    except Preempted as stopped:
        _end("requeue", f"{stopped}, asked by {_process.asked_by}")
        raise
    except KeyboardInterrupt:  # Python's own, where nobody listens: in a notebook, say
        _end("requeue", "interrupted, without a checkpoint")
        raise
    except UserError as error:
        _end("failed", in_one_line(error), on_any_rank=error.found_by_one_rank)
        raise
    except BaseException as error:
        _end("failed", describe_error(error, run_dir), on_any_rank=True)
        raise
    finally:
        _process.status = _process.began = None


def _end(word: str, reason: str, on_any_rank: bool = False) -> None:
    """Write the end into `status` and the history: as failed, if another rank has said so before this one lost it."""
    before = _mark(word, reason, on_any_rank)
    append_end(_process.status.parent, *(("failed", before) if before else (word, reason)))


def _mark(word: str, reason: str = "", on_any_rank: bool = False) -> str:
    """Write `status`, unless another rank has failed and this one is to be requeued: then return that one's reason.

    Not being able to write is no reason to fail: checkpoints will tell, and the exit code says the same.
    """
    status = _process.status
    with contextlib.suppress(OSError):
        if word == "requeue" and status.exists():
            said, _, why = status.read_text().partition("\n")
            if said == "failed":
                return why.strip() or said
        if os.environ.get("RANK", "0") != "0" and not on_any_rank:
            return ""
        status.parent.mkdir(parents=True, exist_ok=True)
        replace_text(status, f"{word}\n{reason}\n" if word == "failed" else f"{word}\n")
    return ""
