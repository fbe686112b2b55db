"""Every loss against its formula in float64 loops, its gradient, and the inputs that break naive versions."""

import math
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import EPS, move

from indistill import config, losses
from indistill.config import plugins
from indistill.config.from_yaml import load_yaml
from indistill.losses import Shape
from indistill.losses.crd_loss import Contrast
from indistill.models.outputs import Output, Targets

pytestmark = pytest.mark.portable

LABELS = torch.tensor([2, 0, 1, 1])  # of 4 samples and 3 classes


def dih(student, teacher, **options):
    """A cohort of two, of which the second is the teacher upside down."""
    return losses.dih(
        student, [teacher, teacher.flip(0)], LABELS[: len(student)] % student.shape[1], **options
    )


def dkd(student, teacher, **options):
    return losses.dkd(student, teacher, LABELS[: len(student)] % student.shape[1], **options)


# Each loss as a function of (student, teacher) of four samples, and the shapes it is given.
LOGITS = {
    "kd": losses.kd,
    "kd standardized": partial(losses.kd, standardize=True),
    "dist": partial(losses.dist, temperature=2.0),
    "dkd": dkd,
    "dih": dih,
    "token hard": losses.token,
    "token soft": partial(losses.token, mode="soft", temperature=3.0),
}
FEATURES = {
    **{
        f"pkt {kernel} {divergence}": partial(losses.pkt, kernel=kernel, divergence=divergence)
        for kernel in ("cosine", "student_t", "rbf", "combined")
        for divergence in ("kl", "jeffreys")
    },
    "sp": losses.sp,
    "rkd": losses.rkd,
}
MAPS = {"at": losses.at, "hint": losses.hint}
ALL = {**LOGITS, **FEATURES, **MAPS}
SHAPES = (
    dict.fromkeys(LOGITS, ((4, 3), (4, 3)))
    | dict.fromkeys(FEATURES, ((4, 3), (4, 5)))
    | {"at": ((4, 3, 2, 2), (4, 5, 2, 2)), "hint": ((4, 3, 2, 2), (4, 3, 2, 2))}
)


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def inputs(name, dtype=torch.float64):
    student, teacher = SHAPES[name]
    return random(*student, dtype=dtype), random(*teacher, seed=1, dtype=dtype)


def softmax(row):
    return np.exp(row) / np.exp(row).sum()


def kl(p, q):
    return sum(p[k] * math.log(p[k] / q[k]) for k in range(len(p)))


def numpy_kd(student, teacher, temperature):
    total = sum(kl(softmax(t / temperature), softmax(s / temperature)) for s, t in zip(student, teacher))
    return temperature**2 * total / len(student)


def distance(a, b):
    return math.sqrt(sum((x - y) ** 2 for x, y in zip(a, b)))


def numpy_pkt(student, teacher, kernel, divergence):
    def cosine(a, b, rows):
        norms = [math.sqrt(sum(v * v for v in x)) + 1e-6 for x in (a, b)]
        return (sum(x * y for x, y in zip(a, b)) / norms[0] / norms[1] + 1) / 2

    def smooth(a, b):
        return math.sqrt(distance(a, b) ** 2 + 1e-6)

    def student_t(a, b, rows):
        return 1 / (1 + smooth(a, b))

    def rbf(a, b, rows):
        return math.exp(-smooth(a, b) / np.mean([smooth(c, d) for c in rows for d in rows]))

    size, total = len(student), 0.0
    names = {"cosine": [cosine], "student_t": [student_t], "rbf": [rbf], "combined": [cosine, student_t]}
    for function in names[kernel]:
        p = np.array([[function(a, b, teacher) for b in teacher] for a in teacher])
        q = np.array([[function(a, b, student) for b in student] for a in student])
        for i in range(size):
            p_i, q_i = p[i] / p[i].sum(), q[i] / q[i].sum()
            total += kl(p_i, q_i) / size**2
            if divergence == "jeffreys":
                total += kl(q_i, p_i) / size**2
    return total


def numpy_dist(student, teacher, beta, gamma, temperature):
    s = np.array([softmax(row / temperature) for row in student])
    t = np.array([softmax(row / temperature) for row in teacher])
    inter = 1 - np.mean([np.corrcoef(s[i], t[i])[0, 1] for i in range(s.shape[0])])
    intra = 1 - np.mean([np.corrcoef(s[:, k], t[:, k])[0, 1] for k in range(s.shape[1])])
    return temperature**2 * (beta * inter + gamma * intra)


def numpy_dkd(student, teacher, labels, alpha, beta, temperature):
    total = 0.0
    for s, t, label in zip(student, teacher, labels):
        p, q = softmax(t / temperature), softmax(s / temperature)
        tckd = kl([p[label], 1 - p[label]], [q[label], 1 - q[label]])
        p, q = np.delete(p, label), np.delete(q, label)
        total += alpha * tckd + beta * kl(p / p.sum(), q / q.sum())
    return temperature**2 * total / len(student)


def unit(x):
    """As in the published code of sp and at: divided by its length, 1e-12 at least."""
    return x / max(math.sqrt((x**2).sum()), 1e-12)


