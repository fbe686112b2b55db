"""The training images of a run, read from an index or streamed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from indistill.config import Config
from indistill.data.batch import StoredTargets
from indistill.data.dataset import ImageDataset, open_shards
from indistill.data.loader import IndexedTraining
from indistill.data.stream import StreamedTraining
from indistill.distributed.agree import agree
from indistill.models.views import EvalView, evaluation_view


class TrainingData(Protocol):
    """The training images of one rank, read through an index or streamed."""

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
    kind = IndexedTraining if settings.data.access == "index" else StreamedTraining
    rank, world = accelerator.process_index, accelerator.num_processes
    training: TrainingData = kind(settings.data, settings.seed, rank, world, settings.grad_accumulation)
    agree({"data": training.fingerprint})  # before any loop over it that holds a collective
    return training, open_eval_set(settings) if settings.data.eval is not None else None


def open_eval_set(settings: Config, view: EvalView | None = None) -> ImageDataset:
    """The images of `data.eval`, as `view` (None: that of this config's student) shows them."""
    shards = open_shards(settings.data, settings.data.eval)
    return ImageDataset(shards, settings.data, settings.seed, view=view or evaluation_view(settings))
