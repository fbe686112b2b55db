"""A run on two processes (gloo) is the same as on one."""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from conftest import LOGGED, in_float64, kill_at_checkpoint, losses, run_ranks, train_until, use_vits

from indistill import config
from indistill.commands.cli import main
from indistill.commands.evaluate import evaluate_checkpoint
from indistill.training import loop
from indistill.training import mix as training_mix
from indistill.training.loop import Run


@pytest.fixture
def vit_tree(tree):
    """A config without batch norm and dropout, so that a loss does not depend on how the batch is divided."""
    use_vits(tree)
    tree["warmup"] = {
        "curriculum": "sequential",
        "pairs": [[0, 0], [1, 1], [2, 2]],
        "durations": ["3 steps", "2 steps", "2 steps"],
    }
    tree["kd"] = {"losses": [{"name": "ce"}, {"name": "kd"}]}
    tree["duration"] = "12 steps"
    tree["clip_grad_norm"] = 1.0
    return tree


def run(tree: dict[str, Any]) -> None:
    loop.train(config.parse(tree, "test"))


def run_and_hash(tree: dict[str, Any], folder: str) -> None:
    """Train, and write the hash of this rank's final weights, its world size and its sample ids."""
    end, mix = Run.end, training_mix.make_mix
    ids: list[list[int]] = []

    def telling_end(run: Run) -> dict[str, Any]:
        digest = hashlib.sha256()
        for value in run._scored_network().state_dict().values():  # the weights that are evaluated and saved
            digest.update(value.numpy().tobytes())
        records = {"hash": digest.hexdigest(), "world": run.accelerator.num_processes, "ids": ids}
        (Path(folder) / f"{run.accelerator.process_index}.json").write_text(json.dumps(records))
        return end(run)

    def make_mix(*arguments):
        inner = mix(*arguments)
        return lambda batch, phase: (ids.append(batch.ids.tolist()), inner(batch, phase))[1]

    Run.end, loop.make_mix = telling_end, make_mix
    try:
        run(tree)
    finally:
        Run.end, loop.make_mix = end, mix


@pytest.mark.portable
def test_two_ranks_do_the_run_of_one(vit_tree, tmp_path):
    vit_tree["evaluate"] = {"every": "6 steps", "knn": {}, "linear_probe": {}, "batch": 16}
    records: dict[int, list[dict[str, Any]]] = {}
    trees = {}
    for world in (1, 2):
        trees[world] = {**copy.deepcopy(vit_tree), "run_dir": str(tmp_path / f"run{world}")}
        folder = tmp_path / f"records{world}"
        folder.mkdir()
        run_ranks(in_float64, world, run_and_hash, trees[world], str(folder))
        records[world] = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world)]

    assert [t["world"] for t in records[2]] == [2, 2]
    assert records[2][0]["hash"] == records[2][1]["hash"]
    joined = [a + b for a, b in zip(records[2][0]["ids"], records[2][1]["ids"])]
    assert joined == records[1][0]["ids"]  # every global batch has the same samples, in the same order
    assert losses(trees[2]["run_dir"]) == pytest.approx(losses(trees[1]["run_dir"]), rel=LOGGED)
    one, two = (json.loads((tmp_path / f"run{w}" / "summary.json").read_text()) for w in (1, 2))
    assert (one["world_size"], two["world_size"]) == (1, 2)
    exact = ("top1", "top5", "knn_top1", "knn_top5", "probe_top1", "probe_top5", "probe_l2")
    assert [two["metrics"][key] for key in exact] == [one["metrics"][key] for key in exact]
    assert two["metrics"] == pytest.approx(one["metrics"], rel=LOGGED)  # maps are compared in float32


@pytest.mark.portable
def test_accumulation_changes_nothing(vit_tree, tmp_path):
    recorded = []
    for steps in (1, 4):
        tree = {
            **copy.deepcopy(vit_tree),
            "run_dir": str(tmp_path / f"run{steps}"),
            "grad_accumulation": steps,
        }
        run_ranks(in_float64, 1, run, tree)
        recorded.append(losses(tree["run_dir"]))
    assert len(recorded[0]) == 12
    assert recorded[1] == pytest.approx(recorded[0], rel=LOGGED)


