"""Classification by the nearest neighbours of an embedding, as in DINO (2104.14294, appendix F.1)."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import Tensor

from indistill.config import Knn
from indistill.evaluate.passes import Embedded, whole
from indistill.evaluate.ranking import unit_rows

_QUERIES = 1024  # in a block
_PAIRS = 2**24  # of a query and a bank entry held at once: 128 MiB for each float64 or int64 tensor
_FARTHEST = torch.iinfo(torch.int64).max  # the key of no entry


@torch.no_grad()
def knn(
    bank: Tensor,
    bank_labels: Tensor,
    *,
    queries: Tensor,
    query_labels: Tensor,
    k: int = 20,
    temperature: float = 0.07,
) -> dict[str, float]:
    """Top-1 and top-5 accuracy, in [0, 1], of classifying queries by their k nearest entries of a bank.

    bank [N, D], bank_labels int64 [N], queries [Q, D], query_labels int64 [Q]. Nearest is of the largest
    cosine; each neighbour adds exp(cosine / temperature) to its class, and classes without a neighbour are no
    candidates. Of equal cosines the first entries count, and of equal classes the one with the lowest label.
    Cosines are computed in float64, and compared as float32. Raises ValueError if k is larger than the bank.
    """
    if not 1 <= k <= len(bank):
        raise ValueError(f"k is {k}, and the bank has {len(bank)} entries")
    keys = _nearest(bank, queries, k=k)
    return _scores(keys, bank_labels, query_labels=query_labels, temperature=temperature)


@torch.no_grad()
def neighbours(
    accelerator: Accelerator,
    bank: Embedded,
    *,
    queries: Embedded,
    settings: Knn,
    classes: Tensor | None = None,
) -> dict[str, float]:
    """`knn` over all ranks, each of which searches its share of the bank. Collective; the same on all ranks.

    classes: labels of the only classes that are candidates.
    """
    k = settings.k
    everywhere = whole(accelerator, queries)  # [Q, D]
    known = bank.labels[bank.first : bank.first + len(bank.share)] >= 0
    keys = _nearest(bank.share, everywhere, k=k, first=bank.first, known=known)  # [Q, k]
    if accelerator.num_processes > 1:
        gathered = accelerator.gather(keys).view(-1, *keys.shape)  # [ranks, Q, k]
        keys = gathered.transpose(0, 1).flatten(1).sort(dim=1).values[:, :k]
    return _scores(
        keys, bank.labels, query_labels=queries.labels, temperature=settings.temperature, classes=classes
    )


def _nearest(bank: Tensor, queries: Tensor, *, k: int, first: int = 0, known: Tensor | None = None) -> Tensor:
    """Keys int64 [Q, k] of the nearest entries, nearest first, _FARTHEST where the bank has fewer.

    known: bool [N], the entries that are images.

    A key has the distance 1 - cosine as float32 in its upper half, and in the lower one the entry's position,
    counted from `first`. The bits of float32 values that are not negative sort like the values.
    """
    entries = _PAIRS // _QUERIES
    nearest = torch.full((len(queries), k), _FARTHEST, device=queries.device)
    for begin in range(0, len(bank), entries):
        part = unit_rows(bank[begin : begin + entries].double())  # [n, D]
        positions = torch.arange(len(part), device=part.device) + first + begin
        for start in range(0, len(queries), _QUERIES):
            block = slice(start, start + _QUERIES)
            distances = 1 - unit_rows(queries[block].double()) @ part.T  # [B, n]
            keys = distances.clamp_min_(0).float().view(torch.int32).long() << 32 | positions
            if known is not None:
                keys.masked_fill_(~known[begin : begin + entries], _FARTHEST)
            found = torch.cat([nearest[block], keys], dim=1).topk(k, largest=False, sorted=True)
            nearest[block] = found.values
    return nearest


def _scores(
    keys: Tensor,
    bank_labels: Tensor,
    *,
    query_labels: Tensor,
    temperature: float,
    classes: Tensor | None = None,
) -> dict[str, float]:
    """Accuracies from the keys [Q, k] of the nearest entries."""
    hits = torch.zeros(2, dtype=torch.int64, device=keys.device)  # right at once; right in the best 5
    for start in range(0, len(keys), _QUERIES):
        block = slice(start, start + _QUERIES)
        votes = _votes(keys[block], bank_labels, temperature)  # [B, K]
        if classes is not None:
            votes = _only(votes, classes)
        best = votes.argsort(dim=1, descending=True, stable=True)[:, :5]
        right = (best == query_labels[block, None]) & (votes.gather(1, best) > 0)
        hits += torch.stack([right[:, 0].sum(), right.sum()])
    top1, top5 = (count / len(keys) for count in hits.tolist())
    return {"knn_top1": top1, "knn_top5": top5}


def _votes(keys: Tensor, bank_labels: Tensor, temperature: float) -> Tensor:
    """The weight float64 [B, K] of each class, of which the nearest neighbour adds 1."""
    distances = (keys >> 32).int().view(torch.float32).double()  # [B, k]
    weights = torch.exp((distances[:, :1] - distances) / temperature).masked_fill_(keys == _FARTHEST, 0)
    labels = bank_labels[(keys & 0xFFFFFFFF).clamp_max(len(bank_labels) - 1)].clamp_min(0)
    votes = weights.new_zeros(len(keys), int(bank_labels.max()) + 1)
    rows = torch.arange(len(keys), device=keys.device)
    for i in range(keys.shape[1]):  # one by one: the order in which a GPU would add several is not fixed
        votes[rows, labels[:, i]] += weights[:, i]
    return votes


def _only(votes: Tensor, classes: Tensor) -> Tensor:
    kept = torch.zeros_like(votes)
    kept[:, classes] = votes[:, classes]
    return kept
