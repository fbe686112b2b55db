"""The configuration: one typed, frozen tree of sections, and the identity of a run.

Mistakes are found when the tree is built, before a model or a device is touched, and reported in one line
with the file and the key. The comment of each key is its description in docs/configuration.md.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterator
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, PositiveFloat, PositiveInt, model_validator

from indistill.config.base import Duration, Section, path_or_url, run_length
from indistill.config.data import Data, Progressive
from indistill.config.limits import MAX_MINUTES
from indistill.config.loss import Loss, RecordedLoss
from indistill.config.metric_names import eval_key
from indistill.config.redact import redacted
from indistill.config.sections import (
    KD,
    Checkpoint,
    Ema,
    Engine,
    Evaluate,
    Heads,
    Log,
    Machine,
    Model,
    OneTeacher,
    Optimizer,
    Precision,
    Profile,
    Schedule,
    Targets,
    Teacher,
    Tracker,
    Warmup,
)

TARGETS = "targets"  # the folder of stored targets in a run directory


# --- training -----------------------------------------------------------------------------------------------
class Config(Section):
    # Folder for everything the run writes; all its nodes must be able to access it, unless it has a mirror.
    run_dir: Annotated[str, Field(min_length=1), AfterValidator(path_or_url)]
    # `distill`: train a student; `heads`: train classifiers on stages of a frozen teacher, for the loss
    # `dih`.
    stage: Literal["distill", "heads"] = "distill"
    # Seed of initial weights, sample order, augmentation and dropout.
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    # Length of the run, warm-up included; in any unit but percent.
    duration: Annotated[Duration, AfterValidator(run_length)]
    data: Data  # Training and evaluation data.
    student: Model | None = None  # The network to train; required unless `stage: heads`.
    teacher: Teacher | None = None  # The teacher; None: supervised training without one.
    heads: Heads = Heads()  # The classifiers of `stage: heads`.
    warmup: Warmup | None = None  # InDistill's warm-up; None: none, the KD phase begins at step 0.
    kd: KD = Field(default_factory=KD)  # The phase after the warm-up: losses and training settings.
    # Several teachers instead of `teacher` (docs/foundation.md).
    teachers: list[OneTeacher] = []
    # Where the teacher's outputs come from. A single word sets the source: `targets: cached`.
    targets: Annotated[Targets, BeforeValidator(lambda x: {"source": x} if isinstance(x, str) else x)] = (
        Targets()
    )
    optimizer: Optimizer  # The optimizer of all phases.
    # Learning rate schedule, which starts anew in each phase: for each pair of the warm-up, and for KD.
    schedule: Schedule = Schedule()
    # URL to which checkpoints and records of `run_dir` are copied during the run, such as s3://bucket/run. A
    # node whose `run_dir` is empty goes on from there (docs/cluster.md). None: no copy.
    mirror: Annotated[str, Field(min_length=1), AfterValidator(path_or_url)] | None = None
    # Longest time of one start, in hours: then the run saves a checkpoint and exits with code 75, to be
    # started again. None: no limit but SLURM's.
    max_hours: PositiveFloat | None = None
    # Steps with a loss or gradient that is not finite are skipped; more than this many in a row stop the run.
    max_bad_steps: Annotated[int, Field(ge=0)] = 20
    # Longest time that ranks wait for each other, in minutes, before they exit with code 75. After half of it
    # the log names the rank that all wait for.
    collective_timeout_minutes: Annotated[PositiveFloat, Field(le=MAX_MINUTES)] = 30.0
    # Autocast precision of both networks; parameters stay in float32. `no`: float32.
    mixed_precision: Precision = "no"
    # Compile both networks with torch.compile: faster steps, and minutes of compilation at the start of each
    # phase. Not with DeepSpeed or `teacher.shard`.
    compile: bool = False
    # Keep only the inputs of the student's blocks, and compute the blocks again in the backward pass (timm's
    # `set_grad_checkpointing`): less memory, and up to a third more operations of the student. The results
    # are the same, so a run may resume with another value.
    grad_checkpointing: bool = False
    # Micro-batches per optimizer step: more need less memory, for the same `data.global_batch`.
    grad_accumulation: PositiveInt = 1
    clip_grad_norm: PositiveFloat | None = None  # Largest norm of the gradient; None: no clipping.
    # Compute the student's batch norm statistics over all ranks; GPUs only.
    sync_batchnorm: bool = False
    # How processes share the training: DDP or DeepSpeed. None: what `accelerate launch` chose, else DDP.
    engine: Engine | None = None
    # Moving average of the student's weights, which is then evaluated and exported; None: no average.
    ema: Ema | None = None
    evaluate: Evaluate = Evaluate()  # When and how to evaluate.
    checkpoint: Checkpoint = Checkpoint()  # When to save checkpoints, and how many to keep.
    log: Log = Log()  # How often to log.
    # Steps to record with torch.profiler (docs/runs.md), `{}` with its defaults; None: none.
    profile: Profile | None = None
    # Accelerate's trackers, by name, which get the values of metrics.jsonl. Each needs the package of that
    # name.
    trackers: list[Tracker] = ["tensorboard"]
    # Hardware that `indistill plan` assumes. Only `targets: auto` makes a run depend on it.
    machine: Machine = Machine()

    @property
    def has_teacher(self) -> bool:
        return self.teacher is not None or bool(self.teachers)

    @property
    def teacher_sections(self) -> dict[str, Teacher]:
        """The sections of the teachers by role: `teacher`, or of several `teacher NAME`."""
        sections = {f"teacher {name}".rstrip(): one.teacher for name, one in self.by_teacher.items()}
        return {role: section for role, section in sections.items() if section is not None}

    @property
    def losses(self) -> list[Loss]:
        """All losses of KD: `kd.losses`, then those of each of several teachers."""
        return [*self.kd.losses, *(loss for one in self.teachers for loss in one.losses or ())]

    @property
    def warmup_teacher(self) -> str | None:
        """Which of several teachers teaches the warm-up, by what it is called."""
        if self.warmup is None or not self.teachers:
            return None
        return self.warmup.teacher or self.teachers[0].called

    @property
    def by_teacher(self) -> dict[str, Config]:
        """By what each of several teachers is called, the config of a run that has it alone.

        Its losses are its own, or `kd.losses` if it has none, and it has the warm-up if it teaches that. Of
        a config without `teachers` it is this one, called "".
        """
        return {one.called: self._with(one) for one in self.teachers} or {"": self}

    def _with(self, one: OneTeacher) -> Config:
        own = {} if one.losses is None else {"losses": one.losses, "pairs": one.pairs}
        folder = f"{(self.targets.dir or f'{self.run_dir}/{TARGETS}').rstrip('/')}/{one.called}"
        return self.model_copy(
            update={
                "teacher": one.alone(),
                "teachers": [],
                "warmup": self.warmup if one.called == self.warmup_teacher else None,
                "kd": self.kd.model_copy(update=own),
                "targets": self.targets.model_copy(update={"dir": folder}),
            }
        )

    @model_validator(mode="after")
    def _check_teachers(self) -> Config:
        names = [one.called for one in self.teachers]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"teachers: two are called {twice}: give one of them another id")
        if self.teachers and self.teacher is not None:
            raise ValueError("teacher and teachers exclude each other: move teacher into the list")
        if self.warmup is not None and self.warmup.teacher not in (None, *names):
            named = ", ".join(names) or "none"
            raise ValueError(f"warmup.teacher: {self.warmup.teacher} is none of teachers ({named})")
        if len(names) > 1 and self.targets.source == "auto":
            raise ValueError("targets: auto decides for one teacher: set targets: live, or cached")
        if self.kd.teacher_dropping is not None and sum(one.losses is not None for one in self.teachers) < 2:
            raise ValueError("kd.teacher_dropping needs at least two teachers with losses of their own")
        if any(isinstance(loss, RecordedLoss) for loss in self.losses):
            return self  # a run that began; what such a loss teaches is not known
        if self.teachers and self.stage == "distill":
            self._check_ensemble()
        for one in self.teachers:
            for loss in one.losses or ():
                if not loss.teaches:
                    raise ValueError(
                        f"teachers: {one.called}: the loss {loss.name} learns from no teacher: move it to "
                        "kd.losses"
                    )
            if one.pairs is not None and not any("features" in loss.reads for loss in one.losses or ()):
                raise ValueError(
                    f"teachers: {one.called}: pairs are for losses of its own on feature maps, and it has "
                    "none: remove pairs, or give it such losses"
                )
        return self

    def _check_ensemble(self) -> None:
        """Check that `kd.losses` and the teachers without losses of their own need each other."""
        members = [one.called for one in self.teachers if one.losses is None]
        taught = [loss for loss in self.kd.losses if loss.teaches]
        if taught and not members:
            raise ValueError(
                f"kd.losses: {taught[0].name} learns from teachers without losses of their own, and there is "
                "none: list it under the losses of a teacher, or give one no losses"
            )
        idle = [name for name in members if name != self.warmup_teacher]
        if not taught and idle:
            raise ValueError(
                f"teachers: {idle[0]} teaches nothing, as no loss in kd.losses learns from a teacher: give "
                "it losses, or remove it"
            )
        own = [(one.called, loss) for one in self.teachers for loss in one.losses or ()]
        if self.kd.teacher_dropping is not None:
            for name, loss in own:
                if not loss.by_sample:
                    raise ValueError(
                        f"kd.teacher_dropping: the loss {loss.name} of {name} has no value for each image, "
                        "as feature has: remove the loss, or teacher_dropping"
                    )
        for loss in taught:
            if len(members) > 1 and loss.teaches != {"logits"}:
                raise ValueError(
                    f"kd.losses: {loss.name} needs more than logits, which is all that the ensemble of "
                    f"{', '.join(members)} has: list it under the losses of a teacher"
                )

    @model_validator(mode="after")
    def _check_compile(self) -> Config:
        if self.compile and self.engine is not None and self.engine.name == "deepspeed":
            raise ValueError("compile: true does not work with engine: deepspeed: remove one of them")
        if self.compile and any(one.teacher and one.teacher.shard for one in self.by_teacher.values()):
            raise ValueError(
                "compile: true needs the whole teacher on every process: remove compile or teacher.shard"
            )
        return self

    @model_validator(mode="after")
    def _check_frozen_layers(self) -> Config:
        if self.warmup is not None and "layer_decay_no_opt_scale" in self.optimizer.kwargs:
            raise ValueError(
                "optimizer.kwargs.layer_decay_no_opt_scale freezes the first layers, which warmup trains: "
                "remove one of them"
            )
        return self

    @model_validator(mode="after")
    def _check_without_classes(self) -> Config:
        if not self.data.num_classes and (problem := _what_needs_classes(self)):
            raise ValueError(problem)
        return self

    @model_validator(mode="after")
    def _networks_where_needed(self) -> Config:
        losses = self.losses
        if not losses:
            raise ValueError("kd.losses: is empty: name at least one loss")
        if self.stage == "heads":
            if self.teacher is None:
                raise ValueError("stage: heads needs one teacher: add the section teacher")
            unused = [key for key in ("student", "warmup") if getattr(self, key) is not None]
            supervised = all(not loss.teaches and loss.reads <= {"logits", "labels"} for loss in losses)
            if unused or not supervised or self.evaluate.on_bank or self.teacher.heads:
                keys = [f"evaluate.{key}" for key in self.evaluate.on_bank or ["retrieval"]]
                rest = f"kd.losses other than ce, {', '.join(keys)} and teacher.heads"
                what = unused[0] if unused else rest
                raise ValueError(f"stage: heads trains classifiers on the teacher alone: remove {what}")
            if self.teacher.shard:
                raise ValueError(
                    "stage: heads needs the whole teacher on every process: remove teacher.shard"
                )
            if self.grad_checkpointing:
                raise ValueError(
                    "grad_checkpointing is for a student, and stage: heads trains none: remove it"
                )
        elif self.student is None:
            raise ValueError("student: missing: add the section student, with the name of a timm model")
        elif not self.has_teacher:
            if self.warmup is not None:
                raise ValueError("warmup needs a teacher: add the section teacher, or remove warmup")
            for loss in losses:
                if loss.teaches:
                    raise ValueError(
                        f"kd.losses: {loss.name} needs a teacher: add the section teacher, or use ce"
                    )
        for one in self.by_teacher.values():
            for loss in one.losses:
                if one.teacher is not None and one.teacher.heads is None and "heads" in loss.teaches:
                    raise ValueError(
                        f"kd.losses: {loss.name} needs teacher.heads, the heads.safetensors of a run with "
                        "stage: heads"
                    )
        return self

    @model_validator(mode="after")
    def _check_sizes(self) -> Config:
        has_heads = self.stage == "heads" or any(
            one.teacher and one.teacher.heads for one in self.by_teacher.values()
        )
        if has_heads and isinstance(self.data.image_size, Progressive):
            raise ValueError(
                "data.image_size: intermediate classifiers (stage: heads, teacher.heads) take images of one "
                "size: set one number"
            )
        return self

    @model_validator(mode="after")
    def _check_heads(self) -> Config:
        for name, one in {"": self, **self.by_teacher}.items():
            for role, section in (("student", one.student), ("teacher", one.teacher)):
                if section is not None and section.num_classes == 0 and (problem := head_problem(one, role)):
                    raise ValueError(f"teachers: {name}: {problem}" if name else problem)
        return self

    @model_validator(mode="after")
    def _whole_labels(self) -> Config:
        for loss in self.losses:
            if self.kd.mixing and loss.whole_labels:
                raise ValueError(
                    f"kd.losses: {loss.name} reads the class of each sample, kd.mix mixes them: remove one"
                )
        return self

    @model_validator(mode="after")
    def _check_targets(self) -> Config:
        if self.targets.top_k is not None and self.targets.top_k > self.data.num_classes:
            raise ValueError(
                f"targets.top_k is larger than data.num_classes ({self.data.num_classes}): lower top_k"
            )
        if self.targets.source == "cached" and (reason := why_not_stored(self)):
            raise ValueError(f"targets: cached: {reason}, or set targets: live")
        return self

    @model_validator(mode="after")
    def _check_evaluation(self) -> Config:
        if self.evaluate.every is not None and self.data.eval is None:
            raise ValueError("evaluate.every needs shards to evaluate on: set data.eval")
        for key in self.evaluate.on_bank:
            if self.data.eval is None:
                raise ValueError(f"evaluate.{key} needs query shards: set data.eval")
            if self.data.access == "stream" and self.evaluate.bank is None:
                raise ValueError(
                    f"evaluate.{key} needs the training set by index: set data.access: index, or name shards "
                    "in evaluate.bank"
                )
        return self


def head_problem(config: Config, role: str) -> str | None:
    """Return what needs the classifier that the student or the teacher lacks; None if nothing does."""
    if config.stage == "heads":
        return "stage: heads needs a teacher with a classifier: use weights that have one"
    for loss in config.losses:
        wanted = loss.reads if role == "student" else loss.teaches
        if wanted & {"logits", "token", "heads"}:
            return (
                f"kd.losses: {loss.name} reads the {role}'s logits, but this {role} has no classifier "
                f"({role}.num_classes: 0, or weights without one): remove the loss, or use another {role}"
            )
    return None


def label_reader(config: Config) -> str | None:
    """Return what reads the labels of the training images, by its key; None if nothing does."""
    for loss in config.losses:
        if "labels" in loss.reads:
            return f"kd.losses: {loss.name}"
    if config.warmup is not None and config.warmup.prune.criterion == "taylor":
        return "warmup.prune.criterion: taylor"
    return None


def _what_needs_classes(config: Config) -> str | None:
    """Return why a config cannot have `data.num_classes: 0`, with the remedy; None if it can."""
    remedy = "set it to the number of classes"
    if config.stage == "heads":
        return f"stage: heads trains classifiers, and data.num_classes: 0 has no classes: {remedy}"
    if reader := label_reader(config):
        return (
            f"{reader} reads labels, and data.num_classes: 0 says that the images have none: use one that "
            f"reads none, or, if they have labels, {remedy}"
        )
    for loss in config.losses:
        if (loss.reads | loss.teaches) & {"logits", "token"}:
            return (
                f"kd.losses: {loss.name} reads logits, and with data.num_classes: 0 no network has a "
                "classifier: set it to the number of the teacher's classes; the images need no labels for "
                "this loss"
            )
    if config.targets.top_k is not None:
        return "targets.top_k stores probabilities of classes, and data.num_classes: 0 has none: remove it"
    for name, one in config.data.eval_sets.items():
        if one.label_map is not None and not config.evaluate.on_bank:
            return (
                f"{eval_key(name)}.label_map translates labels, and with data.num_classes: 0 nothing reads "
                "them: remove it, or set evaluate.knn"
            )
    return None


def why_not_stored(config: Config) -> str | None:
    """Return why a run's targets cannot be stored, with the remedy; None if they can."""
    warmup = config.warmup
    if config.stage == "heads" or not config.has_teacher:
        return "there are no targets without a teacher and a student: add both sections"
    if config.data.augment.views is None:
        return "data.augment.views, the number of views of each sample, is missing: set it"
    if config.data.access == "stream":
        return "data.access: stream has no sample ids to store targets by: set data.access: index"
    if warmup is not None and warmup.prune.mode == "paper_bn":
        return "warmup.prune.mode: paper_bn depends on the batch: set it to slice"
    if warmup is not None and warmup.curriculum == "auto":
        return "warmup.curriculum: auto decides during the run which targets a step reads: choose another"
    return None


