"""The sections of a config except `data`: models, training, targets, engine and machine.

The comment of each key is its description in docs/configuration.md.
"""

from __future__ import annotations

import os
import re
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from indistill.config import plugins
from indistill.config.base import Duration, File, Folder, FromSection, Probability, Section, nearest
from indistill.config.data import Images, Pixels
from indistill.config.loss import AnyLoss, Loss

# --- models -------------------------------------------------------------------------------------------------
# YAML reads a bare no as false.
Precision = Annotated[
    Literal["no", "bf16", "fp16"], BeforeValidator(lambda value: "no" if value is False else value)
]


def _with_home(name: str) -> str:
    kind, colon, folder = name.partition(":")
    return f"{kind}{colon}{os.path.expanduser(folder)}" if kind == "local-dir" else name


class Model(Section):
    # Name of a timm model, or `local-dir:FOLDER`, the folder of an export.
    name: Annotated[str, AfterValidator(_with_home)]
    # Start from timm's pretrained weights, from the Hugging Face Hub or its local cache.
    pretrained: bool = False
    # File with the model's weights: `.safetensors`, or `.pt`, read with `weights_only`. None: no file.
    checkpoint: File | None = None
    # 0: a network without a classifier, which gives embeddings and feature maps, but no logits. None: its
    # classifier has data.num_classes outputs, or its pretrained weights have none.
    num_classes: Literal[0] | None = None
    # Further arguments of `timm.create_model`, except those that name files or choose other weights.
    kwargs: dict[str, Any] = {}
    # Mean of the input per channel, with pixels in [0, 1]; None: as in timm's `pretrained_cfg`.
    mean: tuple[float, float, float] | None = None
    # Standard deviation of the input per channel; set it together with `mean`. None: as in timm's
    # `pretrained_cfg`.
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] | None = None

    @model_validator(mode="after")
    def _check_weights(self) -> Model:
        if self.checkpoint == "":  # as of a shell variable that is not set
            raise ValueError("checkpoint is empty: name a file, or set null for none")
        if self.pretrained and self.checkpoint:
            raise ValueError("pretrained and checkpoint exclude each other: keep one")
        if (self.mean is None) != (self.std is None):
            raise ValueError("mean and std belong together: set both or neither")
        return self


class Teacher(Model):
    # Height and width of the teacher's input, in pixels: it sees the student's view of each image, resized on
    # the device (bicubic). None: `data.image_size` for a teacher with a classifier; for one without, the size
    # that timm's `pretrained_cfg` names, rounded down to whole patches.
    image_size: Pixels | None = None
    # File `heads.safetensors` of a run with `stage: heads`, for the loss `dih`. None: no intermediate
    # classifiers.
    heads: File | None = None
    precision: Precision | None = None  # Precision of the teacher's forward pass; None: `mixed_precision`.
    # Shard the teacher's weights over all ranks (FSDP2) and gather them block by block, for a teacher that
    # does not fit a GPU. Targets do not change, so a run may resume with another value. On one process it has
    # no effect.
    shard: bool = False
    # Allow a teacher with random weights, as a control experiment; requires `pretrained: false`.
    random: bool = False

    @model_validator(mode="after")
    def _has_weights(self) -> Teacher:
        if self.random and (self.pretrained or self.checkpoint):
            raise ValueError("random: true excludes pretrained: true and checkpoint: keep one")
        if not (self.random or self.pretrained or self.checkpoint):
            raise ValueError(
                f"{self.name} has no weights: set pretrained: true or checkpoint: FILE; for a random "
                "teacher, as a control, set random: true and pretrained: false"
            )
        return self


def _folder_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name):
        raise ValueError(
            f"{name!r} cannot name a folder: begin with a letter or digit, and use at most 64 letters, "
            "digits, ., _ and -"
        )
    return name


class OneTeacher(Teacher):
    """One of several teachers, and what the student learns from it."""

    # What messages, log and folders call it; None: the name of the timm model.
    id: Annotated[str, AfterValidator(_folder_name)] | None = None
    # Factor of its losses. Without losses of its own: its weight in the mean of `kd.ensemble`.
    weight: PositiveFloat = 1.0
    # Losses that compare the student with this teacher alone. None: it is one of those whose mean `kd.losses`
    # are given.
    losses: Annotated[list[AnyLoss], Field(min_length=1)] | None = None
    # Pairs [teacher stage, student stage] for its losses on feature maps, like `kd.pairs`.
    pairs: Literal["auto"] | list[tuple[int, int]] | None = None

    @property
    def called(self) -> str:
        """`id`, or what the timm model is called."""
        return self.id or re.sub(r"[^\w.-]", "_", self.name.rstrip("/").rpartition("/")[2], flags=re.ASCII)

    def alone(self) -> Teacher:
        """The section of a run that has this teacher alone."""
        return Teacher.model_construct(**{key: getattr(self, key) for key in Teacher.model_fields})


