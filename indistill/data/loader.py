"""Loaders for training and evaluation, which can start at any step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from indistill import config
from indistill.config import UserError
from indistill.curriculum import ImageSizes
from indistill.data import augment
from indistill.data.batch import Batch, Request, StoredTargets
from indistill.data.dataset import ImageDataset, open_shards
from indistill.distributed import preemption
from indistill.order import SampleOrder

PREFETCH_STEPS = 32  # how many steps ahead of the loader remote shards are fetched


class IndexedTraining:
    """The training data of one rank, read through the shards' indices in the exact sample order.

    label_reader: as for `dataset.check_shard`. Raises UserError for missing, cut or malformed shards and for
    a batch that does not divide, naming values that work.
    """

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
        self.rank = rank
        self.world = world
        self.accumulation = accumulation
        shards = open_shards(section, section.train, label_reader=label_reader)
        self.order = sample_order(section, seed, shards.sizes, mix)
        self.order.check(section.global_batch, world)
        check_accumulation(section, world, accumulation, mix)
        self.dataset = ImageDataset(shards, section, seed=seed, order=self.order, mix=mix)
        self.sizes = ImageSizes(section.full_size, section.full_size)
        self.steps_per_epoch = self.order.steps_per_epoch(section.global_batch)
        self.fingerprint = shards.fingerprint
        self.fields_at: Callable[[int], tuple[str, ...]] = lambda step: ()

    def bring_along(self, stored: StoredTargets, fields_at: Callable[[int], tuple[str, ...]]) -> None:
        """Make the loaders read stored targets with the images.

        fields_at: the fields to read at a global step.
        """
        self.dataset.stored = stored
        self.fields_at = fields_at

    def loader(self, first_step: int, last_step: int, device: torch.device) -> Loader:
        """Load the micro-batches of the global steps [first_step, last_step)."""
        return loader(self.dataset, self._requests(first_step, last_step), device)

    def _requests(self, first_step: int, last_step: int) -> Iterator[Request]:
        rank_batch = self.section.global_batch // self.world
        micro_batch = rank_batch // self.accumulation
        ahead = copy.deepcopy(self.order)  # its caches hold other windows than those of self.order
        for step in range(first_step, last_step):
            self._prefetch(ahead, min(step + PREFETCH_STEPS, last_step - 1))
            epoch, step_of_epoch = divmod(step, self.steps_per_epoch)
            fields = self.fields_at(step)
            ids = self._ids(self.order, step)
            views, size = self._views(epoch), self.sizes.at(step)
            for begin in range(0, rank_batch, micro_batch):
                first_row = self.rank * rank_batch + begin
                rows = slice(begin, begin + micro_batch)
                yield Request(
                    epoch, step_of_epoch, first_row, ids[rows], fields, views=views[rows], size=size
                )

    def _prefetch(self, order: SampleOrder, step: int) -> None:
        """Fetch the remote shards and stored targets of one step in the background."""
        shards = self.dataset.shards
        stored = self.dataset.stored
        if shards.remote:
            shards.prefetch(self._ids(order, step))
        if stored is not None and stored.remote and (fields := self.fields_at(step)):
            ids, views = self._ids(order, step), self._views(step // self.steps_per_epoch)
            for view in np.unique(views):
                stored.prefetch(int(view), ids[views == view], fields)

    def _ids(self, order: SampleOrder, step: int) -> np.ndarray:
        epoch, step_of_epoch = divmod(step, self.steps_per_epoch)
        return order.rank_batch(epoch, step_of_epoch, self.section.global_batch, self.rank, self.world)

    def _views(self, epoch: int) -> np.ndarray:
        """The number of the view of each row of this rank: int64 [rows]."""
        rows = np.arange(self.section.global_batch // self.world)  # whole streams: alike on all ranks
        return augment.view_of(self.section, epoch, self.order.repeat_of(rows, self.section.global_batch))


def sample_order(
    section: config.Data, seed: int, shard_sizes: Sequence[int], mix: config.Mix | None
) -> SampleOrder:
    """The order of a run's samples.

    Where images are mixed, an epoch has the order of its views, so that partners stay partners.
    """
    views = section.augment.views
    return SampleOrder(
        shard_sizes,
        seed,
        streams=section.streams,
        window=section.window,
        repeats=section.repeats,
        paired=mix is not None,
        cycle=None if mix is None or views is None else views // section.repeats,
    )


def check_accumulation(
    section: config.Data, world: int, accumulation: int, mix: config.Mix | None = None
) -> None:
    """Raise UserError if the global batch does not divide into micro-batches, even ones for pairs."""
    if section.global_batch % (world * accumulation):
        raise UserError(
            f"data.global_batch ({section.global_batch}) is not divisible by world size ({world}) times "
            f"grad_accumulation ({accumulation})"
        )
    micro_batch = section.global_batch // world // accumulation
    if mix is not None and micro_batch % 2:
        raise UserError(f"kd.mix needs an even batch per rank and accumulation step, this is {micro_batch}")


def eval_shares(samples: int, world: int) -> list[range]:
    """The consecutive samples that each rank evaluates, in shares that differ by at most one sample."""
    return [range(samples * rank // world, samples * (rank + 1) // world) for rank in range(world)]


def eval_loader(
    dataset: ImageDataset,
    batch: int,
    *,
    rank: int,
    world: int,
    device: torch.device,
    blank_bad: bool = False,
) -> Loader:
    """Load one rank's share of the set, in order.

    blank_bad: make an image that cannot be decoded black, with the label -1, instead of raising UserError.
    """
    share = eval_shares(len(dataset), world)[rank]
    parts = (np.array(share[i : i + batch]) for i in range(0, len(share), batch))
    requests = (Request(0, 0, int(ids[0] - share[0]), ids, stand_ins=not blank_bad) for ids in parts)
    return loader(dataset, requests, device)


class _Requests(Sampler):
    """The requests of one rank, from a generator, so that starting at any step costs nothing."""

    def __init__(self, requests: Iterator[Request]) -> None:
        self.requests = requests

    def __iter__(self) -> Iterator[Request]:
        return self.requests


class Loader(DataLoader):
    """A DataLoader whose workers no signal can end before `preemption.in_worker` has run in them."""

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]  # torch declares a private iterator class
        with preemption.signals_blocked():
            return super().__iter__()


def loader(dataset: ImageDataset, requests: Iterator[Request], device: torch.device) -> Loader:
    """Load the batch of each request, in order."""
    # Cropping images that are in memory is too little work to share.
    workers = 0 if dataset.memory is not None else dataset.section.workers
    return Loader(
        dataset,
        sampler=_Requests(requests),
        batch_size=None,
        num_workers=workers,
        worker_init_fn=preemption.in_worker,
        pin_memory=device.type == "cuda",
        # Without it, opening the loader draws from the global generator, which a resumed run has in another
        # state.
        generator=torch.Generator(),
    )
