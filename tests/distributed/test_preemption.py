"""Runs that are asked to stop: they do, in good order, and go on as if nothing had happened."""

from __future__ import annotations

import json
import multiprocessing
import os
import pkgutil
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from conftest import run_ranks, start, start_ranks
from safetensors.torch import load_file
from torch.utils.data import IterableDataset

from indistill import config
from indistill.commands import cli
from indistill.config.files import read_lines
from indistill.config.run_dir import RunDir
from indistill.data import remote, verify
from indistill.data.dataset import ImageDataset
from indistill.data.loader import Loader
from indistill.distributed import preemption
from indistill.distributed.preemption import Preempted
from indistill.evaluate import passes
from indistill.losses import objective
from indistill.training import checkpoint, loop, runs
from indistill.training import mix as training_mix
from indistill.training.callbacks import Callback
from indistill.training.loop import Run
from indistill.training.parts import Sources
from indistill.training.run_log import RunLog

STORED = ["targets.source=cached", "data.augment.views=1", "data.in_memory=false", "data.workers=2"]
CLOCKS = ("images_per_second", "data_wait_fraction")


def train_and_signal(path: str, event: str, number: int = signal.SIGTERM, whom: int | None = None) -> None:
    """Train; rank `whom`, or each rank, gets a signal at "step N", at "evaluation", or "never"."""
    make_mix, eval_loader = training_mix.make_mix, passes.eval_loader
    mine = whom is None or int(os.environ.get("RANK", "0")) == whom
    micro_batches = 0

    def get_signal() -> None:
        if mine:
            os.kill(os.getpid(), number)
            time.sleep(0.3)  # until the thread has heard it

    def signalling_mix(*arguments):
        inner = make_mix(*arguments)

        def mix(batch, phase):
            nonlocal micro_batches
            micro_batches += 1
            if event == f"step {micro_batches}":
                get_signal()
            return inner(batch, phase)

        return mix

    def signalling_loader(*arguments, **keywords):
        for i, batch in enumerate(eval_loader(*arguments, **keywords)):
            if event == "evaluation" and i == 1:
                get_signal()
            yield batch

    loop.make_mix, passes.eval_loader = signalling_mix, signalling_loader
    cli.main(["train", path])


def run_until(path: str, event: str, world: int | None, exit_code: int, number: int = signal.SIGTERM) -> None:
    """The last rank gets the signal; a launcher sends all of them that of Ctrl-C."""
    whom = None if number == signal.SIGINT else (world or 1) - 1
    run_ranks(train_and_signal, world, path, event, number, whom, exit_code=exit_code)


def written(folder: Path, name: str, tree: dict[str, Any]) -> str:
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(tree | {"run_dir": str(folder / name)}))
    return str(path)


def record(run_dir: Path) -> list[dict[str, Any]]:
    """All lines but those of checkpoints, of which a stopped run has more."""
    lines = [line for line in read_lines(run_dir / "metrics.jsonl") if "checkpoint_stall_seconds" not in line]
    return [{k: v for k, v in line.items() if k not in CLOCKS} for line in lines]


def code_of(number: int) -> int:
    return 130 if number == signal.SIGINT else preemption.EXIT_CODE


def status(run_dir: Path) -> str:
    return (run_dir / "status").read_text().strip()


@pytest.fixture
def evaluated_tree(tree):
    tree["checkpoint"] = {"every_steps": None}
    tree["evaluate"] = {"every": "12 steps", "batch": 7}
    tree["ema"] = {"decay": 0.9}
    return tree


