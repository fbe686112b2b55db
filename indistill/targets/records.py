"""Encode targets as fixed-size records with checksums, and decode them."""

from __future__ import annotations

import math
import zlib
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, PositiveInt, model_validator
from pydantic import Field as Bounds
from torch import Tensor

from indistill import config
from indistill.config.limits import MAX_CHANNELS, MAX_TARGET_RECORD_BYTES, MAX_VIEWS

Format = Literal["float32", "bf16", "int8", "top_k"]
_TINY = torch.finfo(torch.float32).tiny  # replaces a probability of 0: its logarithm is -87
_TORCH = {
    "<f4": torch.float32,
    "<u2": torch.bfloat16,
    "|i1": torch.int8,
    "<i2": torch.int16,
    "<i4": torch.int32,
}


# --- one field ----------------------------------------------------------------------------------------------
class Field(BaseModel):
    """One field of the stored targets: encodes a teacher's tensor [B, *shape] as records, and decodes it."""

    format: Format
    # Of one sample: of a map [C, H, W], of others [N].
    shape: tuple[PositiveInt, ...]
    # Of the teacher's tensor, which exactly stored values are decoded to.
    dtype: Annotated[str, Bounds(pattern=r"^b?float(16|32|64)\z")]
    channels_last: bool  # likewise the memory format, on which the last bits of sums over a map depend
    top_k: PositiveInt | None = None  # only in the format of that name
    # In which it is stored: those in which the config's run reads it.
    views: list[Annotated[int, Bounds(ge=0, lt=MAX_VIEWS)]] = []

    @model_validator(mode="after")
    def _fits(self) -> Field:
        is_map = len(self.shape) == 3
        if len(self.shape) not in (1, 3) or self.shape[0] > MAX_CHANNELS:
            raise ValueError(f"shape {self.shape}: neither [C, H, W] nor [N], of at most {MAX_CHANNELS:,}")
        if (self.top_k is None) != (self.format != "top_k") or (self.top_k or 0) > self.shape[0]:
            raise ValueError(f"top_k {self.top_k} in the format {self.format}, of {self.shape[0]} classes")
        if (is_map and self.format == "top_k") or (not is_map and self.format in ("int8", "bf16")):
            raise ValueError(f"a target of shape {self.shape} is not stored in the format {self.format}")
        if 4 * math.prod(self.shape) > MAX_TARGET_RECORD_BYTES:
            raise ValueError(f"shape {self.shape} is larger than {MAX_TARGET_RECORD_BYTES:,} bytes")
        return self

    @property
    def record(self) -> np.dtype:
        """The layout of a record, its checksum included."""
        parts: list[tuple[Any, ...]]
        match self.format:
            case "float32":
                parts = [("values", "<f4", self.shape)]
            case "bf16":  # numpy has no such type
                parts = [("values", "<u2", self.shape)]
            case "int8":
                parts = [("values", "|i1", self.shape), ("scales", "<f4", self.shape[:1])]
            case "top_k":
                number = "<i2" if self.shape[0] <= 2**15 else "<i4"
                parts = [
                    ("probabilities", "<f4", (self._kept,)),
                    ("classes", number, (self._kept,)),
                    ("tail", "<f4"),
                ]
        return np.dtype([*parts, ("crc32", "<u4")])

    @property
    def _kept(self) -> int:
        assert self.top_k is not None  # `wanted_format` gives both
        return self.top_k

    def encode(self, tensor: Tensor) -> np.ndarray:
        """Encode [B, *shape] as B records."""
        records = np.empty(len(tensor), self.record)
        match self.format:
            case "float32":
                parts = {"values": tensor.float()}
            case "bf16":
                parts = {"values": tensor.to(torch.bfloat16).contiguous().view(torch.int16)}
            case "int8":
                values = tensor.float()
                scales = values.abs().amax(dim=(2, 3)) / 127  # [B, C]
                divisors = torch.where(scales > 0, scales, 1)[:, :, None, None]
                parts = {
                    "values": (values / divisors).round().clamp(-127, 127).to(torch.int8),
                    "scales": scales,
                }
            case "top_k":
                probabilities = tensor.double().softmax(dim=1)  # [B, classes]
                largest, classes = probabilities.topk(self._kept, dim=1)
                tail = probabilities.scatter(1, classes, 0.0).sum(dim=1)
                parts = {"probabilities": largest, "classes": classes, "tail": tail}
        for name, part in parts.items():
            records[name] = part.cpu().numpy() if self.format != "bf16" else part.cpu().numpy().view("<u2")
        records["crc32"] = _checksums(rows_of(records))
        return records

    def decode(self, records: Tensor) -> Tensor:
        """Decode records, uint8 [B, bytes of a record] on any device, as [B, *shape] on that device.

        With `top_k`, each class that was left out gets the same share of the tail, and logits are
        log-probabilities.
        """
        parts = {}
        layout = self.record
        assert layout.fields is not None  # a structured type has them
        for name in layout.fields.keys() - {"crc32"}:
            dtype, offset, *_ = layout.fields[name]
            # A copy, because a slice is not aligned.
            part = records[:, offset : offset + dtype.itemsize].clone(memory_format=torch.contiguous_format)
            parts[name] = part.view(_TORCH[dtype.base.str]).view(len(records), *dtype.shape)
        match self.format:
            case "float32":
                values = parts["values"].to(getattr(torch, self.dtype))
            case "bf16":
                values = parts["values"].float()
            case "int8":
                values = parts["values"].float() * parts["scales"][:, :, None, None]
            case "top_k":
                left_out = max(self.shape[0] - self._kept, 1)
                values = (parts["tail"][:, None] / left_out).expand(-1, *self.shape)  # [B, classes]
                values = (
                    values.scatter(1, parts["classes"].long(), parts["probabilities"]).clamp_min(_TINY).log()
                )
        return values.contiguous(memory_format=torch.channels_last) if self.channels_last else values

    def blank(self, samples: int, device: torch.device) -> Tensor:
        """Zeros [samples, *shape]."""
        return torch.zeros(samples, *self.shape, dtype=getattr(torch, self.dtype), device=device)


