"""DeepSpeed's ZeRO on two processes (gloo): losses as under DDP, exact resume, a whole student at the end."""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import (
    EPS,
    SMOOTH,
    assert_rounding_explains,
    kill_at_checkpoint,
    losses,
    preload,
    run_moved,
    run_ranks,
    strayed,
    train_until,
    unused_port,
    use_vits,
)
from safetensors.torch import load_file

from indistill import config
from indistill.commands.evaluate import evaluate_checkpoint
from indistill.distributed.ddp import DDP
from indistill.distributed.zero import ZeRO, use_dynamic_loss_scale
from indistill.training.loop import Run

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None or importlib.util.find_spec("transformers") is None,
    reason="needs deepspeed and transformers: pip install deepspeed transformers",
)


if not torch.cuda.is_available():  # otherwise DeepSpeed would select the GPU before `run` hides it
    # The first engine imports Muon, and with it torch's compiler. This avoids ten seconds in each process.
    preload("deepspeed", "deepspeed.runtime.zero.muon.muon_optimizer", "transformers.integrations.deepspeed")


@pytest.fixture
def zero_tree(tree, tmp_path):
    """A config with what ZeRO must not change: unused parameters, resets, rates, clipping, accumulation."""
    # The student is wider than the teacher, so each pair has an adapter, which later phases do not use.
    tree["student"] = {"name": "resnet10t", "kwargs": {**SMOOTH, "channels": [16, 16, 24, 32]}}
    tree["teacher"] |= {"name": "resnet10t", "kwargs": {**SMOOTH, "channels": [8, 8, 16, 24]}}
    tree["warmup"]["pairs"] = [[1, 1], [2, 2], [3, 3]]
    tree["warmup"] |= {"adapter": "conv1x1", "reset_optimizer": "start", "lr": [1e-3, 2e-3, 3e-3]}
    # With Adam's default eps of 1e-8, rounding near zero would move a parameter as far as any gradient.
    tree["optimizer"] = {"name": "adamw", "lr": 1e-3, "weight_decay": 0.1, "kwargs": {"eps": 1e-4}}
    tree["grad_accumulation"] = 2
    tree["clip_grad_norm"] = 0.05
    tree["ema"] = {"decay": 0.9}
    tree["checkpoint"] = {"every_steps": 6, "keep_last": 9}
    tree["evaluate"] = {"every": "10 steps"}
    return tree


def with_stage(tree: dict[str, Any], stage: int, folder: Path, name: str) -> dict[str, Any]:
    file = (
        folder / f"stage{stage}.json"
    )  # small parameters and buckets: many partitions, and more than one bucket
    small = {"stage3_param_persistence_threshold": 0, "stage": stage, "stage3_max_live_parameters": 1000}
    file.write_text(json.dumps({"zero_optimization": small, "gradient_clipping": "auto"}))
    section = {"name": "deepspeed", "stage": stage, "reduce_bucket_size": 4000, "config_file": str(file)}
    return {**copy.deepcopy(tree), "run_dir": str(folder / name), "engine": section}


