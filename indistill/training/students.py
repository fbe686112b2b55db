"""Several students of one teacher, trained at once: the `students` of a config.

Each is a run of its own in `run_dir/NAME`, and computes what it would alone, bit for bit. They take turns, a step each.
A batch is loaded, augmented and brought to the device once, and the teacher runs on it once. On several processes each
of them trains every student on its own part of the batch, so that no target has to travel.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from indistill.config import Config
from indistill.data.batch import Batch
from indistill.data.dataset import ImageDataset
from indistill.data.training import Training
from indistill.distributed.preemption import Preempted
from indistill.models import frozen
from indistill.models.network import Network
from indistill.models.outputs import Output
from indistill.models.views import evaluation_view
from indistill.training.callbacks import Callback
from indistill.training.loop import Run
from indistill.training.parts import Sources


def train(
    students: Sequence[tuple[str, Config]],
    resume: str = "auto",
    callbacks: Sequence[Callback] = (),
    shared: Shared | None = None,
) -> dict[str, dict[str, Any]]:
    """Train all of them to the end; returns each one's `summary.json`. Errors are those of `loop.train`.

    When they are asked to stop, each leaves a checkpoint. A student that is behind the others catches up first when
    they go on.
    """
    shared = shared or Shared(students[0][1], len(students))
    runs = {
        name: Run(settings, resume, _Share(shared, i, name), callbacks)
        for i, (name, settings) in enumerate(students)
    }
    for run in runs.values():
        run.begin()
    under_way, summaries, stopped = dict(runs), {}, None
    while under_way:
        name = min(
            under_way, key=lambda name: under_way[name].done
        )  # of equals the first: on every rank the same
        run = under_way[name]
        try:
            if run.finished:
                summaries[name] = run.end()
                del under_way[name]
            else:
                run.step()
        except Preempted as preempted:
            stopped = preempted
            del under_way[name]
    if stopped:
        raise stopped
    return {name: summaries[name] for name in runs}


class Shared(Sources):
    """The images and the teacher of all students, each made when the first asks."""

    def __init__(self, settings: Config, students: int) -> None:
        self.accumulation = settings.grad_accumulation
        self.opened: tuple[Training, ImageDataset | None] | None = None
        # Micro-batches, counted from the start of the run: where each student is, and those that one still needs.
        self.places = [0] * students
        self.loaded: dict[int, Batch] = {}
        self.loader: Iterator[tuple[int, Batch]] | None = None
        self.network: Network | None = (
            None  # the teacher as it was created; each student's has stages of its own
        )
        self.teacher_pass: TeacherPass | None = None

    def data(self, *arguments: Any) -> tuple[Training, data.ImageDataset | None]:
        self.opened = self.opened or super().data(*arguments)
        return self.opened

    def teacher(self, settings: Config) -> Network:
        if self.network is None:
            self.network = super().teacher(settings)
            _ = self.network.fingerprint  # of the weights as they are now
        return copy.copy(self.network)

    def batch(self, place: int, training: Training, last_step: int, device: torch.device) -> Batch:
        """The micro-batch at a place. The first to be asked for is the earliest of all."""
        if self.loader is None:
            batches = super().batches(training, place // self.accumulation, last_step, device)
            self.loader = enumerate(batches, place)
        while place not in self.loaded:
            loaded, batch = next(self.loader)
            images, labels = (tensor.to(device, non_blocking=True) for tensor in (batch.images, batch.labels))
            self.loaded[loaded] = batch._replace(images=images, labels=labels)
        for earlier in [earlier for earlier in self.loaded if earlier < min(self.places)]:
            del self.loaded[earlier]
        return self.loaded[place]


class _Share(Sources):
    """What one of the students sees of it."""

    def __init__(self, shared: Shared, student: int, name: str) -> None:
        self.shared, self.student, self.name = shared, student, name

    def data(self, accelerator: Accelerator, settings: Config) -> tuple[Training, data.ImageDataset | None]:
        training, eval_set = self.shared.data(accelerator, settings)
        return training, eval_set and eval_set.for_evaluation(evaluation_view(settings))

    def teacher(self, settings: Config) -> Network:
        return self.shared.teacher(settings)

    def batches(
        self, training: Training, first_step: int, last_step: int, device: torch.device
    ) -> Iterator[Batch]:
        shared = self.shared
        places = range(first_step * shared.accumulation, last_step * shared.accumulation)
        shared.places[self.student] = (
            places.start
        )  # at once: what comes later is kept until this student has seen it

        def batches() -> Iterator[Batch]:
            for place in places:
                shared.places[self.student] = place
                yield shared.batch(place, training, last_step, device)

        return batches()

    def forward(self, teacher: Network, settings: Config) -> Callable[..., Output]:
        shared = self.shared
        if shared.teacher_pass is None:
            common = shared.teacher(settings).eval().requires_grad_(False)
            frozen.run_in(common, settings.teacher.precision or settings.mixed_precision)
            shared.teacher_pass = TeacherPass(common, super().forward(common, settings))

        def forward(images: Tensor, upto: int | None = None, pairs: Sequence[int] = ()) -> Output:
            stages = teacher.kd_stages if upto is None else [teacher.stages[pair] for pair in pairs]
            return shared.teacher_pass(images, shared.places[self.student], stages, whole=upto is None)

        return forward


class TeacherPass:
    """One forward pass of a teacher for each batch, whose maps serve whoever asks.

    It goes as deep as was asked on the batch before, since students ask for the same at every step. Where a phase has
    begun, and one asks for more than there is, the pass is made again.
    """

    def __init__(self, network: Network, run: Callable[..., Output]) -> None:
        self.network, self.run = network, run
        self.of: tuple[int, torch.dtype] | None = None  # the place of the batch; KD may have mixed its images
        self.asked: tuple[set[int], bool] = set(), False  # on this batch: stages, and whether for the logits
        self.output: Output | None = None
        self.maps: dict[int, Tensor] = {}

    def __call__(self, images: Tensor, place: int, stages: Sequence[int], whole: bool) -> Output:
        """The maps [B, C, H, W] of the stages and, of the `whole` network, embedding and logits too."""
        before = set(), False
        if self.of != (place, images.dtype):
            self.of, self.output, self.maps = (place, images.dtype), None, {}
            before, self.asked = self.asked, before
        self.asked = self.asked[0] | set(stages), self.asked[1] or whole
        if (
            not self.maps.keys() >= set(stages)
            or self.output is None
            or (whole and self.output.embedding is None)
        ):
            self._run(images, sorted(self.asked[0] | before[0]), self.asked[1] or before[1])
        return self.output._replace(features=tuple(self.maps[stage] for stage in stages))

    def _run(self, images: Tensor, stages: list[int], whole: bool) -> None:
        if whole:
            self.network.kd_stages = stages
            self.output = self.run(images)
        else:
            self.network.stages = stages
            self.output = self.run(images, upto=len(stages) - 1, pairs=tuple(range(len(stages))))
        self.maps = dict(zip(stages, self.output.features))
