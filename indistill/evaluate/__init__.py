"""Exact evaluation over all ranks: accuracy, k-NN, linear probe, retrieval, and two networks' similarity."""

from indistill.evaluate.bank import bank_scores, check_bank
from indistill.evaluate.classification import accuracy
from indistill.evaluate.comparison import similarity
from indistill.evaluate.neighbours import knn
from indistill.evaluate.passes import embeddings
from indistill.evaluate.probe import linear_probe
from indistill.evaluate.ranking import PRECISION_AT, precision_at, retrieval, retrieval_map

__all__ = [
    "PRECISION_AT",
    "accuracy",
    "bank_scores",
    "check_bank",
    "embeddings",
    "knn",
    "linear_probe",
    "precision_at",
    "retrieval",
    "retrieval_map",
    "similarity",
]
