"""Runs with AutoAugment, AugMix and the like: resumed, on two ranks, streamed, from stored targets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import losses, train_until

from indistill import config
from indistill.commands.targets import write
from indistill.config import UserError
from indistill.data.batch import Batch
from indistill.data.loader import IndexedTraining
from indistill.training import loop

ALL = {"vertical_flip": 0.5, "grayscale": 0.3, "blur": 0.3, "color_jitter": {}, "views": 2}
POLICIES = {"original": {"auto_augment": "original"}, "3a": {"auto_augment": "3a"}, "augmix": {"augmix": {}}}


def run(tree: dict[str, Any]) -> None:
    loop.train(config.parse(tree, "test"))


@pytest.fixture(params=POLICIES)
def recipe(tree: dict[str, Any], request: pytest.FixtureRequest) -> dict[str, Any]:
    tree["data"]["augment"] |= ALL | POLICIES[request.param]
    tree["targets"] = {"dir": str(Path(tree["run_dir"]).parent / "targets")}
    return tree | {
        "warmup": {"curriculum": "sequential", "durations": ["4 steps"], "pairs": [[1, 1]]},
        "duration": "12 steps",
    }


def test_stored_targets_and_a_resumed_run_see_the_same_views(recipe, tmp_path):
    run(recipe)
    expected = losses(recipe["run_dir"])
    write.write(config.parse(recipe, "test"))
    cached = recipe | {"targets": recipe["targets"] | {"source": "cached"}}
    for step in (2, 9):  # an interrupted live run goes on from stored targets
        mixed = {"run_dir": str(tmp_path / f"mixed-{step}")}
        train_until(recipe | mixed, step)
        train_until(cached | mixed)
        assert losses(mixed["run_dir"]) == expected


def test_stored_targets_of_other_views_are_refused_by_name(recipe, tmp_path):
    write.write(config.parse(recipe, "test"))
    recipe["targets"]["source"] = "cached"
    recipe["data"]["augment"]["blur"] = 0.0
    with pytest.raises(UserError, match=r"made with data.augment.blur: 0.3, this run has None"):
        run(recipe)


def test_two_ranks_see_what_one_sees(recipe):
    section = config.parse(recipe, "test").data

    def batch(rank: int, world: int) -> Batch:
        training = IndexedTraining(section, seed=3, rank=rank, world=world, accumulation=1)
        (loaded,) = training.loader(5, 6, torch.device("cpu"))
        return loaded

    whole = batch(0, 1)
    parts = [batch(rank, 2) for rank in range(2)]
    views = {int(i): view for part in parts for i, view in zip(part.ids, part.images)}
    assert views.keys() == set(whole.ids.tolist())
    assert all(torch.equal(views[int(i)], view) for i, view in zip(whole.ids, whole.images))


@pytest.mark.parametrize("workers", [0, 1])
def test_streamed_and_in_workers_they_are_the_same_again(tree, tmp_path, workers):
    tree["data"]["augment"] |= ALL | POLICIES["original"]
    tree["data"] |= {"access": "stream", "epoch_samples": 96, "in_memory": False, "workers": workers}
    tree |= {"warmup": None, "teacher": None, "kd": {"losses": [{"name": "ce"}]}, "duration": "4 steps"}
    other = tree | {"run_dir": str(tmp_path / "other")}
    run(tree)
    run(other)
    assert losses(tree["run_dir"]) == losses(other["run_dir"])
