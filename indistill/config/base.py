"""The base class of all config sections, `UserError`, text that is safe to show, and durations in steps."""

from __future__ import annotations

import contextlib
import difflib
import math
import os
import re
from collections.abc import Iterable
from fractions import Fraction
from functools import cache
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from indistill.config.limits import MAX_DURATION, MAX_INTEGER, MAX_LINE_CHARACTERS
from indistill.config.redact import redacted

# --- text from outside --------------------------------------------------------------------------------------
# Characters that move a cursor, change a terminal, reorder text or cannot be written: control characters,
# separators of lines, marks of the writing direction, and halves of a character.
_UNSAFE = "\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff"
_IN_LINE = re.compile(f"[{_UNSAFE}]")
_IN_TEXT = re.compile(rf"(?![\n\t])[{_UNSAFE}]")


def printable(text: str, *, lines: bool = False) -> str:
    """Return text from outside as it may be shown.

    URLs lose their secrets (redact.py), and characters that are not printable become escapes like `\\x1b`.
    lines: keep line breaks and tabs.
    """
    unsafe = _IN_TEXT if lines else _IN_LINE
    return unsafe.sub(lambda match: match[0].encode("unicode_escape").decode(), redacted(text))


class UserError(Exception):
    """A mistake that the user can mend: the command line prints it as one line and exits with code 2.

    As text it is one printable line, whatever names from outside its message quotes.
    """

    # By default the first rank of each node prints it, because files and packages may differ between nodes.
    found_by_one_rank = False  # True: any rank that raises it prints it
    on_all_ranks = False  # True: all ranks raise it together, and rank 0 alone prints it

    @classmethod
    def of_all_ranks(cls, message: str) -> UserError:
        """Return an error that all ranks raise together."""
        error = cls(message)
        error.on_all_ranks = True
        return error

    def __str__(self) -> str:
        return _one_line(super().__str__())


_OF_WORKER = "Original Traceback (most recent call last):"  # torch's second line for an error of a worker


def in_one_line(error: BaseException, limit: int | None = None, *, with_type: bool = False) -> str:
    """Return an error's message in one line of at most `limit` characters, without the secrets of URLs; the
    error's type if it has no message.

    with_type: begin with the type, as the last line of a traceback does. The message of an error in a
    loader's worker arrives as a traceback, whose last line counts here.
    """
    message = _one_line(str(error))
    if with_type or not message:
        message = f"{type(error).__name__}: {message}".removesuffix(": ")
    return message[:limit]


def _one_line(message: str) -> str:
    lines = message.strip().splitlines() or [""]
    if lines[0].startswith("Caught ") and lines[1:2] == [_OF_WORKER]:
        lines = lines[-1:]
    line = printable(" ".join(" ".join(lines).split()))
    line = line.removeprefix(f"{UserError.__module__}.{UserError.__qualname__}: ")
    if len(line) > MAX_LINE_CHARACTERS:
        line = f"{line[: MAX_LINE_CHARACTERS // 2]} ... {line[-MAX_LINE_CHARACTERS // 2 :]}"
    return line


def nearest(word: Any, words: Iterable[str], n: int = 1) -> list[str]:
    """The `n` words that are most like a word from outside, of which a long one is compared in part."""
    return difflib.get_close_matches(str(word)[:100], words, n=n, cutoff=0.0)


# --- durations ----------------------------------------------------------------------------------------------
_DURATION = re.compile(
    r"(\d{1,20}\.?\d{0,20}(?:e[+-]?\d{1,2})?|\.\d{1,20})\s*(epochs?|steps?|samples?|percent|%)?",
    re.IGNORECASE | re.ASCII,
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
    if amount > MAX_DURATION:
        raise ValueError(f"duration {duration!r} is more than {MAX_DURATION:,}: choose a shorter one")
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


def path_or_url(text: str) -> str:
    """Expand `~`. Raises ValueError for a command."""
    if text.startswith("pipe:"):
        raise ValueError(f"{text}: a folder cannot be a command: give a path or a URL")
    return os.path.expanduser(text)


Folder = Annotated[str, AfterValidator(path_or_url)]
"""A path or URL to which file names are appended; never a command."""

File = Annotated[str, AfterValidator(os.path.expanduser)]
"""The path of a file, or of a folder that is always local."""


def alternatives(annotation: Any) -> list[Any]:
    """The types that an annotation allows: the members of a union, else itself."""
    if get_origin(annotation) is Annotated:
        return alternatives(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [kind for one in get_args(annotation) for kind in alternatives(one)]
    return [annotation]


@cache
def _numeric_keys(section: type[BaseModel]) -> dict[str, set[Any]]:
    """The keys of numbers, lists of numbers and arguments of libraries, with the types that they allow."""

    def leaves(annotation: Any) -> set[Any]:
        kinds = alternatives(annotation)
        return {leaf for kind in kinds for one in get_args(kind) for leaf in leaves(one)} | set(kinds)

    fields = section.model_fields.items()
    kinds_by_key = {field.alias or name: leaves(field.annotation) for name, field in fields}
    return {
        key: kinds
        for key, kinds in kinds_by_key.items()
        if Any in kinds or (kinds & {int, float} and not kinds & {bool, str})
    }


def _not_finite(value: Any) -> bool:
    """Whether a value, a mapping or a list has a number that is infinite, or none."""
    if isinstance(value, dict | list):
        return any(map(_not_finite, value.values() if isinstance(value, dict) else value))
    return isinstance(value, float) and not math.isfinite(value)


def _problem(value: Any, kinds: set[Any]) -> str | None:
    """What is wrong with a number that pydantic would take, or that libraries answer with a traceback."""
    if Any in kinds:
        return "Input should have finite numbers only" if _not_finite(value) else None
    for one in value if isinstance(value, list) else [value]:
        if isinstance(one, bool):
            return f"Input should be a valid number, not {str(one).lower()}"
        with contextlib.suppress(TypeError, ValueError, OverflowError):  # pydantic reports what is no number
            if float not in kinds and abs(float(one)) > MAX_INTEGER:
                return f"Input should be within ±{MAX_INTEGER:,}"
    return None


class Section(BaseModel):
    """A section of a config: frozen; an unknown key is an error that names the nearest valid one."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_keys(cls, values: Any) -> Any:
        if isinstance(values, dict):
            valid = [field.alias or name for name, field in cls.model_fields.items()]
            for key in values:
                if key not in valid:
                    raise ValueError(
                        f"unknown key {key!r}; the nearest valid key is {nearest(key, valid)[0]!r}"
                    )
        return values

    @model_validator(mode="before")
    @classmethod
    def _check_numbers(cls, values: Any) -> Any:
        keys = _numeric_keys(cls)
        for key in keys.keys() & values.keys() if isinstance(values, dict) else ():
            if problem := _problem(values[key], keys[key]):
                details = InitErrorDetails(
                    type=PydanticCustomError("number", "{problem}", {"problem": problem}),
                    loc=(key,),
                    input=values[key],
                )
                raise ValidationError.from_exception_data(cls.__name__, [details])
        return values


class FromSection(Section):
    """A section with the key `from`, which is no name in Python."""

    @model_serializer(mode="wrap")
    def _with_keys_of_yaml(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name.rstrip("_"): value for name, value in serialize(self).items()}
