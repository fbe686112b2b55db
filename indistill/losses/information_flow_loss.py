"""PKT on every pair of layers at once, with a weight that decays (Passalis, 2005.00727)."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor

from indistill.config import Inputs, Loss
from indistill.losses.common import sum_of
from indistill.losses.pkt_loss import Divergence, Kernel, Scale, pkt


class InformationFlowLoss(Loss, name="information_flow"):
    """PKT on the embedding with weight 1, and on every pair of `kd.pairs` with weight init * decay^epoch."""

    reads = frozenset({"embedding", "features"})
    compares = 2
    init: Annotated[float, Field(ge=0)] = 100.0  # Weight of each pair in the first epoch.
    decay: Annotated[float, Field(ge=0, le=1)] = 0.7  # Factor of that weight after every epoch.
    kernel: Kernel = "combined"  # Similarity of two samples; `combined`: the sum of cosine and student_t.
    # Divergence of the student's similarities from the teacher's; `jeffreys`: kl in both directions.
    divergence: Divergence = "jeffreys"
    # `batch`: multiply by the number of compared samples, or else gradients shrink as that number grows.
    scale: Scale = "none"

    def __call__(self, student: Inputs, teacher: Inputs, labels: Tensor, epoch: int) -> Tensor:
        weight = self.init * self.decay**epoch
        pairs = [(student.embedding, teacher.embedding, 1.0)]
        pairs += [(s, t, weight) for s, t in zip(student.features, teacher.features)]
        return sum_of(w * pkt(s, t, self.kernel, self.divergence, self.scale) for s, t, w in pairs)