def describe(name: str, tensor: Tensor, section: config.Targets) -> Field:
    """The field that stores tensors like this one [B, ...] in the config's format."""
    kind, top_k = wanted_format(name, tensor.dim() == 4, section)
    tensor = tensor.clone()  # as a live run copies it, which closes gaps, such as that of a class token
    channels_last = (
        tensor.dim() == 4
        and not tensor.is_contiguous()
        and tensor.is_contiguous(memory_format=torch.channels_last)
    )
    dtype = str(tensor.dtype).removeprefix("torch.")
    return Field(format=kind, shape=tensor.shape[1:], dtype=dtype, channels_last=channels_last, top_k=top_k)


def wanted_format(name: str, is_map: bool, section: config.Targets) -> tuple[Format, int | None]:
    """The config's format and top_k of a field. An embedding is small, and always stored as float32."""
    if is_map:
        return section.features, None
    if name == "embedding" or section.top_k is None:
        return "float32", None
    return "top_k", section.top_k


def rows_of(records: np.ndarray) -> np.ndarray:
    """View records [B] as uint8 [B, bytes of a record]."""
    return records.view(np.uint8).reshape(len(records), -1)


def _checksums(rows: np.ndarray) -> np.ndarray:
    return np.array([zlib.crc32(row[:-4]) for row in rows], dtype="<u4")


def intact(rows: np.ndarray) -> np.ndarray:
    """Whether each of the records, uint8 [B, bytes of a record], has the right checksum: bool [B]."""
    return _checksums(rows) == np.ascontiguousarray(rows[:, -4:]).view("<u4")[:, 0]
