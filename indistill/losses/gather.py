"""Losses that compare the samples of a batch, on the batch of all ranks: gathered, with gradients.

Without this, such a loss means something else on every world size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

MAX_ELEMENTS = 2**24  # of the gathered rows, and of what relates them to each other: 64 MiB each in float32

Gather = Callable[..., tuple[Tensor, ...]]


def gather(*rows: Tensor, scope: str = "global", related: int = 2) -> tuple[Tensor, ...]:
    """Each tensor [B, ...] of this rank as that of all ranks, [W * B, ...], in rank order.

    Every rank must bring as many rows, and then compute the same loss of them; with gradients averaged over ranks, as
    DDP does, the result is the gradient of that one loss on the global batch. `scope` "local" gathers nothing; "auto"
    does while neither any gathered tensor nor the (W * B)^related relations exceed MAX_ELEMENTS: 4,096 samples in
    pairs, 256 in triplets. As W * B is the global batch, that choice does not depend on the world size.
    """
    if not dist.is_initialized() or scope == "local":
        return rows
    batch = dist.get_world_size() * len(rows[0])
    if not gathers(scope, batch, max(x[0].numel() for x in rows), related):
        return rows
    return tuple(_Gather.apply(x) for x in rows)


def gathers(scope: str, batch: int, widest: int, related: int) -> bool:
    """Whether `gather` gathers rows of at most `widest` numbers of `batch` samples on all ranks together."""
    return scope == "global" or (scope == "auto" and max(batch**related, batch * widest) <= MAX_ELEMENTS)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.contiguous()
        out = x.new_empty(dist.get_world_size() * len(x), *x.shape[1:])
        dist.all_gather_into_tensor(out, x)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        # The sum over ranks is W times the gradient of the one loss, and the average over ranks makes it one again.
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]