@pytest.mark.parametrize("world", [pytest.param(None, marks=pytest.mark.slow), 2])
def test_a_run_stopped_everywhere_is_the_run_that_never_stopped(evaluated_tree, tmp_path, world):
    """In the warm-up, at the end of a phase, in an evaluation of the warm-up, in KD, in the last evaluation.

    Ctrl-C is one of the signals, in a step and in an evaluation.
    """
    run_until(written(tmp_path, "whole", evaluated_tree), "never", world, exit_code=0)
    path, run_dir = written(tmp_path, "stopped", evaluated_tree), tmp_path / "stopped"
    events = [("step 2", signal.SIGINT), ("step 2", signal.SIGUSR1), ("evaluation", signal.SIGUSR2)]
    events += [("step 4", signal.SIGTERM), ("evaluation", signal.SIGINT)]
    stopped_at = []
    for event, number in events:
        run_until(path, event, world, code_of(number), number=number)
        assert status(run_dir) == "requeue"
        stopped_at.append(RunDir(run_dir).saved_checkpoints()[-1].name)
    assert stopped_at == [f"step-{step:08d}" for step in (2, 4, 12, 16, 24)]
    run_until(path, "never", world, exit_code=0)
    assert status(run_dir) == "done"
    kept = read_lines(run_dir / "history.jsonl")
    assert [line["step"] for line in kept if line["event"] == "start"] == [0, 2, 4, 12, 16, 24]
    ends = [line for line in kept if line["event"] == "end"]
    assert [line["how"] for line in ends] == ["requeue"] * 5 + ["done"]
    # Rank 0 tells, as it knows.
    asked = [
        number.name if world is None or number == signal.SIGINT else "another rank" for _, number in events
    ]
    assert [line["reason"].rpartition(" asked by ")[2] for line in ends[:5]] == asked

    whole = record(tmp_path / "whole")
    assert [line["step"] for line in whole if "top1" in line] == [12, 24]
    assert record(run_dir) == whole
    weights = [load_file(folder / "student.safetensors") for folder in (run_dir, tmp_path / "whole")]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[1])
    summaries = [
        json.loads((folder / "summary.json").read_text()) for folder in (run_dir, tmp_path / "whole")
    ]
    assert summaries[0]["metrics"] == summaries[1]["metrics"]


def train_forever(path: str, patience: float) -> None:
    """The third step waits for its data and never gets it."""
    waiting = RunLog.waiting

    def stuck(log, batches):
        for i, batch in enumerate(waiting(log, batches)):
            if i == 2:
                print("stuck", flush=True)
                Path(path).with_suffix(".stuck").touch()
                time.sleep(600)
            yield batch

    RunLog.waiting = stuck
    preemption.PATIENCE_SECONDS = patience
    cli.main(["train", path])


@pytest.mark.parametrize(
    ("patience", "signals", "number"),
    [(500.0, 2, signal.SIGTERM), (500.0, 2, signal.SIGINT), (2.0, 1, signal.SIGTERM)],
)
def test_a_step_that_does_not_end(tree, tmp_path, patience, signals, number):
    """A second signal ends the process at once, and so does the end of its patience: without a checkpoint."""
    path = written(tmp_path, "run", tree)
    process = start(train_forever, path, patience)
    while not Path(path).with_suffix(".stuck").exists():
        assert process.is_alive()
        time.sleep(0.05)
    for i in range(signals):
        assert i == 0 or process.is_alive()  # the first pair was not the end
        os.kill(process.pid, number)
        os.kill(process.pid, number)  # passed on by a launcher: the same one
        process.join(timeout=1.5)
    process.join(timeout=60)
    assert process.exitcode == code_of(number)
    assert status(tmp_path / "run") == "requeue"
    assert not list((tmp_path / "run" / "checkpoints").glob("step-*"))
    end = read_lines(tmp_path / "run" / "history.jsonl")[-1]
    why = f"a second signal, {number.name}" if signals == 2 else "no step ended within 2 s of the signal"
    assert (end["how"], end["reason"]) == ("requeue", f"left at once: {why}")


def train_in_a_group(path: str) -> None:
    """Every process of the job gets the signal, the loader's workers too."""
    os.setsid()
    multiprocessing.set_start_method("fork", force=True)  # as usual: the loader's workers start at once
    make_mix = training_mix.make_mix

    def mix(*arguments):
        inner, calls = make_mix(*arguments), []

        def signalling(batch, phase):
            calls.append(1)
            if len(calls) == 3:
                subprocess.run(["kill", "-TERM", "--", f"-{os.getpid()}"])
                subprocess.run(["kill", "-INT", "--", f"-{os.getpid()}"])
                time.sleep(0.5)
            return inner(batch, phase)

        return signalling

    loop.make_mix = mix
    cli.main(["train", path])


