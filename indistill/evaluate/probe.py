"""A linear classifier on frozen embeddings: logistic regression by L-BFGS, over a grid of regularisations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from torch.nn import functional

from indistill.distributed import watchdog

_ENTRIES = 2**24  # of a block of embeddings or logits in float64: 128 MiB
_HELD_OUT = 5  # one of so many entries chooses l2
_MOST_ITERATIONS = 1000

_Part = tuple[Tensor, Tensor, Tensor]
"""Embeddings [n, D], the index of each one's class int64 [n], and its weight float64 [n]."""


@dataclass(frozen=True)
class Probe:
    """A linear classifier of embeddings."""

    classes: Tensor  # int64 [K], ascending: the label of each output
    weight: Tensor  # float64 [K, D]
    bias: Tensor  # float64 [K]
    l2: float

    def best(self, x: Tensor, classes: Tensor | None = None) -> Tensor:
        """The labels of the 5 best outputs for embeddings [B, D], best first: int64 [B, 5], or fewer.

        classes: labels of the only classes that are candidates.
        """
        logits = x.double() @ self.weight.T + self.bias
        if classes is not None:
            logits = logits.masked_fill(~torch.isin(self.classes, classes), -torch.inf)
        return self.classes[logits.argsort(dim=1, descending=True, stable=True)[:, :5]]

    def scores(self, x: Tensor, labels: Tensor, classes: Tensor | None = None) -> dict[str, float]:
        """Top-1 and top-5 accuracy, in [0, 1], on embeddings [N, D] with labels int64 [N], and l2."""
        hits = torch.zeros(2, dtype=torch.int64, device=x.device)
        for part, truth in zip(x.split(_rows(x, self)), labels.split(_rows(x, self))):
            right = self.best(part, classes) == truth[:, None]
            hits += torch.stack([right[:, 0].sum(), right.sum()])
        top1, top5 = (count / len(x) for count in hits.tolist())
        return {"probe_top1": top1, "probe_top5": top5, "probe_l2": self.l2}


def _rows(x: Tensor, probe: Probe) -> int:
    return max(1, _ENTRIES // max(x.shape[1], len(probe.classes)))


@torch.no_grad()
def linear_probe(accelerator: Accelerator, x: Tensor, labels: Tensor, l2s: Sequence[float]) -> Probe:
    """Fit a classifier on embeddings [N, D] with labels int64 [N], with the best l2 of a grid.

    Each l2 is tried on four fifths of the entries, drawn by a fixed seed, and scored by top-1 on the others;
    the best, of several the largest, is fitted again on all entries. Every rank has all entries and tries a
    part of the grid, so that the result does not depend on the number of ranks. Collective.
    """
    l2 = l2s[0]
    if len(l2s) > 1:
        held_out = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        drawn = np.random.RandomState(0).permutation(len(x))[: len(x) // _HELD_OUT]
        held_out[torch.from_numpy(drawn).to(x.device)] = True
        own = []
        for candidate in l2s[accelerator.process_index :: accelerator.num_processes]:
            probe = fit(x, labels, candidate, (~held_out).double())
            own.append((probe.scores(x[held_out], labels[held_out])["probe_top1"], candidate))
        l2 = max(gather_object(own))[1]
    return fit(x, labels, l2)


@torch.no_grad()
def fit(x: Tensor, labels: Tensor, l2: float, counts: Tensor | None = None) -> Probe:
    """Fit logistic regression on embeddings [N, D] with labels int64 [N], in float64.

    Minimises the mean cross-entropy plus l2 / 2 times the sum of the squared weights of the standardised
    dimensions; a dimension that is constant is left out. counts: float64 [N], how often each entry counts.
    """
    classes, targets = labels.unique(return_inverse=True)
    counts = x.new_ones(len(x), dtype=torch.float64) if counts is None else counts
    rows = max(1, _ENTRIES // max(x.shape[1], len(classes)))
    parts = list(zip(x.split(rows), targets.split(rows), (counts / counts.sum()).split(rows)))
    mean, scale = _moments(parts)
    weight = torch.zeros(len(classes), x.shape[1], dtype=torch.float64, device=x.device)
    bias = torch.zeros(len(classes), dtype=torch.float64, device=x.device)

    @torch.no_grad()
    def objective() -> Tensor:
        watchdog.alive()
        raw = weight * scale  # of embeddings that are not standardised
        loss, gradient, bias.grad = _cross_entropy(parts, raw, bias - raw @ mean)
        weight.grad = (gradient - bias.grad[:, None] * mean) * scale + l2 * weight
        return loss + l2 / 2 * weight.square().sum()

    torch.optim.LBFGS(
        [weight, bias],
        max_iter=_MOST_ITERATIONS,
        tolerance_grad=1e-7,
        tolerance_change=1e-12,
        history_size=20,
        line_search_fn="strong_wolfe",
    ).step(objective)
    raw = weight * scale
    return Probe(classes, raw, bias - raw @ mean, l2)


def _cross_entropy(parts: Sequence[_Part], weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The weighted sum of the cross-entropy over all parts, and its gradients [K, D] and [K]."""
    loss, of_weight, of_bias = weight.new_zeros(()), torch.zeros_like(weight), torch.zeros_like(bias)
    for part, target, count in parts:
        x = part.double()
        log_p = functional.log_softmax(x @ weight.T + bias, dim=1)  # [n, K]
        loss -= (count * log_p.gather(1, target[:, None])[:, 0]).sum()
        error = log_p.exp_() - functional.one_hot(target, len(bias))
        error *= count[:, None]
        of_weight += error.T @ x
        of_bias += error.sum(dim=0)
    return loss, of_weight, of_bias


def _moments(parts: Sequence[_Part]) -> tuple[Tensor, Tensor]:
    """The mean of each dimension, and one over its standard deviation, 0 for one that is constant."""
    mean = torch.stack([count @ x.double() for x, _, count in parts]).sum(dim=0)
    squares = torch.stack([count @ (x.double() - mean).square() for x, _, count in parts]).sum(dim=0)
    deviation = squares.sqrt()
    constant = deviation <= torch.finfo(torch.float32).eps * mean.abs()
    return mean, torch.where(constant, 0.0, 1 / deviation)
