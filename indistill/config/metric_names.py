"""The names of scores: of several evaluation sets, `NAME/top1`, and of one without a name, `top1`."""

from __future__ import annotations

from collections.abc import Mapping

_ACCURACIES = ("top", "knn_top", "probe_top")


def of_set(name: str, scores: Mapping[str, float]) -> dict[str, float]:
    """Return the scores of one evaluation set under their names in the log."""
    return {f"{name}/{key}" if name else key: value for key, value in scores.items()}


def eval_key(name: str) -> str:
    """Return the key of an evaluation set in the config."""
    return f"data.eval.{name}" if name else "data.eval"


def split(key: str) -> tuple[str, str]:
    """Return the evaluation set of a score, "" if it has no name, and the score's name in that set."""
    name, _, score = key.rpartition("/")
    return name, score


def is_accuracy(key: str) -> bool:
    """Whether a number in the log is the accuracy of a classifier, k-NN or a probe."""
    return split(key)[1].startswith(_ACCURACIES)


def first(scores: Mapping[str, float], name: str) -> float | None:
    """Return the score `name` of the first evaluation set that has it; None if none has."""
    return next((value for key, value in scores.items() if split(key)[1] == name), None)


def deciding(scores: Mapping[str, float]) -> float | None:
    """Return the score by which checkpoints are the best: top-1, of a student without classifier by k-NN."""
    top1 = first(scores, "top1")
    return first(scores, "knn_top1") if top1 is None else top1
