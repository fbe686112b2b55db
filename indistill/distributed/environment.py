"""Refuses variables of Accelerate and torch.compile that contradict the config.

`accelerate launch` sets them from its options and from the file of `accelerate config`; another job may have
left them. Accelerate reads some of them in addition to its arguments, and ignores others. The launcher's own
defaults (precision and compilation "no", "auto") leave the choice to the config. deepspeed_config.py compares
the variables of DeepSpeed.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterator

from indistill.config import Config, UserError

_FALSE = ("n", "no", "f", "false", "off", "0")  # accelerate.utils.str_to_bool
_OTHER_ENGINES = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_MEGATRON_LM", "ACCELERATE_USE_PARALLELISM_CONFIG")
_ACCUMULATION = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"
# As `accelerate launch` sets them; other values would change the result of compile: true.
_COMPILE_DEFAULTS = {
    "ACCELERATE_DYNAMO_MODE": ("default",),
    "ACCELERATE_DYNAMO_USE_FULLGRAPH": _FALSE,
    "ACCELERATE_DYNAMO_USE_DYNAMIC": _FALSE,
    "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION": _FALSE,
}


def check(settings: Config) -> None:
    """Raise UserError for the first variable that contradicts the config."""
    for name, contradiction in contradictions(settings):
        value = os.environ[name]
        raise UserError(
            f"{name}={value} in the environment, but {contradiction}: unset {name}, or set both to the same "
            "value"
        )


def contradictions(settings: Config) -> Iterator[tuple[str, str]]:
    """Yield the name of each variable that contradicts the config, and the config's key and value."""
    for name, agreeing, setting in _expected(settings):
        if name in os.environ and os.environ[name].lower() not in agreeing:
            yield name, setting


@contextlib.contextmanager
def without_accumulation() -> Iterator[None]:
    """Hide the checked variable of gradient accumulation: Accelerate would convert `auto` to a number."""
    value = os.environ.pop(_ACCUMULATION, None)
    try:
        yield
    finally:
        if value is not None:
            os.environ[_ACCUMULATION] = value


def _expected(settings: Config) -> Iterator[tuple[str, Collection[str], str]]:
    """Yield each variable, its allowed values in lower case, and the key and value of the config."""
    engine = f"engine.name is {settings.engine.name}" if settings.engine else "engine.name is not set"
    for name in _OTHER_ENGINES:
        yield name, ("", *_FALSE), f"{engine} (ddp or deepspeed), and Accelerate would use another engine"
    precision = settings.mixed_precision
    yield "ACCELERATE_MIXED_PRECISION", ("no", precision), f"mixed_precision is {precision}"
    yield "ACCELERATE_FP8_BACKEND", ("no",), f"mixed_precision is {precision}"
    steps = settings.grad_accumulation
    norm = settings.clip_grad_norm
    yield _ACCUMULATION, ("none", "auto", str(steps)), f"grad_accumulation is {steps}"
    yield "ACCELERATE_GRADIENT_CLIPPING", ("none", "auto", *_same_number(norm)), f"clip_grad_norm is {norm}"
    compiled = f"compile is {str(settings.compile).lower()}"
    yield "ACCELERATE_DYNAMO_BACKEND", ("no", "inductor") if settings.compile else ("no",), compiled
    for name, agreeing in _COMPILE_DEFAULTS.items():
        yield name, agreeing, compiled
    if settings.compile:
        yield "TORCH_COMPILE_DISABLE", ("", *_FALSE), compiled
        yield "TORCHDYNAMO_DISABLE", ("", *_FALSE), compiled


def _same_number(norm: float | None) -> tuple[str, ...]:
    """Return the value of ACCELERATE_GRADIENT_CLIPPING if it equals this norm; 0 stands for None."""
    text = os.environ.get("ACCELERATE_GRADIENT_CLIPPING", "")
    with contextlib.suppress(ValueError):
        if float(text) == (norm or 0.0):
            return (text.lower(),)
    return ()
