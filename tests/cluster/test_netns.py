"""Two hosts, simulated by two network namespaces with a cable between them (`make test-netns`).

Needs root and iproute2. Both hosts share this machine's file system, as the nodes of a cluster share the run
directory.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import unused_port
from elastic import ALONE_AT, PLUGIN, check_as_uninterrupted, elastic, worlds

from indistill.config.files import read_lines
from indistill.config.run_dir import RunDir

REPOSITORY = Path(__file__).resolve().parents[2]
ADDRESSES = ("10.203.77.1", "10.203.77.2")
TIMEOUT_MINUTES = 1.0

pytestmark = pytest.mark.netns


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """Create two namespaces; return their names, which are also the names of their network interfaces."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("needs root and the command ip: apt-get install iproute2")
    names = [f"indt{os.getpid()}{side}" for side in "ab"]
    try:
        for name in names:
            ip("netns", "add", name)
        ip(
            "link",
            "add",
            names[0],
            "netns",
            names[0],
            "type",
            "veth",
            "peer",
            "name",
            names[1],
            "netns",
            names[1],
        )
        for name, address in zip(names, ADDRESSES):
            ip("-n", name, "address", "add", f"{address}/24", "dev", name)
            ip("-n", name, "link", "set", name, "up")
            ip("-n", name, "link", "set", "lo", "up")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"this machine gives no network namespaces: {error.stderr.decode().strip()}")
    else:
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def launch(config: Path, variables: dict[str, str], *before: str) -> subprocess.Popen:
    """Start launch/torchrun.sh as a user does, with stdout and stderr in one pipe."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("GLOO_", "NCCL_"))
    }
    environment |= {"PYTHON": sys.executable, "PYTHONPATH": str(REPOSITORY), "CUDA_VISIBLE_DEVICES": ""}
    environment |= {"OMP_NUM_THREADS": "1", "PET_MASTER_PORT": str(unused_port()), **variables}
    command = [*before, REPOSITORY / "launch" / "torchrun.sh", config]
    if (plugin := config.with_name("plugin.py")).exists():
        command += ["--plugin", plugin]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def on_host(hosts: list[str], i: int, config: Path, variables: dict[str, str]) -> subprocess.Popen:
    """Start one rank on a host, which has a name of its own that cannot be resolved."""
    variables = {"PET_NPROC_PER_NODE": "1", "PET_MASTER_ADDR": ADDRESSES[0], **variables}
    enter = ["ip", "netns", "exec", hosts[i], "unshare", "--uts"]
    return launch(config, variables, *enter, "sh", "-c", f'hostname node{i}; exec "$@"', "sh")


def on_both(hosts: list[str], config: Path) -> list[subprocess.Popen]:
    variables = {"PET_NNODES": "2", "PET_MASTER_PORT": str(unused_port())}
    return [on_host(hosts, i, config, variables | {"PET_NODE_RANK": str(i)}) for i in range(len(hosts))]


def outputs(processes: list[subprocess.Popen], timeout: float = 1500.0) -> list[str]:
    try:
        return [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()


def wait_for(happened: Callable[[], Any], processes: list[subprocess.Popen], timeout: float = 1500.0) -> None:
    deadline = time.monotonic() + timeout
    while not happened():
        assert time.monotonic() < deadline
        assert all(process.poll() is None for process in processes), outputs(processes)
        time.sleep(0.05)


def record(run_dir: Path) -> list[dict[str, Any]]:
    """Return the logged lines without times, and without those of checkpoints, which contain only times."""
    clocks = ("images_per_second", "data_wait_fraction")
    lines = [line for line in read_lines(run_dir / "metrics.jsonl") if "checkpoint_stall_seconds" not in line]
    return [{k: v for k, v in line.items() if k not in clocks} for line in lines]


def test_a_run_on_two_hosts_outlives_a_cut_cable(tree, tmp_path, hosts):
    tree |= {"duration": "600 steps", "checkpoint": {"every_steps": 10}, "evaluate": {"every": "250 steps"}}
    tree |= {"collective_timeout_minutes": TIMEOUT_MINUTES}
    paths = {name: tmp_path / f"{name}.yaml" for name in ("one_host", "two_hosts")}
    for name, path in paths.items():
        path.write_text(json.dumps(tree | {"run_dir": str(tmp_path / name)}))
    run_dir, one_host = tmp_path / "two_hosts", tmp_path / "one_host"

    processes = on_both(hosts, paths["two_hosts"])
    wait_for(lambda: len(read_lines(run_dir / "metrics.jsonl")) >= 25, processes)
    ip("-n", hosts[1], "link", "set", hosts[1], "down")
    cut = time.time()
    texts = outputs(processes)
    ranks_seconds, seconds = (run_dir / "status").stat().st_mtime - cut, time.time() - cut
    print(*texts, f"the ranks ended {ranks_seconds:.0f} s after the cut, torchrun {seconds:.0f} s", sep="\n")
    assert ranks_seconds < 60 * TIMEOUT_MINUTES + 10
    assert all(process.returncode not in (0, None) for process in processes)
    assert "indistill: 2 processes on cpu" in texts[0]
    for rank, text in enumerate(texts):
        assert re.search(rf"indistill: rank {rank} leaves at once: step \d+, phase \S+, [a-z ]+: ", text)
        assert "step-0000" in text
    assert re.search(
        r"indistill: rank 1 \(node1\) has not been heard from for \d+ s \(last: .+\); rank 0 waits for it",
        texts[0],
    )
    assert (run_dir / "status").read_text() == "requeue\n"
    assert not (run_dir / "summary.json").exists()
    newest = RunDir(run_dir).saved_checkpoints()[-1]
    assert 20 <= int(newest.name.removeprefix("step-")) < 600

    ip("-n", hosts[1], "link", "set", hosts[1], "up")
    processes = on_both(hosts, paths["two_hosts"])
    texts = outputs(processes)
    assert [process.returncode for process in processes] == [0, 0], texts
    assert f"resumed from {newest}" in texts[0]
    assert (run_dir / "status").read_text() == "done\n"
    assert json.loads((run_dir / "summary.json").read_text())["world_size"] == 2

    alone = launch(paths["one_host"], {"PET_NPROC_PER_NODE": "2"})
    text = outputs([alone])[0]
    assert alone.returncode == 0, text
    assert len(record(run_dir)) == 603  # 600 steps, and 3 evaluations
    assert record(run_dir) == record(one_host)


def test_a_host_goes_on_alone_and_takes_the_other_back(tree, tmp_path, hosts):
    """The cable is cut, and mended when the first host trains alone: no scheduler is involved."""
    config, run_dir = tmp_path / "config.yaml", Path(tree["run_dir"])
    tree = elastic(tree) | {"collective_timeout_minutes": TIMEOUT_MINUTES}
    config.write_text(json.dumps(tree))
    (tmp_path / "plugin.py").write_text(PLUGIN)
    variables = {"PET_NNODES": "1:2", "PET_MASTER_PORT": str(unused_port())}

    def start(i: int) -> subprocess.Popen:
        # torch finds neither by the name of the host, which cannot be resolved.
        own = {"PET_LOCAL_ADDR": ADDRESSES[i], "PET_RDZV_CONF": f"is_host={1 - i},last_call_timeout=10"}
        return on_host(hosts, i, config, variables | own)

    first, second = start(0), start(1)
    wait_for((tmp_path / "held").exists, [first, second])
    ip("-n", hosts[1], "link", "set", hosts[1], "down")
    (tmp_path / "lost").touch()
    wait_for((tmp_path / "alone").exists, [first])
    assert not (run_dir / "summary.json").exists()

    ip("-n", hosts[1], "link", "set", hosts[1], "up")
    deadline, ended = time.monotonic() + 600, []
    try:
        while first.poll() is None and time.monotonic() < deadline:
            if second.poll() is not None:  # as of a service that starts it again
                ended.append(second)
                second = start(1)
            time.sleep(1)
    finally:
        texts = outputs([first, second, *ended], timeout=100.0)
    print(*texts, f"node 1 was started {1 + len(ended)} times", sep="\n")
    assert (first.returncode, second.returncode) == (0, 0)
    assert {node.returncode for node in ended} <= {75}
    assert worlds(run_dir) == [2, 1, 2]
    assert (run_dir / "status").read_text() == "done\n"
    assert RunDir(run_dir).checkpoints.joinpath(f"step-{ALONE_AT:08d}").exists()
    check_as_uninterrupted(tree, tmp_path)