def test_loader_workers_leave_it_to_their_rank(tree, tmp_path):
    tree["data"] |= {"in_memory": False, "workers": 2}
    path = written(tmp_path, "run", tree)
    process = start(train_in_a_group, path)
    process.join(timeout=300)
    assert process.exitcode == preemption.EXIT_CODE
    assert [path.name for path in RunDir(tmp_path / "run").saved_checkpoints()] == ["step-00000003"]


def keep_errors(path: Path) -> None:
    """Write what this process and its children print to standard error into a file."""
    with path.open("w") as file:
        os.dup2(file.fileno(), 2)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)


def train_with_young_workers(path: str, method: str) -> None:
    """The terminal's Ctrl-C comes when the loader's workers have just been started."""
    os.setsid()
    multiprocessing.set_start_method(method, force=True)
    keep_errors(Path(path).with_suffix(".err"))
    begin = Loader.__iter__

    def begin_and_interrupt(loader):
        iterator = begin(loader)
        if preemption._process.in_steps:
            subprocess.run(["kill", "-INT", "--", f"-{os.getpid()}"])
        return iterator

    Loader.__iter__ = begin_and_interrupt
    cli.main(["train", path])


@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_loader_workers_outlive_ctrl_c_from_their_first_moment(tree, tmp_path, method):
    tree["data"] |= {"in_memory": False, "workers": 2}
    path = written(tmp_path, "run", tree)
    process = start(train_with_young_workers, path, method)
    process.join(timeout=300)
    told = Path(path).with_suffix(".err").read_text()
    assert process.exitcode == 130, told
    assert [path.name for path in RunDir(tmp_path / "run").saved_checkpoints()] == ["step-00000001"]
    assert "indistill: SIGINT: stopping with a checkpoint when this step ends" in told
    assert told.endswith(
        "indistill: stopped at step 1 of 24: run the same command again to continue from there\n"
    )
    assert "Traceback" not in told


def interrupt_in(place: str, number: int, errors: Path, arguments: list[str]) -> None:
    """`indistill ARGUMENTS`, in which a method or function gets a signal and would then take ten minutes."""
    keep_errors(errors)

    def slow(*_, **__):
        os.kill(os.getpid(), number)
        time.sleep(600)

    owner, _, name = place.rpartition(".")
    setattr(pkgutil.resolve_name(f"indistill.{owner}"), name, slow)
    cli.main(arguments)


@pytest.mark.parametrize(
    ("place", "number", "arguments"),
    [
        ("training.parts.Sources.data", signal.SIGTERM, ["train", "CONFIG"]),
        ("training.parts.Sources.data", signal.SIGINT, ["train", "CONFIG"]),
        ("config.runs.load", signal.SIGINT, ["train", "CONFIG"]),
        ("training.lessons.networks", signal.SIGINT, ["targets", "CONFIG", *STORED]),
        (
            "commands.targets.job.Job.compute",
            signal.SIGINT,
            ["targets", "CONFIG", *STORED],
        ),  # the loader's workers are there
        ("commands.evaluate.evaluate_checkpoint", signal.SIGINT, ["eval", "CONFIG", "resnet18"]),
        ("commands.trainer.Trainer.plan", signal.SIGINT, ["plan", "CONFIG"]),
        (
            "commands.cli._parse",
            signal.SIGINT,
            ["train", "CONFIG"],
        ),  # before anything listens: a KeyboardInterrupt
    ],
)
def test_where_no_step_is_under_way_a_signal_ends_it_at_once(tree, tmp_path, place, number, arguments):
    path, errors = (
        written(tmp_path, "run", tree | {"targets": {"dir": str(tmp_path / "t")}}),
        tmp_path / "stderr",
    )
    arguments = [path if argument == "CONFIG" else argument for argument in arguments]
    process = start(interrupt_in, place, number, errors, arguments)
    process.join(timeout=120)
    text = re.sub(r"\n.*image/s\]", "", errors.read_text())  # the bar of targets
    told = [line for line in text.splitlines() if "Warning" not in line]
    assert process.exitcode == code_of(number), told
    early = place == "commands.cli._parse"
    assert told == [f"indistill: {'interrupted' if early else f'rank 0 leaves at once: {number.name}'}"]
    assert place != "training.parts.Sources.data" or status(tmp_path / "run") == "requeue"


