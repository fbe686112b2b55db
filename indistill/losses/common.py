"""Distillation losses: pure functions of tensors, each a mean over the batch.

Every loss is computed in float32 at least, whatever the autocast state, and leaves gradients open to both arguments:
the caller decides what is frozen. Shapes are never broadcast; a mismatch raises ValueError.
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Kernel = Literal["cosine", "student_t", "rbf", "combined"]
Divergence = Literal["kl", "jeffreys"]
Scale = Literal["none", "batch"]


def cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy with the labels, batch mean; returns a scalar.

    Logits [B, K]; labels int64 [B], or class probabilities [B, K]. label_smoothing: the share of a label that
    is spread evenly over all classes (Szegedy, 1512.00567, section 7). A class of probability 0 adds 0, even if
    its logit is -inf.
    """
    logits = _at_least_float32(logits)
    if not labels.is_floating_point():
        return F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
    probabilities = labels.to(logits.dtype) * (1 - label_smoothing) + label_smoothing / logits.shape[1]
    log_student = F.log_softmax(logits, dim=1).masked_fill(probabilities == 0, 0)
    return -(probabilities * log_student).sum(dim=1).mean()


def kd(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float = 4.0, standardize: bool = False
) -> Tensor:
    """T^2 * KL(teacher || student) of the softened class probabilities, batch mean (Hinton, 1503.02531, section 2).

    Both [B, K]; returns a scalar. The factor T^2 keeps the gradient's size independent of the temperature.
    A class that the teacher masks, with a logit of -inf, adds 0, even if the student masks it too.

    standardize: each sample's logits are first shifted to mean 0 and scaled to deviation 1 over the classes (logit
    standardisation, Sun, 2403.01427), so that only their proportions are learned. As in its published code the
    deviation is the sample's (K - 1), and its authors use temperature 2 and weight 9 with it. Masked classes
    stay masked and do not count in mean and deviation.
    """
    _require_equal("kd", student_logits.shape, teacher_logits.shape)
    student_logits, teacher_logits = _at_least_float32(student_logits), _at_least_float32(teacher_logits)
    if standardize:
        student_logits, teacher_logits = _standardize(student_logits), _standardize(teacher_logits)
    log_student = F.log_softmax(student_logits / temperature, dim=1)
    log_teacher = F.log_softmax(teacher_logits / temperature, dim=1)
    return _kl(log_student, log_teacher) * temperature**2


def dist(
    student_logits: Tensor,
    teacher_logits: Tensor,
    beta: float = 1.0,
    gamma: float = 1.0,
    temperature: float = 1.0,
) -> Tensor:
    """DIST: relations between and within classes (Huang, 2205.10536).

    Both [B, K]; returns T^2 * (beta * inter + gamma * intra), of the softened probabilities: inter is 1 - Pearson's
    correlation of student and teacher over the classes, mean over the samples; intra the same over the samples, mean
    over the classes. A class or sample of equal probabilities has correlation 0. The defaults are those of the
    published code, which gives the loss weight 2 on ImageNet.
    """
    _require_equal("dist", student_logits.shape, teacher_logits.shape)
    student = F.softmax(_at_least_float32(student_logits) / temperature, dim=1)
    teacher = F.softmax(_at_least_float32(teacher_logits) / temperature, dim=1)
    inter = 1 - _correlation(student, teacher).mean()
    intra = 1 - _correlation(student.T, teacher.T).mean()
    return temperature**2 * (beta * inter + gamma * intra)


