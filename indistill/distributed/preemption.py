"""Stops a run with a checkpoint when its machine is preempted, or when somebody presses Ctrl-C.

SIGTERM, SIGINT, SIGUSR1, SIGUSR2 or a time limit ask one rank or all of them to stop. The ranks agree at the
end of a step, write a checkpoint, and exit with `exit_code()`. The process ends at once on a second signal;
if no step ends within PATIENCE_SECONDS of the first; and on the first if no step is running: while a run
starts, after its last checkpoint, and in every command but `train`. When one rank waits for data, the others
wait for it within the step, where no consistent state can be saved. If its shard arrives too late, all ranks
exit without a new checkpoint.

The first line of `status` in the run directory, or in that of the whole chain, tells a launcher what to do
next:

    running   if no process is left, it was killed: start it again, it continues from its newest checkpoint
    requeue   stopped with a checkpoint, or its processes lost each other: start it again
    failed    an error that would occur again; the second line has the reason and the traceback's file
    done      nothing is left to do
"""

from __future__ import annotations

import contextlib
import fcntl
import json
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

import psutil

from indistill.config import UserError, in_one_line, printable, records, run_lock
from indistill.config.files import replace_text
from indistill.config.ranks import Ranks
from indistill.config.run_dir import RunDir, append_end, describe_error

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h
# The exit code of shells for Ctrl-C: the user who pressed it does not want a script to start the run again.
INTERRUPTED = 128 + signal.SIGINT
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
PATIENCE_SECONDS = 25.0  # torchrun and Kubernetes kill 30 s after SIGTERM
# Signals this close together count as one: a launcher passes on a signal that the scheduler sends to all
# processes.
SAME_SECONDS = 1.0
CHECK_SECONDS = 2.0  # between agreements of the ranks, and between a loader worker's checks of its rank
MARGIN_SECONDS = 120.0  # before SLURM's time limit, or a tenth of the remaining time if that is less


_TIME_LIMIT = "the time limit"
# Reasons to stop after which a launcher starts nothing anew.
_FOR_GOOD = ("SIGINT", "SIGUSR1", "SIGUSR2", _TIME_LIMIT)


class Preempted(Exception):
    """The run stopped on all ranks with a checkpoint; the same command continues it."""


@dataclass
class _Process:
    """The requests to stop that this process has received, in whatever run or stage."""

    asked_at: float = math.inf  # time.monotonic of the first signal
    asked_by: str = "another rank"  # the first signal's name, or the time limit
    deadline: float = math.inf  # time.time of the time limit
    began: float | None = None  # time.time of this start of a run or chain
    status: Path | None = None
    refusal: str | None = None  # why this start may not use the run directory: another one is at work there
    stepped: bool = False  # this start of a run or chain has made a step
    in_steps: bool = False  # a signal is acted on at the end of a step
    agreed: bool = False  # the ranks stop; a checkpoint is being written, with no time limit


_process = _Process()
_leaving = threading.Lock()