def work_slowly(folder: Path) -> None:
    (folder / f"worker-{os.getpid()}").touch()
    time.sleep(600)


def index_slowly(errors: Path) -> None:
    os.setsid()
    keep_errors(errors)
    with preemption.listening():
        list(verify.parallel(work_slowly, [errors.parent] * 4, workers=2, progress=False))


def test_ctrl_c_ends_a_pool_without_a_trace(tmp_path):
    """It leaves nothing behind. A worker that Python is just starting could print a trace of Python's own."""
    process = start(index_slowly, tmp_path / "stderr")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while len([*tmp_path.glob("worker-*")]) < 2:
        assert process.is_alive()
        time.sleep(0.05)
    pool = children.read_text().split()
    os.killpg(process.pid, signal.SIGINT)
    process.join(timeout=60)
    assert process.exitcode == 130
    assert (tmp_path / "stderr").read_text() == "indistill: rank 0 leaves at once: SIGINT\n"
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in pool) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in pool if Path(f"/proc/{pid}").exists()]


def test_a_background_job_ignores_ctrl_c_still(monkeypatch):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with preemption.listening():
            assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_command_that_feeds_a_reader_outlives_ctrl_c(monkeypatch):
    """The terminal sends it to the command of a pipe: URL, too."""
    monkeypatch.setenv("INDISTILL_ALLOW_PIPE", "1")
    with remote.open_stream("pipe:kill -INT $$; kill -TERM $$; echo read to its end") as stream:
        assert stream.read() == b"read to its end\n"


def test_no_stage_begins_after_one_that_was_stopped(tree, tmp_path):
    stages = [
        {"name": "teacher", "duration": "4 steps", "student": {"name": tree.pop("teacher")["name"]}},
        {key: tree.pop(key) for key in ("student", "warmup", "kd")}
        | {"name": "student", "teacher": {"stage": "teacher"}},
    ]
    path, run_dir = (
        written(tmp_path, "chain", {**tree, "duration": "15 steps", "stages": stages}),
        tmp_path / "chain",
    )
    run_until(path, "step 2", None, 130, number=signal.SIGINT)
    assert status(run_dir) == "requeue"
    assert not (run_dir / "student").exists()
    run_until(
        path, "step 2", None, preemption.EXIT_CODE
    )  # the fourth of the first stage is the first of the second
    run_until(path, "never", None, exit_code=0)
    assert status(run_dir) == "done"
    summaries = [json.loads((run_dir / name / "summary.json").read_text()) for name in ("teacher", "student")]
    assert [summary["step"] for summary in summaries] == [
        4, 15,
    ]  # fmt: skip


def test_a_time_limit_stops_each_start_after_its_hours(tree, monkeypatch):
    tree["duration"], tree["warmup"] = "3 steps", None
    run_dir = Path(tree["run_dir"])
    for step in (1, 2, 3):
        with pytest.raises(Preempted, match=f"stopped at step {step} of 3"):
            loop.train(config.parse(tree | {"max_hours": 1e-9}, "test"))
    assert not (run_dir / "summary.json").exists()
    loop.train(config.parse(tree, "test"))  # the key may change between starts
    assert [line["step"] for line in read_lines(run_dir / "metrics.jsonl") if "loss" in line] == [1, 2, 3]


@pytest.mark.parametrize(
    ("job_end", "max_hours", "deadline"),
    [
        (None, None, float("inf")),
        (None, 2.0, 1000 + 7200),
        (1000 + 36000, None, 1000 + 36000 - preemption.MARGIN_SECONDS),
        (1000 + 600, None, 1000 + 540),  # a tenth of a short job is enough
        (1000 + 36000, 1.0, 1000 + 3600),
        (999, None, float("inf")),  # of a job that is over
    ],
)
def test_the_earliest_limit_counts(monkeypatch, job_end, max_hours, deadline):
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    if job_end is not None:
        monkeypatch.setenv("SLURM_JOB_END_TIME", str(job_end))
    assert preemption._deadline(max_hours, now=1000.0) == deadline


