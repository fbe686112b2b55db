"""What losses on features need to know of both networks: grids that fit each other, and common scales."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils.data import DataLoader

from indistill import config
from indistill.config import Config, UserError
from indistill.config.run_dir import RunDir
from indistill.distributed import engine
from indistill.losses.feature_loss import FeatureLoss, coarser
from indistill.losses.objective import reads
from indistill.losses.standard import Standard, hadamard
from indistill.models.stages import patch_tokens, stage_maps_and_final
from indistill.models.timm_model import TimmModel
from indistill.targets import standards
from indistill.targets.live import LiveTargets
from indistill.targets.manifest import REMEDY, Manifest
from indistill.targets.records import bare, size_of
from indistill.targets.several import SeveralTargets
from indistill.targets.source import TargetSource
from indistill.targets.stored import CachedTargets


# --- grids --------------------------------------------------------------------------------------------------
class Grids(NamedTuple):
    """The shapes [C, H, W] of a network's features."""

    maps: Sequence[tuple[int, ...]] = ()  # of each stage that losses read
    tokens: tuple[int, ...] | None = None  # of the patch tokens, if losses read them


def of_network(net: TimmModel, side: int, stages: Sequence[int], losses: Sequence[config.Loss]) -> Grids:
    """The shapes that a network gives for images of `side` pixels; nothing is computed.

    Raises UserError if losses read patch tokens that it does not have.
    """
    if not any(isinstance(loss, FeatureLoss) for loss in losses):
        return Grids()
    ascending = sorted({*stages})
    training = net.training
    net.eval()
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            images = torch.zeros(1, 3, side, side, device=next(net.parameters()).device)
            final, maps = stage_maps_and_final(net, images, ascending)
            shapes = {stage: tuple(x.shape[1:]) for stage, x in zip(ascending, maps)}
            tokens = tuple(patch_tokens(net, final).shape[1:]) if reads(losses, "tokens") else None
    finally:
        net.train(training)
    return Grids([shapes[stage] for stage in stages], tokens)


def of_manifest(manifest: Manifest, stages: Sequence[int]) -> Grids:
    """The shapes of stored features, of the largest images if these grow.

    It is () for features that are not stored, which is found when they are read.
    """
    by_size = sorted(manifest.fields.items(), key=lambda item: size_of(item[0]) or 0)
    fields = {bare(name): field for name, field in by_size}
    maps = [fields[f"stage{stage}"].shape if f"stage{stage}" in fields else () for stage in stages]
    return Grids(maps, fields["tokens"].shape if "tokens" in fields else None)


def check(settings: Config, student: Grids, teacher: Grids, widths: Mapping[str, Sequence[int]]) -> None:
    """Raise UserError for a loss whose features cannot be aligned, or cannot be standardised as it says.

    `widths` are the channels of the teacher's features, by `FeatureLoss.on`.
    """
    for loss in settings.kd.losses:
        if not isinstance(loss, FeatureLoss):
            continue
        pairs = [*zip(student.maps, teacher.maps)] if loss.on == "maps" else []
        if loss.on == "tokens" and student.tokens and teacher.tokens:
            pairs = [(student.tokens, teacher.tokens)]
        for ours, theirs in pairs:
            pooled = [min(side, settings.targets.pool or side) for side in theirs[1:]]
            if theirs and coarser(ours[1:], pooled) is None:
                raise UserError(
                    f"kd.losses: feature: the grids {_size(ours[1:])} of the student and {_size(pooled)} of "
                    "the teacher cannot be aligned, as neither is the coarser one: choose other kd.pairs"
                )
        if loss.standardise == "phi_s":
            for width in widths[loss.on]:
                _check_phi_s(width)


def _check_phi_s(width: int) -> None:
    try:
        hadamard(width)
    except ValueError:
        raise UserError(
            f"kd.losses: feature: standardise: phi_s needs a Hadamard matrix of {width} rows, as many as the "
            "teacher has channels, and none is known: set standardise: channel"
        ) from None


def _size(grid: Sequence[int]) -> str:
    return " x ".join(map(str, grid))


# --- standards ----------------------------------------------------------------------------------------------
class Standards(NamedTuple):
    """What standardises the teacher's features for each loss, by its index."""

    of_loss: Mapping[int, Sequence[Standard]]
    fingerprint: str | None  # None if no loss needs any


def agree_on_standards(
    accelerator: Accelerator,
    settings: Config,
    *,
    files: RunDir,
    targets_of: TargetSource,
    calibration: Callable[[int], DataLoader],
) -> Standards:
    """Return the standards of the run that is resumed, or those of its stored targets, or compute them.

    `calibration(n)` loads this rank's share of the first n global batches. Every rank gets the same.
    """
    if not isinstance(targets_of, SeveralTargets):
        return _standards(
            accelerator, settings, path=files.standards, targets_of=targets_of, calibration=calibration
        )
    of_loss: dict[int, Sequence[Standard]] = {}
    fingerprints = []
    own = len(settings.kd.losses)  # index of the first loss of the next teacher that has losses
    for member, one, section in zip(targets_of.members, settings.by_teacher.values(), settings.teachers):
        path = files.standards_of(member.name)
        found = _standards(accelerator, one, path=path, targets_of=member.source, calibration=calibration)
        first = 0 if section.losses is None else own
        own += len(section.losses or ())
        of_loss |= {first + i: of_one for i, of_one in found.of_loss.items()}
        fingerprints += [found.fingerprint] if found.fingerprint else []
    return Standards(of_loss, " ".join(fingerprints) or None)


def _standards(
    accelerator: Accelerator,
    settings: Config,
    *,
    path: Path,
    targets_of: TargetSource,
    calibration: Callable[[int], DataLoader],
) -> Standards:
    """Return the standards of the losses that learn from one teacher."""
    names = standards.wanted(settings.kd.losses, targets_of.kd_stages)
    every = sorted({name for of_loss in names.values() for name in of_loss})
    if not every:
        return Standards({}, None)
    remedy = "restore it, or start in another run_dir"

    def kept() -> dict[str, Standard] | None:
        if path.exists():
            return standards.read(str(path), every, remedy)
        if isinstance(targets_of, CachedTargets) and targets_of.live is None:
            return standards.read(f"{targets_of.reader.root}/{standards.FILE}", every, REMEDY)
        return None

    known = engine.on_main(accelerator, kept)
    if known is None:
        assert isinstance(targets_of, LiveTargets)  # stored targets have their own
        known = compute(accelerator, every, targets_of, calibration)
    on_main = known
    engine.on_main(accelerator, lambda: None if path.exists() else standards.write(path, on_main))
    device, dtype = accelerator.device, torch.get_default_dtype()
    ready = {name: Standard(*(x.to(device, dtype) for x in one)) for name, one in known.items()}
    of_loss = {i: [ready[name] for name in of_names] for i, of_names in names.items()}
    return Standards(of_loss, standards.fingerprint(known))


def compute(
    accelerator: Accelerator,
    names: Sequence[str],
    targets_of: LiveTargets,
    calibration: Callable[[int], DataLoader],
) -> dict[str, Standard]:
    """Compute standards with the teacher, on batches of all ranks: the same on each of them."""

    def outputs(batches: int) -> Iterator[dict[str, Tensor]]:
        for batch in calibration(batches):
            yield targets_of.calibration(batch.images.to(accelerator.device, non_blocking=True))

    with torch.random.fork_rng():  # the loader draws seeds for its workers
        found = standards.compute(names, outputs, lambda sums: accelerator.reduce(sums, reduction="sum"))
    return engine.on_main(accelerator, lambda: found)