def dkd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
) -> Tensor:
    """Decoupled knowledge distillation (Zhao, 2203.08679, equation 7): T^2 * (alpha * TCKD + beta * NCKD), batch mean.

    Logits [B, K], labels int64 [B]; returns a scalar. TCKD is KL(teacher || student) of (target class, all others),
    NCKD that of the other classes among themselves. The published runs take beta 0.5 (ResNet-18) or 2 (MobileNet-V1)
    and T 1 on ImageNet; on CIFAR-100 mostly beta 8 and T 4, with a warm-up of the loss's weight. Masked
    classes add 0, as in `kd`; where the teacher masks all classes but the target, NCKD is 0.
    """
    _require_equal("dkd", student_logits.shape, teacher_logits.shape)
    batch, classes = student_logits.shape
    if labels.shape != (batch,):
        raise ValueError(
            f"losses.dkd: labels {tuple(labels.shape)} are not one class for each of {batch} samples"
        )
    if classes == 1:  # nothing but the target: zero, as is kd
        return kd(student_logits, teacher_logits, temperature)
    # The classes but the target, gathered: a mask would need a size from the device, or a large number to subtract.
    others = torch.arange(classes - 1, device=labels.device).expand(batch, -1)
    others = others + (others >= labels[:, None])  # [B, K - 1]

    def decouple(logits: Tensor) -> tuple[Tensor, Tensor]:
        logits = _at_least_float32(logits) / temperature
        target, rest = logits.gather(1, labels[:, None]), logits.gather(1, others)
        # A row of -inf has no softmax: computed of zeros, and -inf is put in afterwards.
        masked = (rest == -torch.inf).all(dim=1, keepdim=True)  # [B, 1]
        rest = rest.masked_fill(masked, 0)
        total = rest.logsumexp(dim=1, keepdim=True).masked_fill(masked, -torch.inf)
        binary = F.log_softmax(torch.cat([target, total], dim=1), dim=1)  # [B, 2]
        return binary, F.log_softmax(rest, dim=1).masked_fill(masked, -torch.inf)

    tckd, nckd = (_kl(s, t) for s, t in zip(decouple(student_logits), decouple(teacher_logits)))
    return temperature**2 * (alpha * tckd + beta * nckd)


def dih(
    student_logits: Tensor,
    cohort_logits: Sequence[Tensor],
    labels: Tensor,
    alpha: float = 0.1,
    temperature: float = 5.0,
    weights: Sequence[float] | None = None,
) -> Tensor:
    """Distillation by the teacher and its intermediate heads together (Asadian, 2103.00497).

    The sum over the cohort of weight * ((1 - alpha) * cross-entropy + alpha * T^2 * KL(member || student)): the labels
    count once for every member, as in the published code. All logits [B, K]; labels int64 [B], or class probabilities
    [B, K]; weights one per member, 1 by default. Returns a scalar.
    """
    for member in cohort_logits:
        _require_equal("dih", student_logits.shape, member.shape)
    weights = [1.0] * len(cohort_logits) if weights is None else weights
    if len(weights) != len(cohort_logits) or not weights:
        raise ValueError(f"losses.dih: {len(cohort_logits)} cohort members and {len(weights)} weights")
    if labels.shape not in (student_logits.shape, student_logits.shape[:1]):
        raise ValueError(
            f"losses.dih: labels {tuple(labels.shape)} do not fit logits {tuple(student_logits.shape)}"
        )
    logits = _at_least_float32(student_logits)
    hard = cross_entropy(logits, labels)
    soft = sum(weight * kd(logits, member, temperature) for weight, member in zip(weights, cohort_logits))
    return (1 - alpha) * sum(weights) * hard + alpha * soft


def token(
    token_logits: Tensor,
    teacher_logits: Tensor,
    mode: Literal["hard", "soft"] = "hard",
    temperature: float = 1.0,
) -> Tensor:
    """The loss of DeiT's distillation token (Touvron, 2012.12877, section 4): what its classifier learns.

    Both [B, K]; returns a scalar. hard: cross-entropy with the teacher's decision, the published choice, at weight 0.5
    beside the class token's 0.5. soft: T^2 * KL(teacher || token), batch mean, for which the paper names T = 3 at
    weight 0.1; its code defaults to T = 1, and divides by K too.
    """
    _require_equal("token", token_logits.shape, teacher_logits.shape)
    match mode:
        case "hard":
            return F.cross_entropy(_at_least_float32(token_logits), teacher_logits.argmax(dim=1))
        case "soft":
            return kd(token_logits, teacher_logits, temperature)
    raise ValueError(f"losses.token: mode {mode!r} is neither 'hard' nor 'soft'")