class Heads(Section):
    """Linear classifiers that `stage: heads` trains on stages of the frozen teacher (arXiv 2103.00497)."""

    # Stages that get a classifier, as indices into timm's `feature_info`; `auto`: those that a warm-up would
    # choose.
    stages: Literal["auto"] | list[int] = "auto"
    # Average-pool maps that are larger to this many pixels a side before the classifier; 7 for instance at
    # 224 px, where the first map of a ResNet is 200,000 inputs. None: classify the full map, as published for
    # 32 px.
    pool: Pixels | None = None


# --- training -----------------------------------------------------------------------------------------------
class Optimizer(Section):
    """Arguments of `timm.optim.create_optimizer_v2`. An argument that would have no effect is an error."""

    name: str = "sgd"  # Name of a timm optimizer.
    lr: PositiveFloat  # Base learning rate, which `schedule` changes over a phase.
    # Weight decay. Biases, normalisation layers, position embeddings and class tokens are exempt.
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    momentum: float = 0.9  # Momentum, of optimizers that have it.
    # Further arguments of the optimizer: betas, eps, nesterov, and so on. `layer_decay` multiplies the
    # learning rate of each layer by this factor once for every layer behind it.
    kwargs: dict[str, Any] = {}


class Schedule(Section):
    """Learning rate over one phase. Durations count from the start of the phase."""

    # Shape of the schedule: `cosine` falls to min_lr at the end of the phase, `step` and `multistep` decay by
    # decay_rate.
    name: Literal["constant", "cosine", "step", "multistep"] = "constant"
    warmup: Duration = 0  # Length of the linear increase from warmup_lr; 0: none.
    warmup_lr: Annotated[float, Field(ge=0)] = 0.0  # Learning rate of the first step, if `warmup` is set.
    min_lr: Annotated[float, Field(ge=0)] = 0.0  # Learning rate at the end of `cosine`.
    decay_every: Duration = "30 epochs"  # Time between two decays of `step`.
    decay_at: list[Duration] = []  # Times of the decays of `multistep`.
    decay_rate: PositiveFloat = 0.1  # Factor of the learning rate at each decay of `step` and `multistep`.


class PhaseTraining(Section):
    """Training settings of a phase; None inherits `optimizer.lr` and `schedule`."""

    # Base learning rate of the warm-up, or a list with one per pair (not with `all_at_once`, which has one
    # phase); None: `optimizer.lr`.
    lr: PositiveFloat | list[PositiveFloat] | None = None
    schedule: Schedule | None = None  # Learning rate schedule of these phases; None: `schedule` of the run.
    # When momentum and second moments are reset: never, at the start of each phase, or also at every epoch.
    reset_optimizer: Literal["never", "start", "epoch"] = "never"


class Prune(Section):
    """Which channels of the teacher's maps are taught: the most important, as many as the student has."""

    # Importance of a channel. `l1`, `l2`: norm of its filters; `bn_scale`: scale in its batch norm;
    # `activation`: mean absolute activation; `taylor`: first-order Taylor term of the loss; `random`: a
    # control experiment.
    criterion: Literal["l1", "l2", "bn_scale", "activation", "taylor", "random"] = "l1"
    # Number of batches of `data.train` on which `activation` and `taylor` are computed.
    batches: PositiveInt = 8
    # `slice`: the targets are the kept channels of the teacher's map. `paper_bn`: they are normalised with
    # the batch's statistics, as in the code published with the paper (plain conv-bn stages only).
    mode: Literal["slice", "paper_bn"] = "slice"


class Auto(Section):
    """When `curriculum: auto` moves on to the next pair: once the loss of a pair has stopped falling."""

    window: Duration = "0.25 epochs"  # Length of the windows over which the loss is averaged.
    # Number of windows in a row without enough improvement after which the pair ends.
    patience: PositiveInt = 3
    # Smallest improvement that counts, as a fraction of the lowest mean so far.
    tolerance: PositiveFloat = 0.01


