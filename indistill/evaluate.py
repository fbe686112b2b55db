"""Exact evaluation over all ranks: accuracy, retrieval, and how alike two networks are; every sample counted once."""

import math
from collections.abc import Iterator, Sequence
from itertools import zip_longest

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import broadcast, broadcast_object_list, gather_object
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from indistill.config import UserError
from indistill.data import loader as data_loader
from indistill.data.batch import Batch, Request
from indistill.data.dataset import ImageDataset
from indistill.data.loader import eval_shares
from indistill.distributed import preemption, watchdog
from indistill.distributed.preemption import Preempted
from indistill.models.heads import Heads
from indistill.models.network import Network
from indistill.similarity import information, information_flow_divergence, linear_cka

PRECISION_AT = (1, 10, 100)  # nearest entries
_MAP_ENTRIES = 2**27  # of one feature map over all its samples: 512 MiB in float32
_AUTHORS_BATCH = 128  # queries
_BLOCK_ENTRIES = 2**24  # query-database pairs held at once: 128 MiB for each int64 tensor


@torch.no_grad()
def accuracy(accelerator: Accelerator, network: Network | Heads, dataset: ImageDataset, batch: int) -> dict[str, float]:
    """Top-1 and top-5 of the whole set, in [0, 1]; nothing for a network whose classifier no loss trains.

    With intermediate classifier heads (`Output.cohort`) also their `top1_head1`, `top1_head2`, ... Call on all ranks,
    with the network outside its training wrapper.
    """
    if not network.with_logits:
        return {}
    counts: Tensor | int = 0  # all samples, right in the best 5, right at once, right at once by each head
    for images, labels in _batches(accelerator, dataset, batch, network):
        output = network(images)
        best = output.logits.topk(min(5, output.logits.shape[1]), dim=1).indices  # [B, 5]
        hits = best == labels[:, None]
        heads = [(logits.argmax(dim=1) == labels).sum() for logits in output.cohort]
        seen = labels.new_tensor(len(labels))
        counts = counts + torch.stack([seen, hits.sum(), hits[:, 0].sum(), *heads])
    mine = counts.tolist() if isinstance(counts, Tensor) else []  # none of a small set may be this rank's
    total, *correct = (sum(column) for column in zip_longest(*gather_object([mine]), fillvalue=0))
    if total != len(dataset):
        raise RuntimeError(f"evaluation counted {total} of {len(dataset)} samples")
    top5, top1, *heads = (count / total for count in correct)
    return {"top1": top1, "top5": top5} | {f"top1_head{i}": score for i, score in enumerate(heads, start=1)}


@torch.no_grad()
def retrieval(
    accelerator: Accelerator, network: Network, database: ImageDataset, queries: ImageDataset, batch: int
) -> dict[str, float]:
    """Retrieval by the embeddings, in [0, 1]; the same on all ranks. For the metrics cosine and l2:

    - map_{metric}, map_{metric}_authors: mean average precision by both protocols of `retrieval_map`;
    - precision_at_{k}_{metric}: `precision_at` for each k of PRECISION_AT that the database has entries for.

    Raises UserError for embeddings that are not finite and for query classes that the database lacks.
    """
    database = database.for_evaluation(queries.view)
    tensors = [x for dataset in (database, queries) for x in embeddings(accelerator, network, dataset, batch)]
    outcome: list = [None, None]  # scores, a mistake: told to all ranks, none is left waiting
    if accelerator.is_main_process:
        try:
            outcome[0] = _retrieval_scores(*tensors)
        except ValueError as error:
            outcome[1] = f"evaluate.retrieval: {error}"
    scores, message = broadcast_object_list(outcome)
    if message is not None:
        raise UserError(message)
    return scores


def _retrieval_scores(db: Tensor, db_labels: Tensor, queries: Tensor, query_labels: Tensor) -> dict[str, float]:
    maps, precisions = {}, {}
    for metric in ("cosine", "l2"):
        both, precision = _scores(
            db, db_labels, queries, query_labels, metric, ("interpolated", "authors"), PRECISION_AT
        )
        maps |= {f"map_{metric}": both["interpolated"], f"map_{metric}_authors": both["authors"]}
        precisions |= {f"precision_at_{k}_{metric}": value for k, value in precision.items()}
    return maps | precisions


