"""The sample order: a pure function of (seed, epoch, step, global batch), the same for every world size.

One epoch: permute the shards, lay them end to end on a ring that starts at a random sample, cut the ring into
`streams` equal spans, shuffle each span inside windows. Global batch t is the t-th run of `global_batch / streams`
samples of every stream, stream after stream: a rank owns consecutive streams, reads only these, and the ranks' slices
join to the batch.
"""

from collections.abc import Sequence

import numpy as np

from indistill.config import UserError

DEFAULT_WINDOW = 4096  # samples


class SampleOrder:
    """Which samples make up any global batch. A sample's id is its place in the shards laid end to end as listed.

    shard_sizes: samples per shard, in the listed order.
    streams: places of the epoch that every global batch draws from. World size divides it, it divides the global batch.
    window: samples of one stream that are shuffled together. A wide window mixes better, but the shards it touches
        must be on the nodes while it is read: about `streams * (window / samples_per_shard + 1)` shards at once, over
        all nodes. With ImageNet's 1,281 samples a shard and batches of 4,096 the default window of 4,096 keeps some
        270 shards (near 37 GB) at hand, and a sample meets about 20 of its own shard in its batch, against 5 in a full
        shuffle and 957 behind a 1,000-sample shuffle buffer. A window of a span or more shuffles the span in full, as
        good as a full shuffle: choose it when the shards are local. Only ids are held here, memory does not bound it.

    Nothing but caches is kept between calls, so any step is reached at once. The random numbers come from
    `numpy.random.RandomState`, whose streams numpy has frozen: an order outlives numpy upgrades.
    """

    def __init__(self, shard_sizes: Sequence[int], seed: int, streams: int = 64, window: int | None = None):
        self.sizes = np.asarray(shard_sizes, dtype=np.int64).reshape(-1)  # [shards]
        window = DEFAULT_WINDOW if window is None else window
        for name, value in (("streams", streams), ("window", window)):
            if value < 1:
                raise UserError(f"data.{name} is {value}: it must be at least 1")
        self.seed, self.streams, self.window = seed, streams, window
        self.first_ids = np.cumsum(self.sizes) - self.sizes  # [shards], id of each shard's first sample
        self.num_samples = int(self.sizes.sum())
        self.span = self.num_samples // streams  # samples per stream
        self._epoch: tuple | None = None  # the layout of the epoch asked for last
        self._windows: dict[int, tuple] = {}  # stream -> its window asked for last

    def steps_per_epoch(self, global_batch: int) -> int:
        """Full global batches that one epoch yields."""
        return self.num_samples // global_batch

    def dropped(self, global_batch: int) -> int:
        """Samples, fewer than one global batch, that one epoch leaves out. Every epoch leaves out others."""
        return self.num_samples % global_batch

    def check(self, global_batch: int, world: int) -> None:
        """Raise UserError, with the values that would work, if this batch size on `world` ranks cannot be served."""
        if global_batch > self.num_samples:
            raise UserError(
                f"data.global_batch ({global_batch}) is larger than the data set of {self.num_samples} samples: lower "
                f"it to a multiple of data.streams ({self.streams}, which may be lowered too), or add data"
            )
        if self.streams % world == 0 and global_batch % self.streams == 0:
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

    def batch(self, epoch: int, step: int, global_batch: int) -> np.ndarray:
        """Sample ids of global batch `step` (counted within the epoch): int64 [global_batch], stream after stream."""
        return self.rank_batch(epoch, step, global_batch, rank=0, world=1)

    def rank_batch(self, epoch: int, step: int, global_batch: int, rank: int, world: int) -> np.ndarray:
        """One rank's contiguous slice of `batch`: int64 [global_batch / world]."""
        self.check(global_batch, world)
        if not (0 <= step < self.steps_per_epoch(global_batch) and 0 <= rank < world and epoch >= 0):
            raise IndexError(
                f"no step {step} of epoch {epoch} for rank {rank} of {world} at global batch {global_batch}"
            )
        per_stream, owned = global_batch // self.streams, self.streams // world
        begin = step * per_stream
        places = [
            self._places(epoch, s, begin, begin + per_stream) for s in range(rank * owned, (rank + 1) * owned)
        ]
        return self._ids(epoch, np.concatenate(places))

    def stream_sample(self, epoch: int, stream: int, place: int) -> int:
        """The sample at `place` of a stream's shuffled row, which begins again behind its end."""
        place %= self.span
        return int(self._ids(epoch, self._places(epoch, stream, place, place + 1))[0])

    def _places(self, epoch: int, stream: int, begin: int, end: int) -> np.ndarray:
        """Where samples [begin, end) of the shuffled stream lie on the epoch's ring: int64 [end - begin]."""
        # Streams change windows at different times, so that the next shards are asked for evenly, not all at once.
        lead = stream * self.window // self.streams
        pieces = []
        for index in range((begin + lead) // self.window, (end - 1 + lead) // self.window + 1):
            low, high = max(index * self.window - lead, 0), min((index + 1) * self.window - lead, self.span)
            key, shuffled = self._windows.get(stream, (None, None))
            if key != (epoch, index):
                shuffled = (
                    stream * self.span + low + self._random(epoch, stream, index).permutation(high - low)
                )
                self._windows[stream] = ((epoch, index), shuffled)
            pieces.append(shuffled[max(begin - low, 0) : end - low])
        return np.concatenate(pieces)

    def _ids(self, epoch: int, places: np.ndarray) -> np.ndarray:
        """Sample ids at places on the epoch's ring: int64, as many."""
        if self._epoch is None or self._epoch[0] != epoch:
            random = self._random(epoch)
            shards = random.permutation(len(self.sizes))
            # The random start moves the cuts and the dropped tail even where one shard holds everything.
            self._epoch = (
                epoch,
                shards,
                np.cumsum(self.sizes[shards]),
                random.randint(self.num_samples, dtype=np.int64),
            )
        _, shards, ends, start = self._epoch
        places = (places + start) % self.num_samples
        nth = np.searchsorted(ends, places, side="right")  # which shard of the permuted row
        return self.first_ids[shards[nth]] + places - (ends[nth] - self.sizes[shards[nth]])

    def _random(self, *counters: int) -> np.random.RandomState:
        return np.random.RandomState([self.seed & 0xFFFFFFFF, self.seed >> 32 & 0xFFFFFFFF, *counters])


def _listed(values: list[int]) -> str:
    """At most 12 of the values, the largest ones, in words."""
    return (("..., " if len(values) > 12 else "") + ", ".join(map(str, values[-12:]))) or "none"
