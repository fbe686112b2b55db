"""Plain streaming (`data.access: stream`): a thin WebDataset pipeline for shards without random access.

As with the indexed reader, every rank gets exactly as many samples as the schedule says, so no rank waits for
another at the end of an epoch; the order of shards is a function of the seed; a resumed run continues at the
shard where it stopped. Without an index, the order depends on the number of readers, a resumed run repeats or
leaves out parts of shards, and a shard that was cut between two members is not detected.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import random
import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
import webdataset as wds
from torch.utils.data import IterableDataset, get_worker_info

from indistill import config
from indistill.config import UserError, printable, redacted
from indistill.config.limits import MAX_BAD_IN_A_ROW
from indistill.curriculum import ImageSizes
from indistill.data import augment, mixing, remote, shards
from indistill.data.batch import Batch, StoredTargets
from indistill.data.decode import BadImage
from indistill.data.labels import of_section
from indistill.data.loader import Loader, check_accumulation
from indistill.data.samples import CLS, Labels, Others, label_problem, samples_of
from indistill.data.tar import Tar
from indistill.distributed import preemption

log = logging.getLogger(__name__)

_VERIFY = "run `indistill shards verify` on data.train"


class StreamedTraining:
    """The training data of one rank, streamed; the counterpart of `loader.IndexedTraining`.

    label_reader: as for `dataset.check_shard`. Raises UserError for missing shards, and for fewer shards than
    readers.
    """

    dataset = None  # samples have no index

    def __init__(
        self,
        section: config.Data,
        seed: int,
        *,
        rank: int,
        world: int,
        accumulation: int,
        mix: config.Mix | None = None,
        label_reader: str | None = "",
    ) -> None:
        self.section = section
        self.label_reader = label_reader
        self.seed = seed
        self.rank = rank
        self.world = world
        self.accumulation = accumulation
        self.urls = shards.expand(section.train, section.root)
        check_accumulation(section, world, accumulation, mix)
        self.mix = mix
        self.sizes = ImageSizes(section.full_size, section.full_size)
        readers = world * max(section.workers, 1)
        if len(self.urls) < readers:
            raise UserError(
                f"data.access: stream needs a shard for every reader: {world} ranks with {section.workers} "
                f"workers are {readers} readers of {len(self.urls)} shards: lower data.workers, or pack "
                "smaller shards"
            )
        assert section.epoch_samples is not None  # the config requires it for data.access: stream
        self.epoch_samples = section.epoch_samples
        self.steps_per_epoch = self.epoch_samples // section.global_batch
        classes = of_section(section)
        self.labels: Labels = classes or CLS
        identity = [*map(redacted, self.urls), *([] if classes is None else [classes.fingerprint])]
        self.fingerprint = hashlib.sha256("\0".join(identity).encode()).hexdigest()

    def bring_along(self, stored: StoredTargets, fields_at: Callable[[int], tuple[str, ...]]) -> None:
        """Raise UserError: streamed samples have no ids to find stored targets by."""
        raise UserError("data.access: stream has no sample ids to read stored targets by: set it to index")

    def loader(self, first_step: int, last_step: int, device: torch.device) -> Loader:
        """Load the micro-batches of the global steps [first_step, last_step)."""
        return Loader(
            StreamedImages(self, first_step, (last_step - first_step) * self.accumulation),
            batch_size=None,
            num_workers=self.section.workers,
            worker_init_fn=preemption.in_worker,
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),
        )


def read_shard(
    url: str,
    num_classes: int,
    *,
    others: Others,
    load: bool = True,
    label_reader: str | None = "",
    labels: Labels = CLS,
) -> Iterator[tuple[str, bytes, int]]:
    """Yield key, image and label of each sample of a streamed shard. `doctor` calls this, too.

    Without `load`, images are b"". Without classes, labels are not checked. label_reader: as for
    `dataset.check_shard`. labels: how they are read. Raises UserError for a shard that cannot be read, and
    for a label that is not a class.
    """
    empty = True
    try:
        with remote.open_stream(url) as stream:
            tar = Tar(url, stream, strict=False)
            samples = samples_of(tar, load=load, others=others, may_be_empty=True, labels=labels)
            for key, _, image, label in samples:
                problem = label_problem(
                    key, label, num_classes=num_classes, reader=label_reader, missing=labels.missing
                )
                if num_classes and problem:
                    raise UserError(f"{url}: sample {key}: {problem}")
                empty = False
                yield key, image, label
        if empty and others.problem:
            raise UserError(f"{url}: holds no sample: {others.problem}")
    except (OSError, EOFError) as error:
        raise UserError(f"{url}: cannot be read to its end: {error}") from None


class _Sample(NamedTuple):
    epoch: int
    url: str
    key: str
    image: bytes  # the encoded file
    label: int

    @property
    def number(self) -> int:
        """The key as a number: a sample has no id, and its view must not depend on where it turns up."""
        return zlib.crc32(self.key.encode(errors="surrogateescape"))


class StreamedImages(IterableDataset):
    """`batches` micro-batches for one rank; the shards are repeated until there are enough."""

    def __init__(self, training: StreamedTraining, first_step: int, batches: int) -> None:
        self.training = training
        self.first_step = first_step
        self.batches = batches

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        reader = self.training.rank * workers + number
        readers = self.training.world * workers
        # Of the order of samples.
        rng = random.Random(f"{self.training.seed} {reader} {self.first_step}")  # nosec B311
        samples = self._samples(reader, readers)
        samples = wds.shuffle(self.training.section.shuffle_buffer, rng=rng)(samples)
        for i in range(number, self.batches, workers):  # the loader takes batches from the workers in turn
            step = self.first_step + i // self.training.accumulation
            yield self._batch(samples, self.training.sizes.at(step))

    def _samples(self, reader: int, readers: int) -> Iterator[_Sample]:
        """Read this reader's shards without end, from the shard that the first step falls into.

        Raises UserError for a shard that cannot be read, and where all of them together hold no sample.
        """
        training = self.training
        urls = training.urls
        samples = self.first_step * training.section.global_batch
        skipped = samples * len(urls) // (training.epoch_samples * readers)
        for epoch in itertools.count():
            order = np.random.RandomState([training.seed, epoch]).permutation(len(urls))
            own = order[reader::readers].tolist()
            empty = skipped == 0
            for shard in own[skipped:]:
                for sample in self._read(epoch, urls[shard]):
                    empty = False
                    yield sample
            skipped = max(0, skipped - len(own))
            if empty:
                raise UserError(
                    f"{urls[own[0]]}: neither it nor the reader's other shards hold a sample: {_VERIFY}"
                )

    def _read(self, epoch: int, url: str) -> Iterator[_Sample]:
        """The samples of a shard, from front to end."""
        others = Others()
        training = self.training
        samples = read_shard(
            url,
            training.section.num_classes,
            others=others,
            label_reader=training.label_reader,
            labels=training.labels,
        )
        for key, image, label in samples:
            yield _Sample(epoch, url, key, image, label)
        if others.problem and epoch == 0:
            log.warning("%s", printable(f"{url}: {others.problem}"))

    def _batch(self, samples: Iterator[_Sample], size: int) -> Batch:
        """Decode and augment the next micro-batch; the next samples replace those that cannot be decoded.

        Raises UserError if too many in a row cannot: their shards would be read for ever.
        """
        training, section = self.training, self.training.section
        count = section.global_batch // (training.world * training.accumulation)
        images = np.empty((count, 3, size, size), dtype=np.uint8)
        labels = np.empty(count, dtype=np.int64)
        numbers, views = np.empty(count, dtype=np.int64), np.empty(count, dtype=np.int64)
        replaced: list[str] = []
        row = 0
        bad_in_a_row = 0
        while row < count:
            sample = next(samples)
            where = printable(f"{sample.url}: sample {sample.key}")
            labels[row] = sample.label
            numbers[row], views[row] = sample.number, augment.view_of(section, sample.epoch, 0)
            try:
                pixels = self._view(sample, where, size)
            except BadImage as bad:
                replaced.append(str(bad))
                bad_in_a_row += 1
                if bad_in_a_row == MAX_BAD_IN_A_ROW:
                    raise UserError(
                        f"{bad}, the last of {bad_in_a_row} in a row (MAX_BAD_IN_A_ROW): {_VERIFY}"
                    ) from None
                continue
            bad_in_a_row = 0
            images[row] = pixels.transpose(2, 0, 1)
            row += 1
        mix = None
        if training.mix is not None:
            mix = mixing.coefficients(training.mix, training.seed, view=views, ids=numbers, size=size)
        no_ids = torch.full((count,), -1)
        return Batch(torch.from_numpy(images), torch.from_numpy(labels), no_ids, replaced, {}, mix)

    def _view(self, sample: _Sample, where: str, size: int) -> np.ndarray:
        """The augmented view [S, S, 3] of a sample. Raises BadImage."""
        training, section = self.training, self.training.section
        view = augment.view_of(section, sample.epoch, 0)
        parts = augment.draws_of(section.augment)
        draws = augment.uniforms(training.seed, view, np.array([sample.number]), parts)[0]
        return augment.train_view(
            sample.image,
            draws,
            recipe=section.augment,
            size=size,
            where=where,
            interpolation=section.interpolation,
            max_pixels=section.max_image_pixels,
        )
