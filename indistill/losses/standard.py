"""Standardise a teacher's features by the statistics of calibration batches."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from indistill.losses.common import at_least_float32

# A channel whose deviation is less than this, relative to that of all channels, does not vary: a factor would
# only enlarge rounding.
_LEAST_DEVIATION = 1e-6


class Standard(NamedTuple):
    """What brings features to a common scale: factor * (x - mean), or factor @ (x - mean), per position."""

    mean: Tensor  # [C]
    factor: Tensor  # [C], or [C, C]

    def __call__(self, x: Tensor) -> Tensor:
        """Standardise [B, C] or [B, C, H, W], in float32 at least."""
        with torch.autocast(x.device.type, enabled=False):
            x = at_least_float32(x).movedim(1, -1)  # [B, ..., C]
            centred = x - self.mean.to(x.dtype)
            factor = self.factor.to(x.dtype)
            standardised = centred * factor if factor.dim() == 1 else centred @ factor.T
            return standardised.movedim(-1, 1)


def channel(mean: Tensor, variance: Tensor) -> Standard:
    """Each channel to mean 0 and variance 1, from mean and variance [C]; one without variance stays at 0."""
    deviation = variance.clamp_min(0).sqrt()
    least = _LEAST_DEVIATION * variance.clamp_min(0).mean().sqrt()
    return Standard(mean, torch.where(deviation > least, 1 / deviation, 0.0))


def phi_s(mean: Tensor, covariance: Tensor) -> Standard:
    """PHI-S (arXiv 2410.01680): H U' (x - mean) / phi, from mean [C] and covariance [C, C] = U diag(v) U'.

    H is a Hadamard matrix, scaled to be orthogonal, and phi^2 the mean of v. Every channel of the result has
    variance 1, and distances between samples keep their proportions. Raises ValueError if no such H is known.
    """
    values, vectors = torch.linalg.eigh(covariance)
    # The sign of an eigenvector is arbitrary: that of its largest entry is made positive.
    signs = vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True)).sign()
    vectors = vectors * signs
    phi = values.clamp_min(0).mean().sqrt()
    rotation = hadamard(len(mean)).to(covariance) / math.sqrt(len(mean))
    return Standard(mean, rotation @ vectors.T / torch.where(phi > 0, phi, 1.0))


def hadamard(size: int) -> Tensor:
    """A matrix [size, size] of 1 and -1 with orthogonal rows, by Sylvester's and Paley's constructions.

    They cover the widths of common networks. Raises ValueError for another size.
    """
    if size in (1, 2):
        return torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)[:size, :size]
    if size % 4 == 0:
        if _is_prime(size - 1):
            return _paley(size - 1)
        if (size // 2 - 1) % 4 == 1 and _is_prime(size // 2 - 1):
            return _paley(size // 2 - 1)
        return torch.kron(hadamard(2), hadamard(size // 2))
    raise ValueError(f"no Hadamard matrix of size {size} is known here")


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, math.isqrt(number) + 1))


def _paley(prime: int) -> Tensor:
    """Paley's matrix of size prime + 1, or 2 (prime + 1) where the prime is 1 modulo 4."""
    squares = torch.zeros(prime, dtype=torch.float64) - 1
    squares[torch.arange(1, prime).square() % prime] = 1.0
    squares[0] = 0.0  # 1 for squares modulo the prime, -1 for other numbers
    places = torch.arange(prime)
    core = torch.zeros(prime + 1, prime + 1, dtype=torch.float64)
    core[1:, 1:] = squares[(places[:, None] - places[None, :]) % prime]
    core[0, 1:] = 1.0
    identity = torch.eye(prime + 1, dtype=torch.float64)
    if prime % 4 == 3:
        core[1:, 0] = -1.0
        return core + identity
    core[1:, 0] = 1.0
    first = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    second = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    return torch.kron(core, first) + torch.kron(identity, second)
