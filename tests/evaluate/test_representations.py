"""CKA and information flow against the papers' formulas as plain sums over pairs of samples, in float64."""

import numpy as np
import pytest
import torch

from indistill.evaluate import representations
from indistill.evaluate.representations import information, information_flow_divergence, linear_cka

pytestmark = pytest.mark.portable


def plain_cka(x, y):
    """1905.00414: HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)) of XX' and YY', centring matrix written out."""
    n = len(x)
    centring = np.eye(n) - np.ones((n, n)) / n
    k, gram = (centring @ z.reshape(n, -1) @ z.reshape(n, -1).T @ centring for z in (x, y))
    return np.trace(k @ gram) / np.sqrt(np.trace(k @ k) * np.trace(gram @ gram))


def plain_information(x, labels):
    """QMI of Torkkola (2003), V_in + V_all - 2 V_btw, sums over pairs of samples, kernel (cos + 1) / 2."""
    n = len(x)
    x = x.reshape(n, -1)
    kernel = [[((a @ b) / (np.linalg.norm(a) * np.linalg.norm(b)) + 1) / 2 for b in x] for a in x]
    v_in = v_btw = prior_squares = 0.0
    for label in set(labels.tolist()):
        members = [i for i in range(n) if labels[i] == label]
        v_in += sum(kernel[i][j] for i in members for j in members) / n**2
        v_btw += len(members) / n * sum(kernel[i][j] for i in members for j in range(n)) / n**2
        prior_squares += (len(members) / n) ** 2
    v_all = prior_squares * sum(kernel[i][j] for i in range(n) for j in range(n)) / n**2
    return v_in + v_all - 2 * v_btw


def features(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape) + 0.5)


SHAPES = [
    ((30, 4), (30, 7)),
    ((10, 40), (10, 3)),
    ((12, 6, 3, 3), (12, 4, 5, 5)),
    ((9, 9), (9, 9)),
    ((2, 1), (2, 3)),
]


@pytest.mark.parametrize(("x_shape", "y_shape"), SHAPES)
def test_cka_is_the_papers(x_shape, y_shape, monkeypatch):
    x, y = features(*x_shape), features(*y_shape, seed=1)
    assert linear_cka(x, y).item() == pytest.approx(plain_cka(x.numpy(), y.numpy()), abs=1e-12)
    monkeypatch.setattr(representations, "_SLICE_ENTRIES", 3 * len(x))  # three columns at a time
    assert linear_cka(x, y).item() == pytest.approx(plain_cka(x.numpy(), y.numpy()), abs=1e-12)


@pytest.mark.parametrize("width", [6, 60])  # both forms
def test_cka_ignores_rotation_and_scale_and_shift_alone(width):
    x, y = features(20, width), features(20, width, seed=1)
    rotation = torch.linalg.qr(features(width, width, seed=2)).Q
    expected = linear_cka(x, y).item()
    assert 0.01 < expected < 0.99
    for changed in (x @ rotation, 1e-30 * x, 1e30 * x, x + 7 * features(1, width, seed=3)):
        assert linear_cka(changed, y).item() == pytest.approx(expected, abs=1e-9)
        assert linear_cka(y, changed).item() == pytest.approx(expected, abs=1e-9)
        assert linear_cka(x, changed).item() == pytest.approx(1, abs=1e-9)
    stretched = x * torch.linspace(0.1, 3, width, dtype=x.dtype)  # no isotropic scaling
    assert linear_cka(x, stretched).item() < 0.999


@pytest.mark.parametrize("width", [3, 30])
def test_constant_features_are_like_nothing(width):
    constant = torch.full((10, width), 0.1, requires_grad=True)  # 0.1: its mean is rounded
    varied = features(10, width).requires_grad_()
    for pair in ((constant, varied), (varied, constant), (constant, constant)):
        value = linear_cka(*pair)
        assert value.item() == 0
        value.backward()
    assert constant.grad.isfinite().all()
    assert varied.grad.isfinite().all()