def test_ranks_ask_each_other_every_two_seconds():
    """One collective a step until the pace is known, then one in `every_steps`; logged lines need none."""
    asked: list[int] = []
    stop = preemption.Agreement(world=2, mean_over_ranks=lambda value: asked.append(step) or value)
    for step in range(1, 41):
        told = (0.0, 0.25) if step % 20 == 3 else None  # a line that says 4 steps a second
        assert not stop.reached(step, told)
    assert asked == [1, 2, *range(8, 41, 8)]
    assert stop.reached(43, (0.5, 0.25))  # another rank was asked

    alone = preemption.Agreement(world=1, mean_over_ranks=lambda value: pytest.fail("no one to ask"))
    assert not alone.reached(1, None)


def test_the_status_tells_a_launcher_what_to_do(tmp_path, monkeypatch):
    def run(outcome: Exception | None) -> None:
        with preemption.status_in(tmp_path):
            if os.environ.get("RANK", "0") == "0":
                assert status(tmp_path) == "running"
            if outcome:
                raise outcome

    with pytest.raises(RuntimeError):
        run(RuntimeError("no such luck"))
    word, reason = status(tmp_path).splitlines()
    assert word == "failed"
    traceback = tmp_path / "errors" / "rank-0.txt"
    assert re.fullmatch(
        rf"RuntimeError: no such luck \({__file__}, line \d+; traceback: {traceback}\)", reason
    )
    assert "raise outcome" in traceback.read_text()
    with pytest.raises(KeyboardInterrupt):  # where nobody listens, as in a notebook
        run(KeyboardInterrupt())
    assert status(tmp_path) == "requeue"
    with pytest.raises(Preempted):
        run(Preempted())
    assert status(tmp_path) == "requeue"
    with pytest.raises(config.UserError):
        run(config.UserError("data.root: no such folder"))
    assert status(tmp_path) == "failed\ndata.root: no such folder"
    run(None)
    assert status(tmp_path) == "done"

    monkeypatch.setenv("RANK", "1")  # tells only what rank 0 cannot know
    with pytest.raises(config.UserError):
        run(config.UserError())
    assert status(tmp_path) == "done"
    mistake = config.UserError("a shard of this rank")
    mistake.found_by_one_rank = True
    with pytest.raises(config.UserError):
        run(mistake)
    assert status(tmp_path) == "failed\na shard of this rank"
    run(None)
    with pytest.raises(KeyError):
        run(KeyError("a key of this rank"))
    assert status(tmp_path).startswith("failed\nKeyError: 'a key of this rank' (")
    assert {path.name for path in tmp_path.iterdir()} == {"status", "errors"}


def broken(*_: Any, **__: Any) -> None:
    raise ZeroDivisionError("on purpose")


def out_of_memory(*_: Any, **__: Any) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore of the allocator")


@pytest.mark.parametrize(
    ("owner", "name", "how", "workers"),
    [
        (Sources, "data", broken, 0),  # in set-up
        (objective.Objective, "__call__", broken, 0),  # in the loop
        (objective.Objective, "__call__", out_of_memory, 0),
        (ImageDataset, "__getitem__", broken, 1),  # in a loader's worker
        (passes, "eval_loader", broken, 0),  # in an evaluation that is not the last
        (checkpoint, "_publish", broken, 0),  # in the thread that writes
        (Run, "end", broken, 0),
    ],
)
def test_after_an_unexpected_error_no_script_starts_it_again(tree, monkeypatch, owner, name, how, workers):
    tree |= {"duration": "6 steps", "warmup": None, "checkpoint": {"every_steps": 2}}
    tree["evaluate"] = {"every": "3 steps"}
    tree["data"] |= {"in_memory": not workers, "workers": workers}
    run_dir = Path(tree["run_dir"])
    monkeypatch.setattr(owner, name, how)
    with pytest.raises((ZeroDivisionError, torch.OutOfMemoryError)):
        runs.run([("", config.parse(tree, "test"))])
    word, reason = status(run_dir).splitlines()
    assert word == "failed"
    what = (
        "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."
        if how is out_of_memory
        else "on purpose"
    )
    assert what in reason
    assert reason.endswith(f"; traceback: {run_dir}/errors/rank-0.txt)")
    assert how.__name__ in (run_dir / "errors" / "rank-0.txt").read_text()
    for line in read_lines(run_dir / "history.jsonl")[-1:]:  # none before its start was recorded
        assert (line["event"], line["how"], line["reason"]) == ("end", "failed", reason)


