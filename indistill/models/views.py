"""How a network's evaluation images are resized and cropped: by the config, or by timm's `pretrained_cfg`."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

import timm.data
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, NonNegativeInt, PositiveInt
from timm.data.constants import IMAGENET_DEFAULT_MEAN
from timm.models import load_model_config_from_hf, resolve_pretrained_cfg

from indistill import config
from indistill.config import UserError, in_one_line
from indistill.config.files import read_bytes, read_json
from indistill.config.limits import MAX_RECORD_BYTES
from indistill.models.timm_model import check_name

_Number = TypeVar("_Number")
_Three = Annotated[list[_Number], Field(min_length=3, max_length=3)]


_Interpolation = Literal["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos", "random"]


class PretrainedConfig(BaseModel):
    """timm's record of a network as an exported folder or program has it: how images are preprocessed."""

    model_config = ConfigDict(strict=True, extra="allow")

    input_size: _Three[PositiveInt] | None = None
    test_input_size: _Three[PositiveInt] | None = None
    crop_pct: Annotated[float, Field(gt=0, le=100)] | None = None
    crop_mode: Literal["center", "squash", "border"] | None = None
    interpolation: _Interpolation | None = None
    mean: _Three[FiniteFloat] | None = None
    std: _Three[FiniteFloat] | None = None
    label_names: list[str] | None = None
    classes: list[str] | None = None  # in onnx and torch files
    num_classes: NonNegativeInt | None = None  # 0: without a classifier


def evaluation_view(settings: config.Config) -> EvalView:
    """How images are resized and cropped for the config's student, by the keys `data.eval_*`.

    Where they are auto, the `pretrained_cfg` of the student decides if it begins with weights, else that of
    the first teacher, if there is one. Raises UserError if that record cannot be loaded.
    """
    student = settings.student
    teacher = next(iter(settings.teacher_sections.values()), None)
    if teacher is not None and not (student and (student.pretrained or student.checkpoint)):
        return own_view(teacher, settings.data, "teacher")
    assert student is not None  # only `stage: heads` has none, which has a teacher
    return own_view(student, settings.data, "student")


def own_view(section: config.Model, data: config.Data, role: str) -> EvalView:
    """How images are resized and cropped for this network: as timm records where the config is auto."""
    if data.eval_crop != "auto" and data.eval_interpolation != "auto":
        return EvalView(data.eval_interpolation, data.eval_crop)
    mean = {} if section.mean is None else {"mean": section.mean}
    return view_by_record(own_record(section, role) | mean, data)


def view_by_record(record: Mapping[str, Any], data: config.Data) -> EvalView:
    """How images are resized and cropped by this `pretrained_cfg`, where the config is auto."""
    size = (data.full_size, data.full_size)
    # timm records a second input size for some networks, at which they are best, with a crop of its own.
    test_size = tuple(record.get("test_input_size") or ())[1:]
    use_test_size = size == test_size != tuple(record.get("input_size") or ())[1:]
    own = timm.data.resolve_data_config(pretrained_cfg=dict(record), use_test_size=use_test_size)
    interpolation = own["interpolation"] if data.eval_interpolation == "auto" else data.eval_interpolation
    if data.eval_crop != "auto":
        return EvalView(interpolation, data.eval_crop)
    return EvalView(interpolation, own["crop_pct"], own["crop_mode"], tuple(own["mean"]))


def own_record(section: config.Model, role: str) -> dict[str, Any]:
    """timm's record of a model, `pretrained_cfg`, without building it; UserError if it cannot be loaded."""
    check_name(section, role)
    kind, _, source = section.name.partition(":")
    try:
        if kind == "local-dir":
            folder = Path(source) / "config.json"
            content = read_json(read_bytes(folder, MAX_RECORD_BYTES))["pretrained_cfg"]
            return PretrainedConfig.model_validate(content).model_dump(exclude_unset=True)
        if kind == "hf-hub":
            return load_model_config_from_hf(source)[0]
        name, _, tag = section.name.partition(".")
        return resolve_pretrained_cfg(name, tag or None).to_dict()
    except Exception as error:  # timm, the hub's client and the network each raise their own
        raise UserError(
            f"{role}: timm's pretrained_cfg of {section.name} cannot be loaded "
            f"({in_one_line(error, 200)}): set data.eval_interpolation and data.eval_crop"
        ) from None


def without_weights(section: config.Model, role: str) -> dict[str, Any]:
    """The changes that make a section one of a network with random weights, of the same shape.

    It has no classifier if the weights have none. If their record cannot be loaded, the section alone
    decides.
    """
    changes: dict[str, Any] = {"pretrained": False, "checkpoint": None}
    if section.pretrained:
        with contextlib.suppress(UserError):
            if own_record(section, role).get("num_classes") == 0:
                changes["num_classes"] = 0
    return changes


class EvalView(NamedTuple):
    """How evaluation resizes and crops an image, by the arguments of timm's `create_transform`."""

    interpolation: str
    crop_pct: float
    crop_mode: str = "center"
    mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN  # colour of the border, in [0, 1], if crop_mode has one
