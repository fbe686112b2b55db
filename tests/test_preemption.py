"""Runs that are asked to stop: they do, in good order, and go on as if nothing had happened."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import run_ranks, start
from safetensors.torch import load_file

from indistill import checkpoint, cli, config, data, preemption
from indistill import train as module
from indistill.metrics import read_lines
from indistill.preemption import Preempted

CLOCKS = ("images_per_second", "data_wait_fraction")


def train_and_signal(path: str, event: str, number: int = signal.SIGTERM, whom: int = 0) -> None:
    """`indistill train`, in which rank `whom` gets a signal at an event: "step N", "evaluation" or "never"."""
    make_mix, eval_loader = module.make_mix, data.eval_loader
    mine = int(os.environ.get("RANK", "0")) == whom
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

    def signalling_loader(*arguments):
        for i, batch in enumerate(eval_loader(*arguments)):
            if event == "evaluation" and i == 1:
                get_signal()
            yield batch

    module.make_mix, data.eval_loader = signalling_mix, signalling_loader
    cli.main(["train", path])


def run_until(path: str, event: str, world: int | None, exit_code: int, number: int = signal.SIGTERM) -> None:
    """The last rank gets the signal."""
    run_ranks(train_and_signal, world, path, event, number, (world or 1) - 1, exit_code=exit_code)


def written(folder: Path, name: str, tree: dict[str, Any]) -> str:
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(tree | {"run_dir": str(folder / name)}))
    return str(path)


def record(run_dir: Path) -> list[dict[str, Any]]:
    """All lines but those of checkpoints, of which a stopped run has more."""
    lines = [line for line in read_lines(run_dir / "metrics.jsonl") if "checkpoint_stall_seconds" not in line]
    return [{k: v for k, v in line.items() if k not in CLOCKS} for line in lines]


def status(run_dir: Path) -> str:
    return (run_dir / "status").read_text().strip()


@pytest.fixture
def evaluated_tree(tree):
    tree["checkpoint"] = {"every_steps": None}
    tree["evaluate"] = {"every": "12 steps", "batch": 7}
    tree["ema"] = {"decay": 0.9}
    return tree


@pytest.mark.parametrize("world", [None, 2])
def test_a_run_stopped_everywhere_is_the_run_that_never_stopped(evaluated_tree, tmp_path, world):
    """In the warm-up, at the end of a phase, in an evaluation during the warm-up, in KD, in the last evaluation."""
    run_until(written(tmp_path, "whole", evaluated_tree), "never", world, exit_code=0)
    path, run_dir = written(tmp_path, "stopped", evaluated_tree), tmp_path / "stopped"
    events = [("step 2", signal.SIGTERM), ("step 2", signal.SIGUSR1), ("evaluation", signal.SIGUSR2)]
    events += [("step 4", signal.SIGTERM), ("evaluation", signal.SIGTERM)]
    stopped_at = []
    for event, number in events:
        run_until(path, event, world, preemption.EXIT_CODE, number=number)
        assert status(run_dir) == "requeue"
        stopped_at.append(checkpoint.saved(run_dir / "checkpoints")[-1].name)
    assert stopped_at == [f"step-{step:08d}" for step in (2, 4, 12, 16, 24)]
    run_until(path, "never", world, exit_code=0)
    assert status(run_dir) == "done"
    kept = read_lines(run_dir / "history.jsonl")
    assert [line["step"] for line in kept if line["event"] == "start"] == [0, 2, 4, 12, 16, 24]
    ends = [line for line in kept if line["event"] == "end"]
    assert [line["how"] for line in ends] == ["requeue"] * 5 + ["done"]
    asked = [number.name if world is None else "another rank" for _, number in events]  # rank 0 tells, as it knows
    assert [line["reason"].rpartition(" asked by ")[2] for line in ends[:5]] == asked

    whole = record(tmp_path / "whole")
    assert [line["step"] for line in whole if "top1" in line] == [12, 24]
    assert record(run_dir) == whole
    weights = [load_file(folder / "student.safetensors") for folder in (run_dir, tmp_path / "whole")]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[1])
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (run_dir, tmp_path / "whole")]
    assert summaries[0]["metrics"] == summaries[1]["metrics"]


def train_forever(path: str, patience: float) -> None:
    """The third step waits for its data and never gets it."""
    waiting = module.RunLog.waiting

    def stuck(log, batches):
        for i, batch in enumerate(waiting(log, batches)):
            if i == 2:
                print("stuck", flush=True)
                Path(path).with_suffix(".stuck").touch()
                time.sleep(600)
            yield batch

    module.RunLog.waiting = stuck
    preemption.PATIENCE_SECONDS = patience
    cli.main(["train", path])


@pytest.mark.parametrize(("patience", "signals", "least", "most"), [(500.0, 2, 1.5, 15.0), (2.0, 1, 1.5, 15.0)])
def test_a_step_that_does_not_end(tree, tmp_path, patience, signals, least, most):
    """A second signal ends the process at once, and so does the end of its patience: without a checkpoint."""
    path = written(tmp_path, "run", tree)
    process = start(train_forever, path, patience)
    while not Path(path).with_suffix(".stuck").exists():
        assert process.is_alive()
        time.sleep(0.05)
    began = time.monotonic()
    for _ in range(signals):
        os.kill(process.pid, signal.SIGTERM)
        os.kill(process.pid, signal.SIGTERM)  # passed on by a launcher: the same one
        process.join(timeout=1.5)
    process.join(timeout=60)
    assert process.exitcode == preemption.EXIT_CODE
    assert least < time.monotonic() - began < most
    assert status(tmp_path / "run") == "requeue"
    assert not list((tmp_path / "run" / "checkpoints").glob("step-*"))
    end = read_lines(tmp_path / "run" / "history.jsonl")[-1]
    why = "a second signal, SIGTERM" if signals == 2 else "no step ended within 2 s of the signal"
    assert (end["how"], end["reason"]) == ("requeue", f"left at once: {why}")


def train_in_a_group(path: str) -> None:
    """Every process of the job gets the signal, the loader's workers too."""
    os.setsid()
    multiprocessing.set_start_method("fork", force=True)  # as usual: the loader's workers start at once
    make_mix = module.make_mix

    def mix(*arguments):
        inner, calls = make_mix(*arguments), []

        def signalling(batch, phase):
            calls.append(1)
            if len(calls) == 3:
                os.killpg(0, signal.SIGTERM)
                os.killpg(0, signal.SIGUSR1)
                time.sleep(0.5)
            return inner(batch, phase)

        return signalling

    module.make_mix = mix
    cli.main(["train", path])