def numpy_sp(student, teacher):
    total, size = 0.0, len(student)
    s, t = student.reshape(size, -1), teacher.reshape(size, -1)
    for i in range(size):
        s_row, t_row = [np.array([x[i] @ x[j] for j in range(size)]) for x in (s, t)]
        total += ((unit(s_row) - unit(t_row)) ** 2).sum()
    return total / size**2


def huber(difference):
    return difference**2 / 2 if abs(difference) < 1 else abs(difference) - 0.5


def numpy_rkd(student, teacher, distance_weight, angle_weight):
    size = len(student)
    samples = range(size)
    means = [
        sum(distance(x[i], x[j]) for i in samples for j in samples) / (size * (size - 1))
        for x in (student, teacher)
    ]
    total = 0.0
    for i in samples:
        for j in samples:
            s, t = (distance(x[i], x[j]) / mean for x, mean in zip((student, teacher), means))
            total += distance_weight * huber(s - t) / size**2

    def angle(x, i, j, k):
        if j in (i, k):
            return 0.0
        return (x[i] - x[j]) @ (x[k] - x[j]) / (distance(x[i], x[j]) * distance(x[k], x[j]))

    for i in samples:
        for j in samples:
            for k in samples:
                total += angle_weight * huber(angle(student, i, j, k) - angle(teacher, i, j, k)) / size**3
    return total


def numpy_at(student, teacher):
    total = 0.0
    for s, t in zip(student, teacher):
        s, t = ((x**2).mean(axis=0) for x in (s, t))  # [H, W]
        total += ((unit(s) - unit(t)) ** 2).sum()
    return total / student[:, 0].size


def test_kd_matches_the_formula():
    student, teacher = random(5, 7), random(5, 7, seed=1)
    for temperature in (1.0, 4.0, 5.0):
        expected = numpy_kd(student.numpy(), teacher.numpy(), temperature)
        assert losses.kd(student, teacher, temperature).item() == pytest.approx(expected, rel=1e-12)
        single = losses.kd(student.float(), teacher.float(), temperature).item()
        # A mean of differences of log-probabilities, each a few roundings off, of numbers below 4.
        assert single == pytest.approx(expected, rel=0, abs=temperature**2 * 4 * 4 * EPS)
    assert losses.kd(student, teacher) == losses.kd(student, teacher, 4.0)


def test_kd_by_hand():
    # teacher (3/4, 1/4), student (1/2, 1/2): KL = 3/4 ln(3/2) + 1/4 ln(1/2)
    teacher = torch.tensor([[math.log(3.0), 0.0]], dtype=torch.float64)
    student = torch.zeros(1, 2, dtype=torch.float64)
    assert losses.kd(student, teacher, 1.0).item() == pytest.approx(
        0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    )
    assert losses.kd(teacher, teacher).item() == 0


def test_standardized_kd_matches_the_formula():
    student, teacher = random(5, 7).numpy() * 3 + 1, random(5, 7, seed=1).numpy()
    s, t = ([(row - row.mean()) / row.std(ddof=1) for row in x] for x in (student, teacher))
    actual = losses.kd(torch.from_numpy(student), torch.from_numpy(teacher), 2.0, standardize=True)
    assert actual.item() == pytest.approx(numpy_kd(s, t, 2.0), rel=1e-12)


def test_standardized_kd_sees_neither_shift_nor_scale():
    student, teacher = random(4, 6), random(4, 6, seed=1)
    plain = losses.kd(student, teacher, standardize=True).item()
    changed = losses.kd(
        student * torch.tensor([[1.0], [2], [3], [0.5]]) - 7, teacher, standardize=True
    ).item()
    assert changed == pytest.approx(plain, rel=1e-9)
    assert losses.kd(teacher * 5 + 2, teacher, standardize=True).item() == pytest.approx(0, abs=1e-12)


def last_bits(formula, student, teacher):
    """How far a float64 formula moves with the last bits of its inputs in float32: the farthest of eight."""
    expected, found = formula(student.numpy(), teacher.numpy()), []
    for seed in range(8):
        moved = student.clone(), teacher.clone()
        move(moved, EPS, seed)
        found.append(abs(formula(*(x.numpy() for x in moved)) - expected))
    return max(found)


@pytest.mark.parametrize("kernel", ["cosine", "student_t", "rbf", "combined"])
@pytest.mark.parametrize("divergence", ["kl", "jeffreys"])
def test_pkt_matches_the_formula(kernel, divergence):
    student, teacher = random(6, 3), random(6, 5, seed=1) * 4 + 2
    expected = numpy_pkt(student.numpy(), teacher.numpy(), kernel, divergence)
    assert losses.pkt(student, teacher, kernel, divergence).item() == pytest.approx(expected, rel=1e-9)
    single = losses.pkt(student.float(), teacher.float(), kernel, divergence).item()
    formula = partial(numpy_pkt, kernel=kernel, divergence=divergence)
    assert single == pytest.approx(expected, rel=0, abs=8 * last_bits(formula, student, teacher))


def test_pkt_is_by_default_combined_under_jeffreys():
    student, teacher = random(6, 3), random(6, 5, seed=1)
    assert losses.pkt(student, teacher) == losses.pkt(student, teacher, "combined", "jeffreys")


