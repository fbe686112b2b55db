"""Choose between live and stored targets for `targets: auto`."""

from __future__ import annotations

from accelerate import Accelerator

from indistill import config
from indistill.config import Config, UserError
from indistill.curriculum import Timetable
from indistill.distributed import engine
from indistill.losses.objective import Objective
from indistill.models.trainable import Trainable
from indistill.prune import Plan
from indistill.targets.cost import decide, measure
from indistill.targets.live import LiveTargets
from indistill.targets.manifest import REMEDY, manifest_exists, targets_root
from indistill.targets.reader import open_targets
from indistill.targets.source import TargetSource
from indistill.targets.stored import CachedTargets


def cheaper_stored(
    settings: Config, student: Trainable, *, live: LiveTargets, objective: Objective, timetable: Timetable
) -> list[str]:
    """Return the names of the phases in which stored targets are cheaper than live ones.

    Call it before `engine.prepare`: it runs the bare student.
    """
    phases = timetable.curriculum.phases()
    works = {
        phase: measure(settings, student, targets_of=live, objective=objective, phase=phase)
        for phase in phases
    }
    return [name for name, choice in decide(settings, works, timetable).items() if choice.source == "cached"]


def choose(
    accelerator: Accelerator,
    settings: Config,
    *,
    student: Trainable,
    live: TargetSource,
    objective: Objective,
    timetable: Timetable,
    plan: Plan,
) -> TargetSource:
    """Return stored targets for the phases in which they are cheaper, if they exist, else `live`.

    Call on all ranks. Raises UserError for stored targets that were made with another pruning plan.
    """
    assert isinstance(live, LiveTargets)  # `lessons.networks` returns others for "cached" only
    phases: list[str] = []
    if not config.why_not_stored(settings):
        phases = cheaper_stored(settings, student, live=live, objective=objective, timetable=timetable)
    root = targets_root(settings)
    stored = bool(phases) and engine.on_main(accelerator, lambda: manifest_exists(root))
    if accelerator.is_main_process:
        print(f"indistill: targets: auto: {_describe(phases, stored)}", flush=True)
    if not stored:
        return live
    reader = open_targets(accelerator, settings)
    if plan.pairs and reader.manifest.pruning().hash != plan.hash:
        raise UserError(f"{reader.root}: made with another pruning plan than this run's: {REMEDY}")
    return CachedTargets(reader, settings.kd.losses, kd_stages=live.kd_stages, live=live, phases=phases)


def _describe(phases: list[str], stored: bool) -> str:
    if stored:
        return f"stored in {', '.join(phases)}"
    if phases:
        return "live: `indistill targets CONFIG` would make the run shorter"
    return "live"
