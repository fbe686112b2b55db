"""Exact evaluation over all ranks: accuracy, retrieval, and the similarity of two networks."""

from indistill.evaluate.classification import accuracy
from indistill.evaluate.comparison import similarity
from indistill.evaluate.passes import embeddings
from indistill.evaluate.ranking import PRECISION_AT, precision_at, retrieval, retrieval_map

__all__ = [
    "PRECISION_AT",
    "accuracy",
    "embeddings",
    "precision_at",
    "retrieval",
    "retrieval_map",
    "similarity",
]
