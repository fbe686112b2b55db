"""Build a run's networks, pruning plan and targets from its config.

The pruning plan is made once, by all ranks where it needs data, and is the same on each of them.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
from accelerate import Accelerator
from timm.layers import convert_sync_batchnorm
from torch import nn

from indistill import config
from indistill.config import Config, UserError, in_one_line
from indistill.config.ranks import Ranks
from indistill.config.tree import head_problem, input_size
from indistill.curriculum import Timetable
from indistill.data import class_names
from indistill.data.batch import Batch
from indistill.data.dataset import ImageDataset
from indistill.data.training import TrainingData, open_data
from indistill.losses import Shape
from indistill.models import timm_model
from indistill.models.heads import Heads
from indistill.models.network import Network, normalisation
from indistill.models.outputs import Output
from indistill.models.stages import Architecture, check_stages, find_stages, match_stages
from indistill.models.timm_model import TimmModel
from indistill.prune import Plan
from indistill.targets.source import TargetSource

Forward = Callable[..., Output]  # with the arguments of `Network.forward`


def trainable(settings: Config, student: Network) -> Network:
    """Synchronise the student's batch norms over all ranks, if the config says so."""
    return convert_sync_batchnorm(student) if settings.sync_batchnorm else student


def create_student(settings: Config) -> TimmModel:
    """Create the bare timm model. Raises UserError if a loss needs a distillation token that it lacks."""
    assert settings.student is not None  # the config requires it unless stage is heads
    net = timm_model.create(settings.student, settings.data.num_classes, settings.data.full_size, "student")
    _check_head(settings, net, "student")
    if settings.grad_checkpointing:
        timm_model.checkpoint_gradients(net, settings.student.name)
    for loss in settings.losses:
        if "token" in loss.reads and not hasattr(net, "set_distilled_training"):
            raise UserError(
                f"kd.losses: {loss.name} needs a student with a distillation token, {settings.student.name} "
                "has none: choose one such as deit_tiny_distilled_patch16_224"
            )
    check_sizes(settings, net, "student")
    if has_single_images(settings):
        with refusing_single_values(settings), torch.random.fork_rng(devices=[]):
            copy.deepcopy(net).train()(torch.zeros(1, *input_size(settings)))
    return net


@torch.no_grad()
def check_sizes(settings: Config, net: TimmModel, role: str) -> None:
    """Raise UserError if a network without an input size of its own cannot take all of `data.image_size`."""
    section = settings.data.image_size
    network = settings.teacher if role == "teacher" else settings.student
    if isinstance(section, int) or (network is not None and timm_model.own_side(net, network) is not None):
        return
    example = next(net.parameters())
    training = net.training
    net.eval()
    for size in range(section.from_, section.to, config.SIZE_STEP):
        try:
            net(torch.zeros(1, 3, size, size, device=example.device, dtype=example.dtype))
        except (AssertionError, RuntimeError, TypeError, ValueError) as error:
            raise UserError(
                f"{role}: cannot take {size} px images (data.image_size: from {section.from_} to "
                f"{section.to}): {in_one_line(error, 200)}: choose another network or other sizes; a ViT of "
                f"timm takes several with {role}.kwargs: {{dynamic_img_size: true}}"
            ) from None
    net.train(training)


def _check_head(settings: Config, net: TimmModel, role: str) -> None:
    """Raise UserError if a network without a classifier needs one."""
    if not net.num_classes and (problem := head_problem(settings, role)):
        raise UserError(problem)


def has_single_images(settings: Config) -> bool:
    """Whether batch norm in training sees one image at a time: a micro-batch of one, not synchronised."""
    world = Ranks.from_environment().world_size
    micro_batch = settings.data.global_batch // (world * settings.grad_accumulation)
    return micro_batch == 1 and not (settings.sync_batchnorm and world > 1)


@contextlib.contextmanager
def refusing_single_values(settings: Config) -> Iterator[None]:
    """Raise UserError if batch norm gets a single value per channel: one image, where its map is one pixel.

    Otherwise that error would come up only in the phase that first trains such a layer.
    """
    try:
        yield
    except ValueError as error:
        if not str(error).startswith("Expected more than 1 value per channel"):
            raise
        raise UserError(
            f"data.global_batch: {settings.data.global_batch} leaves one image to each rank and accumulation "
            "step, and a batch norm has one value of it per channel, which it cannot normalise: raise "
            "data.global_batch, or lower grad_accumulation or the number of processes"
        ) from None


