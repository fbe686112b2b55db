"""Shards, order and augmentation make batches. Nothing here has a position: a loader is opened at any step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from indistill import augment, config
from indistill.config import UserError
from indistill.decode import BadImage, decode
from indistill.distributed import preemption
from indistill.models.views import EvalView
from indistill.order import SampleOrder
from indistill.shards import ShardSet, label_problem

if TYPE_CHECKING:
    from indistill.store import Reader

PREFETCH_STEPS = 32  # how far ahead of the loader the next remote shards are fetched


class Batch(NamedTuple):
    images: Tensor  # uint8 [B, 3, S, S]
    labels: Tensor  # int64 [B]
    ids: Tensor  # int64 [B], place of each sample in the data set; -1 where it has none (data.access: stream)
    replaced: list[str]  # the samples that could not be decoded, and why: others stand in for them
    records: Mapping[str, Tensor] = {}  # stored targets, uint8 [B, bytes of a record] per field (store.py)


class Request(NamedTuple):
    """What a loader worker is asked for: rows of a global batch."""

    epoch: int
    step: int  # within the epoch
    first_row: int  # place of ids[0] in the global batch
    ids: np.ndarray  # int64 [B]
    fields: tuple[str, ...] = ()  # of the stored targets, which are to come along
    stand_ins: bool = True  # else a sample that cannot be decoded leaves a black image, with id -1


class ImageDataset(Dataset):
    """A shard set as images; indexed by Request, it returns a whole Batch.

    With an `order` it is for training: images are augmented, and one that cannot be decoded is replaced by the next
    sample of its stream, the same on any number of ranks. Without, it is for evaluation, by its `view`, where such an
    image is an error: scores on other samples would not compare.
    """

    def __init__(
        self,
        shards: ShardSet,
        section: config.Data,
        seed: int,
        order: SampleOrder | None = None,
        view: EvalView | None = None,
    ) -> None:
        self.shards, self.section, self.seed, self.order, self.view = shards, section, seed, order, view
        self.memory = self._decode_all() if section.in_memory else None
        self.stored: Reader | None = None  # what a request's fields are read from

    def __len__(self) -> int:
        return len(self.shards)

    def for_evaluation(self, view: EvalView | None = None) -> ImageDataset:
        """The same images without augmentation, as `view` (None: its own) shows them; nothing is decoded again."""
        other = copy.copy(self)
        other.order, other.view = None, view or self.view
        return other

    def __getitem__(self, request: Request) -> Batch:
        size, count = self.section.image_size, len(request.ids)
        ids = np.array(request.ids)
        replaced: list[str] = []
        view = augment.view_of(self.section.augment, request.epoch)
        draws = augment.uniforms(self.seed, view, ids)  # [B, DRAWS]
        if self.order is not None and self.memory is not None:
            pixels, all_labels, missing = self.memory
            views = augment.train_views(pixels[ids], draws, self.section.augment, size, self.section.interpolation)
            images, labels = views, all_labels[ids]
            left = [row for row in range(count) if ids[row] in missing] if missing else []
        else:
            images, labels = np.empty((count, 3, size, size), dtype=np.uint8), np.empty(count, dtype=np.int64)
            left = range(count)
        for row in left:
            try:
                images[row], labels[row] = self._view(int(ids[row]), draws[row])
            except BadImage as bad:
                if self.order is None:
                    raise
                replaced.append(str(bad))
                ids[row], images[row], labels[row] = (
                    self._stand_in(request, row, replaced) if request.stand_ins else (-1, 0, -1)
                )
        records = self.stored.read(view, ids, request.fields) if request.fields else {}
        return Batch(torch.from_numpy(images), torch.from_numpy(labels), torch.from_numpy(ids), replaced, records)

    def _view(self, sample_id: int, draws: np.ndarray) -> tuple[np.ndarray, int]:
        """The augmented or evaluation view [3, S, S] of a sample, and its label. Raises BadImage."""
        image, label = self._image_and_label(sample_id)
        size = self.section.image_size
        where = self.shards.where(sample_id) if isinstance(image, bytes) else "image"  # only decoding can fail
        if self.order is None:
            view = augment.eval_view(image, size, self.view, where)
        else:
            view = augment.train_view(image, draws, self.section.augment, size, where, self.section.interpolation)
        return view.transpose(2, 0, 1), label

    def _stand_in(self, request: Request, row: int, replaced: list[str]) -> tuple[int, np.ndarray, int]:
        """Id, view and label of the first sample after this row's, in its stream, that can be decoded."""
        per_stream = self.section.global_batch // self.order.streams
        stream, place = divmod(request.first_row + row, per_stream)
        place += request.step * per_stream
        for later in range(place + 1, place + self.order.span):
            sample_id = self.order.stream_sample(request.epoch, stream, later)
            view = augment.view_of(self.section.augment, request.epoch)
            draws = augment.uniforms(self.seed, view, np.array([sample_id]))[0]
            try:
                return sample_id, *self._view(sample_id, draws)
            except BadImage as bad:
                replaced.append(str(bad))
        raise UserError(f"none of the {self.order.span} images of stream {stream} can be decoded")

    def _image_and_label(self, sample_id: int) -> tuple[np.ndarray | bytes, int]:
        """The image as pixels if it is in memory, else as a file. Raises BadImage."""
        if self.memory is None:
            sample = self.shards.read(sample_id)
            return sample.image, sample.label
        images, labels, bad = self.memory
        if sample_id in bad:
            raise BadImage(bad[sample_id])
        return images[sample_id], labels[sample_id]

    def _decode_all(self) -> tuple[np.ndarray, np.ndarray, dict[int, str]]:
        """The whole set: uint8 [N, H, W, 3], int64 [N], and what is wrong with the images that are not there."""
        images: np.ndarray | None = None
        labels = np.empty(len(self), dtype=np.int64)
        bad: dict[int, str] = {}
        for i, sample in enumerate(self.shards.iterate()):
            labels[i] = sample.label
            try:
                image = decode(sample.image, self.shards.where(i))
            except BadImage as error:
                bad[i] = str(error)
                continue
            if images is None:
                images = np.empty((len(self), *image.shape), dtype=np.uint8)
            if image.shape != images.shape[1:]:
                raise UserError(
                    f"data.in_memory needs images of one size: sample {sample.key} has {image.shape[:2]}, the first "
                    f"has {images.shape[1:3]}: set data.in_memory: false, or resize when packing"
                )
            images[i] = image
        if images is None:
            raise UserError(f"{self.shards.paths[0]}: no image of these shards can be decoded")
        return images, labels, bad


