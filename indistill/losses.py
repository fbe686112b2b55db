"""Distillation losses: pure functions of tensors, each a mean over the batch.

Every loss is computed in float32 at least, whatever the autocast state, and leaves gradients open to both arguments:
the caller decides what is frozen. Shapes are never broadcast; a mismatch raises ValueError.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def kd(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 4.0) -> Tensor:
    """T^2 * KL(teacher || student) of the softened class probabilities, batch mean (Hinton, 1503.02531, section 2).

    Both [B, K]; returns a scalar. The factor T^2 keeps the gradient's size independent of the temperature.
    """
    _require_equal("kd", student_logits.shape, teacher_logits.shape)
    log_student = F.log_softmax(_at_least_float32(student_logits) / temperature, dim=1)
    log_teacher = F.log_softmax(_at_least_float32(teacher_logits) / temperature, dim=1)
    return F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True) * temperature**2


def pkt(student: Tensor, teacher: Tensor) -> Tensor:
    """Probabilistic knowledge transfer (Passalis, 1803.10837) in the form of InDistill (2205.10003).

    student [B, D_s], teacher [B, D_t]; returns a scalar. Each network's batch is described by who is near whom, under a
    cosine and a Student-t kernel; the two descriptions are compared by Jeffreys divergence, averaged over the B*B
    entries of each kernel, and the kernels summed. The widths may differ.
    """
    _require_equal("pkt", student.shape[:1], teacher.shape[:1])
    with torch.autocast(student.device.type, enabled=False):  # the kernels are matmuls, which autocast would halve
        p = _conditional_probabilities(_at_least_float32(teacher))  # [2, B, B]
        q = _conditional_probabilities(_at_least_float32(student))  # [2, B, B]
        return ((p - q) * (p.log() - q.log())).mean(dim=(1, 2)).sum()


def hint(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error of two feature maps [B, C, H, W], the warm-up's loss (2205.10003); returns a scalar."""
    _require_equal("hint", student.shape, teacher.shape)
    return F.mse_loss(_at_least_float32(student), _at_least_float32(teacher))


def _conditional_probabilities(x: Tensor) -> Tensor:
    """[B, D] -> [2, B, B]: the cosine and the Student-t kernel, every row normalised to sum to one."""
    unit = x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + 1e-6)
    # Opposite vectors have kernel 0, or below it by rounding, and no logarithm.
    cosine = ((unit @ unit.T + 1) / 2).clamp_min(torch.finfo(x.dtype).eps)
    # Distances do not see a shift; without the mean, far less is lost in the difference of squares below.
    x = x - x.mean(dim=0)
    squares = x.square().sum(dim=1)  # [B]
    square_distance = squares[:, None] + squares[None, :] - 2 * x @ x.T
    # The constant keeps the root's gradient finite where rows coincide: on the diagonal, always.
    student_t = 1 / (1 + (square_distance.clamp_min(0) + 1e-6).sqrt())
    kernels = torch.stack([cosine, student_t])
    return kernels / kernels.sum(dim=2, keepdim=True)


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _require_equal(loss: str, student: torch.Size, teacher: torch.Size) -> None:
    if student != teacher:
        raise ValueError(f"losses.{loss}: student {tuple(student)} and teacher {tuple(teacher)} differ in shape")
