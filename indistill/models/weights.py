"""Compare tensors that were read from a file with those that they will replace."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def misfit(loaded: Mapping[str, object], expected: Mapping[str, Tensor]) -> str | None:
    """The first tensor by which `loaded` cannot replace `expected`, as the end of "the file ..."; None if
    all can.

    Names and shapes must be the same. Floats of another precision are converted, as `load_state_dict` does,
    but no other numbers become floats.
    """
    for key in [*expected, *loaded]:
        if key not in expected or key not in loaded:
            return f"{'lacks' if key in expected else 'has an unexpected'} {key}"
        ours, theirs = expected[key], loaded[key]
        if not isinstance(theirs, Tensor) or not _is_plain(theirs):
            return f"has no plain tensor {key}"
        if theirs.shape != ours.shape:
            return f"has {key} of shape {tuple(theirs.shape)}, not {tuple(ours.shape)}"
        if theirs.is_complex() or (ours.is_floating_point() and not theirs.is_floating_point()):
            return f"has {key} of type {theirs.dtype}, not {ours.dtype}"
    return None


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor has its numbers in memory, and each of them on its own."""
    return tensor.layout is torch.strided and not tensor.is_quantized and not tensor.is_meta
