"""A batch, and what one of its samples is asked for with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from torch import Tensor


class Batch(NamedTuple):
    images: Tensor  # uint8 [B, 3, S, S]
    labels: Tensor  # int64 [B]
    ids: Tensor  # int64 [B], place of each sample in the data set; -1 where it has none (data.access: stream)
    replaced: list[str]  # the samples that could not be decoded, and why: others stand in for them
    records: Mapping[str, Tensor] = {}  # stored targets, uint8 [B, bytes of a record] per field (manifest.py)


class Request(NamedTuple):
    """What a loader worker is asked for: rows of a global batch."""

    epoch: int
    step: int  # within the epoch
    first_row: int  # place of ids[0] in the global batch
    ids: np.ndarray  # int64 [B]
    fields: tuple[str, ...] = ()  # of the stored targets, which are to come along
    stand_ins: bool = True  # else a sample that cannot be decoded leaves a black image, with id -1


class StoredTargets(Protocol):
    """What loaders ask of stored targets (targets/reader.py)."""

    @property
    def remote(self) -> bool:
        """Whether records are fetched from another machine."""

    def read(self, view: int, ids: np.ndarray, fields: Sequence[str]) -> dict[str, Tensor]:
        """Read the records of samples in a view: uint8 [B, bytes of a record] per field."""

    def prefetch(self, view: int, ids: np.ndarray, fields: Sequence[str]) -> None:
        """Fetch the remote files that hold these records in the background."""
