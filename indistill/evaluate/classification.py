"""Top-1 and top-5 accuracy over all ranks."""

from itertools import zip_longest

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from indistill.data.dataset import ImageDataset
from indistill.evaluate.passes import each_batch


@torch.no_grad()
def accuracy(
    accelerator: Accelerator, network: nn.Module, dataset: ImageDataset, batch: int
) -> dict[str, float]:
    """Top-1 and top-5 accuracy over the whole set, in [0, 1]; {} for a network whose classifier no loss
    trains, and for one without classifier.

    If the set has a label map, only its classes are candidates. With intermediate classifier heads
    (`Output.cohort`) also their `top1_head1`, `top1_head2`, ... Collective; pass the network without its
    training wrapper.
    """
    if not network.with_logits:
        return {}
    counts: Tensor | int = 0  # samples; right in the best 5; right; right by each head
    classes = label_map(dataset, accelerator.device)
    for images, labels in each_batch(accelerator, dataset, batch, network):
        output = network(images)
        logits = _candidates(output.logits, classes)
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices  # [B, 5]
        hits = best == labels[:, None]
        heads = [(_candidates(logits, classes).argmax(dim=1) == labels).sum() for logits in output.cohort]
        seen = labels.new_tensor(len(labels))
        counts = counts + torch.stack([seen, hits.sum(), hits[:, 0].sum(), *heads])
    mine = counts.tolist() if isinstance(counts, Tensor) else []  # a rank may have no sample of a small set
    total, *correct = (sum(column) for column in zip_longest(*gather_object([mine]), fillvalue=0))
    if total != len(dataset):
        raise RuntimeError(f"evaluation counted {total} of {len(dataset)} samples")
    top5, top1, *heads = (count / total for count in correct)
    return {"top1": top1, "top5": top5} | {f"top1_head{i}": score for i, score in enumerate(heads, start=1)}


def label_map(dataset: ImageDataset, device: torch.device) -> Tensor | None:
    """The labels int64 [K] of the only classes that are candidates for a set; None: all are."""
    classes = dataset.shards.label_map
    return None if classes is None else torch.from_numpy(classes).to(device)


def _candidates(logits: Tensor, classes: Tensor | None) -> Tensor:
    """The logits [B, K], with minus infinity for all but these classes; None: as they are."""
    if classes is None:
        return logits
    return torch.full_like(logits, -torch.inf).index_copy_(1, classes, logits[:, classes])
