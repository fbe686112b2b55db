"""The section `data` of a config: images, how they are read, and what the networks see of them.

The comment of each key is its description in docs/configuration.md.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from indistill.config.base import Duration, File, Folder, FromSection, Probability, Section, path_or_url
from indistill.config.limits import (
    MAX_BATCH,
    MAX_CLASSES,
    MAX_IMAGE_PIXELS,
    MAX_PIXELS_A_SIDE,
    MAX_STREAMS,
    MAX_WORKERS,
)

Pixels = Annotated[PositiveInt, Field(le=MAX_PIXELS_A_SIDE)]  # a side
SIZE_STEP = 32  # pixels by which progressive resolution grows
Images = Annotated[PositiveInt, Field(le=MAX_BATCH)]  # in a batch
MAX_RAND_AUGMENT_OPS = 4
MAX_AUGMIX = 8  # chains, and operations in a chain


class RandAugment(Section):
    """timm's `rand-m{magnitude}-n{num_ops}-mstd{mstd}-p{probability}-inc1`.

    Rotations, shears and shifts resample by `data.interpolation`.
    """

    magnitude: Annotated[float, Field(ge=0, le=10)] = 9  # Strength of the operations.
    # Number of operations drawn for each image, with replacement.
    num_ops: Annotated[int, Field(ge=1, le=MAX_RAND_AUGMENT_OPS)] = 2
    mstd: Annotated[float, Field(ge=0)] = 0.0  # Standard deviation of the magnitude; 0: always `magnitude`.
    probability: Probability = 0.5  # Probability that a drawn operation is applied.


class AugMix(Section):
    """timm's `augmix-m{magnitude}-w{width}-d{depth}` (arXiv 1912.02781), without its consistency loss."""

    # Largest strength of the operations; that of each is uniform from 0 to this.
    magnitude: Annotated[float, Field(ge=0, le=10)] = 3
    width: Annotated[int, Field(ge=1, le=MAX_AUGMIX)] = 3  # Number of chains of operations that are mixed.
    # Number of operations in each chain; None: 1 to 3, drawn for each chain.
    depth: Annotated[int, Field(ge=1, le=MAX_AUGMIX)] | None = None


class ColorJitter(Section):
    """torchvision's ColorJitter."""

    # Brightness is multiplied by a random factor within 1 ± this.
    brightness: Annotated[float, Field(ge=0)] = 0.4
    # Contrast is multiplied by a random factor within 1 ± this.
    contrast: Annotated[float, Field(ge=0)] = 0.4
    # Saturation is multiplied by a random factor within 1 ± this.
    saturation: Annotated[float, Field(ge=0)] = 0.4
    # The hue is shifted by a random amount within ± this, as a fraction of the colour circle.
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.0


class RandomErasing(Section):
    """timm's RandomErasing of one rectangle."""

    probability: Probability = 0.25  # Probability that an image loses a rectangle.
    # Smallest and largest area of the rectangle, as fractions of the image.
    scale: tuple[PositiveFloat, PositiveFloat] = (0.02, 1 / 3)
    # Smallest and largest aspect ratio of the rectangle, height / width.
    ratio: tuple[PositiveFloat, PositiveFloat] = (0.3, 1 / 0.3)
    # Content of the rectangle. `random`: normal noise in every pixel (timm's `pixel`); `mean`: ImageNet's
    # mean colour (timm's `const`).
    fill: Literal["random", "mean"] = "random"

    @model_validator(mode="after")
    def _check_ranges(self) -> RandomErasing:
        return _with_ranges(self)


