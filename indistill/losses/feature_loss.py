"""Regression of a teacher's features, of any width and grid, through a trained projector."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Set as AbstractSet
from typing import Literal

from pydantic import PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from indistill.config import Inputs, Loss, Shape
from indistill.losses.common import at_least_float32, require_equal, sum_of
from indistill.models.outputs import Output, Targets

On = Literal["embedding", "maps", "tokens"]
Distance = Literal["cosine", "smooth_l1", "mse"]


class FeatureLoss(Loss, name="feature"):
    """Compares features of both networks, after trained layers from the student's width to the teacher's.

    It reads no labels and no logits, so a teacher without a classifier will do.
    """

    by_sample = True
    # What is compared. `embedding`: the classifier's input, which is the pooled map or the class token;
    # `maps`: the maps of every pair of `kd.pairs`; `tokens`: the last patch tokens of two vision
    # transformers, on their grid.
    on: On = "embedding"
    # `cosine`: one minus the cosine of the angle, at each position; `smooth_l1`: Huber's loss with threshold
    # 1; `mse`: squared error.
    distance: Distance = "cosine"
    # Trained layers on the student's features: `linear`, or `mlp` with one hidden layer (GELU). They are not
    # part of the final student.
    projector: Literal["linear", "mlp"] = "linear"
    # How the teacher's features are standardised. `channel`: each channel to mean 0 and variance 1; `phi_s`:
    # PHI-S (arXiv 2410.01680), a rotation and one scale, after which every channel has variance 1.
    standardise: Literal["channel", "phi_s", "none"] = "none"
    # Number of batches of `data.train` over which the statistics of `standardise` are computed.
    batches: PositiveInt = 8

    @property
    def reads(self) -> AbstractSet[str]:  # type: ignore[override]  # depends on a key
        return frozenset({"features" if self.on == "maps" else self.on})

    @property
    def teaches(self) -> AbstractSet[str]:  # type: ignore[override]  # depends on a key
        return self.reads

    def layers(self, shape: Shape) -> nn.Module:
        widths = {
            "embedding": [(shape.student_dim, shape.teacher_dim)],
            "maps": [*zip(shape.student_widths, shape.teacher_widths)],
            "tokens": [(shape.student_token_width, shape.teacher_token_width)],
        }[self.on]
        return Projectors(self.on, widths, hidden=self.projector == "mlp")

    def __call__(self, student: Inputs, teacher: Inputs, labels: Tensor, epoch: int) -> Tensor:
        targets = self._targets(teacher)
        return sum_of(feature(s, t, self.distance) for s, t in zip(student.projected, targets))

    def of_each(self, student: Inputs, teacher: Inputs) -> Tensor:
        pairs = zip(student.projected, self._targets(teacher))
        return sum_of(distances(s, t, self.distance).flatten(1).mean(1) for s, t in pairs)

    def _targets(self, teacher: Inputs) -> tuple[Tensor, ...]:
        if self.on == "maps":
            return teacher.features
        return (teacher.embedding if self.on == "embedding" else teacher.tokens,)


def feature(student: Tensor, teacher: Tensor, distance: Distance = "cosine") -> Tensor:
    """The distance of two vectors [B, C] or maps [B, C, H, W]; returns a scalar.

    It is the mean over all elements, or for `cosine` over all positions. The finer grid is brought to the
    coarser one by bilinear interpolation.
    """
    student, teacher = aligned(at_least_float32(student), at_least_float32(teacher))
    require_equal("feature", student.shape, teacher.shape)
    if distance == "cosine":
        return 1 - F.cosine_similarity(student, teacher, dim=1).mean()
    return F.mse_loss(student, teacher) if distance == "mse" else F.smooth_l1_loss(student, teacher)


def distances(student: Tensor, teacher: Tensor, distance: Distance) -> Tensor:
    """What `feature` is the mean of: [B, C, ...], or for `cosine` [B, 1, ...]."""
    student, teacher = aligned(at_least_float32(student), at_least_float32(teacher))
    require_equal("feature", student.shape, teacher.shape)
    if distance == "cosine":
        return 1 - F.cosine_similarity(student, teacher, dim=1).unsqueeze(1)
    compare = F.mse_loss if distance == "mse" else F.smooth_l1_loss
    return compare(student, teacher, reduction="none")


def aligned(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Interpolate the finer of two maps [B, C, H, W] to the grid of the coarser; vectors stay as they are.

    Raises ValueError if neither is the finer one on both axes.
    """
    grids = (student.shape[2:], teacher.shape[2:])
    grid = coarser(*grids)
    if grid is None:
        raise ValueError(
            f"losses.feature: neither of the grids {tuple(map(tuple, grids))} is the coarser one"
        )

    def at_grid(x: Tensor) -> Tensor:
        return x if x.shape[2:] == grid else F.interpolate(x, grid, mode="bilinear", align_corners=False)

    return at_grid(student), at_grid(teacher)


def coarser(one: Iterable[int], other: Iterable[int]) -> tuple[int, ...] | None:
    """The coarser of two grids; None if each is the coarser one on an axis."""
    one, other = tuple(one), tuple(other)
    smallest = tuple(map(min, one, other))
    return smallest if smallest in (one, other) else None


class Projectors(nn.Module):
    """A projector for each target of a loss: linear, or with a hidden layer of the wider side's width."""

    def __init__(self, on: On, widths: Iterable[tuple[int, int]], *, hidden: bool) -> None:
        super().__init__()
        self.on = on
        layer: Callable[[int, int], nn.Module]
        if on == "embedding":
            layer = nn.Linear
        else:

            def layer(inputs: int, outputs: int) -> nn.Module:
                return nn.Conv2d(inputs, outputs, kernel_size=1)

        self.projectors = nn.ModuleList()
        for student, teacher in widths:
            if hidden:
                width = max(student, teacher)
                part: nn.Module = nn.Sequential(layer(student, width), nn.GELU(), layer(width, teacher))
            else:
                part = layer(student, teacher)
            self.projectors.append(part)

    def forward(self, output: Output, targets: Targets) -> tuple[Tensor, ...]:
        """The student's features at the teacher's width: [B, C_t] or [B, C_t, H_s, W_s] each."""
        if self.on == "maps":
            return tuple(projector(x) for projector, x in zip(self.projectors, output.features))
        features = output.embedding if self.on == "embedding" else output.tokens
        return (self.projectors[0](features),)