class Warmup(PhaseTraining):
    """InDistill's warm-up: the student learns the teacher's pruned feature maps (arXiv 2205.10003)."""

    # Pairs [teacher stage, student stage], as indices into timm's `feature_info`, shallow to deep. `auto`
    # pairs stages of equal reduction (stride), at most four.
    pairs: Literal["auto"] | list[tuple[int, int]] = "auto"
    # `all_at_once`: all pairs for the whole warm-up; `sequential`: one pair at a time, shallow to deep, as in
    # the paper; `cumulative`: pair i together with all shallower ones; `reversed`: one at a time, deep to
    # shallow; `auto`: sequential, each pair until its loss stops falling.
    curriculum: Literal["all_at_once", "sequential", "cumulative", "reversed", "auto"] = "all_at_once"
    # Pair i, counted from 0, has alpha + 1 + i epochs; `all_at_once` trains all pairs for the sum.
    alpha: Annotated[int, Field(ge=0)] = 2
    # Longest warm-up by `alpha`: all pairs are shortened by one factor to fit. None: no limit.
    at_most: Duration | None = "20 percent"
    # Which of `teachers` teaches it, by its id; None: the first.
    teacher: str | None = None
    # Duration of each pair, instead of `alpha` and `at_most`; 0 skips a pair. With `curriculum: auto` the
    # longest it may take. None: by `alpha`.
    durations: list[Duration] | None = None
    auto: Auto = Auto()  # When a pair ends under `curriculum: auto`.
    # Layer on a student map that is wider than the teacher's; `none`: such a pair is an error, `conv1x1`: a
    # trained 1x1 convolution to the teacher's width.
    adapter: Literal["none", "conv1x1"] = "none"
    prune: Prune = Prune()  # How the channels of the teacher's maps are selected.

    @model_validator(mode="before")
    @classmethod
    def _limit_alpha_alone(cls, values: Any) -> Any:
        """Unset `at_most` beside `durations`, where it has no effect: the identity of a run is without it."""
        if isinstance(values, dict) and values.get("durations") is not None:
            return values | {"at_most": None}
        return values


class Mix(Section):
    """Mixup and CutMix of neighbours in the sample order, each image with coefficients of its own.

    As in timm's mode `elem`. The teacher sees the same mixed images as the student.
    """

    mixup: Annotated[float, Field(ge=0)] = 0.0  # Alpha of mixup; 0: no mixup.
    cutmix: Annotated[float, Field(ge=0)] = 0.0  # Alpha of CutMix; 0: no CutMix.
    prob: Probability = 1.0  # Probability that an image is mixed.
    switch_prob: Probability = 0.5  # Probability of CutMix instead of mixup, where both are used.


def _cross_entropy() -> list[Loss]:
    return [plugins.find("ce")(name="ce")]


class KD(PhaseTraining):
    """The phase after the warm-up, to the end of the run; without a teacher, supervised training."""

    lr: PositiveFloat | None = None  # Base learning rate of this phase; None: `optimizer.lr`.
    # Losses of this phase; their weighted sum is minimised (docs/losses.md). The list may be empty if
    # `teachers` have losses.
    losses: list[AnyLoss] = Field(default_factory=_cross_entropy)
    # What `kd.losses` are given of several teachers without losses of their own. `probabilities`: the
    # logarithm of the mean of their probabilities; `logits`: the mean of their logits.
    ensemble: Literal["probabilities", "logits"] = "probabilities"
    # Teacher dropping (arXiv 2408.05088), for several teachers whose losses are all `feature`: an image does
    # without a teacher with this probability, except for the one with the largest loss. The mean over what is
    # left is then minimised, not the sum over the teachers. The draws depend on the step and on the process,
    # as those of dropout. None: no dropping.
    teacher_dropping: Probability | None = None
    # Pairs [teacher stage, student stage] for losses on feature maps; `auto` as in warmup.pairs. None:
    # `warmup.pairs` if there is a warm-up, else auto.
    pairs: Literal["auto"] | list[tuple[int, int]] | None = None
    # Samples that losses which compare samples see: those of all ranks (`global`) or of each rank alone
    # (`local`). `auto`: global, unless the comparison has more than 2^24 entries (4,096 samples in pairs, 256
    # in triplets).
    relational_scope: Literal["auto", "global", "local"] = "auto"
    mix: Mix | None = None  # Mixup and CutMix; None: neither.

    @property
    def mixing(self) -> Mix | None:
        """`mix`, if it mixes anything."""
        return self.mix if self.mix and (self.mix.mixup or self.mix.cutmix) else None