class Augment(Section):
    """Augmentation of training images.

    Applied in timm's order: recipe, flip, vertical_flip, then rand_augment, auto_augment or augmix, then
    color_jitter, grayscale, blur, random_erasing. Evaluation does not augment: it resizes and crops by
    `data.eval_interpolation` and `data.eval_crop`.
    """

    # How an image is cropped. `random_resized_crop`: a random part, resized, as usual for ImageNet;
    # `pad_crop`: a random window of the image with a border, as usual for CIFAR; `none`: as in evaluation.
    recipe: Literal["none", "pad_crop", "random_resized_crop"] = "random_resized_crop"
    flip: bool = True  # Flip every image horizontally with probability 0.5.
    padding: Pixels = 4  # Width of the border of `pad_crop`, in pixels.
    # Smallest and largest area of `random_resized_crop`, as fractions of the image.
    scale: tuple[PositiveFloat, PositiveFloat] = (0.08, 1.0)
    # Smallest and largest aspect ratio of `random_resized_crop`, width / height.
    ratio: tuple[PositiveFloat, PositiveFloat] = (3 / 4, 4 / 3)

    vertical_flip: Probability = 0.0  # Probability that an image is flipped vertically.

    rand_augment: RandAugment | None = None  # RandAugment, `{}` with its defaults; None: not used.
    # AutoAugment, with timm's policy of this name. `original`: that of the paper for ImageNet
    # (arXiv 1805.09501); `3a`: grayscale, solarize or Gaussian blur (arXiv 2204.07118), which DeiT III uses
    # with `color_jitter: {brightness: 0.3, contrast: 0.3, saturation: 0.3}`. None: not used.
    auto_augment: Literal["original", "3a"] | None = None
    augmix: AugMix | None = None  # AugMix, `{}` with its defaults; None: not used.
    color_jitter: ColorJitter | None = None  # Colour jitter, `{}` with its defaults; None: not used.
    grayscale: Probability = 0.0  # Probability that an image loses its colours.
    # Probability of a Gaussian blur, with a standard deviation of 0.1 to 2 pixels (Pillow's).
    blur: Probability = 0.0
    # Random erasing, `{}` with its defaults; None: not used.
    random_erasing: RandomErasing | None = None

    # Number of different augmented views of each image; epoch e shows view e modulo this. Set it to store the
    # targets of these views (docs/targets.md). None: a new view in every epoch.
    views: PositiveInt | None = None

    @model_validator(mode="after")
    def _check_ranges(self) -> Augment:
        return _with_ranges(self)

    @model_validator(mode="after")
    def _check_policies(self) -> Augment:
        policies = ("rand_augment", "auto_augment", "augmix")
        if len(used := [key for key in policies if getattr(self, key) is not None]) > 1:
            raise ValueError(f"{' and '.join(used)} exclude each other: keep one of them")
        return self

    @property
    def resizes(self) -> bool:
        """Whether any part reads between pixels, so that `data.interpolation` matters."""
        turns = self.rand_augment is not None or self.auto_augment == "original" or self.augmix is not None
        return turns or self.recipe != "pad_crop"


_Ranged = TypeVar("_Ranged", Augment, RandomErasing)


def _with_ranges(section: _Ranged) -> _Ranged:
    if not (section.scale[0] <= section.scale[1] <= 1 and section.ratio[0] <= section.ratio[1]):
        raise ValueError(
            "scale and ratio are ranges: write [smallest, largest], and for scale fractions of at most 1"
        )
    return section


class Progressive(FromSection):
    """Images that grow during the run (progressive resolution), all of a step to the same size.

    From the start of the run to `until` the size rises in steps of 32 pixels, each for an equal part of that
    time. Evaluation is always at the last size.
    """

    from_: Pixels = Field(alias="from")  # Size at the start of the run, in pixels a side.
    to: Pixels  # Size from `until` on, and in evaluation, in pixels a side.
    until: Duration  # When the last size is reached, from the start of the run.

    @model_validator(mode="after")
    def _check_steps(self) -> Progressive:
        if self.from_ >= self.to or (self.to - self.from_) % SIZE_STEP:
            raise ValueError(
                f"from {self.from_} to {self.to} is not a rise in steps of {SIZE_STEP} pixels: choose from "
                f"smaller than to, by a multiple of {SIZE_STEP}"
            )
        return self


_SET_NAME = re.compile(r"[A-Za-z0-9][\w-]{0,63}", re.ASCII)


