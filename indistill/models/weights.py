"""Compare tensors that were read from a file with those that they will replace, and rename them."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from indistill.config import UserError

_COUNTER = ".num_batches_tracked"  # of a batch norm, since torch 0.4.1; no forward pass reads it
_MOST_SHOWN = 3  # names in a message


def renamed(
    state: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> tuple[Mapping[str, Tensor], list[str]]:
    """Give the tensors the names of `expected`, where one way leads to all of them; return them, and what was
    done, as ends of "the file is loaded ...".

    Trainers save a network as a part of theirs: its names begin with the name of that part, such as `model.`
    in Lightning, or `backbone.` and `head.` in mmpretrain. State dicts of old versions of torch lack the
    counters of batch norms. A state dict that does not fit is returned as it is. Raises UserError if it holds
    several networks that fit.
    """
    anchor = next(name for name in expected if not name.endswith(_COUNTER))
    prefixes = [name.removesuffix(anchor) for name in state if f".{name}".endswith(f".{anchor}")]
    if "" in prefixes:  # a network, and not a part of a larger module
        prefixes = [""]
    origins = {prefix: _origins(state, expected, prefix) for prefix in prefixes}
    fitting = [prefix for prefix, names in origins.items() if _fits(state, expected, names, prefix)]
    if len(fitting) > 1:
        which = " and ".join(fitting)
        raise UserError(f"holds several networks that fit ({which}): save the state dict of one of them")
    if not fitting:
        return state, []
    names = origins[fitting[0]]
    counters = {name: tensor for name, tensor in expected.items() if name not in names}
    notes = []
    if counters:
        notes.append(f"without {_COUNTER.removeprefix('.')}, which it lacks and no network reads")
    if fitting[0]:
        cut = sorted({origin.removesuffix(name) for name, origin in names.items()})
        notes.append(f"with {' and '.join(cut)} removed from the names")
    if left_out := [name for name in state if name not in {*names.values()}]:
        more = ", ..." if len(left_out) > _MOST_SHOWN else ""
        notes.append(f"without {len(left_out)} other tensors ({', '.join(left_out[:_MOST_SHOWN])}{more})")
    return {name: state[origin] for name, origin in names.items()} | counters, notes


def _origins(state: Collection[str], expected: Collection[str], prefix: str) -> dict[str, str]:
    """Where each expected tensor is, if the network's names begin with `prefix`."""
    names = {name: prefix + name for name in expected}
    if prefix.endswith("backbone."):
        head = prefix.removesuffix("backbone.") + "head."
        names |= {name: head + name for name in expected if prefix + name not in state}
    return {name: origin for name, origin in names.items() if origin in state}


def _fits(
    state: Mapping[str, Tensor], expected: Mapping[str, Tensor], names: Mapping[str, str], prefix: str
) -> bool:
    """Whether `names` leads to all of `expected`, but for counters; without a prefix nothing may be over."""
    complete = all(name in names or name.endswith(_COUNTER) for name in expected)
    of_shape = all(state[origin].shape == expected[name].shape for name, origin in names.items())
    return complete and of_shape and (prefix != "" or len(names) == len(state))


def diverged(network: nn.Module) -> str | None:
    """The name of the first weight with NaN or infinity; None if none has. Buffers may hold infinity, as
    masks.
    """
    for name, parameter in network.named_parameters():
        if not parameter.isfinite().all():
            return name
    return next((name for name, buffer in network.named_buffers() if buffer.isnan().any()), None)


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
