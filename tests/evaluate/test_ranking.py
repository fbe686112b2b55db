"""Retrieval against answers worked out by hand and against the protocols written as plain loops."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from indistill.evaluate import precision_at, retrieval_map

pytestmark = pytest.mark.portable


def plain_order(db, query, metric):
    """The database's entries, nearest first, equal ones in the given order."""
    if metric == "cosine":
        norms = np.linalg.norm(db, axis=1) * np.linalg.norm(query)
        distance = 1 - (db * query).sum(axis=1) / np.where(norms == 0, 1, norms)
    else:
        distance = np.sqrt(((db - query) ** 2).sum(axis=1))
    return np.argsort(distance, kind="stable")


def plain_map(db, db_labels, queries, query_labels, metric, protocol):
    """Both protocols rank by rank, in float64; the authors' loop as they run it, over the length of a query
    batch.
    """
    scores = []
    for start in range(0, len(queries), 128):
        precision, recall = [], []
        batch = queries[start : start + 128]
        for query, label in zip(batch, query_labels[start : start + 128]):
            relevant = db_labels[plain_order(db, query, metric)] == label
            found = np.cumsum(relevant)
            precision.append(found / np.arange(1, len(db) + 1))
            recall.append(found / relevant.sum())
        precision, recall = np.array(precision), np.array(recall)  # [batch, N]
        columns = len(db) if protocol == "interpolated" else min(len(batch), len(db))
        for i in reversed(range(columns - 1)):
            precision[:, i] = np.maximum(precision[:, i], precision[:, i + 1])
        for p, r in zip(precision, recall):
            scores.append(np.mean([p[np.argmin(np.abs(r - level))] for level in np.arange(0, 1.01, 0.1)]))
    return np.mean(scores)


def embeddings(db_size, query_size, classes=4, width=5, seed=0):
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(classes, width))
    # Few enough classes and enough entries for every class to occur in the database.
    db_labels, query_labels = np.arange(db_size) % classes, rng.integers(classes, size=query_size)
    return (
        (centres[db_labels] + rng.normal(size=(db_size, width))).astype(np.float32),
        db_labels,
        (centres[query_labels] + rng.normal(size=(query_size, width))).astype(np.float32),
        query_labels,
    )


def as_tensors(arrays):
    return [torch.from_numpy(array) for array in arrays]


def on_a_line(relevant):
    """A database at distances 1, 2, ... from a query at 0: the ranks are the given ones, in that order."""
    db = torch.arange(1.0, len(relevant) + 1)[:, None]
    return db, torch.tensor(relevant), torch.zeros(1, 1), torch.tensor([1])


def test_perfect_ranking():
    for protocol in ("interpolated", "authors"):
        assert retrieval_map(*on_a_line([1, 1, 1, 0, 0]), metric="l2", protocol=protocol) == 1


def test_two_relevant_by_hand():
    # Ranks: no, yes, no, yes. Precision 0, 1/2, 1/3, 1/2; recall 0, 1/2, 1/2, 1. Levels 0 to 0.2 are nearest
    # to rank 1, 0.3 to 0.7 to rank 2, 0.8 to 1 to rank 4.
    example = on_a_line([0, 1, 0, 1])
    assert retrieval_map(*example, metric="l2") == pytest.approx(1 / 2)
    # One query to a batch: no running maximum, so levels 0 to 0.2 keep precision 0.
    assert retrieval_map(*example, metric="l2", protocol="authors") == pytest.approx(8 / 11 / 2)


def test_later_precision_counts_only_when_interpolated():
    # Relevant at ranks 2 to 5: precision 1/2, 2/3, 3/4, 4/5 there, recall 1/4, 1/2, 3/4, 1. Of the levels, 0
    # and 0.1 are nearest to rank 1, 0.2 and 0.3 to rank 2, 0.4 to 0.6 to rank 3, 0.7 and 0.8 to rank 4, 0.9
    # and 1 to rank 5.
    example = on_a_line([0, 1, 1, 1, 1, 0])
    assert retrieval_map(*example, metric="l2") == pytest.approx(4 / 5)
    expected = (2 * 0 + 2 * 1 / 2 + 3 * 2 / 3 + 2 * 3 / 4 + 2 * 4 / 5) / 11
    assert retrieval_map(*example, metric="l2", protocol="authors") == pytest.approx(expected)


