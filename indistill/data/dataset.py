"""Shards, order and augmentation make batches. Nothing here has a position: a loader is opened at any step."""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch.utils.data import Dataset

from indistill import config
from indistill.config import UserError
from indistill.data import augment
from indistill.data.batch import Batch, Request, StoredTargets
from indistill.data.decode import BadImage, decode
from indistill.data.index import label_problem
from indistill.data.shards import ShardSet
from indistill.models.views import EvalView
from indistill.order import SampleOrder


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
        self.stored: StoredTargets | None = None  # what a request's fields are read from

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
            views = augment.train_views(
                pixels[ids], draws, self.section.augment, size, self.section.interpolation
            )
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
        return Batch(
            torch.from_numpy(images), torch.from_numpy(labels), torch.from_numpy(ids), replaced, records
        )

    def _view(self, sample_id: int, draws: np.ndarray) -> tuple[np.ndarray, int]:
        """The augmented or evaluation view [3, S, S] of a sample, and its label. Raises BadImage."""
        image, label = self._image_and_label(sample_id)
        size = self.section.image_size
        where = (
            self.shards.where(sample_id) if isinstance(image, bytes) else "image"
        )  # only decoding can fail
        if self.order is None:
            view = augment.eval_view(image, size, self.view, where)
        else:
            view = augment.train_view(
                image, draws, self.section.augment, size, where, self.section.interpolation
            )
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


def open_shards(section: config.Data, urls: str | list[str]) -> ShardSet:
    """Raises UserError for missing, cut or malformed shards and for labels that are no class."""
    shards = ShardSet(urls, section.root, section.cache_dir, int(section.cache_bytes), section.allow_pipe)
    labels = shards.labels
    for sample_id in np.flatnonzero((labels < 0) | (labels >= section.num_classes))[:1]:
        raise UserError(f"{shards.where(sample_id)}: {label_problem(labels[sample_id], section.num_classes)}")
    return shards
