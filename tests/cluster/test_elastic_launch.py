"""Nodes that come and go: a run goes on with those that are there, and ranks that it cannot use wait."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from conftest import LOGGED, in_float64, losses, run_ranks, start_ranks, train_until, unused_port, use_vits
from safetensors.torch import load_file
from torch.distributed import TCPStore

from indistill.commands.cli import main
from indistill.config.files import read_lines
from indistill.config.run_dir import RunDir

REPOSITORY = Path(__file__).resolve().parents[2]
STEPS, KILLED_AT, JOINED_AT = 40, 20, 30


@pytest.fixture
def elastic_tree(tree: dict[str, Any]) -> dict[str, Any]:
    """A config without batch norm and dropout, so that a loss does not depend on how the batch is divided."""
    use_vits(tree)
    return tree | {"duration": f"{STEPS} steps", "checkpoint": {"every_steps": 5, "keep_last": 99}}


@pytest.fixture
def uninterrupted(elastic_tree: dict[str, Any], tmp_path: Path) -> Path:
    """The run directory of the same run in one process, in float64."""
    run_dir = tmp_path / "uninterrupted"
    run_ranks(in_float64, None, train_until, elastic_tree | {"run_dir": str(run_dir)})
    return run_dir


def assert_same(run_dir: Path, expected: Path) -> None:
    assert losses(run_dir) == pytest.approx(losses(expected), rel=LOGGED)
    (weights,) = (load_file(next(path.glob("*.safetensors"))) for path in [run_dir])
    reference = load_file(next(expected.glob("*.safetensors")))
    assert weights.keys() == reference.keys()
    for name, value in weights.items():
        torch.testing.assert_close(value, reference[name], rtol=LOGGED, atol=LOGGED, msg=name)


# --- ranks that the config cannot use -----------------------------------------------------------------------
def train_elastic(path: str, *overrides: str) -> None:
    """The command line on a rank of a launcher that may change the number of nodes."""
    os.environ["TORCHELASTIC_MAX_RESTARTS"] = "3"
    with open(f"{path}.{os.environ['RANK']}", "w", buffering=1) as sys.stdout:
        main(["train", path, *overrides])


@pytest.mark.parametrize(("streams", "world", "used"), [(8, 3, 2), (1, 2, 1)])
def test_ranks_that_the_batch_cannot_use_wait_and_succeed(elastic_tree, tmp_path, streams, world, used):
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(elastic_tree))
    run_ranks(train_elastic, world, str(path), f"data.streams={streams}", "duration=4 steps", "warmup=null")
    run_dir = Path(elastic_tree["run_dir"])
    assert json.loads((run_dir / "summary.json").read_text())["world_size"] == used
    assert (run_dir / "status").read_text() == "done\n"
    for rank in range(world):
        waits = f"indistill: rank {rank} waits until" in Path(f"{path}.{rank}").read_text()
        assert waits == (rank >= used)


def test_waiting_ranks_do_not_outlive_a_failure(elastic_tree, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(elastic_tree))
    processes = start_ranks(train_elastic, 3, str(path), "data.train=none.tar")
    for process in processes:
        process.join(timeout=300)
    assert [process.exitcode for process in processes] == [2, 2, 75]


# --- nodes that are lost and come back ----------------------------------------------------------------------
PLUGIN = f"""
import os, time
from pathlib import Path

import torch

from indistill.distributed import preemption
from indistill.models.network import DTYPES
from indistill.training.run_log import RunLog

DTYPES["no"] = torch.float64
torch.set_default_dtype(torch.float64)

end_step = RunLog.end_step


def holding_end_step(log, step, *arguments):
    line = end_step(log, step, *arguments)
    world = log.accelerator.num_processes
    first = log.accelerator.is_main_process and world == 2
    while step == {KILLED_AT} and first and not Path(__file__).with_name("killed").exists():
        Path(__file__).with_name("reached").write_text(str(os.getpid()))
        time.sleep(0.05)
    while step == {JOINED_AT} and world == 1 and not preemption.asked():
        Path(__file__).with_name("alone").touch()
        time.sleep(0.05)
    return line


