"""A batch of images, the request that a loader worker makes it from, and the interface of stored targets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from torch import Tensor


class Batch(NamedTuple):
    images: Tensor  # uint8 [B, 3, S, S]
    labels: Tensor  # int64 [B]
    ids: Tensor  # int64 [B], index of each sample in the data set; -1 where it has none (data.access: stream)
    replaced: list[str]  # the samples that could not be decoded and were replaced, and why
    records: Mapping[str, Tensor] = {}  # stored targets, uint8 [B, bytes of a record] per field (manifest.py)
    mix: Tensor | None = None  # how the images are mixed in KD, float32 [B, 6] (mixing.py); None: not


class Request(NamedTuple):
    """Some rows of a global batch, for a loader worker to read."""

    epoch: int  # whose order they are in
    step: int  # within the epoch
    first_row: int  # row of ids[0] in the global batch
    ids: np.ndarray  # int64 [B]
    fields: tuple[str, ...] = ()  # stored targets to read with the images
    stand_ins: bool = True  # False: a sample that cannot be decoded becomes a black image with id -1
    views: int | np.ndarray = 0  # number of the view of all samples, or of each: int64 [B]
    size: int | None = None  # of the images, in pixels a side; None: their full size


class StoredTargets(Protocol):
    """The part of stored targets (targets/reader.py) that loaders use."""

    @property
    def remote(self) -> bool:
        """Whether records are fetched from another machine."""

    def read(self, views: int | np.ndarray, ids: np.ndarray, fields: Sequence[str]) -> dict[str, Tensor]:
        """Read the records of samples in one view, or each in its own: uint8 [B, bytes of a record] per
        field.
        """

    def prefetch(self, view: int, ids: np.ndarray, fields: Sequence[str]) -> None:
        """Fetch the remote files that hold these records in the background."""
