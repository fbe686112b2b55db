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
    key = section.on_bank[-1]  # for messages
    off = f"set evaluate.{key}={'false' if key == 'retrieval' else 'null'}"
    for where, shards in [(name, bank), *((eval_key(one), shards) for one, shards in sets.items())]:
        for sample_id in np.flatnonzero(shards.labels < 0)[:1]:
            remedy = "name labelled shards in evaluate.bank" if where == name else f"label {where}"
            raise UserError(
                f"evaluate.{key}: {where} has images without a label ({shards.where(sample_id)}): {remedy}, "
                f"or {off}"
            )
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

    keys: those of `section.on_bank` to compute. Collective; the same on all ranks. Raises UserError for
    embeddings that are not finite; k-NN alone, as during training, is then left out with a message.
    """
    view = next(iter(sets.values())).view
    of_bank = embed(accelerator, network, bank.for_evaluation(view), section.batch)
    queries = {name: embed(accelerator, network, one, section.batch) for name, one in sets.items()}
    if not _all_finite(accelerator, [of_bank, *queries.values()]):
        problem = f"evaluate.{keys[-1]}: an embedding is not finite"
        if list(keys) != ["knn"]:
            raise UserError.of_all_ranks(problem)
        if accelerator.is_main_process:
            print(f"indistill: {problem}, and the score is left out", flush=True)
        return {name: {} for name in sets}
    candidates = {name: _candidates(one, of_bank.labels.device) for name, one in sets.items()}
    scores: dict[str, dict[str, float]] = {name: {} for name in sets}
    if "knn" in keys and section.knn is not None:
        k, temperature = section.knn.k, section.knn.temperature
        for name, one in queries.items():
            scores[name] |= neighbours(
                accelerator, of_bank, one, k=k, temperature=temperature, classes=candidates[name]
            )
    if not {"linear_probe", "retrieval"} & set(keys):
        return scores
    everywhere = whole(accelerator, of_bank)  # [N, D]
    probe = None
    if "linear_probe" in keys and section.linear_probe is not None:
        probe = linear_probe(accelerator, everywhere, of_bank.labels, section.linear_probe.l2)
    for name, one in queries.items():
        x = whole(accelerator, one)  # [Q, D]
        if probe is not None:
            top1, top5 = probe.accuracy(x, one.labels, candidates[name])
            scores[name] |= {"probe_top1": top1, "probe_top5": top5, "probe_l2": probe.l2}
        if "retrieval" in keys:
            scores[name] |= ranked(accelerator, everywhere, of_bank.labels, x, one.labels)
    return scores


def _candidates(dataset: ImageDataset, device: torch.device) -> Tensor | None:
    """The labels int64 [K] of the classes of a set that has a label map."""
    label_map = dataset.shards.label_map
    return None if label_map is None else torch.from_numpy(label_map).to(device)


def _all_finite(accelerator: Accelerator, sets: Sequence[Embedded]) -> bool:
    bad = torch.stack([~one.share.isfinite().all() for one in sets]).any()
    return not accelerator.reduce(bad.float(), reduction="sum").item()
