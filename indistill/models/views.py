"""How a network's evaluation images are resized and cropped, by the config or its own record."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import timm.data
from timm.data.constants import IMAGENET_DEFAULT_MEAN
from timm.models import load_model_config_from_hf, resolve_pretrained_cfg

from indistill import config
from indistill.config import UserError, in_one_line


def evaluation_view(settings: config.Config) -> EvalView:
    """How evaluation shows images to the config's student, by the keys `data.eval_*`.

    Where they say auto, as timm's record says of the student if it begins with weights, else of the teacher, if there
    is one. Raises UserError if that record cannot be had.
    """
    student, teacher = settings.student, settings.teacher
    if teacher is not None and not (student and (student.pretrained or student.checkpoint)):
        return own_view(teacher, settings.data, "teacher")
    return own_view(student, settings.data, "student")


def own_view(section: config.Model, data: config.Data, role: str) -> EvalView:
    """How evaluation shows images to this very network: timm's `resolve_data_config`, where the config says auto."""
    if "auto" not in (data.eval_crop, data.eval_interpolation):
        return EvalView(data.eval_interpolation, data.eval_crop)
    mean = {} if section.mean is None else {"mean": section.mean}
    return view_by_record(own_record(section, role) | mean, data)


def view_by_record(record: Mapping[str, Any], data: config.Data) -> EvalView:
    """How evaluation shows images to a network with this record of timm's, where the config says auto."""
    crop, interpolation, size = data.eval_crop, data.eval_interpolation, (data.image_size, data.image_size)
    # Networks may be made for one size, and be at their best, with another crop, at a second one.
    at_second = (
        size == tuple(record.get("test_input_size") or ())[1:] != tuple(record.get("input_size") or ())[1:]
    )
    own = timm.data.resolve_data_config(pretrained_cfg=dict(record), use_test_size=at_second)
    interpolation = own["interpolation"] if interpolation == "auto" else interpolation
    if crop != "auto":
        return EvalView(interpolation, crop)
    return EvalView(interpolation, own["crop_pct"], own["crop_mode"], tuple(own["mean"]))


def own_record(section: config.Model, role: str) -> dict[str, Any]:
    """timm's record of a model (`pretrained_cfg`), without building it."""
    kind, _, place = section.name.partition(":")
    given, overlay = section.kwargs.get("pretrained_cfg"), section.kwargs.get("pretrained_cfg_overlay")
    try:
        if kind == "local-dir":
            return json.loads((Path(place) / "config.json").read_text())["pretrained_cfg"]
        if kind == "hf-hub":
            return load_model_config_from_hf(place)[0]
        name, _, tag = section.name.partition(".")
        return resolve_pretrained_cfg(name, given or tag or None, overlay).to_dict()
    except Exception as error:  # timm, the hub's client and the network each raise their own
        raise UserError(
            f"{role}: timm's record of {section.name} cannot be had: {in_one_line(error, 200)}; without it, "
            "set data.eval_interpolation and data.eval_crop"
        ) from None


class EvalView(NamedTuple):
    """How evaluation shows an image, in the words of timm's `create_transform`."""

    interpolation: str
    crop_pct: float
    crop_mode: str = "center"
    mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN  # the colour of a border, where crop_mode has one
