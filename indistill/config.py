"""The configuration: one typed, frozen tree, read from YAML with `key.sub=value` overrides.

A mistake is found here, before a model or a device is touched, and reported in one line with the file and the key.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import re
from collections.abc import Collection
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)


class UserError(Exception):
    """A mistake that the user can mend: the command line prints it as one line and exits with code 2."""

    found_by_one_rank = False  # else every rank raises it, and rank 0 speaks for all


_DURATION = re.compile(r"(\d+\.?\d*(?:e[+-]?\d+)?|\.\d+)\s*(epochs?|steps?|samples?|percent|%)?", re.IGNORECASE)


def to_steps(
    duration: str | int | float, steps_per_epoch: int, global_batch: int, total_steps: int | None = None
) -> int:
    """A duration in optimizer steps, rounded to the nearest, halves up.

    Accepts "3 epochs", "1000 steps", "1e6 samples", "10 percent" or "10%" (of `total_steps`), each also with a fraction
    or in the singular; a bare number means epochs. Raises ValueError, naming the text, for anything else.
    """
    match = _DURATION.fullmatch(str(duration).strip())
    if match is None:
        raise ValueError(
            f"duration {duration!r} is not understood; write a number of epochs, or a number and a unit: "
            "'3 epochs', '1000 steps', '1e6 samples', '10 percent', '10%'"
        )
    amount = Fraction(match[1])  # exact: 0.29 of 100 steps are 29, not 28.999...
    unit = (match[2] or "epoch").lower().removesuffix("s")
    if unit in ("percent", "%"):
        if total_steps is None:
            raise ValueError(
                f"duration {duration!r} is a share of the run, whose length is not known here; use another unit"
            )
        steps = amount * total_steps / 100
    else:
        steps = amount * {"epoch": steps_per_epoch, "step": 1, "sample": Fraction(1, global_batch)}[unit]
    return math.floor(steps + Fraction(1, 2))


def _duration(value: Any) -> Any:
    to_steps(value, steps_per_epoch=1, global_batch=1, total_steps=1)  # understood, or a ValueError that says why
    return value


def _run_length(value: str | int | float) -> str | int | float:
    to_steps(value, steps_per_epoch=1, global_batch=1)  # a share of the run is refused here
    return value


Duration = Annotated[str | int | float, BeforeValidator(_duration)]
"""`"3 epochs"`, `"500 steps"`, `"1e6 samples"`, `"10 percent"` of the run; a bare number counts epochs."""


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_keys(cls, values: Any) -> Any:
        if isinstance(values, dict):
            for key in values:
                if key not in cls.model_fields:
                    nearest = difflib.get_close_matches(str(key), cls.model_fields, n=1, cutoff=0.0)
                    raise ValueError(f"unknown key {key!r}; the nearest valid key is {nearest[0]!r}")
        return values


# --- data ------------------------------------------------------------------------------------------------------------


Probability = Annotated[float, Field(ge=0, le=1)]
MAX_RAND_AUGMENT_OPS = 4


class RandAugment(Section):
    """timm's `rand-m{magnitude}-n{num_ops}-mstd{mstd}-p{probability}-inc1`, by data.interpolation."""

    magnitude: Annotated[float, Field(ge=0, le=10)] = 9  # how strong the operations are
    num_ops: Annotated[int, Field(ge=1, le=MAX_RAND_AUGMENT_OPS)] = 2  # drawn for an image, with replacement
    mstd: Annotated[float, Field(ge=0)] = 0.0  # standard deviation of the magnitude
    probability: Probability = 0.5  # of each operation drawn


class ColorJitter(Section):
    """torchvision's ColorJitter: factors within 1 -+ these, the hue shifted by at most +-hue of a turn."""

    brightness: Annotated[float, Field(ge=0)] = 0.4  # factors of 1 -+ this
    contrast: Annotated[float, Field(ge=0)] = 0.4  # factors of 1 -+ this
    saturation: Annotated[float, Field(ge=0)] = 0.4  # factors of 1 -+ this
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.0  # shift of at most +-this, in turns


