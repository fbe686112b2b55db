"""The sample order: a pure function of (seed, epoch, step, global batch), the same for every world size.

One epoch: permute the shards, lay them end to end on a ring that starts at a random sample, cut the ring into
`streams` equal spans, and shuffle each span inside windows. Global batch t consists of the t-th `global_batch
/ streams` samples of every stream, stream after stream. A rank owns consecutive streams and reads only these;
the slices of all ranks, concatenated, are the batch.

With repeated augmentation a batch has `repeats` rows of each of its samples, in the same stream: all samples
of the stream's share once, then all of them again. An epoch still has as many rows as the data set samples.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from indistill.config import UserError

DEFAULT_WINDOW = 4096  # samples
_MAX_LISTED = 12  # values in a message


class _Ring(NamedTuple):
    """The shards of one epoch, laid end to end."""

    epoch: int
    shards: np.ndarray  # int64 [shards], a permutation
    ends: np.ndarray  # int64 [shards], the position behind each of them
    start: np.int64  # position where the first stream begins


class SampleOrder:
    """Which samples make up any global batch. A sample's id is its index in the shards laid end to end.

    shard_sizes: samples per shard, in the listed order.
    streams: positions of the epoch that every global batch draws from. The world size divides it, and it
        divides the global batch.
    window: samples of one stream that are shuffled together. A wide window mixes better, but the shards it
        touches must be on the nodes while it is read: about `streams * (window / samples_per_shard + 1)`
        shards at once, over all nodes. With ImageNet's 1,281 samples a shard and batches of 4,096, the
        default window of 4,096 needs about 270 shards (near 37 GB) on the nodes, and a sample meets about 20
        of its own shard in its batch, against 5 in a full shuffle and 957 behind a shuffle buffer of 1,000
        samples. A window that is at least as long as the span shuffles the whole span, which is as good as a
        full shuffle: choose it when the shards are local. Memory does not limit the window, because only ids
        are kept here.

    Only caches are kept between calls, so any step is reached at once. The random numbers come from
    `numpy.random.RandomState`, whose streams numpy has frozen: an order outlives numpy upgrades.

    repeats: rows of each sample in its global batch.
    paired: samples 2i and 2i+1 of a stream are partners: they are neighbours in every batch, whatever the
        world size and the global batch.
    cycle: number of epochs after which the order begins again; None: never.
    """

    def __init__(
        self,
        shard_sizes: Sequence[int],
        seed: int,
        *,
        streams: int = 64,
        window: int | None = None,
        repeats: int = 1,
        paired: bool = False,
        cycle: int | None = None,
    ) -> None:
        self.repeats = repeats
        self.paired = paired
        self.cycle = cycle
        self.sizes = np.asarray(shard_sizes, dtype=np.int64).reshape(-1)  # [shards]
        self.seed = seed
        self.streams = streams
        self.window = DEFAULT_WINDOW if window is None else window
        for name, value in (("streams", self.streams), ("window", self.window)):
            if value < 1:
                raise UserError(f"data.{name} is {value}: it must be at least 1")
        self.first_ids = np.cumsum(self.sizes) - self.sizes  # [shards], id of each shard's first sample
        self.num_samples = int(self.sizes.sum())
        self.span = self.num_samples // streams  # samples per stream
        self._ring: _Ring | None = None  # of the last epoch requested
        # Stream -> (epoch, index) and shuffled positions of its last window.
        self._windows: dict[int, tuple[tuple[int, int], np.ndarray]] = {}

    def steps_per_epoch(self, global_batch: int) -> int:
        """Full global batches in one epoch."""
        return self.num_samples // global_batch

    def dropped(self, global_batch: int) -> int:
        """Samples that one epoch leaves out: fewer than one global batch, unless samples are repeated.

        Each epoch leaves out different ones.
        """
        return self.num_samples - self.steps_per_epoch(global_batch) * global_batch // self.repeats

    def check(self, global_batch: int, world: int) -> None:
        """Raise UserError, naming values that work, if this batch size does not divide over `world` ranks."""
        if global_batch > self.num_samples:
            raise UserError(
                f"data.global_batch ({global_batch}) is larger than the data set of {self.num_samples} "
                f"samples: lower it to a multiple of data.streams ({self.streams}, which may be lowered "
                "too), or add data"
            )
        if self.streams % world == 0 and global_batch % self.streams == 0:
            self._check_share(global_batch // self.streams, world)
            return
        problem = f"data.streams ({self.streams}) must be divisible by the world size ({world})"
        if self.streams % world == 0:
            problem = f"data.global_batch ({global_batch}) must be divisible by data.streams ({self.streams})"
        worlds = [w for w in range(1, self.streams + 1) if self.streams % w == 0]
        below = global_batch // self.streams * self.streams
        batches = [b for b in (below, below + self.streams) if 0 < b <= self.num_samples]
        streams = [s for s in range(world, global_batch + 1, world) if global_batch % s == 0]
        raise UserError(
            f"{problem}. With data.streams {self.streams}: world sizes {_listed(worlds)}; global batches "
            f"{_listed(batches)} or another multiple of {self.streams}. With global batch {global_batch} on "
            f"{world} ranks: data.streams {_listed(streams)}"
        )

    def _check_share(self, per_stream: int, world: int) -> None:
        """Raise UserError unless a batch's share of a stream divides into repeats, and these into pairs."""
        unit = self.repeats * (2 if self.paired else 1)
        if per_stream % unit == 0:
            return
        keys = [f"data.repeats ({self.repeats})"] * (self.repeats > 1) + ["kd.mix (pairs)"] * self.paired
        batch = per_stream * self.streams
        streams = [s for s in range(world, self.streams, world) if batch % (s * unit) == 0]
        raise UserError(
            f"{' and '.join(keys)}: data.global_batch / data.streams ({per_stream}) must be divisible by "
            f"{unit}. With data.streams {self.streams}: global batches that are multiples of "
            f"{self.streams * unit}. With global batch {batch} on {world} ranks: data.streams "
            f"{_listed(streams)}"
        )

    def batch(self, epoch: int, step: int, global_batch: int) -> np.ndarray:
        """Sample ids of global batch `step` of the epoch: int64 [global_batch], stream after stream."""
        return self.rank_batch(epoch, step, global_batch, rank=0, world=1)

    def rank_batch(self, epoch: int, step: int, global_batch: int, rank: int, world: int) -> np.ndarray:
        """One rank's contiguous slice of `batch`: int64 [global_batch / world].

        Raises UserError as `check` does, and IndexError for a step, epoch or rank that does not exist.
        """
        self.check(global_batch, world)
        if not (0 <= step < self.steps_per_epoch(global_batch) and 0 <= rank < world and epoch >= 0):
            raise IndexError(
                f"no step {step} of epoch {epoch} for rank {rank} of {world} at global batch {global_batch}"
            )
        epoch = self._of_cycle(epoch)
        distinct = global_batch // self.streams // self.repeats
        streams_per_rank = self.streams // world
        begin = step * distinct
        positions = [
            np.tile(self._positions(epoch, stream, begin, begin + distinct), self.repeats)
            for stream in range(rank * streams_per_rank, (rank + 1) * streams_per_rank)
        ]
        return self._ids(epoch, np.concatenate(positions))

    def repeat_of(self, rows: np.ndarray, global_batch: int) -> np.ndarray:
        """Which repeat of its sample each row of a global batch is, from 0: int64, of the same shape."""
        per_stream = global_batch // self.streams
        return rows % per_stream // (per_stream // self.repeats)

    def place_of(self, step: int, row: int, global_batch: int) -> tuple[int, int]:
        """The stream of a row of global batch `step`, and its sample's index in the shuffled stream."""
        per_stream = global_batch // self.streams
        distinct = per_stream // self.repeats
        return row // per_stream, step * distinct + row % per_stream % distinct

    def stream_sample(self, epoch: int, stream: int, place: int) -> int:
        """Id of the sample at index `place` of a shuffled stream, which starts again after its end."""
        place %= self.span - self.span % 2 if self.paired else self.span
        epoch = self._of_cycle(epoch)
        return int(self._ids(epoch, self._positions(epoch, stream, place, place + 1))[0])

    def partners(self, epoch: int) -> np.ndarray:
        """The partner of each sample in the epoch's order: int64 [samples]; its own id if it has none."""
        epoch = self._of_cycle(epoch)
        partners = np.arange(self.num_samples)
        for stream in range(self.streams if self.span > 1 else 0):
            pairs = self._ids(epoch, self._positions(epoch, stream, 0, self.span - self.span % 2))
            partners[pairs] = pairs.reshape(-1, 2)[:, ::-1].reshape(-1)
        return partners

    def _of_cycle(self, epoch: int) -> int:
        return epoch if self.cycle is None else epoch % self.cycle

    def _positions(self, epoch: int, stream: int, begin: int, end: int) -> np.ndarray:
        """Positions on the epoch's ring of samples [begin, end) of a shuffled stream: int64 [end - begin]."""
        # Streams change windows at different steps, so that new shards are needed evenly, not all at once.
        lead = stream * self.window // self.streams
        pieces = []
        for index in range((begin + lead) // self.window, (end - 1 + lead) // self.window + 1):
            low = max(index * self.window - lead, 0)
            high = min((index + 1) * self.window - lead, self.span)
            key, shuffled = self._windows.get(stream, (None, None))
            if shuffled is None or key != (epoch, index):
                permutation = self._random(epoch, stream, index).permutation(high - low)
                shuffled = stream * self.span + low + permutation
                self._windows[stream] = ((epoch, index), shuffled)
            pieces.append(shuffled[max(begin - low, 0) : end - low])
        return np.concatenate(pieces)

    def _ids(self, epoch: int, positions: np.ndarray) -> np.ndarray:
        """Sample ids at positions of the epoch's ring: int64, of the same shape."""
        if self._ring is None or self._ring.epoch != epoch:
            random = self._random(epoch)
            shards = random.permutation(len(self.sizes))
            # The random start moves the cuts and the dropped samples even if one shard holds everything.
            start = random.randint(self.num_samples, dtype=np.int64)  # nosec B311  # numpy, from the seed
            self._ring = _Ring(epoch, shards, np.cumsum(self.sizes[shards]), start)
        _, shards, ends, start = self._ring
        positions = (positions + start) % self.num_samples
        nth = np.searchsorted(ends, positions, side="right")  # which shard of the permutation
        return self.first_ids[shards[nth]] + positions - (ends[nth] - self.sizes[shards[nth]])

    def _random(self, *counters: int) -> np.random.RandomState:
        return np.random.RandomState([self.seed & 0xFFFFFFFF, self.seed >> 32 & 0xFFFFFFFF, *counters])


def _listed(values: list[int]) -> str:
    """At most 12 of the values, the largest ones, separated by commas; "none" if there are none."""
    shown = [str(value) for value in values[-_MAX_LISTED:]]
    if len(values) > _MAX_LISTED:
        shown.insert(0, "...")
    return ", ".join(shown) or "none"
