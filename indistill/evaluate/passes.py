"""Evaluation passes over all ranks, in which every sample counts exactly once."""

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, gather_object
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from indistill.config import UserError
from indistill.data.dataset import ImageDataset
from indistill.data.loader import eval_loader, eval_shares
from indistill.distributed import preemption, watchdog
from indistill.distributed.preemption import Preempted
from indistill.models.trainable import Trainable


class Embedded(NamedTuple):
    """The embeddings of a set: those of this rank's share of it, and the labels of all of it."""

    share: Tensor  # float32 [n, D], on this rank's device
    first: int  # position in the set of the share's first
    labels: Tensor  # int64 [N], on this rank's device; -1: not decoded, and no embedding of an image


@torch.no_grad()
def embed(
    accelerator: Accelerator,
    network: Trainable,
    *,
    dataset: ImageDataset,
    batch: int,
    blank_bad: bool = False,
) -> Embedded:
    """Compute the embeddings of the whole set, each rank those of its share. Collective.

    blank_bad: give an image that cannot be decoded the label -1, instead of raising UserError.
    """
    batches = each_batch(accelerator, dataset, batch, network, blank_bad=blank_bad)
    rows = [[network(images).embedding.float(), labels] for images, labels in batches]
    own, labels = _own_columns(accelerator, rows)
    share = eval_shares(len(dataset), accelerator.num_processes)[accelerator.process_index]
    return Embedded(own, share.start, _joined(accelerator, labels, len(dataset)))


def whole(accelerator: Accelerator, embedded: Embedded) -> Tensor:
    """Return all embeddings [N, D] of a set, in its order, on every rank. Collective."""
    return _joined(accelerator, embedded.share, len(embedded.labels))


def embeddings(
    accelerator: Accelerator, network: Trainable, dataset: ImageDataset, batch: int
) -> tuple[Tensor, Tensor]:
    """Embeddings float32 [N, D] and labels int64 [N] of the whole set, in its order, on every rank.
    Collective.
    """
    embedded = embed(accelerator, network, dataset=dataset, batch=batch)
    return whole(accelerator, embedded), embedded.labels


def join_columns(accelerator: Accelerator, rows: list[list[Tensor]], samples: int) -> Iterator[Tensor]:
    """Yield each column of all ranks' rows, joined in the set's order, on every rank's device.

    A rank has one row for each of its batches. Columns may be large, so they are gathered one by one: every
    rank must read all of them.
    """
    for column in _own_columns(accelerator, rows):
        yield _joined(accelerator, column, samples)


def _own_columns(accelerator: Accelerator, rows: list[list[Tensor]]) -> Iterator[Tensor]:
    """Yield each column of this rank's rows, on its device. Collective."""
    kinds = gather_object([[(x.shape[1:], x.dtype) for x in rows[0]] if rows else None])
    kind = next(kind for kind in kinds if kind)  # a rank without samples needs another's shapes and dtypes
    for i, (shape, dtype) in enumerate(kind):
        column = torch.cat([row[i] for row in rows]) if rows else torch.empty(0, *shape, dtype=dtype)
        yield column.to(accelerator.device)


def _joined(accelerator: Accelerator, column: Tensor, samples: int) -> Tensor:
    """Join the shares of a column in the set's order, on every rank. Collective."""
    if accelerator.num_processes > 1:  # shares may differ by one sample: pad, gather, cut
        counts = [len(share) for share in eval_shares(samples, accelerator.num_processes)]
        shares = accelerator.gather(accelerator.pad_across_processes(column)).split(max(counts))
        column = torch.cat([share[:count] for share, count in zip(shares, counts)])
    return column


def each_batch(
    accelerator: Accelerator,
    dataset: ImageDataset,
    batch: int,
    *networks: nn.Module,
    blank_bad: bool = False,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield this rank's images and labels; the networks are in eval mode, and in the run's precision.

    A rank that is asked to stop, or cannot read an image, stops early. At the end all ranks raise Preempted
    if any was asked, and UserError if any could not read.

    A sharded network runs on all ranks together: with one, no rank stops early, and ranks that have one batch
    fewer than others end with a black image and no label.
    """
    together = any(isinstance(network, FSDPModule) for network in networks)
    shares = eval_shares(len(dataset), accelerator.num_processes)
    counts = [math.ceil(len(share) / batch) for share in shares]  # batches of each rank
    rank = accelerator.process_index
    device = accelerator.device
    part = {"rank": rank, "world": accelerator.num_processes}
    loader = eval_loader(dataset.for_evaluation(), batch, **part, device=device, blank_bad=blank_bad)
    mistake: UserError | None = None
    with _evaluating(accelerator, networks):
        with accelerator.autocast():
            try:
                for loaded in loader:
                    watchdog.alive()
                    if preemption.asked() and not together:
                        break
                    yield loaded.images.to(device, non_blocking=True), loaded.labels.to(device)
            except UserError as error:
                if together:
                    raise
                mistake = error
            if together and counts[rank] < max(counts):
                yield _black_image(dataset.section.full_size, device)
        _end_together(accelerator, mistake)


def _black_image(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """An image uint8 [1, 3, S, S] that is no sample, and no label."""
    image = torch.zeros(1, 3, size, size, dtype=torch.uint8, device=device)
    return image, torch.zeros(0, dtype=torch.int64, device=device)


def _end_together(accelerator: Accelerator, mistake: UserError | None) -> None:
    """Raise what any rank has to raise, on all of them."""
    mine = torch.tensor([float(preemption.asked()), float(mistake is not None)], device=accelerator.device)
    ranks_asked, ranks_mistaken = accelerator.reduce(mine, reduction="sum").tolist()
    if ranks_mistaken:
        raise mistake or UserError("evaluation: another rank cannot read an image, as it reports")
    if preemption.settle(ranks_asked):
        raise Preempted("stopped in an evaluation")


@contextlib.contextmanager
def _evaluating(accelerator: Accelerator, networks: Sequence[nn.Module]) -> Iterator[None]:
    """Put the networks in eval mode, with rank 0's buffers, and back in their own modes afterwards."""
    modes = [network.training for network in networks]
    for network in networks:
        network.eval()
        _share_buffers(accelerator, network)
    try:
        yield
    finally:
        for network, mode in zip(networks, modes):
            network.train(mode)


def _share_buffers(accelerator: Accelerator, network: nn.Module) -> None:
    """Copy rank 0's batch-norm statistics, which checkpoints contain: between steps those of the ranks
    differ.
    """
    if accelerator.num_processes > 1:
        for buffer in network.buffers():
            buffer.copy_(broadcast(buffer))
