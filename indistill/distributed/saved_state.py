"""Compares what a checkpoint contains with the live run, before anything of it is loaded.

`weights_only` keeps code out of a checkpoint, not tensors of another shape or type. The fused kernels of an
optimizer do not check these: they would read and write outside of the tensor.
"""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from indistill.config import UserError

# Shape and dtype of a tensor with dimensions; None for a number or a tensor without; a list for a list.
Kind = tuple[tuple[int, ...], torch.dtype] | list[Any] | None
Kinds = dict[str, Kind]  # by the names of a parameter's state


def check_optimizer(saved: Any, live: Optimizer) -> None:
    """Raise UserError unless the state_dict `saved` fits the optimizer, whose own state may be empty."""
    if not isinstance(saved, dict) or not isinstance(state := saved.get("state"), dict):
        raise UserError("the optimizer's state is not a state dict")
    groups = saved.get("param_groups")
    if not isinstance(groups, list) or len(groups) != len(live.param_groups):
        raise UserError(f"the optimizer's state has not the {len(live.param_groups)} groups of this run")
    kinds = state_kinds(live)
    for i, (group, own) in enumerate(zip(groups, live.param_groups)):
        check_group(f"group {i} of the optimizer", group, own)
        for index, parameter in zip(group["params"], own["params"]):
            if not isinstance(index, int):
                raise UserError(f"group {i} of the optimizer has {index!r} as a parameter")
            if index in state:
                where = f"the optimizer's state of parameter {index}"
                check_state(where, state[index], kinds[parameter], tuple(parameter.shape))


def check_group(what: str, saved: Any, live: Mapping[str, Any]) -> None:
    """Raise UserError unless the settings of a group of parameters are of the same kinds as the live ones."""
    if not isinstance(saved, dict) or not isinstance(saved.get("params"), list):
        raise UserError(f"{what} is not a group of parameters")
    if len(saved["params"]) != len(live["params"]):
        raise UserError(f"{what} has {len(saved['params'])} parameters, not {len(live['params'])}")
    for key, value in live.items():
        if key != "params" and key in saved and not _alike(saved[key], value):
            raise UserError(f"{what}: {key} is {saved[key]!r}, this run has {value!r}"[:300])


def check_state(what: str, saved: Any, kinds: Kinds, shape: tuple[int, ...]) -> None:
    """Raise UserError unless a parameter's state has the names, shapes and dtypes of `kinds`.

    A name that an optimizer adds in a later step may have the parameter's own shape, or none.
    """
    if not isinstance(saved, dict):
        raise UserError(f"{what} is not a mapping")
    if not saved:
        return
    for name in [*kinds, *saved]:
        if name not in saved:
            raise UserError(f"{what} lacks {name!r}")
        found = _kind(saved[name])
        if name in kinds and found != kinds[name]:
            raise UserError(f"{what}: {name} is {_text(saved[name])}, this run needs {_said(kinds[name])}")
        if name not in kinds and found is not None and not _is_floating(found, shape):
            raise UserError(f"{what} has an unexpected {name!r}, {_text(saved[name])}")


def check_scaler(saved: Any, live: Mapping[str, Any]) -> None:
    """Raise UserError unless the gradient scaler's state has the names and the numbers of the live one."""
    if not isinstance(saved, dict):
        raise UserError("the state of the gradient scaler is not a mapping")
    for name, value in live.items():
        own = saved.get(name)
        if isinstance(own, bool) != isinstance(value, bool) or not isinstance(own, int | float):
            raise UserError(f"the gradient scaler's {name} is {own!r}, not a number"[:300])


def state_kinds(
    optimizer: Optimizer, groups: Sequence[Sequence[Tensor]] | None = None
) -> dict[Tensor, Kinds]:
    """Return, for each parameter, what the optimizer's state of it contains after one step.

    A copy of the optimizer makes the step on zeros, with one parameter of each group and shape. `groups` are
    the parameters, by default the optimizer's own.
    """
    own = [group["params"] for group in optimizer.param_groups]
    examples: dict[tuple[int, tuple[int, ...], torch.dtype], Tensor] = {}
    of_parameter = {}
    for i, parameters in enumerate(own if groups is None else groups):
        for parameter in parameters:
            key = (i, tuple(parameter.shape), parameter.dtype)
            if key not in examples:
                examples[key] = torch.zeros_like(parameter, requires_grad=True)
            of_parameter[parameter] = examples[key]
    # What is not to be copied: large tensors, and hooks that belong to the live optimizer.
    memo: dict[int, Any] = {id(parameter): parameter for parameters in own for parameter in parameters}
    memo |= {id(optimizer.state): defaultdict(dict)}
    memo |= {id(optimizer._optimizer_step_pre_hooks): OrderedDict()}
    memo |= {id(optimizer._optimizer_step_post_hooks): OrderedDict()}
    trial = copy.deepcopy(optimizer, memo)
    for i, group in enumerate(trial.param_groups):
        group["params"] = [example for key, example in examples.items() if key[0] == i]
    for example in examples.values():
        example.grad = torch.zeros_like(example)
    type(trial).step(trial)  # of the class: Accelerate gives the object another one, for the live parameters
    return {
        parameter: {name: _kind(value) for name, value in trial.state[example].items()}
        for parameter, example in of_parameter.items()
    }


def _is_floating(kind: Kind, shape: tuple[int, ...]) -> bool:
    return isinstance(kind, tuple) and kind[0] == shape and kind[1].is_floating_point


def _kind(value: Any) -> Kind:
    if isinstance(value, Tensor):
        return (tuple(value.shape), value.dtype) if value.dim() else None
    if isinstance(value, list):
        return [_kind(item) for item in value]
    if value is None or isinstance(value, int | float | bool):
        return None
    raise UserError(f"a value is a {type(value).__name__}, neither a tensor nor a number")


def _text(value: Any) -> str:
    return _said(_kind(value))


def _said(kind: Kind) -> str:
    if isinstance(kind, tuple):
        return f"{list(kind[0])} {str(kind[1]).removeprefix('torch.')}"
    return "a number" if kind is None else f"a list of {len(kind)}"


def _alike(saved: Any, live: Any) -> bool:
    """Whether two settings of an optimizer are of the same kind."""
    if isinstance(live, list | tuple):
        return isinstance(saved, list | tuple) and len(saved) == len(live) and all(map(_alike, saved, live))
    if isinstance(live, str):
        return isinstance(saved, str)
    if isinstance(live, Tensor):
        return isinstance(saved, int | float) or (isinstance(saved, Tensor) and saved.shape == live.shape)
    if live is None or isinstance(live, int | float):
        return saved is None or isinstance(saved, int | float)
    return True
