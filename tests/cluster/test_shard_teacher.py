"""`teacher.shard`: a teacher that is sharded over two processes (gloo) gives the same bits as a whole one."""

from __future__ import annotations

import copy
import gc
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from conftest import run_ranks, train_until
from torch import nn
from torch.distributed.fsdp import FSDPModule

from indistill import config, evaluate, prune
from indistill.config.files import read_lines
from indistill.curriculum import Phase
from indistill.data import training
from indistill.distributed import preemption
from indistill.distributed.preemption import Preempted
from indistill.models import frozen
from indistill.models.heads import Heads
from indistill.models.network import Network
from indistill.targets.live import LiveTargets
from indistill.training import loop

SIZE = (3, 64, 64)
VIT = {"img_size": 64, "patch_size": 16, "embed_dim": 64, "num_heads": 2, "depth": 4}
NETS = {  # kwargs, and the stages of the warm-up's pairs
    "resnet26": ({}, [1, 2, 3, 4]),
    "test_vit": (VIT, [0, 1, 3]),
    "regnety_002": ({}, [1, 4]),  # squeeze-excite: maps of one pixel; blocks that are in no list
    "test_nfnet": ({"skipinit": True}, [1, 3]),  # scalar parameters
}


def trained(name: str, kwargs: dict[str, Any]) -> nn.Module:
    """Randomise all parameters, as after training: a zero or a one could hide an unused parameter."""
    torch.manual_seed(7)
    net = timm.create_model(name, **{"num_classes": 7, **kwargs})
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn(parameter.shape), alpha=0.05)
        for buffer in net.buffers():
            if buffer.is_floating_point():
                buffer.add_(torch.rand(buffer.shape))
    return net


def alive_bytes() -> int:
    """Return the total bytes of all tensors that Python holds."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, nn.Parameter):
            storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    return sum(storages.values())


def compare(folder: str, name: str) -> None:
    """Compare all targets of the whole and the sharded teacher on this rank's images; record its memory."""
    import accelerate

    accelerator = accelerate.Accelerator()
    assert accelerator.num_processes == 2
    kwargs, stages = NETS[name]
    net = trained(name, kwargs)
    widths = [feature["num_chs"] for feature in getattr(net.feature_info, "info", net.feature_info)]
    kept = [sorted(range(0, widths[stage], 3)) for stage in stages]  # every third channel
    pairs = [prune.PairPlan(stage, i, widths[stage], len(kept[i]), kept[i]) for i, stage in enumerate(stages)]
    plan = prune.Plan("l1", "slice", pairs)

    def targets(shard_on: torch.device | None) -> LiveTargets:
        teacher = Network(copy.deepcopy(net), ((0.5, 0.4, 0.3), (0.2, 0.3, 0.2)), stages=stages)
        heads = Heads(teacher, stages[:2], 4, SIZE[1])
        with torch.no_grad():
            for parameter in heads.parameters():
                parameter.fill_(0.1).cumsum_(0)
        source = LiveTargets(
            teacher, plan, input_size=SIZE, kd_stages=stages[1:], heads=heads, shard_on=shard_on
        )
        source.hold_weights()  # folds batch norms, as sharding does
        return source

    whole, before = targets(None), alive_bytes()
    sharded = targets(accelerator.device)
    expected_fingerprint = whole.fingerprint
    assert sharded.fingerprint == expected_fingerprint

    images = torch.randint(0, 256, (3, *SIZE), generator=torch.manual_seed(accelerator.process_index))
    images = images.to(torch.uint8)
    chosen = [*range(len(stages))]
    warmup = [Phase("warmup", i, (i,), (1.0,), 0, 4) for i in chosen]
    at_once = Phase("warmup", chosen[-1], (*chosen,), (1.0,) * len(chosen), 0, 4)
    phases = [*warmup, at_once, Phase("kd", None, (), (), 4, 9)]
    compared = 0
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            for phase in phases:
                ours, theirs = sharded(images, phase), whole(images, phase)
                tensors = [
                    (*targets.features, *targets.cohort, targets.embedding, targets.logits)
                    for targets in (ours, theirs)
                ]
                for mine, expected in zip(*tensors, strict=True):
                    assert (mine is None) == (expected is None)
                    if expected is not None:
                        assert expected.isfinite().all()
                        assert expected.std() > 0
                        assert mine.dtype == expected.dtype
                        assert mine.stride() == expected.stride()
                        assert torch.equal(mine, expected), (name, phase, enabled)
                        compared += 1
            maps = [network.maps(images, stages) for network in (sharded.teacher, whole.teacher)]
            assert all(torch.equal(*pair) for pair in zip(*maps, strict=True))
    assert sharded.fingerprint == expected_fingerprint

    total = sum(parameter.numel() for parameter in whole.teacher.parameters())
    held = sum(p.to_local().numel() if p.dim() else 1 for p in sharded.teacher.parameters())
    del ours, theirs, tensors, mine, expected, maps
    # Tensors of the sharded teacher that are still alive: its shards, heads and buffers; nothing gathered.
    extra = sum(value.numel() for value in [*sharded.heads.parameters(), *sharded.teacher.buffers()])
    alive = (alive_bytes() - before) / 4 - extra
    for part in sharded.teacher.modules():
        if isinstance(part, FSDPModule):
            part.unshard()
    gathered = (alive_bytes() - before) / 4 - extra
    outcome = {"compared": compared, "total": total, "held": held, "alive": alive, "gathered": gathered}
    (Path(folder) / f"{accelerator.process_index}.json").write_text(json.dumps(outcome))


