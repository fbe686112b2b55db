"""What the student is taught on a batch: the teacher's pruned maps in the warm-up, its embedding and logits in KD."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from indistill import models, prune
from indistill.curriculum import Phase
from indistill.models import Heads, Network


class Targets(NamedTuple):
    features: tuple[Tensor, ...] = ()  # [B, C, H_t, W_t] per pair: pruned to the student's width in the warm-up
    embedding: Tensor | None = None  # [B, D_t]
    logits: Tensor | None = None  # [B, K]
    cohort: tuple[Tensor, ...] = ()  # [B, K] of each intermediate classifier head


class LiveTargets:
    """The teacher, frozen and in eval mode, run on every batch and no deeper than the phase needs.

    Its parameters are outside the training wrapper and never in a checkpoint. Without a teacher all targets are None.
    `kd_stages` are those whose whole maps KD reads; `heads` classify the maps of theirs. With a device to `shard_on`, a
    teacher on the CPU is cut over it and those of all other ranks, which then run it together. It runs in its own
    `precision`, whatever the caller's autocast says. `fingerprint` is that of the weights that the targets come from.
    """

    def __init__(
        self,
        teacher: Network | None,
        plan: prune.Plan,
        input_size: tuple[int, int, int],
        kd_stages: Sequence[int] = (),
        heads: Heads | None = None,
        shard_on: torch.device | None = None,
        precision: str = "no",
        compile: bool = False,
    ) -> None:
        self.teacher, self.kd_stages, self.heads = teacher, list(kd_stages), heads
        self.fingerprint = models.fingerprint(teacher, heads)
        self.kept: list[Tensor | None] = []
        self.norms: list[nn.BatchNorm2d] = []
        if teacher is None:
            return
        teacher.eval().requires_grad_(False)
        teacher.kd_stages = sorted({*kd_stages, *(heads.stages if heads else ())})
        if plan.mode == "paper_bn":
            self.norms = [prune.published_norm(teacher.net, pair.teacher_stage, input_size) for pair in plan.pairs]
        models.run_in(teacher, precision, hold=shard_on is None)
        # FSDP gathers weights into tensors that it uses again.
        self.without_gradient = torch.inference_mode if shard_on is None else torch.no_grad
        if shard_on is not None:
            models.shard(teacher, shard_on, input_size)
        self.run = torch.compile(teacher, dynamic=False) if compile else teacher
        device = teacher.mean.device
        self.kept = [None if pair.kept is None else torch.tensor(pair.kept, device=device) for pair in plan.pairs]
        if heads is not None:
            heads.to(device)

    def __call__(self, images: Tensor, phase: Phase) -> Targets:
        """Images [B, 3, H, W] as the student gets them, mixing included."""
        if self.teacher is None:
            return Targets()
        if phase.pairs:
            maps = self._maps(images, phase.pairs)
            return Targets(tuple(self._prune(feature, pair) for feature, pair in zip(maps, phase.pairs)))
        with self.without_gradient():
            output = self.run(images)
            maps = dict(zip(self.teacher.kd_stages, output.features))
            cohort = self.heads.classify([maps[stage].float() for stage in self.heads.stages]) if self.heads else ()
        features = tuple(_own(maps[stage]) for stage in self.kd_stages)
        return Targets(features, _own(output.embedding), _own(output.logits), tuple(map(_own, cohort)))

    def _maps(self, images: Tensor, pairs: tuple[int, ...]) -> Sequence[Tensor]:
        with self.without_gradient():
            if self.norms:
                return [self._published_map(images, pair) for pair in pairs]
            return self.run(images, upto=max(pairs), pairs=pairs).features

    def _prune(self, feature: Tensor, pair: int) -> Tensor:
        kept = self.kept[pair]
        return _own(feature) if kept is None else feature.index_select(1, kept)

    def _published_map(self, images: Tensor, pair: int) -> Tensor:
        """The map as the published code makes it (`prune.mode: paper_bn`).

        There the pruned copy of a stage has a new batch norm, left in train mode: scale of the kept channels, zero
        bias, statistics of the batch. All of it acts channel by channel, so the whole stage is run so, then sliced.
        """

        def batch_statistics(norm: nn.BatchNorm2d, inputs: tuple[Tensor], _: Tensor) -> Tensor:
            return F.batch_norm(inputs[0], None, None, norm.weight, None, training=True, eps=norm.eps)

        hook = self.norms[pair].register_forward_hook(batch_statistics)
        try:
            return self.teacher(images, upto=pair, pairs=(pair,)).features[0]
        finally:
            hook.remove()


def _own(tensor: Tensor) -> Tensor:
    """A copy of an inference tensor: autograd keeps none for a backward pass."""
    return tensor.clone() if tensor.is_inference() else tensor
