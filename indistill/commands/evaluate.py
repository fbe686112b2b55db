"""`indistill eval`: evaluate a checkpoint or an exported model."""

from __future__ import annotations

from indistill import evaluate
from indistill.commands.export.load import Program, load_for_eval
from indistill.config import Config, UserError, metric_names
from indistill.data.training import open_bank, open_eval_sets
from indistill.evaluate.bank import check_bank
from indistill.models.network import Network
from indistill.training.start import start_accelerator


def evaluate_checkpoint(settings: Config, checkpoint: str) -> dict[str, float]:
    """Score a checkpoint (its moving average, if any), an export or a timm model on `data.eval`.

    `checkpoint` is what `load_for_eval` accepts. Returns scores in [0, 1] by name. Raises UserError without
    `data.eval`, and for an ONNX export with an evaluation that reads embeddings.
    """
    section = settings.evaluate
    if settings.data.eval is None:
        raise UserError("eval needs shards to evaluate on: set data.eval")
    accelerator = start_accelerator(settings)
    network, view = load_for_eval(settings, checkpoint)
    network = network.to(accelerator.device)
    if section.on_bank and isinstance(network, Program):
        raise _without_embeddings(checkpoint, section.on_bank[-1])
    sets = open_eval_sets(settings, view)
    bank = open_bank(settings)
    if bank is not None:
        check_bank(settings, bank.shards, {name: dataset.shards for name, dataset in sets.items()})
    by_set = {
        name: evaluate.accuracy(accelerator, network, dataset, section.batch)
        for name, dataset in sets.items()
    }
    if bank is not None:
        assert isinstance(network, Network)  # a Program is refused above
        others = evaluate.bank_scores(
            accelerator, network, section=section, keys=section.on_bank, bank=bank, sets=sets
        )
        by_set = {name: scores | others[name] for name, scores in by_set.items()}
    if not any(by_set.values()):
        raise UserError(
            f"{checkpoint}: has no classifier to evaluate: set evaluate.knn={{}}, or "
            "evaluate.linear_probe={}"
        )
    return {
        key: score
        for name, of_set in by_set.items()
        for key, score in metric_names.of_set(name, of_set).items()
    }


def _without_embeddings(checkpoint: str, key: str) -> UserError:
    off = f"set evaluate.{key}={'false' if key == 'retrieval' else 'null'}"
    what = "retrieval" if key == "retrieval" else f"evaluate.{key}"
    return UserError(f"{checkpoint}: has no embeddings for {what}: {off}, or evaluate a timm export")
