"""DeepSpeed's ZeRO on two processes (gloo) against DDP: the same losses, exact resume, a whole student at the end."""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from conftest import kill_at_checkpoint, run_ranks
from safetensors.torch import load_file

from indistill import config
from indistill import train as module
from indistill.metrics import read_lines

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None or importlib.util.find_spec("transformers") is None,
    reason="needs deepspeed and transformers: pip install deepspeed transformers",
)


@pytest.fixture
def zero_tree(tree, tmp_path):
    """All that ZeRO must not change: unused parameters that would decay, resets, rates, clipping, accumulation."""
    # Wider than the teacher, so that each pair has an adapter, which later phases do not use.
    tree["student"], tree["teacher"] = {"name": "cnn32_auxiliary"}, {"name": "cnn32_student"}
    tree["warmup"] |= {"adapter": "conv1x1", "reset_optimizer": "start", "lr": [1e-3, 2e-3, 3e-3]}
    tree["optimizer"] = {"name": "adamw", "lr": 1e-3, "weight_decay": 0.1}
    tree["grad_accumulation"] = 2
    tree["clip_grad_norm"] = 0.05
    tree["ema"] = {"decay": 0.9}
    tree["checkpoint"] = {"every_steps": 3}
    tree["evaluate"] = {"every": "10 steps"}
    return tree


def with_stage(tree: dict[str, Any], stage: int, folder: Path, name: str) -> dict[str, Any]:
    file = folder / "deepspeed.json"  # small parameters and buckets: many partitions, and more than one bucket
    small = {"stage3_param_persistence_threshold": 0, "stage": stage, "stage3_max_live_parameters": 1000}
    file.write_text(json.dumps({"zero_optimization": small, "gradient_clipping": "auto"}))
    section = {"name": "deepspeed", "stage": stage, "reduce_bucket_size": 4000, "config_file": str(file)}
    return {**copy.deepcopy(tree), "run_dir": str(folder / name), "engine": section}


def run(tree: dict[str, Any]) -> None:
    """Train, and leave this rank's world size, engine and final weights' hash behind."""
    finish = module.finish

    def telling_finish(accelerator, settings, run_dir, network, scores, log):
        digest = hashlib.sha256()
        for value in network.state_dict().values():
            digest.update(value.numpy().tobytes())
        told = {"world": accelerator.num_processes, "engine": module.engine.describe(accelerator)}
        told |= {"hash": digest.hexdigest()}
        (run_dir / f"told-{accelerator.process_index}.json").write_text(json.dumps(told))
        return finish(accelerator, settings, run_dir, network, scores, log)

    module.finish = telling_finish
    module.train(config.parse(tree, "test"))


def told(run_dir: str) -> list[dict[str, Any]]:
    return [json.loads((Path(run_dir) / f"told-{rank}.json").read_text()) for rank in range(2)]


def losses(run_dir: str) -> list[float]:
    return [line["loss"] for line in read_lines(Path(run_dir) / "metrics.jsonl") if "loss" in line]


@pytest.fixture(scope="module")
def of_ddp() -> dict[str, Any]:
    """What the first test that needs it recorded of a run under DDP."""
    return {}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_trains_as_ddp_does_and_resumes_exactly(zero_tree, tmp_path, of_ddp, stage):
    if not of_ddp:
        run_ranks(run, 2, zero_tree)
        assert [t["engine"] for t in told(zero_tree["run_dir"])] == ["ddp"] * 2
        of_ddp["losses"] = losses(zero_tree["run_dir"])
        of_ddp["student"] = load_file(f"{zero_tree['run_dir']}/student.safetensors")
    assert len(of_ddp["losses"]) == 24

    whole = with_stage(zero_tree, stage, tmp_path, "whole")
    run_ranks(run, 2, whole)
    ranks = told(whole["run_dir"])
    assert [(t["world"], t["engine"]) for t in ranks] == [(2, f"ZeRO stage {stage} on 2 processes")] * 2
    assert ranks[0]["hash"] == ranks[1]["hash"]
    assert losses(whole["run_dir"]) == pytest.approx(of_ddp["losses"], rel=1e-4)
    student = load_file(f"{whole['run_dir']}/student.safetensors")
    assert student.keys() == of_ddp["student"].keys()
    for name, value in of_ddp["student"].items():
        if name.startswith("conv") and name.endswith("bias"):
            continue  # before a batch norm: its gradient is rounding alone, which Adam makes as large as any
        assert student[name].numpy() == pytest.approx(value.numpy(), rel=1e-3, abs=1e-3), name

    killed = with_stage(zero_tree, stage, tmp_path, "killed")
    kill_at_checkpoint(run, killed, step=6, world=2)
    run_ranks(run, 2, killed)
    assert losses(killed["run_dir"]) == losses(whole["run_dir"])
    assert told(killed["run_dir"]) == ranks
