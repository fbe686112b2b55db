"""Tests that need a GPU, else skipped: half precision with loss scaling, waiting for the device, nccl."""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from conftest import (
    BF16,
    EPS,
    LOGGED,
    SMOOTH,
    assert_rounding_explains,
    in_float64,
    losses,
    run_moved,
    run_ranks,
    strayed,
    unused_port,
)

from indistill import config
from indistill.commands.doctor import node
from indistill.commands.doctor.findings import FAIL, Here
from indistill.commands.doctor.run import _look
from indistill.commands.targets import write
from indistill.models import frozen
from indistill.models.network import Network
from indistill.training.loop import train
from indistill.training.optim import PhaseOptim
from indistill.training.run_log import RunLog

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")


def run(tree):
    train(config.parse(tree, "test"))


def test_float64_follows_the_run_on_a_cpu(tree, tmp_path):
    on_cpu = {**copy.deepcopy(tree), "run_dir": str(tmp_path / "cpu")}
    run_ranks(in_float64, 1, run, on_cpu)  # with ACCELERATE_USE_CPU
    run_ranks(in_float64, None, run, tree)
    assert losses(tree["run_dir"]) == pytest.approx(losses(on_cpu["run_dir"]), rel=LOGGED)


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_each_precision_follows_the_run_on_a_cpu(tree, tmp_path, precision):
    """As close as runs whose weights differ by bf16 rounding, because cuDNN rounds float32 to TF32."""
    on_cpu = {**copy.deepcopy(tree), "run_dir": str(tmp_path / "cpu")}
    run_ranks(run, 1, on_cpu)  # with ACCELERATE_USE_CPU
    run_ranks(run_moved, 1, run, on_cpu, BF16 / 2)
    run(tree | {"mixed_precision": precision})
    expected = losses(on_cpu["run_dir"])
    assert_rounding_explains(losses(tree["run_dir"]), expected, strayed(losses, on_cpu["run_dir"]))


def test_the_loss_scale_is_in_the_checkpoint(tree):
    tree |= {"mixed_precision": "fp16", "checkpoint": {"every_steps": 12, "keep_last": 9}}
    run(tree)
    run_moved(run, tree, EPS)
    whole, limits = losses(tree["run_dir"]), strayed(losses, tree["run_dir"])
    checkpoint = Path(tree["run_dir"]) / "checkpoints" / "step-00000012"
    saved = torch.load(checkpoint / "optimizer-00000.pt", map_location="cpu", weights_only=True)
    assert saved["scaler"]["scale"] > 1
    train(config.parse(tree, "test"), str(checkpoint))
    assert_rounding_explains(losses(tree["run_dir"]), whole, limits)


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_no_step_between_lines_waits_for_the_gpu(tree, monkeypatch, precision):
    """In all steps that log no line, CUDA itself raises if anything waits for the device."""
    tree |= {
        "mixed_precision": precision,
        "grad_accumulation": 2,
        "clip_grad_norm": 1.0,
        "ema": {"decay": 0.9},
    }
    tree["log"]["every_steps"] = 6
    tree["data"] |= {"in_memory": False, "workers": 1}  # otherwise no separate thread pins the batches
    begin_step, end_step = PhaseOptim.begin_step, RunLog.end_step
    quiet = []

    def begin(phase_optim, step, phase):
        if step > 0 and step + 1 not in (
            4,
            6,
            8,
            12,
            13,
            18,
            24,
        ):  # the first opens the loader; these have lines
            quiet.append(step)
            torch.cuda.set_sync_debug_mode("error")
        return begin_step(phase_optim, step, phase)

    def end(log, *arguments):
        try:
            return end_step(log, *arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(PhaseOptim, "begin_step", begin)
    monkeypatch.setattr(RunLog, "end_step", end)
    run(tree)
    assert len(quiet) == 16


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_a_compiled_run_follows_the_plain_one(tree, tmp_path, precision):
    tree["mixed_precision"] = precision
    plain = {**copy.deepcopy(tree), "run_dir": str(tmp_path / "plain")}
    run(plain)
    run_moved(run, plain, BF16 / 2)
    run(tree | {"compile": True})
    expected = losses(plain["run_dir"])
    assert_rounding_explains(losses(tree["run_dir"]), expected, strayed(losses, plain["run_dir"]))


@pytest.mark.parametrize("name", ["resnet18", "test_vit", "test_convnext"])
def test_a_teacher_held_in_half_precision_gives_what_autocast_gives(name):
    kwargs = {"img_size": 64} if name == "test_vit" else {}
    network = (
        Network(timm.create_model(name, num_classes=10, **kwargs), ((0.5,) * 3, (0.2,) * 3)).cuda().eval()
    )
    images = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8, device="cuda")
    with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16):
        expected = network(images).logits
    frozen.run_in(network, "bf16")
    frozen.hold(network, "bf16")
    with torch.inference_mode():
        assert torch.equal(network(images).logits, expected)