def test_pkt_in_single_precision_is_close_far_from_the_origin():
    student, teacher = random(8, 4) * 0.1 + 50, random(8, 4, seed=1)
    student = student.float().double()  # the same numbers for both
    expected = numpy_pkt(student.numpy(), teacher.numpy(), "combined", "jeffreys")
    limit = 8 * last_bits(partial(numpy_pkt, kernel="combined", divergence="jeffreys"), student, teacher)
    assert losses.pkt(student.float(), teacher.float()).item() == pytest.approx(expected, rel=0, abs=limit)


def test_pkt_rbf_beside_an_outlier():
    # Its neighbours' probabilities are exp(-200) of its own: zero in float32, and log 0 is not finite.
    student = random(400, 2, dtype=torch.float32)
    student[0] = 1e6
    student.requires_grad_()
    for divergence in ("kl", "jeffreys"):
        loss = losses.pkt(student, random(400, 2, seed=1, dtype=torch.float32), "rbf", divergence)
        (gradient,) = torch.autograd.grad(loss, student)
        assert loss.isfinite()
        assert gradient.isfinite().all()


@pytest.mark.parametrize("kernel", ["student_t", "rbf", "combined"])
def test_pkt_in_single_precision_is_close_at_a_large_scale(kernel):
    """Squared distances are rounded by some eps, relatively, off the diagonal; they are exact on it."""
    student, teacher = 1e3 * random(32, 64), 1e3 * random(32, 64, seed=1)
    found = []
    for dtype in (torch.float64, torch.float32):
        x = student.to(dtype).requires_grad_()
        loss = losses.pkt(x, teacher.to(dtype), kernel)
        (gradient,) = torch.autograd.grad(loss, x)
        found.append((loss.double(), gradient.double()))
    (loss, gradient), (rounded_loss, rounded_gradient) = found
    limit = 2000 * torch.finfo(torch.float32).eps  # the sums have 32 and 64 terms
    assert abs(rounded_loss / loss - 1) < limit
    assert (rounded_gradient - gradient).norm() < limit * gradient.norm()


def test_pkt_refuses_unknown_names():
    features = random(4, 3)
    with pytest.raises(ValueError, match="kernel 'gauss'"):
        losses.pkt(features, features, kernel="gauss")
    with pytest.raises(ValueError, match="divergence 'js'"):
        losses.pkt(features, features, divergence="js")
    with pytest.raises(ValueError, match="scale 'sum'"):
        losses.pkt(features, features, scale="sum")


PKT_KINDS = [
    (kernel, divergence)
    for kernel in ("cosine", "student_t", "rbf", "combined")
    for divergence in ("kl", "jeffreys")
]


def weight_gradient(student, teacher, kernel, divergence, scale, seed=7):
    """Of pkt by the weights [6, 4] of a linear student of the inputs `student` [B, 6]."""
    weights = random(student.shape[1], 4, seed=seed).requires_grad_()
    (gradient,) = torch.autograd.grad(
        losses.pkt(student @ weights, teacher, kernel, divergence, scale), weights
    )
    return gradient


@pytest.mark.parametrize(("kernel", "divergence"), PKT_KINDS)
def test_pkt_scaled_by_the_batch_is_its_size_times_pkt(kernel, divergence):
    student, teacher = random(6, 3), random(6, 5, seed=1)
    expected = 6 * numpy_pkt(student.numpy(), teacher.numpy(), kernel, divergence)
    assert losses.pkt(student, teacher, kernel, divergence, "batch").item() == pytest.approx(
        expected, rel=1e-9
    )
    assert losses.pkt(student, teacher, kernel, divergence, "none") == losses.pkt(
        student, teacher, kernel, divergence
    )


@pytest.mark.parametrize(("kernel", "divergence"), PKT_KINDS)
def test_pkt_scaled_by_the_batch_is_the_same_on_a_batch_given_several_times(kernel, divergence):
    """Each sample k times: k times the neighbours, each with a share of 1 / k; no divergence changes."""
    student, teacher = random(12, 6), random(12, 5, seed=1)
    once = weight_gradient(student, teacher, kernel, divergence, "batch")
    for k in (2, 8):
        several = (student.repeat(k, 1), teacher.repeat(k, 1), kernel, divergence)
        assert (weight_gradient(*several, "batch") - once).norm() < 1e-6 * once.norm()
        assert (12 * k * weight_gradient(*several, "none") - once).norm() < 1e-6 * once.norm()


@pytest.mark.parametrize(("kernel", "divergence"), PKT_KINDS)
def test_gradients_of_pkt_scaled_by_the_batch_do_not_shrink_with_it(kernel, divergence):
    """Their mean along a fixed direction, over random batches of 64 samples and of 256: equal but for chance.

    Five standard errors, estimated from the batches, are that chance. Without the scale the second mean would
    be a quarter of the first, which is further off than that.
    """
    mixing = random(6, 5, seed=3)

    def projections(batch, repeats, first_seed, direction):
        found = []
        for i in range(repeats):
            student = random(batch, 6, seed=first_seed + i)
            gradient = weight_gradient(student, (student @ mixing).tanh(), kernel, divergence, "batch")
            found.append((gradient * direction).sum().item())
        return np.mean(found), np.std(found, ddof=1) / math.sqrt(repeats)

    student = random(512, 6, seed=99)
    direction = weight_gradient(student, (student @ mixing).tanh(), kernel, divergence, "batch")
    small, small_error = projections(64, 32, 1000, direction)
    large, large_error = projections(256, 8, 2000, direction)
    chance = 5 * math.hypot(small_error, large_error)
    assert chance < small * 3 / 4
    assert abs(large - small) < chance


