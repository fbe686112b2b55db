"""Micro-batches of one image: refused at the start where a batch norm cannot take them, and else trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from chains import load
from conftest import losses

from indistill import config
from indistill.config import UserError
from indistill.data.training import open_data
from indistill.training import loop, runs
from indistill.training.start import start_accelerator

REFUSED = "data.global_batch: 4 leaves one image to each rank and accumulation step, and a batch norm has one"


@pytest.fixture
def single(tree: dict[str, Any]) -> dict[str, Any]:
    """A config with four micro-batches of one image in a step."""
    tree["data"] |= {"global_batch": 4, "streams": 4}
    return tree | {"grad_accumulation": 4, "duration": "14 steps"}


def train(tree: dict[str, Any]) -> dict[str, Any]:
    return loop.train(config.parse(tree, "test"))


def test_a_student_whose_last_stage_is_one_pixel_is_refused(single):
    """ResNets have one at 32 pixels in the fourth phase: the warm-up before would have trained."""
    single["student"] = {"name": "resnet10t"}
    single["teacher"] = {"name": "resnet10t", "pretrained": False, "random": True}
    single["warmup"] = {"curriculum": "sequential", "durations": ["2 steps"] * 4}
    with pytest.raises(UserError, match=REFUSED):
        train(single)
    assert not losses(single["run_dir"])
    single["grad_accumulation"] = 2
    assert train(single | {"duration": "9 steps"})["step"] == 9


def test_a_later_stage_of_a_chain_is_refused_before_the_first(chain):
    chain["stages"][-1]["student"] = {"name": "resnet10t"}
    chain["stages"][-1] |= {"grad_accumulation": 4, "warmup": None}
    chain["data"] |= {"global_batch": 4, "streams": 4}
    with pytest.raises(UserError, match=f"stage student: {REFUSED}"):
        runs.run(load(chain))
    assert not list(Path(chain["run_dir"]).rglob("metrics.jsonl"))


def test_one_image_is_enough_where_its_maps_are_larger(single):
    """The paper's networks have 4 x 4 pixels in the last stage."""
    assert train(single)["step"] == 14
    assert len(losses(single["run_dir"])) == 14


def test_checking_leaves_no_trace_in_the_student(single):
    made = []
    for accumulation in (4, 1):  # the second is not checked
        torch.manual_seed(1)
        settings = config.parse(single | {"grad_accumulation": accumulation}, "test")
        made.append((loop.parts.create_student(settings).state_dict(), torch.rand(3)))
    (checked, drawn), (unchecked, drawn_without) = made
    assert torch.equal(drawn, drawn_without)
    assert all(torch.equal(value, unchecked[key]) for key, value in checked.items())


def test_a_loss_with_batch_norm_is_checked_too(single):
    """ReviewKD's layers see the deepest map of the student, which has no batch norm of its own."""
    single["student"] = {"name": "test_vit2", "kwargs": {"img_size": 32}}
    single["teacher"] = {"name": "resnet10t", "pretrained": False, "random": True}
    single |= {"warmup": None}
    single["kd"] = {"losses": [{"name": "ce"}, {"name": "reviewkd"}], "pairs": [[4, 0]]}
    with pytest.raises(UserError, match=REFUSED):
        train(single)


def test_every_micro_batch_has_the_same_size(single):
    """The last of an epoch, too: 190 images leave two over, which wait for the next epoch."""
    single["data"] |= {"global_batch": 10, "streams": 2}
    single["grad_accumulation"] = 2
    settings = config.parse(single, "test")
    accelerator = start_accelerator(settings)
    training, _ = open_data(accelerator, settings)
    assert training.steps_per_epoch * 10 != sum(training.dataset.shards.sizes)
    batches = training.loader(0, 2 * training.steps_per_epoch, accelerator.device)
    assert {len(batch.images) for batch in batches} == {5}