def pkt(
    student: Tensor,
    teacher: Tensor,
    kernel: Kernel = "combined",
    divergence: Divergence = "jeffreys",
    scale: Scale = "none",
) -> Tensor:
    """Probabilistic knowledge transfer (Passalis, 1803.10837); by default in the form of InDistill (2205.10003).

    student [B, ...], teacher [B, ...], flattened; returns a scalar. The widths may differ. Each network's batch is
    described by who is near whom under a kernel, each row normalised to sum to one:
    - cosine: (cos + 1) / 2, the one of 1803.10837;
    - student_t: 1 / (1 + d) of the Euclidean distance d, of degree 1 (2005.00727);
    - rbf: exp(-d / s), where s is the batch's mean distance, the "adaptive_rbf" of 2005.00727's code. (There s gets no
      gradient; here it does, since the kernel does not see scale. A fixed s = 1, the plain "rbf" there, leaves
      wide features without neighbours.)
    - combined: cosine and student_t, the two losses summed (2005.00727).
    The two descriptions are compared by a divergence, averaged over the B*B entries: kl is KL(teacher || student)
    (1803.10837), jeffreys the sum of both directions (2005.00727).

    Each row is a distribution over B samples, of which the divergence is a sum that does not depend on B. So that
    average, the published one, falls as 1 / B, and with it the gradient of the weights. At 4,096 samples a quarter
    of the gradients, or half under the cosine kernel, can be below 1e-8 (docs/losses.md), Adam's eps, under which
    Adam's steps shrink too. scale: batch multiplies by B: the mean over the samples of the divergence of their rows,
    as in `kd`. B counts the samples given, which are those of all ranks if they were gathered.
    """
    _require_equal("pkt", student.shape[:1], teacher.shape[:1])
    with torch.autocast(
        student.device.type, enabled=False
    ):  # the kernels are matmuls, which autocast would halve
        p, log_p = _conditional_probabilities(
            _at_least_float32(teacher.flatten(1)), kernel
        )  # [kernels, B, B]
        q, log_q = _conditional_probabilities(
            _at_least_float32(student.flatten(1)), kernel
        )  # [kernels, B, B]
        loss = _divergences(p, log_p, q, log_q, divergence).mean(dim=(1, 2)).sum()
    match scale:
        case "none":
            return loss
        case "batch":
            return len(student) * loss
    raise ValueError(f"losses.pkt: scale {scale!r} is neither 'none' nor 'batch'")


def sp(student: Tensor, teacher: Tensor) -> Tensor:
    """Similarity-preserving distillation (Tung, 1907.09682); on the last map alone its usual weight is 3000.

    student [B, ...], teacher [B, ...], flattened, of any widths; returns a scalar: the Gram matrices [B, B] of the two
    batches, every row scaled to length 1, their squared difference averaged over the B*B entries. As in the
    published code a row's length counts as 1e-12 at least. The row of a map that is about 1e-6 long or shorter gets
    no gradient: it would be a million times the usual one, or more.
    """
    _require_equal("sp", student.shape[:1], teacher.shape[:1])
    with torch.autocast(student.device.type, enabled=False):
        student, teacher = _at_least_float32(student.flatten(1)), _at_least_float32(teacher.flatten(1))
        return F.mse_loss(_unit_rows(student @ student.T), _unit_rows(teacher @ teacher.T))


