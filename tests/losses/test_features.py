"""The loss `feature` and what standardises a teacher's features, against formulas in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from indistill import config, losses
from indistill.curriculum import Phase
from indistill.losses import Shape, standard
from indistill.losses.feature_loss import FeatureLoss
from indistill.losses.objective import Objective, create_layers
from indistill.losses.standard import Standard, hadamard
from indistill.models.outputs import Output, Targets
from indistill.targets import standards

pytestmark = pytest.mark.portable

KD = Phase("kd", 0, (), (), 0, None)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def loss(**keys: object) -> FeatureLoss:
    (one,) = config.KD(losses=[{"name": "feature", **keys}]).losses
    assert isinstance(one, FeatureLoss)
    return one


# --- distances ----------------------------------------------------------------------------------------------


def in_loops(student: np.ndarray, teacher: np.ndarray, distance: str) -> float:
    """The distance of [B, C, ...], one position after the other."""
    student, teacher = (np.moveaxis(x, 1, -1).reshape(-1, x.shape[1]) for x in (student, teacher))
    values = []
    for s, t in zip(student, teacher):
        if distance == "cosine":
            values.append(1 - (s @ t) / math.sqrt((s @ s) * (t @ t)))
        else:
            for d in np.abs(s - t):
                values.append(d * d if distance == "mse" else (d * d / 2 if d < 1 else d - 0.5))
    return sum(values) / len(values)


@pytest.mark.parametrize("distance", ["cosine", "smooth_l1", "mse"])
@pytest.mark.parametrize("shape", [(3, 5), (2, 5, 3, 4)])
def test_each_distance_matches_its_formula(distance, shape):
    student, teacher = 2 * random(*shape), random(*shape, seed=1)
    expected = in_loops(student.numpy(), teacher.numpy(), distance)
    assert losses.feature(student, teacher, distance).item() == pytest.approx(expected, rel=1e-12)
    half = losses.feature(student.bfloat16(), teacher.bfloat16(), distance)
    assert half.dtype == torch.float32


@pytest.mark.parametrize("finer", ["student", "teacher"])
def test_the_finer_grid_is_interpolated_to_the_coarser(finer):
    """From 8 x 6 to 4 x 3, a bilinear point lies amid four pixels: their mean."""
    fine, coarse = random(2, 3, 8, 6), random(2, 3, 4, 3, seed=1)
    means = fine.view(2, 3, 4, 2, 3, 2).mean(dim=(3, 5))
    pair = (fine, coarse) if finer == "student" else (coarse, fine)
    expected = ((means - coarse) ** 2).mean().item()
    assert losses.feature(*pair, "mse").item() == pytest.approx(expected, rel=1e-12)


def test_grids_that_cross_are_refused():
    with pytest.raises(ValueError, match="neither of the grids"):
        losses.feature(random(1, 2, 4, 8), random(1, 2, 8, 4), "mse")


# --- projectors ---------------------------------------------------------------------------------------------

SHAPE = Shape(
    student_widths=[3, 6],
    teacher_widths=[5, 4],
    student_dim=7,
    teacher_dim=9,
    student_token_width=8,
    teacher_token_width=2,
)


@pytest.mark.parametrize(
    ("on", "expected"),
    [("embedding", [(2, 9)]), ("maps", [(2, 5, 4, 4), (2, 4, 2, 2)]), ("tokens", [(2, 2, 3, 3)])],
)
def test_a_projector_leads_to_the_teachers_width(on, expected):
    output = Output(
        (random(2, 3, 4, 4).float(), random(2, 6, 2, 2).float()),
        random(2, 7).float(),
        tokens=random(2, 8, 3, 3).float(),
    )
    linear = loss(on=on).layers(SHAPE)
    assert [tuple(x.shape) for x in linear(output, Targets())] == expected
    mlp = loss(on=on, projector="mlp").layers(SHAPE)
    assert [tuple(x.shape) for x in mlp(output, Targets())] == expected
    assert any(isinstance(part, nn.GELU) for part in mlp.modules())
    assert loss(on=on).reads == {"maps": {"features"}}.get(on, {on})


# --- standards ----------------------------------------------------------------------------------------------


def computed(name: str, batches: list[torch.Tensor]) -> Standard:
    field, _, count = name.split(".")
    assert int(count) == len(batches)
    return standards.compute([name], lambda n: ({field: x} for x in batches[:n]), lambda sums: sums)[name]


def rows(batches: list[torch.Tensor]) -> np.ndarray:
    """[N, C]: all positions of all samples."""
    return np.concatenate([np.moveaxis(x.numpy(), 1, -1).reshape(-1, x.shape[1]) for x in batches])


def correlated(samples: int, channels: int, *grid: int, seed: int) -> torch.Tensor:
    mixing = random(channels, channels, seed=100) * torch.logspace(-1, 1, channels, dtype=torch.float64)
    x = random(samples, *grid, channels, seed=seed) @ mixing + 5
    return x.movedim(-1, 1)


@pytest.mark.parametrize("grid", [(), (3, 2)])
def test_channels_are_standardised_by_mean_and_deviation(grid):
    batches = [correlated(40, 6, *grid, seed=seed) for seed in range(3)]
    of_run = computed("tokens.channel.3", batches)
    values = rows(batches)
    mean = values.sum(axis=0) / len(values)
    deviation = np.sqrt(((values - mean) ** 2).sum(axis=0) / len(values))
    other = correlated(5, 6, *grid, seed=9)
    expected = (rows([other]) - mean) / deviation
    np.testing.assert_allclose(rows([of_run(other)]), expected, rtol=1e-9, atol=1e-9)


def test_a_channel_that_does_not_vary_stays_at_zero():
    batch = random(8, 3)
    batch[:, 1] = 4
    out = computed("embedding.channel.1", [batch])(batch)
    assert out[:, 1].abs().max() < 1e-6
    assert out.isfinite().all()
    assert computed("embedding.phi_s.1", [torch.ones(8, 4, dtype=torch.float64)]).factor.isfinite().all()


@pytest.mark.parametrize("channels", [4, 12, 28, 48])
def test_phi_s_matches_the_formula(channels):
    """phi^2 is the mean eigenvalue; y = H U' (x - mean) / phi, with orthogonal H of entries of equal size."""
    batches = [correlated(200, channels, 2, 2, seed=seed) for seed in range(2)]
    of_run = computed("tokens.phi_s.2", batches)
    values = rows(batches)
    mean = values.mean(axis=0)
    covariance = (values - mean).T @ (values - mean) / len(values)
    phi = math.sqrt(np.trace(covariance) / channels)
    factor = of_run.factor.numpy()
    np.testing.assert_allclose(of_run.mean.numpy(), mean, rtol=1e-12)
    np.testing.assert_allclose(factor @ factor.T * phi**2, np.eye(channels), atol=1e-9)
    # By the eigenvectors, of any sign, the factor is a Hadamard matrix.
    _, vectors = np.linalg.eigh(covariance)
    entries = np.abs(factor @ vectors) * phi * math.sqrt(channels)
    np.testing.assert_allclose(entries, np.ones((channels, channels)), atol=1e-6)
    out = rows([of_run(x) for x in batches])
    np.testing.assert_allclose(out.mean(axis=0), 0, atol=1e-9)
    np.testing.assert_allclose(out.var(axis=0), 1, atol=1e-9)