RunLog.end_step = holding_end_step
"""


@contextlib.contextmanager
def nodes(config: Path, **variables: str) -> Iterator[Callable[[], subprocess.Popen]]:
    """Yield a function that starts a node, by launch/torchrun.sh; kill those that are left."""
    store = TCPStore("127.0.0.1", unused_port(), is_master=True, wait_for_workers=False)
    environment = os.environ | {"PYTHON": sys.executable, "PYTHONPATH": str(REPOSITORY)}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PET_NPROC_PER_NODE": "1"}
    environment |= {"PET_NNODES": "1:2", "PET_RDZV_ENDPOINT": f"127.0.0.1:{store.port}"}
    environment |= {"PET_LOCAL_ADDR": "127.0.0.1", **variables}
    environment["PET_RDZV_CONF"] = "last_call_timeout=5,keep_alive_interval=2"
    started: list[subprocess.Popen] = []

    def start() -> subprocess.Popen:
        output = open(f"{config}.node{len(started)}", "w")
        command = [REPOSITORY / "launch" / "torchrun.sh", config, "--plugin", config.with_name("plugin.py")]
        started.append(
            subprocess.Popen(command, env=environment, cwd=REPOSITORY, stdout=output, stderr=output)
        )
        return started[-1]

    try:
        yield start
    finally:
        for node in started:
            lose(node)
        print(*(path.read_text() for path in sorted(config.parent.glob("*.node*"))), sep="\n\n")


def lose(node: subprocess.Popen) -> None:
    """Kill a node's agent and all its processes at once."""
    with contextlib.suppress(psutil.NoSuchProcess):
        agent = psutil.Process(node.pid)
        for process in [agent, *agent.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
    node.wait()


def wait_for(happened: Callable[[], Any], *running: subprocess.Popen) -> None:
    deadline = time.monotonic() + 400
    while not happened():
        assert time.monotonic() < deadline
        assert all(node.poll() is None for node in running)
        time.sleep(0.05)


def starts(run_dir: Path) -> list[int]:
    """The world size of each start of the run."""
    return [line["world_size"] for line in read_lines(run_dir / "history.jsonl") if line["event"] == "start"]


def test_the_rest_go_on_without_a_lost_node_and_take_it_back(elastic_tree, tmp_path, uninterrupted):
    config, run_dir = tmp_path / "config.yaml", Path(elastic_tree["run_dir"])
    config.write_text(json.dumps(elastic_tree))
    (tmp_path / "plugin.py").write_text(PLUGIN)
    with nodes(config) as start:
        pair = [start(), start()]
        wait_for((tmp_path / "reached").exists, *pair)
        first = int((tmp_path / "reached").read_text())
        lost, left = sorted(
            pair, key=lambda node: first not in [child.pid for child in psutil.Process(node.pid).children()]
        )
        lose(lost)
        (tmp_path / "killed").touch()
        wait_for((tmp_path / "alone").exists, left)
        assert not (run_dir / "summary.json").exists()
        back = start()
        assert [node.wait(400) for node in (left, back)] == [0, 0]
    assert starts(run_dir) == [2, 1, 2]
    assert (run_dir / "status").read_text() == "done\n"
    assert RunDir(run_dir).checkpoints.joinpath(f"step-{JOINED_AT:08d}").exists()
    assert_same(run_dir, uninterrupted)


def test_a_stop_that_was_asked_for_and_an_error_cost_no_restart(elastic_tree, tmp_path):
    config, run_dir = tmp_path / "config.yaml", Path(elastic_tree["run_dir"])
    (tmp_path / "plugin.py").write_text("")
    for change, code, word in (({"max_hours": 1e-5}, 75, "requeue"), ({"batch": 1}, 2, "failed")):
        config.write_text(json.dumps(elastic_tree | change))
        with nodes(config, PET_NNODES="1:1") as start:
            node = start()
            assert node.wait(400) == code
        assert (run_dir / "status").read_text().split("\n")[0] == word
    assert starts(run_dir) == [1]
