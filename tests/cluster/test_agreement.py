"""Two ranks that differ in one thing both stop at the start, and one line names the difference."""

from __future__ import annotations

import copy
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import pack_images, run_ranks

from indistill import config
from indistill.distributed import agree
from indistill.training import lessons, loop, parts, pruning


def with_keys(tree: dict[str, Any], name: str, **keys: Any) -> dict[str, Any]:
    return {**tree, name: tree[name] | keys}


def refused(tree: dict[str, Any], other_code: str, other_data: str) -> None:
    """Run each case separately: rank 1 differs in one thing, rank 0 in nothing."""
    differs = os.environ["RANK"] == "1"
    plan_of, teacher_of = pruning.agree_on_plan, parts.create_teacher

    def other_plan(*arguments, **keywords):
        return plan_of(*arguments, **keywords)._replace(criterion="l2")

    def other_teacher(settings):
        teacher = teacher_of(settings)
        with torch.no_grad():
            parameter = next(teacher.parameters())
            parameter[(0,) * parameter.dim()] += 1e-3
        return teacher

    def both(pattern: str, change: tuple[Any, str, Any] | None = None, mine: dict[str, Any] = tree) -> None:
        change = change if differs else None
        if change:
            owner, name, value = change
            before = getattr(owner, name)
            setattr(owner, name, value)
        with pytest.raises(config.UserError, match=f"^the ranks disagree on {pattern}: start all of them"):
            loop.train(config.parse(mine if differs else tree, "test"))
        if change:
            setattr(owner, name, before)

    both("optimizer.lr: rank 0 has 0.001, rank 1 has 0.5", mine=with_keys(tree, "optimizer", lr=0.5))
    # A restart may change these keys, but not one rank alone: it would wait forever for the other.
    both("log.every_steps: rank 0 has 1, rank 1 has 2", mine=with_keys(tree, "log", every_steps=2))
    both(r"indistill: rank 0 has .*, rank 1 has .*", (agree, "__file__", other_code))
    both(r"torch: rank 0 has .*, rank 1 has 0\.1", (torch, "__version__", "0.1"))
    both(
        "data: rank 0 has [0-9a-f]{64}, rank 1 has [0-9a-f]{64}",
        mine=with_keys(tree, "data", root=other_data),
    )
    both("plan: rank 0 has .*, rank 1 has .*", (lessons, "agree_on_plan", other_plan))
    both("teacher: rank 0 has .*, rank 1 has .*", (parts, "create_teacher", other_teacher))


def test_ranks_that_disagree_do_not_start(tree, tmp_path):
    code = tmp_path / "code"
    shutil.copytree(Path(agree.__file__).parents[1], code, ignore=shutil.ignore_patterns("__pycache__"))
    with (code / "losses" / "common.py").open("a") as file:
        file.write("# one more line\n")
    pack_images(tmp_path / "data", "train", samples=192, per_shard=64, seed=3)
    pack_images(tmp_path / "data", "eval", samples=51, per_shard=51, seed=2)
    run_ranks(refused, 2, tree, str(code / "distributed" / "agree.py"), str(tmp_path / "data"))
    assert not list((Path(tree["run_dir"]) / "checkpoints").iterdir())


def agreed(tree: dict[str, Any]) -> None:
    mine = copy.deepcopy(tree)
    mine["data"] |= {"workers": int(os.environ["RANK"])}  # may differ between nodes
    loop.train(config.parse(mine, "test"))


def test_nodes_may_differ_in_what_is_their_own(tree):
    run_ranks(agreed, 2, tree | {"duration": "14 steps"})
    assert (Path(tree["run_dir"]) / "summary.json").exists()
