"""The statistics that standardise a teacher's features: computed once, kept by runs and with stored targets.

A standard is named by its field of the targets, its kind, and the number of batches it was computed on:
`embedding.phi_s.8`. A file has them as float64, under the names `NAME.mean` and `NAME.factor`, with a hash.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load, save
from torch import Tensor

from indistill.config import Loss, UserError, in_one_line
from indistill.config.files import read_bytes, replacing
from indistill.config.limits import MAX_STANDARDS_BYTES
from indistill.config.run_dir import RunDir
from indistill.data import remote
from indistill.losses import standard
from indistill.losses.feature_loss import FeatureLoss
from indistill.losses.standard import Standard

FILE = RunDir(Path()).standards.name  # in the folder of stored targets, too
_ROWS_ENTRIES = 2**24  # values that are converted to float64 at once


def wanted(losses: Sequence[Loss], kd_stages: Sequence[int]) -> dict[int, list[str]]:
    """The names of the standards that losses need, by the loss's index: one for each target that it reads."""
    names = {}
    for i, loss in enumerate(losses):
        if isinstance(loss, FeatureLoss) and loss.standardise != "none":
            fields = [f"stage{stage}" for stage in kd_stages] if loss.on == "maps" else [loss.on]
            names[i] = [f"{field}.{loss.standardise}.{loss.batches}" for field in fields]
    return names


def fingerprint(standards: Mapping[str, Standard]) -> str:
    """SHA-256 of all standards."""
    digest = hashlib.sha256()
    for name, tensor in sorted(_tensors(standards).items()):
        digest.update(f"{name} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()


# --- files --------------------------------------------------------------------------------------------------
def write(path: Path, standards: Mapping[str, Standard]) -> None:
    """Write a file of standards, at once."""
    with replacing(path) as stream:
        stream.write(save(_tensors(standards), {"hash": fingerprint(standards)}))


def read(path: str, names: Sequence[str], remedy: str) -> dict[str, Standard]:
    """Read the named standards of a file or URL. Raises UserError if it is damaged or lacks one."""
    standards = read_all(path, remedy)
    for name in names:
        if name not in standards:
            has = ", ".join(standards) or "nothing"
            raise UserError(f"{path}: has {has}, but not {name}, which kd.losses reads: {remedy}")
    return {name: standards[name] for name in names}


def read_all(path: str | Path, remedy: str) -> dict[str, Standard]:
    """Read a file or URL of standards; {} if there is none. Raises UserError if it is damaged."""
    path = str(path)
    try:
        if remote.is_remote(path):
            with remote.open_stream(path) as stream:
                content = stream.read(MAX_STANDARDS_BYTES)
        else:
            content = read_bytes(path, MAX_STANDARDS_BYTES)
        tensors = load(content)
        recorded = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]["hash"]
        standards = {
            name.removesuffix(".mean"): Standard(
                tensors[name], tensors[f"{name.removesuffix('.mean')}.factor"]
            )
            for name in tensors
            if name.endswith(".mean")
        }
        if fingerprint(standards) != recorded:
            raise ValueError("its hash is of other values")
    except FileNotFoundError:
        return {}
    except Exception as error:  # every fsspec backend has exceptions of its own
        raise UserError(f"{path}: cannot be read ({in_one_line(error, 200)}): {remedy}") from None
    return standards


def _tensors(standards: Mapping[str, Standard]) -> dict[str, Tensor]:
    return {
        f"{name}.{part}": tensor.double().cpu()
        for name, of_name in standards.items()
        for part, tensor in of_name._asdict().items()
    }


# --- statistics ---------------------------------------------------------------------------------------------
def compute(
    names: Iterable[str],
    outputs: Callable[[int], Iterable[Mapping[str, Tensor]]],
    total: Callable[[Tensor], Tensor],
) -> dict[str, Standard]:
    """Compute standards, float64 on the CPU.

    `outputs(n)` yields the teacher's outputs by field, [B, C] or [B, C, H, W], on this rank's share of the
    first n batches; every rank yields as many. `total` sums a float64 tensor over the ranks. Raises UserError
    for outputs that are not finite.
    """
    kinds = {name: name.split(".") for name in names}
    standards = {}
    for batches in sorted({int(count) for _, _, count in kinds.values()}):
        moments = {
            field: _Moments(whole=kind == "phi_s")
            for field, kind, count in sorted(kinds.values(), key=lambda parts: parts[1] == "phi_s")
            if int(count) == batches
        }
        for fields in outputs(batches):
            for field, moment in moments.items():
                moment.add(fields[field])
        for name, (field, kind, count) in kinds.items():
            if int(count) == batches:
                standards[name] = _standard(field, kind, moments[field].summed(total))
    return standards


def _standard(field: str, kind: str, of_field: tuple[Tensor, Tensor, int]) -> Standard:
    mean, covariance, count = of_field
    if not (mean.isfinite().all() and covariance.isfinite().all()):
        raise UserError(
            f"kd.losses: the teacher's {field} is not finite on the batches that standardise it: use another "
            "teacher.precision or other weights"
        )
    if kind == "phi_s" and count <= len(mean):  # a rotation of what has no extent is arbitrary
        raise UserError(
            f"kd.losses: feature: standardise: phi_s of {len(mean)} channels ({field}) needs more samples "
            f"than channels, and the batches have {count}: raise batches, or set standardise: channel"
        )
    if kind == "phi_s":
        return standard.phi_s(mean, covariance)
    return standard.channel(mean, covariance if covariance.dim() == 1 else covariance.diagonal())


class _Moments:
    """Sums over all samples and positions of a field, in float64: of values, and of products of channels.

    With `whole` of the products of all pairs of channels, else of each channel with itself.
    """

    def __init__(self, whole: bool) -> None:
        self.whole = whole
        self.width = 0  # C
        self.sums: Tensor | None = None  # [C + C * C + 1] or [2 C + 1]: values, products, count

    def add(self, x: Tensor) -> None:
        rows = x.movedim(1, -1).flatten(0, -2)  # [N, C]
        self.width = rows.shape[1]
        for part in rows.split(max(1, _ROWS_ENTRIES // rows.shape[1])):
            part = part.double()
            products = (part.T @ part).flatten() if self.whole else part.square().sum(dim=0)
            sums = torch.cat([part.sum(dim=0), products, part.new_tensor([len(part)])])
            self.sums = sums if self.sums is None else self.sums + sums

    def summed(self, total: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, int]:
        """Mean [C], and covariance [C, C] or variance [C], over all ranks, on the CPU; and of how many."""
        assert self.sums is not None  # a run has at least one batch
        sums = total(self.sums).cpu()
        width = self.width
        mean, products, count = sums[:width] / sums[-1], sums[width:-1] / sums[-1], int(sums[-1])
        if not self.whole:
            return mean, products - mean.square(), count
        return mean, products.view(width, width) - torch.outer(mean, mean), count
