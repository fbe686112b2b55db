"""`teacher.shard`: a teacher in pieces on two processes (gloo) is the whole one, bit for bit."""

from __future__ import annotations

import copy
import gc
import hashlib
import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from conftest import run_ranks
from torch import nn

from indistill import checkpoint, config, data, evaluate, models, preemption, prune
from indistill import train as module
from indistill.curriculum import Phase
from indistill.metrics import read_lines
from indistill.models import Heads, Network
from indistill.preemption import Preempted
from indistill.targets import LiveTargets

SIZE = (3, 64, 64)
VIT = {"img_size": 64, "patch_size": 16, "embed_dim": 64, "num_heads": 2, "depth": 4}
NETS = {  # with the stages of the warm-up's pairs
    "resnet26": ({}, [1, 2, 3, 4]),
    "test_vit": (VIT, [0, 1, 3]),
    "regnety_002": ({}, [1, 4]),  # squeeze-excite: maps of one pixel; blocks that are in no list
    "dm_nfnet_f0": ({"width_factor": 0.125}, [0, 2]),  # scalar parameters
}


def trained(name: str, kwargs: dict[str, Any]) -> nn.Module:
    """As after training: no zero or one left that would hide a parameter."""
    torch.manual_seed(7)
    net = timm.create_model(name, num_classes=7, **kwargs)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn(parameter.shape), alpha=0.05)
        for buffer in net.buffers():
            if buffer.is_floating_point():
                buffer.add_(torch.rand(buffer.shape))
    return net


def alive_bytes() -> int:
    """Of all tensors that Python knows."""
    storages = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, nn.Parameter):
            storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    return sum(storages.values())


def compare(folder: str, name: str) -> None:
    """All targets of the whole and of the sharded teacher on this rank's own images; then what this rank holds."""
    import accelerate

    accelerator = accelerate.Accelerator()
    assert accelerator.num_processes == 2
    kwargs, stages = NETS[name]
    net = trained(name, kwargs)
    widths = [feature["num_chs"] for feature in getattr(net.feature_info, "info", net.feature_info)]
    kept = [sorted(range(0, widths[stage], 3)) for stage in stages]  # every third channel
    pairs = [prune.PairPlan(stage, i, widths[stage], len(kept[i]), kept[i]) for i, stage in enumerate(stages)]
    plan = prune.Plan("l1", "slice", pairs)
    targets_of = {}
    for kind in ("whole", "sharded"):
        teacher = Network(copy.deepcopy(net), (0.5, 0.4, 0.3), (0.2, 0.3, 0.2), stages)
        heads = Heads(teacher, stages[:2], 4, SIZE[1])
        with torch.no_grad():
            for parameter in heads.parameters():
                parameter.fill_(0.1).cumsum_(0)
        shard_on = accelerator.device if kind == "sharded" else None
        targets_of[kind] = LiveTargets(teacher, plan, SIZE, stages[1:], heads, shard_on)
    del teacher, net
    whole, sharded = targets_of["whole"], targets_of["sharded"]
    expected_fingerprint = whole.fingerprint
    assert sharded.fingerprint == expected_fingerprint

    images = torch.randint(0, 256, (3, *SIZE), generator=torch.manual_seed(accelerator.process_index))
    images = images.to(torch.uint8)
    chosen = [*range(len(stages))]
    warmup = [Phase("warmup", i, (i,), (1.0,), 0, 4) for i in chosen]
    phases = [*warmup, Phase("warmup", chosen[-1], (*chosen,), (1.0,) * len(chosen), 0, 4), Phase("kd", None, (), (), 4, 9)]
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
    local = [p.to_local() if p.dim() else p for p in sharded.teacher.parameters()]
    with_sharded = alive_bytes()
    held = sum(value.numel() for value in local)
    del local, sharded, targets_of["sharded"]
    gc.collect()
    freed = (with_sharded - alive_bytes()) / 4  # parameters and a few buffers, all of four bytes
    told = {"compared": compared, "total": total, "held": held, "freed": freed}
    (Path(folder) / f"{accelerator.process_index}.json").write_text(json.dumps(told))


@pytest.mark.parametrize("name", NETS)
def test_features_are_bit_equal_and_each_rank_holds_its_share(tmp_path, name):
    run_ranks(compare, 2, str(tmp_path), name)
    told = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    pairs = len(NETS[name][1])
    for rank in told:
        # Each pair alone, all at once, and in KD the maps but the first, two heads, embedding, logits: in two precisions.
        assert rank["compared"] == 2 * (pairs + pairs + (pairs - 1) + 2 + 2)
        assert rank["held"] == pytest.approx(rank["total"] / 2, rel=0.03)
        assert rank["freed"] < 0.6 * rank["total"]  # nothing gathered is kept
    assert sum(rank["held"] for rank in told) == pytest.approx(told[0]["total"], rel=0.01)
