"""Undo what a skipped step or a repeated forward pass changed: buffers and the average of weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from indistill.models.trainable import Trainable


class Buffers:
    """A network's buffers: batch norm's running statistics, which a forward pass changes even if its step is
    skipped.

    They are copied at every step, since a number that is not finite would stay in them forever.
    """

    def __init__(self, network: nn.Module) -> None:
        self.buffers = list(network.buffers())
        self.kept = [buffer.clone() for buffer in self.buffers]

    def keep(self) -> None:
        """Copy the buffers, before a step."""
        if self.buffers:
            torch._foreach_copy_(self.kept, self.buffers)

    def put_back(self, skipped: Tensor) -> None:
        """Restore the copies if `skipped`, a bool [] that is not read from the device, is true."""
        for buffer, kept in zip(self.buffers, self.kept):
            torch.where(skipped, kept, buffer, out=buffer)

    @contextlib.contextmanager
    def unchanged(self) -> Iterator[None]:
        """Restore the buffers at the end.

        A backward pass that computes blocks again (grad_checkpointing) would update the running statistics of
        batch norm a second time.
        """
        before = [buffer.clone() for buffer in self.buffers]
        yield
        if self.buffers:
            torch._foreach_copy_(self.buffers, before)


class Ema(ModelEmaV3):
    """timm's moving average of the student, which a skipped step leaves unchanged."""

    module: Trainable

    @torch.no_grad()
    def update(self, model: nn.Module, step: int, skipped: Tensor) -> None:  # type: ignore[override]  # one more argument
        """Update the average after `step` completed steps; `skipped` is a bool [] on the device."""
        weight = (1.0 - self.get_decay(step)) * ~skipped  # []
        pairs = zip(
            self.module.state_dict(keep_vars=True).values(), model.state_dict(keep_vars=True).values()
        )
        both = [*dict(pairs).items()]  # a tensor that layers share once, though it has several names
        averages = [average for average, _ in both if average.is_floating_point()]
        changes = torch._foreach_sub(
            [value for average, value in both if average.is_floating_point()], averages
        )
        torch._foreach_mul_(changes, weight)
        torch._foreach_add_(averages, changes)
        for average, value in both:
            if not average.is_floating_point():
                average.copy_(value)  # batch norm's counts, which `Buffers` has restored
