"""A chain on two processes: every stage uses the process group of the first."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import run_ranks, unused_port
from safetensors.torch import load_file

from indistill.commands.cli import main
from indistill.config import runs
from indistill.training import runs as training_runs


@pytest.fixture
def chain(tree: dict[str, Any], tmp_path: Path) -> Path:
    path = tmp_path / "chain.yaml"
    stages = [
        {"name": "teacher", "duration": "4 steps", "student": {"name": tree.pop("teacher")["name"]}},
        {key: tree.pop(key) for key in ("student", "warmup", "kd")}
        | {"name": "student", "teacher": {"stage": "teacher"}},
    ]
    path.write_text(json.dumps({**tree, "duration": "15 steps", "stages": stages}))
    return path


def run(path: Path, folder: Path) -> None:
    summaries = training_runs.run(runs.load(path))
    assert torch.distributed.get_world_size() == 2  # a program may go on with the same group
    (folder / os.environ["RANK"]).write_text(json.dumps(summaries))


def run_command(path: Path) -> None:
    main(["train", str(path)])
    assert not torch.distributed.is_initialized()  # or NCCL would warn at the end


def check(run_dir: Path) -> dict[str, Any]:
    summaries = {
        name: json.loads((run_dir / name / "summary.json").read_text()) for name in ("teacher", "student")
    }
    assert [(s["world_size"], s["step"]) for s in summaries.values()] == [(2, 4), (2, 15)]
    assert set(json.loads((run_dir / "student" / "inputs.json").read_text())) == {"teacher.checkpoint"}
    return summaries


def test_two_ranks_train_a_chain_and_go_on_with_it(chain, tmp_path):
    run_dir = tmp_path / "run"
    run_ranks(run, 2, chain, tmp_path)
    summaries = check(run_dir)
    assert json.loads((tmp_path / "0").read_text()) == summaries
    weights = load_file(run_dir / "student" / "student.safetensors")

    # Run it again, with the first stage finished and the second at its last checkpoint.
    (run_dir / "student" / "summary.json").unlink()
    (run_dir / "student" / "student.safetensors").unlink()
    kept = (run_dir / "teacher" / "summary.json").stat().st_mtime_ns
    run_ranks(run_command, 2, chain)
    check(run_dir)
    assert (run_dir / "teacher" / "summary.json").stat().st_mtime_ns == kept
    again = load_file(run_dir / "student" / "student.safetensors")
    assert again.keys() == weights.keys()
    assert all(torch.equal(again[key], weights[key]) for key in weights)


@pytest.mark.slow
def test_a_chain_under_torchrun(chain, tmp_path):
    launcher = ["torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(unused_port())]
    result = subprocess.run(
        [sys.executable, "-m", *launcher, "-m", "indistill", "train", str(chain)],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("indistill: 2 processes on cpu") == 2
    metrics = {name: summary["metrics"] for name, summary in check(tmp_path / "run").items()}
    assert json.loads(result.stdout.splitlines()[-1]) == metrics
