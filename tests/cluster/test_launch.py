"""The same command line under torchrun and accelerate launch, as users type it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import unused_port

LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--nproc-per-node", "2", "--master-port", "{port}", "-m"],
    "accelerate launch": [
        "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1", "--mixed_precision", "no",
        "--dynamo_backend", "no", "--num_processes", "2", "--main_process_port", "{port}", "-m",
    ],
}  # fmt: skip


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_processes(tree, tmp_path: Path, launcher: str):
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(tree))
    command = [part.format(port=unused_port()) for part in LAUNCHERS[launcher]]
    result = subprocess.run(
        [sys.executable, "-m", *command, "indistill", "train", str(path), "duration=15 steps", "--resume", "never"],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("indistill: 2 processes on cpu") == 1
    summary = json.loads((Path(tree["run_dir"]) / "summary.json").read_text())
    assert (summary["world_size"], summary["step"]) == (2, 15)