# --- receiving signals --------------------------------------------------------------------------------------
@contextlib.contextmanager
def listening() -> Iterator[None]:
    """Handle the signals within the context; in the main thread only.

    A thread reads them from the pipe that Python's C handler writes to: a Python handler would not run while
    the main thread waits in a collective.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    threading.Thread(target=_listen, args=(reader,), name="preemption", daemon=True).start()
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    # A shell makes its background jobs ignore Ctrl-C: they must continue.
    handled = [
        number for number in SIGNALS if number != signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN
    ]
    before = {number: signal.signal(number, lambda *_: None) for number in handled}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(-1)
        os.close(writer)
        _process.asked_at = math.inf
        _process.asked_by = _Process.asked_by


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
                _receive(signal.Signals(number).name)


def _receive(name: str) -> None:
    now = time.monotonic()
    if _process.asked_at == math.inf:
        _process.asked_at = now
        _process.asked_by = name
        if not _process.in_steps:
            leave(name)
        if Ranks.from_environment().is_main_process:
            _print(f"{name}: stopping with a checkpoint when this step ends; a second signal stops without")
    elif now - _process.asked_at > SAME_SECONDS:
        leave(f"a second signal, {name}")


def leave(reason: str) -> NoReturn:
    """End this process at once; the run continues from its last checkpoint."""
    _leaving.acquire()  # never released: of several threads only the first reports its reason
    _tell_agent()
    _print(f"rank {Ranks.from_environment().rank} leaves at once: {reason}")
    if _process.status is not None:
        _end(_process.status, "requeue", f"left at once: {reason}")
    exit_at_once(exit_code())


def exit_at_once(code: int) -> NoReturn:
    """End this process and its child processes: those of a pool would wait for work forever.

    A normal exit would wait for ranks that wait for this one, for loaders, and for downloads of shards. The
    streams are not flushed: the main thread may hold them.
    """
    with contextlib.suppress(Exception):
        run_lock.release_all()
    with contextlib.suppress(Exception):
        for child in multiprocessing.active_children():
            child.kill()
        for process in psutil.Process().children():  # one that is being started is not among them yet
            if any("spawn_main" in argument for argument in process.cmdline()):
                process.kill()
    os._exit(code)


def lost(reason: str) -> NoReturn:
    """End this process, whose run directory another start has taken over: what it wrote would be mixed up."""
    _leaving.acquire()
    ranks = Ranks.from_environment()
    _print(f"rank {ranks.rank} leaves at once: {reason}")
    # With nodes that come and go, it was the other nodes of this run, which take this one back.
    exit_at_once(EXIT_CODE if ranks.may_change else 2)


def _tell_agent() -> None:
    """Tell torchrun's agent, in its file for a failed process, that this one was asked to stop for good.

    launch/torchrun.py then does not use one of --max-restarts. SIGTERM is the agent's own signal, and the end
    of its node.
    """
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file and _process.asked_by in _FOR_GOOD:
        with contextlib.suppress(OSError):
            details = {"timestamp": str(int(time.time()))}
            message = {"message": f"stopped by {_process.asked_by}", "extraInfo": details}
            Path(file).write_text(json.dumps({"message": message, "stopped": True}))


def exit_code() -> int:
    """Return INTERRUPTED if this process was asked to stop by Ctrl-C, else EXIT_CODE."""
    return INTERRUPTED if _process.asked_by == "SIGINT" else EXIT_CODE


def _print(line: str) -> None:
    """Print to standard error from any thread, below the live line of a terminal."""
    with contextlib.suppress(OSError):
        begin = "\n" if os.isatty(2) else ""
        os.write(2, f"{begin}indistill: {printable(line)}\n".encode())


def asked() -> bool:
    """Whether this process has been asked to stop; the other ranks may not know it yet."""
    return _process.asked_at < math.inf or time.time() >= _process.deadline


def seconds_left(most: float) -> float:
    """Return how long a run that stops may still take: after a signal, until the launcher would end it."""
    return min(most, max(5.0, _process.asked_at + PATIENCE_SECONDS - time.monotonic()))


def end_with_parent() -> None:
    """Have the kernel end this process as soon as the one that started it, by `multiprocessing`, has ended.

    A process that is stuck in a library without releasing Python's lock runs no thread that could end it.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    # The sentinel is a pipe that the parent alone writes to. prctl's PR_SET_PDEATHSIG would wait for a
    # forkserver.
    fcntl.fcntl(parent.sentinel, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(parent.sentinel, fcntl.F_SETSIG, signal.SIGKILL)
    flags = fcntl.fcntl(parent.sentinel, fcntl.F_GETFL)
    fcntl.fcntl(parent.sentinel, fcntl.F_SETFL, flags | os.O_ASYNC)


def in_worker(worker_id: int) -> None:
    """Make a DataLoader's worker end only when its rank ends it; pass this as `worker_init_fn`.

    Schedulers and terminals signal every process of a job, and a worker that dies would make the step fail.
    """
    end_with_parent()
    signal.set_wakeup_fd(-1)
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    rank = multiprocessing.parent_process()
    assert rank is not None  # a worker is started by multiprocessing

    def wait_for_rank() -> None:
        while True:
            received = signal.sigtimedwait(SIGNALS, CHECK_SECONDS)
            terminated = received is not None and (
                (received.si_signo, received.si_pid) == (signal.SIGTERM, rank.pid)
            )
            if terminated or not rank.is_alive():  # a forkserver does not end its processes with the rank
                os._exit(0)

    threading.Thread(target=wait_for_rank, daemon=True).start()


@contextlib.contextmanager
def signals_blocked(*numbers: signal.Signals) -> Iterator[None]:
    """Block these signals (default: all SIGNALS) in processes started within the context: they inherit it.

    A terminal sends Ctrl-C to child processes too, and a scheduler SIGTERM.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers or SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# --- agreeing -----------------------------------------------------------------------------------------------
class Agreement:
    """Decides between two steps whether the ranks stop, the same on all of them.

    A logged line reduces its terms over the ranks anyway, and the requests to stop with them. Between lines
    one number is reduced every CHECK_SECONDS, converted to steps by the pace of the last line; before the
    first line, every step.
    """

    def __init__(self, world: int, mean_over_ranks: Callable[[float], float]) -> None:
        self.world = world
        self.mean_over_ranks = mean_over_ranks
        self.every_steps = 1

    def open(self, max_hours: float | None) -> None:
        """Begin the steps: from here to `close` a signal is acted on at the end of a step."""
        _process.in_steps = True
        _process.agreed = False
        _process.deadline = _deadline(max_hours, time.time())

    def close(self) -> None:
        """End the steps: from here on a signal ends the process at once."""
        _process.in_steps = False
        _process.deadline = math.inf

    def reached(self, step: int, means: tuple[float, float] | None) -> bool:
        """Return whether the ranks stop after `step`; call on all ranks after each step.

        means: of `asked` and of the seconds per step, over the ranks; None if the step was not logged.
        """
        _note_step()
        if self.world == 1:
            return settle(asked())
        if means is not None:
            ranks_asked, step_seconds = means
            self.every_steps = max(1, int(CHECK_SECONDS / max(step_seconds, 1e-3)))
            return settle(ranks_asked)
        return step % self.every_steps == 0 and settle(self.mean_over_ranks(float(asked())))


def settle(ranks_asked: float) -> bool:
    """Return whether any rank was asked to stop; if so, all ranks stop, without a time limit for saving."""
    _process.agreed = ranks_asked > 0
    if _process.agreed:
        # The clock of the rank that asked may be ahead of this one's.
        if time.time() >= _process.deadline - MARGIN_SECONDS and _process.asked_at == math.inf:
            _process.asked_by = _TIME_LIMIT
        _process.deadline = math.inf  # has done its work
    return _process.agreed


def _deadline(max_hours: float | None, now: float) -> float:
    """Return the time.time to stop at: before the job's limit, and at most `max_hours` after this start."""
    deadline = math.inf if max_hours is None else (_process.began or now) + 3600 * max_hours
    job_end = float(os.environ.get("SLURM_JOB_END_TIME", "inf"))
    if now < job_end < math.inf:  # a shell may outlive the job that it was started in
        deadline = min(deadline, job_end - min(MARGIN_SECONDS, (job_end - now) / 10))
    return deadline


# --- status for the launcher --------------------------------------------------------------------------------
@contextlib.contextmanager
def status_in(run_dir: Path) -> Iterator[None]:
    """Keep `run_dir/status` up to date while a run or a chain runs within the context."""
    with run_lock.released_after():
        _process.refusal = _lock_refused(run_dir)
        with _status_in(run_dir):
            yield


@contextlib.contextmanager
def failure_in(run_dir: Path) -> Iterator[None]:
    """Record an unexpected error before `status_in`, as of an import, in the status of an earlier start."""
    try:
        yield
    except Exception as error:
        status = RunDir(run_dir).status
        if status.exists() and run_lock.is_free(run_dir):
            _end(status, "failed", describe_error(error, run_dir), on_any_rank=True)
        raise


def _lock_refused(run_dir: Path) -> str | None:
    """Lock the run directory for this start, by rank 0; return why another start keeps it."""
    with contextlib.suppress(OSError):  # reported by `lock`
        if Ranks.from_environment().is_main_process:
            try:
                run_lock.take(run_dir, lost)
            except UserError as error:
                return str(error)
    return None


def lock(run_dir: Path) -> None:
    """Lock a run directory for this start; call on the run's rank 0, where the other ranks hear of errors.

    Raises UserError if another start is at work there or in that of the whole chain, and OSError.
    """
    if _process.refusal is not None:
        raise UserError(_process.refusal)
    run_lock.take(run_dir, lost)


@contextlib.contextmanager
def _status_in(run_dir: Path) -> Iterator[None]:
    # Without the lock the status is that of another start.
    status = None if _process.refusal else RunDir(run_dir).status
    _process.status = status
    _process.began = time.time()
    _process.stepped = False
    _mark(status, "running")
    _count_start(status)
    try:
        yield
        _mark(status, "done")
        _note_step()
    except Preempted as stopped:
        _tell_agent()
        _end(status, "requeue", f"{stopped}, asked by {_process.asked_by}")
        raise
    except KeyboardInterrupt:  # Python's own, outside of `listening`, for example in a notebook
        _end(status, "requeue", "interrupted, without a checkpoint")
        raise
    except UserError as error:
        _end(status, "failed", in_one_line(error), on_any_rank=error.found_by_one_rank)
        raise
    except BaseException as error:
        _end(status, "failed", describe_error(error, run_dir), on_any_rank=True)
        raise
    finally:
        _process.status = _process.began = _process.refusal = None


def _count_start(status: Path | None) -> None:
    """Note that no step has been made since this start, for launch/slurm/train.sbatch, which counts on."""
    counted = "SLURM_JOB_ID" in os.environ
    if counted and status is not None and Ranks.from_environment().is_main_process:
        with contextlib.suppress(OSError), RunDir(status.parent).starts.open("x") as file:
            file.write("1\n")


def _note_step() -> None:
    """Note that this start has made a step, or had none to make."""
    if not _process.stepped and _process.status is not None and Ranks.from_environment().is_main_process:
        with contextlib.suppress(OSError):
            RunDir(_process.status.parent).starts.unlink(missing_ok=True)
    _process.stepped = True


def _end(status: Path | None, word: str, reason: str, on_any_rank: bool = False) -> None:
    """Write the end into `status` and the history; failed if another rank has written that before."""
    if status is None:
        return
    failure = _mark(status, word, reason, on_any_rank)
    if failure:
        append_end(status.parent, "failed", failure)
    else:
        append_end(status.parent, word, reason)


def _mark(status: Path | None, word: str, reason: str = "", on_any_rank: bool = False) -> str:
    """Write `status`, by rank 0 or `on_any_rank`; returns "".

    If another rank has failed and this one would write requeue, returns the reason of the other and writes
    nothing. A status that cannot be written does not fail the run: the exit code says the same.
    """
    if status is None:
        return ""
    with contextlib.suppress(OSError):
        if word == "requeue":
            written, why = records.status(status)
            if written == "failed":
                return why or written
        if not Ranks.from_environment().is_main_process and not on_any_rank:
            return ""
        status.parent.mkdir(parents=True, exist_ok=True)
        text = f"{word}\n{reason}\n" if word == "failed" else f"{word}\n"
        try:
            replace_text(status, text)
        except OSError:  # a full disk has room in the block of the old text
            status.write_text(text)
    return ""
