"""Build a run's student and the targets of its teachers, the pruning plan of the warm-up included.

The pruning plan is made once, by all ranks where it needs data, and is the same on each of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import partial
from typing import NamedTuple, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed as seed_everything
from torch import nn
from torch.utils.data import DataLoader

from indistill import config, prune
from indistill.config import Config, UserError
from indistill.config.run_dir import RunDir
from indistill.config.tree import input_size
from indistill.losses import Shape
from indistill.losses.objective import Place, create_layers, reads, teaches
from indistill.models import timm_model
from indistill.models.heads import Heads
from indistill.models.network import Network, Normalisation, normalisation
from indistill.models.stages import Architecture, match_stages
from indistill.models.timm_model import NoWeights, TimmModel
from indistill.models.trainable import Trainable
from indistill.models.views import without_weights
from indistill.prune import Plan
from indistill.targets.live import LiveTargets
from indistill.targets.reader import open_targets
from indistill.targets.several import Member, SeveralTargets
from indistill.targets.source import TargetSource
from indistill.targets.stored import CachedTargets
from indistill.training import features
from indistill.training.features import Grids
from indistill.training.parts import (
    Forward,
    choose_pairs,
    compiled,
    create_student,
    create_teacher,
    heads,
    projector_shape,
    trainable,
)
from indistill.training.pruning import agree_on_plan, stored_plan

NO_PLAN = Plan("none", "none", [])


class Parts(NamedTuple):
    """What a run is made of besides its data."""

    student: Trainable  # on the device
    targets_of: TargetSource
    plan: Plan  # of the warm-up
    places: Sequence[Place] = ()  # of the losses, if there are several teachers


def networks(
    accelerator: Accelerator,
    settings: Config,
    *,
    files: RunDir,
    calibration: Callable[[int], DataLoader] | None = None,
    make_teacher: Callable[[Config], Network] | None = None,
    run_teacher: Callable[[Network, Config], Forward] | None = None,
) -> Parts:
    """Return the module to train, the source of its targets, the pruning plan, and the places of the losses.

    `calibration(n)` loads this rank's share of n global batches, for a pruning criterion that needs data.
    `make_teacher` and `run_teacher` replace `create_teacher` and `compiled` for a teacher that several
    students share. Raises UserError for networks, weights, stored targets or a plan that do not fit each
    other.
    """
    seed_everything(settings.seed)
    no_targets = LiveTargets(None, NO_PLAN, input_size=input_size(settings))
    if settings.stage == "heads":
        return Parts(heads(accelerator, settings), no_targets, NO_PLAN)
    net = create_student(settings)
    assert settings.student is not None  # or `create_student` would have failed
    builder = _Builder(
        accelerator,
        settings,
        net,
        normalisation=normalisation(net, settings.student, "student"),
        files=files,
        calibration=calibration,
        make_teacher=make_teacher or create_teacher,
        run_teacher=run_teacher or compiled,
    )
    if not settings.has_teacher:
        return Parts(builder.student([]), no_targets, NO_PLAN)
    return builder.parts()


@contextlib.contextmanager
def naming_teacher(called: str) -> Iterator[None]:
    """Say in errors which of several teachers they are about; "" for the only one."""
    try:
        yield
    except UserError as error:
        if called:
            error.args = (f"teachers: {called}: {error}",)
        if isinstance(error, NoWeights):
            error.teacher = called
        raise


@dataclass(frozen=True)
class Lesson:
    """What the student learns from a teacher, and what it needs for that."""

    targets_of: TargetSource
    plan: Plan
    student_stages: Sequence[int]  # whose maps its losses read
    shape: Shape


@dataclass(frozen=True)
class _Builder:
    """Builds a student around its bare timm model `net`, and the targets of each of its teachers."""

    accelerator: Accelerator
    settings: Config
    net: TimmModel
    _: KW_ONLY
    normalisation: Normalisation  # of the student's input
    files: RunDir
    calibration: Callable[[int], DataLoader] | None
    make_teacher: Callable[[Config], Network]
    run_teacher: Callable[[Network, Config], Forward]

    def parts(self) -> Parts:
        """Build all lessons, then the student."""
        settings, lessons = self.settings, []
        for called, one in settings.by_teacher.items():
            with naming_teacher(called):
                lessons.append(self.lesson(one))
        if not settings.teachers:
            return Parts(self.student(lessons), lessons[0].targets_of, lessons[0].plan)
        places, plan = _places(settings, lessons), _plan(lessons)
        return Parts(self.student(lessons, places), _together(settings, lessons), plan, places)

    def lesson(self, settings: Config) -> Lesson:
        """Build the targets of the only teacher of a config; a plan is made or read if it has a warm-up."""
        return self._stored(settings) if settings.targets.source == "cached" else self._live(settings)

    def _stored(self, settings: Config) -> Lesson:
        """Open stored targets; no teacher is loaded."""
        reader = open_targets(self.accelerator, settings)
        teacher, losses, warmup = reader.manifest.teacher, settings.kd.losses, settings.warmup
        plan = NO_PLAN
        if warmup is not None:
            plan = stored_plan(self.accelerator, warmup, files=self.files, reader=reader, student=self.net)
        pairs, shape = self._pairs(settings, teacher, partial(features.of_manifest, reader.manifest))
        check_cohort(losses, reader.manifest.heads)
        warms_up = warmup is not None
        targets = CachedTargets(reader, losses, kd_stages=_taught(losses, pairs), warms_up=warms_up)
        return Lesson(targets, plan, [student for _, student in pairs], shape)

    def _live(self, settings: Config) -> Lesson:
        """Load the teacher."""
        section, losses = settings.teacher, settings.kd.losses
        assert section is not None  # of a config of `by_teacher`
        teacher = self._load_teacher(settings, section)
        plan = NO_PLAN
        if settings.warmup is not None:
            plan = agree_on_plan(
                self.accelerator,
                settings,
                warmup=settings.warmup,
                files=self.files,
                teacher=teacher,
                student=self.net,
                calibration=self.calibration,
            )
        side = teacher.image_size or settings.data.full_size
        pairs, shape = self._pairs(
            settings, teacher.net, partial(features.of_network, teacher.net, side, losses=losses)
        )
        teacher.stages = [pair.teacher_stage for pair in plan.pairs]
        teacher.with_tokens = teaches(losses, "tokens")
        cohort = Heads.load(section.heads, teacher, settings.data.full_size) if section.heads else None
        check_cohort(losses, len(cohort.stages) if cohort else 0)
        targets = LiveTargets(
            teacher,
            plan,
            input_size=teacher.input_size(settings.data.full_size),
            kd_stages=_taught(losses, pairs),
            heads=cohort,
            shard_on=self._shard_device(section),
            precision=section.precision or settings.mixed_precision,
            run=self.run_teacher(teacher, settings),
            pool=settings.targets.pool,
        )
        return Lesson(targets, plan, [student for _, student in pairs], shape)

    def _load_teacher(self, settings: Config, section: config.Teacher) -> Network:
        """Create the teacher on its device, or on the CPU if it is to be sharded: it may not fit a device."""
        device = torch.device("cpu") if self._shard_device(section) else self.accelerator.device
        return self.make_teacher(settings).to(device)

    def _shard_device(self, section: config.Teacher) -> torch.device | None:
        """The device over which the teacher is sharded with those of the other ranks; None if it is not."""
        sharded = section.shard and self.accelerator.num_processes > 1
        return self.accelerator.device if sharded else None

    def student(self, lessons: Sequence[Lesson], places: Sequence[Place] = ()) -> Network:
        """Create the student with all that its lessons need, on its device, ready to be wrapped."""
        settings, losses = self.settings, self.settings.losses
        plan = _plan(lessons)
        shapes = _by_loss(settings, [lesson.shape for lesson in lessons])
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
            kd_stages=sorted({stage for lesson in lessons for stage in lesson.student_stages}),
            projectors=create_layers([*zip(losses, shapes)], places) if lessons else {},
        )
        return trainable(settings, student).to(self.accelerator.device)

    def _pairs(
        self, settings: Config, teacher: TimmModel | Architecture, grids: Callable[[Sequence[int]], Grids]
    ) -> tuple[list[tuple[int, int]], Shape]:
        """Return the pairs whose maps losses read, and the widths that losses translate between.

        `grids` returns the shapes of the teacher's features, given the stages that losses read. Raises
        UserError for features that do not fit.
        """
        losses = settings.kd.losses
        pairs = choose_pairs(settings, teacher, self.net) if reads(losses, "features") else []
        of_teacher = grids([stage for stage, _ in pairs])
        stages = [stage for _, stage in pairs]
        of_student = features.of_network(self.net, settings.data.full_size, stages, losses)
        shape = projector_shape(teacher, self.net, pairs)
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
        return pairs, shape


def _taught(losses: Sequence[config.Loss], pairs: Sequence[tuple[int, int]]) -> list[int]:
    """The teacher's stages whose whole maps KD reads."""
    return [stage for stage, _ in pairs] if teaches(losses, "features") else []


