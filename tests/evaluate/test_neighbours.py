"""k-NN against the algorithm written as plain loops, and against examples worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from indistill.evaluate import knn, neighbours

pytestmark = pytest.mark.portable


def plain(bank, bank_labels, queries, query_labels, k, temperature):
    """DINO's weighted vote for one query after the other."""
    hits = np.zeros(2)
    unit = bank / np.linalg.norm(bank, axis=1, keepdims=True)
    for query, label in zip(queries, query_labels):
        cosines = unit @ (query / np.linalg.norm(query))
        votes: dict[int, float] = {}
        for i in sorted(range(len(bank)), key=lambda i: -cosines[i])[:k]:
            votes[bank_labels[i]] = votes.get(bank_labels[i], 0.0) + math.exp(cosines[i] / temperature)
        best = sorted(votes, key=lambda one: -votes[one])
        hits += [label == best[0], label in best[:5]]
    return dict(zip(("knn_top1", "knn_top5"), hits / len(queries)))


@pytest.fixture
def example():
    """300 bank entries of 12 classes that overlap, in 8 dimensions, and 90 queries."""
    random = np.random.default_rng(0)
    centres = random.normal(size=(12, 8))
    bank_labels, query_labels = np.arange(300) % 12, random.integers(12, size=90)
    bank = centres[bank_labels] + random.normal(size=(300, 8))
    queries = centres[query_labels] + random.normal(size=(90, 8))
    return bank.astype(np.float32), bank_labels, queries.astype(np.float32), query_labels


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (20, 0.07), (20, 1.0), (300, 0.07)])
def test_votes_are_those_of_dino(example, k, temperature, monkeypatch):
    bank, bank_labels, queries, query_labels = map(torch.from_numpy, example)
    told = {"queries": queries, "query_labels": query_labels, "k": k, "temperature": temperature}
    scores = knn(bank, bank_labels, **told)
    assert scores == pytest.approx(plain(*example, k, temperature), abs=1e-12)
    monkeypatch.setattr("indistill.evaluate.neighbours._QUERIES", 7)
    monkeypatch.setattr("indistill.evaluate.neighbours._PAIRS", 7 * 11)
    assert knn(bank, bank_labels, **told) == scores  # in blocks of 7 queries and 11 entries


def test_near_neighbours_outvote_many_far_ones():
    # One neighbour at 0 degrees, of class 0, and two at 60, of class 1, whose cosine is 1/2.
    far = [0.5, math.sqrt(3) / 2]
    bank = torch.tensor([[1.0, 0.0], far, far])
    told = {"queries": torch.tensor([[2.0, 0.0]]), "query_labels": torch.tensor([0]), "k": 3}
    labels = torch.tensor([0, 1, 1])
    assert knn(bank, labels, **told)["knn_top1"] == 1.0  # exp(-0.5 / 0.07) is far below a half
    assert knn(bank, labels, **told, temperature=1.0)["knn_top1"] == 0.0  # 2 exp(-0.5) is above 1
    assert knn(bank, labels, **told, temperature=1.0)["knn_top5"] == 1.0


def test_a_class_without_a_neighbour_is_no_candidate():
    bank = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    query = {"queries": torch.tensor([[1.0, 0.1]]), "query_labels": torch.tensor([1]), "k": 1}
    assert knn(bank, torch.tensor([0, 1]), **query) == {"knn_top1": 0.0, "knn_top5": 0.0}


def test_of_equal_neighbours_the_first_counts():
    bank = torch.tensor([[1.0, 0.0]]).repeat(5, 1)
    query = {"queries": torch.tensor([[1.0, 0.0]]), "query_labels": torch.tensor([3])}
    assert knn(bank, torch.tensor([3, 0, 1, 2, 4]), **query, k=1)["knn_top1"] == 1.0
    assert knn(bank, torch.tensor([0, 3, 3, 3, 3]), **query, k=1)["knn_top1"] == 0.0


def test_a_k_larger_than_the_bank_is_refused():
    with pytest.raises(ValueError, match="k is 3, and the bank has 2 entries"):
        knn(torch.eye(2), torch.arange(2), queries=torch.eye(2), query_labels=torch.arange(2), k=3)


def test_a_share_with_fewer_entries_than_neighbours_leaves_room(example):
    bank, labels, queries, _ = map(torch.from_numpy, example)
    shares = [neighbours._nearest(bank[a:b], queries, k=20, first=a) for a, b in ((0, 3), (3, 3), (3, 300))]
    joined = torch.cat(shares, dim=1).sort(dim=1).values[:, :20]
    assert joined.equal(neighbours._nearest(bank, queries, k=20))
    assert len(labels) == 300
