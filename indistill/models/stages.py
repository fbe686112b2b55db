"""Stage features of any timm model, with a forward pass that stops at the deepest stage requested.

A stage is an index into the model's `feature_info`, the numbering that timm's `forward_intermediates` uses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from indistill.config import UserError
from indistill.models.timm_model import TimmModel

AUTO_PAIRS = 4


@dataclass(frozen=True)
class Stage:
    index: int
    name: str  # module whose output it is
    channels: int
    reduction: int  # input pixels per feature pixel


class Architecture(Protocol):
    """Stages and embedding as timm models describe them: a network, or the record of one not loaded."""

    @property
    def feature_info(self) -> Any: ...

    @property
    def head_hidden_size(self) -> int: ...  # width D of the embedding


def find_stages(net: nn.Module | Architecture) -> list[Stage]:
    """The stages of a timm model, shallow to deep. Raises UserError if the model does not describe them."""
    info = getattr(net, "feature_info", None)
    if not hasattr(net, "forward_intermediates") or not info:
        raise UserError(
            f"{type(net).__name__} has no forward_intermediates and feature_info, which its stages are read "
            "by: choose another model"
        )
    rows = getattr(info, "info", info)
    return [Stage(i, row["module"], row["num_chs"], row["reduction"]) for i, row in enumerate(rows)]


def stage_maps(net: TimmModel, images: Tensor, indices: Sequence[int]) -> list[Tensor]:
    """Feature maps [B, C, H, W] of the stages `indices` (ascending); computes nothing beyond the last."""
    return net.forward_intermediates(
        images, indices=list(indices), stop_early=True, intermediates_only=True, output_fmt="NCHW"
    )


def stage_maps_and_final(
    net: TimmModel, images: Tensor, indices: Sequence[int]
) -> tuple[Tensor, list[Tensor]]:
    """The result of `forward_features`, and the maps [B, C, H, W] of the stages `indices` (ascending)."""
    if not indices:
        return net.forward_features(images), []
    return net.forward_intermediates(images, indices=list(indices), stop_early=False, output_fmt="NCHW")


def patch_tokens(net: TimmModel, final: Tensor) -> Tensor:
    """The patch tokens [B, C, H, W] of what `forward_features` returned, without class and register tokens.

    Raises UserError for a network without patch tokens, or if they have no square grid.
    """
    prefix = getattr(net, "num_prefix_tokens", None)
    name = type(net).__name__
    if prefix is None or final.dim() != 3:
        raise UserError(
            f"kd.losses: feature: {name} has no patch tokens, as vision transformers have: set on: maps"
        )
    patches = final[:, prefix:]  # [B, N, C]
    side = math.isqrt(patches.shape[1])
    if side * side != patches.shape[1]:
        raise UserError(
            f"kd.losses: feature: the {patches.shape[1]} patch tokens of {name} are no square grid, and "
            "cannot be aligned: set on: embedding"
        )
    return patches.transpose(1, 2).unflatten(2, (side, side))


def check_stages(
    pairs: Sequence[tuple[int, int]],
    teacher: nn.Module | Architecture,
    student: nn.Module | Architecture,
    key: str,
) -> None:
    """Raise UserError, naming the config's `key`, unless it has pairs of stages, each deeper."""
    if not pairs:
        raise UserError(
            f"{key}: is empty: name at least one pair [teacher stage, student stage], or set auto"
        )
    for side, (role, net) in enumerate((("teacher", teacher), ("student", student))):
        indices = [pair[side] for pair in pairs]
        count = len(find_stages(net))
        if any(not 0 <= index < count for index in indices) or sorted(set(indices)) != indices:
            raise UserError(f"{key}: {role} stages {indices}: need increasing indices from 0 to {count - 1}")


def match_stages(
    teacher: nn.Module | Architecture, student: nn.Module | Architecture
) -> list[tuple[int, int]]:
    """Pairs (teacher stage, student stage), shallow to deep; at most AUTO_PAIRS, the deepest.

    Stages of equal reduction are matched, the deepest on each side where several share it. A network of one
    resolution (ViT) has only one reduction: stages are then matched by relative depth. Raises UserError if
    nothing matches.
    """
    of_teacher = _deepest_by_reduction(teacher)
    of_student = _deepest_by_reduction(student)
    if len(of_teacher) > 1 and len(of_student) > 1:
        common = sorted(of_teacher.keys() & of_student.keys())[-AUTO_PAIRS:]
        if not common:
            raise UserError(
                f"teacher (reductions {sorted(of_teacher)}) and student ({sorted(of_student)}) have no stage "
                "of equal reduction: give warmup.pairs"
            )
        return [(of_teacher[reduction], of_student[reduction]) for reduction in common]
    teacher_depths = list(of_teacher.values()) if len(of_teacher) > 1 else [*range(len(find_stages(teacher)))]
    student_depths = list(of_student.values()) if len(of_student) > 1 else [*range(len(find_stages(student)))]
    count = min(AUTO_PAIRS, len(teacher_depths), len(student_depths))
    return list(zip(_evenly_spaced(teacher_depths, count), _evenly_spaced(student_depths, count)))


def _deepest_by_reduction(net: nn.Module | Architecture) -> dict[int, int]:
    """The deepest stage of each reduction, shallow to deep."""
    return {stage.reduction: stage.index for stage in find_stages(net)}


def _evenly_spaced(depths: list[int], count: int) -> list[int]:
    """`count` of the depths, evenly spaced, with the deepest."""
    return [depths[math.ceil((k + 1) * len(depths) / count) - 1] for k in range(count)]