# --- several teachers ---------------------------------------------------------------------------------------
_Of = TypeVar("_Of")


def _by_loss(settings: Config, of_teachers: Sequence[_Of]) -> list[_Of]:
    """Give each of `settings.losses` what belongs to its teacher.

    Losses of `kd.losses` get that of the first teacher without losses of its own, or the first of all if
    there is none: then they learn from no teacher.
    """
    teachers = settings.teachers
    if not teachers:
        return [of_teachers[0]] * len(settings.losses) if of_teachers else []
    ensemble = next((i for i, one in enumerate(teachers) if one.losses is None), 0)
    own = [of_teachers[i] for i, one in enumerate(teachers) for _ in one.losses or ()]
    return [of_teachers[ensemble]] * len(settings.kd.losses) + own


def _groups(settings: Config) -> list[int]:
    """Return the index into `Targets.each` of what each of several teachers gives."""
    groups, last = [], 0
    for one in settings.teachers:
        last += one.losses is not None
        groups.append(0 if one.losses is None else last)
    return groups


def _places(settings: Config, lessons: Sequence[Lesson]) -> list[Place]:
    """Return where each loss finds what it compares."""
    every = sorted({stage for lesson in lessons for stage in lesson.student_stages})
    of_teachers = []
    for one, group, lesson in zip(settings.teachers, _groups(settings), lessons):
        maps = [every.index(stage) for stage in lesson.student_stages]
        weight = 1.0 if one.losses is None else one.weight
        of_teachers.append(Place(one.called if group else "", group, maps, weight))
    places = _by_loss(settings, of_teachers)
    if all(one.losses for one in settings.teachers):  # `kd.losses` have no teacher
        places[: len(settings.kd.losses)] = [Place("", 0, [])] * len(settings.kd.losses)
    return places