def run(tree: dict[str, Any], stop: int | None = None, resume: str = "auto") -> None:
    """Train, up to the checkpoint at step `stop` if given; write world size, engine and the weights' hash."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # two ranks cannot share a single GPU
    end = Run.end

    def telling_end(run: Run) -> dict[str, Any]:
        accelerator, digest = run.accelerator, hashlib.sha256()
        for value in run._scored_network().state_dict().values():  # the weights that are evaluated and saved
            digest.update(value.numpy().tobytes())
        saved = {"world": accelerator.num_processes, "engine": run.engine.describe()}
        saved |= {"hash": digest.hexdigest()}
        (run.run_dir / f"saved-{accelerator.process_index}.json").write_text(json.dumps(saved))
        return end(run)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "end", telling_end)
        train_until(tree, stop, resume)


def run_contiguous(tree: dict[str, Any]) -> None:
    """Train under DDP with the memory format of ZeRO, because another format sums in another order."""
    prepare = DDP.prepare

    def contiguous_prepare(ddp, student, optimizer):
        student.to(memory_format=torch.contiguous_format)
        return prepare(ddp, student, optimizer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DDP, "prepare", contiguous_prepare)
        run(tree)


def run_all(trees: list[dict[str, Any]]) -> None:
    """Train several runs one after the other in the same processes, as a chain does."""
    for tree in trees:
        run(tree)


def saved(run_dir: str) -> list[dict[str, Any]]:
    return [json.loads((Path(run_dir) / f"saved-{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def of_ddp() -> dict[str, Any]:
    """Runs under DDP, recorded by the first test that needs them."""
    return {}


@pytest.mark.portable
@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.slow), 2, 3])
def test_zero_trains_as_ddp_does_and_resumes_exactly(zero_tree, tmp_path, of_ddp, stage):
    if "losses" not in of_ddp:
        run_ranks(run_contiguous, 2, zero_tree)
        assert [t["engine"] for t in saved(zero_tree["run_dir"])] == ["ddp"] * 2
        run_ranks(run_moved, 2, run_contiguous, zero_tree, EPS)
        of_ddp["losses"], of_ddp["strayed"] = (
            losses(zero_tree["run_dir"]),
            strayed(losses, zero_tree["run_dir"]),
        )
        of_ddp["student"], *of_ddp["moved"] = (
            load_file(f"{zero_tree['run_dir']}{suffix}/student.safetensors")
            for suffix in ("", "-moved0", "-moved1")
        )
    assert len(of_ddp["losses"]) == 24

    whole = with_stage(zero_tree, stage, tmp_path, "whole")
    run_ranks(run, 2, whole)
    ranks = saved(whole["run_dir"])
    assert [(t["world"], t["engine"]) for t in ranks] == [(2, f"ZeRO stage {stage}")] * 2
    assert ranks[0]["hash"] == ranks[1]["hash"]
    assert_rounding_explains(losses(whole["run_dir"]), of_ddp["losses"], of_ddp["strayed"])
    student = load_file(f"{whole['run_dir']}/student.safetensors")
    assert student.keys() == of_ddp["student"].keys()
    for name, value in of_ddp["student"].items():
        off, *moved = ((other[name] - value).abs().max() for other in (student, *of_ddp["moved"]))
        assert off <= 8 * (max(moved) + EPS * value.abs().max()), name

    resumed = with_stage(zero_tree, stage, tmp_path, "resumed")
    if stage == 2:
        kill_at_checkpoint(run, resumed, step=6, world=2)
        run_ranks(run, 2, resumed)
        assert losses(resumed["run_dir"]) == losses(whole["run_dir"])
    else:
        run_ranks(run, 2, resumed, None, f"{whole['run_dir']}/checkpoints/step-00000006")
        assert losses(resumed["run_dir"]) == losses(whole["run_dir"])[6:]
    assert saved(resumed["run_dir"]) == ranks


def score(tree: dict[str, Any], *weights: str) -> None:
    """The saved student has the scores of the run; on as many ranks, so that their batches are the same."""
    summary = json.loads((Path(tree["run_dir"]) / "summary.json").read_text())
    for name in weights:
        scores = evaluate_checkpoint(config.parse(tree, "test"), f"{tree['run_dir']}/{name}")
        assert scores.items() <= summary["metrics"].items()
        assert "top1" in scores


@pytest.mark.portable
def test_engines_share_a_process_and_bf16(tree, tmp_path):
    """A transformer in bf16, whose position embedding no submodule reads; the saved student is evaluated."""
    use_vits(tree)
    tree["warmup"] = {
        "curriculum": "sequential",
        "pairs": [[0, 0], [1, 1], [2, 2]],
        "durations": ["3 steps", "2 steps", "2 steps"],
    }
    tree |= {"mixed_precision": "bf16", "duration": "12 steps", "checkpoint": {"every_steps": 6}}
    trees = [with_stage(tree, 3, tmp_path, "zero3"), tree, with_stage(tree, 2, tmp_path, "zero2")]
    run_ranks(run_all, 2, trees)
    run_ranks(run_moved, 2, run, tree, EPS)
    for other in (trees[0], trees[2]):
        assert_rounding_explains(
            losses(other["run_dir"]), losses(tree["run_dir"]), strayed(losses, tree["run_dir"])
        )
        assert saved(other["run_dir"])[0]["world"] == 2
        run_ranks(score, 2, other, "student.safetensors", "checkpoints/step-00000012")


@pytest.mark.portable
@pytest.mark.parametrize("stage", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_elastic(tree, tmp_path, of_ddp, stage):
    """A run that goes from two processes to one to two has the losses of a run on two."""
    use_vits(tree)
    tree["warmup"] = {
        "curriculum": "sequential",
        "pairs": [[0, 0], [1, 1], [2, 2]],
        "durations": ["3 steps", "3 steps", "3 steps"],
    }
    tree |= {"duration": "15 steps", "checkpoint": {"every_steps": 5, "keep_last": 9}, "ema": {"decay": 0.9}}
    if "elastic" not in of_ddp:
        run_ranks(run, 1, tree)
        run_ranks(run_moved, 1, run, tree, EPS)
        of_ddp["elastic"] = strayed(losses, tree["run_dir"])
    whole, changing = (with_stage(tree, stage, tmp_path, name) for name in ("whole", "changing"))
    run_ranks(run, 2, whole)
    run_ranks(run, 1, changing, 10, f"{whole['run_dir']}/checkpoints/step-00000005")
    run_ranks(run, 2, changing)
    assert len(losses(changing["run_dir"])) == 10
    assert_rounding_explains(losses(changing["run_dir"]), losses(whole["run_dir"])[5:], of_ddp["elastic"][5:])


def refused(tree: dict[str, Any]) -> None:
    with pytest.raises(config.UserError, match=r"another engine \(ZeRO stage 2, not ZeRO stage 3\)"):
        run(tree)


def test_zero_resumes_in_the_same_stage(tree, tmp_path):
    tree |= {"duration": "2 steps", "warmup": None}
    path = tmp_path / "stage.json"  # as if the accelerate config had changed, but not the training config
    tree["engine"] = {"name": "deepspeed", "config_file": str(path)}
    for stage, function in ((2, run), (3, refused)):
        path.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
        run_ranks(function, 1, tree)


def refused_forgeries(tree: dict[str, Any]) -> None:
    """Each rank refuses parts of the optimizer's state that do not fit, whichever rank they are of."""
    (path,) = Path(tree["run_dir"]).glob("checkpoints/step-*")
    load = torch.load
    changes = {
        "lacks 'exp_avg_sq'": lambda state: state.pop("exp_avg_sq"),
        r"exp_avg is \[1\] float32, this run needs": lambda state: state.update(exp_avg=torch.zeros(1)),
        "float64, this run needs": lambda state: state.update(exp_avg=state["exp_avg"].double()),
        "has other names than that of rank 0": lambda state: state.clear(),
    }
    for message, change in changes.items():

        def forged(file: Path, change: Any = change, **arguments: Any) -> Any:
            part = load(file, **arguments)
            if file.name == "optimizer-00001.pt":
                change(part["optimizer"][0])
            return part

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "load", forged)
            with pytest.raises(config.UserError, match=f"{path.name}: rank 1's state of the.*{message}"):
                run(tree)


