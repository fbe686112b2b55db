"""The images of a run: training data, read through an index or streamed, and the evaluation set."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from indistill.config import Config, Data, UserError, label_reader
from indistill.config.metric_names import eval_key
from indistill.curriculum import ImageSizes
from indistill.data import class_names
from indistill.data.batch import StoredTargets
from indistill.data.dataset import ImageDataset, open_shards
from indistill.data.loader import IndexedTraining
from indistill.data.shards import ShardSet
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


def open_data(accelerator: Accelerator, settings: Config) -> tuple[TrainingData, dict[str, ImageDataset]]:
    """Open this rank's training data and the evaluation sets, by name. Call on all ranks.

    Raises UserError if the ranks have different training data.
    """
    training = open_training(accelerator, settings)
    return training, open_eval_sets(settings)


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
        label_reader=label_reader(settings),
    )
    training.sizes = ImageSizes.of(settings, training.steps_per_epoch)
    agree({"data": training.fingerprint})  # before any loop over it that contains a collective
    return training


def open_eval_sets(settings: Config, view: EvalView | None = None) -> dict[str, ImageDataset]:
    """Open the images of all sets of `data.eval`, by name; the name of a single one is "".

    `view` None: the view of this config's student.
    """
    if settings.data.eval is None:
        return {}
    view = view or evaluation_view(settings)
    bank = settings.evaluate.bank
    shards = {name: eval_shards(settings.data, name, bank) for name in settings.data.eval_sets}
    return {
        name: ImageDataset(one, settings.data, seed=settings.seed, view=view) for name, one in shards.items()
    }


def open_eval_set(settings: Config, view: EvalView | None = None) -> ImageDataset:
    """Open the images of the first set of `data.eval`, which must be set."""
    assert settings.data.eval is not None  # the callers check it
    name = next(iter(settings.data.eval_sets))
    shards = eval_shards(settings.data, name, settings.evaluate.bank)
    return ImageDataset(shards, settings.data, seed=settings.seed, view=view or evaluation_view(settings))


def eval_shards(section: Data, name: str, bank: str | list[str] | None) -> ShardSet:
    """Open the shards of one set of `data.eval`, with the bank of `evaluate`.

    Raises UserError, naming the set, for unusable ones.
    """
    one = section.eval_sets[name]
    try:
        label_map = class_names.read_label_map(one.label_map, section, bank) if one.label_map else None
        return open_shards(section, one.shards, label_map, label_reader=f"top-1 on {eval_key(name)}")
    except UserError as error:
        raise UserError(f"{eval_key(name)}: {error}" if name else str(error)) from None


def open_bank(settings: Config, training: ImageDataset | None = None) -> ImageDataset | None:
    """Open the images of the bank of `evaluate`; None if no evaluation reads it.

    training: the training set, if it is open. Use the bank by its `for_evaluation`, which does not augment.
    """
    section = settings.evaluate
    if not section.on_bank:
        return None
    if section.bank is None and training is not None:
        class_names.check_bank(settings)
        return training
    return ImageDataset(bank_shards(settings), settings.data, seed=settings.seed)


def bank_shards(settings: Config) -> ShardSet:
    """Open the shards of the bank, of which `evaluate.check_bank` refuses those without labels.

    Raises UserError for unusable ones, and like `class_names.check_bank`.
    """
    class_names.check_bank(settings)
    if settings.evaluate.bank is None:
        return open_shards(settings.data, settings.data.train, label_reader=None)
    try:
        return open_shards(settings.data, settings.evaluate.bank, label_reader=None)
    except UserError as error:
        raise UserError(f"evaluate.bank: {error}") from None