def rkd(
    student: Tensor, teacher: Tensor, distance_weight: float = 25.0, angle_weight: float = 50.0
) -> Tensor:
    """Relational knowledge distillation (Park, 1904.05068, section 3.2); weights of its classification runs.

    student [B, D_s], teacher [B, D_t]; returns distance_weight * distance + angle_weight * angle, Huber losses
    (delta 1) averaged over all B^2 pairs and all B^3 triplets, as in the published code: those of a sample with itself
    are zero.
    Distances are relative to the batch's mean distance; the angle is the cosine that two samples make at a third.
    Samples closer to each other than 1e-6 have no angle, as their distance has no gradient.

    The angles take six products of B^3 * D multiplications a step, 3.3e12 for B = 1024 and D = 512, but little memory:
    blocks of anchors of some 2^24 numbers are recomputed in the backward pass.
    """
    _require_equal("rkd", student.shape[:1], teacher.shape[:1])
    with torch.autocast(student.device.type, enabled=False):
        student, teacher = _at_least_float32(student.flatten(1)), _at_least_float32(teacher.flatten(1))
        loss = distance_weight * F.smooth_l1_loss(_relative_distances(student), _relative_distances(teacher))
        if angle_weight:
            loss = loss + angle_weight * _angle_loss(student, teacher)
        return loss


def at(student: Tensor, teacher: Tensor) -> Tensor:
    """Activation-based attention transfer (Zagoruyko, 1612.03928, equation 2, p = 2, F_sum^2).

    student [B, C_s, H, W], teacher [B, C_t, H, W]; returns a scalar. A map's attention is its mean square over the
    channels, flattened and scaled to length 1; the squared difference is averaged over B*H*W. As in the published
    code that length counts as 1e-12 at least, which keeps the gradient of maps near zero below 8e6 / (B*H*W).
    With that mean its weight, the paper's beta, is 1000 (per pair, 1000 / (B*H*W) of the sum).
    """
    _require_equal("at", student[:, 0].shape, teacher[:, 0].shape)
    student, teacher = (
        _at_least_float32(x).square().mean(dim=1).flatten(1) for x in (student, teacher)
    )  # [B, H * W]
    return F.mse_loss(F.normalize(student, dim=1), F.normalize(teacher, dim=1))


