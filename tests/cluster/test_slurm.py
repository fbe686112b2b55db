"""launch/slurm/train.sbatch on a real SLURM with two nodes, on this machine (`make test-slurm`).

slurm/cluster.py starts it. That needs root, and Debian's slurmctld, slurmd, slurm-client and munge.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from slurm import cluster

from indistill.config.files import read_lines
from indistill.config.run_dir import RunDir

REPOSITORY = Path(__file__).resolve().parents[2]

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(
        bool(cluster.missing()),
        reason=f"not here: {', '.join(cluster.missing())}: apt-get install --no-install-recommends slurmctld "
        "slurmd slurm-client munge",
    ),
    pytest.mark.skipif(os.geteuid() != 0, reason="starts SLURM's daemons: run make test-slurm as root"),
]

# torchrun starts this in place of `python -u -m indistill train ...`. Steps are slow while `hold` exists.
RANK = """#!{python}
import sys, time
from pathlib import Path
from indistill.commands import cli
from indistill.config import runs

load = runs.load

def load_and_patch(*arguments):
    from indistill.training import loop
    make_mix = loop.make_mix

    def slow_mix(*arguments):
        mix = make_mix(*arguments)

        def slow(batch, phase):
            if Path({hold!r}).exists():
                time.sleep(0.3)
            return mix(batch, phase)

        return slow

    loop.make_mix = slow_mix
    return load(*arguments)

