"""What the student is taught on a batch: the teacher's pruned maps in the warm-up, its embedding and logits in KD."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from indistill import prune
from indistill.curriculum import Phase
from indistill.models import Network


class Targets(NamedTuple):
    features: tuple[Tensor, ...] = ()  # one pruned map [B, C_student, H_t, W_t] per active pair
    embedding: Tensor | None = None  # [B, D_t]
    logits: Tensor | None = None  # [B, K]


class LiveTargets:
    """The teacher, frozen and in eval mode, run on every batch and no deeper than the phase needs.

    Its parameters are outside the training wrapper and never in a checkpoint. Without a teacher all targets are None.
    """

    def __init__(self, teacher: Network | None, plan: prune.Plan, input_size: tuple[int, int, int]) -> None:
        self.teacher = teacher
        self.kept: list[Tensor | None] = []
        self.norms: list[nn.BatchNorm2d] = []
        if teacher is None:
            return
        teacher.eval().requires_grad_(False)
        device = next(teacher.parameters()).device
        self.kept = [None if pair.kept is None else torch.tensor(pair.kept, device=device) for pair in plan.pairs]
        if plan.mode == "paper_bn":
            self.norms = [prune.published_norm(teacher.net, pair.teacher_stage, input_size) for pair in plan.pairs]

    @torch.no_grad()
    def __call__(self, images: Tensor, phase: Phase) -> Targets:
        """Images [B, 3, H, W] as the student gets them, mixing included."""
        if self.teacher is None:
            return Targets()
        if not phase.pairs:
            return Targets((), *self.teacher(images)[1:])
        if self.norms:
            return Targets(tuple(self._published_map(images, pair) for pair in phase.pairs))
        maps = self.teacher(images, upto=max(phase.pairs), pairs=phase.pairs).features
        return Targets(tuple(self._prune(feature, pair) for feature, pair in zip(maps, phase.pairs)))

    def _prune(self, feature: Tensor, pair: int) -> Tensor:
        kept = self.kept[pair]
        return feature if kept is None else feature.index_select(1, kept)

    def _published_map(self, images: Tensor, pair: int) -> Tensor:
        """The map as the published code makes it (`prune.mode: paper_bn`).

        There the pruned copy of a stage has a new batch norm, left in train mode: scale of the kept channels, zero
        bias, statistics of the batch. All of it acts channel by channel, so the whole stage is run so, then sliced.
        """

        def batch_statistics(norm: nn.BatchNorm2d, inputs: tuple[Tensor], _: Tensor) -> Tensor:
            return F.batch_norm(inputs[0], None, None, norm.weight, None, training=True, eps=norm.eps)

        hook = self.norms[pair].register_forward_hook(batch_statistics)
        try:
            return self._prune(self.teacher(images, upto=pair, pairs=(pair,)).features[0], pair)
        finally:
            hook.remove()