def create_teacher(settings: Config) -> Network:
    """Create the teacher with its weights, on the CPU. Raises UserError if they are missing or do not fit."""
    section = settings.teacher
    assert section is not None  # a teacher is created only for a config that has one
    if section.checkpoint and section.num_classes != 0:
        class_names.check_weights(class_names.of_weights(section.checkpoint), settings.data, "teacher")
    # The student's new layers start alike, whether or not a teacher is created before them, and a random
    # teacher of the student's architecture starts with other weights.
    with torch.random.fork_rng():
        torch.manual_seed(int(np.random.SeedSequence([settings.seed, 1]).generate_state(1)[0]))
        net = timm_model.create(section, settings.data.num_classes, settings.data.full_size, "teacher")
    _check_head(settings, net, "teacher")
    check_sizes(settings, net, "teacher")
    if section.pretrained and net.num_classes:
        names = class_names.of_pretrained(net.pretrained_cfg, section.name)
        class_names.check_weights(names, settings.data, "teacher")
    size = timm_model.own_side(net, section)
    return Network(net, normalisation(net, section, "teacher"), image_size=size)


def compiled(teacher: Network, settings: Config) -> Forward:
    """Return the function that runs the teacher on a batch: `torch.compile` of it, if the config says so."""
    return torch.compile(teacher, dynamic=False) if settings.compile else teacher


def heads(accelerator: Accelerator, settings: Config) -> Heads:
    """Create intermediate classifiers on the teacher, which they hold and run themselves."""
    teacher = create_teacher(settings).to(accelerator.device)
    stages = settings.heads.stages
    if stages == "auto":
        stages = [stage for stage, _ in match_stages(teacher.net, teacher.net)]
    return Heads(teacher, stages, settings.heads.pool, settings.data.full_size).to(accelerator.device)


def choose_pairs(
    settings: Config, teacher: nn.Module | Architecture, student: nn.Module
) -> list[tuple[int, int]]:
    """Return the pairs (teacher stage, student stage) of kd.pairs, else of the warm-up, else matched ones."""
    pairs, key = settings.kd.pairs, "kd.pairs"
    if pairs is None and settings.warmup:
        pairs, key = settings.warmup.pairs, "warmup.pairs"
    if pairs is None or pairs == "auto":
        return match_stages(teacher, student)
    check_stages(pairs, teacher, student, key)
    return pairs


def comparable_pairs(
    settings: Config, teacher: nn.Module | Architecture, student: nn.Module
) -> list[tuple[int, int]]:
    """Like `choose_pairs`, but [] if nothing matches: pairs that are only reported must not stop a run."""
    try:
        return choose_pairs(settings, teacher, student)
    except UserError:
        return []


def projector_shape(
    teacher: TimmModel | Architecture, student: TimmModel, pairs: Sequence[tuple[int, int]]
) -> Shape:
    """Return the widths that the trainable layers of losses translate between."""
    teacher_stages, student_stages = find_stages(teacher), find_stages(student)
    return Shape(
        student_widths=[student_stages[stage].channels for _, stage in pairs],
        teacher_widths=[teacher_stages[stage].channels for stage, _ in pairs],
        student_dim=student.head_hidden_size,
        teacher_dim=teacher.head_hidden_size,
    )


class Sources:
    """Opens a run's own data and creates its own teacher.

    Subclasses share them among several students (students.py, groups.py).
    """

    name = ""  # of a student among several, shown with its progress
    # Of the student's progress line, if other processes write to the terminal too.
    position: int | None = None

    def data(
        self, accelerator: Accelerator, settings: Config
    ) -> tuple[TrainingData, dict[str, ImageDataset]]:
        """Open the training and evaluation images. Raises UserError for unusable shards and batch sizes."""
        return open_data(accelerator, settings)

    def batches(
        self, training: TrainingData, first_step: int, last_step: int, device: torch.device
    ) -> Iterable[Batch]:
        """Load the micro-batches of the steps [first_step, last_step)."""
        return training.loader(first_step, last_step, device)

    def targets(
        self, targets_of: TargetSource, plan: Plan, timetable: Timetable, settings: Config
    ) -> TargetSource:
        """Return the source of the run's targets, given the one that the networks were built with."""
        return targets_of

    def teacher(self, settings: Config) -> Network:
        """Create the teacher. Raises UserError if its weights are missing or do not fit."""
        return create_teacher(settings)

    def forward(self, teacher: Network, settings: Config) -> Forward:
        """Return the function that runs the teacher on a batch."""
        return compiled(teacher, settings)
