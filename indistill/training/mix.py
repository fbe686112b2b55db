"""Mixup and CutMix of a batch."""

from __future__ import annotations

from collections.abc import Callable

from accelerate import Accelerator
from timm.data.mixup import Mixup
from torch import Tensor

from indistill.config import Config, UserError
from indistill.curriculum import Phase
from indistill.data.batch import Batch


def make_mix(settings: Config, accelerator: Accelerator) -> Callable[[Batch, Phase], tuple[Tensor, Tensor]]:
    """Return a function that copies a batch to the device and, in KD, mixes its images.

    Both networks get the mixed images, before any normalisation. Raises UserError for an odd batch size,
    which timm cannot mix.
    """
    section = settings.kd.mix
    micro_batch = settings.data.global_batch // accelerator.num_processes // settings.grad_accumulation
    mixup = None
    if section and (section.mixup or section.cutmix):
        if micro_batch % 2:
            raise UserError(
                f"kd.mix needs an even batch per rank and accumulation step, this is {micro_batch}"
            )
        mixup = Mixup(
            mixup_alpha=section.mixup,
            cutmix_alpha=section.cutmix,
            prob=section.prob,
            switch_prob=section.switch_prob,
            label_smoothing=0.0,  # the loss does it
            num_classes=settings.data.num_classes,
        )

    def mix(batch: Batch, phase: Phase) -> tuple[Tensor, Tensor]:
        images = batch.images.to(accelerator.device, non_blocking=True)  # uint8 [B, 3, S, S]
        labels = batch.labels.to(accelerator.device, non_blocking=True)
        return (images, labels) if mixup is None or phase.pairs else mixup(images.float(), labels)

    return mix
