"""Compute a batch's targets with the teacher: pruned maps in the warm-up; embedding, logits, maps in KD."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from indistill import prune
from indistill.curriculum import Phase, Timetable
from indistill.data.training import TrainingData
from indistill.models import frozen
from indistill.models.heads import Heads
from indistill.models.network import Network
from indistill.models.outputs import Output, Targets


class LiveTargets:
    """The teacher, frozen and in eval mode, run on every batch and no deeper than the phase needs.

    Its parameters are outside the training wrapper and never in a checkpoint. Without a teacher all targets
    are empty.

    - kd_stages: stages whose unpruned maps KD reads.
    - heads: intermediate classifiers, which run on the maps of their own stages.
    - shard_on: this rank's device, over which and all other ranks' a teacher on the CPU is sharded; all ranks
      must then run it together.
    - precision: of the teacher's forward pass, independent of the caller's autocast.
    - run: called instead of the teacher, for example the compiled teacher.
    - pool: maps of more than this many pixels a side are averaged down to it.

    `fingerprint` is the SHA-256 of the teacher's weights, and of the heads'.
    """

    def __init__(
        self,
        teacher: Network | None,
        plan: prune.Plan,
        *,
        input_size: tuple[int, int, int],
        kd_stages: Sequence[int] = (),
        heads: Heads | None = None,
        shard_on: torch.device | None = None,
        precision: str = "no",
        run: Callable[..., Output] | None = None,
        pool: int | None = None,
    ) -> None:
        self.teacher, self.heads = teacher, heads
        self.input_size, self.pool = input_size, pool
        self.kd_stages = list(kd_stages)
        self.fingerprint = " ".join(part.fingerprint for part in (teacher, heads) if part is not None)
        self.kept: list[Tensor | None] = []  # teacher channels of each pair, int64
        self.norms: list[nn.BatchNorm2d] = []
        if teacher is None:
            return
        self._run: Callable[..., Output] = teacher if run is None else run
        teacher.eval().requires_grad_(False)
        teacher.kd_stages = sorted({*kd_stages, *(heads.stages if heads else ())})
        if plan.mode == "paper_bn":
            stages = [pair.teacher_stage for pair in plan.pairs]
            self.norms = [prune.published_norm(teacher.net, stage, input_size) for stage in stages]
            teacher.kept_norms.update(self.norms)
        frozen.run_in(teacher, precision)
        self.held_in = precision if shard_on is None else None  # FSDP takes one precision
        # FSDP gathers weights into tensors that it reuses, which inference mode does not allow.
        self.without_gradient = torch.inference_mode if shard_on is None else torch.no_grad
        if shard_on is not None:
            frozen.shard(teacher, shard_on, input_size)
        device = teacher.mean.device
        self.kept = [
            None if pair.kept is None else torch.tensor(pair.kept, device=device) for pair in plan.pairs
        ]
        if heads is not None:
            heads.to(device)

    def bring_along(self, training: TrainingData, timetable: Timetable) -> None:
        """Do nothing: batches need not contain stored targets."""

    def hold_weights(self) -> None:
        """Fold the teacher's batch norms and convert its weights, once no plan is made from them any more."""
        if self.teacher is not None and self.held_in is not None:
            frozen.fold(self.teacher, self.input_size)
            frozen.hold(self.teacher, self.held_in)

    def __call__(self, images: Tensor, phase: Phase, records: Mapping[str, Tensor] | None = None) -> Targets:
        """The targets of images [B, 3, H, W], mixed as the student's. `records` are for CachedTargets."""
        if self.teacher is None:
            return Targets()
        if phase.pairs:
            maps = self._maps(self.teacher, images, phase.pairs)
            return Targets(tuple(self._prune(feature, pair) for feature, pair in zip(maps, phase.pairs)))
        fields = self._full_pass(self.teacher, images)
        features = tuple(pooled(_copy(fields[f"stage{stage}"]), self.pool) for stage in self.kd_stages)
        logits = _copy(fields["logits"]) if "logits" in fields else None  # a teacher may have no classifier
        cohort = tuple(_copy(tensor) for name, tensor in fields.items() if name.startswith("head"))
        tokens = _copy(fields["tokens"]) if "tokens" in fields else None
        return Targets(features, _copy(fields["embedding"]), logits, cohort, tokens)

    def everything(self, images: Tensor, pairs: Sequence[int]) -> dict[str, Tensor]:
        """The targets of these pairs and of KD, by field (targets/manifest.py), in one teacher pass."""
        teacher = self._loaded()
        fields = self.found(images, sorted({*self.kd_stages, *teacher.stages}), whole=True)
        pruned = {
            f"pair{pair + 1}": self._prune(fields[f"stage{teacher.stages[pair]}"], pair) for pair in pairs
        }
        return {name: pooled(x, self.pool) if x.dim() == 4 else x for name, x in fields.items()} | pruned

    def found(self, images: Tensor, stages: Sequence[int], whole: bool) -> dict[str, Tensor]:
        """Unpruned maps of the stages (ascending) by field; with `whole` embedding, logits and heads, too."""
        teacher = self._loaded()
        if not whole:
            with self.without_gradient():
                maps = teacher.maps(images, stages)
            return {f"stage{stage}": feature for stage, feature in zip(stages, maps)}
        teacher.kd_stages = sorted({*stages, *(self.heads.stages if self.heads else ())})
        return self._full_pass(teacher, images)

    def _loaded(self) -> Network:
        assert self.teacher is not None  # callers compute fields only where there is a teacher
        return self.teacher

    def _maps(self, teacher: Network, images: Tensor, pairs: tuple[int, ...]) -> Sequence[Tensor]:
        """Unpruned maps of the pairs' stages."""
        with self.without_gradient():
            if self.norms:
                return [self._published_map(teacher, images, pair) for pair in pairs]
            return self._run(images, upto=max(pairs), pairs=pairs).features

    def calibration(self, images: Tensor) -> dict[str, Tensor]:
        """The outputs that KD reads, by field. It runs the teacher itself: a shared pass keeps its output."""
        teacher = self._loaded()
        fields = self._full_pass(teacher, images, run=teacher)
        return {name: pooled(x, self.pool) if x.dim() == 4 else x for name, x in fields.items()}

    def _full_pass(
        self, teacher: Network, images: Tensor, run: Callable[..., Output] | None = None
    ) -> dict[str, Tensor]:
        """The unpruned maps of the teacher's `kd_stages`, heads' logits, embedding and the rest, by field."""
        with self.without_gradient():
            output = (run or self._run)(images)
            assert output.embedding is not None  # in eval mode a full pass computes it
            maps = dict(zip(teacher.kd_stages, output.features))
            cohort: tuple[Tensor, ...] = ()
            if self.heads:
                cohort = self.heads.classify([maps[stage].float() for stage in self.heads.stages])
        fields = {f"stage{stage}": feature for stage, feature in maps.items()}
        fields |= {f"head{i}": logits for i, logits in enumerate(cohort, start=1)}
        fields["embedding"] = output.embedding
        if output.tokens is not None:
            fields["tokens"] = pooled(output.tokens, self.pool)
        return fields if output.logits is None else fields | {"logits": output.logits}

    def _prune(self, feature: Tensor, pair: int) -> Tensor:
        kept = self.kept[pair]
        return pooled(_copy(feature) if kept is None else feature.index_select(1, kept), self.pool)

    def _published_map(self, teacher: Network, images: Tensor, pair: int) -> Tensor:
        """The map as the published code computes it (`prune.mode: paper_bn`), unpruned.

        There the pruned copy of a stage has a new batch norm, left in train mode: scale of the kept channels,
        zero bias, statistics of the batch. It acts on each channel alone, so the unpruned stage can be run
        with it.
        """

        def batch_statistics(norm: nn.BatchNorm2d, inputs: tuple[Tensor], _: Tensor) -> Tensor:
            return F.batch_norm(inputs[0], None, None, norm.weight, None, training=True, eps=norm.eps)

        hook = self.norms[pair].register_forward_hook(batch_statistics)
        try:
            return teacher(images, upto=pair, pairs=(pair,)).features[0]
        finally:
            hook.remove()


def pooled(feature: Tensor, side: int | None) -> Tensor:
    """A map [B, C, H, W] averaged to at most `side` pixels a side."""
    height, width = feature.shape[2:]
    if side is None or (height <= side and width <= side):
        return feature
    return F.adaptive_avg_pool2d(feature, (min(side, height), min(side, width)))


def _copy(tensor: Tensor) -> Tensor:
    """A copy in the same layout, since autograd cannot save an inference tensor for the backward pass."""
    return tensor.clone()
