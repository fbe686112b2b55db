"""Agree over all ranks on which teacher channels are taught, or read it from stored targets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader

from indistill import prune
from indistill.config import Config, UserError
from indistill.config.tree import input_size
from indistill.distributed import engine
from indistill.models.network import Network
from indistill.models.stages import check_stages, find_stages, match_stages
from indistill.prune import Plan
from indistill.targets.manifest import REMEDY
from indistill.targets.reader import Reader


def agree_on_plan(
    accelerator: Accelerator,
    settings: Config,
    run_dir: Path,
    teacher: Network,
    student: nn.Module,
    calibration: Callable[[int], DataLoader],
) -> Plan:
    """Rank 0 computes the plan, or reads that of the run it continues; every rank gets it."""
    path, warmup = run_dir / "prune_plan.json", settings.warmup
    pairs = match_stages(teacher.net, student) if warmup.pairs == "auto" else warmup.pairs
    check_stages(pairs, teacher.net, student, "warmup.pairs")
    importance = None
    if warmup.prune.criterion in prune.NEEDS_DATA and not engine.on_main(accelerator, path.exists):
        device, batches = teacher.mean.device, calibration(warmup.prune.batches)
        importance = prune.calibrate(
            teacher.net,
            teacher.normalise,
            [teacher_stage for teacher_stage, _ in pairs],
            ((batch.images.to(device), batch.labels.to(device)) for batch in batches),
            warmup.prune.criterion,
            lambda x: accelerator.reduce(x.to(accelerator.device), reduction="sum"),
        )

    def read_or_make() -> Plan:
        if path.exists():
            return Plan.read(path)
        plan = prune.plan(
            teacher.net,
            student,
            pairs,
            input_size(settings),
            warmup.prune.criterion,
            warmup.prune.mode,
            warmup.adapter,
            importance,
            settings.seed,
        )
        path.write_text(plan.to_json())
        return plan

    return engine.on_main(accelerator, read_or_make)


# --- targets that are stored -----------------------------------------------------------------------------------------
def stored_plan(
    accelerator: Accelerator, settings: Config, run_dir: Path, reader: Reader, student: nn.Module
) -> Plan:
    """The plan that the targets were made by, kept as that of the run. Raises UserError if it is of another student."""
    plan, path = reader.manifest.pruning(), run_dir / "prune_plan.json"
    pairs, key = settings.warmup.pairs, "warmup.pairs"
    pairs = match_stages(reader.manifest.teacher, student) if pairs == "auto" else pairs
    check_stages(pairs, reader.manifest.teacher, student, key)
    ours = [(teacher, stage, find_stages(student)[stage].channels) for teacher, stage in pairs]
    theirs = [(pair.teacher_stage, pair.student_stage, pair.student_width) for pair in plan.pairs]
    if ours != theirs:
        raise UserError(
            f"{reader.root}: made for pairs (teacher stage, student stage, width) {theirs}, this student has {ours}: "
            f"{REMEDY}"
        )

    def keep() -> None:
        if path.exists() and Plan.read(path).hash != plan.hash:
            raise UserError(
                f"{reader.root}: made with another plan than {path}, with which this run began: {REMEDY}"
            )
        path.write_text(plan.to_json())

    engine.on_main(accelerator, keep)
    return plan
