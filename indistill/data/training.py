"""The training images of a run, read from an index or streamed."""

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
    kind = IndexedTraining if settings.data.access == "index" else StreamedTraining
    rank, world = accelerator.process_index, accelerator.num_processes
    training = kind(settings.data, settings.seed, rank, world, settings.grad_accumulation)
    agree({"data": training.fingerprint})  # before any loop over it that holds a collective
    return training, open_eval_set(settings) if settings.data.eval is not None else None


def open_eval_set(settings: Config, view: EvalView | None = None) -> ImageDataset:
    """The images of `data.eval`, as `view` (None: that of this config's student) shows them."""
    shards = open_shards(settings.data, settings.data.eval)
    return ImageDataset(shards, settings.data, settings.seed, view=view or evaluation_view(settings))