@pytest.mark.parametrize("stage", [2, 3])
def test_an_optimizer_state_that_does_not_fit_is_refused(tree, tmp_path, stage):
    tree = with_stage(tree, stage, tmp_path, "forged")
    run_ranks(run, 2, tree, 3)
    run_ranks(refused_forgeries, 2, tree)


def run_scaled(trees: list[dict[str, Any]], scales: list[float]) -> None:
    """Train with the loss scaled as for fp16, from each initial scale, and write the last scale."""
    prepare = ZeRO.prepare
    for tree, scale in zip(trees, scales):

        def scaling_prepare(*arguments, scale=scale):
            wrapped, optimizer, was_skipped = prepare(*arguments)
            use_dynamic_loss_scale(optimizer.optimizer)
            optimizer.optimizer.loss_scaler.cur_scale = scale
            scaling_prepare.optimizer = optimizer.optimizer
            return wrapped, optimizer, was_skipped

        ZeRO.prepare = scaling_prepare
        run(tree)
        (Path(tree["run_dir"]) / "scale").write_text(str(scaling_prepare.optimizer.loss_scale))
    ZeRO.prepare = prepare


# Exponents: squares of gradients overflow in ZeRO's float32 norm with the one, gradients with the other.
@pytest.mark.parametrize(("stage", "exponent"), [(2, 70), (3, 128)])
def test_a_dynamic_loss_scale(tree, tmp_path, stage, exponent):
    """Powers of two change no bit. A scale that overflows skips its steps and is halved."""
    tree |= {"duration": "16 steps", "clip_grad_norm": 0.05}
    plain, scaled, over = (with_stage(tree, stage, tmp_path, name) for name in ("plain", "scaled", "over"))
    run_ranks(run_scaled, 2, [plain, scaled, over], [1.0, 2.0**16, 2.0**exponent])
    assert losses(scaled["run_dir"]) == losses(plain["run_dir"])
    assert (Path(scaled["run_dir"]) / "scale").read_text() == str(2.0**16)
    of_over = losses(over["run_dir"])
    skipped = of_over.count(None)
    assert 1 <= skipped <= 12
    assert of_over[0] is None
    assert all(math.isfinite(loss) for loss in of_over if loss is not None)
    assert float((Path(over["run_dir"]) / "scale").read_text()) == 2.0 ** (exponent - skipped)


def test_accelerate_launch(tree, tmp_path):
    """Only the accelerate config selects ZeRO; uses the file in launch/ and a command-line override."""
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(tree | {"duration": "15 steps"}))
    launch = ["--config_file", str(ROOT / "launch/accelerate/zero3.yaml"), "--num_processes", "2"]
    launch += ["--main_process_port", str(unused_port()), "-m", "indistill", "train", str(path)]
    result = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *launch],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("indistill: 2 processes on cpu, ZeRO stage 3") == 1
    summary = json.loads((Path(tree["run_dir"]) / "summary.json").read_text())
    assert (summary["world_size"], summary["step"]) == (2, 15)
