"""Probabilistic knowledge transfer (Passalis, 1803.10837)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from indistill.config import Inputs, Loss
from indistill.losses.common import at_least_float32, require_equal, square_distances

Kernel = Literal["cosine", "student_t", "rbf", "combined"]
Divergence = Literal["kl", "jeffreys"]
Scale = Literal["none", "batch"]


class PKTLoss(Loss, name="pkt"):
    reads = frozenset({"embedding"})
    compares = 2
    kernel: Kernel = "combined"  # Similarity of two samples; `combined`: the sum of cosine and student_t.
    # Divergence of the student's similarities from the teacher's; `jeffreys`: kl in both directions.
    divergence: Divergence = "jeffreys"
    # `batch`: multiply by the number of compared samples, or else gradients shrink as that number grows.
    scale: Scale = "none"

    def __call__(self, student: Inputs, teacher: Inputs, labels: Tensor, epoch: int) -> Tensor:
        return pkt(student.embedding, teacher.embedding, self.kernel, self.divergence, self.scale)


def pkt(
    student: Tensor,
    teacher: Tensor,
    kernel: Kernel = "combined",
    divergence: Divergence = "jeffreys",
    scale: Scale = "none",
) -> Tensor:
    """Probabilistic knowledge transfer (Passalis, 1803.10837); by default in InDistill's form (2205.10003).

    student [B, ...], teacher [B, ...], flattened; returns a scalar. The widths may differ. A kernel
    gives the similarity of every two samples of a network's batch; each row is scaled to sum to one:
    - cosine: (cos + 1) / 2, the one of 1803.10837;
    - student_t: 1 / (1 + d) of the Euclidean distance d, of degree 1 (2005.00727);
    - rbf: exp(-d / s), where s is the batch's mean distance, the "adaptive_rbf" of 2005.00727's code.
      (There s gets no gradient; here it does, since the kernel does not depend on scale. A fixed s = 1, the
      plain "rbf" there, leaves wide features without neighbours.)
    - combined: cosine and student_t, the two losses summed (2005.00727).
    The two networks' similarities are compared by a divergence, averaged over the B*B entries: kl is
    KL(teacher || student) (1803.10837), jeffreys the sum of both directions (2005.00727).

    Each row is a distribution over B samples, and its divergence is a sum that does not grow with B. The
    published average over B*B entries therefore falls as 1 / B, and so does the gradient of the weights. At
    4,096 samples, a quarter of the gradients (half with the cosine kernel) can be below Adam's eps of 1e-8,
    where Adam's steps shrink too (docs/losses.md). scale: batch multiplies by B, which gives the mean over
    the samples, as in `kd`. B counts the samples given, which are those of all ranks if they were gathered.
    """
    require_equal("pkt", student.shape[:1], teacher.shape[:1])
    with torch.autocast(student.device.type, enabled=False):  # the kernels are products of matrices
        p, log_p = _conditional_probabilities(at_least_float32(teacher.flatten(1)), kernel)  # [kernels, B, B]
        q, log_q = _conditional_probabilities(at_least_float32(student.flatten(1)), kernel)  # [kernels, B, B]
        loss = _divergences(p, log_p, q=q, log_q=log_q, divergence=divergence).mean(dim=(1, 2)).sum()
    match scale:
        case "none":
            return loss
        case "batch":
            return len(student) * loss
    raise ValueError(f"losses.pkt: scale {scale!r} is neither 'none' nor 'batch'")


def _conditional_probabilities(x: Tensor, kernel: Kernel) -> tuple[Tensor, Tensor]:
    """Each kernel with every row normalised to sum to one, and its logarithm: [B, D] -> [kernels, B, B]."""
    match kernel:
        case "cosine":
            kernels = [_cosine_kernel(x)]
        case "student_t":
            kernels = [_student_t_kernel(x)]
        case "combined":
            kernels = [_cosine_kernel(x), _student_t_kernel(x)]
        case "rbf":
            distance = _distances(x)
            # In logarithms: beside an outlier the probabilities are too small for float32.
            log_p = F.log_softmax(-distance / distance.mean(), dim=1)[None]
            return log_p.exp(), log_p
        case _:
            raise ValueError(f"losses.pkt: kernel {kernel!r} is none of cosine, student_t, rbf, combined")
    stacked = torch.stack(kernels)
    p = stacked / stacked.sum(dim=2, keepdim=True)
    return p, p.log()


def _divergences(p: Tensor, log_p: Tensor, *, q: Tensor, log_q: Tensor, divergence: Divergence) -> Tensor:
    """The terms, [kernels, B, B], whose sum over a row is its divergence; p: teacher, q: student."""
    match divergence:
        case "kl":
            return p * (log_p - log_q)
        case "jeffreys":
            return (p - q) * (log_p - log_q)
    raise ValueError(f"losses.pkt: divergence {divergence!r} is neither 'kl' nor 'jeffreys'")


def _cosine_kernel(x: Tensor) -> Tensor:
    unit = x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + 1e-6)
    # Opposite vectors have kernel 0, or below it by rounding, and no logarithm.
    return ((unit @ unit.T + 1) / 2).clamp_min(torch.finfo(x.dtype).eps)


def _student_t_kernel(x: Tensor) -> Tensor:
    return 1 / (1 + _distances(x))


def _distances(x: Tensor) -> Tensor:
    """Euclidean distances as sqrt(d^2 + 1e-6): [B, D] -> [B, B]."""
    # The constant keeps the root's gradient finite where rows coincide, as they do on the diagonal.
    return (square_distances(x).clamp_min(0) + 1e-6).sqrt()
