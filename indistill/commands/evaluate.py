"""`indistill eval`: evaluate a checkpoint or an exported model."""

from __future__ import annotations

from indistill import evaluate
from indistill.commands.export.load import Program, load_for_eval
from indistill.config import Config, UserError
from indistill.data.dataset import ImageDataset, open_shards
from indistill.data.training import open_eval_set
from indistill.evaluate.ranking import check_retrieval
from indistill.models.network import Network
from indistill.training.start import start_accelerator


def evaluate_checkpoint(settings: Config, checkpoint: str) -> dict[str, float]:
    """Score a checkpoint (its moving average, if any), an export or a timm model on `data.eval`.

    `checkpoint` is what `load_for_eval` accepts. Returns scores in [0, 1] by name. Raises UserError without
    `data.eval`, and for an ONNX export with `evaluate.retrieval`.
    """
    if settings.data.eval is None:
        raise UserError("eval needs shards to evaluate on: set data.eval")
    accelerator = start_accelerator(settings)
    network, view = load_for_eval(settings, checkpoint)
    network = network.to(accelerator.device)
    if settings.evaluate.retrieval and isinstance(network, Program):
        raise UserError(
            f"{checkpoint}: has no embeddings for retrieval: set evaluate.retrieval=false, or evaluate a "
            "timm export"
        )
    eval_set = open_eval_set(settings, view)
    database: ImageDataset | None = None
    if settings.evaluate.retrieval:
        shards = open_shards(settings.data, settings.data.train)
        database = ImageDataset(shards, settings.data, seed=settings.seed)
        check_retrieval(shards, eval_set.shards)
    scores = evaluate.accuracy(accelerator, network, eval_set, settings.evaluate.batch)
    if database is not None:
        assert isinstance(network, Network)  # a Program is refused above
        scores |= evaluate.retrieval(accelerator, network, database, eval_set, settings.evaluate.batch)
    accelerator.end_training()
    return scores
