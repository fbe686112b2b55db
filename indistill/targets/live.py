"""What the student is taught on a batch: the teacher's pruned maps in the warm-up, its embedding and logits in KD."""

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

    Its parameters are outside the training wrapper and never in a checkpoint. Without a teacher all targets are None.
    `kd_stages` are those whose whole maps KD reads; `heads` classify the maps of theirs. With a device to `shard_on`, a
    teacher on the CPU is cut over it and those of all other ranks, which then run it together. It runs in its own
    `precision`, whatever the caller's autocast says, by way of `run` where that is given. Maps of more than `pool`
    pixels a side are averaged. `fingerprint` is that of the weights that the targets come from.
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
        run: Callable[..., Output] | None = None,
        pool: int | None = None,
    ) -> None:
        self.pool = pool
        self.teacher, self.kd_stages, self.heads = teacher, list(kd_stages), heads
        self.run = teacher if run is None else run  # a compiled one cannot say whether it is empty
        self.fingerprint = " ".join(part.fingerprint for part in (teacher, heads) if part)
        self.kept: list[Tensor | None] = []
        self.norms: list[nn.BatchNorm2d] = []
        if teacher is None:
            return
        teacher.eval().requires_grad_(False)
        teacher.kd_stages = sorted({*kd_stages, *(heads.stages if heads else ())})
        if plan.mode == "paper_bn":
            self.norms = [
                prune.published_norm(teacher.net, pair.teacher_stage, input_size) for pair in plan.pairs
            ]
        frozen.run_in(teacher, precision)
        self.held_in = precision if shard_on is None else "no"  # FSDP takes one precision
        # FSDP gathers weights into tensors that it uses again.
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
        """Nothing is stored that batches could bring along."""

    def hold_weights(self) -> None:
        """Keep the teacher's weights in its precision, once no plan is made from them any more."""
        if self.teacher is not None:
            frozen.hold(self.teacher, self.held_in)

    def __call__(self, images: Tensor, phase: Phase, records: Mapping[str, Tensor] | None = None) -> Targets:
        """Images [B, 3, H, W] as the student gets them, mixing included. `records` are for CachedTargets."""
        if self.teacher is None:
            return Targets()
        if phase.pairs:
            maps = self._maps(images, phase.pairs)
            return Targets(tuple(self._prune(feature, pair) for feature, pair in zip(maps, phase.pairs)))
        with self.without_gradient():
            output, maps, cohort = self._all(images)
        features = tuple(pooled(_own(maps[stage]), self.pool) for stage in self.kd_stages)
        return Targets(features, _own(output.embedding), _own(output.logits), tuple(map(_own, cohort)))

    def _maps(self, images: Tensor, pairs: tuple[int, ...]) -> Sequence[Tensor]:
        with self.without_gradient():
            if self.norms:
                return [self._published_map(images, pair) for pair in pairs]
            return self.run(images, upto=max(pairs), pairs=pairs).features

    def everything(self, images: Tensor, pairs: Sequence[int]) -> dict[str, Tensor]:
        """What these pairs and KD read, by field (targets/manifest.py), in one pass of the teacher."""
        found = self.found(images, sorted({*self.kd_stages, *self.teacher.stages}), whole=True)
        kept = {
            f"pair{pair + 1}": self._prune(found[f"stage{self.teacher.stages[pair]}"], pair) for pair in pairs
        }
        return {name: pooled(x, self.pool) if x.dim() == 4 else x for name, x in found.items()} | kept

    def found(self, images: Tensor, stages: Sequence[int], whole: bool) -> dict[str, Tensor]:
        """By field, whole maps of the stages (ascending) and, of the `whole` network, what lies behind them."""
        if not whole:
            with self.without_gradient():
                maps = self.teacher.maps(images, stages)
            return {f"stage{stage}": feature for stage, feature in zip(stages, maps)}
        self.teacher.kd_stages = sorted({*stages, *(self.heads.stages if self.heads else ())})
        with self.without_gradient():
            output, maps, cohort = self._all(images)
        found = {f"stage{stage}": feature for stage, feature in maps.items()}
        found |= {f"head{i}": logits for i, logits in enumerate(cohort, start=1)}
        return found | {"embedding": output.embedding, "logits": output.logits}

    def _all(self, images: Tensor) -> tuple[Output, dict[int, Tensor], tuple[Tensor, ...]]:
        """The whole pass, its maps by stage, and the logits of the cohort."""
        output = self.run(images)
        maps = dict(zip(self.teacher.kd_stages, output.features))
        cohort = (
            self.heads.classify([maps[stage].float() for stage in self.heads.stages]) if self.heads else ()
        )
        return output, maps, cohort

    def _prune(self, feature: Tensor, pair: int) -> Tensor:
        kept = self.kept[pair]
        return pooled(_own(feature) if kept is None else feature.index_select(1, kept), self.pool)

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


def pooled(feature: Tensor, side: int | None) -> Tensor:
    """A map [B, C, H, W] averaged to at most `side` pixels a side."""
    size = [min(side, pixels) if side else pixels for pixels in feature.shape[2:]]
    return feature if size == [*feature.shape[2:]] else F.adaptive_avg_pool2d(feature, size)


def _own(tensor: Tensor) -> Tensor:
    """A copy, since autograd keeps no inference tensor for a backward pass; laid out the same, sharded or not."""
    return tensor.clone()
