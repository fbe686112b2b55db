"""A step whose loss, gradient or images are not finite on one rank leaves no trace on any rank."""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import EPS, LOGGED, SMOOTH, assert_rounding_explains, run_moved, run_ranks, strayed
from torch import Tensor

from indistill import config, curriculum
from indistill import losses as indistill_losses
from indistill.commands.cli import main
from indistill.config.files import read_lines
from indistill.distributed.ddp import DDP
from indistill.distributed.engine import Engine
from indistill.distributed.zero import ZeRO
from indistill.losses import ce_loss, objective
from indistill.training import guard, loop, optim
from indistill.training import mix as training_mix
from indistill.training.loop import Run

BAD = (3, 8, 9)  # in the warm-up; then two in a row, in kd


def digest(values: Any) -> str:
    found = hashlib.sha256()
    for value in values:
        found.update(
            torch.as_tensor(value).detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        )
    return found.hexdigest()


def break_steps(kind: str, rank: int, bad: Any = BAD) -> None:
    """Make something non-finite in the first micro-batch of each of these steps, only on this rank."""
    if int(os.environ["RANK"]) != rank:
        return
    call, mix, begin_step = objective.Objective.__call__, training_mix.make_mix, optim.PhaseOptim.begin_step
    hint, entropy = indistill_losses.hint, indistill_losses.cross_entropy
    at = {"step": -1, "broken": -1}

    def telling_begin_step(self, step, phase):
        at["step"] = step
        return begin_step(self, step, phase)

    def now(wanted: str) -> bool:
        return kind == wanted and at["step"] in bad and at["broken"] < at["step"]

    def broken(value: Tensor) -> Tensor:
        if now("loss"):
            value = value + torch.inf  # the gradient stays finite
        elif now("gradient"):
            value.register_hook(lambda gradient: gradient * torch.nan)
        return value

    def breaking_call(self, *arguments, **keywords):
        result = call(self, *arguments, **keywords)
        at["broken"] = at["step"]
        return result

    def breaking_mix(*arguments):
        inner = mix(*arguments)

        def mixed(batch, phase):
            images, labels = inner(batch, phase)
            return (images * torch.nan if now("image") else images), labels

        return mixed

    optim.PhaseOptim.begin_step = telling_begin_step
    objective.Objective.__call__, loop.make_mix = breaking_call, breaking_mix
    objective.hint = lambda *arguments: broken(hint(*arguments))
    ce_loss.cross_entropy = lambda *arguments: broken(entropy(*arguments))


class State:
    """Collects the state that a bad step must not change, during a run of `module.train`."""

    def __init__(self) -> None:
        for engine_class in (DDP, ZeRO):
            self.record(engine_class)
        ema_class = guard.Ema

        def keep_ema(*arguments, **keywords):
            self.ema = ema_class(*arguments, **keywords)
            return self.ema

        guard.Ema = keep_ema

    def record(self, engine_class: type[Engine]) -> None:
        """Keep what `prepare` and `whole` of the engine return."""
        prepare, whole = engine_class.prepare, engine_class.whole

        def keep_prepare(*arguments):
            self.wrapped, self.optimizer, was_skipped = prepare(*arguments)
            return self.wrapped, self.optimizer, was_skipped

        def keep_whole(*arguments):
            self.whole = whole(*arguments)
            return self.whole

        engine_class.prepare, engine_class.whole = keep_prepare, keep_whole

    def digests(self) -> list[str]:
        inner = getattr(
            self.optimizer.optimizer, "optimizer", self.optimizer.optimizer
        )  # ZeRO's own holds torch's
        state = [value for of_one in inner.state.values() for value in of_one.values()]
        student = self.whole()
        return [
            digest(p)
            for p in (student.parameters(), state, student.buffers(), self.ema.module.state_dict().values())
        ]

    def at_bad_steps(self, begin: Any, end: Any) -> None:
        """Call these functions before and after each bad step."""
        begin_step, end_step = optim.PhaseOptim.begin_step, curriculum.Pace.end_step

        def calling_begin(phase_optim, step, phase):
            lr = begin_step(phase_optim, step, phase)
            if step in BAD:
                begin()
            return lr

        def calling_end(pace, done, *arguments):
            if done - 1 in BAD:
                end()
            return end_step(pace, done, *arguments)

        optim.PhaseOptim.begin_step, curriculum.Pace.end_step = calling_begin, calling_end

    def finishing(self, tree: dict[str, Any]) -> None:
        end = Run.end

        def telling_end(run):
            accelerator = run.accelerator
            recorded = {"world": accelerator.num_processes, "engine": run.engine.describe()}
            recorded["digests"] = self.digests()
            (Path(tree["run_dir"]) / f"recorded-{accelerator.process_index}.json").write_text(
                json.dumps(recorded)
            )
            return end(run)

        Run.end = telling_end