@pytest.mark.parametrize("name", NETS)
def test_features_are_bit_equal_and_each_rank_holds_its_share(tmp_path, name):
    run_ranks(compare, 2, str(tmp_path), name)
    outcome = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    pairs = len(NETS[name][1])
    for rank in outcome:
        # Each pair, all pairs, and for KD all maps but the first, two heads, embedding, logits; 2 precisions.
        assert rank["compared"] == 2 * (pairs + pairs + (pairs - 1) + 2 + 2)
        assert rank["held"] == pytest.approx(rank["total"] / 2, rel=0.03)
        assert rank["alive"] == pytest.approx(
            rank["total"] / 2, abs=15_000
        )  # less than a block: images and so on
        assert rank["gathered"] > 1.4 * rank["total"]  # gathering the whole teacher would show
    assert sum(rank["held"] for rank in outcome) == pytest.approx(outcome[0]["total"], rel=0.01)


def refuse(name: str) -> None:
    import accelerate

    device = accelerate.Accelerator().device
    network = (
        Network(timm.create_model(name, num_classes=7), ((0.5,) * 3, (0.5,) * 3)).eval().requires_grad_(False)
    )
    with pytest.raises(config.UserError, match=r"teacher\.shard: XceptionAligned runs some blocks by parts"):
        frozen.shard(network, device, SIZE)


def test_a_network_that_runs_parts_of_blocks_is_refused():
    run_ranks(refuse, 2, "xception41")


# --- a run --------------------------------------------------------------------------------------------------


@pytest.fixture
def uneven_tree(tree):
    """A config of ten steps, with evaluations on 51 images: one batch on one rank, two on the other."""
    tree |= {
        "duration": "10 steps",
        "checkpoint": {"every_steps": 5},
        "evaluate": {"every": "5 steps", "batch": 25},
    }
    tree["warmup"] = {
        "curriculum": "sequential",
        "durations": ["2 steps", "2 steps", "2 steps"],
        "prune": {"criterion": "activation", "batches": 2},
    }
    return tree


@pytest.fixture
def vit_tree(uneven_tree):
    vit = {"img_size": 32, "num_heads": 2, "depth": 3}
    uneven_tree["student"] = {"name": "test_vit", "kwargs": {**vit, "embed_dim": 32}}
    uneven_tree["teacher"] |= {"name": "test_vit", "kwargs": {**vit, "embed_dim": 64}}
    uneven_tree["warmup"]["pairs"] = [[0, 0], [1, 1], [2, 2]]
    return uneven_tree


def variant(tree: dict[str, Any], folder: Path, shard: bool) -> dict[str, Any]:
    own = {**copy.deepcopy(tree), "run_dir": str(folder / ("sharded" if shard else "whole"))}
    own["teacher"]["shard"] = shard
    return own


