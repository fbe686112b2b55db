"""Stage features of any timm model, with the forward pass truncated at the deepest stage asked for.

A stage is an index into the model's `feature_info`, the numbering that timm's `forward_intermediates` uses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

from indistill.config import UserError

AUTO_PAIRS = 4


class Stage(NamedTuple):
    index: int
    name: str  # module whose output it is
    channels: int
    reduction: int  # input pixels per feature pixel


def find_stages(net: nn.Module) -> list[Stage]:
    """The stages of a timm model, shallow to deep. Raises UserError for a model that does not describe its own."""
    name = type(net).__name__
    if not hasattr(net, "forward_intermediates") or not getattr(net, "feature_info", None):
        raise UserError(f"{name} has no forward_intermediates and feature_info: its stages cannot be tapped")
    info = getattr(net.feature_info, "info", net.feature_info)
    return [Stage(i, f["module"], f["num_chs"], f["reduction"]) for i, f in enumerate(info)]


def stage_maps(net: nn.Module, images: Tensor, indices: Sequence[int]) -> list[Tensor]:
    """Feature maps [B, C, H, W] of the stages `indices` (ascending); nothing beyond the last of them is computed."""
    return net.forward_intermediates(
        images, indices=list(indices), stop_early=True, intermediates_only=True, output_fmt="NCHW"
    )


def stage_maps_and_final(
    net: nn.Module, images: Tensor, indices: Sequence[int]
) -> tuple[Tensor, list[Tensor]]:
    """What `forward_features` returns, and the maps [B, C, H, W] of the stages `indices` (ascending) on the way."""
    if not indices:
        return net.forward_features(images), []
    return net.forward_intermediates(images, indices=list(indices), stop_early=False, output_fmt="NCHW")


def check_stages(pairs: Sequence[tuple[int, int]], teacher: nn.Module, student: nn.Module, key: str) -> None:
    """Raise UserError, naming the config's `key`, unless all stages exist and each pair is deeper than the last."""
    for side, (role, net) in enumerate((("teacher", teacher), ("student", student))):
        chosen, count = [pair[side] for pair in pairs], len(find_stages(net))
        if any(not 0 <= index < count for index in chosen) or sorted(set(chosen)) != chosen:
            raise UserError(f"{key}: {role} stages {chosen}: need increasing indices from 0 to {count - 1}")


def match_stages(teacher: nn.Module, student: nn.Module) -> list[tuple[int, int]]:
    """Pairs (teacher stage, student stage), shallow to deep; at most AUTO_PAIRS, the deepest.

    Stages of equal reduction are matched, the deepest on each side where several share it. A network of one resolution
    (ViT) has no such ladder: blocks and stages are then matched by relative depth. Raises UserError if nothing matches.
    """
    ladders = [{stage.reduction: stage.index for stage in find_stages(net)} for net in (teacher, student)]
    if all(len(ladder) > 1 for ladder in ladders):
        common = sorted(ladders[0].keys() & ladders[1].keys())[-AUTO_PAIRS:]
        if not common:
            raise UserError(
                f"teacher (reductions {sorted(ladders[0])}) and student ({sorted(ladders[1])}) have no stage of equal "
                "reduction: give warmup.pairs"
            )
        return [(ladders[0][reduction], ladders[1][reduction]) for reduction in common]
    depths = [
        list(ladder.values()) if len(ladder) > 1 else [stage.index for stage in find_stages(net)]
        for ladder, net in zip(ladders, (teacher, student))
    ]
    count = min(AUTO_PAIRS, *map(len, depths))
    return list(
        zip(*([depth[math.ceil((k + 1) * len(depth) / count) - 1] for k in range(count)] for depth in depths))
    )