class RandomErasing(Section):
    """timm's RandomErasing of one rectangle."""

    probability: Probability = 0.25  # of an image
    scale: tuple[PositiveFloat, PositiveFloat] = (0.02, 1 / 3)  # area fraction
    ratio: tuple[PositiveFloat, PositiveFloat] = (0.3, 1 / 0.3)  # height / width
    fill: Literal["random", "mean"] = "random"  # ImageNet's noise per pixel, or mean colour; timm's pixel and const

    @model_validator(mode="after")
    def _ranges(self) -> RandomErasing:
        return _with_ranges(self)


class Augment(Section):
    """Training augmentation; evaluation resizes and crops as data.eval_interpolation and data.eval_crop say.

    In this order: recipe, flip, rand_augment, color_jitter, random_erasing.
    """

    # none: as in evaluation; pad_crop: a crop of the image with a border; random_resized_crop: as for ImageNet.
    recipe: Literal["none", "pad_crop", "random_resized_crop"] = "random_resized_crop"
    flip: bool = True  # left to right, every second image
    padding: PositiveInt = 4  # pixels, for pad_crop
    scale: tuple[PositiveFloat, PositiveFloat] = (0.08, 1.0)  # area fraction, for random_resized_crop
    ratio: tuple[PositiveFloat, PositiveFloat] = (3 / 4, 4 / 3)  # width / height, for random_resized_crop

    rand_augment: RandAugment | None = None  # None: not at all; {}: with its defaults
    color_jitter: ColorJitter | None = None  # None: not at all; {}: with its defaults
    random_erasing: RandomErasing | None = None  # None: not at all; {}: with its defaults

    # So many views of each sample, over and over: that of an epoch is epoch % views. None: a new one every epoch.
    views: PositiveInt | None = None

    @model_validator(mode="after")
    def _ranges(self) -> Augment:
        return _with_ranges(self)


def _with_ranges(section: Any) -> Any:
    if not (section.scale[0] <= section.scale[1] <= 1 and section.ratio[0] <= section.ratio[1]):
        raise ValueError("scale and ratio are ranges [smallest, largest], scale within 0 and 1")
    return section


class Data(Section):
    train: str | list[str]  # shards of the training set: paths or URLs; braces and * expand
    eval: str | list[str] | None = None  # shards to evaluate on; None: no scores
    root: str | None = None  # folder or URL that relative shard paths begin with
    num_classes: PositiveInt  # labels are 0 to num_classes - 1; both networks' heads have to fit
    image_size: PositiveInt = 224  # pixels, what both networks see
    global_batch: PositiveInt  # samples per optimizer step, over all ranks and accumulation steps
    streams: PositiveInt = 64  # parts of the order: the world size divides it, and it divides global_batch
    window: PositiveInt | None = None  # samples shuffled together within a stream; None: order.py's default
    access: Literal["index", "stream"] = "index"  # stream: plain WebDataset, for what cannot be sought (stream.py)
    epoch_samples: PositiveInt | None = None  # samples of an epoch, for stream, which has no index to count by
    shuffle_buffer: PositiveInt = 5000  # samples, for stream
    in_memory: bool = False  # decode once and keep: for small images
    cache_dir: str | None = None  # of indices and remote shards: a local disk; None: indices lie beside the shards
    cache_bytes: PositiveFloat = 200e9  # of remote shards, per node
    allow_pipe: bool = False  # let pipe: URLs run their commands
    max_bad_fraction: Annotated[float, Field(ge=0, le=1)] = 0.001  # of undecodable images that the run puts up with
    workers: Annotated[int, Field(ge=0)] = 4  # loader processes per rank
    augment: Augment = Augment()  # of training images
    # How training images are resized, as timm does: random draws one of the two for each image (and for each turn,
    # shear or shift of rand_augment).
    interpolation: Literal["bilinear", "bicubic", "random"] = "bilinear"
    # In evaluation. auto: as timm's record says (pretrained_cfg) of the student if it begins with weights, else of the
    # teacher, else of the student. `indistill eval CONFIG NAME` takes that of NAME.
    eval_interpolation: Literal["auto", "bilinear", "bicubic"] = "auto"
    # Centre crop as a fraction of the resized shorter side. auto: likewise, with timm's crop_mode.
    eval_crop: Annotated[float, Field(gt=0, le=1)] | Literal["auto"] = "auto"

    @model_validator(mode="after")
    def _stream_needs(self) -> Data:
        if self.access == "stream" and (self.epoch_samples is None or self.in_memory):
            raise ValueError("access: stream needs epoch_samples (how many samples make an epoch) and no in_memory")
        return self


