"""The configuration: one typed, frozen tree, read from YAML with `key.sub=value` overrides.

A mistake is found here, before a model or a device is touched, and reported in one line with the file and the key.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, PositiveFloat, PositiveInt, model_validator

from indistill.config.base import Duration, Section, run_length
from indistill.config.sections import (
    KD,
    Checkpoint,
    Data,
    Ema,
    Engine,
    Evaluate,
    Heads,
    Log,
    Machine,
    Model,
    Optimizer,
    Precision,
    Schedule,
    Targets,
    Teacher,
    Tracker,
    Warmup,
)


# --- training --------------------------------------------------------------------------------------------------------
class Config(Section):
    run_dir: str  # where all that the run writes goes; on a file system that all its nodes see
    stage: Literal["distill", "heads"] = "distill"  # heads: train classifiers on a frozen teacher's stages
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0  # of first weights, order, augmentation and dropout
    duration: Annotated[Duration, AfterValidator(run_length)]  # the whole run, warm-up included
    data: Data  # what is trained and evaluated on
    student: Model | None = None  # what is trained; needed unless stage: heads
    teacher: Teacher | None = None  # what teaches it; None: supervised training
    heads: Heads = Heads()  # for stage: heads
    warmup: Warmup | None = None  # InDistill's; None: none, KD from the first step
    kd: KD = Field(default_factory=KD)  # all that follows
    # Where the teacher's outputs come from. A bare word is the source: `targets: cached`.
    targets: Annotated[Targets, BeforeValidator(lambda x: {"source": x} if isinstance(x, str) else x)] = (
        Targets()
    )
    optimizer: Optimizer  # of all phases
    schedule: Schedule = (
        Schedule()
    )  # of the learning rate, over each phase: each pair's of the warm-up, and KD
    max_hours: PositiveFloat | None = None  # of one start: then a checkpoint, and exit code 75
    # How many steps in a row the run puts up with, each left out for a loss or gradient that is not finite.
    max_bad_steps: Annotated[int, Field(ge=0)] = 20
    # How long ranks wait for each other: then they leave, with exit code 75. After half of it the slow one is named.
    collective_timeout_minutes: PositiveFloat = 30.0
    mixed_precision: Precision = "no"  # autocast of both networks; no: float32
    compile: bool = False  # torch.compile for both networks: minutes at the start of each phase, faster steps
    grad_accumulation: PositiveInt = 1  # micro-batches of a step: less memory, the same global_batch
    clip_grad_norm: PositiveFloat | None = None  # gradients are scaled down to this norm; None: not at all
    sync_batchnorm: bool = False  # the student's batch statistics over all ranks; GPUs only
    engine: Engine | None = (
        None  # how the processes share the training; None: as `accelerate launch` says, else ddp
    )
    ema: Ema | None = None  # a moving average of the student, which is then what is evaluated; None: none
    evaluate: Evaluate = Evaluate()  # when, and by what
    checkpoint: Checkpoint = Checkpoint()  # when, and how many stay
    log: Log = Log()  # how often
    # Those of Accelerate, by name, beside metrics.jsonl; each needs its package, named alike.
    trackers: list[Tracker] = ["tensorboard"]
    machine: Machine = Machine()  # for `indistill plan`; changes no run, but for targets: auto

    @model_validator(mode="after")
    def _compiled_where_it_can_be(self) -> Config:
        if self.compile and self.engine is not None and self.engine.name == "deepspeed":
            raise ValueError("compile: true works with engine: ddp: remove one")
        if self.compile and self.teacher is not None and self.teacher.shard:
            raise ValueError(
                "compile: true needs the whole teacher on every process: remove it, or teacher.shard"
            )
        return self

    @model_validator(mode="after")
    def _layers_that_train(self) -> Config:
        if self.warmup is not None and "layer_decay_no_opt_scale" in self.optimizer.kwargs:
            raise ValueError(
                "optimizer.kwargs.layer_decay_no_opt_scale freezes the first layers, which warmup trains: remove one"
            )
        return self

    @model_validator(mode="after")
    def _networks_where_needed(self) -> Config:
        losses = self.kd.losses
        if self.stage == "heads":
            if self.teacher is None:
                raise ValueError("stage: heads needs a teacher: add the section teacher")
            unused = [key for key in ("student", "warmup") if getattr(self, key) is not None]
            supervised = all(not loss.teaches and loss.reads <= {"logits", "labels"} for loss in losses)
            if unused or not supervised or self.evaluate.retrieval or self.teacher.heads:
                what = (
                    unused[0] if unused else "kd.losses other than ce, evaluate.retrieval and teacher.heads"
                )
                raise ValueError(f"stage: heads trains classifiers on the teacher alone: remove {what}")
            if self.teacher.shard:
                raise ValueError(
                    "stage: heads needs the whole teacher on every process: remove teacher.shard"
                )
        elif self.student is None:
            raise ValueError("student: missing: add the section student, with the name of a timm model")
        elif self.teacher is None:
            if self.warmup is not None:
                raise ValueError("warmup needs a teacher: add the section teacher, or remove warmup")
            for loss in losses:
                if loss.teaches:
                    raise ValueError(f"kd.losses: {loss.name} needs a teacher: add the section teacher, or use ce")
        elif self.teacher.heads is None:
            for loss in losses:
                if "heads" in loss.teaches:
                    raise ValueError(
                        f"kd.losses: {loss.name} needs teacher.heads, the heads.safetensors of a run with stage: heads"
                    )
        return self

    @model_validator(mode="after")
    def _whole_labels(self) -> Config:
        mixed = self.kd.mix is not None and (self.kd.mix.mixup or self.kd.mix.cutmix)
        for loss in self.kd.losses:
            if mixed and loss.whole_labels:
                raise ValueError(
                    f"kd.losses: {loss.name} reads the class of each sample, kd.mix mixes them: remove one"
                )
        return self

    @model_validator(mode="after")
    def _targets_that_can_be_stored(self) -> Config:
        if self.targets.top_k is not None and self.targets.top_k > self.data.num_classes:
            raise ValueError(
                f"targets.top_k is larger than data.num_classes ({self.data.num_classes}): lower it"
            )
        if self.targets.source == "cached" and (reason := why_not_stored(self)):
            raise ValueError(f"targets: cached: {reason}, or set targets: live")
        return self

    @model_validator(mode="after")
    def _data_where_needed(self) -> Config:
        if self.evaluate.every is not None and self.data.eval is None:
            raise ValueError("evaluate.every needs shards to evaluate on: set data.eval")
        if self.evaluate.retrieval and self.data.eval is None:
            raise ValueError("evaluate.retrieval needs query shards: set data.eval")
        if self.evaluate.retrieval and self.data.access == "stream":
            raise ValueError("evaluate.retrieval needs the training set by index: set data.access: index")
        return self


def why_not_stored(config: Config) -> str | None:
    """Why a run's targets cannot be stored, with the remedy; None if they can."""
    mix, warmup = config.kd.mix, config.warmup
    if config.stage == "heads" or config.teacher is None:
        return "there are none without teacher and student: add the sections"
    if config.data.augment.views is None:
        return "data.augment.views, how many views of each sample there are, is missing: set it"
    if config.data.access == "stream":
        return "data.access: stream has no sample ids to store them by: set it to index"
    if mix is not None and (mix.mixup or mix.cutmix):
        return "kd.mix makes new images at every step: remove it"
    if warmup is not None and warmup.prune.mode == "paper_bn":
        return "warmup.prune.mode: paper_bn depends on the batch: set it to slice"
    if warmup is not None and warmup.curriculum == "auto":
        return "warmup.curriculum: auto does not say ahead which targets a step reads: choose another"
    return None


