"""What a run trains and what teaches it: networks, pruning plan, targets, from the config.

The plan is made once, by all ranks where it needs data, and is the same on each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed as seed_everything
from timm.layers import convert_sync_batchnorm
from torch import nn
from torch.utils.data import DataLoader

from indistill import config, prune
from indistill.config import Config, UserError
from indistill.config.tree import input_size
from indistill.curriculum import Timetable
from indistill.data import class_names
from indistill.data.batch import Batch
from indistill.data.training import Training, open_data
from indistill.losses import Shape
from indistill.losses.objective import create_layers, reads, teaches
from indistill.models import network, timm_model
from indistill.models.heads import Heads
from indistill.models.network import Network, normalisation
from indistill.models.outputs import Output
from indistill.models.stages import check_stages, find_stages, match_stages
from indistill.prune import Plan
from indistill.targets.live import LiveTargets
from indistill.targets.reader import open_targets
from indistill.targets.stored import CachedTargets
from indistill.training.pruning import agree_on_plan, stored_plan

NO_PLAN = Plan("none", "none", [])


def networks(
    accelerator: Accelerator,
    settings: Config,
    run_dir: Path,
    calibration: Callable[[int], DataLoader] | None,
    make_teacher: Callable[[Config], Network] | None = None,
    run_teacher: Callable[[Network, Config], Callable[..., Output]] | None = None,
) -> tuple[Network | Heads, LiveTargets | CachedTargets, Plan]:
    """Return the module to train (on the device), the source of its targets, and the pruning plan.

    `calibration(n)` gives this rank's share of n global batches. `make_teacher` and `run_teacher` replace
    `create_teacher` and `compiled` for a teacher that several students share. Raises UserError for whatever does not
    fit.
    """
    seed_everything(settings.seed)
    device, size, losses = accelerator.device, input_size(settings), settings.kd.losses
    if settings.stage == "heads":
        return heads(accelerator, settings), LiveTargets(None, NO_PLAN, size), NO_PLAN
    net = create_student(settings)
    normalisation = network.normalisation(net, settings.student, "student")
    if settings.teacher is None:
        return (
            trainable(settings, Network(net, *normalisation)).to(device),
            LiveTargets(None, NO_PLAN, size),
            NO_PLAN,
        )

    reader = open_targets(accelerator, settings) if settings.targets.source == "cached" else None
    # One that is to be sharded may not fit a device, and stays on the CPU until then.
    shard_on = device if settings.teacher.shard and accelerator.num_processes > 1 else None
    if reader is None:
        with (
            torch.random.fork_rng()
        ):  # whether it is created here or not, the student's layers begin the same
            torch.manual_seed(settings.seed)
            teacher = (make_teacher or create_teacher)(settings).to("cpu" if shard_on else device)
    teacher_net = reader.manifest.teacher if reader else teacher.net
    plan = NO_PLAN
    if settings.warmup and reader:
        plan = stored_plan(accelerator, settings, run_dir, reader, net)
    elif settings.warmup:
        plan = agree_on_plan(accelerator, settings, run_dir, teacher, net, calibration)
    stages = [(pair.teacher_stage, pair.student_stage) for pair in plan.pairs]
    kd_pairs = choose_pairs(settings, teacher_net, net) if reads(losses, "features") else []
    student = Network(
        net,
        *normalisation,
        stages=[student_stage for _, student_stage in stages],
        adapters={
            i: nn.Conv2d(pair.student_width, pair.teacher_width, kernel_size=1)
            for i, pair in enumerate(plan.pairs)
            if pair.student_width > pair.teacher_width
        },
        reads=[what for what in ("logits", "embedding", "token") if reads(losses, what)],
        kd_stages=[student_stage for _, student_stage in kd_pairs],
        projectors=create_layers(losses, projector_shape(teacher_net, net, kd_pairs)),
    )
    kd_stages = [teacher_stage for teacher_stage, _ in kd_pairs] if teaches(losses, "features") else []
    if reader:
        check_cohort(losses, reader.manifest.heads)
        return trainable(settings, student).to(device), CachedTargets(reader, losses, kd_stages), plan

    teacher.stages = [teacher_stage for teacher_stage, _ in stages]
    cohort = settings.teacher.heads and Heads.load(settings.teacher.heads, teacher, settings.data.image_size)
    check_cohort(losses, len(cohort.stages) if cohort else 0)
    precision, pool = settings.teacher.precision or settings.mixed_precision, settings.targets.pool
    run = (run_teacher or compiled)(teacher, settings)
    targets_of = LiveTargets(teacher, plan, size, kd_stages, cohort, shard_on, precision, run, pool)
    return trainable(settings, student).to(device), targets_of, plan


def check_fit(settings: Config) -> None:
    """Raise UserError where the networks of a stage that is still to come do not fit each other, by their shapes.

    Its teacher has no weights yet; those and the data are left to `networks`.
    """
    if settings.stage == "heads" or settings.teacher is None:
        return
    bare = {"pretrained": False, "checkpoint": None}
    sections = {role: getattr(settings, role).model_copy(update=bare) for role in ("student", "teacher")}
    settings = settings.model_copy(update=sections)
    student = create_student(settings)
    teacher = timm_model.create(
        settings.teacher, settings.data.num_classes, settings.data.image_size, "teacher"
    )
    if reads(settings.kd.losses, "features"):
        choose_pairs(settings, teacher, student)
    if settings.warmup:
        pairs = match_stages(teacher, student) if settings.warmup.pairs == "auto" else settings.warmup.pairs
        criterion = settings.warmup.prune.criterion
        criterion = "random" if criterion in prune.NEEDS_DATA else criterion
        prune.plan(teacher, student, pairs, input_size(settings), criterion, adapter=settings.warmup.adapter)


def check_cohort(losses: Sequence[config.Loss], heads: int) -> None:
    """Raise UserError for a loss that does not fit a teacher with `heads` intermediate heads."""
    for loss in losses:
        loss.check(heads)


def trainable(settings: Config, student: Network) -> Network:
    return convert_sync_batchnorm(student) if settings.sync_batchnorm else student


def create_student(settings: Config) -> nn.Module:
    net = timm_model.create(settings.student, settings.data.num_classes, settings.data.image_size, "student")
    for loss in settings.kd.losses:
        if "token" in loss.reads and not hasattr(net, "set_distilled_training"):
            raise UserError(
                f"kd.losses: {loss.name} needs a student with a distillation token, {settings.student.name} has none: "
                "choose one such as deit_tiny_distilled_patch16_224"
            )
    return net


def create_teacher(settings: Config) -> Network:
    section = settings.teacher
    if section.checkpoint:
        class_names.check_weights(class_names.of_weights(section.checkpoint), settings.data, "teacher")
    net = timm_model.create(section, settings.data.num_classes, settings.data.image_size, "teacher")
    if section.pretrained:
        class_names.check_weights(
            class_names.of_pretrained(net.pretrained_cfg, section.name), settings.data, "teacher"
        )
    return Network(net, *normalisation(net, settings.teacher, "teacher"))


def compiled(teacher: Network, settings: Config) -> Callable[..., Output]:
    """Return what runs the teacher on a batch, with the arguments of `Network.forward`."""
    return torch.compile(teacher, dynamic=False) if settings.compile else teacher


def heads(accelerator: Accelerator, settings: Config) -> Heads:
    """Intermediate classifiers on the teacher, which they hold and run themselves."""
    teacher = create_teacher(settings).to(accelerator.device)
    stages = settings.heads.stages
    if stages == "auto":
        stages = [stage for stage, _ in match_stages(teacher.net, teacher.net)]
    return Heads(teacher, stages, settings.heads.pool, settings.data.image_size).to(accelerator.device)


def choose_pairs(settings: Config, teacher: nn.Module, student: nn.Module) -> list[tuple[int, int]]:
    """(teacher stage, student stage) of what KD reads, else of the warm-up, else matched."""
    pairs, key = settings.kd.pairs, "kd.pairs"
    if pairs is None and settings.warmup:
        pairs, key = settings.warmup.pairs, "warmup.pairs"
    if pairs in (None, "auto"):
        return match_stages(teacher, student)
    check_stages(pairs, teacher, student, key)
    return pairs


def comparable_pairs(settings: Config, teacher: nn.Module, student: nn.Module) -> list[tuple[int, int]]:
    """As choose_pairs, but none where nothing matches: what no loss needs must not fail."""
    try:
        return choose_pairs(settings, teacher, student)
    except UserError:
        return []


def projector_shape(teacher: nn.Module, student: nn.Module, pairs: Sequence[tuple[int, int]]) -> Shape:
    teacher_stages, student_stages = find_stages(teacher), find_stages(student)
    return Shape(
        student_widths=[student_stages[stage].channels for _, stage in pairs],
        teacher_widths=[teacher_stages[stage].channels for stage, _ in pairs],
        student_dim=student.head_hidden_size,
        teacher_dim=teacher.head_hidden_size,
    )


class Sources:
    """Opens a run's own data and creates its own teacher."""

    # Of a student among several, for what they show: its name, and the terminal's line where no one else knows it.
    name = ""
    position: int | None = None

    def data(self, accelerator: Accelerator, settings: Config) -> tuple[Training, data.ImageDataset | None]:
        """Training and evaluation images. Raises UserError for shards and batch sizes that cannot work."""
        return open_data(accelerator, settings)

    def batches(
        self, training: Training, first_step: int, last_step: int, device: torch.device
    ) -> Iterable[Batch]:
        """The micro-batches of the steps [first_step, last_step)."""
        return training.loader(first_step, last_step, device)

    def targets(
        self, targets_of: LiveTargets | CachedTargets, plan: Plan, timetable: Timetable, settings: Config
    ) -> LiveTargets | CachedTargets:
        """What gives the targets of a batch, from what the networks were built with."""
        return targets_of

    def teacher(self, settings: Config) -> Network:
        """Raises UserError for a teacher that cannot be had or does not fit."""
        return create_teacher(settings)

    def forward(self, teacher: Network, settings: Config) -> Callable[..., Output]:
        """What runs it on a batch, with the arguments of `Network.forward`."""
        return compiled(teacher, settings)
