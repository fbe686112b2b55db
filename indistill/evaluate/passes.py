"""Exact evaluation over all ranks: accuracy, retrieval, and how alike two networks are; every sample counted once."""

import math
from collections.abc import Iterator

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, gather_object
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from indistill.data.dataset import ImageDataset
from indistill.data.loader import eval_loader, eval_shares
from indistill.distributed import preemption, watchdog
from indistill.distributed.preemption import Preempted
from indistill.models.trainable import Trainable


@torch.no_grad()
def embeddings(
    accelerator: Accelerator, network: Trainable, dataset: ImageDataset, batch: int
) -> tuple[Tensor, Tensor]:
    """Embeddings float32 [N, D] and labels int64 [N] of the whole set, in its order, on every rank."""
    batches = each_batch(accelerator, dataset, batch, network)
    rows = [[network(images).embedding.float(), labels] for images, labels in batches]
    embedding, labels = join_columns(accelerator, rows, len(dataset))
    return embedding, labels


def join_columns(accelerator: Accelerator, rows: list[list[Tensor]], samples: int) -> Iterator[Tensor]:
    """Each column of all ranks' rows, joined in the set's order, on every rank's device: one by one, they may be large.

    A rank has one row for each of its batches, and every rank must take all columns.
    """
    kinds = gather_object([[(x.shape[1:], x.dtype) for x in rows[0]] if rows else None])
    kind = next(
        kind for kind in kinds if kind
    )  # a rank without samples learns from another what they look like
    counts = [len(share) for share in eval_shares(samples, accelerator.num_processes)]
    for i, (shape, dtype) in enumerate(kind):
        column = torch.cat([row[i] for row in rows]) if rows else torch.empty(0, *shape, dtype=dtype)
        column = column.to(accelerator.device)
        if accelerator.num_processes > 1:  # shares may differ by one sample: pad, gather, cut
            shares = accelerator.gather(accelerator.pad_across_processes(column)).split(max(counts))
            column = torch.cat([share[:count] for share, count in zip(shares, counts)])
        yield column


def each_batch(
    accelerator: Accelerator, dataset: ImageDataset, batch: int, *networks: nn.Module
) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's images and labels on its device, the networks in eval mode meanwhile, under the run's precision.

    A rank that is asked to stop does so early. At the end all ranks raise Preempted if any was asked.

    A sharded network runs on all ranks together: beside one, no rank stops early, and those that have a batch less than
    others end with a black image and no label.
    """
    together = any(isinstance(network, FSDPModule) for network in networks)
    shares = eval_shares(len(dataset), accelerator.num_processes)
    batches = [math.ceil(len(share) / batch) for share in shares]
    modes = [network.training for network in networks]
    for network in networks:
        network.eval()
        _share_buffers(accelerator, network)
    loader = eval_loader(
        dataset.for_evaluation(),
        batch,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        device=accelerator.device,
    )
    try:
        with accelerator.autocast():
            for loaded in loader:
                watchdog.alive()
                if preemption.asked() and not together:
                    break
                yield (
                    loaded.images.to(accelerator.device, non_blocking=True),
                    loaded.labels.to(accelerator.device),
                )
            if together and batches[accelerator.process_index] < max(batches):
                size = dataset.section.image_size
                black = torch.zeros(1, 3, size, size, dtype=torch.uint8, device=accelerator.device)
                yield black, torch.zeros(0, dtype=torch.int64, device=accelerator.device)
        mine = torch.tensor(float(preemption.asked()), device=accelerator.device)
        if preemption.settle(accelerator.reduce(mine, reduction="sum").item()):
            raise Preempted("stopped in an evaluation")
    finally:
        for network, mode in zip(networks, modes):
            network.train(mode)


def _share_buffers(accelerator: Accelerator, network: nn.Module) -> None:
    """Take rank 0's batch-norm statistics: those that a checkpoint holds. Between steps the ranks' own differ."""
    if accelerator.num_processes > 1:
        for buffer in network.buffers():
            buffer.copy_(broadcast(buffer))
