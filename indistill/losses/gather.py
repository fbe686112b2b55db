"""Gather the samples that losses compare from all ranks, so that a loss is the same on every world size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from indistill.config import Inputs

MAX_ELEMENTS = 2**24  # of the gathered rows, and of their relations: 64 MiB each in float32
# "student", "teacher" or "labels"; name in `Inputs`; index among several tensors.
Key = tuple[str, str, int]


def gather(*rows: Tensor, scope: str = "global", related: int = 2) -> tuple[Tensor, ...]:
    """Gather each tensor [B, ...] of this rank from all ranks: [W * B, ...], in rank order.

    Every rank must pass the same number of rows, and then compute the same loss of the result. Averaged over
    the ranks, as in DDP, the gradients are those of this loss on the global batch. `scope` "local" gathers
    nothing. "auto" gathers unless a gathered tensor, or the (W * B)^related relations, have more than
    MAX_ELEMENTS elements, which are 4,096 samples in pairs and 256 in triplets. This choice does not depend
    on the world size, because W * B is the global batch.
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

    Student and teacher then have the same number of samples. If a loss reads labels, all its tensors are one
    group, because each sample needs its label; the tensors of its own layers are one group, too.
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