# Keys that may change between two starts of the same run: they alter how it runs, not what it computes.
OPERATIONAL_KEYS = (
    "run_dir",
    "max_hours",
    "max_bad_steps",
    "collective_timeout_minutes",
    "checkpoint",
    "log",
    "trackers",
    "data.root",
    "data.cache_dir",
    "data.cache_bytes",
    "data.workers",
    "evaluate.batch",
    "teacher.shard",
    "machine",
    "targets.dir",
)
# Keys that may differ between the nodes of a run.
NODE_KEYS = ("data.root", "data.cache_dir", "data.cache_bytes", "data.workers")


def flatten(config: Config, without: Collection[str] | None = None) -> dict[str, Any]:
    """Dotted keys to plain values; without the operational keys (None): what defines the computation."""
    if without is None:
        # A run may go on from stored targets that are exact, or without. From rounded ones it would be another run.
        without = OPERATIONAL_KEYS if config.targets.lossy else (*OPERATIONAL_KEYS, "targets.source")

    def walk(prefix: str, value: Any):
        if prefix in without:
            return
        if isinstance(value, dict) and value:
            for key, child in value.items():
                yield from walk(f"{prefix}.{key}" if prefix else key, child)
        else:
            yield prefix, value

    return dict(walk("", config.model_dump(mode="json")))


def fingerprint(config: Config) -> str:
    """SHA-256 of `flatten`: equal for configs that compute the same run."""
    return hashlib.sha256(json.dumps(flatten(config), sort_keys=True).encode()).hexdigest()


def difference(old: Config, new: Config) -> str | None:
    """The first key in which two configs compute different runs, as `key: old -> new`; None if they do not."""
    before, after = flatten(old), flatten(new)
    for key in sorted(before.keys() | after.keys()):
        if before.get(key) != after.get(key):
            return f"{key}: {before.get(key)} -> {after.get(key)}"
    return None


def input_size(settings: Config) -> tuple[int, int, int]:
    return (3, settings.data.image_size, settings.data.image_size)