def test_dist_matches_the_formula():
    student, teacher = random(5, 7), random(5, 7, seed=1) * 2
    for beta, gamma, temperature in ((1.0, 1.0, 1.0), (2.0, 0.0, 4.0), (0.0, 3.0, 2.0)):
        expected = numpy_dist(student.numpy(), teacher.numpy(), beta, gamma, temperature)
        assert losses.dist(student, teacher, beta, gamma, temperature).item() == pytest.approx(
            expected, rel=1e-9
        )
    assert losses.dist(student, teacher) == losses.dist(student, teacher, 1.0, 1.0, 1.0)


def test_dist_without_relations_is_one_each():
    # Equal probabilities have no correlation with anything: 1 - 0, over the classes and over the samples.
    assert losses.dist(torch.zeros(3, 4), random(3, 4)).item() == pytest.approx(2, rel=4 * EPS)


def test_dkd_matches_the_formula():
    student, teacher, labels = random(5, 7), random(5, 7, seed=1) * 2, torch.tensor([6, 0, 3, 3, 1])
    for alpha, beta, temperature in ((1.0, 8.0, 4.0), (2.0, 0.0, 1.0), (0.0, 0.5, 1.0)):
        expected = numpy_dkd(student.numpy(), teacher.numpy(), labels.numpy(), alpha, beta, temperature)
        actual = losses.dkd(student, teacher, labels, alpha, beta, temperature)
        assert actual.item() == pytest.approx(expected, rel=1e-12)
    assert losses.dkd(student, teacher, labels) == losses.dkd(student, teacher, labels, 1.0, 8.0, 4.0)


def test_dkd_with_the_weights_of_kd_is_kd():
    # 2203.08679, equation 6: KL = TCKD + (1 - teacher's probability of the target) * NCKD.
    student, teacher, label = random(1, 6), random(1, 6, seed=1), torch.tensor([4])
    beta = 1 - torch.softmax(teacher / 3, dim=1)[0, 4].item()
    expected = losses.kd(student, teacher, 3.0).item()
    assert losses.dkd(student, teacher, label, 1.0, beta, 3.0).item() == pytest.approx(expected, rel=1e-12)


def test_dkd_keeps_the_others_of_a_confident_teacher():
    # A target 3000 above the others: their proportions count all the same, to the last digit.
    teacher = torch.tensor([[3000.0, 0.25, 1.5, -1.0]])
    student = torch.tensor([[-3000.0, 1.0, 0.5, 0.0]])
    nckd = losses.dkd(student, teacher, torch.tensor([0]), alpha=0.0, beta=1.0, temperature=1.0)
    assert nckd.item() == pytest.approx(
        losses.kd(student[:, 1:], teacher[:, 1:], 1.0).item(), rel=0, abs=16 * EPS
    )


def test_dkd_refuses_mixed_labels():
    with pytest.raises(ValueError, match=r"dkd: labels \(4, 3\)"):
        losses.dkd(random(4, 3), random(4, 3), torch.full((4, 3), 1 / 3))


def test_dih_matches_the_formula():
    student, labels = random(4, 3), LABELS
    cohort = [random(4, 3, seed=seed) for seed in (1, 2, 3)]
    hard = -np.mean([math.log(softmax(row)[label]) for row, label in zip(student.numpy(), labels)])
    for alpha, temperature, weights in ((0.1, 5.0, None), (0.7, 2.0, [1.0, 0.5, 2.0])):
        expected = sum(
            weight * ((1 - alpha) * hard + alpha * numpy_kd(student.numpy(), member.numpy(), temperature))
            for weight, member in zip(weights or [1, 1, 1], cohort)
        )
        actual = losses.dih(student, cohort, labels, alpha, temperature, weights)
        assert actual.item() == pytest.approx(expected, rel=1e-12)
    assert losses.dih(student, cohort, labels) == losses.dih(student, cohort, labels, 0.1, 5.0)


def test_dih_takes_class_probabilities():
    student, cohort = random(4, 3), [random(4, 3, seed=1)]
    expected = losses.dih(student, cohort, LABELS)
    one_hot = torch.nn.functional.one_hot(LABELS, 3)
    assert losses.dih(student, cohort, one_hot.float()).item() == pytest.approx(expected.item(), rel=1e-12)
    mixed = 0.7 * one_hot + 0.3 * one_hot.flip(0)
    expected = 0.7 * expected + 0.3 * losses.dih(student, cohort, LABELS.flip(0))
    # `mixed` is float32.
    assert losses.dih(student, cohort, mixed).item() == pytest.approx(expected.item(), rel=2 * EPS)


def test_dih_refuses_what_does_not_fit():
    logits = random(4, 3)
    with pytest.raises(ValueError, match="0 cohort members"):
        losses.dih(logits, [], LABELS)
    with pytest.raises(ValueError, match="1 cohort members and 2 weights"):
        losses.dih(logits, [logits], LABELS, weights=[1.0, 1.0])
    with pytest.raises(ValueError, match=r"student \(4, 3\) and teacher \(4, 2\)"):
        losses.dih(logits, [logits, logits[:, :2]], LABELS)
    with pytest.raises(ValueError, match=r"labels \(3,\)"):
        losses.dih(logits, [logits], LABELS[:3])


