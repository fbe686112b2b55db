"""Relational knowledge distillation (Park, 1904.05068)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from indistill.config import Inputs, Loss
from indistill.losses.common import at_least_float32, require_equal, square_distances


class RKDLoss(Loss, name="rkd"):
    reads = frozenset({"embedding"})
    distance_weight: float = 25.0  # Weight of the distances between two samples.
    angle_weight: float = 50.0  # Weight of the angles between three samples.

    @property
    def compares(self) -> int:  # type: ignore[override]  # Loss never assigns it, so read-only is enough
        return 3 if self.angle_weight else 2

    def __call__(self, student: Inputs, teacher: Inputs, labels: Tensor, epoch: int) -> Tensor:
        return rkd(student.embedding, teacher.embedding, self.distance_weight, self.angle_weight)


def rkd(
    student: Tensor, teacher: Tensor, distance_weight: float = 25.0, angle_weight: float = 50.0
) -> Tensor:
    """Relational knowledge distillation (Park, 1904.05068, section 3.2).

    student [B, D_s], teacher [B, D_t]; returns distance_weight * distance + angle_weight * angle. Both are
    Huber losses (delta 1), averaged over all B^2 pairs and all B^3 triplets. As in the published code, these
    include a sample with itself, which adds zero. Distances are relative to the batch's mean distance; the
    angle is the cosine of the angle that two samples make at a third. Samples closer to each other than 1e-6
    have no angle, because their distance has no gradient. The default weights are those of the paper's
    classification runs.

    The angles take six products of B^3 * D multiplications per step, 3.3e12 for B = 1024 and D = 512. They
    need little memory, because blocks of anchors of some 2^24 elements are recomputed in the backward pass.
    """
    require_equal("rkd", student.shape[:1], teacher.shape[:1])
    with torch.autocast(student.device.type, enabled=False):
        student = at_least_float32(student.flatten(1))
        teacher = at_least_float32(teacher.flatten(1))
        loss = distance_weight * F.smooth_l1_loss(_relative_distances(student), _relative_distances(teacher))
        if angle_weight:
            loss = loss + angle_weight * _angle_loss(student, teacher)
        return loss


def _relative_distances(x: Tensor) -> Tensor:
    """Euclidean distances over their mean off the diagonal (1904.05068, section 3.2.1): [B, D] -> [B, B]."""
    distance = square_distances(x).clamp_min(1e-12).sqrt()  # where the bound holds, no gradient
    distance = distance * (1 - torch.eye(len(x), dtype=x.dtype, device=x.device))  # 1e-6 to 0 on the diagonal
    mean = distance.sum() / max(len(x) * (len(x) - 1), 1)
    return distance / mean.clamp_min(1e-6)  # reached by a single sample only


def _angle_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Huber loss of all B^3 angles (1904.05068, section 3.2.2): [B, D_s], [B, D_t] -> scalar."""
    batch = len(student)
    anchors = max(1, 2**24 // (batch * max(batch, student.shape[1], teacher.shape[1])))  # of a block
    total = student.new_zeros(())
    for start in range(0, batch, anchors):
        block = slice(start, start + anchors)
        total = total + checkpoint(
            _block_angle_loss, student, teacher, block, use_reentrant=False, preserve_rng_state=False
        )
    return total / batch**3


def _block_angle_loss(student: Tensor, teacher: Tensor, anchors: slice) -> Tensor:
    return F.smooth_l1_loss(_angles(student, anchors), _angles(teacher, anchors), reduction="sum")


def _angles(x: Tensor, anchors: slice) -> Tensor:
    """The cosine of the angle that every two samples make at each anchor: [B, D] -> [A, B, B]."""
    # The differences themselves, not the Gram matrix: it would lose all digits of samples close to an anchor.
    differences = x[None] - x[anchors, None]  # [A, B, D]
    length = torch.linalg.vector_norm(differences, dim=2, keepdim=True)
    # Divided by infinity, the shortest become 0 and have no gradient.
    directions = differences / torch.where(length > 1e-6, length, torch.inf)
    return directions @ directions.mT