@pytest.mark.parametrize("size", [1, 2, 4, 12, 20, 24, 28, 36, 40, 76, 192, 320, 384, 768, 1152, 1280])
def test_hadamard_matrices_have_orthogonal_rows(size):
    matrix = hadamard(size)
    assert set(matrix.unique().tolist()) <= {-1.0, 1.0}
    assert torch.equal(matrix @ matrix.T, size * torch.eye(size, dtype=torch.float64))


@pytest.mark.parametrize("size", [3, 6, 92])
def test_a_size_without_a_known_hadamard_matrix(size):
    with pytest.raises(ValueError, match="no Hadamard matrix"):
        hadamard(size)


def test_the_objective_compares_with_standardised_targets():
    """Two terms read the same embedding, each on its own scale."""
    terms = [loss(distance="mse"), loss(distance="mse", standardise="channel", weight=0.5)]
    shape = Shape([], [], 4, 4)
    layers = create_layers([(term, shape) for term in terms])
    embedding = random(6, 4).float()
    target = correlated(6, 4, seed=3).float()
    of_second = standard.channel(random(4, seed=5), random(4, seed=6).square())
    targets = Targets((), target)
    output = Output((), embedding)
    output = output._replace(projected={i: part(output, targets) for i, part in layers.items()})
    objective = Objective(terms, 1, standards={1: [of_second]})
    total, parts = objective(output, targets, labels=torch.zeros(6, dtype=torch.int64), phase=KD, step=0)
    first = (output.projected["0"][0] - target).square().mean()
    scaled = (target.double() - of_second.mean) * of_second.factor
    second = (output.projected["1"][0].double() - scaled).square().mean()
    assert parts["feature"].item() == pytest.approx(first.item(), rel=1e-5)
    assert parts["feature_2"].item() == pytest.approx(second.item(), rel=1e-5)
    assert total.item() == pytest.approx(first.item() + second.item() / 2, rel=1e-5)
