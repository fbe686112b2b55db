"""Plain streaming (`data.access: stream`): a thin WebDataset pipeline for shards without random access.

As with the indexed reader, every rank gets exactly as many samples as the schedule says, so no rank waits for
another at the end of an epoch; the order of shards is a function of the seed; a resumed run continues at the
shard where it stopped. Without an index, the order depends on the number of readers, a resumed run repeats or
leaves out parts of shards, and a shard that was cut between two members is not detected.
"""

from __future__ import annotations

import hashlib
import itertools
import random
import tarfile
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import webdataset as wds
from torch.utils.data import IterableDataset, get_worker_info
from webdataset.tariterators import group_by_keys, tar_file_expander

from indistill import config
from indistill.config import UserError
from indistill.data import augment, remote, shards
from indistill.data.batch import Batch, StoredTargets
from indistill.data.decode import BadImage
from indistill.data.index import IMAGE_EXTENSIONS, label_problem, malformed_label, parse_label
from indistill.data.loader import Loader, check_accumulation
from indistill.distributed import preemption


class StreamedTraining:
    """The training data of one rank, streamed; the counterpart of `loader.IndexedTraining`.

    Raises UserError for missing shards, and for fewer shards than readers.
    """

    dataset = None  # samples have no index

    def __init__(self, section: config.Data, seed: int, *, rank: int, world: int, accumulation: int) -> None:
        self.section = section
        self.seed = seed
        self.rank = rank
        self.world = world
        self.accumulation = accumulation
        self.urls = shards.expand(section.train, section.root, section.allow_pipe)
        check_accumulation(section, world, accumulation)
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
        self.fingerprint = hashlib.sha256("\0".join(self.urls).encode()).hexdigest()

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


class StreamedImages(IterableDataset):
    """`batches` micro-batches for one rank; the shards are repeated until there are enough."""

    def __init__(self, training: StreamedTraining, first_step: int, batches: int) -> None:
        self.training = training
        self.first_step = first_step
        self.batches = batches
        self.url = ""  # of the shard that is being read, for messages

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        reader = self.training.rank * workers + number
        readers = self.training.world * workers
        rng = random.Random(f"{self.training.seed} {reader} {self.first_step}")  # nosec B311  # the order of samples
        samples = group_by_keys(tar_file_expander(self._opened(reader, readers)))
        samples = wds.shuffle(self.training.section.shuffle_buffer, rng=rng)(samples)
        for _ in range(number, self.batches, workers):  # the loader takes batches from the workers in turn
            yield self._batch(samples)

    def _opened(self, reader: int, readers: int) -> Iterator[dict[str, Any]]:
        """Open this reader's shards without end, from the shard that the first step falls into."""
        training = self.training
        urls = training.urls
        samples = self.first_step * training.section.global_batch
        skipped = samples * len(urls) // (training.epoch_samples * readers)
        for epoch in itertools.count():
            order = np.random.RandomState([training.seed, epoch]).permutation(len(urls))
            for shard in order[reader::readers]:
                if skipped:
                    skipped -= 1
                    continue
                self.url = urls[shard]
                with remote.open_stream(self.url) as stream:
                    yield {"url": f"{epoch} {self.url}", "stream": stream}

    def _batch(self, samples: Iterator[dict[str, Any]]) -> Batch:
        """Decode and augment the next micro-batch; the next samples replace those that cannot be decoded."""
        training, section = self.training, self.training.section
        count = section.global_batch // (training.world * training.accumulation)
        images = np.empty((count, 3, section.image_size, section.image_size), dtype=np.uint8)
        labels = np.empty(count, dtype=np.int64)
        replaced: list[str] = []
        row = 0
        while row < count:
            epoch, key, where, image, labels[row] = self._next(samples)
            # There are no ids: the key, as a number, makes the view of a sample independent of where it turns
            # up.
            view = augment.view_of(section.augment, epoch)
            draws = augment.uniforms(training.seed, view, np.array([zlib.crc32(key.encode())]))[0]
            try:
                pixels = augment.train_view(
                    image,
                    draws,
                    recipe=section.augment,
                    size=section.image_size,
                    where=where,
                    interpolation=section.interpolation,
                )
            except BadImage as bad:
                replaced.append(str(bad))
                continue
            images[row] = pixels.transpose(2, 0, 1)
            row += 1
        return Batch(torch.from_numpy(images), torch.from_numpy(labels), torch.full((count,), -1), replaced)

    def _next(self, samples: Iterator[dict[str, Any]]) -> tuple[int, str, str, bytes, int]:
        """The next sample: epoch, key, name for messages, image file, label.

        Raises UserError for a shard that cannot be read and for a sample without an image or with an invalid
        label.
        """
        try:
            sample = next(samples)
        except (OSError, EOFError, tarfile.TarError) as error:
            raise UserError(f"{self.url}: cannot be read to its end: {error.args[0]}") from None
        epoch, url = sample["__url__"].split(" ", 1)
        key = sample["__key__"]
        where = f"{url}: sample {key}"
        image = next((sample[name] for name in IMAGE_EXTENSIONS if name in sample), None)
        if image is None:
            raise UserError(f"{where} has no image ({', '.join(IMAGE_EXTENSIONS)})")
        label = parse_label(sample["cls"]) if "cls" in sample else -1
        if label is None:
            raise UserError(f"{where}: {malformed_label(key, sample['cls'])}")
        if problem := label_problem(label, self.training.section.num_classes):
            raise UserError(f"{where}: {problem}")
        return int(epoch), key, where, image, label