# --- models ----------------------------------------------------------------------------------------------------------


# YAML reads a bare no as false.
Precision = Annotated[Literal["no", "bf16", "fp16"], BeforeValidator(lambda value: "no" if value is False else value)]


class Model(Section):
    name: str  # any timm model
    pretrained: bool = False  # begin with timm's weights, from the Hugging Face Hub or its cache
    checkpoint: str | None = None  # local .safetensors, or .pt read with weights_only
    kwargs: dict[str, Any] = {}  # passed on to timm.create_model
    mean: tuple[float, float, float] | None = None  # input normalisation in [0, 1] units; None: timm's own
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] | None = None  # likewise; both or neither

    @model_validator(mode="after")
    def _one_source_of_weights(self) -> Model:
        if self.pretrained and self.checkpoint:
            raise ValueError("pretrained and checkpoint exclude each other: keep one")
        if (self.mean is None) != (self.std is None):
            raise ValueError("mean and std belong together: give both or neither")
        return self


class Teacher(Model):
    heads: str | None = None  # heads.safetensors of a run with stage: heads
    precision: Precision | None = None  # its own; None: mixed_precision
    # Its weights cut over all processes, and gathered block by block as it runs: for one too large for a GPU. The
    # targets are the same, so that a run may go on without; one process holds it whole all the same.
    shard: bool = False
    random: bool = False  # with pretrained: false, a teacher of random weights: a control, never the default

    @model_validator(mode="after")
    def _has_weights(self) -> Teacher:
        if self.random and (self.pretrained or self.checkpoint):
            raise ValueError("random: true excludes pretrained: true and checkpoint: keep one")
        if not (self.random or self.pretrained or self.checkpoint):
            raise ValueError(
                f"{self.name} has no weights: set pretrained: true or checkpoint: FILE; a random teacher, as a "
                "control, needs random: true beside pretrained: false"
            )
        return self


class Heads(Section):
    """What `stage: heads` trains on the frozen teacher: a linear classifier per stage (arXiv 2103.00497)."""

    stages: Literal["auto"] | list[int] = "auto"  # indices into timm's feature_info; auto: those a warm-up would take
    # Each head reads the whole map, as published for 32 px images. At 224 px that is 200,000 inputs after the first
    # stage of a ResNet: pool averages maps that are larger than this many pixels a side.
    pool: PositiveInt | None = None


# --- training --------------------------------------------------------------------------------------------------------


class Optimizer(Section):
    """Arguments of `timm.optim.create_optimizer_v2`; one that would have no effect is refused."""

    name: str = "sgd"  # any timm optimizer
    lr: PositiveFloat  # learning rate, before the schedule
    weight_decay: Annotated[float, Field(ge=0)] = 0.0  # not of biases, norms, positions and class tokens
    momentum: float = 0.9  # of optimizers that have one
    # Passed on: betas, eps, nesterov, ..., and layer_decay, by which each layer's rate is that of the next, times this.
    kwargs: dict[str, Any] = {}


class Schedule(Section):
    """Learning rate over one phase; every count is an optimizer step since the phase began."""

    name: Literal["constant", "cosine", "step", "multistep"] = "constant"  # how the rate changes after its warm-up
    warmup: Duration = 0  # of the rate: linear, from warmup_lr
    warmup_lr: Annotated[float, Field(ge=0)] = 0.0  # rate of the first step, where there is a warm-up of the rate
    min_lr: Annotated[float, Field(ge=0)] = 0.0  # where cosine ends
    decay_every: Duration = "30 epochs"  # for step: the rate is multiplied by decay_rate each time
    decay_at: list[Duration] = []  # for multistep: the rate is multiplied by decay_rate at each
    decay_rate: PositiveFloat = 0.1  # for step and multistep


