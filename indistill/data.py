"""Shards, order and augmentation make batches. Nothing here has a position: a loader is opened at any step."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from indistill import augment, config
from indistill.config import UserError
from indistill.order import SampleOrder
from indistill.shards import Sample, ShardSet


class Batch(NamedTuple):
    images: Tensor  # uint8 [B, 3, S, S]
    labels: Tensor  # int64 [B]
    ids: Tensor  # int64 [B], place of each sample in the data set


class Request(NamedTuple):
    """What a loader worker is asked for."""

    epoch: int
    ids: np.ndarray  # int64 [B]


class ImageDataset(Dataset):
    """A shard set as images; indexed by Request, it returns a whole Batch."""

    def __init__(self, shards: ShardSet, section: config.Data, seed: int, train: bool) -> None:
        self.shards, self.section, self.seed, self.train = shards, section, seed, train
        self.memory = self._decode_all() if section.in_memory else None

    def __len__(self) -> int:
        return len(self.shards)

    def for_evaluation(self) -> ImageDataset:
        """The same images without augmentation; nothing is decoded again."""
        view = copy.copy(self)
        view.train = False
        return view

    def __getitem__(self, request: Request) -> Batch:
        size = self.section.image_size
        images = np.empty((len(request.ids), size, size, 3), dtype=np.uint8)
        labels = np.empty(len(request.ids), dtype=np.int64)
        draws = augment.uniforms(self.seed, request.epoch, request.ids)  # [B, DRAWS]
        for i, sample_id in enumerate(request.ids):
            image, labels[i] = self._image_and_label(int(sample_id))
            if self.train:
                images[i] = augment.train_view(image, draws[i], self.section.augment, size)
            else:
                images[i] = augment.eval_view(image, size, self.section.eval_crop)
        chw = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
        return Batch(chw, torch.from_numpy(labels), torch.from_numpy(np.asarray(request.ids)))

    def _image_and_label(self, sample_id: int) -> tuple[np.ndarray, int]:
        if self.memory is not None:
            return self.memory[0][sample_id], self.memory[1][sample_id]
        sample = self.shards.read(sample_id)
        return self._decoded(sample), sample.label

    def _decoded(self, sample: Sample) -> np.ndarray:
        if not 0 <= sample.label < self.section.num_classes:
            raise UserError(
                f"sample {sample.key}: label {sample.label} is none of the data.num_classes, 0 to "
                f"{self.section.num_classes - 1}"
            )
        return augment.decode(sample.image, f"sample {sample.key}")

    def _decode_all(self) -> tuple[np.ndarray, np.ndarray]:
        """The whole set: uint8 [N, H, W, 3] and int64 [N]."""
        images, labels = np.empty(0), np.empty(len(self), dtype=np.int64)
        for i, sample in enumerate(self.shards.iterate()):
            image = self._decoded(sample)
            if i == 0:
                images = np.empty((len(self), *image.shape), dtype=np.uint8)
            if image.shape != images.shape[1:]:
                raise UserError(
                    f"data.in_memory needs images of one size: sample {sample.key} has {image.shape[:2]}, the first "
                    f"has {images.shape[1:3]}: set data.in_memory: false, or resize when packing"
                )
            images[i], labels[i] = image, sample.label
        return images, labels


class _Requests(Sampler):
    """The requests of one rank from a step on: a generator, so that opening it costs nothing at any step."""

    def __init__(self, requests: Iterator[Request]) -> None:
        self.requests = requests

    def __iter__(self) -> Iterator[Request]:
        return self.requests


def open_shards(section: config.Data, urls: str | list[str]) -> ShardSet:
    """Raises UserError for missing, cut or malformed shards."""
    return ShardSet(urls, root=section.root, cache_dir=section.cache_dir)


def sample_order(section: config.Data, shards: ShardSet, seed: int, world: int, accumulation: int) -> SampleOrder:
    """The order of the training samples. Raises UserError, with the values that work, if the batch does not divide."""
    order = SampleOrder(shards.sizes, seed, section.streams, section.window)
    order.check(section.global_batch, world)
    if section.global_batch // world % accumulation:
        raise UserError(
            f"data.global_batch ({section.global_batch}) on {world} ranks gives each {section.global_batch // world} "
            f"samples, not divisible by grad_accumulation ({accumulation})"
        )
    return order


def train_loader(
    dataset: ImageDataset,
    order: SampleOrder,
    first_step: int,
    last_step: int,
    rank: int,
    world: int,
    accumulation: int,
    device: torch.device,
) -> DataLoader:
    """This rank's micro-batches of the global steps [first_step, last_step), `accumulation` for each."""
    global_batch = dataset.section.global_batch
    steps_per_epoch = order.steps_per_epoch(global_batch)

    def requests() -> Iterator[Request]:
        for step in range(first_step, last_step):
            epoch, step_of_epoch = divmod(step, steps_per_epoch)
            ids = order.rank_batch(epoch, step_of_epoch, global_batch, rank, world)
            for micro_batch in np.split(ids, accumulation):
                yield Request(epoch, micro_batch)

    return _loader(dataset, requests(), device)


def eval_shares(samples: int, world: int) -> list[range]:
    """The consecutive samples that each rank evaluates: all of them once, the shares equal or one apart."""
    return [range(samples * rank // world, samples * (rank + 1) // world) for rank in range(world)]


def eval_loader(dataset: ImageDataset, batch: int, rank: int, world: int, device: torch.device) -> DataLoader:
    """One rank's share of the set, in order."""
    share = eval_shares(len(dataset), world)[rank]
    requests = (Request(0, np.array(share[i : i + batch])) for i in range(0, len(share), batch))
    return _loader(dataset, requests, device)


def _loader(dataset: ImageDataset, requests: Iterator[Request], device: torch.device) -> DataLoader:
    workers = 0 if dataset.memory is not None else dataset.section.workers  # a crop from memory is no work to share
    return DataLoader(
        dataset,
        sampler=_Requests(requests),
        batch_size=None,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # else opening it draws from the global one, and a resumed run from another state
    )
