"""The linear probe against Newton's method in float64, and against scikit-learn if it is installed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from indistill.evaluate import linear_probe
from indistill.evaluate.probe import fit

pytestmark = pytest.mark.portable
L2 = 1e-2


@pytest.fixture
def example():
    """200 embeddings of 4 classes in 6 dimensions of very different size; labels are 2, 3, 5 and 9."""
    random = np.random.default_rng(0)
    labels = np.array([2, 3, 5, 9])[random.integers(4, size=200)]
    x = random.normal(size=(10, 6))[labels] + random.normal(size=(200, 6))
    return (x * [1, 10, 100, 0.1, 1, 1] + [0, 5, -70, 3, 0, 0]).astype(np.float32), labels


def standardised(x):
    x = x.astype(np.float64)
    return (x - x.mean(axis=0)) / x.std(axis=0)


def newton(x, labels, l2):
    """Weights [K, D] and bias [K] on standardised x, by Newton's method on all parameters at once."""
    classes, targets = np.unique(labels, return_inverse=True)
    inputs = np.concatenate([standardised(x), np.ones((len(x), 1))], axis=1)  # [N, D + 1]
    ridge = l2 * np.tile([1.0] * x.shape[1] + [0.0], len(classes))
    parameters = np.zeros(len(ridge))
    for _ in range(50):
        logits = inputs @ parameters.reshape(len(classes), -1).T
        p = np.exp(logits - logits.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        gradient = ((p - np.eye(len(classes))[targets]).T @ inputs / len(x)).ravel() + ridge * parameters
        hessian = np.diag(ridge)
        for row, probability in zip(inputs, p):
            curvature = np.diag(probability) - np.outer(probability, probability)
            hessian += np.kron(curvature, np.outer(row, row)) / len(x)
        parameters -= np.linalg.lstsq(hessian, gradient, rcond=None)[0]  # the biases have one too many
    table = parameters.reshape(len(classes), -1)
    return table[:, :-1], table[:, -1]


def probabilities(logits):
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    return p / p.sum(axis=1, keepdims=True)


def test_the_solution_is_that_of_newtons_method(example):
    x, labels = example
    probe = fit(torch.from_numpy(x), torch.from_numpy(labels), L2)
    assert probe.classes.tolist() == [2, 3, 5, 9]
    weight, bias = newton(x, labels, L2)
    own = x.astype(np.float64) @ probe.weight.numpy().T + probe.bias.numpy()
    assert probabilities(own) == pytest.approx(probabilities(standardised(x) @ weight.T + bias), abs=1e-4)


def test_the_solution_is_that_of_scikit_learn(example):
    linear_model = pytest.importorskip("sklearn.linear_model", reason="needs: pip install scikit-learn")
    x, labels = example
    probe = fit(torch.from_numpy(x), torch.from_numpy(labels), L2)
    reference = linear_model.LogisticRegression(C=1 / (L2 * len(x)), tol=1e-8, max_iter=10_000)
    reference.fit(standardised(x), labels)
    own = x.astype(np.float64) @ probe.weight.numpy().T + probe.bias.numpy()
    assert probabilities(own) == pytest.approx(reference.predict_proba(standardised(x)), abs=1e-4)


def test_parts_give_the_same_as_the_whole(example, monkeypatch):
    x, labels = map(torch.from_numpy, example)
    expected = fit(x, labels, L2)
    monkeypatch.setattr("indistill.evaluate.probe._ENTRIES", 6 * 7)  # 7 rows at once
    probe = fit(x, labels, L2)
    assert torch.allclose(probe.weight, expected.weight, rtol=1e-3, atol=1e-6)
    assert probe.scores(x, labels) == expected.scores(x, labels)


def test_entries_that_count_nothing_change_nothing(example):
    x, labels = map(torch.from_numpy, example)
    counts = torch.ones(len(x), dtype=torch.float64)
    counts[100:] = 0
    half, alone = fit(x, labels, L2, counts), fit(x[:100], labels[:100], L2)
    assert torch.allclose(half.weight, alone.weight, rtol=1e-3, atol=1e-6)
    assert torch.allclose(half.bias, alone.bias, rtol=1e-3, atol=1e-6)


def test_a_constant_dimension_is_left_out(example):
    x, labels = map(torch.from_numpy, example)
    expected = fit(x, labels, L2)
    probe = fit(torch.cat([x, torch.full((len(x), 1), 3.7)], dim=1), labels, L2)
    assert probe.weight[:, -1].tolist() == [0.0] * 4
    assert torch.allclose(probe.weight[:, :-1], expected.weight, rtol=1e-3, atol=1e-6)


def test_the_grid_is_decided_by_entries_that_are_held_out():
    """With as many dimensions as entries, and labels that are noise but for one dimension, a fit without
    regularisation is right on what it has seen alone.
    """
    random = torch.Generator().manual_seed(0)
    x = torch.randn(100, 80, generator=random)
    labels = (x[:, 0] > 0).long()
    grid = [1e-8, 1e-1]
    assert fit(x, labels, 1e-8).scores(x, labels)["probe_top1"] == 1.0
    probe = linear_probe(Accelerator(cpu=True), x, labels, grid)
    held_out = torch.from_numpy(np.random.RandomState(0).permutation(100)[:20])
    counts = torch.ones(100, dtype=torch.float64)
    counts[held_out] = 0
    scores = {
        l2: fit(x, labels, l2, counts).scores(x[held_out], labels[held_out])["probe_top1"] for l2 in grid
    }
    best = max(grid, key=lambda l2: (scores[l2], l2))
    assert probe.l2 == best
    assert linear_probe(Accelerator(cpu=True), x, labels, grid[::-1]).l2 == best


def test_only_candidates_are_predicted(example):
    x, labels = map(torch.from_numpy, example)
    probe = fit(x, labels, L2)
    best = probe.best(x, torch.tensor([3, 9]))
    assert set(best[:, 0].tolist()) == {3, 9}
    few = (labels == 3) | (labels == 9)
    restricted = probe.scores(x[few], labels[few], torch.tensor([3, 9]))
    assert restricted["probe_top1"] >= probe.scores(x[few], labels[few])["probe_top1"]