class PhaseTraining(Section):
    """What a phase may set for itself; None inherits `optimizer.lr` and `schedule`."""

    lr: PositiveFloat | None = None  # of these phases; None: optimizer.lr
    schedule: Schedule | None = None  # of these phases; None: the run's schedule
    reset_optimizer: Literal["never", "start", "epoch"] = "never"  # when momentum and second moments are dropped


class Prune(Section):
    # Importance of a channel: norm of its filters (l1, l2), scale of its batch norm, mean absolute activation and
    # first-order Taylor term on calibration batches, or chance (a control).
    criterion: Literal["l1", "l2", "bn_scale", "activation", "taylor", "random"] = "l1"
    batches: PositiveInt = 8  # calibration batches of data.train, for activation and taylor
    # slice: the exact channels of the teacher's map. paper_bn: the published code's variant (prune.py).
    mode: Literal["slice", "paper_bn"] = "slice"


class Auto(Section):
    """When `curriculum: auto` moves on to the next pair: see `curriculum.flattened`."""

    window: Duration = "0.25 epochs"  # over which losses are averaged
    patience: PositiveInt = 3  # windows that have to bring less than the tolerance
    tolerance: PositiveFloat = 0.01  # the fraction of its lowest mean by which a loss has to fall, not to be flat


class Warmup(PhaseTraining):
    # (teacher stage, student stage) by index into timm's feature_info; auto matches by reduction (stride).
    pairs: Literal["auto"] | list[tuple[int, int]] = "auto"
    # sequential: one pair at a time, shallow to deep, as in the paper; cumulative: all pairs up to that; reversed: deep
    # to shallow; all_at_once: every pair, for as long; auto: sequential, each until its loss has flattened.
    curriculum: Literal["sequential", "cumulative", "reversed", "all_at_once", "auto"] = "sequential"
    alpha: Annotated[int, Field(ge=0)] = 2  # pair i lasts alpha + 1 + i epochs
    durations: list[Duration] | None = None  # one per pair, instead of alpha; with curriculum: auto, at most
    auto: Auto = Auto()  # for curriculum: auto
    lr: PositiveFloat | list[PositiveFloat] | None = None  # of the warm-up, or a list: one per pair; None: optimizer.lr
    adapter: Literal["none", "conv1x1"] = "none"  # conv1x1 lifts a student map that is wider than the teacher's
    prune: Prune = Prune()  # which channels of the teacher's maps are taught


# Each loss says what it reads of the student. docs/losses.md has the published settings beside these defaults.


class CrossEntropy(Section):
    reads: ClassVar[set[str]] = {"logits"}
    name: Literal["ce"]  # which loss this is
    weight: float = 1.0  # in the sum of losses
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0  # share of the label spread over all classes


class KDLoss(Section):
    reads: ClassVar[set[str]] = {"logits"}
    name: Literal["kd"]  # which loss this is
    weight: float = 1.0  # in the sum of losses
    temperature: PositiveFloat = 4.0  # of both softmaxes
    standardize: bool = False  # logit standardisation (arXiv 2403.01427)


class DISTLoss(Section):
    reads: ClassVar[set[str]] = {"logits"}
    name: Literal["dist"]  # which loss this is
    weight: float = 1.0  # in the sum of losses
    beta: float = 1.0  # of the relations within a sample
    gamma: float = 1.0  # of those within a class
    temperature: PositiveFloat = 1.0  # of both softmaxes


class DKDLoss(Section):
    reads: ClassVar[set[str]] = {"logits"}
    name: Literal["dkd"]  # which loss this is
    weight: float = 1.0  # in the sum of losses
    alpha: float = 1.0  # of the target class
    beta: float = 8.0  # of the others
    temperature: PositiveFloat = 4.0  # of both softmaxes


