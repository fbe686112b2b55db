"""Make batches from shards, sample order and augmentation. Nothing here keeps a position in the epoch."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import psutil
import torch
from torch import Tensor
from torch.utils.data import Dataset

from indistill import config
from indistill.config import UserError, printable
from indistill.data import augment, labels, mixing
from indistill.data.batch import Batch, Request, StoredTargets
from indistill.data.decode import BadImage, decode
from indistill.data.index import Index, decoded
from indistill.data.remote import base_name
from indistill.data.samples import CLS, compressed, label_problem
from indistill.data.shards import ShardSet, refuse_compressed
from indistill.models.views import EvalView
from indistill.order import SampleOrder


class _Decoded(NamedTuple):
    """A whole data set in memory."""

    images: np.ndarray  # uint8 [N, H, W, 3]
    labels: np.ndarray  # int64 [N]
    bad: dict[int, str]  # sample id -> why the image cannot be decoded


class ImageDataset(Dataset):
    """The images of a shard set; indexing it with a Request returns a whole Batch.

    With an `order` it is for training: images are augmented, and an image that cannot be decoded is replaced
    by the next sample of its stream, the same one on any number of ranks; with its partner, if the order has
    pairs. With a `view` instead it is for evaluation, where such an image is an error, because scores on
    different samples would not be comparable; a request without stand-ins gets it black, with id and label
    -1.
    """

    def __init__(
        self,
        shards: ShardSet,
        section: config.Data,
        *,
        seed: int,
        order: SampleOrder | None = None,
        view: EvalView | None = None,
        mix: config.Mix | None = None,
    ) -> None:
        self.shards = shards
        self.section = section
        self.seed = seed
        self.order = order
        self.view = view
        self.draws = augment.draws_of(section.augment)
        self.mix = mix  # how training batches are to be mixed
        self.memory = self._decode_all() if section.in_memory else None
        self.stored: StoredTargets | None = None  # a request's fields are read from it

    def __len__(self) -> int:
        return len(self.shards)

    def for_evaluation(self, view: EvalView | None = None) -> ImageDataset:
        """The same images for evaluation, by `view` (None: this data set's own); nothing is decoded again."""
        other = copy.copy(self)
        other.order = None
        other.mix = None
        other.view = view or self.view
        return other

    def __getitem__(self, request: Request) -> Batch:
        ids = np.array(request.ids)  # a copy: samples that cannot be decoded are replaced in it
        draws = augment.uniforms(self.seed, request.views, ids, self.draws)  # [B, draws]
        size = request.size or self.section.full_size
        if self.order is not None and self.memory is not None:
            images, labels, rows = self._views_from_memory(self.memory, ids, draws=draws, size=size)
        else:
            images = np.empty((len(ids), 3, size, size), dtype=np.uint8)
            labels = np.empty(len(ids), dtype=np.int64)
            rows = list(range(len(ids)))
        replaced: list[str] = []
        finished: set[int] = set()  # rows that have stand-ins
        for row in rows:
            if row in finished:
                continue
            try:
                images[row], labels[row] = self._view(int(ids[row]), draws[row], size)
            except BadImage as bad:
                if self.order is None and request.stand_ins:
                    raise
                replaced.append(str(bad))
                if self.order is None or not request.stand_ins:
                    ids[row], images[row], labels[row] = -1, 0, -1
                    continue
                for other, stand_in in self._stand_ins(self.order, request, row, replaced).items():
                    ids[other], images[other], labels[other] = stand_in
                    finished.add(other)
        return self._batch(request, ids, images=images, labels=labels, replaced=replaced)

    def _batch(
        self,
        request: Request,
        ids: np.ndarray,
        *,
        images: np.ndarray,
        labels: np.ndarray,
        replaced: list[str],
    ) -> Batch:
        """Add stored targets and coefficients of the mixing to the images of the samples `ids`."""
        records: Mapping[str, Tensor] = {}
        if request.fields:
            assert self.stored is not None  # fields are requested only after `bring_along`
            records = self.stored.read(request.views, ids, request.fields)
        mix = None
        if self.mix is not None:
            mix = mixing.coefficients(self.mix, self.seed, view=request.views, ids=ids, size=images.shape[-1])
        return Batch(
            torch.from_numpy(images), torch.from_numpy(labels), torch.from_numpy(ids), replaced, records, mix
        )

    def _views_from_memory(
        self, memory: _Decoded, ids: np.ndarray, *, draws: np.ndarray, size: int
    ) -> tuple[np.ndarray, np.ndarray, list[int]]:
        """The augmented views [B, 3, S, S] and labels [B], and the rows whose image could not be decoded."""
        section = self.section
        views = augment.train_views(
            memory.images[ids],
            draws,
            recipe=section.augment,
            size=size,
            interpolation=section.interpolation,
        )
        bad_rows = [row for row, sample_id in enumerate(ids) if sample_id in memory.bad] if memory.bad else []
        return views, memory.labels[ids], bad_rows

    def _view(self, sample_id: int, draws: np.ndarray, size: int) -> tuple[np.ndarray, int]:
        """The training or evaluation view [3, S, S] of a sample, and its label. Raises BadImage."""
        image, label = self._image_and_label(sample_id)
        section = self.section
        where = self.shards.where(sample_id) if isinstance(image, bytes) else "image"  # decoding can fail
        if self.order is None:
            assert self.view is not None  # a data set without an order has a view
            pixels = augment.eval_view(
                image,
                size,
                view=self.view,
                where=where,
                max_pixels=section.max_image_pixels,
            )
        else:
            pixels = augment.train_view(
                image,
                draws,
                recipe=section.augment,
                size=size,
                where=where,
                interpolation=section.interpolation,
                max_pixels=section.max_image_pixels,
            )
        return pixels.transpose(2, 0, 1), label

    def _stand_ins(
        self, order: SampleOrder, request: Request, row: int, replaced: list[str]
    ) -> dict[int, tuple[int, np.ndarray, int]]:
        """Id, view and label of the next sample of this row's stream that can be decoded, by row.

        In an order with pairs, those of the next pair, of both rows.
        """
        count = 2 if order.paired else 1
        rows = range(row - row % count, row - row % count + count)
        stream, index = order.place_of(
            request.step, request.first_row + rows.start, self.section.global_batch
        )
        views = np.broadcast_to(request.views, len(request.ids))[rows.start : rows.stop]
        size = request.size or self.section.full_size
        for later in range(index + count, index + order.span, count):
            ids = np.array([order.stream_sample(request.epoch, stream, later + i) for i in range(count)])
            draws = augment.uniforms(self.seed, views, ids, self.draws)
            try:
                return {
                    other: (int(ids[i]), *self._view(int(ids[i]), draws[i], size))
                    for i, other in enumerate(rows)
                }
            except BadImage as bad:
                replaced.append(str(bad))
        raise UserError(
            f"none of the {order.span} images of stream {stream} can be decoded: "
            "run `indistill shards verify` on data.train"
        )

    def _image_and_label(self, sample_id: int) -> tuple[np.ndarray | bytes, int]:
        """The image, as pixels if it is in memory, else as a file, and its label. Raises BadImage."""
        if self.memory is None:
            sample = self.shards.read(sample_id)
            return sample.image, sample.label
        if sample_id in self.memory.bad:
            raise BadImage(self.memory.bad[sample_id])
        return self.memory.images[sample_id], self.memory.labels[sample_id]

    def _decode_all(self) -> _Decoded:
        """Decode the whole set. Raises UserError if the images differ in size or none can be decoded."""
        images: np.ndarray | None = None
        labels = np.empty(len(self), dtype=np.int64)
        bad: dict[int, str] = {}
        for i, sample in enumerate(self.shards.iterate()):
            labels[i] = sample.label
            try:
                image = decode(sample.image, self.shards.where(i), self.section.max_image_pixels)
            except BadImage as error:
                bad[i] = str(error)
                continue
            if images is None:
                images = _in_memory(len(self), image.shape)
            if image.shape != images.shape[1:]:
                raise UserError(
                    f"data.in_memory needs images of one size: sample {sample.key} has {image.shape[:2]}, "
                    f"the first has {images.shape[1:3]}: set data.in_memory: false, or resize when packing"
                )
            images[i] = image
        if images is None:
            raise UserError(
                f"{self.shards.paths[0]}: no image of these shards can be decoded: "
                "run `indistill shards verify` on them"
            )
        return _Decoded(images, labels, bad)


def _in_memory(count: int, shape: tuple[int, ...]) -> np.ndarray:
    """Memory for images uint8 [count, *shape]. Raises UserError if the machine has less."""
    size = count * math.prod(shape)
    available = psutil.virtual_memory().available
    if size > available:
        raise UserError(
            f"data.in_memory needs {size:,} bytes for {count:,} images of {shape[0]} x {shape[1]} pixels, "
            f"and {available:,} are available: set data.in_memory: false"
        )
    return np.empty((count, *shape), dtype=np.uint8)


def open_shards(
    section: config.Data,
    urls: str | list[str],
    label_map: Sequence[int] | None = None,
    *,
    label_reader: str | None = "",
) -> ShardSet:
    """Open shards, with their labels read by a map, if any.

    Raises UserError for missing, cut or malformed ones and like `check_shard`.
    """
    shards = ShardSet(
        urls,
        section.root,
        cache_dir=section.cache_dir,
        cache_bytes=int(section.cache_bytes),
        labels=labels.of_section(section),
    )
    for path, index in zip(shards.paths, shards._indices):
        mapped = label_map is not None
        check_shard(section, path, index=index, mapped=mapped, label_reader=label_reader)
    if label_map is not None:
        shards.relabel(label_map)
    return shards


def check_shard(
    section: config.Data,
    path: str,
    *,
    index: Index,
    mapped: bool = False,
    label_reader: str | None = "",
) -> None:
    """Raise UserError for a label that is not a class, and for a shard that cannot be read at random.

    Whatever reads shards by index refuses them here, and `doctor` checks them here before a run. mapped: a
    label map gives the classes. label_reader: what reads the labels, for the message; None: nothing does, and
    images may have none.
    """
    if compressed(path) and not section.in_memory:
        refuse_compressed(path)
    if not section.num_classes:  # labels are for scores of embeddings alone, which check them
        return
    outside = (index.labels >= section.num_classes) & (not mapped)
    missing = (index.labels < 0) & (label_reader is not None)
    for row in np.flatnonzero(missing | outside)[:1]:
        key = decoded(index.keys[row])
        problem = label_problem(
            key,
            index.labels[row],
            num_classes=section.num_classes,
            reader=label_reader,
            missing=CLS.missing if section.label is None else labels.missing(section.label),
        )
        raise UserError(printable(f"{base_name(path)}: sample {key}: {problem}"))
