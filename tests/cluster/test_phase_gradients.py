"""DDP reduces in each phase the gradients that its loss makes, and no others."""

from __future__ import annotations

import copy
import itertools
import json
import os
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedDataParallelKwargs
from conftest import LOGGED, SMOOTH, in_float64, losses, run_ranks, train_until, use_vits
from safetensors.torch import load_file
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from indistill import Callback, config
from indistill.commands.plan import estimate
from indistill.commands.plan.network import all_reduce_bytes
from indistill.distributed.ddp import DDP
from indistill.training import loop, start

PHASES = ("warmup 1/3", "warmup 2/3", "warmup 3/3", "kd")


class Record(Callback):
    """The bytes that DDP reduces in each step, by phase, and how many wrapped students are alive after it."""

    def __init__(self) -> None:
        self.sent = 0
        self.by_phase: dict[str, list[int]] = {}
        self.wrapped: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()
        self.alive: list[int] = []

    def reduce(self, _state, bucket):  # torch refuses annotations that are texts
        self.sent += bucket.buffer().nbytes
        return allreduce_hook(None, bucket)

    def on_step(self, run: Any, phase: Any, line: Any) -> None:
        self.by_phase.setdefault(phase.name, []).append(self.sent)
        self.sent = 0
        self.wrapped.add(run.wrapped)
        self.alive.append(len(self.wrapped))


def run_and_record(tree: dict[str, Any], folder: str) -> None:
    """Train, and write what each rank records and prints on stderr."""
    rank = os.environ["RANK"]
    os.dup2(os.open(f"{folder}/{rank}.stderr", os.O_CREAT | os.O_WRONLY), 2)  # as torch's C++ writes it
    record, init = Record(), DistributedDataParallel.__init__

    def hooked(self, *arguments: Any, **keywords: Any) -> None:
        init(self, *arguments, **keywords)
        self.register_comm_hook(None, record.reduce)

    DistributedDataParallel.__init__ = hooked
    loop.train(config.parse(tree, "test"), callbacks=[record])
    recorded = {"by_phase": record.by_phase, "alive": record.alive}
    Path(folder, f"{rank}.json").write_text(json.dumps(recorded))


@pytest.mark.parametrize(
    ("world", "changes"),
    [
        (2, {"grad_accumulation": 2}),
        pytest.param(
            4,
            {"mixed_precision": "bf16", "warmup": {"durations": ["3 steps"] * 3, "curriculum": "cumulative"}},
            marks=pytest.mark.slow,
        ),
        (
            2,
            {
                "warmup": {"curriculum": "sequential", "durations": ["3 steps"] * 3, "adapter": "conv1x1"},
                "kd": {"losses": [{"name": "hint"}]},
            },
        ),
    ],
)
def test_the_bytes_are_those_of_the_phases_own_parameters(tree, tmp_path, world, changes):
    tree |= {
        "warmup": {"curriculum": "sequential", "durations": ["3 steps"] * 3},
        "duration": "12 steps",
        **changes,
    }
    run_ranks(run_and_record, world, tree, str(tmp_path))
    plan = estimate.of_run(config.parse(tree, "test"), world)
    planned = {phase.name: phase.network_bytes["gradients"] for phase in plan.phases}
    for rank in range(world):
        recorded = json.loads((tmp_path / f"{rank}.json").read_text())
        assert recorded["by_phase"].keys() == planned.keys() == set(PHASES)
        for name, sizes in recorded["by_phase"].items():
            # The first step of a phase sends as many again, of zeros (`DDP._settle`).
            assert [all_reduce_bytes(size, world) / planned[name] for size in sizes] == [2, 1, 1]
        # The first pair trains a convolution of 3 x 3 on 3 channels, with bias and norm.
        assert recorded["by_phase"]["warmup 1/3"][1:] == [4 * (8 * 27 + 3 * 8)] * 2
        assert recorded["alive"] == [1] * 12  # a wrapper is gone with its phase, and its hooks with it
        assert "unused" not in (tmp_path / f"{rank}.stderr").read_text()


