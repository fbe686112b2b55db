"""Find evaluation images that are also training images: the same bytes in both sets of shards."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from indistill.data.shards import ShardSet

MOST_IMAGES = 10_000  # of the evaluation set
MOST_BYTES = 2 * 10**9  # of training images to read
FEWEST_IMAGES = 100  # of the evaluation set, however many bytes have to be read for them


class Overlap(NamedTuple):
    """How many of the evaluation images that were looked at are also training images."""

    shared: int
    looked_at: int
    compared: float  # fraction of the training images of the same sizes that were read in time


def find(training: ShardSet, evaluation: ShardSet, seconds: float) -> Overlap:
    """Compare SHA-256 hashes of image files; in large sets, of a random sample of the evaluation images.

    Equal files have equal sizes, which are in the indices, so only training images of such sizes are read.
    Reading takes at most `seconds`, a third of it for the evaluation images.
    """
    ids = np.random.RandomState(0).permutation(len(evaluation))[:MOST_IMAGES]
    sizes = training.image_sizes
    while True:
        candidates = np.flatnonzero(np.isin(sizes, evaluation.image_sizes[ids]))
        if len(ids) <= FEWEST_IMAGES or sizes[candidates].sum() <= MOST_BYTES:
            break
        ids = ids[: len(ids) // 2]
    digests = list(_digests(evaluation, ids, seconds / 3))
    training_digests = list(_digests(training, candidates, seconds * 2 / 3))
    known = set(training_digests)
    compared = len(training_digests) / len(candidates) if len(candidates) else 1.0
    return Overlap(sum(digest in known for digest in digests), len(digests), compared)


def _digests(shards: ShardSet, ids: np.ndarray, seconds: float) -> Iterator[bytes]:
    """Yield the hash of each image until the time is up."""
    end = time.monotonic() + seconds
    for _, sample in shards.pick(ids):
        yield hashlib.sha256(sample.image).digest()
        if time.monotonic() > end:
            return