class CohortLoss(Section):
    """Co-teaching by the teacher and its intermediate classifier heads: needs `teacher.heads`."""

    reads: ClassVar[set[str]] = {"logits"}
    name: Literal["dih"]  # which loss this is
    weight: float = 1.0  # in the sum of losses
    alpha: Probability = 0.1  # of the teaching, beside cross-entropy
    temperature: PositiveFloat = 5.0  # of all softmaxes
    weights: list[float] | None = None  # of the teacher, then of each head, shallow to deep; None: 1 each


class TokenLoss(Section):
    """Distillation token of a student such as deit_tiny_distilled_patch16_224; `ce` then trains its class token."""

    reads: ClassVar[set[str]] = {"logits", "token"}
    name: Literal["token"]  # which loss this is
    weight: float = 1.0  # in the sum of losses
    mode: Literal["hard", "soft"] = "hard"  # the teacher's class as a label, or its softened probabilities
    temperature: PositiveFloat = 1.0  # for soft


Kernel = Literal["cosine", "student_t", "rbf", "combined"]
Divergence = Literal["kl", "jeffreys"]


class PKTLoss(Section):
    reads: ClassVar[set[str]] = {"embedding"}
    name: Literal["pkt"]  # which loss this is
    weight: float = 1.0  # in the sum of losses
    kernel: Kernel = "combined"  # how alike two samples are; combined: the sum of cosine and student_t
    divergence: Divergence = "jeffreys"  # of the two networks' similarities; jeffreys: kl in both directions
    # batch: times the number of samples that are compared; without it, gradients shrink as that number grows.
    scale: Literal["none", "batch"] = "none"


class InformationFlowLoss(Section):
    """PKT on the embedding, and on every pair of `kd.pairs` with weight init * decay^epoch."""

    reads: ClassVar[set[str]] = {"embedding", "features"}
    name: Literal["information_flow"]  # which loss this is
    weight: float = 1.0  # in the sum of losses
    init: Annotated[float, Field(ge=0)] = 100.0  # weight of each pair at first, beside 1 for the embedding
    decay: Annotated[float, Field(ge=0, le=1)] = 0.7  # by which that weight is multiplied every epoch
    kernel: Kernel = "combined"  # how alike two samples are; combined: the sum of cosine and student_t
    divergence: Divergence = "jeffreys"  # of the two networks' similarities; jeffreys: kl in both directions
    # batch: times the number of samples that are compared; without it, gradients shrink as that number grows.
    scale: Literal["none", "batch"] = "none"


class RKDLoss(Section):
    reads: ClassVar[set[str]] = {"embedding"}
    name: Literal["rkd"]  # which loss this is
    weight: float = 1.0  # in the sum of losses
    distance_weight: float = 25.0  # of the distances of two samples
    angle_weight: float = 50.0  # of the angles of three


class CRDLoss(Section):
    reads: ClassVar[set[str]] = {"embedding"}
    name: Literal["crd"]  # which loss this is
    weight: float = 0.8  # in the sum of losses
    dim: PositiveInt = 128  # of the space where student and teacher meet
    temperature: PositiveFloat = 0.07  # that inner products are divided by


class SPLoss(Section):
    reads: ClassVar[set[str]] = {"features"}
    name: Literal["sp"]  # which loss this is
    weight: float = 3000.0  # in the sum of losses


class ATLoss(Section):
    reads: ClassVar[set[str]] = {"features"}
    name: Literal["at"]  # which loss this is
    weight: float = 1000.0  # in the sum of losses


class MapLoss(Section):
    """On every pair of `kd.pairs`, through trained layers (projectors.py) from the student's maps to the teacher's."""

    reads: ClassVar[set[str]] = {"features"}
    name: Literal["hint", "vid", "reviewkd"]  # which loss this is
    weight: float = 1.0  # in the sum of losses


Loss = Annotated[
    CrossEntropy
    | KDLoss
    | DISTLoss
    | DKDLoss
    | CohortLoss
    | TokenLoss
    | PKTLoss
    | InformationFlowLoss
    | RKDLoss
    | CRDLoss
    | SPLoss
    | ATLoss
    | MapLoss,
    Field(discriminator="name"),
]