def test_the_authors_batch_reaches_as_many_ranks_as_it_has_queries():
    # As above for two queries to a batch: the maximum over ranks 1 and 2 lifts rank 1 to 1/2, and no more.
    db, db_labels, queries, query_labels = on_a_line([0, 1, 1, 1, 1, 0])
    example = db, db_labels, queries.repeat(2, 1), query_labels.repeat(2)
    expected = (2 * 1 / 2 + 2 * 1 / 2 + 3 * 2 / 3 + 2 * 3 / 4 + 2 * 4 / 5) / 11
    assert retrieval_map(*example, metric="l2", protocol="authors") == pytest.approx(expected)


def test_ties_keep_the_order_of_the_database():
    query, label = torch.ones(1, 2), torch.tensor([1])
    db = torch.ones(4, 2)
    for metric in ("cosine", "l2"):
        assert retrieval_map(db, torch.tensor([1, 1, 0, 0]), query, label, metric=metric) == 1
        assert retrieval_map(db, torch.tensor([0, 0, 1, 1]), query, label, metric=metric) == pytest.approx(
            1 / 2
        )


def test_a_zero_embedding_is_at_cosine_distance_one():
    db = torch.tensor([[-1.0, 0.0], [0.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    query, label = torch.tensor([[2.0, 0.0]]), torch.tensor([1])
    assert retrieval_map(db, torch.tensor([0, 1, 0, 1]), query, label) == 1
    # Order 3, 1, 2, 0: recall 1/2 at precision 1 (levels 0 to 0.7), then 1 at 2/3.
    assert retrieval_map(db, torch.tensor([0, 0, 1, 1]), query, label) == pytest.approx(
        (8 * 1 + 3 * 2 / 3) / 11
    )


@pytest.mark.parametrize("protocol", ["interpolated", "authors"])
@pytest.mark.parametrize("metric", ["cosine", "l2"])
@pytest.mark.parametrize("query_size", [1, 2, 127, 128, 129, 300])
def test_matches_plain_loops(query_size, metric, protocol):
    for seed, (db_size, classes) in enumerate([(200, 4), (500, 10), (64, 40)]):
        arrays = embeddings(db_size, query_size, classes, seed=seed)
        expected = plain_map(
            *(a.astype(np.float64) if a.dtype == np.float32 else a for a in arrays), metric, protocol
        )
        result = retrieval_map(*as_tensors(arrays), metric=metric, protocol=protocol)
        assert result == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("metric", ["cosine", "l2"])
@pytest.mark.parametrize("query_size", [1, 130])
def test_precision_matches_plain_loops(query_size, metric):
    ks = (1, 3, 10, 100, 200)
    arrays = embeddings(200, query_size, classes=40, seed=1)
    db, db_labels, queries, query_labels = (
        a.astype(np.float64) if a.dtype == np.float32 else a for a in arrays
    )
    orders = [plain_order(db, query, metric) for query in queries]
    expected = {}
    for k in ks:
        expected[k] = np.mean(
            [np.mean(db_labels[order[:k]] == label) for order, label in zip(orders, query_labels)]
        )
    assert precision_at(*as_tensors(arrays), ks=ks, metric=metric) == pytest.approx(expected, abs=1e-12)


def test_precision_by_hand():
    assert precision_at(*on_a_line([0, 1, 1, 0]), ks=(1, 2, 3, 4), metric="l2") == {
        1: 0,
        2: 1 / 2,
        3: 2 / 3,
        4: 1 / 2,
    }
    query, label, db = (
        torch.ones(1, 2),
        torch.tensor([1]),
        torch.ones(4, 2),
    )  # ties keep the order of the database
    for metric in ("cosine", "l2"):
        for labels in ([1, 1, 0, 0], [0, 0, 1, 1]):
            expected = {1: labels[0], 2: labels[0], 4: 1 / 2}
            assert precision_at(db, torch.tensor(labels), query, label, (1, 2, 4), metric) == expected


def test_precision_leaves_out_more_than_the_database_has():
    assert list(precision_at(*as_tensors(embeddings(64, 5)))) == [1, 10]
    assert list(precision_at(*as_tensors(embeddings(100, 5)))) == [1, 10, 100]
    with pytest.raises(ValueError, match="precision at 0"):
        precision_at(*as_tensors(embeddings(64, 5)), ks=(1, 0))


def test_small_blocks_change_nothing(monkeypatch):
    example = as_tensors(embeddings(200, 150))
    for protocol in ("interpolated", "authors"):
        whole = retrieval_map(*example, protocol=protocol)
        monkeypatch.setattr("indistill.evaluate.ranking._BLOCK_ENTRIES", 200 * 7)
        assert retrieval_map(*example, protocol=protocol) == pytest.approx(whole, abs=1e-12)
        monkeypatch.undo()
    whole = precision_at(*example)
    monkeypatch.setattr("indistill.evaluate.ranking._BLOCK_ENTRIES", 200 * 7)
    assert precision_at(*example) == whole


def test_the_authors_figure_depends_on_the_order_of_the_queries():
    db, db_labels, queries, query_labels = as_tensors(embeddings(300, 129))
    forward = retrieval_map(db, db_labels, queries, query_labels, protocol="authors")
    backward = retrieval_map(db, db_labels, queries.flip(0), query_labels.flip(0), protocol="authors")
    assert forward != pytest.approx(backward, abs=1e-9)
    forward = retrieval_map(db, db_labels, queries, query_labels)
    backward = retrieval_map(db, db_labels, queries.flip(0), query_labels.flip(0))
    assert forward == pytest.approx(backward, abs=1e-12)


def test_accepts_half_precision_and_any_labels():
    db, db_labels, queries, query_labels = as_tensors(embeddings(200, 20))
    relabelled = retrieval_map(db, db_labels * 1000 - 7, queries, query_labels * 1000 - 7)
    assert relabelled == retrieval_map(db, db_labels, queries, query_labels)
    half = retrieval_map(db.bfloat16(), db_labels.int(), queries.bfloat16(), query_labels.int())
    assert half == retrieval_map(db.bfloat16().float(), db_labels, queries.bfloat16().float(), query_labels)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query_labels": torch.tensor([0, 9])}, "label 9 is absent"),
        ({"queries": torch.zeros(2, 4)}, "shapes"),
        ({"db_labels": torch.tensor([0, 1])}, "shapes"),
        ({"queries": torch.zeros(0, 3), "query_labels": torch.zeros(0)}, "no queries"),
        ({"db": torch.full((3, 3), float("nan"))}, "not finite"),
        ({"metric": "dot"}, "metric 'dot'"),
        ({"protocol": "voc"}, "protocol 'voc'"),
    ],
)
def test_impossible_arguments(change, message):
    arguments = {
        "db": torch.ones(3, 3),
        "db_labels": torch.tensor([0, 1, 1]),
        "queries": torch.ones(2, 3),
        "query_labels": torch.tensor([0, 1]),
    }
    with pytest.raises(ValueError, match=message):
        retrieval_map(**arguments | change)


MEASURE_MEMORY = """
import resource, sys, torch
from indistill.evaluate import retrieval_map
generator = torch.Generator().manual_seed(0)
db, queries = torch.randn(50_000, 16, generator=generator), torch.randn(256, 16, generator=generator)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
retrieval_map(db, torch.arange(50_000) % 10, queries, torch.arange(256) % 10, protocol="authors")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux only")
def test_memory_does_not_grow_with_the_queries():
    # In its own process, because the peak of this one may lie behind it.
    output = subprocess.run(
        [sys.executable, "-c", MEASURE_MEMORY], check=True, capture_output=True, text=True
    ).stdout
    assert int(output) < 700 * 1024  # KiB
