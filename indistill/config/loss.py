"""The base class of losses, and how `kd.losses` finds them. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import BeforeValidator, ConfigDict, SerializeAsAny, ValidationInfo, model_validator

from indistill.config import plugins
from indistill.config.base import Section

if TYPE_CHECKING:
    from torch import Tensor, nn

READS = frozenset({"logits", "embedding", "features", "tokens", "token", "labels"})
TEACHES = frozenset({"logits", "embedding", "features", "tokens", "heads"})


class Inputs(SimpleNamespace):
    """What a loss is given of the student or of the teacher for one batch: what it declares, nothing else.

    For a loss that compares samples, B counts those of all ranks.
    """

    logits: Tensor  # [B, K]
    embedding: Tensor  # [B, D], the classifier's input
    features: tuple[Tensor, ...]  # [B, C, H, W] of each pair of `kd.pairs`
    tokens: Tensor  # [B, C, H, W], the last patch tokens of a vision transformer
    token: Tensor  # [B, K], of the student's distillation token
    heads: tuple[Tensor, ...]  # [B, K] of each of the teacher's intermediate heads
    projected: tuple[Tensor, ...]  # what the loss's own layers returned; of the student

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"the loss is not given {name!r}: declare it in `reads`, or of the teacher in `teaches`"
        )


class Shape(NamedTuple):
    """The widths of the networks, for a loss's own layers."""

    student_widths: Sequence[int]  # channels of the map of each pair, shallow to deep
    teacher_widths: Sequence[int]
    student_dim: int  # width of the embedding
    teacher_dim: int
    student_token_width: int = 0  # of patch tokens, where a loss reads them
    teacher_token_width: int = 0


class Loss(Section):
    """A loss: its keys in `kd.losses`, what it needs, and its formula. A subclass states its `name`.

    reads: what it needs of the student ("logits", "embedding", "features", "tokens", "token") and whether it
    needs "labels". What no loss reads is not computed. teaches: what it needs of the teacher ("logits",
    "embedding", "features", "tokens", "heads"); by default what it reads. What no loss needs is not stored.
    Both may be properties, where they depend on the loss's keys. compares: how many samples it relates to
    each other: 1, or 2 for pairs, 3 for triplets. If more than 1, it is given the samples of all ranks,
    gathered with gradients. whole_labels: whether labels have to be classes, int64 [B], and not the
    probabilities [B, K] of mixed images. by_sample: whether it has `of_each`.
    """

    reads: ClassVar[AbstractSet[str]] = frozenset()
    teaches: ClassVar[AbstractSet[str]] = frozenset()
    compares: ClassVar[int] = 1
    whole_labels: ClassVar[bool] = False
    by_sample: ClassVar[bool] = False
    name: str  # Selects this loss.
    weight: float = 1.0  # Factor of this loss in the sum.

    def __init_subclass__(cls, *, name: str | None = None, **options: Any) -> None:
        super().__init_subclass__(**options)
        for key in ("reads", "teaches"):
            declared = getattr(cls, key)
            if isinstance(declared, property):
                continue
            if not isinstance(declared, AbstractSet):
                raise ValueError(f'{cls.__qualname__}.{key}: {declared!r} is no set: write {{"logits"}}')
        if "reads" in cls.__dict__ and "teaches" not in cls.__dict__:
            cls.teaches = cls.reads & TEACHES
        for key, known in (("reads", READS), ("teaches", TEACHES)):
            declared = getattr(cls, key)
            if not isinstance(declared, property) and (unknown := sorted(declared - known)):
                raise ValueError(
                    f"{cls.__qualname__}.{key}: {unknown[0]!r} is none of {', '.join(sorted(known))}"
                )
        if name is not None:
            if cls.__call__ is Loss.__call__:
                raise ValueError(f"{cls.__qualname__}: has no formula: define __call__ (docs/losses.md)")
            cls.__annotations__["name"] = Literal[name]

    @classmethod
    def __pydantic_init_subclass__(cls, **options: Any) -> None:
        """Register the class, once its fields are complete."""
        if options.get("name") is not None:
            plugins.register(options["name"], cls)

    def layers(self, shape: Shape) -> nn.Module | None:
        """Create the loss's trainable layers, if it has any; they are trained and saved with the student.

        Called with the student's `Output` and the `Targets` (models/outputs.py), they return a tuple of
        tensors, which the loss finds in `student.projected`. If it compares samples, these are all that it is
        given, [B, ...] each.
        """
        return None

    def check(self, heads: int) -> None:
        """Raise UserError if the keys do not fit a teacher with `heads` intermediate heads."""

    def __call__(self, student: Inputs, teacher: Inputs, labels: Tensor, epoch: int) -> Tensor:
        """Return the loss, a scalar. `labels` are None unless it reads them; `epoch` counts from 0 in KD."""
        raise TypeError(f"the loss {self.name!r} is known by its record alone")

    def of_each(self, student: Inputs, teacher: Inputs) -> Tensor:
        """Return the loss of each sample, [B], of which the loss is the mean."""
        raise TypeError(f"the loss {self.name!r} has no value for each sample")


class RecordedLoss(Loss):
    """A loss as a run recorded it, where its class is not loaded: the name, and any keys."""

    model_config = ConfigDict(extra="allow")

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_keys(cls, values: Any) -> Any:
        return values


def _by_name(value: Any, info: ValidationInfo) -> Any:
    """Turn a mapping into the loss of its name; a recorded one whose class is not loaded keeps any keys."""
    if not isinstance(value, dict):
        return value
    name = value.get("name")
    if not isinstance(name, str):
        raise ValueError("a loss needs a name, as in {name: kd}")
    if info.context and info.context.get("recorded"):
        return (plugins.registered(name) or RecordedLoss).model_validate(value)
    return plugins.find(name).model_validate(value)


AnyLoss = Annotated[SerializeAsAny[Loss], BeforeValidator(_by_name)]
"""A loss of any name."""
