"""Linear classifiers on pooled stages of a frozen network."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch
from pydantic import BaseModel, Json, NonNegativeInt, PositiveInt, ValidationError
from safetensors import safe_open
from safetensors.torch import load_file, save_model
from torch import Tensor, nn

from indistill import config
from indistill.config import UserError, in_one_line
from indistill.config.files import give_usual_mode, sort_metadata
from indistill.config.records import first_problem
from indistill.models.network import Network, fingerprint
from indistill.models.outputs import Output, Targets
from indistill.models.stages import find_stages
from indistill.models.timm_model import check_file
from indistill.models.trainable import Trainable
from indistill.models.weights import diverged, misfit

_MAX_HEAD_WEIGHTS = 10**8


class _Metadata(BaseModel):
    """The metadata of `heads.safetensors`, whose values are JSON."""

    stages: Json[list[NonNegativeInt]]
    pool: Json[PositiveInt | None]


class Heads(Trainable):
    """A linear classifier on the flattened map of each of a frozen teacher's stages (2103.00497, section 3).

    The teacher runs no deeper than the deepest of these stages; it is not a submodule, so no optimizer or
    checkpoint contains it. `pool` averages maps of more than that many pixels a side. Raises UserError for
    stages that the teacher lacks and for heads of more than 1e8 weights.
    """

    with_logits = True

    def __init__(self, teacher: Network, stages: Sequence[int], pool: int | None, image_size: int) -> None:
        super().__init__()
        count = len(find_stages(teacher.net))
        if not stages or list(stages) != sorted(set(stages)) or not 0 <= stages[0] <= stages[-1] < count:
            raise UserError(f"heads.stages: {list(stages)}: need increasing indices from 0 to {count - 1}")
        self._frozen = [teacher.eval().requires_grad_(False)]  # a list: nn.Module registers no items
        self.stages = list(stages)
        self.pool = pool
        with torch.no_grad():
            maps = teacher.maps(torch.zeros(1, 3, image_size, image_size, device=teacher.mean.device), stages)
        self.classifiers = nn.ModuleList()
        for stage, feature in zip(stages, maps):
            inputs = self._flatten(feature).shape[1]
            if inputs * teacher.net.num_classes > _MAX_HEAD_WEIGHTS:
                raise UserError(
                    f"heads: stage {stage} gives {inputs} inputs for {teacher.net.num_classes} classes, more "
                    f"than {_MAX_HEAD_WEIGHTS:.0e} weights: set heads.pool, 7 for instance"
                )
            self.classifiers.append(nn.Linear(inputs, teacher.net.num_classes))

    def forward(
        self,
        images: Tensor,
        upto: int | None = None,
        pairs: Sequence[int] | None = None,
        targets: Targets | None = None,
    ) -> Output:
        """Run on images as Network does; `cohort` has each head's logits [B, K], `logits` the deepest head's.

        The other arguments are Network's, and change nothing here.
        """
        with torch.no_grad():
            maps = self._frozen[0].maps(images, self.stages)
        cohort = self.classify(maps)
        return Output((), None, cohort[-1], cohort=cohort)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the classifiers' weights when it is first read."""
        return fingerprint(self)

    def classify(self, maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Each head's logits [B, K], from the map [B, C, H, W] of its stage."""
        return tuple(
            classifier(self._flatten(feature)) for classifier, feature in zip(self.classifiers, maps)
        )

    def _flatten(self, feature: Tensor) -> Tensor:
        if self.pool:
            height, width = feature.shape[2:]
            feature = nn.functional.adaptive_avg_pool2d(
                feature, (min(self.pool, height), min(self.pool, width))
            )
        return feature.flatten(1)  # [B, C * H * W]

    def save(self, path: Path, section: config.Model | None = None) -> None:
        """Write `heads.safetensors`, with stages and pool as metadata."""
        metadata = {"stages": json.dumps(self.stages), "pool": json.dumps(self.pool)}
        save_model(self, str(path), metadata)
        sort_metadata(path)
        give_usual_mode(path)

    @classmethod
    def load(cls, path: str, teacher: Network, image_size: int) -> Heads:
        """Load `heads.safetensors`. Raises UserError if the file is invalid or belongs to another teacher."""
        check_file("teacher.heads", path)
        try:
            with safe_open(path, "pt") as file:
                metadata = _Metadata.model_validate(file.metadata())
            heads = cls(teacher, metadata.stages, metadata.pool, image_size)
            weights = load_file(path)
            if problem := misfit(weights, heads.state_dict()):
                raise ValueError(f"it {problem}")
            heads.load_state_dict(weights)
            if (name := diverged(heads)) is not None:
                raise ValueError(f"NaN or infinity in {name}: their training has diverged")
        except UserError as error:
            raise UserError(f"teacher.heads: {path}: {error}") from None
        except Exception as error:  # not safetensors, without our metadata, other shapes
            if isinstance(error, ValidationError):
                reason = f"metadata: {first_problem(error)}"
            else:
                reason = in_one_line(error, 200)
            raise UserError(f"teacher.heads: {path} holds no heads of this teacher: {reason}") from None
        return heads.eval().requires_grad_(False).to(teacher.mean.device)
