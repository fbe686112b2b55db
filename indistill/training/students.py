"""Several students of one teacher, trained at once: the `students` of a config.

Each student is a run of its own in `run_dir/NAME` and computes what it would compute alone, bit for bit. They
take turns step by step. A batch is loaded, augmented and copied to the device once, and the teacher runs on
it once. With several processes, each of them trains every student on its own part of the batch, so no targets
are sent.
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
from indistill.data.training import TrainingData
from indistill.distributed.preemption import Preempted
from indistill.models import frozen
from indistill.models.network import Network
from indistill.models.outputs import Output
from indistill.models.views import evaluation_view
from indistill.training.callbacks import Callback
from indistill.training.loop import Run
from indistill.training.parts import Sources


def train_students(
    students: Sequence[tuple[str, Config]],
    resume: str = "auto",
    callbacks: Sequence[Callback] = (),
    shared: Shared | None = None,
) -> dict[str, dict[str, Any]]:
    """Train all students to the end; return the content of each one's `summary.json`. Raises what
    `loop.train` raises.

    When the run is asked to stop, each student saves a checkpoint. After a restart, students that are behind
    the others catch up first.
    """
    shared = shared or Shared(students[0][1], len(students))
    runs = {
        name: Run(settings, resume, _Share(shared, i, name), callbacks)
        for i, (name, settings) in enumerate(students)
    }
    for run in runs.values():
        run.build()
    under_way = dict(runs)
    summaries = {}
    stopped = None
    while under_way:
        # The first of those with the fewest steps: the same on every rank.
        name = min(under_way, key=lambda name: under_way[name].done)
        run = under_way[name]
        try:
            if not run.begun:
                run.begin()
            elif run.finished:
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
    """The data and teacher that all students share, created on first use."""

    def __init__(self, settings: Config, students: int) -> None:
        self.accumulation = settings.grad_accumulation
        self.opened: tuple[TrainingData, dict[str, ImageDataset]] | None = None
        # Micro-batches are counted from the start of the run.
        self.positions = [0] * students  # the micro-batch at which each student is
        self.loaded: dict[int, Batch] = {}  # micro-batches that a student still needs
        self.loader: Iterator[tuple[int, Batch]] | None = None
        # Of each teacher, by its section as text: the network as created, of which each student's copy has
        # its own stages, and its pass over the batch.
        self.networks: dict[str, Network] = {}
        self.passes: dict[str, TeacherPass] = {}

    def data(
        self, accelerator: Accelerator, settings: Config
    ) -> tuple[TrainingData, dict[str, ImageDataset]]:
        self.opened = self.opened or super().data(accelerator, settings)
        return self.opened

    def teacher(self, settings: Config) -> Network:
        key = _section(settings)
        if key not in self.networks:
            self.networks[key] = super().teacher(settings)
            _ = self.networks[key].fingerprint  # cached now, before the weights change their precision
        return copy.copy(self.networks[key])

    def batch(self, position: int, training: TrainingData, last_step: int, device: torch.device) -> Batch:
        """Return the micro-batch at a position; the first call's position must be the lowest of all."""
        if self.loader is None:
            batches = super().batches(training, position // self.accumulation, last_step, device)
            self.loader = enumerate(batches, position)
        while position not in self.loaded:
            loaded, batch = next(self.loader)
            images, labels = (tensor.to(device, non_blocking=True) for tensor in (batch.images, batch.labels))
            self.loaded[loaded] = batch._replace(images=images, labels=labels)
        for earlier in [earlier for earlier in self.loaded if earlier < min(self.positions)]:
            del self.loaded[earlier]
        return self.loaded[position]


class _Share(Sources):
    """One student's view of `Shared`."""

    def __init__(self, shared: Shared, student: int, name: str) -> None:
        self.shared = shared
        self.student = student  # its index
        self.name = name

    def data(
        self, accelerator: Accelerator, settings: Config
    ) -> tuple[TrainingData, dict[str, ImageDataset]]:
        training, eval_sets = self.shared.data(accelerator, settings)
        view = evaluation_view(settings) if eval_sets else None
        return training, {name: one.for_evaluation(view) for name, one in eval_sets.items()}

    def teacher(self, settings: Config) -> Network:
        return self.shared.teacher(settings)

    def batches(
        self, training: TrainingData, first_step: int, last_step: int, device: torch.device
    ) -> Iterator[Batch]:
        shared = self.shared
        positions = range(first_step * shared.accumulation, last_step * shared.accumulation)
        # Set before the first batch is asked for, so that no batch is dropped which this student needs.
        shared.positions[self.student] = positions.start

        def batches() -> Iterator[Batch]:
            for position in positions:
                shared.positions[self.student] = position
                yield shared.batch(position, training, last_step, device)

        return batches()

    def forward(self, teacher: Network, settings: Config) -> Callable[..., Output]:
        shared, key = self.shared, _section(settings)
        if key not in shared.passes:
            assert settings.teacher is not None  # the config refuses students without a teacher
            common = shared.teacher(settings).eval().requires_grad_(False)
            frozen.run_in(common, settings.teacher.precision or settings.mixed_precision)
            shared.passes[key] = TeacherPass(common, super().forward(common, settings))
        teacher_pass = shared.passes[key]

        def forward(images: Tensor, upto: int | None = None, pairs: Sequence[int] = ()) -> Output:
            stages = teacher.kd_stages if upto is None else [teacher.stages[pair] for pair in pairs]
            position = shared.positions[self.student]
            whole = upto is None
            tokens = whole and teacher.with_tokens
            return teacher_pass(images, position, stages=stages, whole=whole, tokens=tokens)

        return forward


def _section(settings: Config) -> str:
    """Tell teachers apart by their sections."""
    assert settings.teacher is not None  # of a config of `by_teacher`
    return settings.teacher.model_dump_json()


class TeacherPass:
    """One forward pass of a teacher for each batch, whose maps all students use.

    It computes what students asked for on the batch before, since they ask for the same at every step. When a
    student asks for more, as at the start of a phase, the pass is repeated with all that was asked for.
    """

    def __init__(self, network: Network, run: Callable[..., Output]) -> None:
        self.network = network
        self.run = run
        # Position, dtype and shape of the batch: KD may have mixed its images, which makes them float.
        self.batch: tuple[int, torch.dtype, torch.Size] | None = None
        self.stages: set[int] = set()  # requested on this batch
        self.whole = False  # whether embedding and logits were requested on this batch
        self.output: Output | None = None
        self.maps: dict[int, Tensor] = {}

    def __call__(
        self, images: Tensor, position: int, *, stages: Sequence[int], whole: bool, tokens: bool = False
    ) -> Output:
        """Return the maps [B, C, H, W] of the stages and, if `whole`, the embedding and logits too.

        Once a student has asked for patch tokens, every such pass gives them.
        """
        if tokens and not self.network.with_tokens:
            self.network.with_tokens = True
            self.output = None
        stages_before: set[int] = set()
        whole_before = False
        batch = (position, images.dtype, images.shape)
        if self.batch != batch:
            self.batch = batch
            stages_before, whole_before = self.stages, self.whole
            self.stages, self.whole = set(), False
            self.output = None
            self.maps = {}
        self.stages = self.stages | set(stages)
        self.whole = self.whole or whole
        output = self.output
        if output is None or not self.maps.keys() >= set(stages) or (whole and output.embedding is None):
            output = self._run(images, sorted(self.stages | stages_before), self.whole or whole_before)
        return output._replace(features=tuple(self.maps[stage] for stage in stages))

    def _run(self, images: Tensor, stages: list[int], whole: bool) -> Output:
        if whole:
            self.network.kd_stages = stages
            output = self.run(images)
        else:
            self.network.stages = stages
            output = self.run(images, upto=len(stages) - 1, pairs=tuple(range(len(stages))))
        self.output = output
        self.maps = dict(zip(stages, output.features))
        return output