class Targets(Section):
    """Where the teacher's outputs come from. Stored targets are exact unless `top_k` or `features` is set."""

    # `live`: run the teacher on every batch; `cached`: read what `indistill targets` stored; `auto`: in each
    # phase what `indistill plan` estimates to be cheaper.
    source: Literal["live", "cached", "auto"] = "live"
    # Folder of the stored targets; for training also a URL. None: `run_dir`/targets.
    dir: Folder | None = None
    # Store only this many largest probabilities of each sample. None: all logits, in float32.
    top_k: PositiveInt | None = None
    # Format of stored feature maps; `int8` has a scale for each sample and channel.
    features: Literal["float32", "bf16", "int8"] = "float32"
    # Average-pool feature maps that are larger to this many pixels a side, live and stored alike, which
    # changes what the student learns. None: full maps.
    pool: Pixels | None = None

    @property
    def lossy(self) -> bool:
        """Whether stored targets differ from the teacher's outputs."""
        return self.top_k is not None or self.features != "float32"


class Ema(Section):
    """timm's ModelEmaV3: a moving average of the student's weights."""

    decay: Annotated[float, Field(gt=0, lt=1)] = 0.9999  # Weight of the previous average at each step.
    warmup: bool = True  # Increase the decay gradually to its value, for short runs.


class Knn(Section):
    """Classification by the nearest neighbours of the embedding in the bank, as DINO's.

    Each neighbour votes for its class with the weight exp(cosine / temperature).
    """

    k: PositiveInt = 20  # Number of neighbours.
    temperature: PositiveFloat = 0.07  # Lower values give the nearest ones more weight.


class LinearProbe(Section):
    """Logistic regression on the frozen embeddings of the bank, each dimension standardised.

    It minimises the mean cross-entropy plus l2 / 2 times the sum of the squared weights, the bias apart.
    """

    # Candidates for l2. The one with the best top-1 on a fifth of the bank, of several the largest, is fitted
    # again on the whole bank.
    l2: Annotated[list[PositiveFloat], Field(min_length=1)] = [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0]


class Evaluate(Section):
    """Evaluation on `data.eval`: accuracy, and how similar the stages of student and teacher are."""

    every: Duration | None = None  # Time between two evaluations; None: only at the end of the run.
    batch: Images = 256  # Images per rank in a forward pass.
    # At the end, also compute the mAP of the embeddings, with `data.eval` as queries and the bank as
    # database.
    retrieval: bool = False
    # At each evaluation, also classify by the nearest neighbours in the bank, `{}` with its defaults; None:
    # not used. Each time, the student computes the embeddings of the whole bank.
    knn: Knn | None = None
    # At the end, also train a linear classifier on the embeddings of the bank, `{}` with its defaults; None:
    # not used.
    linear_probe: LinearProbe | None = None
    # Labelled shards, like `data.train`, that are the bank of knn, linear_probe and retrieval; they are never
    # augmented. None: the training set.
    bank: str | list[str] | None = None
    # Number of images of `data.eval`, of its first set, on which teacher and student stages are compared
    # (CKA, information flow); 0: no comparison.
    similarity_samples: Annotated[int, Field(ge=0)] = 512

    @property
    def on_bank(self) -> list[str]:
        """The keys of the evaluations that are on, and read a bank."""
        return [key for key in ("knn", "linear_probe", "retrieval") if getattr(self, key)]


class Checkpoint(Section):
    """When checkpoints are saved and which are kept. Preemption and the end of the run always save one."""

    # Optimizer steps between two checkpoints; None: no checkpoints by steps.
    every_steps: PositiveInt | None = 1000
    # Also save this many minutes after the last checkpoint, at the next logged step; None: not by time.
    every_minutes: PositiveFloat | None = None
    keep_last: PositiveInt = 2  # Number of the newest checkpoints that are kept.
    # Number of the checkpoints with the highest top-1 on `data.eval` that are kept besides, of a student
    # without classifier the highest top-1 of `evaluate.knn`; 0: save none for its score.
    keep_best: Annotated[int, Field(ge=0)] = 1


