"""No step between two logged lines reads a value from the device, where it would wait for all work before.

Not counted: every few seconds several ranks agree on whether to stop, and where a phase begins DDP compares
their parameters.
"""

from __future__ import annotations

import json
import os
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import SMOOTH, run_ranks
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from indistill import Trainer
from indistill.training import loop
from indistill.training.run_log import RunLog

READS = {
    "aten::_local_scalar_dense",
    "aten::is_nonzero",
    "aten::nonzero",
}  # operations that wait for a device
COPIES = ("tolist", "numpy", "cpu")  # methods that do, and are none of these operations on a CPU
RESNET = {"name": "resnet10t", "kwargs": {**SMOOTH, "channels": [8, 8, 16, 16]}}
TEACHER = {"name": "cnn32_auxiliary", "random": True, "losses": [{"name": "feature"}]}
SECOND = {**TEACHER, "id": "second"}
STUDENTS = [{"name": "small", "student": {"name": "cnn32_student"}}, {"name": "resnet", "student": RESNET}]
OPTIONS = {
    "momentum": ["optimizer.name=momentum"],
    "mixed": ["kd.losses=[{name: bce}, {name: kd}]", "kd.mix={mixup: 0.8, cutmix: 1.0}"],
    "recomputed": [f"student={json.dumps(RESNET)}", "grad_checkpointing=true"],
    "half precision": ["mixed_precision=bf16"],
    "growing images": [
        f"student={json.dumps(RESNET)}",
        f"teacher={json.dumps({**RESNET, 'random': True})}",
        "data.image_size={from: 32, to: 64, until: 12 steps}",
    ],
    "stored targets": ["targets.source=cached", "data.augment.views=2", "warmup.curriculum=sequential"],
    "two teachers": [
        "teacher=null",
        f"teachers={json.dumps([TEACHER, SECOND])}",
        "kd.losses=[{name: ce}]",
        "kd.teacher_dropping=0.5",
    ],
    "two students": [],
}


class Reads(TorchDispatchMode):
    """Where values are read from the device in steps that write no line."""

    def __init__(self) -> None:
        super().__init__()
        self.in_step: list[str] = []
        self.found: list[str] = []
        self.steps = 0  # without a line
        self.logged = False
        self.phases: dict[int, str] = {}  # of the last step, by run
        self.thread = threading.get_ident()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function._schema.name in READS:
            self.note()
        return function(*args, **(kwargs or {}))

    def note(self) -> None:
        stack = "".join(traceback.format_stack())
        if "/distributed/preemption.py" not in stack:
            self.in_step.append(stack)

    def noting(self, method: Callable) -> Callable:
        def called(tensor: Tensor, *arguments: Any, **keys: Any) -> Any:
            if threading.get_ident() == self.thread:  # others prepare images
                self.note()
            return method(tensor, *arguments, **keys)

        return called

    def counting(self, step: Callable) -> Callable:
        def called(run: loop.Run) -> None:
            phase = run.pace.curriculum.at(run.done).name
            begins = self.phases.get(id(run)) != phase
            self.phases[id(run)] = phase
            self.in_step, self.logged = [], False
            step(run)
            if not (begins or self.logged):
                self.steps += 1
                self.found += self.in_step

        return called

    def watching(self, end_step: Callable) -> Callable:
        def called(*arguments: Any) -> dict[str, Any] | None:
            line = end_step(*arguments)
            self.logged = line is not None
            return line

        return called


def count(tree: dict[str, Any], *overrides: str) -> None:
    """Train, and write what was found beside the run."""
    mode = Reads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Run, "step", mode.counting(loop.Run.step))
        patch.setattr(RunLog, "end_step", mode.watching(RunLog.end_step))
        for name in COPIES:
            patch.setattr(Tensor, name, mode.noting(getattr(Tensor, name)))
        with mode:
            Trainer(tree, *overrides).train()
    path = Path(tree["run_dir"]) / f"reads-{os.environ.get('RANK', 0)}.json"
    path.write_text(json.dumps({"steps": mode.steps, "found": mode.found}))


def reads_of(tree: dict[str, Any], rank: int = 0) -> list[str]:
    counted = json.loads((Path(tree["run_dir"]) / f"reads-{rank}.json").read_text())
    assert counted["steps"] >= 15
    return counted["found"]


@pytest.fixture
def busy_tree(tree: dict[str, Any]) -> dict[str, Any]:
    """With all that an engine has to do: accumulation, clipping, a moving average, relational losses, and a
    curriculum that ends its phases itself.
    """
    tree |= {"grad_accumulation": 2, "clip_grad_norm": 1.0, "ema": {"decay": 0.9}, "log": {"every_steps": 6}}
    tree["warmup"] = {
        "durations": ["6 steps", "6 steps"],
        "pairs": [[0, 0], [2, 2]],
        "curriculum": "auto",
        "auto": {"window": "6 steps"},
    }
    tree["kd"]["losses"] += [{"name": "pkt"}, {"name": "dist"}]
    return tree


@pytest.mark.parametrize("name", OPTIONS)
def test_a_step_without_a_line_reads_nothing(busy_tree, tmp_path, name):
    overrides = [*OPTIONS[name], f"targets.dir={tmp_path / 'targets'}"]
    if name == "stored targets":
        Trainer(busy_tree, *overrides).write_targets()
    if name == "two students":
        busy_tree.pop("student")
        busy_tree["students"] = STUDENTS
    run_ranks(count, None, busy_tree, *overrides)
    found = reads_of(busy_tree)
    assert not found, found[0]


@pytest.mark.parametrize("stage", [0, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (1, 2)), 3])
def test_an_engine_reads_nothing_between_lines(busy_tree, stage):
    """Stage 0 is DDP. DeepSpeed's optimizers read norms in their own step, and nothing else is read."""
    if stage:
        busy_tree["engine"] = {"name": "deepspeed", "stage": stage}
    run_ranks(count, 2, busy_tree)
    for rank in range(2):
        found = reads_of(busy_tree, rank)
        ours = [stack for stack in found if "/deepspeed" not in stack.rpartition("/indistill/")[2]]
        assert not ours, ours[0]
        assert bool(found) == bool(stage)


def test_a_read_is_found(busy_tree):
    """An optimizer that torch has no fused version of is asked each time whether it took its step."""
    busy_tree["optimizer"]["name"] = "lamb"
    run_ranks(count, None, busy_tree)
    assert len(reads_of(busy_tree)) >= 15