def test_stored_targets_follow_the_live_ones(tree, tmp_path):
    tree["student"] = {"name": "resnet10t", "kwargs": {**SMOOTH, "channels": [8, 8, 16, 24]}}
    tree["teacher"] |= {"name": "resnet10t", "kwargs": {**SMOOTH, "channels": [16, 16, 24, 32]}}
    tree["warmup"]["pairs"] = [[1, 1], [2, 2], [3, 3]]
    tree["data"]["augment"]["views"] = 2
    tree["targets"] = {"dir": str(tmp_path / "targets")}
    live = {**copy.deepcopy(tree), "run_dir": str(tmp_path / "live")}
    run(live)
    run_moved(run, live, EPS)
    write.write(config.parse(tree, "test"))
    run(tree | {"targets": tree["targets"] | {"source": "cached"}})
    expected = losses(live["run_dir"])
    assert_rounding_explains(losses(tree["run_dir"]), expected, strayed(losses, live["run_dir"]))


@pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed: pip install deepspeed"
)
@pytest.mark.parametrize(("precision", "stage"), [("bf16", 2), ("fp16", 2), ("fp16", 3)])
def test_zero_follows_ddp(tree, tmp_path, precision, stage):
    """Uses the dynamic loss scale of zero.py, and optimizer state in host memory."""
    tree |= {"mixed_precision": precision, "clip_grad_norm": 1.0}
    zero = {**copy.deepcopy(tree), "run_dir": str(tmp_path / "zero")}
    zero["engine"] = {"name": "deepspeed", "stage": stage, "offload_optimizer": "cpu"}
    run(tree)
    run_moved(run, tree, BF16 / 2)
    run_ranks(run, 1, zero)
    assert_rounding_explains(
        losses(zero["run_dir"]), losses(tree["run_dir"]), strayed(losses, tree["run_dir"])
    )


def test_torchrun_with_nccl(tree, tmp_path):
    world = min(2, torch.cuda.device_count())
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps({**tree, "sync_batchnorm": True}))
    port = f"--master-port={unused_port()}"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        f"--nproc-per-node={world}",
        port,
        "-m",
        "indistill",
    ]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("ACCELERATE_")}
    done = subprocess.run(
        [*command, "train", str(path)], capture_output=True, text=True, env=environment, timeout=500
    )
    assert done.returncode == 0, done.stderr
    assert f"indistill: {world} process" in done.stdout
    assert "on cuda" in done.stdout
    summary = json.loads((Path(tree["run_dir"]) / "summary.json").read_text())
    assert summary["world_size"] == world


def test_doctor_sees_the_gpu():
    here = Here()
    _look(node.gpu, here)
    assert len(here.found) == torch.cuda.device_count()
    assert torch.cuda.get_device_name(0) in here.found[0].what
    assert here.found[0].level != FAIL