def fail_on_one(path: str, rank: int) -> None:
    inner = objective.Objective.__call__

    def fail_at_third(objective, output, targets, *, labels, phase, step):
        if step == 2 and os.environ["RANK"] == str(rank):
            broken()
        return inner(objective, output, targets, labels=labels, phase=phase, step=step)

    objective.Objective.__call__ = fail_at_third
    cli.main(["train", path])


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_on_one_rank_is_what_the_status_tells(tree, tmp_path, rank):
    """The other one loses it, and would ask to be started again."""
    path, run_dir = written(tmp_path, "run", tree), tmp_path / "run"
    processes = start_ranks(fail_on_one, 2, path, rank)
    for process in processes:
        process.join(timeout=300)
    assert [process.exitcode for process in processes] == ([1, 75] if rank == 0 else [75, 1])
    word, reason = status(run_dir).splitlines()
    assert word == "failed"
    assert reason.startswith("ZeroDivisionError: on purpose (")
    assert reason.endswith(f"traceback: {run_dir}/errors/rank-{rank}.txt)")
    end = read_lines(run_dir / "history.jsonl")[-1]
    assert (end["how"], end["reason"]) == ("failed", reason)


def test_the_first_step_ends_the_count_of_starts_without_one(tree, tmp_path, monkeypatch):
    """launch/slurm/train.sbatch counts them, in a file that the run makes and removes."""
    tree |= {"duration": "2 steps", "warmup": None}
    file = Path(tree["run_dir"]) / "starts_without_step"
    counts = []

    def count(*_: Any) -> None:
        counts.append(file.read_text() if file.exists() else None)

    class Counting(Callback):
        def on_step(self, *_: Any) -> None:
            count()

        def on_end(self, *_: Any) -> None:
            count()

    monkeypatch.setenv("SLURM_JOB_ID", "7")
    runs.run([("", config.parse(tree, "test"))], callbacks=[Counting()])
    assert counts == ["1\n", None, None]  # after the first step, callbacks are called before it is counted
    monkeypatch.delenv("SLURM_JOB_ID")
    tree["run_dir"] = str(tmp_path / "another")
    counts.clear()
    runs.run([("", config.parse(tree, "test"))], callbacks=[Counting()])
    assert counts == [None] * 3


def test_a_status_on_a_full_disk_is_written_over_the_old_one(tmp_path, monkeypatch):
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(preemption, "replace_text", full)
    (tmp_path / "status").write_text("running\n")
    with pytest.raises(ZeroDivisionError), preemption.status_in(tmp_path):
        broken()
    assert status(tmp_path).startswith("failed\nZeroDivisionError")


def test_an_error_while_the_run_is_imported_is_in_the_status_too(tmp_path):
    (tmp_path / "status").write_text("requeue\n")
    with pytest.raises(ZeroDivisionError), preemption.failure_in(tmp_path):
        broken()
    assert status(tmp_path).startswith("failed\nZeroDivisionError")
    with pytest.raises(ZeroDivisionError), preemption.failure_in(tmp_path / "new"):
        broken()
    assert not (tmp_path / "new").exists()


class Stuck(IterableDataset):
    """Data in a library that does not release Python's lock."""

    def __init__(self, number: Path) -> None:
        self.number = number

    def __iter__(self):
        self.number.write_text(str(os.getpid()))
        yield re.match("(a+)+b", "a" * 100)


def stuck_worker(number: Path, method: str) -> None:
    multiprocessing.set_start_method(method, force=True)
    list(Loader(Stuck(number), batch_size=None, num_workers=1, worker_init_fn=preemption.in_worker))


@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_a_stuck_worker_ends_with_its_rank(tmp_path, method):
    number = tmp_path / "number"
    process = start(stuck_worker, number, method)
    while not number.exists() or not number.read_text():
        assert process.is_alive()
        time.sleep(0.01)
    worker = psutil.Process(int(number.read_text()))
    process.kill()
    deadline = time.monotonic() + 60
    while worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.01)