class IndexedTraining:
    """The training data of one rank, read through the shards' indices in the exact order.

    Raises UserError for missing, cut or malformed shards and, with the values that work, for a batch that does not
    divide.
    """

    def __init__(self, section: config.Data, seed: int, rank: int, world: int, accumulation: int) -> None:
        self.section, self.rank, self.world, self.accumulation = section, rank, world, accumulation
        shards = open_shards(section, section.train)
        self.order = SampleOrder(shards.sizes, seed, section.streams, section.window)
        self.order.check(section.global_batch, world)
        check_accumulation(section, world, accumulation)
        self.dataset = ImageDataset(shards, section, seed, self.order)
        self.steps_per_epoch = self.order.steps_per_epoch(section.global_batch)
        self.fingerprint = shards.fingerprint
        self.fields_at: Callable[[int], tuple[str, ...]] = lambda step: ()

    def bring_along(self, stored: Reader, fields_at: Callable[[int], tuple[str, ...]]) -> None:
        """Have loaders read from the stored targets what each global step needs of them."""
        self.dataset.stored, self.fields_at = stored, fields_at

    def loader(self, first_step: int, last_step: int, device: torch.device) -> DataLoader:
        """The micro-batches of the global steps [first_step, last_step)."""
        return loader(self.dataset, self._requests(first_step, last_step), device)

    def _requests(self, first_step: int, last_step: int) -> Iterator[Request]:
        rank_batch = self.section.global_batch // self.world
        micro_batch = rank_batch // self.accumulation
        ahead = copy.deepcopy(self.order)  # with caches of its own, at another place of the epoch
        for step in range(first_step, last_step):
            self._prefetch(ahead, min(step + PREFETCH_STEPS, last_step - 1))
            epoch, step_of_epoch = divmod(step, self.steps_per_epoch)
            fields = self.fields_at(step)
            ids = self._ids(self.order, step)
            for begin in range(0, rank_batch, micro_batch):
                first_row = self.rank * rank_batch + begin
                yield Request(epoch, step_of_epoch, first_row, ids[begin : begin + micro_batch], fields)

    def _prefetch(self, order: SampleOrder, step: int) -> None:
        shards, stored = self.dataset.shards, self.dataset.stored
        if shards.remote:
            shards.prefetch(self._ids(order, step))
        if stored is not None and stored.remote and (fields := self.fields_at(step)):
            view = augment.view_of(self.section.augment, step // self.steps_per_epoch)
            stored.prefetch(view, self._ids(order, step), fields)

    def _ids(self, order: SampleOrder, step: int) -> np.ndarray:
        epoch, step_of_epoch = divmod(step, self.steps_per_epoch)
        return order.rank_batch(epoch, step_of_epoch, self.section.global_batch, self.rank, self.world)


def open_shards(section: config.Data, urls: str | list[str]) -> ShardSet:
    """Raises UserError for missing, cut or malformed shards and for labels that are no class."""
    shards = ShardSet(urls, section.root, section.cache_dir, int(section.cache_bytes), section.allow_pipe)
    labels = shards.labels
    for sample_id in np.flatnonzero((labels < 0) | (labels >= section.num_classes))[:1]:
        raise UserError(f"{shards.where(sample_id)}: {label_problem(labels[sample_id], section.num_classes)}")
    return shards


def check_accumulation(section: config.Data, world: int, accumulation: int) -> None:
    """Raise UserError if the global batch does not divide into micro-batches."""
    if section.global_batch % (world * accumulation):
        raise UserError(
            f"data.global_batch ({section.global_batch}) is not divisible by world size ({world}) times "
            f"grad_accumulation ({accumulation})"
        )


def eval_shares(samples: int, world: int) -> list[range]:
    """The consecutive samples that each rank evaluates: all of them once, the shares equal or one apart."""
    return [range(samples * rank // world, samples * (rank + 1) // world) for rank in range(world)]


def eval_loader(dataset: ImageDataset, batch: int, rank: int, world: int, device: torch.device) -> DataLoader:
    """One rank's share of the set, in order."""
    share = eval_shares(len(dataset), world)[rank]
    requests = (Request(0, 0, i, np.array(share[i : i + batch])) for i in range(0, len(share), batch))
    return loader(dataset, requests, device)


class _Requests(Sampler):
    """The requests of one rank: a generator, so that opening it costs nothing at any step."""

    def __init__(self, requests: Iterator[Request]) -> None:
        self.requests = requests

    def __iter__(self) -> Iterator[Request]:
        return self.requests


class Loader(DataLoader):
    """A DataLoader whose workers no signal can end before `preemption.in_worker` has run in them."""

    def __iter__(self) -> Iterator[Batch]:
        with preemption.signals_blocked():
            return super().__iter__()


def loader(dataset: ImageDataset, requests: Iterator[Request], device: torch.device) -> Loader:
    """The batch of each request, in order."""
    workers = 0 if dataset.memory is not None else dataset.section.workers  # a crop from memory is no work to share
    return Loader(
        dataset,
        sampler=_Requests(requests),
        batch_size=None,
        num_workers=workers,
        worker_init_fn=preemption.in_worker,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # else opening it draws from the global one, and a resumed run from another state
    )