class Mix(Section):
    """timm's Mixup; the teacher sees the same mixed images as the student."""

    mixup: Annotated[float, Field(ge=0)] = 0.0  # alpha of mixup; 0: none
    cutmix: Annotated[float, Field(ge=0)] = 0.0  # alpha of CutMix; 0: none
    prob: Annotated[float, Field(ge=0, le=1)] = 1.0  # that a batch is mixed
    switch_prob: Annotated[float, Field(ge=0, le=1)] = 0.5  # that it is by CutMix, where both are on


class KD(PhaseTraining):
    """The rest of the run after the warm-up; without a teacher it is plain supervised training."""

    losses: Annotated[list[Loss], Field(min_length=1)] = [CrossEntropy(name="ce")]  # whose weighted sum is minimised
    # For losses on feature maps: (teacher stage, student stage). None: those of the warm-up, or else auto.
    pairs: Literal["auto"] | list[tuple[int, int]] | None = None
    # Losses that compare the samples of a batch see those of all ranks (global) or of their own (local); auto: global
    # unless the gathered matrix is large (relational.py).
    relational_scope: Literal["auto", "global", "local"] = "auto"
    mix: Mix | None = None  # mixup and CutMix; None: neither


class Targets(Section):
    """Where the teacher's outputs come from: from it, on every batch, or from what `indistill targets` stored.

    What is stored is exact unless `top_k` or `features` say otherwise.
    """

    # live: the teacher; cached: what is stored; auto: in each phase what `indistill plan` finds cheaper.
    source: Literal["live", "cached", "auto"] = "live"
    dir: str | None = None  # of the stored ones; for training also a URL. None: run_dir/targets
    top_k: PositiveInt | None = None  # the largest probabilities of each sample; None: all logits, float32
    features: Literal["float32", "bf16", "int8"] = "float32"  # how maps are stored; int8: a scale per sample, channel
    # Maps of more than so many pixels a side are averaged to that, live as well as stored: it changes what they teach.
    pool: PositiveInt | None = None

    @property
    def lossy(self) -> bool:
        return self.top_k is not None or self.features != "float32"


class Ema(Section):
    decay: Annotated[float, Field(gt=0, lt=1)] = 0.9999  # of what was averaged before, at every step
    warmup: bool = True  # ramp the decay up, so that short runs profit too


class Evaluate(Section):
    every: Duration | None = None  # how often; None: at the end only
    batch: PositiveInt = 256  # per rank
    retrieval: bool = False  # at the end: mAP of the embeddings, queries = data.eval, database = data.train
    # Of data.eval, on which each teacher and student stage are compared (CKA, information flow); 0: not at all.
    similarity_samples: Annotated[int, Field(ge=0)] = 512


class Checkpoint(Section):
    every_steps: PositiveInt | None = 1000  # None: not by steps; the end, a best score and preemption have their own
    every_minutes: PositiveFloat | None = None  # also so often, at the next logged line
    keep_last: PositiveInt = 2  # how many of the newest stay
    keep_best: Annotated[int, Field(ge=0)] = 1  # how many of the best by top-1 on data.eval stay too


class Log(Section):
    every_steps: PositiveInt = 50  # a line of metrics.jsonl


TRACKERS = ("aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb")
ONE_RUN_TRACKERS = {"clearml", "comet_ml", "mlflow", "swanlab", "trackio"}  # in a process, at a time


def _tracker(name: Any) -> Any:
    if name not in TRACKERS:
        nearest = difflib.get_close_matches(str(name), TRACKERS, n=1, cutoff=0.0)
        raise ValueError(f"unknown tracker {name!r}; the nearest valid one is {nearest[0]!r}")
    return name


Tracker = Annotated[str, BeforeValidator(_tracker)]
"""The name by which Accelerate knows it."""


class DDP(Section):
    """Every process holds the whole student and its optimizer's state."""

    name: Literal["ddp"]  # which engine this is


