"""The base class of all config sections, `UserError`, and durations in steps."""

from __future__ import annotations

import difflib
import math
import re
from fractions import Fraction
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from indistill.config.redact import redacted


class UserError(Exception):
    """A mistake that the user can mend: the command line prints it as one line and exits with code 2."""

    found_by_one_rank = False  # False: every rank raises it, and rank 0 alone prints it


def in_one_line(error: BaseException, limit: int | None = None, *, with_type: bool = False) -> str:
    """Return an error's message in one line of at most `limit` characters, without the secrets of URLs; the
    error's type if it has no message.

    with_type: begin with the type, as the last line of a traceback does. The message of an error in a
    loader's worker arrives as a traceback, whose last line counts here.
    """
    lines = str(error).strip().splitlines() or [""]
    if lines[0].startswith("Caught "):
        lines = lines[-1:]
    message = " ".join(" ".join(lines).split())
    message = message.removeprefix(f"{UserError.__module__}.{UserError.__qualname__}: ")
    if with_type or not message:
        message = f"{type(error).__name__}: {message}".removesuffix(": ")
    return redacted(message)[:limit]


_DURATION = re.compile(
    r"(\d+\.?\d*(?:e[+-]?\d+)?|\.\d+)\s*(epochs?|steps?|samples?|percent|%)?", re.IGNORECASE
)


def to_steps(
    duration: str | int | float, steps_per_epoch: int, global_batch: int, total_steps: int | None = None
) -> int:
    """Return a duration in optimizer steps, rounded to the nearest, halves up.

    Accepts "3 epochs", "1000 steps", "1e6 samples", "10 percent" or "10%" (of `total_steps`), each also with
    a fraction or in the singular; a bare number counts epochs. Raises ValueError, naming the text, for
    anything else.
    """
    match = _DURATION.fullmatch(str(duration).strip())
    if match is None:
        raise ValueError(
            f"duration {duration!r} is not understood; write a number of epochs, or a number and a unit: "
            "'3 epochs', '1000 steps', '1e6 samples', '10 percent', '10%'"
        )
    amount = Fraction(match[1])  # exact: 0.29 of 100 steps are 29, not 28.999...
    unit = (match[2] or "epoch").lower().removesuffix("s")
    if unit in ("percent", "%"):
        if total_steps is None:
            raise ValueError(
                f"duration {duration!r} is a share of the run, whose length is not known here: use epochs, "
                "steps or samples"
            )
        steps = amount * total_steps / 100
    else:
        steps_of = {
            "epoch": Fraction(steps_per_epoch),
            "step": Fraction(1),
            "sample": Fraction(1, global_batch),
        }
        steps = amount * steps_of[unit]
    return math.floor(steps + Fraction(1, 2))


def _duration(value: Any) -> Any:
    to_steps(value, steps_per_epoch=1, global_batch=1, total_steps=1)  # raises ValueError
    return value


def run_length(value: str | int | float) -> str | int | float:
    """Return the duration of a run unchanged. Raises ValueError for a share of the run, such as "10%"."""
    to_steps(value, steps_per_epoch=1, global_batch=1)
    return value


Duration = Annotated[str | int | float, BeforeValidator(_duration)]
"""`"3 epochs"`, `"500 steps"`, `"1e6 samples"`, `"10 percent"` of the run; a bare number counts epochs."""

Probability = Annotated[float, Field(ge=0, le=1)]


def _no_command(folder: str) -> str:
    if folder.startswith("pipe:"):
        raise ValueError(f"{folder}: a folder cannot be a command: give a path or a URL")
    return folder


Folder = Annotated[str, AfterValidator(_no_command)]
"""A path or URL to which file names are appended; never a command."""


class Section(BaseModel):
    """A section of a config: frozen; an unknown key is an error that names the nearest valid one."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_keys(cls, values: Any) -> Any:
        if isinstance(values, dict):
            for key in values:
                if key not in cls.model_fields:
                    nearest = difflib.get_close_matches(str(key), cls.model_fields, n=1, cutoff=0.0)
                    raise ValueError(f"unknown key {key!r}; the nearest valid key is {nearest[0]!r}")
        return values