def _plan(lessons: Sequence[Lesson]) -> Plan:
    """Return the plan of the warm-up, which one teacher has at most."""
    return next((lesson.plan for lesson in lessons if lesson.plan.pairs), NO_PLAN)


def _together(settings: Config, lessons: Sequence[Lesson]) -> SeveralTargets:
    """Return the targets of all teachers."""
    learns = any(loss.teaches for loss in settings.kd.losses)
    members = [
        Member(one.called, lesson.targets_of, group if group or learns else None, one.weight)
        for one, lesson, group in zip(settings.teachers, lessons, _groups(settings))
    ]
    return SeveralTargets(members, settings.warmup_teacher, settings.kd.ensemble)


def check_fit(settings: Config) -> None:
    """Raise UserError if the networks of a chain's later stage do not fit each other, judged by their shapes.

    The teachers have no weights yet; weights and data are checked by `networks`.
    """
    if settings.stage == "heads" or not settings.has_teacher:
        return
    student = _student_without_weights(settings)
    for called, one in settings.by_teacher.items():
        with naming_teacher(called):
            _check_fit(one, student)


def warmup_pairs(settings: Config) -> int:
    """How many pairs a warm-up has, 0 without one; `auto` is judged by the networks, without weights."""
    if settings.warmup is None:
        return 0
    if settings.warmup.pairs != "auto":
        return len(settings.warmup.pairs)
    of_teacher = settings.by_teacher[settings.warmup_teacher or ""]
    return len(match_stages(_teacher_without_weights(of_teacher), _student_without_weights(settings)))


def _student_without_weights(settings: Config) -> TimmModel:
    assert settings.student is not None  # the config requires it unless stage is heads
    section = settings.student.model_copy(update=without_weights(settings.student, "student"))
    return create_student(settings.model_copy(update={"student": section}))


def _teacher_without_weights(settings: Config) -> TimmModel:
    assert settings.teacher is not None  # of a config of `by_teacher`
    section = settings.teacher.model_copy(update=without_weights(settings.teacher, "teacher"))
    return timm_model.create(section, settings.data.num_classes, settings.data.full_size, "teacher")


def _check_fit(settings: Config, student: TimmModel) -> None:
    assert settings.teacher is not None  # of a config of `by_teacher`
    teacher = _teacher_without_weights(settings)
    if reads(settings.kd.losses, "features"):
        choose_pairs(settings, teacher, student)
    if warmup := settings.warmup:
        pairs = match_stages(teacher, student) if warmup.pairs == "auto" else warmup.pairs
        criterion = warmup.prune.criterion
        criterion = "random" if criterion in prune.NEEDS_DATA else criterion
        side = timm_model.input_side(teacher, settings.teacher, settings.data.full_size)
        prune.plan(teacher, student, pairs, (3, side, side), criterion, adapter=warmup.adapter)


def check_cohort(losses: Sequence[config.Loss], heads: int) -> None:
    """Raise UserError for a loss that does not fit a teacher with `heads` intermediate heads."""
    for loss in losses:
        loss.check(heads)