# Keys that may change between two starts of the same run: they change how it runs, not what it computes.
OPERATIONAL_KEYS = (
    "run_dir",
    "mirror",
    "max_hours",
    "max_bad_steps",
    "collective_timeout_minutes",
    "grad_checkpointing",
    "checkpoint",
    "log",
    "profile",
    "trackers",
    "data.root",
    "data.label.map",
    "data.cache_dir",
    "data.cache_bytes",
    "data.workers",
    "data.max_image_pixels",
    "evaluate",
    "teacher.shard",
    "machine",
    "targets.dir",
)
# Keys that earlier versions did not have, with the value that stands for what these did. With it they are no
# part of a run's identity, so that runs and stored targets of these versions still load.
LATER_KEYS: dict[str, Any] = {
    "data.repeats": 1,
    "teachers": [],
    "kd.ensemble": "probabilities",
    "kd.teacher_dropping": None,
    "warmup.teacher": None,
    "warmup.at_most": None,
    "data.label": None,
    "student.num_classes": None,
    "teacher.num_classes": None,
    "teacher.image_size": None,
    "data.augment.vertical_flip": 0.0,
    "data.augment.auto_augment": None,
    "data.augment.augmix": None,
    "data.augment.grayscale": 0.0,
    "data.augment.blur": 0.0,
}
# Keys that may differ between the nodes of a run.
NODE_KEYS = ("data.root", "data.cache_dir", "data.cache_bytes", "data.workers")


