"""The images of a run: training data, read through an index or streamed, and the evaluation set."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from indistill.config import Config, Data
from indistill.curriculum import ImageSizes
from indistill.data.batch import StoredTargets
from indistill.data.dataset import ImageDataset, open_shards
from indistill.data.loader import IndexedTraining
from indistill.data.stream import StreamedTraining
from indistill.distributed.agree import agree
from indistill.models.views import EvalView, evaluation_view


class TrainingData(Protocol):
    """The training images of one rank, read through an index or streamed."""

    section: Data
    sizes: ImageSizes
    steps_per_epoch: int
    fingerprint: str  # of the shards; the same on all ranks

    @property
    def dataset(self) -> ImageDataset | None:
        """The images by index; None if they are streamed."""

    def bring_along(self, stored: StoredTargets, fields_at: Callable[[int], tuple[str, ...]]) -> None:
        """Have loaders read the fields that `fields_at(step)` names from the stored targets."""

    def loader(self, first_step: int, last_step: int, device: torch.device) -> DataLoader:
        """Return a loader of the micro-batches of the steps [first_step, last_step)."""


def open_data(accelerator: Accelerator, settings: Config) -> tuple[TrainingData, ImageDataset | None]:
    """Open this rank's training data and the evaluation set, if there is one. Call on all ranks.

    Raises UserError if the ranks have different training data.
    """
    training = open_training(accelerator, settings)
    return training, open_eval_set(settings) if settings.data.eval is not None else None


def open_training(accelerator: Accelerator, settings: Config) -> TrainingData:
    """Open this rank's training data. Call on all ranks. Raises UserError if they have different data."""
    kind = IndexedTraining if settings.data.access == "index" else StreamedTraining
    training: TrainingData = kind(
        settings.data,
        settings.seed,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        accumulation=settings.grad_accumulation,
        mix=settings.kd.mixing,
    )
    training.sizes = ImageSizes.of(settings, training.steps_per_epoch)
    agree({"data": training.fingerprint})  # before any loop over it that contains a collective
    return training


def open_eval_set(settings: Config, view: EvalView | None = None) -> ImageDataset:
    """Open the images of `data.eval`, which must be set. `view` None: the view of this config's student."""
    assert settings.data.eval is not None  # the callers check it
    shards = open_shards(settings.data, settings.data.eval)
    return ImageDataset(shards, settings.data, seed=settings.seed, view=view or evaluation_view(settings))
