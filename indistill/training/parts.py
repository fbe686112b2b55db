"""Build a run's networks, pruning plan and targets from its config.

The pruning plan is made once, by all ranks where it needs data, and is the same on each of them.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed as seed_everything
from timm.layers import convert_sync_batchnorm
from torch import nn
from torch.utils.data import DataLoader

from indistill import config, prune
from indistill.config import Config, UserError, in_one_line
from indistill.config.ranks import Ranks
from indistill.config.run_dir import RunDir
from indistill.config.tree import head_problem, input_size
from indistill.curriculum import Timetable
from indistill.data import class_names
from indistill.data.batch import Batch
from indistill.data.dataset import ImageDataset
from indistill.data.training import TrainingData, open_data
from indistill.losses import Shape
from indistill.losses.objective import create_layers, reads, teaches
from indistill.models import timm_model
from indistill.models.heads import Heads
from indistill.models.network import Network, Normalisation, normalisation
from indistill.models.outputs import Output
from indistill.models.stages import Architecture, check_stages, find_stages, match_stages
from indistill.models.timm_model import TimmModel
from indistill.models.trainable import Trainable
from indistill.models.views import without_weights
from indistill.prune import Plan
from indistill.targets.live import LiveTargets
from indistill.targets.reader import open_targets
from indistill.targets.source import TargetSource
from indistill.targets.stored import CachedTargets
from indistill.training import features
from indistill.training.features import Grids
from indistill.training.pruning import agree_on_plan, stored_plan

NO_PLAN = Plan("none", "none", [])
Parts = tuple[Trainable, TargetSource, Plan]
Forward = Callable[..., Output]  # with the arguments of `Network.forward`


def networks(
    accelerator: Accelerator,
    settings: Config,
    *,
    files: RunDir,
    calibration: Callable[[int], DataLoader] | None = None,
    make_teacher: Callable[[Config], Network] | None = None,
    run_teacher: Callable[[Network, Config], Forward] | None = None,
) -> Parts:
    """Return the module to train (on the device), the source of its targets, and the pruning plan.

    `calibration(n)` loads this rank's share of n global batches, for a pruning criterion that needs data.
    `make_teacher` and `run_teacher` replace `create_teacher` and `compiled` for a teacher that several
    students share. Raises UserError for networks, weights, stored targets or a plan that do not fit each
    other.
    """
    seed_everything(settings.seed)
    no_targets = LiveTargets(None, NO_PLAN, input_size=input_size(settings))
    if settings.stage == "heads":
        return heads(accelerator, settings), no_targets, NO_PLAN
    net = create_student(settings)
    assert settings.student is not None  # or `create_student` would have failed
    builder = _Builder(accelerator, settings, net, normalisation(net, settings.student, "student"))
    if settings.teacher is None:
        return builder.finish(Network(net, builder.normalisation)), no_targets, NO_PLAN
    if settings.targets.source == "cached":
        return builder.with_stored_targets(files)
    teacher = builder.load_teacher(settings.teacher, make_teacher or create_teacher)
    plan = NO_PLAN
    if settings.warmup is not None:
        plan = agree_on_plan(
            accelerator,
            settings,
            warmup=settings.warmup,
            files=files,
            teacher=teacher,
            student=net,
            calibration=calibration,
        )
    return builder.with_teacher(settings.teacher, teacher, plan, run_teacher or compiled)


@dataclass(frozen=True)
class _Builder:
    """Builds the student around its bare timm model `net`, and its targets, once they know the teacher."""

    accelerator: Accelerator
    settings: Config
    net: TimmModel
    normalisation: Normalisation  # of the student's input

    def with_stored_targets(self, files: RunDir) -> Parts:
        """Build the student and open its stored targets; no teacher is loaded."""
        reader = open_targets(self.accelerator, self.settings)
        teacher, losses = reader.manifest.teacher, self.settings.kd.losses
        plan = NO_PLAN
        if self.settings.warmup is not None:
            plan = stored_plan(
                self.accelerator, self.settings.warmup, files=files, reader=reader, student=self.net
            )
        student, kd_stages = self.student(teacher, plan, partial(features.of_manifest, reader.manifest))
        check_cohort(losses, reader.manifest.heads)
        return self.finish(student), CachedTargets(reader, losses, kd_stages=kd_stages), plan

    def load_teacher(self, section: config.Teacher, make_teacher: Callable[[Config], Network]) -> Network:
        """Create the teacher on its device, or on the CPU if it is to be sharded: it may not fit a device."""
        device = torch.device("cpu") if self.shard_device(section) else self.accelerator.device
        # The student's new layers start alike, whether or not a teacher is created before them.
        with torch.random.fork_rng():
            torch.manual_seed(self.settings.seed)
            return make_teacher(self.settings).to(device)

    def shard_device(self, section: config.Teacher) -> torch.device | None:
        """The device over which the teacher is sharded with those of the other ranks; None if it is not."""
        sharded = section.shard and self.accelerator.num_processes > 1
        return self.accelerator.device if sharded else None

    def with_teacher(
        self,
        section: config.Teacher,
        teacher: Network,
        plan: Plan,
        run_teacher: Callable[[Network, Config], Forward],
    ) -> Parts:
        """Build the student and the live targets of a teacher."""
        settings = self.settings
        side = teacher.image_size or settings.data.full_size
        losses = settings.kd.losses
        grids = partial(features.of_network, teacher.net, side, losses=losses)
        student, kd_stages = self.student(teacher.net, plan, grids)
        teacher.stages = [pair.teacher_stage for pair in plan.pairs]
        teacher.with_tokens = teaches(losses, "tokens")
        cohort = Heads.load(section.heads, teacher, settings.data.full_size) if section.heads else None
        check_cohort(losses, len(cohort.stages) if cohort else 0)
        targets = LiveTargets(
            teacher,
            plan,
            input_size=teacher.input_size(settings.data.full_size),
            kd_stages=kd_stages,
            heads=cohort,
            shard_on=self.shard_device(section),
            precision=section.precision or settings.mixed_precision,
            run=run_teacher(teacher, settings),
            pool=settings.targets.pool,
        )
        return self.finish(student), targets, plan

    def student(
        self, teacher: TimmModel | Architecture, plan: Plan, grids: Callable[[Sequence[int]], Grids]
    ) -> tuple[Network, list[int]]:
        """Create the student; return it and the teacher's stages whose whole maps KD reads.

        `grids` returns the shapes of the teacher's features, given the stages that losses read.
        """
        settings, losses = self.settings, self.settings.kd.losses
        kd_pairs = choose_pairs(settings, teacher, self.net) if reads(losses, "features") else []
        shape = self._feature_shape(teacher, kd_pairs, grids([stage for stage, _ in kd_pairs]))
        student = Network(
            self.net,
            self.normalisation,
            stages=[pair.student_stage for pair in plan.pairs],
            adapters={
                i: nn.Conv2d(pair.student_width, pair.teacher_width, kernel_size=1)
                for i, pair in enumerate(plan.pairs)
                if pair.student_width > pair.teacher_width
            },
            reads=[what for what in ("logits", "embedding", "tokens", "token") if reads(losses, what)],
            kd_stages=[student_stage for _, student_stage in kd_pairs],
            projectors=create_layers(losses, shape),
        )
        kd_stages = [teacher_stage for teacher_stage, _ in kd_pairs] if teaches(losses, "features") else []
        return student, kd_stages

    def _feature_shape(
        self, teacher: TimmModel | Architecture, kd_pairs: Sequence[tuple[int, int]], of_teacher: Grids
    ) -> Shape:
        """Return the widths that losses translate between. Raises UserError for features that do not fit."""
        settings, losses = self.settings, self.settings.kd.losses
        stages = [stage for _, stage in kd_pairs]
        of_student = features.of_network(self.net, settings.data.full_size, stages, losses)
        shape = projector_shape(teacher, self.net, kd_pairs)
        if of_student.tokens and of_teacher.tokens:
            shape = shape._replace(
                student_token_width=of_student.tokens[0], teacher_token_width=of_teacher.tokens[0]
            )
        widths = {
            "embedding": [shape.teacher_dim],
            "maps": shape.teacher_widths,
            "tokens": [shape.teacher_token_width],
        }
        features.check(settings, of_student, of_teacher, widths)
        return shape

    def finish(self, student: Network) -> Network:
        """Return the student, ready to be wrapped, on its device."""
        return trainable(self.settings, student).to(self.accelerator.device)


def check_fit(settings: Config) -> None:
    """Raise UserError if the networks of a chain's later stage do not fit each other, judged by their shapes.

    The teacher has no weights yet; weights and data are checked by `networks`.
    """
    if settings.stage == "heads" or settings.teacher is None:
        return
    assert settings.student is not None  # the config requires it unless stage is heads
    teacher_section, student_section = (
        section.model_copy(update=without_weights(section, role))
        for section, role in ((settings.teacher, "teacher"), (settings.student, "student"))
    )
    settings = settings.model_copy(update={"student": student_section})
    student = create_student(settings)
    teacher = timm_model.create(
        teacher_section, settings.data.num_classes, settings.data.full_size, "teacher"
    )
    if reads(settings.kd.losses, "features"):
        choose_pairs(settings, teacher, student)
    if warmup := settings.warmup:
        pairs = match_stages(teacher, student) if warmup.pairs == "auto" else warmup.pairs
        criterion = warmup.prune.criterion
        criterion = "random" if criterion in prune.NEEDS_DATA else criterion
        side = timm_model.input_side(teacher, teacher_section, settings.data.full_size)
        prune.plan(teacher, student, pairs, (3, side, side), criterion, adapter=warmup.adapter)


def check_cohort(losses: Sequence[config.Loss], heads: int) -> None:
    """Raise UserError for a loss that does not fit a teacher with `heads` intermediate heads."""
    for loss in losses:
        loss.check(heads)


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
    for loss in settings.kd.losses:
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