def run(*trees: dict[str, Any]) -> None:
    """Train, and check that each teacher is whole or sharded on both ranks as configured."""
    evaluation = loop.evaluation
    for tree in trees:

        def checking_evaluation(accelerator, settings, *, student, teacher, **sets):
            pieces = [hasattr(parameter, "to_local") for parameter in teacher.parameters()]
            assert pieces == [settings.teacher.shard and accelerator.num_processes == 2] * len(pieces)
            return evaluation(accelerator, settings, student=student, teacher=teacher, **sets)

        loop.evaluation = checking_evaluation
        loop.train(config.parse(tree, "test"))


def outcome(tree: dict[str, Any]) -> tuple[list[dict[str, Any]], str, dict[str, float]]:
    """Return loss and terms of every step, the plan, and the final scores."""
    run_dir = Path(tree["run_dir"])
    lines = [line for line in read_lines(run_dir / "metrics.jsonl") if "loss" in line]
    steps = [
        {key: value for key, value in line.items() if key in ("step", "loss", "kd", "ce")} for line in lines
    ]
    scores = json.loads((run_dir / "summary.json").read_text())["metrics"]
    return steps, (run_dir / "prune_plan.json").read_text(), scores


def test_a_run_is_the_same_and_goes_on_with_or_without(vit_tree, tmp_path):
    whole, sharded = (variant(vit_tree, tmp_path, shard) for shard in (False, True))
    run_ranks(run, 2, whole, sharded)
    steps, _, scores = outcome(whole)
    assert len(steps) == 10
    assert {"top1", "cka_pair3", "information_teacher_embedding"} <= scores.keys()
    assert outcome(sharded) == outcome(whole)

    changing = {**copy.deepcopy(sharded), "run_dir": str(tmp_path / "changing")}
    run_ranks(train_until, 2, {**copy.deepcopy(whole), "run_dir": changing["run_dir"]}, 5)
    run_ranks(run, 2, changing)
    assert outcome(changing) == outcome(whole)


def test_one_process_holds_it_whole(vit_tree, tmp_path):
    whole, sharded = (variant(vit_tree, tmp_path, shard) for shard in (False, True))
    run_ranks(run, 1, whole, sharded)
    assert outcome(sharded) == outcome(whole)


@pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None or importlib.util.find_spec("transformers") is None,
    reason="needs deepspeed and transformers: pip install deepspeed transformers",
)
def test_beside_zero_and_in_half_precision(uneven_tree, tmp_path):
    uneven_tree["student"] = {"name": "resnet10t", "kwargs": {"channels": [8, 16, 24, 32]}}
    uneven_tree["teacher"] |= {"name": "resnet10t", "kwargs": {"channels": [16, 32, 48, 64]}}
    uneven_tree["warmup"]["pairs"] = [[1, 1], [2, 2], [3, 3]]
    uneven_tree |= {"engine": {"name": "deepspeed", "stage": 2}, "mixed_precision": "bf16"}
    whole, sharded = (variant(uneven_tree, tmp_path, shard) for shard in (False, True))
    run_ranks(run, 2, whole, sharded)
    assert len(outcome(whole)[0]) == 10
    assert outcome(sharded) == outcome(whole)


def stop_one(tree: dict[str, Any]) -> None:
    """One rank is asked to stop before the other's second batch, for which both gather the teacher."""
    import accelerate

    accelerator = accelerate.Accelerator()
    settings = config.parse(tree, "test")
    student, teacher = (
        Network(
            trained("test_vit", {**section["kwargs"], "num_classes": 10}), ((0.5,) * 3, (0.5,) * 3)
        ).eval()
        for section in (tree["student"], tree["teacher"])
    )
    frozen.shard(teacher.requires_grad_(False), accelerator.device, (3, 32, 32))
    preemption.asked = lambda: accelerator.process_index == 1
    with pytest.raises(Preempted):
        evaluate.similarity(
            accelerator, student, teacher, [(0, 0)], training.open_eval_set(settings), batch=10
        )


def test_a_rank_that_is_asked_to_stop_leaves_none_waiting(vit_tree):
    run_ranks(stop_one, 2, vit_tree)
