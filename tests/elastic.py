"""A run whose nodes come and go: where its ranks wait for the test, and what must come of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import LOGGED, in_float64, losses, run_ranks, train_until, use_vits
from safetensors.torch import load_file

from indistill.config.files import read_lines

STEPS, HELD_AT, ALONE_AT = 40, 20, 30

# The ranks are started by torchrun: what a test does to them is in a plugin, which has to define a loss.
PLUGIN = f"""
import os, time
from pathlib import Path

import torch

from indistill.distributed import preemption
from indistill.losses import Loss
from indistill.models.network import DTYPES
from indistill.training.run_log import RunLog

DTYPES["no"] = torch.float64
torch.set_default_dtype(torch.float64)
folder, end_step = Path(__file__).parent, RunLog.end_step


def holding_end_step(log, step, *arguments):
    line = end_step(log, step, *arguments)
    world, first = log.accelerator.num_processes, log.accelerator.is_main_process
    while step == {HELD_AT} and world == 2 and first and not (folder / "lost").exists():
        (folder / "held.part").write_text(str(os.getpid()))
        (folder / "held.part").rename(folder / "held")  # which the test reads at any moment
        time.sleep(0.05)
    while step == {ALONE_AT} and world == 1 and not preemption.asked():
        (folder / "alone").touch()
        time.sleep(0.05)
    return line


RunLog.end_step = holding_end_step


class Unused(Loss, name="unused"):
    reads = {{"logits"}}

    def __call__(self, student, teacher, labels, epoch): ...
"""


def elastic(tree: dict[str, Any]) -> dict[str, Any]:
    """A config without batch norm and dropout, so that a loss does not depend on how the batch is divided."""
    use_vits(tree)
    return tree | {"duration": f"{STEPS} steps", "checkpoint": {"every_steps": 5, "keep_last": 99}}


def check_as_uninterrupted(tree: dict[str, Any], folder: Path) -> None:
    """Compare losses and weights of a run with those of one process that never stops, both in float64."""
    run_dir, reference = Path(tree["run_dir"]), folder / "uninterrupted"
    run_ranks(in_float64, None, train_until, tree | {"run_dir": str(reference)})
    assert losses(run_dir) == pytest.approx(losses(reference), rel=LOGGED)
    weights, expected = (load_file(next(path.glob("*.safetensors"))) for path in (run_dir, reference))
    assert weights.keys() == expected.keys()
    for name, value in weights.items():
        torch.testing.assert_close(value, expected[name], rtol=LOGGED, atol=LOGGED, msg=name)


def worlds(run_dir: Path) -> list[int]:
    """The world size of each start of a run."""
    return [line["world_size"] for line in read_lines(run_dir / "history.jsonl") if line["event"] == "start"]
