"""Every loss against its formula in float64 loops, its gradient, and the inputs that break naive versions."""

import math

import numpy as np
import pytest
import torch

from indistill import losses


def numpy_kd(student, teacher, temperature):
    total = 0.0
    for s, t in zip(student, teacher):
        p = np.exp(t / temperature) / np.exp(t / temperature).sum()
        q = np.exp(s / temperature) / np.exp(s / temperature).sum()
        total += sum(p[k] * math.log(p[k] / q[k]) for k in range(len(p)))
    return temperature**2 * total / len(student)


def numpy_pkt(student, teacher):
    def cosine(a, b):
        norms = [math.sqrt(sum(v * v for v in x)) + 1e-6 for x in (a, b)]
        return (sum(x * y for x, y in zip(a, b)) / norms[0] / norms[1] + 1) / 2

    def student_t(a, b):
        return 1 / (1 + math.sqrt(sum((x - y) ** 2 for x, y in zip(a, b)) + 1e-6))

    size, total = len(student), 0.0
    for kernel in (cosine, student_t):
        p = np.array([[kernel(a, b) for b in teacher] for a in teacher])
        q = np.array([[kernel(a, b) for b in student] for a in student])
        for i in range(size):
            for j in range(size):
                p_ij, q_ij = p[i, j] / p[i].sum(), q[i, j] / q[i].sum()
                total += (p_ij - q_ij) * (math.log(p_ij) - math.log(q_ij)) / size**2
    return total


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def test_kd_matches_the_formula():
    student, teacher = random(5, 7), random(5, 7, seed=1)
    for temperature in (1.0, 4.0, 5.0):
        expected = numpy_kd(student.numpy(), teacher.numpy(), temperature)
        assert losses.kd(student, teacher, temperature).item() == pytest.approx(expected, rel=1e-12)
        single = losses.kd(student.float(), teacher.float(), temperature).item()
        assert single == pytest.approx(expected, rel=1e-5)
    assert losses.kd(student, teacher) == losses.kd(student, teacher, 4.0)


def test_kd_by_hand():
    # teacher (3/4, 1/4), student (1/2, 1/2): KL = 3/4 ln(3/2) + 1/4 ln(1/2)
    teacher = torch.tensor([[math.log(3.0), 0.0]], dtype=torch.float64)
    student = torch.zeros(1, 2, dtype=torch.float64)
    assert losses.kd(student, teacher, 1.0).item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert losses.kd(teacher, teacher).item() == 0


def test_kd_is_finite_for_extreme_logits():
    student = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    loss = losses.kd(student, -student.detach(), temperature=1.0)
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()


def test_pkt_matches_the_formula():
    student, teacher = random(6, 3), random(6, 5, seed=1) * 4 + 2
    expected = numpy_pkt(student.numpy(), teacher.numpy())
    assert losses.pkt(student, teacher).item() == pytest.approx(expected, rel=1e-9)
    assert losses.pkt(student.float(), teacher.float()).item() == pytest.approx(expected, rel=1e-3)


def test_pkt_in_single_precision_is_close_far_from_the_origin():
    student, teacher = random(8, 4) * 0.1 + 50, random(8, 4, seed=1)
    student = student.float().double()  # the same numbers for both
    expected = numpy_pkt(student.numpy(), teacher.numpy())
    assert losses.pkt(student.float(), teacher.float()).item() == pytest.approx(expected, rel=1e-3)


def test_pkt_is_zero_for_equal_geometry():
    features = random(6, 3)
    assert losses.pkt(features, features).item() == 0
    assert losses.pkt(features.flip(1), features).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", ["zero row", "all zero", "identical rows", "opposite rows", "one sample", "large"])
def test_pkt_and_its_gradient_are_finite(case, dtype):
    student = {
        "zero row": torch.cat([torch.zeros(1, 3), random(4, 3, dtype=torch.float32)]),
        "all zero": torch.zeros(5, 3),
        "identical rows": random(1, 3, dtype=torch.float32).repeat(5, 1),
        "opposite rows": torch.tensor([[100.0, 0, 0], [-100, 0, 0]]),
        "one sample": random(1, 3, dtype=torch.float32),
        "large": random(5, 3, dtype=torch.float32) * 1e4,
    }[case]
    student = student.to(dtype).requires_grad_()
    teacher = random(len(student), 4, seed=1, dtype=dtype)
    for loss in (losses.pkt(student, teacher), losses.pkt(teacher, student)):
        student.grad = None
        loss.backward()
        assert loss.dtype == torch.float32
        assert loss.isfinite()
        assert student.grad.isfinite().all()


def test_hint_matches_the_formula():
    student, teacher = random(2, 3, 4, 4), random(2, 3, 4, 4, seed=1)
    assert losses.hint(student, teacher).item() == pytest.approx(((student - teacher).numpy() ** 2).mean(), rel=1e-12)
    half = losses.hint(student.half(), teacher.half())
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(((student.half() - teacher.half()).float() ** 2).mean().item(), rel=1e-2)


@pytest.mark.parametrize("loss", [losses.kd, losses.pkt, losses.hint])
def test_gradients(loss):
    shape = (3, 2, 2, 2) if loss is losses.hint else (4, 3)
    student, teacher = random(*shape).requires_grad_(), random(*shape, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(loss, (student, teacher))


@pytest.mark.parametrize("loss", [losses.kd, losses.pkt, losses.hint])
def test_autocast_changes_nothing(loss):
    shape = (3, 2, 2, 2) if loss is losses.hint else (16, 8)
    student, teacher = random(*shape, dtype=torch.float32).requires_grad_(), random(*shape, seed=1, dtype=torch.float32)
    plain = loss(student, teacher)
    (plain_gradient,) = torch.autograd.grad(plain, student)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = loss(student, teacher)
    (cast_gradient,) = torch.autograd.grad(cast, student)
    assert torch.equal(plain, cast)
    assert torch.equal(plain_gradient, cast_gradient)


@pytest.mark.parametrize(
    ("loss", "student", "teacher"),
    [
        (losses.kd, (4, 10), (4, 1)),
        (losses.pkt, (4, 3), (1, 3)),
        (losses.hint, (2, 3, 4, 4), (2, 1, 4, 4)),
    ],
)
def test_shapes_are_not_broadcast(loss, student, teacher):
    with pytest.raises(ValueError, match=rf"{loss.__name__}: student \({student[0]}"):
        loss(torch.zeros(student), torch.zeros(teacher))