class DeepSpeed(Section):
    """ZeRO: the processes share out the optimizer's state (stage 1), the gradients too (2), the weights too (3).

    None leaves a key to `config_file` or `accelerate launch`, or else to the default named.
    """

    name: Literal["deepspeed"]  # which engine this is
    stage: Literal[1, 2, 3] | None = None  # what is shared out; 2
    offload_optimizer: Literal["none", "cpu"] | None = None  # cpu: state and update in host memory; none
    offload_parameters: Literal["none", "cpu"] | None = None  # cpu: weights in host memory, of stage 3; none
    reduce_bucket_size: PositiveInt | None = None  # elements reduced at once; 5e7, which is 200 MB
    allgather_bucket_size: PositiveInt | None = None  # elements gathered at once, stages 1 and 2; 5e7
    prefetch_bucket_size: PositiveInt | None = None  # elements fetched ahead, stage 3; 5e7
    config_file: str | None = None  # a DeepSpeed JSON or a file of `accelerate config`; what both set must agree

    @model_validator(mode="after")
    def _parameters_of_stage_3(self) -> DeepSpeed:
        if self.offload_parameters == "cpu" and self.stage in (1, 2):
            raise ValueError(f"offload_parameters: cpu needs stage 3, this is {self.stage}: set stage: 3, or remove it")
        return self


Engine = Annotated[DDP | DeepSpeed, Field(discriminator="name")]


class Machine(Section):
    """What `indistill plan` and `targets.source: auto` reckon with; by default a node of 8 H100 (docs/scaling.md).

    Bandwidths are what a stream of large messages gets, in one direction.
    """

    # Sustained by a device in the run's precision. 100e12 is a tenth of an H100's peak in bf16, what convolutional
    # networks get; transformers get three times as much.
    flops_per_second: PositiveFloat = 100e12
    memory_bytes: PositiveFloat = 80e9  # of a device
    devices_per_node: PositiveInt = 8  # also how many processes `plan` reckons with, without --world
    intra_node_bytes_per_second: PositiveFloat = 300e9  # of a device: NVLink
    inter_node_bytes_per_second: PositiveFloat = 40e9  # a device's share of the node's network: one of 400 Gbit/s each
    latency_seconds: Annotated[float, Field(ge=0)] = 5e-6  # of each hop around a ring
    overlap: Probability = 0.8  # of a step's communication, what the backward pass can hide
    decode_images_per_second: PositiveFloat = 470.0  # by one loader worker (benchmarks/results/loader.md)
    read_bytes_per_second: PositiveFloat = 5e9  # by a node, of the storage of cached targets


class Config(Section):
    run_dir: str  # where all that the run writes goes; on a file system that all its nodes see
    stage: Literal["distill", "heads"] = "distill"  # heads: train classifiers on a frozen teacher's stages
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0  # of first weights, order, augmentation and dropout
    duration: Annotated[Duration, AfterValidator(_run_length)]  # the whole run, warm-up included
    data: Data  # what is trained and evaluated on
    student: Model | None = None  # what is trained; needed unless stage: heads
    teacher: Teacher | None = None  # what teaches it; None: supervised training
    heads: Heads = Heads()  # for stage: heads
    warmup: Warmup | None = None  # InDistill's; None: none, KD from the first step
    kd: KD = KD()  # all that follows
    # Where the teacher's outputs come from. A bare word is the source: `targets: cached`.
    targets: Annotated[Targets, BeforeValidator(lambda x: {"source": x} if isinstance(x, str) else x)] = Targets()
    optimizer: Optimizer  # of all phases
    schedule: Schedule = Schedule()  # of the learning rate, over each phase: each pair's of the warm-up, and KD
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
    engine: Engine | None = None  # how the processes share the training; None: as `accelerate launch` says, else ddp
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
            raise ValueError("compile: true needs the whole teacher on every process: remove it, or teacher.shard")
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
        names = [loss.name for loss in self.kd.losses]
        if self.stage == "heads":
            if self.teacher is None:
                raise ValueError("stage: heads needs a teacher: add the section teacher")
            unused = [key for key in ("student", "warmup") if getattr(self, key) is not None]
            if unused or set(names) != {"ce"} or self.evaluate.retrieval or self.teacher.heads:
                what = unused[0] if unused else "kd.losses other than ce, evaluate.retrieval and teacher.heads"
                raise ValueError(f"stage: heads trains classifiers on the teacher alone: remove {what}")
            if self.teacher.shard:
                raise ValueError("stage: heads needs the whole teacher on every process: remove teacher.shard")
        elif self.student is None:
            raise ValueError("student: missing: add the section student, with the name of a timm model")
        elif self.teacher is None:
            if self.warmup is not None:
                raise ValueError("warmup needs a teacher: add the section teacher, or remove warmup")
            for name in names:
                if name != "ce":
                    raise ValueError(f"kd.losses: {name} needs a teacher: add the section teacher, or use ce")
        elif "dih" in names and self.teacher.heads is None:
            raise ValueError("kd.losses: dih needs teacher.heads, the heads.safetensors of a run with stage: heads")
        return self

    @model_validator(mode="after")
    def _whole_labels(self) -> Config:
        mixed = self.kd.mix is not None and (self.kd.mix.mixup or self.kd.mix.cutmix)
        for loss in self.kd.losses:
            if mixed and loss.name in ("dkd", "crd"):
                raise ValueError(
                    f"kd.losses: {loss.name} reads the class of each sample, kd.mix mixes them: remove one"
                )
        return self

    @model_validator(mode="after")
    def _targets_that_can_be_stored(self) -> Config:
        if self.targets.top_k is not None and self.targets.top_k > self.data.num_classes:
            raise ValueError(f"targets.top_k is larger than data.num_classes ({self.data.num_classes}): lower it")
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


