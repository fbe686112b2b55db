"""What embeddings are worth, by comparison with those of a bank of labelled images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from indistill.config import Config, Evaluate, UserError
from indistill.config.metric_names import eval_key
from indistill.data.dataset import ImageDataset
from indistill.data.shards import ShardSet
from indistill.evaluate.classification import label_map
from indistill.evaluate.neighbours import neighbours
from indistill.evaluate.passes import Embedded, embed, whole
from indistill.evaluate.probe import linear_probe
from indistill.evaluate.ranking import ranked
from indistill.models.trainable import Trainable

_MOST_SHOWN = 5  # labels in a message
_FEWEST_OF_PROBE = 5  # images, of which one chooses the regularisation


def check_bank(settings: Config, bank: ShardSet, sets: Mapping[str, ShardSet]) -> None:
    """Raise UserError if a score that needs the bank could not be computed, without reading an image.

    sets: the evaluation sets by name.
    """
    section = settings.evaluate
    name = "data.train" if section.bank is None else "evaluate.bank"
    _check_labels(section, name, bank, sets)
    if section.knn is not None and section.knn.k > len(bank):
        raise UserError(
            f"evaluate.knn.k: {section.knn.k} neighbours are more than the {len(bank)} images of {name}: "
            "lower it"
        )
    if section.linear_probe is not None and len(bank) < _FEWEST_OF_PROBE:
        raise UserError(
            f"evaluate.linear_probe: {name} has {len(bank)} images, and a probe needs {_FEWEST_OF_PROBE}: "
            "name more shards in evaluate.bank"
        )


def _check_labels(section: Evaluate, name: str, bank: ShardSet, sets: Mapping[str, ShardSet]) -> None:
    """Raise UserError for an image without a label, and for a class that only an evaluation set has."""
    key = section.on_bank[-1]  # for messages
    off = f"set evaluate.{key}={'false' if key == 'retrieval' else 'null'}"
    for where, shards in [(name, bank), *((eval_key(one), shards) for one, shards in sets.items())]:
        for sample_id in np.flatnonzero(shards.labels < 0)[:1]:
            remedy = "name labelled shards in evaluate.bank" if shards is bank else f"label {where}"
            raise UserError(
                f"evaluate.{key}: {where} has images without a label ({shards.where(sample_id)}): {remedy}, "
                f"or {off}"
            )
    for one, shards in sets.items():
        absent = np.setdiff1d(shards.labels, bank.labels)
        if len(absent):
            labels = ", ".join(map(str, absent[:_MOST_SHOWN])) + (
                ", ..." if len(absent) > _MOST_SHOWN else ""
            )
            raise UserError(
                f"evaluate.{key}: {name} has no image of {len(absent)} of {eval_key(one)}'s classes (label "
                f"{labels}): {off}, or evaluate on classes that are trained"
            )


def bank_scores(
    accelerator: Accelerator,
    network: Trainable,
    *,
    section: Evaluate,
    keys: Sequence[str],
    bank: ImageDataset,
    sets: Mapping[str, ImageDataset],
) -> dict[str, dict[str, float]]:
    """Scores in [0, 1] of the embeddings, by evaluation set: k-NN, a linear probe and retrieval.

    keys: those of `section.on_bank` to compute. Images of the bank that cannot be decoded are left out of it,
    because training goes on without them, too. Collective; the same on all ranks. Raises UserError for
    embeddings that are not finite; k-NN alone, as during training, is then left out with a message.
    """
    seen = bank.for_evaluation(next(iter(sets.values())).view)
    of_bank = embed(accelerator, network, dataset=seen, batch=section.batch, blank_bad=True)
    _report_bad(accelerator, of_bank)
    queries = {
        name: embed(accelerator, network, dataset=one, batch=section.batch) for name, one in sets.items()
    }
    scores: dict[str, dict[str, float]] = {name: {} for name in sets}
    if not _check_finite(accelerator, [of_bank, *queries.values()], keys):
        return scores
    classes = {name: label_map(one, accelerator.device) for name, one in sets.items()}
    if section.knn is not None and "knn" in keys:
        for name, one in queries.items():
            scores[name] |= neighbours(
                accelerator, of_bank, queries=one, settings=section.knn, classes=classes[name]
            )
    if list(keys) != ["knn"]:
        more = _whole_scores(
            accelerator, of_bank, section=section, keys=keys, queries=queries, classes=classes
        )
        scores = {name: own | more[name] for name, own in scores.items()}
    return scores


def _whole_scores(
    accelerator: Accelerator,
    bank: Embedded,
    *,
    section: Evaluate,
    keys: Sequence[str],
    queries: Mapping[str, Embedded],
    classes: Mapping[str, Tensor | None],
) -> dict[str, dict[str, float]]:
    """The scores for which every rank needs the whole bank: of a linear probe, and of retrieval."""
    known = bank.labels >= 0
    x, bank_labels = whole(accelerator, bank)[known], bank.labels[known]  # [N, D], [N]
    probe = None
    if section.linear_probe is not None and "linear_probe" in keys:
        probe = linear_probe(accelerator, x, bank_labels, section.linear_probe.l2)
    scores: dict[str, dict[str, float]] = {}
    for name, one in queries.items():
        everywhere = whole(accelerator, one)  # [Q, D]
        scores[name] = {} if probe is None else probe.scores(everywhere, one.labels, classes[name])
        if "retrieval" in keys:
            labels = {"db_labels": bank_labels, "query_labels": one.labels}
            scores[name] |= ranked(accelerator, x, queries=everywhere, **labels)
    return scores


def _report_bad(accelerator: Accelerator, bank: Embedded) -> None:
    """Say how many images of the bank cannot be decoded. Raises UserError if none can."""
    bad = int((bank.labels < 0).sum())
    if bad == len(bank.labels):
        raise UserError("evaluate: no image of the bank can be decoded: run `indistill shards verify` on it")
    if bad and accelerator.is_main_process:
        print(f"indistill: {bad} images of the bank cannot be decoded, and are left out of it", flush=True)


def _check_finite(accelerator: Accelerator, sets: Sequence[Embedded], keys: Sequence[str]) -> bool:
    """Whether all embeddings are finite. Raises UserError if not, unless only k-NN is to be computed."""
    bad = torch.stack([~one.share.isfinite().all() for one in sets]).any()
    if not accelerator.reduce(bad.float(), reduction="sum").item():
        return True
    problem = f"evaluate.{keys[-1]}: an embedding is not finite"
    if list(keys) != ["knn"]:
        raise UserError(problem)
    if accelerator.is_main_process:
        print(f"indistill: {problem}, and the score is left out", flush=True)
    return False
