"""The data and teacher of one run; together.py and apart.py replace them for several students."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from accelerate import Accelerator

from indistill import build, data
from indistill.config import Config
from indistill.curriculum import Timetable
from indistill.data import Batch, IndexedTraining
from indistill.distributed.agree import agree
from indistill.models.network import Network
from indistill.models.outputs import Output
from indistill.models.views import EvalView, evaluation_view
from indistill.prune import Plan
from indistill.stream import StreamedTraining
from indistill.targets import CachedTargets, LiveTargets

Training = IndexedTraining | StreamedTraining


class Sources:
    """Opens a run's own data and creates its own teacher."""

    # Of a student among several, for what they show: its name, and the terminal's line where no one else knows it.
    name = ""
    position: int | None = None

    def data(self, accelerator: Accelerator, settings: Config) -> tuple[Training, data.ImageDataset | None]:
        """Training and evaluation images. Raises UserError for shards and batch sizes that cannot work."""
        return open_data(accelerator, settings)

    def batches(self, training: Training, first_step: int, last_step: int, device: torch.device) -> Iterable[Batch]:
        """The micro-batches of the steps [first_step, last_step)."""
        return training.loader(first_step, last_step, device)

    def targets(
        self, targets_of: LiveTargets | CachedTargets, plan: Plan, timetable: Timetable, settings: Config
    ) -> LiveTargets | CachedTargets:
        """What gives the targets of a batch, from what the networks were built with."""
        return targets_of

    def teacher(self, settings: Config) -> Network:
        """Raises UserError for a teacher that cannot be had or does not fit."""
        return build.create_teacher(settings)

    def forward(self, teacher: Network, settings: Config) -> Callable[..., Output]:
        """What runs it on a batch, with the arguments of `Network.forward`."""
        return build.compiled(teacher, settings)


def open_data(accelerator: Accelerator, settings: Config) -> tuple[Training, data.ImageDataset | None]:
    kind = IndexedTraining if settings.data.access == "index" else StreamedTraining
    rank, world = accelerator.process_index, accelerator.num_processes
    training = kind(settings.data, settings.seed, rank, world, settings.grad_accumulation)
    agree({"data": training.fingerprint})  # before any loop over it that holds a collective
    return training, open_eval_set(settings) if settings.data.eval is not None else None


def open_eval_set(settings: Config, view: EvalView | None = None) -> data.ImageDataset:
    """The images of `data.eval`, as `view` (None: that of this config's student) shows them."""
    shards = data.open_shards(settings.data, settings.data.eval)
    return data.ImageDataset(shards, settings.data, settings.seed, view=view or evaluation_view(settings))