def hint(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error of two feature maps [B, C, H, W], the warm-up's loss (2205.10003); returns a scalar."""
    _require_equal("hint", student.shape, teacher.shape)
    return F.mse_loss(_at_least_float32(student), _at_least_float32(teacher))


def _kl(log_q: Tensor, log_p: Tensor) -> Tensor:
    """KL(p || q) of log-probabilities [B, K], batch mean. Classes with p = 0 add 0, as in torch.special.xlogy."""
    p = log_p.exp()
    # Masked before the product, whose gradient would be 0 * inf. F.kl_div gives nan where both are -inf.
    terms = p * (log_p.masked_fill(p == 0, 0) - log_q.masked_fill(p == 0, 0))
    return terms.sum() / len(terms)


def _standardize(logits: Tensor) -> Tensor:
    """[B, K] -> [B, K], every row with mean 0 and sample deviation 1 over the classes that are not -inf."""
    masked = logits == -torch.inf
    count = (~masked).sum(dim=1, keepdim=True).to(logits.dtype)
    mean = logits.masked_fill(masked, 0).sum(dim=1, keepdim=True) / count
    centred = (logits - mean).masked_fill(masked, 0)
    deviation = torch.linalg.vector_norm(centred, dim=1, keepdim=True) / (count - 1).clamp_min(1).sqrt()
    # The published code adds 1e-7, under which a classifier that starts at zero has gradients of 1e7.
    return (centred / deviation.clamp_min(1e-3)).masked_fill(masked, -torch.inf)


def _correlation(x: Tensor, y: Tensor) -> Tensor:
    """[N, M], [N, M] -> [N]: Pearson's correlation of every row.

    The published code adds 1e-8 to the product of the lengths. A floor of 1e-4 for each has its effect, where both
    vanish, and bounds the gradient where one does: with a student whose logits start at zero.
    """
    x, y = x - x.mean(dim=1, keepdim=True), y - y.mean(dim=1, keepdim=True)
    x, y = (v / torch.linalg.vector_norm(v, dim=1, keepdim=True).clamp_min(1e-4) for v in (x, y))
    return (x * y).sum(dim=1)


def _unit_rows(gram: Tensor) -> Tensor:
    """[B, B] of products of samples -> [B, B]: F.normalize of the rows, without gradient for the shortest."""
    length = torch.linalg.vector_norm(gram, dim=1, keepdim=True)
    shortest = 1e-6 * gram.diagonal().sum().sqrt()  # that of a sample 1e-6 long, at most
    return F.normalize(torch.where(length > shortest, gram, gram.detach()), dim=1)


def _conditional_probabilities(x: Tensor, kernel: Kernel) -> tuple[Tensor, Tensor]:
    """[B, D] -> [kernels, B, B]: each kernel, every row normalised to sum to one; and the logarithm."""
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
    kernels = torch.stack(kernels)
    p = kernels / kernels.sum(dim=2, keepdim=True)
    return p, p.log()


def _divergences(p: Tensor, log_p: Tensor, q: Tensor, log_q: Tensor, divergence: Divergence) -> Tensor:
    """The terms, of the shape of all, whose sum over a row is its divergence: q the student, p the teacher."""
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
    """[B, D] -> [B, B], Euclidean, as sqrt(d^2 + 1e-6)."""
    # The constant keeps the root's gradient finite where rows coincide, as they do on the diagonal.
    return (_square_distances(x).clamp_min(0) + 1e-6).sqrt()


def _square_distances(x: Tensor) -> Tensor:
    """[B, D] -> [B, B]. Rounding may leave entries below zero; the diagonal is exactly zero."""
    # Distances do not see a shift; without the mean, far less is lost in the difference of squares below.
    x = x - x.mean(dim=0)
    squares = x.square().sum(dim=1)  # [B]
    distances = squares[:, None] + squares[None, :] - 2 * x @ x.T
    # What rounding leaves on the diagonal grows with the scale, and a kernel is steepest there.
    return distances.masked_fill(torch.eye(len(x), dtype=torch.bool, device=x.device), 0.0)


def _relative_distances(x: Tensor) -> Tensor:
    """[B, D] -> [B, B]: Euclidean distances over their mean off the diagonal (1904.05068, section 3.2.1)."""
    distance = _square_distances(x).clamp_min(1e-12).sqrt()  # where the floor holds, no gradient
    distance = distance * (1 - torch.eye(len(x), dtype=x.dtype, device=x.device))  # 1e-6 to 0 on the diagonal
    mean = distance.sum() / max(len(x) * (len(x) - 1), 1)
    return distance / mean.clamp_min(1e-6)  # reached by a single sample only


def _angle_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """[B, D_s], [B, D_t] -> scalar: Huber loss of all B^3 angles (1904.05068, section 3.2.2)."""
    batch = len(student)
    anchors = max(1, 2**24 // (batch * max(batch, student.shape[1], teacher.shape[1])))  # a block's
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
    """[B, D] -> [A, B, B]: the cosine of the angle that every two samples make at each anchor."""
    # The differences themselves, not the Gram matrix: it would lose all digits of samples close to an anchor.
    differences = x[None] - x[anchors, None]  # [A, B, D]
    length = torch.linalg.vector_norm(differences, dim=2, keepdim=True)
    # Divided by infinity, the shortest become 0 and have no gradient.
    directions = differences / torch.where(length > 1e-6, length, torch.inf)
    return directions @ directions.mT


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _require_equal(loss: str, student: torch.Size, teacher: torch.Size) -> None:
    if student != teacher:
        raise ValueError(
            f"losses.{loss}: student {tuple(student)} and teacher {tuple(teacher)} differ in shape"
        )


def vid(mean: Tensor, variance: Tensor, teacher: Tensor) -> Tensor:
    """Variational information distillation: -log q(teacher | student), Gaussian (Ahn, 1904.05835, section 2).

    mean [B, C, H, W], variance [1, C, 1, 1] and positive, teacher [B, C, H_t, W_t], pooled to the mean's size as in the
    authors' code; returns a scalar, the mean over elements, without the constant log(2 pi) / 2.
    """
    if mean.shape[2] > teacher.shape[2] or mean.shape[3] > teacher.shape[3]:
        raise ValueError(
            f"losses.vid: mean {tuple(mean.shape)} is larger than teacher {tuple(teacher.shape)}"
        )
    mean, variance = _at_least_float32(mean), _at_least_float32(variance)
    teacher = F.adaptive_avg_pool2d(_at_least_float32(teacher), mean.shape[2:])
    _require_equal("vid", mean.shape, teacher.shape)
    return ((mean - teacher).square() / variance + variance.log()).mean() / 2


def reviewkd(fused: Tensor, teacher: Tensor) -> Tensor:
    """Hierarchical context loss of one pair of maps [B, C, H, W] (Chen, 2104.09044, section 3); returns a scalar.

    Mean squared errors of the maps and of what they are pooled to, 4x4, 2x2 and 1x1 where that is smaller: each weighs
    half of the one before, and the weights are divided by their sum, as in the authors' code.
    """
    _require_equal("reviewkd", fused.shape, teacher.shape)
    fused, teacher = _at_least_float32(fused), _at_least_float32(teacher)
    errors = [F.mse_loss(fused, teacher)]
    for size in (4, 2, 1):
        if size < min(fused.shape[2:]):
            errors.append(
                F.mse_loss(F.adaptive_avg_pool2d(fused, size), F.adaptive_avg_pool2d(teacher, size))
            )
    weights = [0.5**i for i in range(len(errors))]
    return sum(weight * error for weight, error in zip(weights, errors)) / sum(weights)


def crd(student: Tensor, teacher: Tensor, temperature: float = 0.07, labels: Tensor | None = None) -> Tensor:
    """Contrastive representation distillation (Tian, 1910.10699, equation 18): is this pair one image, or two?

    student and teacher [B, D], rows of length one; returns a scalar. Each anchor's counterpart is to be told from N
    others by h = e^x / (e^x + N), x the inner product over the temperature: the mean over anchors of
    -log h(counterpart) - sum over the others of log(1 - h(other)), once with the teacher's rows as anchors, once with
    the student's. With labels, int64 [B], samples of the anchor's class are no negatives, as in the paper. Without any
    negative, h is 1.

    Two things differ from the paper. Its 16384 negatives come from a memory of all M training images; here they are the
    others of the batch: the loss sums fewer terms, and gradients flow to both sides of a pair. And its equation 19 is
    h = e^x / (e^x + N / M), but the authors' code divides e^x by Z first, M times the mean of e^x over the first batch.
    So M cancels and N is left, times that mean: 2.2 for random rows of 128 dimensions, 1 here. Without Z, N / M of a
    batch is so small that every pair counts as positive, and the loss falls to a minimum where all rows of the student
    are one vector, and all of the teacher its opposite.
    """
    _require_equal("crd", student.shape, teacher.shape)
    with torch.autocast(student.device.type, enabled=False):
        scores = _at_least_float32(teacher) @ _at_least_float32(student).T / temperature  # [B anchors, B]
    if labels is None:
        labels = torch.arange(len(scores), device=scores.device)
    if labels.shape != scores.shape[:1]:
        raise ValueError(
            f"losses.crd: labels {tuple(labels.shape)} of {len(scores)} samples: need one class for each"
        )
    negative = labels[:, None] != labels[None, :]  # [B, B]
    log_count = negative.sum(dim=1).to(scores.dtype).log()  # [B], -inf where there is none
    return _contrast(scores, negative, log_count) + _contrast(scores.T, negative, log_count)


def _contrast(scores: Tensor, negative: Tensor, log_count: Tensor) -> Tensor:
    """The binary cross-entropy of telling each row's diagonal entry from its negatives, summed; mean over rows."""
    own = -F.logsigmoid(scores.diagonal() - log_count)  # [B]
    others = -F.logsigmoid(log_count[:, None] - scores).masked_fill(~negative, 0)  # [B, B]
    return (own + others.sum(dim=1)).mean()
