"""Nodes that come and go: a run goes on with those that are there, and ranks that it cannot use wait."""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import run_ranks, start, start_ranks, unused_port
from elastic import ALONE_AT, HELD_AT, PLUGIN, check_as_uninterrupted, elastic, worlds
from torch.distributed import TCPStore
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.rendezvous import RendezvousClosedError, RendezvousConnectionError

from indistill.commands.cli import main
from indistill.config.files import read_lines
from indistill.config.run_dir import RunDir
from indistill.distributed import preemption

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def elastic_tree(tree: dict[str, Any]) -> dict[str, Any]:
    return elastic(tree)


# --- ranks that the config cannot use -----------------------------------------------------------------------
def train_elastic(path: str, *overrides: str) -> None:
    """The command line on a rank of a launcher that may change the number of nodes."""
    os.environ["TORCHELASTIC_MAX_RESTARTS"] = "3"
    with open(f"{path}.{os.environ['RANK']}", "w", buffering=1) as sys.stdout:
        main(["train", path, *overrides])


STUDENTS = {"students": [{"name": "one"}, {"name": "two"}], "student_groups": "disjoint"}


@pytest.mark.parametrize(
    ("keys", "world", "used"),
    [
        ({}, 3, 2),
        pytest.param({"grad_accumulation": 8}, 5, 4, marks=pytest.mark.slow),  # micro-batches of one image
        pytest.param(
            {"kd": {"losses": [{"name": "kd"}], "mix": {"mixup": 0.2}}, "grad_accumulation": 8},
            4,
            2,
            marks=pytest.mark.slow,
        ),  # of pairs
        pytest.param(STUDENTS, 3, 2, marks=pytest.mark.slow),  # one for each student
    ],
)
def test_ranks_that_the_batch_cannot_use_wait_and_succeed(elastic_tree, tmp_path, keys, world, used):
    path, run_dir = tmp_path / "config.yaml", Path(elastic_tree["run_dir"])
    path.write_text(json.dumps(elastic_tree | {"duration": "4 steps", "warmup": None, **keys}))
    run_ranks(train_elastic, world, str(path))
    assert (run_dir / "status").read_text() == "done\n"
    assert sum(worlds(one.parent)[0] for one in run_dir.rglob("history.jsonl")) == used
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


def lose_run_dir(restarts: str) -> None:
    os.environ["TORCHELASTIC_MAX_RESTARTS"] = restarts
    preemption.lost("run.lock: taken over")


@pytest.mark.parametrize(("restarts", "code"), [("0", 2), ("3", 75)])
def test_a_node_that_was_suspended_meanwhile_may_come_back(restarts, code):
    """Another start has taken its run directory over: an error, unless it is the rest of the same run."""
    process = start(lose_run_dir, restarts)
    process.join(timeout=300)
    assert process.exitcode == code


# --- nodes that are lost and come back ----------------------------------------------------------------------
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

    def start_node() -> subprocess.Popen:
        command = [REPOSITORY / "launch" / "torchrun.sh", config]
        if (plugin := config.with_name("plugin.py")).exists():
            command += ["--plugin", plugin]
        with open(f"{config}.node{len(started)}", "w") as output:
            streams = {"stdout": output, "stderr": output}
            started.append(subprocess.Popen(command, env=environment, cwd=REPOSITORY, **streams))
        return started[-1]

    try:
        yield start_node
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


def leader(running: list[subprocess.Popen], held: Path) -> subprocess.Popen:
    """Wait for the first rank to hold the run; return its node."""
    wait_for(held.exists, *running)
    rank = int(held.read_text())
    return next(
        node for node in running if rank in [child.pid for child in psutil.Process(node.pid).children()]
    )


