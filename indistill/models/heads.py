"""Linear classifiers on pooled stages of a frozen network."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

from indistill.config import UserError, in_one_line
from indistill.models.network import Network, fingerprint
from indistill.models.outputs import Output
from indistill.models.stages import find_stages

_MAX_HEAD_WEIGHTS = 10**8


class Heads(nn.Module):
    """A linear classifier on the flattened map of each of a frozen teacher's stages (arXiv 2103.00497, section 3).

    The teacher runs no deeper than the deepest of them; it is no submodule, so no optimizer or checkpoint sees it.
    `pool` averages maps of more than that many pixels a side. Raises UserError for stages that the teacher lacks and
    for heads too large to be meant.
    """

    with_logits = True

    def __init__(self, teacher: Network, stages: Sequence[int], pool: int | None, image_size: int) -> None:
        super().__init__()
        count = len(find_stages(teacher.net))
        if not stages or list(stages) != sorted(set(stages)) or not 0 <= stages[0] <= stages[-1] < count:
            raise UserError(f"heads.stages: {list(stages)}: need increasing indices from 0 to {count - 1}")
        self._frozen = [teacher.eval().requires_grad_(False)]
        self.stages, self.pool = list(stages), pool
        with torch.no_grad():
            maps = teacher.maps(torch.zeros(1, 3, image_size, image_size, device=teacher.mean.device), stages)
        self.classifiers = nn.ModuleList()
        for stage, feature in zip(stages, maps):
            inputs = self._flatten(feature).shape[1]
            if inputs * teacher.net.num_classes > _MAX_HEAD_WEIGHTS:
                raise UserError(
                    f"heads: stage {stage} gives {inputs} inputs for {teacher.net.num_classes} classes, more than "
                    f"{_MAX_HEAD_WEIGHTS:.0e} weights: set heads.pool, 7 for instance"
                )
            self.classifiers.append(nn.Linear(inputs, teacher.net.num_classes))

    def forward(
        self, images: Tensor, upto: None = None, pairs: Sequence[int] = (), targets: None = None
    ) -> Output:
        """Images as Network takes them; `cohort` holds each head's logits [B, K], `logits` the deepest's."""
        with torch.no_grad():
            maps = self._frozen[0].maps(images, self.stages)
        cohort = self.classify(maps)
        return Output((), None, cohort[-1], cohort=cohort)

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint(self)

    def classify(self, maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return tuple(
            classifier(self._flatten(feature)) for classifier, feature in zip(self.classifiers, maps)
        )

    def _flatten(self, feature: Tensor) -> Tensor:
        if self.pool:
            feature = nn.functional.adaptive_avg_pool2d(
                feature, [min(self.pool, size) for size in feature.shape[2:]]
            )
        return feature.flatten(1)  # [B, C * H * W]

    def save(self, path: Path) -> None:
        metadata = {"stages": json.dumps(self.stages), "pool": json.dumps(self.pool)}
        save_model(self, str(path), metadata)

    @classmethod
    def load(cls, path: str, teacher: Network, image_size: int) -> Heads:
        """Those of `heads.safetensors`. Raises UserError for a file that is none, or of another teacher's."""
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata()
            heads = cls(teacher, json.loads(metadata["stages"]), json.loads(metadata["pool"]), image_size)
            load_model(heads, path)
        except FileNotFoundError:
            raise UserError(f"teacher.heads: no file {path}") from None
        except UserError:
            raise
        except Exception as error:  # not safetensors, without our metadata, other shapes
            reason = in_one_line(error, 200)
            raise UserError(f"teacher.heads: {path} holds no heads of this teacher: {reason}") from None
        return heads.eval().requires_grad_(False).to(teacher.mean.device)