def test_token_matches_the_formula():
    student, teacher = random(5, 7), random(5, 7, seed=1)
    hard = -np.mean([math.log(softmax(s)[t.argmax()]) for s, t in zip(student.numpy(), teacher.numpy())])
    assert losses.token(student, teacher).item() == pytest.approx(hard, rel=1e-12)
    assert losses.token(student, teacher, "hard", 9.0).item() == pytest.approx(hard, rel=1e-12)
    soft = numpy_kd(student.numpy(), teacher.numpy(), 3.0)
    assert losses.token(student, teacher, "soft", 3.0).item() == pytest.approx(soft, rel=1e-12)
    with pytest.raises(ValueError, match="mode 'both'"):
        losses.token(student, teacher, "both")


def masked_logits():
    """Student and teacher [4, 5]; the teacher masks a class that is never a label, and sample 2's label."""
    student, teacher = random(4, 5), random(4, 5, seed=1) * 2
    teacher[:, 4] = -math.inf
    teacher[2, LABELS[2]] = -math.inf
    return student, teacher


def masked_kl(p, q):
    """KL(p || q) of numbers, with 0 * log(0 / q) = 0 as is its limit."""
    return sum(a * math.log(a / b) for a, b in zip(p, q) if a > 0)


def masked_kd(student, teacher, temperature):
    pairs = [(softmax(t / temperature), softmax(s / temperature)) for s, t in zip(student, teacher)]
    return temperature**2 * np.mean([masked_kl(p, q) for p, q in pairs])


def masked_dkd(student, teacher, alpha, beta, temperature):
    total = 0.0
    for s, t, label in zip(student, teacher, LABELS):
        p, q = softmax(t / temperature), softmax(s / temperature)
        total += alpha * masked_kl([p[label], 1 - p[label]], [q[label], 1 - q[label]])
        p, q = np.delete(p, label), np.delete(q, label)
        total += beta * masked_kl(p / p.sum(), q / q.sum())
    return temperature**2 * total / len(student)


def masked_standardized(row):
    seen = row[np.isfinite(row)]
    return (row - seen.mean()) / seen.std(ddof=1)


def masked_dist(student, teacher):
    """beta = gamma = temperature = 1. What is masked in every sample has no correlation with anything: 0."""
    s, t = (np.array([softmax(row) for row in x]) for x in (student, teacher))

    def correlation(a, b):
        a, b = a - a.mean(), b - b.mean()
        return a @ b / (np.linalg.norm(a) * np.linalg.norm(b)) if a.any() and b.any() else 0.0

    inter, intra = ([correlation(a, b) for a, b in zip(x, y)] for x, y in ((s, t), (s.T, t.T)))
    return 2 - np.mean(inter) - np.mean(intra)


def masked_dih(student, teacher):
    hard = -np.mean([math.log(softmax(row)[label]) for row, label in zip(student, LABELS)])
    return 2 * 0.9 * hard + 0.1 * (masked_kd(student, teacher, 5.0) + masked_kd(student, teacher[::-1], 5.0))


# Loss, formula, and the weight of the logarithms in it.
MASKED = {
    "kd": (losses.kd, lambda s, t: masked_kd(s, t, 4.0), 16),
    "kd standardized": (
        partial(losses.kd, temperature=2.0, standardize=True),
        lambda s, t: masked_kd([masked_standardized(x) for x in s], [masked_standardized(x) for x in t], 2.0),
        4,
    ),
    "dist": (losses.dist, masked_dist, 2),
    "dkd": (
        lambda s, t: losses.dkd(s, t, LABELS, 1.0, 8.0, 4.0),
        lambda s, t: masked_dkd(s, t, 1.0, 8.0, 4.0),
        16 * (1 + 8),
    ),
    "dih": (lambda s, t: losses.dih(s, [t, t.flip(0)], LABELS), masked_dih, 2 * 0.9 + 2 * 0.1 * 25),
    "token soft": (partial(losses.token, mode="soft", temperature=3.0), lambda s, t: masked_kd(s, t, 3.0), 9),
    "token hard": (
        losses.token,
        lambda s, t: -np.mean([math.log(softmax(a)[b.argmax()]) for a, b in zip(s, t)]),
        1,
    ),
}


@pytest.mark.filterwarnings("ignore:invalid value encountered in subtract")
@pytest.mark.parametrize("student_too", [False, True])
@pytest.mark.parametrize("name", MASKED)
def test_a_class_that_the_teacher_masks_adds_nothing(name, student_too):
    loss, formula, weight = MASKED[name]
    student, teacher = masked_logits()
    if student_too:
        student[:, 4] = -math.inf
    expected = formula(student.numpy(), teacher.numpy())
    student.requires_grad_()
    value = loss(student, teacher)
    value.backward()
    assert value.item() == pytest.approx(expected, rel=1e-9)
    # The gradient by central differences of the formula.
    for index in np.ndindex(*student.shape):
        step = np.zeros(student.shape)
        step[index] = 1e-6
        moved = [formula(student.detach().numpy() + sign * step, teacher.numpy()) for sign in (1, -1)]
        assert student.grad[index].item() == pytest.approx((moved[0] - moved[1]) / 2e-6, rel=1e-5, abs=1e-8)
    single = student.detach().float().requires_grad_()
    learning_teacher = teacher.float().requires_grad_()
    value = loss(single, learning_teacher)
    value.backward()
    # Logarithms below 8, each a few roundings off.
    assert value.item() == pytest.approx(expected, rel=0, abs=weight * 8 * 4 * EPS)
    for gradient in (single.grad, learning_teacher.grad):
        assert gradient is None or gradient.isfinite().all()  # the hard token has none for the teacher


