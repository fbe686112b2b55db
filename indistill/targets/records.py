"""How targets are laid out in a record, and the checksums of its bytes."""

from __future__ import annotations

import zlib
from typing import Literal

import numpy as np
import torch
from pydantic import BaseModel
from torch import Tensor

from indistill import config

_TINY = torch.finfo(torch.float32).tiny  # what a probability of 0 is taken for: a logarithm of -87
_TORCH = {
    "<f4": torch.float32,
    "<u2": torch.bfloat16,
    "|i1": torch.int8,
    "<i2": torch.int16,
    "<i4": torch.int32,
}


# --- one field -------------------------------------------------------------------------------------------------------
class Field(BaseModel):
    """How the records of one field are made, from a tensor [B, *shape] of the teacher's and back."""

    format: Literal["float32", "bf16", "int8", "top_k"]
    shape: tuple[int, ...]  # of one sample
    dtype: str  # what the teacher gave: values that are stored exactly come back as that
    channels_last: bool  # likewise; sums over a map depend on it in their last bits
    top_k: int | None = None
    views: list[int] = []  # in which the config's run reads it, and in which it is stored

    @property
    def record(self) -> np.dtype:
        match self.format:
            case "float32":
                parts = [("values", "<f4", self.shape)]
            case "bf16":  # numpy has none
                parts = [("values", "<u2", self.shape)]
            case "int8":
                parts = [("values", "|i1", self.shape), ("scales", "<f4", self.shape[:1])]
            case "top_k":
                number = "<i2" if self.shape[0] <= 2**15 else "<i4"
                parts = [
                    ("probabilities", "<f4", (self.top_k,)),
                    ("classes", number, (self.top_k,)),
                    ("tail", "<f4"),
                ]
        return np.dtype([*parts, ("crc32", "<u4")])

    def encode(self, tensor: Tensor) -> np.ndarray:
        """[B, *shape] to B records."""
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
                largest, classes = probabilities.topk(self.top_k, dim=1)
                tail = probabilities.scatter(1, classes, 0.0).sum(dim=1)
                parts = {"probabilities": largest, "classes": classes, "tail": tail}
        for name, part in parts.items():
            records[name] = part.cpu().numpy() if self.format != "bf16" else part.cpu().numpy().view("<u2")
        records["crc32"] = _checksums(rows_of(records))
        return records

    def decode(self, records: Tensor) -> Tensor:
        """Records as uint8 [B, bytes of a record], on any device, to [B, *shape] there.

        Of the classes that `top_k` left out each gets the same share of the tail; the logits are log-probabilities.
        """
        parts = {}
        for name in self.record.names[:-1]:
            dtype, offset = self.record.fields[name]
            base = dtype.base.str
            # A copy, because a slice is not aligned.
            part = records[:, offset : offset + dtype.itemsize].clone(memory_format=torch.contiguous_format)
            parts[name] = part.view(_TORCH[base]).view(len(records), *dtype.shape)
        match self.format:
            case "float32":
                values = parts["values"].to(getattr(torch, self.dtype))
            case "bf16":
                values = parts["values"].float()
            case "int8":
                values = parts["values"].float() * parts["scales"][:, :, None, None]
            case "top_k":
                left_out = max(self.shape[0] - self.top_k, 1)
                values = (parts["tail"][:, None] / left_out).expand(-1, *self.shape)  # [B, classes]
                values = (
                    values.scatter(1, parts["classes"].long(), parts["probabilities"]).clamp_min(_TINY).log()
                )
        return values.contiguous(memory_format=torch.channels_last) if self.channels_last else values

    def blank(self, samples: int, device: torch.device) -> Tensor:
        return torch.zeros(samples, *self.shape, dtype=getattr(torch, self.dtype), device=device)


def describe(name: str, tensor: Tensor, section: config.Targets) -> Field:
    """The field that stores such tensors [B, ...] as the config wants it."""
    kind, top_k = wanted_format(name, tensor.dim() == 4, section)
    channels_last = (
        tensor.dim() == 4
        and not tensor.is_contiguous()
        and tensor.is_contiguous(memory_format=torch.channels_last)
    )
    dtype = str(tensor.dtype).removeprefix("torch.")
    return Field(format=kind, shape=tensor.shape[1:], dtype=dtype, channels_last=channels_last, top_k=top_k)


def wanted_format(name: str, is_map: bool, section: config.Targets) -> tuple[str, int | None]:
    """Format and top_k: what the config wants of a field. An embedding is small, and stays as it is."""
    if is_map:
        return section.features, None
    return ("float32", None) if name == "embedding" or section.top_k is None else ("top_k", section.top_k)


def rows_of(records: np.ndarray) -> np.ndarray:
    """Records [B] as uint8 [B, bytes of a record]."""
    return records.view(np.uint8).reshape(len(records), -1)


def _checksums(rows: np.ndarray) -> np.ndarray:
    return np.array([zlib.crc32(row[:-4]) for row in rows], dtype="<u4")


def intact(rows: np.ndarray) -> np.ndarray:
    """Which of the records, uint8 [B, bytes of a record], fit their checksums: bool [B]."""
    return _checksums(rows) == np.ascontiguousarray(rows[:, -4:]).view("<u4")[:, 0]
