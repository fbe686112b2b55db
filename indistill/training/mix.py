"""Copy a batch to the device and, in KD, mix its images."""

from __future__ import annotations

from collections.abc import Callable

from accelerate import Accelerator
from torch import Tensor

from indistill.config import Config
from indistill.curriculum import Phase
from indistill.data.batch import Batch
from indistill.data.mixing import mixed


def make_mix(settings: Config, accelerator: Accelerator) -> Callable[[Batch, Phase], tuple[Tensor, Tensor]]:
    """Return a function that copies a batch to the device and, in KD, mixes its images (data/mixing.py).

    Both networks get the mixed images, before any normalisation.
    """

    def mix(batch: Batch, phase: Phase) -> tuple[Tensor, Tensor]:
        images = batch.images.to(accelerator.device, non_blocking=True)  # uint8 [B, 3, S, S]
        labels = batch.labels.to(accelerator.device, non_blocking=True)
        if batch.mix is None or phase.pairs:
            return images, labels
        how = batch.mix.to(accelerator.device, non_blocking=True)
        return mixed(images, labels, how, settings.data.num_classes)

    return mix