def run_searching(tree: dict[str, Any]) -> None:
    """Train with one wrapper for all phases, in which DDP searches for unused parameters in every step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DDP, "in_phase", lambda engine, phase: engine.wrapped)
        patch.setattr(
            start,
            "DistributedDataParallelKwargs",
            lambda **keywords: DistributedDataParallelKwargs(**keywords, find_unused_parameters=True),
        )
        train_until(tree)


RESNET = {
    "student": {"name": "resnet10t", "kwargs": {**SMOOTH, "channels": [8, 8, 16, 16], "drop_path_rate": 0.2}},
    "warmup": {"curriculum": "sequential", "pairs": [[0, 0], [1, 2]], "durations": ["3 steps", "5 steps"]},
    "kd": {"losses": [{"name": "at"}, {"name": "pkt"}], "mix": {"mixup": 0.8}},
    "optimizer": {"name": "momentum", "lr": 0.01},
    "ema": {"decay": 0.9},
}


@pytest.mark.parametrize(
    "changes",
    [
        {"grad_accumulation": 2, "clip_grad_norm": 1.0},
        pytest.param(RESNET, marks=pytest.mark.slow),
        {"warmup": None, "kd": {"losses": [{"name": "pkt"}]}, "mixed_precision": "bf16"},
    ],
)
def test_two_ranks_do_the_run_of_a_search_for_unused_parameters(tree, tmp_path, changes):
    """Bit for bit: sums of two numbers do not depend on the order of the parameters in DDP's buckets."""
    tree |= {
        "duration": "12 steps",
        "warmup": {"curriculum": "sequential", "durations": ["2 steps", "2 steps", "3 steps"]},
        **changes,
    }
    searching = copy.deepcopy(tree) | {"run_dir": str(tmp_path / "searching")}
    run_ranks(train_until, 2, tree)
    run_ranks(run_searching, 2, searching)
    assert len(losses(tree["run_dir"])) == 12
    assert losses(tree["run_dir"]) == losses(searching["run_dir"])
    ours, theirs = (load_file(f"{run['run_dir']}/student.safetensors") for run in (tree, searching))
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


@pytest.mark.parametrize(
    ("world", "warmup"),
    [
        pytest.param(2, {"durations": ["3 steps"] * 3}, marks=pytest.mark.slow),
        (4, {"durations": ["3 steps"] * 3}),
        pytest.param(4, None, marks=pytest.mark.slow),
    ],
)
def test_a_run_goes_on_in_every_phase(tree, tmp_path, world, warmup):
    """Ranks that stop in each phase, and between two of them, have the losses of ranks that do not."""
    tree |= {"duration": "12 steps", "warmup": warmup}
    whole = copy.deepcopy(tree) | {"run_dir": str(tmp_path / "whole")}
    run_ranks(train_until, world, whole)
    for stop in (1, 3, 5, 8, 10, None) if warmup else (5, None):
        run_ranks(train_until, world, tree, stop)
    assert len(losses(tree["run_dir"])) == 12
    assert losses(tree["run_dir"]) == losses(whole["run_dir"])


@pytest.mark.portable
def test_a_run_goes_on_in_every_phase_on_any_ranks(tree, tmp_path):
    use_vits(tree)
    tree |= {"duration": "12 steps", "ema": {"decay": 0.9}}
    tree["warmup"] = {
        "curriculum": "sequential",
        "pairs": [[0, 0], [1, 1], [2, 2]],
        "durations": ["3 steps"] * 3,
    }
    one = copy.deepcopy(tree) | {"run_dir": str(tmp_path / "one")}
    run_ranks(in_float64, 1, train_until, one)
    for world, stop in zip(itertools.cycle((4, 1, 2)), (2, 3, 5, 8, 10, None)):
        run_ranks(in_float64, world, train_until, tree, stop)
    assert len(losses(tree["run_dir"])) == 12
    assert losses(tree["run_dir"]) == pytest.approx(losses(one["run_dir"]), rel=LOGGED)