def test_dkd_of_a_teacher_that_leaves_only_the_target():
    student = random(2, 3)
    teacher = torch.tensor([[-math.inf, 1.0, -math.inf], [0.5, 1.0, 0.0]], dtype=torch.float64)
    labels = torch.tensor([1, 2])
    s, t = (softmax(x[1].numpy()) for x in (student, teacher))
    tckd = -math.log(softmax(student[0].numpy())[1]) + kl([t[2], 1 - t[2]], [s[2], 1 - s[2]])
    nckd = kl(t[:2] / t[:2].sum(), s[:2] / s[:2].sum())  # of the second sample; the first has no others
    student.requires_grad_()
    loss = losses.dkd(student, teacher.requires_grad_(), labels, 1.0, 8.0, 1.0)
    loss.backward()
    assert loss.item() == pytest.approx((tckd + 8 * nckd) / 2, rel=1e-12)
    assert student.grad.isfinite().all()
    assert teacher.grad.isfinite().all()


def test_kd_is_infinite_where_only_the_student_masks():
    student, teacher = random(4, 5), random(4, 5, seed=1)
    student[0, 2] = -math.inf
    assert losses.kd(student, teacher) == math.inf


def test_cross_entropy_with_probabilities_ignores_masked_classes_without_any():
    logits, labels = random(4, 5), torch.tensor([[0.25, 0.75, 0, 0, 0]]).expand(4, -1).double()
    logits[:, 3] = -math.inf
    expected = np.mean([-0.25 * math.log(p[0]) - 0.75 * math.log(p[1]) for p in map(softmax, logits.numpy())])
    logits.requires_grad_()
    loss = losses.cross_entropy(logits, labels)
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    assert torch.allclose(logits.grad, (logits.detach().softmax(dim=1) - labels) / 4)
    dih = losses.dih(
        logits, [random(4, 5, seed=1).masked_fill(logits == -math.inf, -math.inf)], labels, alpha=0.0
    )
    assert dih.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_is_that_of_torch(smoothing):
    logits, labels = random(4, 5), random(4, 5, seed=1).softmax(dim=1)
    for given in (labels, LABELS):
        expected = torch.nn.functional.cross_entropy(logits, given, label_smoothing=smoothing)
        assert losses.cross_entropy(logits, given, smoothing).item() == pytest.approx(
            expected.item(), rel=1e-12
        )


def test_sp_matches_the_formula():
    student, teacher = random(5, 3, 2, 2), random(5, 4, seed=1)
    expected = numpy_sp(student.numpy(), teacher.numpy())
    assert losses.sp(student, teacher).item() == pytest.approx(expected, rel=1e-12)


def test_rkd_matches_the_formula():
    student, teacher = (
        random(5, 3),
        random(5, 4, seed=1) ** 3,
    )  # the cube: distances beyond Huber's quadratic part too
    for weights in ((25.0, 50.0), (1.0, 0.0), (0.0, 1.0)):
        expected = numpy_rkd(student.numpy(), teacher.numpy(), *weights)
        assert losses.rkd(student, teacher, *weights).item() == pytest.approx(expected, rel=1e-9)
    assert losses.rkd(student, teacher) == losses.rkd(student, teacher, 25.0, 50.0)


def test_rkd_of_several_blocks_is_that_of_one():
    def angles(x):
        difference = x[None] - x[:, None]  # [B, B, D]
        unit = difference / (difference.norm(dim=2, keepdim=True) + torch.eye(len(x))[..., None])
        return torch.einsum("abd,acd->abc", unit, unit)

    student = random(264, 2).requires_grad_()  # 264^3 > 2^24: two blocks
    teacher = random(264, 3, seed=1)
    loss = losses.rkd(student, teacher, 0.0, 1.0)
    (gradient,) = torch.autograd.grad(loss, student)
    expected = torch.nn.functional.smooth_l1_loss(angles(student), angles(teacher))
    (expected_gradient,) = torch.autograd.grad(expected, student)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-10)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-7, atol=1e-12)


def test_at_matches_the_formula():
    student, teacher = random(3, 2, 4, 3), random(3, 5, 4, 3, seed=1)
    expected = numpy_at(student.numpy(), teacher.numpy())
    assert losses.at(student, teacher).item() == pytest.approx(expected, rel=1e-12)


def test_hint_matches_the_formula():
    student, teacher = random(2, 3, 4, 4), random(2, 3, 4, 4, seed=1)
    assert losses.hint(student, teacher).item() == pytest.approx(
        ((student - teacher).numpy() ** 2).mean(), rel=1e-12
    )
    half = losses.hint(student.half(), teacher.half())
    assert half.dtype == torch.float32
    exact = ((student.half().double() - teacher.half().double()) ** 2).mean().item()
    assert half.item() == pytest.approx(exact, rel=student.numel() * EPS)