class Log(Section):
    """The log of a run, `metrics.jsonl`."""

    every_steps: PositiveInt = 50  # Optimizer steps between two logged lines.


class Profile(FromSection):
    """Steps that torch.profiler records on each rank, into the folder `profile` of `run_dir`."""

    # Completed steps of the run before the first one that is recorded. The first of a phase are slower.
    from_: int = Field(alias="from", default=100, ge=0)
    # Number of steps that are recorded. The trace of one has some 10,000 events or more.
    steps: int = Field(default=5, ge=1, le=100)

    @property
    def recorded(self) -> range:
        """The recorded steps, from 0."""
        return range(self.from_, self.from_ + self.steps)


TRACKERS = ("aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb")
ONE_RUN_TRACKERS = {"clearml", "comet_ml", "mlflow", "swanlab", "trackio"}  # one run at a time in a process


def _tracker(name: Any) -> Any:
    if name not in TRACKERS:
        raise ValueError(f"unknown tracker {name!r}; the nearest valid one is {nearest(name, TRACKERS)[0]!r}")
    return name


Tracker = Annotated[str, BeforeValidator(_tracker)]
"""A tracker, by the name that Accelerate gives it."""


class DDP(Section):
    """DistributedDataParallel: every process holds the whole student and its optimizer state."""

    name: Literal["ddp"]  # Selects this engine.


class DeepSpeed(Section):
    """DeepSpeed ZeRO: partitions the optimizer state (stage 1), the gradients too (2), the weights too (3).

    None takes the value of `config_file` or `accelerate launch`, or else the default that is named here.
    """

    name: Literal["deepspeed"]  # Selects this engine.
    stage: Literal[1, 2, 3] | None = None  # ZeRO stage. Default: 2.
    # `cpu`: keep the optimizer state in host memory, and update there. Default: none.
    offload_optimizer: Literal["none", "cpu"] | None = None
    # `cpu`: keep the weights in host memory; requires stage 3. Default: none.
    offload_parameters: Literal["none", "cpu"] | None = None
    # Number of elements that are reduced at once. Default: 5e7, which are 200 MB.
    reduce_bucket_size: PositiveInt | None = None
    # Number of elements that stages 1 and 2 gather at once. Default: 5e7.
    allgather_bucket_size: PositiveInt | None = None
    # Number of elements that stage 3 prefetches. Default: 5e7.
    prefetch_bucket_size: PositiveInt | None = None
    # DeepSpeed JSON, or file of `accelerate config`; where both it and this section set a value, they must
    # agree.
    config_file: File | None = None

    @model_validator(mode="after")
    def _check_offload(self) -> DeepSpeed:
        if self.offload_parameters == "cpu" and self.stage in (1, 2):
            raise ValueError(
                f"offload_parameters: cpu needs stage 3, this is {self.stage}: set stage: 3, or remove "
                "offload_parameters"
            )
        return self


Engine = Annotated[DDP | DeepSpeed, Field(discriminator="name")]


class Machine(Section):
    """The hardware that `indistill plan` and `targets.source: auto` assume; by default a node of 8 H100.

    Bandwidths are those of large messages, in one direction; docs/scaling.md gives the sources of all values.
    """

    # Sustained operations per second of a device, in the run's precision. The default is a tenth of an H100's
    # peak in bf16, which convolutional networks reach; transformers reach three times as much.
    flops_per_second: PositiveFloat = 100e12
    memory_bytes: PositiveFloat = 80e9  # Memory of a device, in bytes.
    # Devices in a node, and the number of processes that `indistill plan` assumes without `--world`.
    devices_per_node: PositiveInt = 8
    intra_node_bytes_per_second: PositiveFloat = 300e9  # Bandwidth of a device within a node (NVLink).
    # Bandwidth of a device to other nodes; the default is one 400 Gbit/s adapter for each.
    inter_node_bytes_per_second: PositiveFloat = 40e9
    latency_seconds: Annotated[float, Field(ge=0)] = 5e-6  # Latency of each hop of a ring all-reduce.
    overlap: Probability = 0.8  # Fraction of the communication that can overlap with the backward pass.
    # Images that a loader worker decodes per second (benchmarks/results/loader_epyc.md).
    decode_images_per_second: PositiveFloat = 470.0
    read_bytes_per_second: PositiveFloat = 5e9  # Bandwidth of a node to the storage of cached targets.
