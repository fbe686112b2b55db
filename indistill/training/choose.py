"""Choose between live and stored targets for `targets: auto`."""

from __future__ import annotations

from accelerate import Accelerator

from indistill import config
from indistill.config import Config, UserError
from indistill.curriculum import Timetable
from indistill.distributed import engine
from indistill.losses.objective import Objective
from indistill.models.network import Network
from indistill.prune import Plan
from indistill.targets.cost import decide, measure
from indistill.targets.live import LiveTargets
from indistill.targets.manifest import REMEDY, manifest_exists, targets_root
from indistill.targets.reader import open_targets
from indistill.targets.stored import CachedTargets


def cheaper_stored(
    settings: Config, student: Network, live: LiveTargets, objective: Objective, timetable: Timetable
) -> list[str]:
    """The phases, by name, in which `targets.source: auto` reads stored targets. Call it before `engine.prepare`."""
    phases = timetable.curriculum.phases()
    works = {
        phase: measure(settings, student, targets_of=live, objective=objective, phase=phase)
        for phase in phases
    }
    return [name for name, choice in decide(settings, works, timetable).items() if choice.source == "cached"]


def choose(
    accelerator: Accelerator,
    settings: Config,
    student: Network,
    live: LiveTargets,
    objective: Objective,
    timetable: Timetable,
    plan: Plan,
) -> LiveTargets | CachedTargets:
    """What `targets.source: auto` trains from: stored targets where they are cheaper, and there. Call on all ranks."""
    phases = (
        []
        if config.why_not_stored(settings)
        else cheaper_stored(settings, student, live, objective, timetable)
    )
    there = phases and engine.on_main(accelerator, lambda: manifest_exists(targets_root(settings)))
    if accelerator.is_main_process:
        told = f"stored in {', '.join(phases)}" if there else "live"
        hint = ": `indistill targets CONFIG` would make the run shorter" if phases and not there else ""
        print(f"indistill: targets: auto: {told}{hint}", flush=True)
    if not there:
        return live
    reader = open_targets(accelerator, settings)
    if plan.pairs and reader.manifest.pruning().hash != plan.hash:
        raise UserError(f"{reader.root}: made with another pruning plan than this run's: {REMEDY}")
    return CachedTargets(reader, settings.kd.losses, kd_stages=live.kd_stages, live=live, phases=phases)