def test_loader_workers_leave_it_to_their_rank(tree, tmp_path):
    tree["data"] |= {"in_memory": False, "workers": 2}
    path = written(tmp_path, "run", tree)
    process = start(train_in_a_group, path)
    process.join(timeout=300)
    assert process.exitcode == preemption.EXIT_CODE
    assert [path.name for path in checkpoint.saved(tmp_path / "run" / "checkpoints")] == ["step-00000003"]


def train_slowly_set_up(path: str) -> None:
    def set_up(*_):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(600)

    module.Sources.data = set_up
    cli.main(["train", path])


def test_before_the_first_step_a_signal_ends_it_at_once(tree, tmp_path):
    process = start(train_slowly_set_up, written(tmp_path, "run", tree))
    process.join(timeout=60)
    assert process.exitcode == preemption.EXIT_CODE
    assert status(tmp_path / "run") == "requeue"


def test_no_stage_begins_after_one_that_was_stopped(tree, tmp_path):
    stages = [
        {"name": "teacher", "duration": "4 steps", "student": {"name": tree.pop("teacher")["name"]}},
        {key: tree.pop(key) for key in ("student", "warmup", "kd")}
        | {"name": "student", "teacher": {"stage": "teacher"}},
    ]
    path, run_dir = written(tmp_path, "chain", {**tree, "duration": "15 steps", "stages": stages}), tmp_path / "chain"
    run_until(path, "step 2", None, preemption.EXIT_CODE)
    assert status(run_dir) == "requeue"
    assert not (run_dir / "student").exists()
    run_until(path, "step 2", None, preemption.EXIT_CODE)  # the fourth of the first stage is the first of the second
    run_until(path, "never", None, exit_code=0)
    assert status(run_dir) == "done"
    assert [json.loads((run_dir / name / "summary.json").read_text())["step"] for name in ("teacher", "student")] == [
        4, 15,
    ]  # fmt: skip


def test_a_time_limit_stops_each_start_after_its_hours(tree, monkeypatch):
    tree["duration"], tree["warmup"] = "3 steps", None
    run_dir = Path(tree["run_dir"])
    for step in (1, 2, 3):
        with pytest.raises(Preempted, match=f"stopped at step {step} of 3"):
            module.train(config.parse(tree | {"max_hours": 1e-9}, "test"))
    assert not (run_dir / "summary.json").exists()
    module.train(config.parse(tree, "test"))  # the key may change between starts
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
    """One collective a step until the pace is known, then one in `every_steps`; a logged line carries the question."""
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
        run(RuntimeError())
    assert status(tmp_path) == "running"
    with pytest.raises(Preempted):
        run(Preempted())
    assert status(tmp_path) == "requeue"
    with pytest.raises(config.UserError):
        run(config.UserError())
    assert status(tmp_path) == "failed"
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
    assert status(tmp_path) == "failed"
    assert [path.name for path in tmp_path.iterdir()] == ["status"]