@torch.no_grad()
def similarity(
    accelerator: Accelerator,
    student: Network,
    teacher: Network,
    pairs: Sequence[tuple[int, int]],
    dataset: ImageDataset,
    batch: int,
    samples: int = 512,
) -> dict[str, float]:
    """How alike student and teacher are on `samples` images, evenly spaced over the set; the same on all ranks.

    `pairs` are (teacher stage, student stage), each deeper than the last, as in `warmup.pairs`; the embeddings are one
    more, the last. For each {layer} of pair1, pair2, ..., embedding:

    - cka_{layer}: linear centred kernel alignment of the student's and the teacher's flattened maps, in [0, 1];
    - information_student_{layer}, information_teacher_{layer}: quadratic mutual information with the labels;

    and information_flow_divergence between the two networks' information (similarity.py has the definitions). A layer
    that is not finite, as half precision may make it, is named on the console and left out, with the divergence.

    Maps are compared whole, without adapter or pruning, unless `samples` of one have more than 2^27 values, 512 MiB in
    float32, which 512 maps of 64 x 56 x 56 have not: then they are average-pooled to half their size until they fit,
    since neighbours tell the least. All ranks together hold the maps of every layer in host memory, and each rank those
    of one layer on its device.
    """
    part = _Spaced(dataset, samples)
    layers = [f"pair{i}" for i in range(1, len(pairs) + 1)] + ["embedding"]
    sides = [(student, [stage for _, stage in pairs]), (teacher, [stage for stage, _ in pairs])]
    rows = []
    for images, labels in _batches(accelerator, part, batch, student, teacher):
        maps = [_bounded_maps(network, images, stages, len(part)) for network, stages in sides]
        rows.append([labels, *(x[: len(labels)] for pair in zip(*maps) for x in pair)])

    columns = _columns(accelerator, rows, len(part))
    labels = next(columns)
    scores: dict[str, float] = {}
    for layer, of_student, of_teacher in zip(layers, columns, columns):  # [N, C, H, W] or [N, D], each
        if not (of_student.isfinite().all() and of_teacher.isfinite().all()):
            if accelerator.is_main_process:
                print(f"indistill: similarity: {layer} is not finite, and left out", flush=True)
        elif accelerator.is_main_process:
            scores[f"cka_{layer}"] = linear_cka(of_student, of_teacher).item()
            scores[f"information_student_{layer}"] = information(of_student, labels).item()
            scores[f"information_teacher_{layer}"] = information(of_teacher, labels).item()
    if len(scores) == 3 * len(layers):
        flows = (
            torch.tensor([scores[f"information_{role}_{layer}"] for layer in layers], dtype=torch.float64)
            for role in ("student", "teacher")
        )
        scores["information_flow_divergence"] = information_flow_divergence(*flows).item()
    return broadcast_object_list([scores])[0]


def _bounded_maps(network: Network, images: Tensor, stages: list[int], samples: int) -> list[Tensor]:
    """Maps [B, C, H, W] of the stages and the embedding [B, D], float32 in host memory, within _MAP_ENTRIES."""
    bounded = []
    for x in network.maps(images, stages) if stages else []:
        x = x.float()
        while samples * x[0].numel() > _MAP_ENTRIES and max(x.shape[2:]) > 1:
            x = F.avg_pool2d(x, 2, ceil_mode=True)
        bounded.append(x.cpu())
    return [*bounded, network(images).embedding.float().cpu()]


@torch.no_grad()
def embeddings(accelerator: Accelerator, network: Network, dataset: ImageDataset, batch: int) -> tuple[Tensor, Tensor]:
    """Embeddings float32 [N, D] and labels int64 [N] of the whole set, in its order, on every rank."""
    batches = _batches(accelerator, dataset, batch, network)
    rows = [[network(images).embedding.float(), labels] for images, labels in batches]
    embedding, labels = _columns(accelerator, rows, len(dataset))
    return embedding, labels


def _columns(accelerator: Accelerator, rows: list[list[Tensor]], samples: int) -> Iterator[Tensor]:
    """Each column of all ranks' rows, joined in the set's order, on every rank's device: one by one, they may be large.

    A rank has one row for each of its batches, and every rank must take all columns.
    """
    kinds = gather_object([[(x.shape[1:], x.dtype) for x in rows[0]] if rows else None])
    kind = next(kind for kind in kinds if kind)  # a rank without samples learns from another what they look like
    counts = [len(share) for share in eval_shares(samples, accelerator.num_processes)]
    for i, (shape, dtype) in enumerate(kind):
        column = torch.cat([row[i] for row in rows]) if rows else torch.empty(0, *shape, dtype=dtype)
        column = column.to(accelerator.device)
        if accelerator.num_processes > 1:  # shares may differ by one sample: pad, gather, cut
            shares = accelerator.gather(accelerator.pad_across_processes(column)).split(max(counts))
            column = torch.cat([share[:count] for share, count in zip(shares, counts)])
        yield column