def load(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Read a YAML file and apply `a.b=c` overrides (the value is YAML; a number indexes a list).

    Raises UserError, in one line, for a missing or malformed file and for any unknown or ill-typed key.
    """
    tree = read(path, overrides)
    for kind in ("stages", "students"):
        if kind in tree:
            raise UserError(f"{path} has several {kind}: give the config.yaml in the run directory of one instead")
    return parse(tree, source=" ".join([str(path), *overrides]))


def read(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> dict[str, Any]:
    """The plain tree that `load` parses, of any keys."""
    try:
        tree = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected a mapping of keys at the top level")
    for override in overrides:
        _apply_override(tree, override)
    return tree


def parse(tree: dict[str, Any], source: str) -> Config:
    """Validate a plain tree; `source` names it in error messages."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        keys, message = _first_mistake(error, tree)
        raise UserError(f"{source}: {'.'.join(keys) + ': ' if keys else ''}{message}") from None


def _first_mistake(error: ValidationError, tree: dict[str, Any]) -> tuple[list[str], str]:
    """Where it is and what. Of a union's branches the one that read on the furthest says it."""
    mistakes = [(_keys(e, tree), e["msg"].removeprefix("Value error, ")) for e in error.errors(include_url=False)]
    first = mistakes[0][0]
    return max((m for m in mistakes if m[0][: len(first)] == first), key=lambda mistake: len(mistake[0]))


def _keys(error: Any, tree: Any) -> list[str]:
    """The keys in pydantic's location of an error, which also names the branches of unions."""
    keys = []
    for part in error["loc"]:
        if (isinstance(tree, dict) and part in tree) or (isinstance(tree, list) and part in range(len(tree))):
            keys.append(str(part))
            tree = tree[part]
    return [*keys, str(error["loc"][-1])] if error["type"] == "missing" else keys


def _apply_override(tree: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        raise UserError(f"override {override!r}: expected key.sub=value")
    *parents, last = dotted.split(".")
    node: Any = tree
    try:
        value = yaml.safe_load(text)
        for part, following in zip(parents, [*parents[1:], last]):
            if isinstance(node, dict) and node.get(part) is None:
                if following.isdecimal():
                    raise KeyError(part)  # of a list that is not there
                node[part] = {}
            node = node[int(part) if isinstance(node, list) else part]
        node[int(last) if isinstance(node, list) else last] = value
    except yaml.YAMLError:
        raise UserError(f"override {override!r}: the value is not valid YAML") from None
    except (TypeError, ValueError, IndexError, KeyError):
        raise UserError(f"override {override!r}: {dotted} does not lead to a key of the config") from None


def dump(config: Config) -> str:
    """The whole config as YAML, defaults included; `parse` reads it back to an equal config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


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