runs.load = load_and_patch
cli.main(sys.argv[4:])
"""


def shell(*command: str | Path, **keywords: Any) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, **keywords).stdout.strip()


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with cluster.running(tmp_path_factory.mktemp("slurm")) as conf, pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(conf))
        yield


def wait_for(what: str, happened: Callable[[], Any], timeout: float = 900.0) -> Any:
    deadline = time.monotonic() + timeout
    while not (found := happened()):
        assert time.monotonic() < deadline, f"{what}: not within {timeout:.0f} s"
        time.sleep(0.2)
    return found


class Job:
    """Submit train.sbatch on both nodes."""

    def __init__(self, folder: Path, tree: dict[str, Any], *options: str) -> None:
        self.run_dir, self.hold, self.output = folder / "run", folder / "hold", folder / "out"
        (folder / "config.yaml").write_text(json.dumps(tree | {"run_dir": "replaced"}))
        rank = folder / "rank"
        rank.write_text(RANK.format(python=sys.executable, hold=str(self.hold)))
        rank.chmod(0o755)
        variables = {"PYTHON": sys.executable, "PYTHON_EXEC": str(rank), "PYTHONPATH": str(REPOSITORY)}
        variables |= {"PET_NPROC_PER_NODE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        ours = ["--nodes=2", "--gpus-per-node=0", "--cpus-per-task=1", f"--output={self.output}", *options]
        script = REPOSITORY / "launch" / "slurm" / "train.sbatch"
        arguments = [folder / "config.yaml", self.run_dir]
        environment = os.environ | variables
        self.id = shell("sbatch", "--parsable", *ours, script, *arguments, cwd=REPOSITORY, env=environment)

    def shown(self, key: str) -> str:
        return re.search(rf"\b{key}=(\S*)", shell("scontrol", "show", "job", self.id))[1]

    def is_over(self) -> bool:
        return self.shown("JobState") not in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING")

    def wait(self) -> str:
        wait_for(f"the end of job {self.id}", self.is_over)
        return self.shown("JobState")

    def steps(self) -> list[dict[str, Any]]:
        clocks = ("images_per_second", "data_wait_fraction")
        lines = [
            line
            for line in read_lines(self.run_dir / "metrics.jsonl")
            if "checkpoint_stall_seconds" not in line
        ]
        return [{k: v for k, v in line.items() if k not in clocks} for line in lines]

    def wait_for_steps(self, number: int) -> None:
        wait_for(f"step {number}", lambda: len(self.steps()) >= number)

    def wait_for_restart(self, number: int, timeout: float = 900.0) -> None:
        wait_for(f"restart {number}", lambda: int(self.shown("Restarts")) >= number, timeout)

    def ranks(self) -> list[int]:
        found = subprocess.run(["pgrep", "-f", f"{self.hold.parent}/rank -u"], capture_output=True, text=True)
        return [int(pid) for pid in found.stdout.split()]


@pytest.fixture
def slurm_tree(tree):
    tree["duration"] = "400 steps"
    tree["evaluate"] = {"every": "150 steps"}
    tree["checkpoint"] = {"every_steps": 10}
    return tree


@pytest.fixture(scope="module")
def expected() -> dict[str, list[dict[str, Any]]]:
    return {}


@pytest.fixture
def uninterrupted(slurm, expected, slurm_tree, tmp_path) -> list[dict[str, Any]]:
    """Return the lines of an uninterrupted run on both nodes."""
    if not expected:
        folder = tmp_path / "whole"
        folder.mkdir()
        job = Job(folder, slurm_tree)
        output = job.output
        assert job.wait() == "COMPLETED", output.read_text()
        assert json.loads((job.run_dir / "summary.json").read_text())["world_size"] == 2
        assert re.search(r"restart 0, on n\[1-2\], first n1 at 127\.0\.0\.1:", output.read_text())
        expected["steps"] = job.steps()
        assert len(expected["steps"]) == 403
    return expected["steps"]


def test_at_its_time_limit_a_job_is_requeued_and_goes_on(uninterrupted, slurm_tree, tmp_path):
    (tmp_path / "hold").touch()  # 400 steps would reach the time limit
    job = Job(tmp_path, slurm_tree, "--time=2", "--signal=USR1@30")
    job.wait_for_restart(1)
    assert (job.run_dir / "status").read_text() == "requeue\n"
    stopped_at = RunDir(job.run_dir).saved_checkpoints()[-1].name
    (tmp_path / "hold").unlink()
    assert job.wait() == "COMPLETED"
    assert f"resumed from {job.run_dir}/checkpoints/{stopped_at}" in job.output.read_text()
    assert f"stopped at step {int(stopped_at.removeprefix('step-'))} of 400" in job.output.read_text()
    assert job.steps() == uninterrupted


def test_preempted_by_another_job_it_goes_on_afterwards(uninterrupted, slurm_tree, tmp_path):
    (tmp_path / "hold").touch()
    slurm_tree["checkpoint"] = {"every_steps": None}
    job = Job(tmp_path, slurm_tree)
    job.wait_for_steps(5)
    began = time.monotonic()
    shell("sbatch", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 5")
    job.wait_for_restart(1, timeout=30)
    assert (job.run_dir / "status").read_text() == "requeue\n"
    assert time.monotonic() - began < 30
    (tmp_path / "hold").unlink()
    assert job.wait() == "COMPLETED"
    assert "resumed from" in job.output.read_text()
    assert job.steps() == uninterrupted


def test_a_cancelled_job_stays_dead(slurm, slurm_tree, tmp_path):
    (tmp_path / "hold").touch()
    job = Job(tmp_path, slurm_tree)
    job.wait_for_steps(5)
    shell("scancel", job.id)
    assert job.wait() == "CANCELLED"
    time.sleep(12)  # a requeued job would start after 6 s
    assert (job.shown("JobState"), job.shown("Restarts")) == ("CANCELLED", "0")
    assert not job.ranks()


def test_a_killed_rank_ends_the_step_and_the_job_resumes(uninterrupted, slurm_tree, tmp_path):
    """A job that is requeued by hand resumes too."""
    (tmp_path / "hold").touch()
    job = Job(tmp_path, slurm_tree)
    job.wait_for_steps(12)
    _, second = job.ranks()
    os.kill(second, signal.SIGKILL)
    began = time.monotonic()
    job.wait_for_restart(1, timeout=60)
    print(f"the step ended {time.monotonic() - began:.1f} s after the kill")
    wait_for("the resumed run", lambda: job.output.read_text().count("resumed from") == 1)
    job.wait_for_steps(len(job.steps()) + 3)
    shell("scontrol", "requeue", job.id)
    job.wait_for_restart(2, timeout=60)
    (tmp_path / "hold").unlink()
    assert job.wait() == "COMPLETED"
    assert job.output.read_text().count("resumed from") == 2
    assert job.steps() == uninterrupted
