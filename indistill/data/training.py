"""The images of a run: training data, read through an index or streamed, and the evaluation set."""

from __future__ import annotations

from accelerate import Accelerator

from indistill.config import Config
from indistill.data.dataset import ImageDataset, open_shards
from indistill.data.loader import IndexedTraining
from indistill.data.stream import StreamedTraining
from indistill.distributed.agree import agree
from indistill.models.views import EvalView, evaluation_view

Training = IndexedTraining | StreamedTraining


def open_data(accelerator: Accelerator, settings: Config) -> tuple[Training, ImageDataset | None]:
    """Open this rank's training data and the evaluation set, if there is one. Call on all ranks.

    Raises UserError if the ranks have different training data.
    """
    kind = IndexedTraining if settings.data.access == "index" else StreamedTraining
    training = kind(
        settings.data,
        settings.seed,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        accumulation=settings.grad_accumulation,
    )
    agree({"data": training.fingerprint})  # before any loop over it that contains a collective
    return training, open_eval_set(settings) if settings.data.eval is not None else None


def open_eval_set(settings: Config, view: EvalView | None = None) -> ImageDataset:
    """Open the images of `data.eval`, which must be set. `view` None: the view of this config's student."""
    assert settings.data.eval is not None  # the callers check it
    shards = open_shards(settings.data, settings.data.eval)
    return ImageDataset(shards, settings.data, seed=settings.seed, view=view or evaluation_view(settings))