def test_the_rest_go_on_without_a_lost_node_and_take_it_back(elastic_tree, tmp_path):
    config, run_dir = tmp_path / "config.yaml", Path(elastic_tree["run_dir"])
    config.write_text(json.dumps(elastic_tree))
    (tmp_path / "plugin.py").write_text(PLUGIN)
    with nodes(config) as start_node:
        pair = [start_node(), start_node()]
        lost = leader(pair, tmp_path / "held")
        (left,) = {*pair} - {lost}
        lose(lost)
        (tmp_path / "lost").touch()
        wait_for((tmp_path / "alone").exists, left)
        assert not (run_dir / "summary.json").exists()
        back = start_node()
        assert [node.wait(400) for node in (left, back)] == [0, 0]
    assert worlds(run_dir) == [2, 1, 2]
    assert (run_dir / "status").read_text() == "done\n"
    assert RunDir(run_dir).checkpoints.joinpath(f"step-{ALONE_AT:08d}").exists()
    check_as_uninterrupted(elastic_tree, tmp_path)


@pytest.mark.slow
def test_a_node_that_waits_takes_the_place_of_one_that_is_lost(elastic_tree, tmp_path):
    config, run_dir = tmp_path / "config.yaml", Path(elastic_tree["run_dir"])
    config.write_text(json.dumps(elastic_tree))
    (tmp_path / "plugin.py").write_text(PLUGIN)
    with nodes(config, PET_NNODES="1:3") as start_node:
        three = [start_node(), start_node(), start_node()]
        lost = leader(three, tmp_path / "held")
        lost.terminate()  # as of a spot instance, two minutes before its end
        time.sleep(1)  # until the held rank has its signal, too
        (tmp_path / "lost").touch()
        assert lost.wait(400) == 75
        assert [node.wait(400) for node in three if node is not lost] == [0, 0]
    assert worlds(run_dir) == [2, 2]  # of three nodes, and of two
    begun = [line for line in read_lines(run_dir / "history.jsonl") if line["event"] == "start"]
    assert begun[1]["step"] >= HELD_AT  # no step was lost
    waiting = [path for path in tmp_path.glob("*.node*") if "indistill: rank 2 waits" in path.read_text()]
    assert len(waiting) == 1
    check_as_uninterrupted(elastic_tree, tmp_path)


@pytest.mark.slow
def test_a_stop_that_was_asked_for_and_an_error_cost_no_restart(elastic_tree, tmp_path):
    """One of two nodes trains; the other, which waits, is told of the end by the rendezvous."""
    config, run_dir = tmp_path / "config.yaml", Path(elastic_tree["run_dir"])
    elastic_tree["data"]["streams"] = 1
    stopped = elastic_tree | {"max_hours": 1e-5}
    wrong = elastic_tree | {"data": {**elastic_tree["data"], "train": "none.tar"}}
    for tree, codes, word in ((stopped, [75, 75], "requeue"), (wrong, [2, 75], "failed")):
        config.write_text(json.dumps(tree))
        with nodes(config) as start_node:
            pair = [start_node(), start_node()]
            assert sorted(node.wait(400) for node in pair) == codes
        texts = [Path(f"{config}.node{i}").read_text() for i in range(2)]
        assert sum("torchrun: the run has ended on another node" in text for text in texts) == 1
        assert (run_dir / "status").read_text().split("\n")[0] == word
    assert worlds(run_dir) == [1]


@pytest.mark.parametrize(
    ("raised", "closes"), [(RendezvousConnectionError(), False), (RendezvousClosedError(), True)]
)
def test_a_launcher_that_was_cut_off_does_not_close_the_rendezvous(monkeypatch, raised, closes):
    """torch closes it after any exception but a signal's: a node that comes back would end their run."""
    launcher = runpy.run_path(str(REPOSITORY / "launch" / "torchrun.py"))

    def run(agent: LocalElasticAgent, *arguments: Any) -> None:
        raise raised

    monkeypatch.setattr(LocalElasticAgent, "run", run)
    agent = object.__new__(launcher["Agent"])
    with pytest.raises(type(raised) if closes else SignalException):
        agent.run()
