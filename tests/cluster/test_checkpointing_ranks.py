"""grad_checkpointing on several ranks, under DDP and ZeRO, and with torch.compile: the run without it."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import losses, run_ranks
from safetensors.torch import load_file

from indistill import config
from indistill.training import loop, start

OPTIONS = {"drop_path_rate": 0.3, "drop_rate": 0.2}


def run(tree: dict[str, Any], step: int | None = None) -> None:
    resume = "auto" if step is None else f"{tree['run_dir']}/checkpoints/step-{step:08d}"
    loop.train(config.parse(tree, "test"), resume)


def compiled(tree: dict[str, Any], backend: str) -> None:
    """Train, compiled by a backend that may be quicker to start than the real one."""
    plugin, compile = start.TorchDynamoPlugin, torch.compile
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(start, "TorchDynamoPlugin", lambda **keys: plugin(**{**keys, "backend": backend}))
        patch.setattr(torch, "compile", partial(compile, backend=backend))
        run(tree)


@pytest.fixture
def recipe(tree: dict[str, Any]) -> dict[str, Any]:
    """A CNN with batch norm, drop path and dropout: two pairs of warm-up, then KD."""
    tree["student"] = {"name": "test_efficientnet", "kwargs": OPTIONS}
    tree["teacher"] = {"name": "test_efficientnet", "random": True}
    tree["warmup"] = {
        "curriculum": "sequential",
        "durations": ["3 steps", "3 steps"],
        "pairs": [[0, 0], [1, 1]],
    }
    return tree | {"duration": "12 steps", "checkpoint": {"every_steps": 4, "keep_last": 9}}


def assert_same(tree: dict[str, Any], other: dict[str, Any]) -> None:
    assert losses(tree["run_dir"]) == losses(other["run_dir"])
    found, expected = (load_file(Path(t["run_dir"]) / "student.safetensors") for t in (tree, other))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_two_ranks_train_the_same_and_resume_without_it(recipe, tmp_path):
    plain = recipe | {"run_dir": str(tmp_path / "plain")}
    run_ranks(run, 2, plain)
    run_ranks(run, 2, recipe | {"grad_checkpointing": True})
    assert_same(recipe, plain)
    run_ranks(run, 2, recipe, 4)  # in the middle of the warm-up
    assert_same(recipe, plain)


@pytest.mark.parametrize("stage", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_zero_trains_the_same(recipe, tmp_path, stage):
    path = tmp_path / "zero.json"
    section = {"stage": stage}
    if stage == 3:
        section["stage3_param_persistence_threshold"] = 0  # partition even the smallest weights
    path.write_text(json.dumps({"zero_optimization": section}))
    recipe["engine"] = {"name": "deepspeed", "config_file": str(path)}
    plain = recipe | {"run_dir": str(tmp_path / "plain")}
    run_ranks(run, 2, plain)
    run_ranks(run, 2, recipe | {"grad_checkpointing": True})
    assert_same(recipe, plain)


@pytest.mark.slow
def test_compiled_by_eager_it_is_the_same(recipe, tmp_path):
    """Without dropout, whose masks a compiled graph draws in another order."""
    recipe["student"]["kwargs"] = {}
    recipe["compile"] = True
    plain = recipe | {"run_dir": str(tmp_path / "plain")}
    run_ranks(compiled, None, plain, "aot_eager")
    run_ranks(compiled, None, recipe | {"grad_checkpointing": True}, "aot_eager")
    assert_same(recipe, plain)