def test_cka_of_half_precision_is_that_of_its_values():
    x, y = features(8, 50).bfloat16(), features(8, 50, seed=1).half()
    assert linear_cka(x, y).dtype == torch.float64
    assert linear_cka(x, y).item() == pytest.approx(
        plain_cka(x.double().numpy(), y.double().numpy()), abs=1e-12
    )


@pytest.mark.parametrize("shape", [(12, 3), (12, 2, 3, 3)])
@pytest.mark.parametrize("classes", [1, 3, 12])
def test_information_is_the_sum_over_pairs(shape, classes, monkeypatch):
    x = features(*shape)
    labels = (
        torch.from_numpy(np.random.default_rng(4).integers(classes, size=len(x))) * 100 - 7
    )  # classes of any size
    expected = plain_information(x.numpy(), labels.numpy())
    assert information(x, labels).item() == pytest.approx(expected, abs=1e-12)
    monkeypatch.setattr(representations, "_SLICE_ENTRIES", len(x))  # one column at a time
    assert information(1e-3 * x, labels.int()).item() == pytest.approx(expected, abs=1e-12)


def test_information_of_separated_and_of_shuffled_classes():
    labels = torch.arange(200) % 5
    separated = torch.eye(5)[labels]
    assert information(separated, labels).item() == pytest.approx((1 - 1 / 5) / (2 * 5), abs=1e-12)
    halves = torch.arange(200) % 2
    opposite = torch.tensor([[1.0, 2.0], [-1.0, -2.0]])[halves]
    assert information(opposite, halves).item() == pytest.approx(1 / 4, abs=1e-12)
    noisy = separated + 0.3 * features(200, 5)
    shuffled = labels[torch.from_numpy(np.random.default_rng(5).permutation(200))]
    assert information(noisy, labels).item() > 20 * information(noisy, shuffled).item()
    assert information(torch.ones(200, 3), labels).item() == pytest.approx(0, abs=1e-12)
    assert information(torch.zeros(200, 3), labels).item() == 0


def test_the_divergence_matches_layers_by_information_and_the_last_with_the_last():
    student = torch.tensor([0.1, 0.5, 0.2], dtype=torch.float64)
    teacher = torch.tensor([0.4, 0.0, 0.15, 0.9], dtype=torch.float64)
    # 0.1 is nearest to 0.15, 0.5 to 0.4; the last, 0.2, meets 0.9 though 0.15 is nearer.
    assert information_flow_divergence(student, teacher).item() == pytest.approx(
        0.05**2 + 0.1**2 + 0.7**2, rel=1e-12
    )
    assert information_flow_divergence(student[:1], teacher).item() == pytest.approx(0.8**2, rel=1e-12)
    assert information_flow_divergence(teacher, teacher).item() == 0


def test_gradients():
    for width in (3, 9):
        x, y = features(6, width).requires_grad_(), features(6, 4, seed=1).requires_grad_()
        assert torch.autograd.gradcheck(linear_cka, (x, y))
        assert torch.autograd.gradcheck(lambda z: information(z, torch.tensor([0, 0, 1, 1, 2, 1])), (x,))
    vectors = features(3).requires_grad_(), features(4, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(information_flow_divergence, vectors)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: linear_cka(torch.ones(3, 2), torch.ones(4, 2)), "x has 3 rows, y 4"),
        (lambda: linear_cka(torch.ones(3), torch.ones(3, 1)), r"linear_cka: shape \(3,\)"),
        (lambda: linear_cka(torch.ones(0, 2), torch.ones(0, 2)), "N > 0"),
        (lambda: information(torch.ones(3, 2), torch.zeros(4)), r"labels \(4,\) for 3 rows"),
        (lambda: information(torch.ones(3), torch.zeros(3)), "information: shape"),
        (lambda: information_flow_divergence(torch.ones(2, 1), torch.ones(2)), "L_s"),
        (lambda: information_flow_divergence(torch.ones(0), torch.ones(2)), "L_s"),
    ],
)
def test_impossible_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
