"""Similarity of two representations, and their information on the labels: pure functions of tensors.

A representation x is [N, ...], one row for each of N samples, flattened. Sums are float64; of a wide one, D >
N, only 2^24 values at a time are held in that precision. Gradients flow.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_SLICE_ENTRIES = 2**24  # 128 MiB in float64


def linear_cka(x: Tensor, y: Tensor) -> Tensor:
    """Linear centred kernel alignment of x [N, ...] and y [N, ...], a float64 scalar in [0, 1].

    Kornblith et al. (1905.00414), section 3: ||Y'X||^2 / (||X'X|| ||Y'Y||) for centred columns, Frobenius
    norms, which equals HSIC(XX', YY') normalised. Rotations and isotropic scaling of either change nothing.
    The N x N form is taken where a width exceeds N. Features without any variance are like nothing: 0. Raises
    ValueError for other shapes.

    This estimate is biased upwards where samples are few for the width: of white noise, 512 samples of 50,000
    and of 200,000 unrelated features come to 0.99. Compare figures of equal N and widths, such as a stage
    before and after.
    """
    x, y = _rows("linear_cka", x), _rows("linear_cka", y)
    if len(x) != len(y):
        raise ValueError(f"similarity.linear_cka: x has {len(x)} rows, y {len(y)}")
    if max(x.shape[1], y.shape[1]) > len(x):
        return (_unit(_gram(x)) * _unit(_gram(y))).sum().clamp(0, 1)
    x, y = _unit(_centred(x)), _unit(_centred(y))  # [N, D_x], [N, D_y]
    alignment = (y.T @ x).square().sum()
    return (alignment / _at_least_tiny((x.T @ x).norm() * (y.T @ y).norm())).clamp(0, 1)


def information(x: Tensor, labels: Tensor) -> Tensor:
    """Quadratic mutual information of x [N, ...] and labels int [N], a float64 scalar, at least 0.

    The entries of the information-flow vector of 2005.00727 are mutual information between a layer and the
    labels, for which its authors take QMI, V_in + V_all - 2 V_btw, under the cosine kernel K = (cos + 1) / 2
    of 1803.10837. With J_p of the N samples in class p, u = x / |x| and m the mean of u, all and by class,
    those three sums over pairs of samples come to

        1/2 sum_p (J_p / N)^2 |m_p - m|^2,

    which needs no N x N kernel. 0 for a layer that does not tell the classes apart; at most (1 - 1/P) / (2 P)
    for P equal classes of which none is opposite to another, as after a ReLU. The kernel and its scale are
    those of the authors' code (passalis/qsmi, passalis/pkth).
    """
    x = _rows("information", x)
    if labels.shape != (len(x),):
        raise ValueError(f"similarity.information: labels {tuple(labels.shape)} for {len(x)} rows")
    _, classes, sizes = labels.to(x.device).unique(return_inverse=True, return_counts=True)
    shares = sizes.double() / len(x)  # [P]
    norms = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float64)  # [N, 1]
    norms = norms.clamp_min(1e-12)  # a zero vector stays zero: its cosine with all is 0
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    for columns in _slices(x):
        unit = columns / norms  # [N, W]
        sums = torch.zeros(len(sizes), unit.shape[1], dtype=unit.dtype, device=unit.device).index_add(
            0, classes, unit
        )
        total = total + ((sums - shares[:, None] * unit.sum(dim=0)) / len(x)).square().sum()
    return total / 2


def information_flow_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Divergence of two information-flow vectors, [L_s] and [L_t], shallow to deep; a scalar, at least 0
    (2005.00727).

    D_F = sum_i (student_i - teacher_kappa(i))^2, where kappa takes the student's last layer to the teacher's
    last and any other to the teacher's layer of nearest information, so that the networks may differ in
    depth. As remembered from the paper's section 3; its text was not at hand.
    """
    if student.ndim != 1 or teacher.ndim != 1 or not len(student) or not len(teacher):
        shapes = tuple(student.shape), tuple(teacher.shape)
        raise ValueError(f"similarity.information_flow_divergence: shapes {shapes} are not [L_s], [L_t]")
    squares = (student[:, None] - teacher[None, :]).square()  # [L_s, L_t]
    return squares[:-1].min(dim=1).values.sum() + squares[-1, -1]


def _rows(function: str, x: Tensor) -> Tensor:
    if x.ndim < 2 or x.numel() == 0:
        raise ValueError(f"similarity.{function}: shape {tuple(x.shape)} is not [N, ...] with N > 0")
    return x.flatten(1)


def _gram(x: Tensor) -> Tensor:
    """[N, D] -> [N, N], the products of its centred rows."""
    gram = torch.zeros(len(x), len(x), dtype=torch.float64, device=x.device)
    for columns in _slices(x):
        centred = _centred(columns)
        gram = gram + centred @ centred.T
    return gram


def _slices(x: Tensor) -> Iterator[Tensor]:
    """The columns of x [N, D] in float64, as many at a time as memory allows."""
    return (columns.double() for columns in x.split(max(1, _SLICE_ENTRIES // len(x)), dim=1))


def _centred(x: Tensor) -> Tensor:
    # The first row goes before the mean: a constant column then becomes 0, not what rounding its mean leaves.
    x = x.double() - x[:1].double()
    return x - x.mean(dim=0)


def _unit(x: Tensor) -> Tensor:
    return x / _at_least_tiny(x.norm())


def _at_least_tiny(x: Tensor) -> Tensor:
    return x.clamp_min(torch.finfo(x.dtype).tiny)