def run_broken(tree: dict[str, Any], kind: str, rank: int) -> None:
    """Train, and check that the bad steps change no bit of the state."""
    state, before = State(), []
    break_steps(kind, rank)

    def end() -> None:
        assert state.digests() == before.pop()
        seen.append(1)

    seen = []
    state.at_bad_steps(lambda: before.append(state.digests()), end)
    state.finishing(tree)
    loop.train(config.parse(tree, "test"))
    assert len(seen) == len(BAD)


def run_without(tree: dict[str, Any]) -> None:
    """Train on the same batches, all finite, and undo the bad steps from copies of all states."""
    state, before = State(), []

    def begin() -> None:
        parts = state.wrapped, state.optimizer.optimizer, state.ema.module
        before[:] = [(part, copy.deepcopy(part.state_dict())) for part in parts]

    state.at_bad_steps(begin, lambda: [part.load_state_dict(saved) for part, saved in before])
    state.finishing(tree)
    loop.train(config.parse(tree, "test"))


def recorded(tree: dict[str, Any], world: int) -> list[dict[str, Any]]:
    return [
        json.loads((Path(tree["run_dir"]) / f"recorded-{rank}.json").read_text()) for rank in range(world)
    ]


def run(tree: dict[str, Any]) -> None:
    loop.train(config.parse(tree, "test"))


def losses(run_dir: str) -> list[float | None]:
    return [line["loss"] for line in lines({"run_dir": run_dir})]


def lines(tree: dict[str, Any]) -> list[dict[str, Any]]:
    return [line for line in read_lines(Path(tree["run_dir"]) / "metrics.jsonl") if "loss" in line]


@pytest.fixture
def short_tree(tree):
    """A config with batch norm, averaged weights, 6 steps of warm-up, 6 of KD, and a line every two steps."""
    tree["warmup"] = {"curriculum": "sequential", "durations": ["2 steps", "2 steps", "2 steps"]}
    tree |= {"duration": "12 steps", "ema": {"decay": 0.9}, "clip_grad_norm": 1.0}
    tree["log"]["every_steps"] = 2
    tree["checkpoint"] = {"every_steps": 3, "keep_last": 9}
    return tree


