"""The data and teacher of one run; together.py and apart.py replace them for several students."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from accelerate import Accelerator

from indistill import build
from indistill.config import Config
from indistill.curriculum import Timetable
from indistill.data.batch import Batch
from indistill.data.training import Training, open_data
from indistill.models.network import Network
from indistill.models.outputs import Output
from indistill.prune import Plan
from indistill.targets.live import LiveTargets
from indistill.targets.stored import CachedTargets


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
