"""The data that flows in a step: a network's outputs on a batch, and the teacher's targets for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor


class Output(NamedTuple):
    """What one forward pass of a network gives; None for what was not asked for or not reached."""

    features: tuple[Tensor, ...]  # one map [B, C, H, W] per pair asked for
    embedding: Tensor | None = None  # [B, D], the classifier's input
    logits: Tensor | None = None  # [B, K]
    token_logits: Tensor | None = None  # [B, K], of a distillation token
    cohort: tuple[Tensor, ...] = ()  # [B, K] of each intermediate classifier head
    tokens: Tensor | None = None  # [B, C, H, W], the last patch tokens of a vision transformer
    projected: Mapping[str, tuple[Tensor, ...]] = {}  # what each trainable part of a loss made of all this


class Targets(NamedTuple):
    """The teacher's outputs for one batch; empty or None where the phase does not read them."""

    features: tuple[Tensor, ...] = ()  # [B, C, H_t, W_t] per pair; the warm-up's have the student's width
    embedding: Tensor | None = None  # [B, D_t]
    logits: Tensor | None = None  # [B, K]
    cohort: tuple[Tensor, ...] = ()  # [B, K] of each intermediate classifier head
    tokens: Tensor | None = None  # [B, C, H_t, W_t], the last patch tokens of a vision transformer
    # In KD with several teachers, instead of all these: the targets of `kd.losses`, then those of each
    # teacher with losses of its own.
    each: tuple[Targets, ...] = ()
