"""Agree over all ranks on which teacher channels are taught, or read it from stored targets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from indistill import config, prune
from indistill.config import Config, UserError
from indistill.config.files import replace_text
from indistill.config.run_dir import RunDir
from indistill.distributed import engine
from indistill.models.network import Network
from indistill.models.stages import check_stages, find_stages, match_stages
from indistill.prune import PairPlan, Plan
from indistill.targets.manifest import REMEDY
from indistill.targets.reader import Reader


def agree_on_plan(
    accelerator: Accelerator,
    settings: Config,
    *,
    warmup: config.Warmup,
    files: RunDir,
    teacher: Network,
    student: nn.Module,
    calibration: Callable[[int], DataLoader] | None,
) -> Plan:
    """Return the plan of the run that is resumed, or make one on rank 0; every rank gets the same.

    `calibration(n)` loads this rank's share of n global batches, for a criterion that needs data.
    """
    pairs = match_stages(teacher.net, student) if warmup.pairs == "auto" else warmup.pairs
    check_stages(pairs, teacher.net, student, "warmup.pairs")
    path, section = files.pruning_plan, warmup.prune
    importance = None
    if section.criterion in prune.NEEDS_DATA and not engine.on_main(accelerator, path.exists):
        assert calibration is not None  # given by every caller whose criterion may need data
        stages = [teacher_stage for teacher_stage, _ in pairs]
        importance = _measure_importance(
            accelerator, section, teacher=teacher, stages=stages, calibration=calibration
        )

    def read_or_make() -> Plan:
        if path.exists():
            expected = prune.unpruned(teacher.net, student, pairs, warmup.adapter)
            return _read(path, list(expected))
        how = (section.criterion, section.mode, warmup.adapter, importance, settings.seed)
        size = teacher.input_size(settings.data.full_size)
        plan = prune.plan(teacher.net, student, pairs, size, *how)
        replace_text(path, plan.to_json())
        return plan

    return engine.on_main(accelerator, read_or_make)


def _read(path: Path, expected: list[PairPlan]) -> Plan:
    """Read the plan of the run that is resumed. Raises UserError if it is not for the pairs expected."""
    plan = Plan.read(path)
    ours, theirs = ([pair[:4] for pair in pairs] for pairs in (expected, plan.pairs))
    if ours != theirs:
        raise UserError(
            f"{path}: made for pairs (teacher stage, student stage, their widths) {theirs}, this run has "
            f"{ours}: restore the file, or start in another run_dir"
        )
    return plan


def _measure_importance(
    accelerator: Accelerator,
    section: config.Prune,
    *,
    teacher: Network,
    stages: list[int],
    calibration: Callable[[int], DataLoader],
) -> dict[int, Tensor]:
    """Score the output channels [C] of each teacher stage on calibration batches of all ranks."""
    device = teacher.mean.device
    batches = calibration(section.batches)
    return prune.calibrate(
        teacher.net,
        teacher.normalise,
        stages,
        ((batch.images.to(device), batch.labels.to(device)) for batch in batches),
        section.criterion,
        lambda sums: accelerator.reduce(sums.to(accelerator.device), reduction="sum"),
    )


def stored_plan(
    accelerator: Accelerator, warmup: config.Warmup, *, files: RunDir, reader: Reader, student: nn.Module
) -> Plan:
    """Return the plan by which stored targets were made, and keep it as the run's own.

    Raises UserError if it was made for another student, or differs from the plan with which the run began.
    """
    plan, teacher = reader.manifest.pruning(), reader.manifest.teacher
    pairs = match_stages(teacher, student) if warmup.pairs == "auto" else warmup.pairs
    check_stages(pairs, teacher, student, "warmup.pairs")
    widths = [stage.channels for stage in find_stages(student)]
    ours = [(teacher_stage, stage, widths[stage]) for teacher_stage, stage in pairs]
    theirs = [(pair.teacher_stage, pair.student_stage, pair.student_width) for pair in plan.pairs]
    if ours != theirs:
        raise UserError(
            f"{reader.root}: made for pairs (teacher stage, student stage, width) {theirs}, this student has "
            f"{ours}: {REMEDY}"
        )
    path = files.pruning_plan

    def keep() -> None:
        if path.exists() and Plan.read(path).hash != plan.hash:
            raise UserError(
                f"{reader.root}: made with another plan than {path}, with which this run began: {REMEDY}"
            )
        replace_text(path, plan.to_json())

    engine.on_main(accelerator, keep)
    return plan
