"""The sections of a config: data, models, training, targets, engine and machine."""

from __future__ import annotations

import difflib
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PositiveFloat, PositiveInt, model_validator

from indistill.config import plugins
from indistill.config.base import Duration, Probability, Section
from indistill.config.loss import AnyLoss, Loss

# --- data ------------------------------------------------------------------------------------------------------------
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
    fill: Literal["random", "mean"] = (
        "random"  # ImageNet's noise per pixel, or mean colour; timm's pixel and const
    )

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
    access: Literal["index", "stream"] = (
        "index"  # stream: plain WebDataset, for what cannot be sought (stream.py)
    )
    epoch_samples: PositiveInt | None = (
        None  # samples of an epoch, for stream, which has no index to count by
    )
    shuffle_buffer: PositiveInt = 5000  # samples, for stream
    in_memory: bool = False  # decode once and keep: for small images
    cache_dir: str | None = (
        None  # of indices and remote shards: a local disk; None: indices lie beside the shards
    )
    cache_bytes: PositiveFloat = 200e9  # of remote shards, per node
    allow_pipe: bool = False  # let pipe: URLs run their commands
    max_bad_fraction: Annotated[float, Field(ge=0, le=1)] = (
        0.001  # of undecodable images that the run puts up with
    )
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
            raise ValueError(
                "access: stream needs epoch_samples (how many samples make an epoch) and no in_memory"
            )
        return self


# --- models ----------------------------------------------------------------------------------------------------------
# YAML reads a bare no as false.
Precision = Annotated[
    Literal["no", "bf16", "fp16"], BeforeValidator(lambda value: "no" if value is False else value)
]


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

    stages: Literal["auto"] | list[int] = (
        "auto"  # indices into timm's feature_info; auto: those a warm-up would take
    )
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

    name: Literal["constant", "cosine", "step", "multistep"] = (
        "constant"  # how the rate changes after its warm-up
    )
    warmup: Duration = 0  # of the rate: linear, from warmup_lr
    warmup_lr: Annotated[float, Field(ge=0)] = (
        0.0  # rate of the first step, where there is a warm-up of the rate
    )
    min_lr: Annotated[float, Field(ge=0)] = 0.0  # where cosine ends
    decay_every: Duration = "30 epochs"  # for step: the rate is multiplied by decay_rate each time
    decay_at: list[Duration] = []  # for multistep: the rate is multiplied by decay_rate at each
    decay_rate: PositiveFloat = 0.1  # for step and multistep


class PhaseTraining(Section):
    """What a phase may set for itself; None inherits `optimizer.lr` and `schedule`."""

    lr: PositiveFloat | None = None  # of these phases; None: optimizer.lr
    schedule: Schedule | None = None  # of these phases; None: the run's schedule
    reset_optimizer: Literal["never", "start", "epoch"] = (
        "never"  # when momentum and second moments are dropped
    )


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
    tolerance: PositiveFloat = (
        0.01  # the fraction of its lowest mean by which a loss has to fall, not to be flat
    )


class Warmup(PhaseTraining):
    # (teacher stage, student stage) by index into timm's feature_info; auto matches by reduction (stride).
    pairs: Literal["auto"] | list[tuple[int, int]] = "auto"
    # sequential: one pair at a time, shallow to deep, as in the paper; cumulative: all pairs up to that; reversed: deep
    # to shallow; all_at_once: every pair, for as long; auto: sequential, each until its loss has flattened.
    curriculum: Literal["sequential", "cumulative", "reversed", "all_at_once", "auto"] = "sequential"
    alpha: Annotated[int, Field(ge=0)] = 2  # pair i lasts alpha + 1 + i epochs
    durations: list[Duration] | None = None  # one per pair, instead of alpha; with curriculum: auto, at most
    auto: Auto = Auto()  # for curriculum: auto
    lr: PositiveFloat | list[PositiveFloat] | None = (
        None  # of the warm-up, or a list: one per pair; None: optimizer.lr
    )
    adapter: Literal["none", "conv1x1"] = (
        "none"  # conv1x1 lifts a student map that is wider than the teacher's
    )
    prune: Prune = Prune()  # which channels of the teacher's maps are taught


class Mix(Section):
    """timm's Mixup; the teacher sees the same mixed images as the student."""

    mixup: Annotated[float, Field(ge=0)] = 0.0  # alpha of mixup; 0: none
    cutmix: Annotated[float, Field(ge=0)] = 0.0  # alpha of CutMix; 0: none
    prob: Annotated[float, Field(ge=0, le=1)] = 1.0  # that a batch is mixed
    switch_prob: Annotated[float, Field(ge=0, le=1)] = 0.5  # that it is by CutMix, where both are on


def _cross_entropy() -> list[Loss]:
    return [plugins.find("ce")(name="ce")]


class KD(PhaseTraining):
    """The rest of the run after the warm-up; without a teacher it is plain supervised training."""

    losses: list[AnyLoss] = Field(default_factory=_cross_entropy, min_length=1)  # whose weighted sum is minimised
    # For losses on feature maps: (teacher stage, student stage). None: those of the warm-up, or else auto.
    pairs: Literal["auto"] | list[tuple[int, int]] | None = None
    # Losses that compare the samples of a batch see those of all ranks (global) or of their own (local); auto: global
    # unless the gathered matrix is large (losses/gather.py).
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
    features: Literal["float32", "bf16", "int8"] = (
        "float32"  # how maps are stored; int8: a scale per sample, channel
    )
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
    every_steps: PositiveInt | None = (
        1000  # None: not by steps; the end, a best score and preemption have their own
    )
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
    config_file: str | None = (
        None  # a DeepSpeed JSON or a file of `accelerate config`; what both set must agree
    )

    @model_validator(mode="after")
    def _parameters_of_stage_3(self) -> DeepSpeed:
        if self.offload_parameters == "cpu" and self.stage in (1, 2):
            raise ValueError(
                f"offload_parameters: cpu needs stage 3, this is {self.stage}: set stage: 3, or remove it"
            )
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
    inter_node_bytes_per_second: PositiveFloat = (
        40e9  # a device's share of the node's network: one of 400 Gbit/s each
    )
    latency_seconds: Annotated[float, Field(ge=0)] = 5e-6  # of each hop around a ring
    overlap: Probability = 0.8  # of a step's communication, what the backward pass can hide
    decode_images_per_second: PositiveFloat = 470.0  # by one loader worker (benchmarks/results/loader.md)
    read_bytes_per_second: PositiveFloat = 5e9  # by a node, of the storage of cached targets
