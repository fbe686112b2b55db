"""The records in a run directory: one schema for each, through which every command reads them.

Types are strict, as in the JSON that was written: no text becomes a number. Keys that a schema does not have
are left out, so that a record of a later version can be read.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    RootModel,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from indistill.config.base import UserError
from indistill.config.files import json_lines, read_bytes, read_json
from indistill.config.limits import (
    MAX_CHANNELS,
    MAX_COUNT,
    MAX_METRIC,
    MAX_RECORD_BYTES,
    MAX_RECORD_LINES_BYTES,
    MAX_REPORTED_BYTES,
    MAX_SECONDS,
    MAX_STAGES,
    MAX_STATUS_BYTES,
)

CHECKPOINT_VERSION = 4  # of `state.json`
_OTHER_VERSION: Literal["other_version"] = "other_version"  # pydantic's type of this mistake


def _measured(value: float) -> float:
    if MAX_METRIC < abs(value) < float("inf"):
        raise ValueError(f"Input should be within ±{MAX_METRIC:.0e}, or not finite")
    return value


Count = Annotated[int, Field(ge=0, le=MAX_COUNT)]
Width = Annotated[int, Field(ge=1, le=MAX_CHANNELS)]  # of a layer, in channels
StageIndex = Annotated[int, Field(ge=0, lt=MAX_STAGES)]
Seconds = Annotated[float, Field(ge=0, le=MAX_SECONDS, allow_inf_nan=False)]
Rate = Annotated[float, Field(ge=0, le=MAX_METRIC, allow_inf_nan=False)]
Finite = Annotated[float, Field(ge=-MAX_METRIC, le=MAX_METRIC)]  # NaN and infinity are not within either
Metric = Annotated[float, AfterValidator(_measured)]  # NaN and infinity are possible results
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}\z")]


class Record(BaseModel):
    """Base of the schemas."""

    model_config = ConfigDict(strict=True, frozen=True)


# --- logs ---------------------------------------------------------------------------------------------------
class MetricsLine(Record):
    """A line of `metrics.jsonl`: of steps, with "loss", of an evaluation, or of a checkpoint."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Metric]  # terms of the loss, and scores

    step: Count
    epoch: Rate = 0.0
    phase: str = ""
    loss: Metric | None = None  # None: every step was skipped
    lr: Rate = 0.0
    images_per_second: Rate = 0.0
    data_wait_fraction: Rate = 0.0
    bad_samples: Count = 0
    skipped_steps: Count = 0
    checkpoint_stall_seconds: Seconds = 0.0


class HistoryLine(Record):
    """A line of `history.jsonl`: a start or an end of the run."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, str | int | None]  # facts about the process

    event: Literal["start", "end"]
    time: Seconds
    step: Count = 0
    how: str = ""
    reason: str = ""
    software: dict[str, str] = {}


# --- results ------------------------------------------------------------------------------------------------
class Summary(Record):
    """`summary.json` of a finished run."""

    step: Count
    world_size: Count = 1
    seconds: Seconds = 0.0
    phase_seconds: dict[str, Seconds] = {}
    images_per_second: Rate = 0.0
    metrics: dict[str, Metric]


class NetworkSize(Record):
    """Parameters and operations of a network, or why they are not known."""

    name: str = ""
    parameters: Count = 0
    flops: Count = 0
    unknown: str = ""


class Speed(Record):
    """Seconds of each network's forward pass, and what they were measured on; or why they are not known."""

    seconds: dict[str, Annotated[float, Field(gt=0, le=MAX_SECONDS)]] = {}
    rounds: Count = 0
    batch: Count = 0
    precision: str = ""
    device: str = ""
    threads: Count | None = None
    torch: str = ""
    unknown: str = ""

    @model_validator(mode="after")
    def _all_or_none(self) -> Speed:
        if "seconds" in self.model_fields_set:
            missing = {"rounds", "batch", "precision", "device", "torch"} - self.model_fields_set
            if missing:
                raise ValueError(f"{min(missing)} is missing")
        return self


class Networks(Record):
    """`networks.json`, what `indistill report` has counted and measured."""

    teacher: NetworkSize = NetworkSize()
    student: NetworkSize = NetworkSize()
    speed: Speed = Speed()


# --- the pruning plan ---------------------------------------------------------------------------------------
class PairRecord(Record):
    """A pair of a pruning plan; its keys are in the order of the file."""

    kept: list[Annotated[int, Field(ge=0, lt=MAX_CHANNELS)]] | None
    student_stage: StageIndex
    student_width: Width
    teacher_stage: StageIndex
    teacher_width: Width

    @model_validator(mode="after")
    def _fits(self) -> PairRecord:
        kept = self.kept
        if kept is not None:
            if sorted(set(kept)) != kept or not kept or kept[-1] >= self.teacher_width:
                raise ValueError(f"kept: not channels of a layer with {self.teacher_width}, in order")
            if len(kept) != self.student_width:
                raise ValueError(f"kept: {len(kept)} channels for a student's layer of {self.student_width}")
        return self