@pytest.mark.parametrize("name", [name for name in FEATURES if name != "rkd"])
def test_maps_are_flattened(name):
    student, teacher = random(4, 3, 2, 2), random(4, 5, 2, 2, seed=1)
    student = student.contiguous(memory_format=torch.channels_last)
    assert ALL[name](student, teacher) == ALL[name](student.flatten(1), teacher.flatten(1))


@pytest.mark.parametrize("name", [name for name in ALL if name not in ("dih", "token hard")])
def test_zero_for_equal_inputs(name):
    _, teacher = inputs(name)
    assert ALL[name](teacher, teacher).item() == pytest.approx(0, abs=1e-12)


def rotation(size):
    return torch.linalg.qr(random(size, size, seed=2)).Q


def scaled_rows(x):
    return x * torch.tensor([0.5, 1, 2, 3], dtype=x.dtype).reshape(-1, *[1] * (x.ndim - 1))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        *[(name, lambda x: x @ rotation(x.shape[1])) for name in FEATURES],
        *[(name, lambda x: x + 7) for name in ("kd", "dkd", "dist", "rkd", "pkt student_t kl", "pkt rbf kl")],
        *[(name, lambda x: x * 7) for name in ("sp", "rkd", "pkt cosine kl", "kd standardized")],
        ("pkt cosine jeffreys", scaled_rows),
        ("at", scaled_rows),
        ("at", lambda x: x.flip(1)),
    ],
)
def test_invariances(name, change):
    student, teacher = inputs(name)
    expected = ALL[name](student, teacher).item()
    assert ALL[name](change(student), teacher).item() == pytest.approx(expected, rel=1e-5)
    assert expected > 1e-4  # not zero before and after


@pytest.mark.parametrize("name", [name for name in ALL if name not in ("dih", "dkd")])
def test_order_of_samples_does_not_count(name):
    student, teacher = inputs(name)
    order = torch.tensor([2, 0, 3, 1])
    expected = ALL[name](student, teacher).item()
    assert ALL[name](student[order], teacher[order]).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("name", ALL)
def test_gradients(name):
    student, teacher = (x.requires_grad_() for x in inputs(name))
    assert torch.autograd.gradcheck(ALL[name], (student, teacher))


@pytest.mark.parametrize("name", ALL)
def test_autocast_changes_nothing(name):
    loss = ALL[name]
    student, teacher = inputs(name, torch.float32)
    student.requires_grad_()
    plain = loss(student, teacher)
    (plain_gradient,) = torch.autograd.grad(plain, student)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = loss(student, teacher)
    (cast_gradient,) = torch.autograd.grad(cast, student)
    assert torch.equal(plain, cast)
    assert torch.equal(plain_gradient, cast_gradient)


def degenerate(case, shape):
    """float32 inputs at which a norm, a deviation, a distance or a logarithm vanishes."""
    x = random(*shape, dtype=torch.float32)
    match case:
        case "zero row":
            x[0] = 0
        case "all zero":
            x.zero_()
        case "constant":
            x.fill_(0.1)
        case "identical rows":
            x = x[:1].repeat(len(x), *[1] * (x.ndim - 1))
        case "two identical rows":
            x[1] = x[0]
        case "opposite rows":
            x = torch.stack([x[0], -x[0], x[0], -x[0]]) * 100
        case "one sample":
            x = x[:1]
        case "one class or channel":
            x = x[:, :1]
        case "large":
            x = x * 1e4
        case "tiny":
            x = x * 1e-4
    return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "case",
    [
        "zero row",
        "all zero",
        "constant",
        "identical rows",
        "two identical rows",
        "opposite rows",
        "one sample",
        "one class or channel",
        "large",
        "tiny",
    ],
)
@pytest.mark.parametrize("name", ALL)
def test_degenerate_inputs_and_their_gradients_are_finite(name, case, dtype):
    student = degenerate(case, SHAPES[name][0]).to(dtype)
    width = student.shape[1] if name in LOGITS or name == "hint" else SHAPES[name][1][1]
    teacher = random(len(student), width, *student.shape[2:], seed=1).to(dtype)
    for pair in ((student, teacher), (teacher, student), (student, student.clone())):
        learner = pair[0].clone().requires_grad_()
        loss = ALL[name](learner, pair[1])
        (gradient,) = torch.autograd.grad(loss, learner)
        assert loss.dtype == torch.float32
        assert loss.isfinite()
        assert gradient.isfinite().all()


@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e-5, 1e-6, 1e-7, 1e-10])
def test_the_gradient_of_at_is_the_published_one_and_below_its_bound(scale):
    student, teacher = (scale * random(3, 2, 4, 3)).requires_grad_(), random(3, 5, 4, 3, seed=1)

    def attention(x):
        x = x.square().mean(dim=1).flatten(1)
        return x / x.square().sum(dim=1, keepdim=True).sqrt().clamp_min(1e-12)

    expected = (attention(student) - attention(teacher)).square().mean()
    (expected_gradient,) = torch.autograd.grad(expected, student)
    (gradient,) = torch.autograd.grad(losses.at(student, teacher), student)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-9, atol=0)
    assert gradient.abs().max() <= 8e6 / (3 * 4 * 3)