class _Spaced(ImageDataset):
    """At most `samples` of a set's images, for evaluation, evenly spaced: sets are often sorted by class."""

    def __init__(self, whole: ImageDataset, samples: int) -> None:
        vars(self).update(vars(whole.for_evaluation()))
        samples = min(samples, len(whole))
        self.places = np.arange(samples) * len(whole) // samples

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, request: Request) -> Batch:
        return super().__getitem__(request._replace(ids=self.places[request.ids]))


def _batches(
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
    loader = data_loader.eval_loader(
        dataset.for_evaluation(), batch, accelerator.process_index, accelerator.num_processes, accelerator.device
    )
    try:
        with accelerator.autocast():
            for batch in loader:
                watchdog.alive()
                if preemption.asked() and not together:
                    break
                yield batch.images.to(accelerator.device, non_blocking=True), batch.labels.to(accelerator.device)
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


@torch.no_grad()
def retrieval_map(
    db: Tensor,
    db_labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    metric: str = "cosine",
    protocol: str = "interpolated",
) -> float:
    """Mean average precision, in [0, 1], of retrieving each query's class from a database.

    db [N, D], db_labels int [N], queries [Q, D], query_labels int [Q]; metric "cosine" or "l2". The whole database is
    ranked for every query, equal distances in database order. A query's score is the mean precision at the 11 ranks
    whose recall is nearest to 0, 0.1, ..., 1 (the first of equals), where the precision of a rank is the largest of

    - "interpolated": that rank and all later ones, the 11-point interpolated mAP;
    - "authors": that rank and the later ones among the first 128, as published results (2205.10003, 1803.10837) have
      it: their loop over the precision counts the queries of its batch, in the order given, instead of the ranks. The
      last batch, if smaller, has that many ranks fewer. Ranks beyond keep their plain precision.

    Distances are computed in float64 and compared in float32, on the device of db; D = 64, N = 50,000, Q = 10,000 takes
    20 s of one CPU core and 0.4 GB. Raises ValueError for mismatched shapes, values that are not finite,
    queries whose label the database lacks, unknown names.
    """
    if protocol not in ("interpolated", "authors"):
        raise ValueError(f"protocol {protocol!r} is not 'interpolated' or 'authors'")
    maps, _ = _scores(db, db_labels, queries, query_labels, metric, protocols=(protocol,))
    return maps[protocol]


@torch.no_grad()
def precision_at(
    db: Tensor,
    db_labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    ks: Sequence[int] = PRECISION_AT,
    metric: str = "cosine",
) -> dict[int, float]:
    """The part, in [0, 1], of the k nearest database entries that is of the query's class: the mean over queries.

    Arguments, distances, ties and errors as in `retrieval_map`. Any k larger than the database is left out.
    """
    _, precisions = _scores(db, db_labels, queries, query_labels, metric, ks=ks)
    return precisions


def _scores(
    db: Tensor,
    db_labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    metric: str,
    protocols: Sequence[str] = (),
    ks: Sequence[int] = (),
) -> tuple[dict[str, float], dict[int, float]]:
    """`retrieval_map` by each protocol and `precision_at` each k, from one ranking of the database for every query."""
    if metric not in ("cosine", "l2"):
        raise ValueError(f"metric {metric!r} is not 'cosine' or 'l2'")
    if any(k < 1 for k in ks):
        raise ValueError(f"precision at {min(ks)}: a number of entries is at least 1")
    shapes = [tuple(x.shape) for x in (db, db_labels, queries, query_labels)]
    if db.ndim != 2 or queries.shape != (len(queries), db.shape[1]) or shapes[1::2] != [(len(db),), (len(queries),)]:
        raise ValueError(f"shapes {shapes} are not [N, D], [N], [Q, D], [Q]")
    if len(queries) == 0:
        raise ValueError("no queries")

    # float64, then rounded: equal database entries get equal distances whatever the order of a matmul's additions
    db, queries = db.double(), queries.to(db.device).double()
    if not (db.isfinite().all() and queries.isfinite().all()):
        raise ValueError("an embedding is not finite")
    db_labels, query_labels = db_labels.to(db.device), query_labels.to(db.device).contiguous()
    classes, class_sizes = db_labels.unique(return_counts=True)  # ascending
    absent = query_labels[~torch.isin(query_labels, classes)]
    if len(absent):
        raise ValueError(f"query label {absent[0].item()} is absent from the database")
    query_class = torch.searchsorted(classes, query_labels)  # [Q], a position in classes
    # For each class, the number of relevant entries found at each recall level.
    found_at_level = torch.stack([_found_at_levels(size) for size in class_sizes.tolist()]).to(
        db.device
    )  # [classes, 11]

    if metric == "cosine":  # a zero vector stays zero: its distance to all is 1
        db, queries = (x / x.norm(dim=1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny) for x in (db, queries))
    db_squares = db.square().sum(dim=1)  # [N]

    totals = {protocol: torch.zeros((), dtype=torch.float64, device=db.device) for protocol in protocols}
    hits = {k: torch.zeros((), dtype=torch.int64, device=db.device) for k in ks if k <= len(db)}
    block_queries = max(1, min(_AUTHORS_BATCH, _BLOCK_ENTRIES // len(db)))
    for start in range(0, len(queries), block_queries):
        block = queries[start : start + block_queries]  # [B, D]
        distances = block @ db.T  # [B, N]
        if metric == "cosine":
            distances.neg_().add_(1)
        else:
            distances.mul_(-2).add_(db_squares).add_(block.square().sum(dim=1, keepdim=True))
        relevant = db_labels == query_labels[start : start + block_queries, None]  # [B, N]
        ranked = _ranked(distances, relevant)  # [B, N]
        for k in hits:
            hits[k] += ranked[:, :k].sum()

        rows, ranks = ranked.nonzero(as_tuple=True)  # [relevant pairs]; ranks from 0
        sizes = class_sizes[query_class[start : start + block_queries]]  # [B], relevant entries of each query
        found = torch.arange(1, len(rows) + 1, device=db.device) - (sizes.cumsum(0) - sizes)[rows]
        # Precision falls between relevant entries, so these ranks hold every maximum. Column 0 stands for "none found".
        precision = torch.zeros(len(block), int(sizes.max()) + 1, dtype=torch.float64, device=db.device)
        precision[rows, found] = found.double() / (ranks + 1)
        for protocol in protocols:
            reachable = precision
            if protocol == "authors":
                query = torch.arange(start, start + len(block), device=db.device)
                batch_sizes = (len(queries) - query // _AUTHORS_BATCH * _AUTHORS_BATCH).clamp_max(_AUTHORS_BATCH)
                beyond = ranks >= batch_sizes[rows]
                reachable = precision.clone()
                reachable[rows[beyond], found[beyond]] = 0
            best = torch.maximum(precision, reachable.flip(1).cummax(dim=1).values.flip(1))  # over this rank and later
            levels = found_at_level[query_class[start : start + block_queries]]  # [B, 11]
            totals[protocol] += best.gather(1, levels).mean(dim=1).sum()
    maps = {protocol: (total / len(queries)).item() for protocol, total in totals.items()}
    return maps, {k: count.item() / (k * len(queries)) for k, count in hits.items()}


def _found_at_levels(relevant: int) -> Tensor:
    """How many of the `relevant` entries are found at the rank with recall nearest to 0, 0.1, ..., 1: int64 [11].

    In float64, not in exact arithmetic: rounding decides the ties here as it does for the authors.
    """
    recall = np.arange(relevant + 1) / relevant
    return torch.tensor([np.abs(recall - level).argmin() for level in np.arange(0, 1.01, 0.1)])


def _ranked(distances: Tensor, relevant: Tensor) -> Tensor:
    """relevant [B, N] with each row in the order of its distances [B, N], equal ones in the given order.

    Sorts keys alone, (distance, position, relevant) packed in 63 bits: ten times faster than a stable argsort on a CPU.
    The bits of float32 values that are not negative sort like the values.
    """
    keys = distances.clamp_min(0).float().view(torch.int32).long() << 32
    keys |= torch.arange(distances.shape[1], device=keys.device) << 1
    keys |= relevant
    if keys.device.type == "cpu":
        keys.numpy().sort(axis=1)  # in place; vectorised, unlike torch.sort
    else:
        keys = keys.sort(dim=1).values
    return (keys & 1).bool()