class PlanRecord(Record):
    """`prune_plan.json`, and the plan in the manifest of stored targets."""

    criterion: str
    mode: str
    pairs: Annotated[list[PairRecord], Field(max_length=MAX_STAGES)]
    hash: str
    importance: list[list[Metric] | None] = []  # plans of earlier versions have none

    @model_validator(mode="after")
    def _fits(self) -> PlanRecord:
        if self.importance and len(self.importance) != len(self.pairs):
            raise ValueError(f"importance: {len(self.importance)} lists for {len(self.pairs)} pairs")
        for pair, scores in zip(self.pairs, self.importance):
            if scores is not None and len(scores) != pair.teacher_width:
                raise ValueError(f"importance: {len(scores)} scores for {pair.teacher_width} channels")
        return self


# --- checkpoints --------------------------------------------------------------------------------------------
class LogState(Record):
    """The log's part of a checkpoint: sums over the steps since the last line, and what is counted."""

    sums: list[float] | float  # of each name, and the number of steps; a number if there was no step
    skipped_sums: list[float] | float
    in_a_row: Finite
    most_in_a_row: Finite
    names: list[str]
    phase_seconds: dict[str, Seconds]
    bad: list[str]
    skipped_steps: Count
    run_id: Annotated[str, Field(pattern=r"^[0-9a-f]{32}\z")] | None = None  # earlier versions have none

    @model_validator(mode="after")
    def _fits(self) -> LogState:
        for sums in (self.sums, self.skipped_sums):
            if isinstance(sums, list) and len(sums) != len(self.names) + 1:
                raise ValueError(f"{len(sums)} sums for {len(self.names)} names")
        return self


class PaceState(Record):
    """The curriculum's part of a checkpoint, for `warmup.curriculum: auto`; else it is empty."""

    durations: list[Count] = []
    means: list[float] = []
    sum: float = 0.0
    steps: Count = 0


class Parts(Record):
    log: LogState
    pace: PaceState


class State(Record):
    """`state.json` of a checkpoint."""

    format_version: int
    step: Count
    identity: dict[str, str]
    scores: dict[str, Metric] | None
    best_top1: Finite
    parts: Parts

    @field_validator("format_version")
    @classmethod
    def _same_version(cls, version: int) -> int:
        if version != CHECKPOINT_VERSION:
            text = f"format {version}, this version reads {CHECKPOINT_VERSION}"
            raise PydanticCustomError(_OTHER_VERSION, text)
        return version


class FileEntry(Record):
    bytes: Count
    sha256: Sha256


# Names of files in the folder itself: a path could lead to any file.
FileName = Annotated[str, Field(pattern=r"^\w[\w.-]*\z")]


class CheckpointManifest(RootModel[dict[FileName, FileEntry]]):
    """`manifest.json` of a checkpoint: size and hash of its other files, by name."""

    model_config = ConfigDict(strict=True, frozen=True)


class Inputs(RootModel[dict[str, Sha256]]):
    """`inputs.json` of a chain's stage: the hash of each file of weights, by its key in the config."""

    model_config = ConfigDict(strict=True, frozen=True)


# --- reading ------------------------------------------------------------------------------------------------
Schema = TypeVar("Schema", bound=BaseModel)


class OtherVersion(UserError):
    """A record is whole, and of another version of its format."""


def load(path: Path, schema: type[Schema], remedy: str) -> Schema:
    """Read a record. Raises UserError, with the remedy, for a file that cannot be read or does not fit."""
    try:
        content = read_bytes(path, MAX_RECORD_BYTES)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}): {remedy}") from None
    return parse(content, schema, str(path), remedy)


def parse(content: bytes, schema: type[Schema], source: str, remedy: str) -> Schema:
    """The record in the content of a file or URL, `source`. Raises like `load`."""
    try:
        return schema.model_validate(read_json(content))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        if first["type"] == _OTHER_VERSION:
            raise OtherVersion(f"{source}: {first['msg']}: {remedy}") from None
        reason = first_problem(error)
    except ValueError as error:
        reason = f"not valid JSON: {error}" if content.strip() else "empty"
    raise UserError(f"{source}: damaged or edited by hand ({reason}): {remedy}")


def first_problem(error: ValidationError) -> str:
    """The first problem that pydantic found, with the key that it is in."""
    first = error.errors(include_url=False, include_input=False)[0]
    key = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    key = key[:100] if key.isprintable() else ascii(key[:100])
    return f"{key}: {message}" if key else message


def lines(path: Path, schema: type[BaseModel], *, reported: bool = False) -> Iterator[dict[str, Any]]:
    """Yield the lines of a log that fit the schema; warn of others once all are read.

    Reads all of the file, or what is `reported`: its end. Raises UserError if the file cannot be read.
    """
    left_out = 0
    try:
        for content in json_lines(
            path, MAX_REPORTED_BYTES if reported else MAX_RECORD_LINES_BYTES, last=reported
        ):
            try:
                schema.model_validate(content)
            except ValidationError:
                left_out += 1
            else:
                yield content
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror or error}): restore the file, or delete it"
        ) from None
    if left_out:
        count = "1 line is" if left_out == 1 else f"{left_out:,} lines are"
        warn(f"{path}: {count} damaged and left out")


def warn(message: object) -> None:
    print(f"indistill: {message}", file=sys.stderr, flush=True)


def status(path: Path) -> tuple[str, str]:
    """Word and reason in the file `status`; both are empty if there is no such file, or a damaged one."""
    try:
        text = read_bytes(path, MAX_STATUS_BYTES).decode()
    except (OSError, UnicodeDecodeError):
        return "", ""
    word, _, reason = text.partition("\n")
    return word, reason.strip()
