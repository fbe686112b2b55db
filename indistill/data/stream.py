"""Plain streaming (`data.access: stream`): a thin WebDataset pipeline, for shards that cannot be sought or cached.

What it keeps of the indexed reader: every rank gets exactly as many samples as the schedule says, so no rank waits for
another at the end of an epoch; the order of shards is a function of the seed; a resumed run goes on at the shard where
it stopped. What it gives up, with the index: the order depends on the number of readers, a resumed run repeats or
leaves out parts of shards, and a shard that was cut between two members is not noticed.
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
    """The training data of one rank; the counterpart of `data.IndexedTraining`. Raises UserError for missing shards."""

    dataset = None  # samples have no index

    def __init__(self, section: config.Data, seed: int, rank: int, world: int, accumulation: int) -> None:
        self.section, self.seed, self.rank, self.world, self.accumulation = (
            section,
            seed,
            rank,
            world,
            accumulation,
        )
        self.urls = shards.expand(section.train, section.root, section.allow_pipe)
        check_accumulation(section, world, accumulation)
        readers = world * max(section.workers, 1)
        if len(self.urls) < readers:
            raise UserError(
                f"data.access: stream needs a shard for every reader: {world} ranks with {section.workers} workers are "
                f"{readers} readers of {len(self.urls)} shards: lower data.workers, or pack smaller shards"
            )
        self.steps_per_epoch = section.epoch_samples // section.global_batch
        self.fingerprint = hashlib.sha256("\0".join(self.urls).encode()).hexdigest()

    def bring_along(self, stored: StoredTargets, fields_at: Callable[[int], tuple[str, ...]]) -> None:
        """Raise UserError: streamed samples have no ids to find stored targets by."""
        raise UserError("data.access: stream has no sample ids to read stored targets by: set it to index")

    def loader(self, first_step: int, last_step: int, device: torch.device) -> Loader:
        """The micro-batches of the global steps [first_step, last_step)."""
        return Loader(
            StreamedImages(self, first_step, (last_step - first_step) * self.accumulation),
            batch_size=None,
            num_workers=self.section.workers,
            worker_init_fn=preemption.in_worker,
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),
        )


class StreamedImages(IterableDataset):
    """`batches` micro-batches for one rank, whatever the shards hold: they are read over and over."""

    def __init__(self, training: StreamedTraining, first_step: int, batches: int) -> None:
        self.training, self.first_step, self.batches = training, first_step, batches

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        reader, readers = self.training.rank * workers + number, self.training.world * workers
        rng = random.Random(f"{self.training.seed} {reader} {self.first_step}")
        samples = group_by_keys(tar_file_expander(self._opened(reader, readers)))
        samples = wds.shuffle(self.training.section.shuffle_buffer, rng=rng)(samples)
        for _ in range(number, self.batches, workers):  # the loader takes a batch of each worker in turn
            yield self._batch(samples)

    def _opened(self, reader: int, readers: int) -> Iterator[dict[str, Any]]:
        """This reader's shards for ever, from the one that the first step falls into."""
        urls, section = self.training.urls, self.training.section
        skipped = self.first_step * section.global_batch * len(urls) // (section.epoch_samples * readers)
        for epoch in itertools.count():
            for shard in np.random.RandomState([self.training.seed, epoch]).permutation(len(urls))[
                reader::readers
            ]:
                if skipped:
                    skipped -= 1
                    continue
                self.url = urls[shard]
                with remote.open_stream(self.url) as stream:
                    yield {"url": f"{epoch} {self.url}", "stream": stream}

    def _batch(self, samples: Iterator[dict[str, Any]]) -> Batch:
        section = self.training.section
        count = section.global_batch // (self.training.world * self.training.accumulation)
        images = np.empty((count, 3, section.image_size, section.image_size), dtype=np.uint8)
        labels = np.empty(count, dtype=np.int64)
        replaced: list[str] = []
        row = 0
        while row < count:
            try:
                sample = next(samples)
            except (OSError, EOFError, tarfile.TarError) as error:
                raise UserError(f"{self.url}: cannot be read to its end: {error.args[0]}") from None
            (epoch, url), key = sample["__url__"].split(" ", 1), sample["__key__"]
            where = f"{url}: sample {key}"
            image = next((sample[name] for name in IMAGE_EXTENSIONS if name in sample), None)
            if image is None:
                raise UserError(f"{where} has no image ({', '.join(IMAGE_EXTENSIONS)})")
            label = parse_label(sample["cls"]) if "cls" in sample else -1
            if label is None:
                raise UserError(f"{where}: {malformed_label(key, sample['cls'])}")
            if problem := label_problem(label, section.num_classes):
                raise UserError(f"{where}: {problem}")
            labels[row] = label
            # There are no ids here: the key, as a number, makes a view the same wherever its sample turns up.
            view = augment.view_of(section.augment, int(epoch))
            draws = augment.uniforms(self.training.seed, view, np.array([zlib.crc32(key.encode())]))[0]
            try:
                image = augment.train_view(
                    image, draws, section.augment, section.image_size, where, section.interpolation
                )
            except BadImage as bad:
                replaced.append(str(bad))
                continue
            images[row] = image.transpose(2, 0, 1)
            row += 1
        return Batch(torch.from_numpy(images), torch.from_numpy(labels), torch.full((count,), -1), replaced)
