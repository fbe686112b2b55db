"""The interface of what a run trains."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from indistill import config
from indistill.models.outputs import Output, Targets


class Trainable(nn.Module, ABC):
    """What a run trains: a student (`Network`), or intermediate classifiers on a frozen teacher (`Heads`).

    A class rather than a protocol, since it has to be a module as well.
    """

    with_logits: bool  # whether a loss trains the logits, so that accuracy is worth measuring

    @abstractmethod
    def forward(
        self,
        images: Tensor,
        upto: int | None = None,
        pairs: Sequence[int] | None = None,
        targets: Targets | None = None,
    ) -> Output:
        """Compute what the phase reads of images [B, 3, H, W], uint8 or float in 0..255."""

    @abstractmethod
    def save(self, path: Path, section: config.Model | None) -> None:
        """Write the trained weights as safetensors; `section` describes a student."""