def flatten(config: Config, without: Collection[str] | None = None) -> dict[str, Any]:
    """Return the values of a config by dotted key, except for the keys `without` and the secrets of URLs.

    With None, the operational keys are left out: what remains defines the computation.
    """
    if without is None:
        # Exact stored targets and a live teacher compute the same run; rounded targets compute another one.
        without = OPERATIONAL_KEYS if config.targets.lossy else (*OPERATIONAL_KEYS, "targets.source")

    def walk(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
        key = re.sub(r"^teachers\.\d+", "teacher", prefix)
        if key in without or (key in LATER_KEYS and value == LATER_KEYS[key]):
            return
        if prefix == "teachers":
            value = {str(i): one for i, one in enumerate(value)}
        if isinstance(value, dict) and value:
            for key, child in value.items():
                yield from walk(f"{prefix}.{key}" if prefix else key, child)
        elif isinstance(value, list):
            yield prefix, [redacted(item) if isinstance(item, str) else item for item in value]
        else:
            yield prefix, redacted(value) if isinstance(value, str) else value

    return dict(walk("", config.model_dump(mode="json")))


def fingerprint(config: Config) -> str:
    """Return the SHA-256 of `flatten(config)`, equal for configs that compute the same run."""
    return _hash(flatten(config))


def earlier_fingerprint(config: Config) -> str:
    """Return the fingerprint that checkpoints of earlier versions contain, to which `evaluate` belonged."""
    evaluation = config.evaluate.model_dump(mode="json", include={"every", "retrieval", "similarity_samples"})
    return _hash(flatten(config) | {f"evaluate.{key}": value for key, value in evaluation.items()})


def _hash(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def difference(old: Config, new: Config) -> str | None:
    """Return the first key in which two runs differ, as `key: old -> new`; None if they compute the same."""
    before = flatten(old)
    after = flatten(new)
    for key in sorted(before.keys() | after.keys()):
        if before.get(key) != after.get(key):
            old_value, new_value = (values.get(key, LATER_KEYS.get(key)) for values in (before, after))
            return f"{key}: {old_value} -> {new_value}"
    return None


def input_size(settings: Config) -> tuple[int, int, int]:
    """Return the shape [C, H, W] of the student's input at full size; the teacher's is resized from it."""
    return (3, settings.data.full_size, settings.data.full_size)