@pytest.mark.parametrize("scale", [1e-8, 1e-12, 1e-20, 0.0])
def test_a_map_of_zero_in_a_batch_gets_an_ordinary_gradient(scale):
    """Of sp: its own row of the Gram matrix has no direction, and the rows of the others have one."""
    student, teacher = random(8, 6).float(), random(8, 5, seed=1).float()
    gradients = []
    for factor in (1.0, scale):
        x = student.clone()
        x[0] *= factor
        x.requires_grad_()
        gradients.append(torch.autograd.grad(losses.sp(x, teacher), x)[0].norm(dim=1))
    assert 0 < gradients[1][0] < 10 * gradients[0].max()


@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e-7, 1e-9, 1e-20, 0.0])
@pytest.mark.parametrize(("name", "formula"), [("sp", numpy_sp), ("at", numpy_at)])
def test_maps_near_zero_meet_the_published_floor(name, formula, scale):
    student, teacher = inputs(name)
    for s, t in ((scale * student, teacher), (student, scale * teacher)):
        expected = formula(s.numpy(), t.numpy())
        assert ALL[name](s, t).item() == pytest.approx(expected, rel=1e-12)
        limit = 8 * (last_bits(formula, s, t) + EPS * expected)
        assert ALL[name](s.float(), t.float()).item() == pytest.approx(expected, rel=0, abs=limit)


def crd(student, teacher):
    """Of the rows scaled to length one, as its projector does."""
    project = Contrast(Shape([], [], 3, 3), dim=3)
    for linear in (project.student, project.teacher):
        torch.nn.init.eye_(linear.weight)
        torch.nn.init.zeros_(linear.bias)
    return losses.crd(*project(Output((), student), Targets((), teacher)))


NEAR_ZERO = ALL | {
    "crd": crd,
    "vid": lambda student, teacher: losses.vid(student, torch.full((1, 3, 1, 1), 1e-5), teacher),
    "reviewkd": losses.reviewkd,
}
NEAR_ZERO_SHAPES = (
    SHAPES | {"crd": ((4, 3), (4, 3))} | dict.fromkeys(["vid", "reviewkd"], ((4, 3, 6, 6), (4, 3, 6, 6)))
)


def shrunk(student, teacher, scale):
    """(student, teacher) in which something is as small as `scale`."""
    yield scale * student, teacher
    yield student, scale * teacher
    yield scale * student, scale * teacher
    yield torch.cat([scale * student[:1], student[1:]]), teacher  # one sample
    yield student[:1] + scale * (student - student[:1]), teacher  # the differences between samples
    yield torch.cat([student[:1], student[:1] + scale * student[1:2], student[2:]]), teacher  # that of two
    yield 1 + scale * student, teacher
    yield scale * student.relu(), teacher.relu()


@pytest.mark.parametrize("name", NEAR_ZERO)
def test_the_gradient_of_inputs_near_zero_is_bounded(name):
    """A loss that does not see scale has a gradient of 1 / scale; floors of 1e-6 end that at a million."""
    student, teacher = NEAR_ZERO_SHAPES[name]
    student, teacher = random(*student, dtype=torch.float32), random(*teacher, seed=1, dtype=torch.float32)

    def largest(scale):
        """Value and gradient, the largest of all cases; nan if any is."""
        found = []
        for learner, taught in shrunk(student, teacher, scale):
            learner = learner.clone().requires_grad_()
            loss = NEAR_ZERO[name](learner, taught)
            (gradient,) = torch.autograd.grad(loss, learner)
            found.append(torch.stack([loss.detach(), gradient.abs().max()]))
        return torch.stack(found).amax(dim=0).tolist()

    value, gradient = largest(1.0)
    for exponent in (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 15, 19, 22, 30, 38, 45):
        found = largest(10.0**-exponent)
        # Ten times, for a sample may be that much shorter than the batch to begin with.
        assert found[0] <= 10 * value, exponent
        assert found[1] <= 10 * 1e6 * gradient, exponent


def test_the_documented_defaults_are_those_of_the_config():
    page = (Path(__file__).parents[2] / "docs" / "losses.md").read_text()
    table = page.partition("## Published settings")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| .+ \| `([^`]+)`[^`|]* \|$", table, re.MULTILINE)
    documented = {name: load_yaml("{" + defaults + "}") for name, defaults in rows}
    sections = config.KD(losses=[{"name": name} for name in plugins.built_in()]).losses
    assert documented == {section.name: section.model_dump(exclude={"name"}) for section in sections}


@pytest.mark.parametrize(
    ("loss", "student", "teacher"),
    [
        (losses.kd, (4, 10), (4, 1)),
        (losses.dist, (4, 10), (1, 10)),
        (partial(losses.dkd, labels=LABELS), (4, 10), (4, 1)),
        (losses.token, (4, 10), (4, 1)),
        (losses.pkt, (4, 3), (1, 3)),
        (losses.sp, (4, 3), (1, 3)),
        (losses.rkd, (4, 3), (1, 3)),
        (losses.at, (2, 3, 4, 4), (2, 3, 4, 1)),
        (losses.hint, (2, 3, 4, 4), (2, 1, 4, 4)),
    ],
)
def test_shapes_are_not_broadcast(loss, student, teacher):
    name = getattr(loss, "func", loss).__name__
    with pytest.raises(ValueError, match=rf"{name}: student \({student[0]}"):
        loss(torch.zeros(student), torch.zeros(teacher))