@pytest.mark.portable
def test_images_are_mixed_alike_on_any_ranks_and_after_a_resume(vit_tree, tmp_path):
    vit_tree["kd"]["mix"] = {"mixup": 0.8, "cutmix": 1.0, "prob": 0.9}
    vit_tree["data"]["augment"]["views"] = 1  # both epochs have the order of one view

    def losses_of(world: int, name: str, accumulation: int = 1, stops: tuple[int, ...] = ()) -> list[float]:
        tree = {**copy.deepcopy(vit_tree), "run_dir": str(tmp_path / name), "grad_accumulation": accumulation}
        for stop in stops:
            run_ranks(in_float64, 3 - world, train_until, tree, stop)
        run_ranks(in_float64, world, train_until, tree)
        return losses(tree["run_dir"])

    expected = losses_of(1, "one")
    assert losses_of(2, "two", accumulation=2) == pytest.approx(expected, rel=LOGGED)
    assert losses_of(1, "moved", stops=(9,)) == pytest.approx(expected, rel=LOGGED)  # in KD, within an epoch
    vit_tree["kd"]["mix"] = None
    plain = losses_of(1, "plain")
    assert plain[:6] == pytest.approx(expected[:6], rel=LOGGED)  # the warm-up's first epoch
    assert plain[7:] != pytest.approx(expected[7:], rel=1e-3)


def test_batch_norm_ranks_stay_equal_and_resume_exactly(tree, tmp_path):
    """Networks with residual connections and batch norm, killed in the second warm-up phase and resumed."""
    tree["checkpoint"] = {"every_steps": 3}
    tree["ema"] = {"decay": 0.9}
    whole = {**copy.deepcopy(tree), "run_dir": str(tmp_path / "whole")}
    (tmp_path / "records").mkdir()
    run_ranks(run_and_hash, 2, whole, str(tmp_path / "records"))
    hashes = [json.loads((tmp_path / "records" / f"{rank}.json").read_text())["hash"] for rank in range(2)]
    assert len(losses(whole["run_dir"])) == 24

    kill_at_checkpoint(run, tree, step=6, world=2)
    (tmp_path / "again").mkdir()
    run_ranks(run_and_hash, 2, tree, str(tmp_path / "again"))
    again = [json.loads((tmp_path / "again" / f"{rank}.json").read_text())["hash"] for rank in range(2)]
    assert losses(tree["run_dir"]) == losses(whole["run_dir"])
    assert again == hashes


def score(tree: dict[str, Any], weights: str, destination: str) -> None:
    scores = evaluate_checkpoint(config.parse(tree, "test"), weights)
    with open(destination, "a") as file:
        file.write(json.dumps(scores) + "\n")


@pytest.mark.portable
def test_evaluation_counts_every_sample_once(tree, tmp_path):
    """51 images on 1, 2 and 3 ranks: the same scores of all kinds, from the same weights."""
    tree["evaluate"] = {"retrieval": True, "knn": {}, "linear_probe": {}, "batch": 7}
    run(tree)
    weights, records = f"{tree['run_dir']}/student.safetensors", {}
    for world in (1, 2, 3):
        destination = tmp_path / f"scores{world}"
        run_ranks(in_float64, world, score, tree, weights, str(destination))
        records[world] = [json.loads(line) for line in destination.read_text().splitlines()]
        assert len(records[world]) == world
    (expected,) = records[1]
    assert (expected["top1"] * 51) == pytest.approx(round(expected["top1"] * 51), abs=1e-9)
    assert {"knn_top1", "knn_top5", "probe_top1", "probe_top5", "probe_l2", "map_cosine"} <= expected.keys()
    for scores in records[2] + records[3]:
        assert scores == pytest.approx(expected, rel=1e-10)


def refused(arguments: list[str], destination: str) -> None:
    import os
    import sys

    with open(f"{destination}-{os.environ['RANK']}", "w") as sys.stderr:
        main(arguments)


@pytest.mark.parametrize(
    ("key", "section", "message"),
    [
        ("streams", {"streams": 1}, "must be divisible by the world size (2)"),  # noticed by both ranks
        ("run_dir", "/dev/null/run", "cannot be written"),  # noticed only by rank 0
    ],
)
def test_a_mistake_is_printed_once_and_ends_all_ranks(tree, tmp_path, key, section, message):
    tree[key if key in tree else "data"] = section if key in tree else tree["data"] | section
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(tree))
    run_ranks(refused, 2, ["train", str(path)], str(tmp_path / "stderr"), exit_code=2)
    assert message in (tmp_path / "stderr-0").read_text()
    assert (tmp_path / "stderr-0").read_text().count("\n") == 1
    assert (tmp_path / "stderr-1").read_text() == ""