class EvalSet(Section):
    """One of several named evaluation sets; a path, URL or list alone is short for its `shards`."""

    shards: str | list[str]  # Its shards: paths or URLs, like `train`.
    # File with the student's class of each label of this set, in the order of these labels: a class per line,
    # by its name in `data.train` or by its label there, or what `shards pack --classes` takes. Only these
    # classes are then candidates. None: the set has the labels of `data.train`.
    label_map: Annotated[str, AfterValidator(path_or_url)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _shards_alone(cls, values: Any) -> Any:
        return {"shards": values} if isinstance(values, str | list) else values


class Label(Section):
    """Where the label of an image is in shards that others made, and what it means."""

    # Which member of a sample has its label: KEY.cls, KEY.json (as img2dataset writes it) or KEY.txt.
    key: Literal["cls", "json", "txt"]
    # Key of the label in the JSON, required by `key: json`; with dots, of mappings in each other.
    field: Annotated[str, Field(min_length=1, max_length=200)] | None = None
    # File with the classes: a name per line in the order of the labels, such as WordNet ids; JSON with the
    # label of each name, where several names may have the same label; or what `shards pack --classes` takes.
    # None: labels are numbers.
    map: Annotated[str, Field(min_length=1), AfterValidator(path_or_url)] | None = None

    @model_validator(mode="after")
    def _check_field(self) -> Label:
        if self.key == "json" and self.field is None:
            raise ValueError("key: json needs field, the key of the label in it: set it")
        if self.key != "json" and self.field is not None:
            raise ValueError(f"field is a key of JSON, and key is {self.key}: remove it, or set key: json")
        return self


class Data(Section):
    """WebDataset shards, how they are read, and what the networks see of each image (docs/data.md)."""

    # Shards of the training set: paths or URLs. Braces (`{000..127}`) expand, and `*` in local paths.
    train: str | list[str]
    # Shards of the evaluation set, like `train`; or several sets by name, `{val: SHARDS, v2: SHARDS}`, whose
    # scores are logged as `val/top1`. The first set decides which checkpoints are the best. None: no
    # evaluation.
    eval: str | list[str] | dict[str, EvalSet] | None = None
    root: Folder | None = None  # Folder or URL that is put before relative shard paths.
    # Number of classes: labels are 0 to num_classes - 1. The heads of both networks must have as many
    # outputs. 0: no network has a classifier, and training reads no labels.
    num_classes: Annotated[NonNegativeInt, Field(le=MAX_CLASSES)]
    # How labels are read, in all sets. None: a number in KEY.cls.
    label: Label | None = None
    # Height and width of the input, in pixels: of both networks, unless `teacher.image_size` says otherwise.
    # `{from: 128, to: 224, until: 70 percent}` for one that grows during the run.
    image_size: Pixels | Progressive = 224
    # Samples per optimizer step, summed over all ranks and accumulation steps.
    global_batch: Images
    # Number of streams that each epoch's order is cut into. It must be divisible by the world size, and
    # global_batch by it. Choose one that all world sizes you may resume on divide.
    streams: Annotated[PositiveInt, Field(le=MAX_STREAMS)] = 64
    # Number of samples of a stream that are shuffled together; more mix better, and need more shards at hand.
    # None: 4,096.
    window: PositiveInt | None = None
    # Repeated augmentation (arXiv 1901.09335): a global batch has this many views of each of its samples. An
    # epoch stays as long, and shows as many times fewer samples, as in timm.
    repeats: PositiveInt = 1
    # `index`: read samples by position, which makes order and resume exact. `stream`: read shards from
    # beginning to end (plain WebDataset), for sources that cannot be sought, such as pipes.
    access: Literal["index", "stream"] = "index"
    # Number of samples in an epoch; required by `access: stream`, which has no index to count them.
    epoch_samples: PositiveInt | None = None
    shuffle_buffer: PositiveInt = 5000  # Number of samples in the shuffle buffer of `access: stream`.
    # Decode every image once and keep it in memory: for small images. Not with `access: stream`.
    in_memory: bool = False
    # Folder for indices and for copies of remote shards, on a local disk; required for remote shards. None:
    # indices are written beside the shards.
    cache_dir: File | None = None
    # Largest size of the remote shards kept in `cache_dir`, in bytes per node.
    cache_bytes: PositiveFloat = 200e9
    # Has no effect, and is kept for the configs of older runs: the option `--allow-pipe` or the environment
    # variable INDISTILL_ALLOW_PIPE=1 lets `pipe:` URLs run their commands.
    allow_pipe: bool = False
    # Largest fraction of the training samples that may fail to decode; the run stops when there are more.
    max_bad_fraction: Annotated[float, Field(ge=0, le=1)] = 0.001
    # Largest number of pixels of an image. One with more counts as one that cannot be decoded. A pixel takes
    # up to 16 bytes of memory while its image is decoded.
    max_image_pixels: PositiveInt = MAX_IMAGE_PIXELS
    # Loader processes per rank; 0: the training process loads.
    workers: Annotated[int, Field(ge=0, le=MAX_WORKERS)] = 4
    augment: Augment = Augment()  # Augmentation of training images.
    # Resampling of training images, as in timm. `random` chooses bilinear or bicubic for each image, and for
    # each rotation, shear and shift of `augment.rand_augment`.
    interpolation: Literal["bilinear", "bicubic", "random"] = "bilinear"
    # Resampling of evaluation images. `auto` takes the value in timm's `pretrained_cfg`: the student's if it
    # starts from trained weights, else the teacher's, else the student's; in `indistill eval CONFIG NAME`,
    # that of NAME.
    eval_interpolation: Literal["auto", "bilinear", "bicubic"] = "auto"
    # Side of the centre crop of evaluation images, as a fraction of the resized shorter side. `auto` takes
    # crop_pct and crop_mode from the same `pretrained_cfg` as `eval_interpolation`.
    eval_crop: Annotated[float, Field(gt=0, le=1)] | Literal["auto"] = "auto"

    @property
    def full_size(self) -> int:
        """`image_size`, or the size that it grows to, in pixels."""
        return self.image_size.to if isinstance(self.image_size, Progressive) else self.image_size

    @field_validator("eval")
    @classmethod
    def _check_set_names(cls, value: Any) -> Any:
        if isinstance(value, dict):
            if not value:
                raise ValueError("has no set: name at least one, or set it to null")
            for name in value:
                if not _SET_NAME.fullmatch(name):
                    raise ValueError(
                        f"{name[:100]!r} is no name of a set: use up to 64 letters, digits, '_' and '-', of "
                        "which the first is a letter or digit"
                    )
        return value

    @property
    def eval_sets(self) -> dict[str, EvalSet]:
        """The evaluation sets by name; that of a set without a name is ""."""
        if self.eval is None:
            return {}
        return self.eval if isinstance(self.eval, dict) else {"": EvalSet(shards=self.eval)}

    @model_validator(mode="after")
    def _check_stream(self) -> Data:
        if self.access == "stream" and self.epoch_samples is None:
            raise ValueError("access: stream has no index to count samples: set epoch_samples")
        if self.access == "stream" and self.in_memory:
            raise ValueError("in_memory does not work with access: stream: remove one of them")
        if self.access == "stream" and self.repeats > 1:
            raise ValueError("repeats does not work with access: stream: remove one of them")
        if self.access == "stream" and self.epoch_samples and self.epoch_samples < self.global_batch:
            raise ValueError(
                f"epoch_samples ({self.epoch_samples}) is below global_batch ({self.global_batch}), so an "
                "epoch has no step: raise epoch_samples, or lower global_batch"
            )
        return self

    @model_validator(mode="after")
    def _check_repeats(self) -> Data:
        if self.augment.views is not None and self.augment.views % self.repeats:
            raise ValueError(
                f"augment.views ({self.augment.views}) must be a multiple of repeats ({self.repeats}), so "
                "that the views of a sample in a batch differ: change one of them"
            )
        return self
