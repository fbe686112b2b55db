"""Gather what losses compare from all ranks, with gradients: they mean the same on every world size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from indistill.config import Inputs

MAX_ELEMENTS = 2**24  # of the gathered rows, and of what relates them to each other: 64 MiB each in float32
Key = tuple[
    str, str, int
]  # "student", "teacher" or "labels"; name in `Inputs`; position among several tensors


def gather(*rows: Tensor, scope: str = "global", related: int = 2) -> tuple[Tensor, ...]:
    """Gather each tensor [B, ...] of this rank from all ranks: [W * B, ...], in rank order.

    Every rank must pass as many rows, and then compute the same loss of them; with gradients averaged over
    ranks, as DDP does, the result is the gradient of that one loss on the global batch. `scope` "local"
    gathers nothing; "auto" does while neither any gathered tensor nor the (W * B)^related relations exceed
    MAX_ELEMENTS: 4,096 samples in pairs, 256 in triplets. As W * B is the global batch, that choice does not
    depend on the world size.
    """
    if not dist.is_initialized() or scope == "local":
        return rows
    batch = dist.get_world_size() * len(rows[0])
    if not gathers(scope, batch, max(x[0].numel() for x in rows), related):
        return rows
    return tuple(_Gather.apply(x) for x in rows)


def gathers(scope: str, batch: int, widest: int, related: int) -> bool:
    """Whether `gather` gathers rows of at most `widest` elements; `batch` counts the samples of all ranks."""
    return scope == "global" or (scope == "auto" and max(batch**related, batch * widest) <= MAX_ELEMENTS)


def gather_inputs(
    student: Inputs, teacher: Inputs, *, labels: Tensor | None, scope: str, related: int
) -> tuple[Inputs, Inputs, Tensor | None]:
    """Gather all that a loss is given, as `gather` does."""
    found: dict[Key, Tensor] = {}
    for group in groups(student, teacher, labels):
        found |= zip(group, gather(*group.values(), scope=scope, related=related))
    gathered = _replace("student", student, found), _replace("teacher", teacher, found)
    return *gathered, found.get(("labels", "", 0))


def groups(student: Inputs, teacher: Inputs, labels: Tensor | None) -> list[dict[Key, Tensor]]:
    """Divide what a loss is given into groups that are gathered together, or not at all.

    Student and teacher have the same number of samples then. A loss that reads labels has one group, as the
    number of labels has to fit all others; its own layers' tensors are one group, too.
    """
    together: dict[tuple[str, int], dict[Key, Tensor]] = {}
    for side, inputs in (("student", student), ("teacher", teacher)):
        for name, value in vars(inputs).items():
            for i, tensor in enumerate(value if isinstance(value, tuple) else [value]):
                group = ("", 0) if labels is not None or name == "projected" else (name, i)
                together.setdefault(group, {})[side, name, i] = tensor
    if labels is not None:
        together.setdefault(("", 0), {})["labels", "", 0] = labels
    return list(together.values())


def _replace(side: str, inputs: Inputs, found: Mapping[Key, Tensor]) -> Inputs:
    replaced: dict[str, Tensor | tuple[Tensor, ...]] = {}
    for name, value in vars(inputs).items():
        if isinstance(value, tuple):
            replaced[name] = tuple(found[side, name, i] for i in range(len(value)))
        else:
            replaced[name] = found[side, name, 0]
    return Inputs(**replaced)


@dataclass(frozen=True)
class Rows:
    """One sample's part of what a loss gathers together, for `indistill plan`."""

    related: int  # samples that are related to each other
    widest: int  # elements of its largest tensor
    row_bytes: int  # gathered in the forward pass
    gradient_bytes: int  # summed in the backward pass

    @classmethod
    def of(cls, group: Sequence[Tensor], related: int) -> Rows:
        """The rows of tensors [B, ...], which may be fake."""
        widest = max(x.numel() // len(x) for x in group)
        row_bytes = [x.numel() // len(x) * x.element_size() for x in group]
        gradient_bytes = sum(size for x, size in zip(group, row_bytes) if x.requires_grad)
        return cls(related, widest, sum(row_bytes), gradient_bytes)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.contiguous()
        out = x.new_empty(dist.get_world_size() * len(x), *x.shape[1:])
        dist.all_gather_into_tensor(out, x)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        # The sum over ranks is W times the gradient of the one loss, and the average over ranks makes it one
        # again.
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]
