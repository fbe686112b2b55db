"""Features of a teacher without a classifier on several processes, and on another number after a resume."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import (
    LOGGED,
    assert_rounding_explains,
    in_float64,
    losses,
    preload,
    run_moved,
    run_ranks,
    strayed,
    train_until,
)
from safetensors.torch import load_file

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "num_heads": 2, "depth": 3}
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None or importlib.util.find_spec("transformers") is None,
    reason="needs deepspeed and transformers: pip install deepspeed transformers",
)

if not torch.cuda.is_available():
    preload("deepspeed", "deepspeed.runtime.zero.muon.muon_optimizer", "transformers.integrations.deepspeed")


@pytest.fixture
def headless(tree: dict[str, Any]) -> dict[str, Any]:
    """A warm-up and three terms, without batch norm, which would depend on how the batch is divided."""
    tree["student"] = {"name": "test_vit", "num_classes": 0, "kwargs": VIT}
    tree["teacher"] = {
        "name": "test_vit", "random": True, "num_classes": 0, "image_size": 48, "kwargs": {"depth": 3},
    }  # fmt: skip
    tree["warmup"] = {
        "curriculum": "sequential",
        "pairs": [[0, 0], [2, 2]],
        "durations": ["2 steps", "2 steps"],
    }
    tree["kd"] = {
        "losses": [
            {"name": "feature", "standardise": "phi_s", "distance": "mse"},
            {"name": "feature", "on": "maps", "standardise": "channel", "distance": "smooth_l1"},
            {"name": "feature", "on": "tokens", "projector": "mlp", "weight": 0.5},
        ]
    }
    tree["duration"] = "12 steps"
    tree["optimizer"]["kwargs"] = {"eps": 1e-4}
    tree["checkpoint"] = {"every_steps": 3, "keep_last": 9}
    tree["evaluate"] = {"similarity_samples": 0}
    return tree


def named(tree: dict[str, Any], folder: Path, name: str) -> dict[str, Any]:
    return {**copy.deepcopy(tree), "run_dir": str(folder / name)}


@pytest.mark.portable
def test_a_resume_on_another_number_of_processes_has_equal_losses(headless, tmp_path):
    whole = named(headless, tmp_path, "whole")
    run_ranks(in_float64, 1, train_until, whole)
    expected = losses(whole["run_dir"])
    assert len(expected) == 12

    two = named(headless, tmp_path, "two")
    run_ranks(in_float64, 2, train_until, two)
    assert losses(two["run_dir"]) == pytest.approx(expected, rel=LOGGED)
    ours, theirs = (load_file(Path(run["run_dir"], "standards.safetensors")) for run in (two, whole))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.allclose(tensor, theirs[name], rtol=1e-6, atol=1e-9), name

    sharded = named(headless, tmp_path, "sharded")
    sharded["teacher"]["shard"] = True
    run_ranks(in_float64, 2, train_until, sharded)
    assert losses(sharded["run_dir"]) == pytest.approx(expected, rel=LOGGED)

    changing = named(headless, tmp_path, "changing")
    run_ranks(in_float64, 4, train_until, changing, 3)  # in the middle of the warm-up
    run_ranks(in_float64, 2, train_until, changing, 8)  # and of an epoch
    run_ranks(in_float64, 1, train_until, changing)
    assert losses(changing["run_dir"]) == pytest.approx(expected, rel=LOGGED)


@pytest.mark.portable
def test_from_stored_targets_on_another_number_of_processes(headless, tmp_path):
    headless["data"]["augment"]["views"] = 2
    headless["targets"] = {"dir": str(tmp_path / "targets")}
    live = named(headless, tmp_path, "live")
    run_ranks(in_float64, 1, train_until, live)
    run_ranks(in_float64, 2, write_targets, headless)
    cached = named(headless, tmp_path, "cached")
    cached["targets"]["source"] = "cached"
    run_ranks(in_float64, 1, train_until, cached, 7)
    run_ranks(in_float64, 2, train_until, cached)
    # Stored in float32: each number is rounded once.
    assert losses(cached["run_dir"]) == pytest.approx(losses(live["run_dir"]), rel=1e-4)


def write_targets(tree: dict[str, Any]) -> None:
    from indistill import config
    from indistill.commands.targets import write

    write.write(config.parse(tree, "test"))


@needs_deepspeed
@pytest.mark.parametrize("stage", [3])  # its weights are partitioned, too
@pytest.mark.parametrize("several", [pytest.param(False, marks=pytest.mark.slow), True])
def test_zero_has_the_losses_of_ddp_and_resumes_on_another_number(
    headless, tmp_path, monkeypatch, stage, several
):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    if several:
        second = {"name": "test_vit2", "random": True, "num_classes": 0, "image_size": 32}
        first = {**headless.pop("teacher"), "losses": headless["kd"]["losses"]}
        headless["teachers"] = [first, {**second, "losses": [{"name": "feature"}]}]
        headless["kd"] = {"losses": []}
    ddp = named(headless, tmp_path, "ddp")
    run_ranks(train_until, 2, ddp)
    run_ranks(run_moved, 2, train_until, ddp, 2**-23)
    expected = losses(ddp["run_dir"])
    zero = named(headless, tmp_path, "zero") | {"engine": {"name": "deepspeed", "stage": stage}}
    run_ranks(train_until, 2, zero, 6)
    run_ranks(train_until, 1, zero)
    assert_rounding_explains(losses(zero["run_dir"]), expected, strayed(losses, ddp["run_dir"]))
    student = load_file(Path(zero["run_dir"], "student.safetensors"))
    assert all(value.isfinite().all() for value in student.values())
    assert not any(name.startswith("projectors") for name in student)
