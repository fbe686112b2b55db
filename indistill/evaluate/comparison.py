"""The similarity of two networks' stages, over all ranks."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor

from indistill.data.batch import Batch, Request
from indistill.data.dataset import ImageDataset
from indistill.evaluate.passes import each_batch, join_columns
from indistill.evaluate.representations import information, information_flow_divergence, linear_cka
from indistill.models.network import Network

_MAP_ENTRIES = 2**27  # of one feature map over all its samples: 512 MiB in float32


@torch.no_grad()
def similarity(
    accelerator: Accelerator,
    student: Network,
    teacher: Network,
    pairs: Sequence[tuple[int, int]],
    dataset: ImageDataset,
    batch: int,
    samples: int = 512,
) -> dict[str, float]:
    """Compare student and teacher on `samples` images, evenly spaced over the set. Collective; the same on
    all ranks.

    `pairs` are (teacher stage, student stage), each deeper than the last, as in `warmup.pairs`; the
    embeddings are one more, the last. For each {layer} of pair1, pair2, ..., embedding:

    - cka_{layer}: linear centred kernel alignment of both networks' flattened maps, in [0, 1];
    - information_student_{layer}, information_teacher_{layer}: quadratic mutual information with the labels;

    and information_flow_divergence between the two networks' information (representations.py has the
    definitions). A layer that is not finite, as in half precision, is left out with a message, like the
    divergence.

    Maps are compared without adapter or pruning. If `samples` of one have more than 2^27 values (512 MiB in
    float32; 512 maps of 64 x 56 x 56 have fewer), they are average-pooled to half their size until they fit.
    All ranks together hold the maps of every layer in host memory, each rank those of one on its device.
    """
    part = _Spaced(dataset, samples)
    layers = [f"pair{i}" for i in range(1, len(pairs) + 1)] + ["embedding"]
    rows = [
        _row(images, labels, student=student, teacher=teacher, pairs=pairs, samples=len(part))
        for images, labels in each_batch(accelerator, part, batch, student, teacher)
    ]
    columns = join_columns(accelerator, rows, len(part))
    labels = next(columns)
    scores: dict[str, float] = {}
    for layer, of_student, of_teacher in zip(layers, columns, columns):  # [N, C, H, W] or [N, D], each
        if accelerator.is_main_process:
            scores |= _layer_scores(layer, of_student, of_teacher, labels)
    scores |= _flow_divergence(scores, layers)
    return broadcast_object_list([scores])[0]


def _row(
    images: Tensor,
    labels: Tensor,
    *,
    student: Network,
    teacher: Network,
    pairs: Sequence[tuple[int, int]],
    samples: int,
) -> list[Tensor]:
    """Labels [B] of a batch, then the student's and the teacher's map of each pair, and both embeddings."""
    students = _bounded_maps(student, images, [stage for _, stage in pairs], samples)
    teachers = _bounded_maps(teacher, images, [stage for stage, _ in pairs], samples)
    return [labels, *(x[: len(labels)] for pair in zip(students, teachers) for x in pair)]


def _layer_scores(layer: str, of_student: Tensor, of_teacher: Tensor, labels: Tensor) -> dict[str, float]:
    """CKA and information of one layer; {} if it is not finite."""
    if not (of_student.isfinite().all() and of_teacher.isfinite().all()):
        print(f"indistill: similarity: {layer} is not finite, and left out", flush=True)
        return {}
    return {
        f"cka_{layer}": linear_cka(of_student, of_teacher).item(),
        f"information_student_{layer}": information(of_student, labels).item(),
        f"information_teacher_{layer}": information(of_teacher, labels).item(),
    }


def _flow_divergence(scores: dict[str, float], layers: Sequence[str]) -> dict[str, float]:
    """The divergence of the two networks' information; {} unless all layers have scores."""
    if len(scores) < 3 * len(layers):
        return {}
    student, teacher = (
        torch.tensor([scores[f"information_{role}_{layer}"] for layer in layers], dtype=torch.float64)
        for role in ("student", "teacher")
    )
    return {"information_flow_divergence": information_flow_divergence(student, teacher).item()}


def _bounded_maps(network: Network, images: Tensor, stages: list[int], samples: int) -> list[Tensor]:
    """Maps [B, C, H, W] of the stages and embeddings [B, D], float32 in host memory, within _MAP_ENTRIES."""
    bounded = []
    for x in network.maps(images, stages) if stages else []:
        x = x.float()
        while samples * x[0].numel() > _MAP_ENTRIES and max(x.shape[2:]) > 1:
            x = F.avg_pool2d(x, 2, ceil_mode=True)
        bounded.append(x.cpu())
    return [*bounded, network(images).embedding.float().cpu()]


class _Spaced(ImageDataset):
    """At most `samples` of a set's images, for evaluation, evenly spaced: sets are often sorted by class."""

    def __init__(self, whole: ImageDataset, samples: int) -> None:
        vars(self).update(vars(whole.for_evaluation()))
        samples = min(samples, len(whole))
        self.positions = np.arange(samples) * len(whole) // samples

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, request: Request) -> Batch:
        return super().__getitem__(request._replace(ids=self.positions[request.ids]))