@pytest.mark.parametrize(
    ("kind", "world", "rank", "precision", "accumulation"),
    [
        ("gradient", 1, 0, "bf16", 2),
        pytest.param("image", 2, 0, "no", 1, marks=pytest.mark.slow),
        ("loss", 2, 1, "bf16", 2),
        pytest.param("loss", 1, 0, "no", 1, marks=pytest.mark.slow),
    ],
)
def test_a_bad_step_leaves_no_trace(short_tree, tmp_path, kind, world, rank, precision, accumulation):
    short_tree |= {"mixed_precision": precision, "grad_accumulation": accumulation}
    without = {**copy.deepcopy(short_tree), "run_dir": str(tmp_path / "without"), "log": {"every_steps": 1}}
    run_ranks(run_broken, world, short_tree, kind, rank)
    run_ranks(run_without, world, without)
    ranks, expected = recorded(short_tree, world), recorded(without, world)
    assert [one["world"] for one in ranks] == [world] * world
    assert [one["digests"] for one in ranks] == [one["digests"] for one in expected]
    assert ranks[0]["digests"][:2] == ranks[-1]["digests"][:2]  # batch norm's statistics are each rank's own

    per_step = [line["loss"] for line in lines(without)]
    windows = [
        [loss for step, loss in enumerate(per_step) if step // 2 == i and step not in BAD] for i in range(6)
    ]
    means = [sum(window) / len(window) if window else None for window in windows]
    assert means[4] is None  # both of its steps were bad
    assert [line["loss"] for line in lines(short_tree)] == [
        m if m is None else pytest.approx(m, rel=LOGGED) for m in means
    ]
    assert [line["skipped_steps"] for line in lines(short_tree)] == [0, 1, 1, 1, 3, 3]


def resume(tree: dict[str, Any]) -> None:
    break_steps("loss", 0)
    loop.train(config.parse(tree, "test"))
    again = Path(tree["run_dir"]) / "checkpoints" / "step-00000009"  # between two bad steps
    whole = lines(tree)
    assert whole[-1]["skipped_steps"] == len(BAD)
    break_steps("loss", 0)  # its step count starts at 0
    loop.train(config.parse(tree, "test"), str(again))
    kept = {"step", "loss", "skipped_steps"}
    assert [{k: line[k] for k in kept} for line in lines(tree)] == [
        {k: line[k] for k in kept} for line in whole
    ]


def test_the_count_is_in_the_checkpoint(short_tree):
    run_ranks(resume, 1, short_tree)


def stopped(arguments: list[str], folder: str, bad: range) -> None:
    import sys

    break_steps("loss", 1, bad)
    with open(f"{folder}/stderr-{os.environ['RANK']}", "w") as sys.stderr:
        main(arguments)


def message_of_bad_steps(tree: dict[str, Any], folder: Path, bad: range) -> str:
    path = folder / "config.yaml"
    path.write_text(json.dumps(tree))
    run_ranks(stopped, 2, ["train", str(path)], str(folder), bad, exit_code=2)
    return (folder / "stderr-0").read_text()


def test_a_run_of_bad_steps_alone_has_no_result(short_tree, tmp_path):
    short_tree |= {"warmup": None, "max_bad_steps": 1000}
    message = message_of_bad_steps(short_tree, tmp_path, range(100))
    assert "each of the 12 steps was skipped" in message
    assert not (Path(short_tree["run_dir"]) / "student.safetensors").exists()


def test_too_many_in_a_row_stop_the_run(short_tree, tmp_path):
    short_tree |= {"warmup": None, "max_bad_steps": 3}
    message = message_of_bad_steps(short_tree, tmp_path, range(5, 100))
    # The fourth of them was step 9, which has no line.
    assert (
        "step 10: loss, ce not finite: 5 steps in a row were skipped, more than max_bad_steps (3)" in message
    )
    # That of step 9 is written beside the steps, and may not be there yet.
    assert re.search(rf"last good checkpoint: {short_tree['run_dir']}/checkpoints/step-0000000[69]:", message)
    word, reason = (Path(short_tree["run_dir"]) / "status").read_text().splitlines()
    assert word == "failed"
    assert reason in message


@pytest.mark.portable
@pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None or importlib.util.find_spec("transformers") is None,
    reason="needs deepspeed and transformers: pip install deepspeed transformers",
)
@pytest.mark.parametrize(
    ("stage", "kind", "accumulation"),
    [
        pytest.param(2, "loss", 2, marks=pytest.mark.slow),
        (3, "loss", 2),
        (2, "image", 1),
    ],
)
def test_under_zero(short_tree, tmp_path, stage, kind, accumulation):
    """Check the states that run_broken records on each rank, and compare the losses with DDP."""
    short_tree["grad_accumulation"] = accumulation
    short_tree["student"] = {"name": "resnet10t", "kwargs": {**SMOOTH, "channels": [8, 8, 16, 24]}}
    short_tree["teacher"] |= {"name": "resnet10t", "kwargs": {**SMOOTH, "channels": [16, 16, 24, 32]}}
    short_tree["warmup"]["pairs"] = [[1, 1], [2, 2], [3, 3]]
    section = {"name": "deepspeed", "stage": stage, "reduce_bucket_size": 4000}
    zero = {**copy.deepcopy(short_tree), "run_dir": str(tmp_path / "zero"), "engine": section}
    run_ranks(run_broken, 2, zero, kind, 1)
    assert [one["engine"] for one in recorded(zero, 2)] == [f"ZeRO stage {stage}"] * 2
    run_ranks(run_broken, 2, short_tree, kind, 1)
    plain = {**copy.deepcopy(short_tree), "run_dir": str(tmp_path / "plain")}
    run_ranks(run, 1, plain)
    run_ranks(run_moved, 1, run, plain, EPS)
    ours, expected, limits = zip(
        *(
            row
            for row in zip(
                losses(zero["run_dir"]), losses(short_tree["run_dir"]), strayed(losses, plain["run_dir"])
            )
            if row[:2] != (None, None)
        )
    )
    assert len(ours) == 5
    assert_rounding_explains(ours, expected, np.array(limits))
    assert [line["skipped_steps"] for line in lines(zero)] == [0, 1, 1, 1, 3, 3]
