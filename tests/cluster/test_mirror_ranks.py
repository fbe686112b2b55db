"""Nodes without a shared file system: each has a run directory of its own, and all have a mirror."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import losses, run_ranks, train_until
from safetensors.torch import load_file

from indistill.config import runs
from indistill.training.runs import run

WORLD = 2


@pytest.fixture
def spread(tree, tmp_path) -> dict[str, Any]:
    tree["run_dir"] = "run"  # in the folder of each node
    tree["mirror"] = f"file://{tmp_path}/mirror/run"
    tree["checkpoint"] = {"every_steps": 5, "keep_last": 2, "keep_best": 0}
    return tree


def on_node(folder: str, function: Any, *arguments: Any) -> None:
    """Call a function in this rank's folder, as the only rank of a node."""
    node = Path(folder, f"node{os.environ['RANK']}")
    node.mkdir(exist_ok=True)
    os.chdir(node)
    os.environ.update(LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
    function(*arguments)


def train_all(tree: dict[str, Any]) -> None:
    run(runs.load(tree))


def assert_same(first: Path, second: Path) -> None:
    assert losses(first) == losses(second)
    weights = [load_file(one / "student.safetensors") for one in (first, second)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])


def test_nodes_of_their_own_are_one_run(spread, tmp_path):
    """All disks are lost after the first start, and that of the second node after the second start."""
    whole = {name: value for name, value in spread.items() if name != "mirror"}
    run_ranks(train_all, WORLD, whole | {"run_dir": str(tmp_path / "whole")})
    run_ranks(on_node, WORLD, str(tmp_path), train_until, spread, 7)
    for node in ("node0", "node1"):
        shutil.rmtree(tmp_path / node)
    run_ranks(on_node, WORLD, str(tmp_path), train_until, spread, 16)
    shutil.rmtree(tmp_path / "node1")
    run_ranks(on_node, WORLD, str(tmp_path), train_all, spread)
    assert_same(tmp_path / "node0/run", tmp_path / "whole")


def test_a_checkpoint_that_only_the_first_node_has_reaches_the_others(spread, tmp_path):
    """The mirror was lost, or never had the newest checkpoint."""
    run_ranks(on_node, WORLD, str(tmp_path), train_until, spread, 7)
    shutil.rmtree(tmp_path / "mirror")
    run_ranks(on_node, WORLD, str(tmp_path), train_all, spread)
    whole = {name: value for name, value in spread.items() if name != "mirror"}
    run_ranks(train_all, WORLD, whole | {"run_dir": str(tmp_path / "whole")})
    assert_same(tmp_path / "node0/run", tmp_path / "whole")


def test_a_chain_passes_weights_between_nodes(chain, tmp_path):
    chain |= {"run_dir": "run", "mirror": f"file://{tmp_path}/mirror"}
    run_ranks(on_node, WORLD, str(tmp_path), train_all, chain)
    for name, _ in runs.load(chain):
        weights = [
            (tmp_path / f"node{rank}/run/{name}/student.safetensors").read_bytes() for rank in range(WORLD)
        ]
        assert weights[0] == weights[1]
