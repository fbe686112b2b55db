"""Elastic runs: the world size may change at any resume, and every global batch has the same samples."""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from conftest import LOGGED, in_float64, losses, run_ranks, train_until, use_vits

from indistill.training import checkpoint, loop, mix


def run_and_tell(tree: dict[str, Any], folder: str, stop: int | None) -> None:
    """Train, up to the checkpoint at step `stop` if given, and record the sample ids of each step."""
    make_mix, save = mix.make_mix, checkpoint.Checkpoints.save
    ids: list[list[int]] = []

    def telling_mix(*arguments):
        inner = make_mix(*arguments)
        return lambda batch, phase: (ids.append(batch.ids.tolist()), inner(batch, phase))[1]

    def telling_save(checkpoints, step, *arguments):
        save(checkpoints, step, *arguments)
        accelerator = checkpoints.accelerator
        record = {"world": accelerator.num_processes, "last": step, "ids": ids}
        (Path(folder) / f"{step:02d}-{accelerator.process_index}.json").write_text(json.dumps(record))

    loop.make_mix, checkpoint.Checkpoints.save = telling_mix, telling_save
    train_until(tree, stop)


def recorded_ids(folder: Path, last: int, world: int) -> list[list[int]]:
    """Return the ids of each global batch that one start of the run read up to step `last`."""
    ranks = [json.loads((folder / f"{last:02d}-{rank}.json").read_text()) for rank in range(world)]
    assert all(rank["world"] == world for rank in ranks)
    return [list(itertools.chain(*parts)) for parts in zip(*(rank["ids"] for rank in ranks))]


@pytest.fixture
def elastic_tree(tree):
    """A config without batch norm and dropout, so that a loss does not depend on how the batch is divided."""
    use_vits(tree)
    tree["warmup"] = {
        "curriculum": "sequential",
        "pairs": [[0, 0], [1, 1], [2, 2]],
        "durations": ["3 steps", "2 steps", "2 steps"],
    }
    tree["duration"] = "15 steps"
    tree["log"]["every_steps"] = 2  # logging windows that span the changes of world size
    tree["checkpoint"] = {"every_steps": 5, "keep_last": 9}
    return tree


@pytest.mark.portable
def test_one_two_and_four_ranks_and_a_run_that_shrinks(elastic_tree, tmp_path):
    def start(name: str, world: int, stop: int | None = None) -> tuple[str, Path]:
        tree = {**copy.deepcopy(elastic_tree), "run_dir": str(tmp_path / name)}
        folder = tmp_path / f"record-{name}"
        folder.mkdir(exist_ok=True)
        run_ranks(in_float64, world, run_and_tell, tree, str(folder), stop)
        return tree["run_dir"], folder

    run_dir, folder = start("one", 1)
    expected_ids, expected = recorded_ids(folder, 15, 1), losses(run_dir)
    assert len(expected_ids) == 15
    assert len({tuple(ids) for ids in expected_ids}) == 15

    for world in (2, 4):
        run_dir, folder = start(f"world{world}", world)
        assert recorded_ids(folder, 15, world) == expected_ids
        assert losses(run_dir) == pytest.approx(expected, rel=LOGGED)

    start("shrinking", 4, stop=5)
    start("shrinking", 2, stop=10)
    run_dir, folder = start("shrinking", 1)
    pieces = recorded_ids(folder, 5, 4) + recorded_ids(folder, 10, 2) + recorded_ids(folder, 15, 1)
    assert pieces == expected_ids
    assert losses(run_dir) == pytest.approx(expected, rel=LOGGED)
