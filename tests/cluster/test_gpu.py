"""What only a GPU can show: half precision with loss scaling, and nccl. Skipped without one."""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import run_ranks, unused_port

from indistill import config
from indistill.metrics import read_lines
from indistill.train import train

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")


def run(tree):
    train(config.parse(tree, "test"))


def losses(tree):
    return [line["loss"] for line in read_lines(Path(tree["run_dir"]) / "metrics.jsonl") if "loss" in line]


@pytest.mark.parametrize(("precision", "close"), [("no", 1e-3), ("bf16", 3e-2), ("fp16", 3e-2)])
def test_each_precision_follows_the_run_on_a_cpu(tree, tmp_path, precision, close):
    on_cpu = {**copy.deepcopy(tree), "run_dir": str(tmp_path / "cpu")}
    run_ranks(run, 1, on_cpu)  # with ACCELERATE_USE_CPU
    tree["mixed_precision"] = precision
    run(tree)
    assert losses(tree) == pytest.approx(losses(on_cpu), rel=close)


def test_the_loss_scale_is_in_the_checkpoint(tree):
    tree |= {"mixed_precision": "fp16", "checkpoint": {"every_steps": 12, "keep_last": 9}}
    run(tree)
    whole = losses(tree)
    checkpoint = Path(tree["run_dir"]) / "checkpoints" / "step-00000012"
    assert (checkpoint / "scaler.pt").exists()
    train(config.parse(tree, "test"), str(checkpoint))
    assert losses(tree) == pytest.approx(whole, rel=1e-3)


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")
@pytest.mark.parametrize(("precision", "stage"), [("bf16", 2), ("fp16", 2), ("fp16", 3)])
def test_zero_follows_ddp(tree, tmp_path, precision, stage):
    """With the dynamic loss scale of engine.py, and an optimizer's state in host memory."""
    tree |= {"mixed_precision": precision, "clip_grad_norm": 1.0}
    zero = {**copy.deepcopy(tree), "run_dir": str(tmp_path / "zero")}
    zero["engine"] = {"name": "deepspeed", "stage": stage, "offload_optimizer": "cpu"}
    run(tree)
    run_ranks(run, 1, zero)
    assert losses(zero) == pytest.approx(losses(tree), rel=3e-2)


def test_torchrun_with_nccl(tree, tmp_path):
    world = min(2, torch.cuda.device_count())
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps({**tree, "sync_batchnorm": True}))
    port = f"--master-port={unused_port()}"
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={world}", port, "-m", "indistill"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("ACCELERATE_")}
    done = subprocess.run([*command, "train", str(path)], capture_output=True, text=True, env=environment, timeout=500)
    assert done.returncode == 0, done.stderr
    assert f"indistill: {world} process" in done.stdout
    assert "on cuda" in done.stdout
    summary = json.loads((Path(tree["run_dir"]) / "summary.json").read_text())
    assert summary["world_size"] == world
