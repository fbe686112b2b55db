"""How far is `indistill plan` from what training then takes?

    OMP_NUM_THREADS=1 python benchmarks/plan_check.py [--rounds 4]

Method: benchmarks/README.md. It prints its tables and writes them to benchmarks/results/plan_check.md.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import statistics
import tempfile
from pathlib import Path

import recorded
import torch
from report import RESULTS, heading, table

from indistill import Callback, config
from indistill.commands import targets as commands_targets
from indistill.commands.plan import estimate
from indistill.curriculum import Phase
from indistill.training import loop
from indistill.training.callbacks import TrainingRun

SIZE, BATCH, STEPS, LAST = 96, 16, 5, 6
RESULT = RESULTS / "plan_check.md"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=4)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    begin = heading(
        "Plan and run", f"python benchmarks/plan_check.py --rounds {arguments.rounds}", recorded.LIBRARIES
    )
    with recorded.scratch(samples=64, size=SIZE) as folder:
        settings = config.parse(recorded.tree(folder, folder / "run", SIZE, BATCH, STEPS, LAST), "benchmark")
        plan = estimate.of_run(settings, world=1)
        runs = [recorded.train(at(settings, folder / f"run{i}")) for i in range(arguments.rounds)]
        peaks = memory(at(settings, folder / "profiled"))
        files = stored(settings, folder / "targets")
    parts = [
        begin,
        f"ResNet-34 to a ResNet-18 of half the width, {BATCH} images of {SIZE} pixels a step, one process and thread, "
        f"float32, {arguments.rounds} runs of {4 * STEPS + LAST} steps.",
        times(plan, runs),
        peak(plan, peaks),
        targets(plan, files),
    ]
    RESULT.write_text("\n\n".join(parts) + "\n")
    print(RESULT.read_text())


def at(settings: config.Config, run_dir: Path) -> config.Config:
    return settings.model_copy(update={"run_dir": str(run_dir)})


def times(plan: estimate.Estimate, runs: list[list[recorded.Step]]) -> str:
    """CPU seconds of a step, predicted by the rate of operations that KD had."""
    measured: dict[str, list[float]] = {phase.name: [] for phase in plan.phases}
    for steps in runs:
        for before, step in recorded.within_phases(steps):
            measured[step.phase].append(step.cpu - before.cpu)
    flops = {p.name: (p.work.teacher_flops + p.work.student_flops) * BATCH for p in plan.phases}
    last = plan.phases[-1].name
    rate = flops[last] / statistics.median(measured[last])
    rows, errors = [], []
    for name, seconds in measured.items():
        found, predicted = statistics.median(seconds), flops[name] / rate
        errors.append(predicted / found - 1)
        spread = f"{min(seconds):.3f} to {max(seconds):.3f}"
        error = "calibrated" if name == last else f"{errors[-1]:+.0%}"
        rows.append([name, f"{flops[name] / 1e9:.2f}", f"{predicted:.3f}", f"{found:.3f}", spread, error])
    shares = [phase.steps / plan.phases[-1].steps for phase in plan.phases]
    whole = sum(flops[n] / rate * s for n, s in zip(flops, shares))
    found = sum(statistics.median(measured[n]) * s for n, s in zip(flops, shares))
    columns = ["phase", "GFLOP a step", "predicted s", "measured s", "its range", "error"]
    return (
        f"## Time of a step\n\n{table(columns, rows)}\nCPU time of the process, median over the steps of all runs "
        f"but the first of each phase. The one number that is fitted is machine.flops_per_second, to {last}: "
        f"{rate:.3g}. Largest error {max(map(abs, errors)):.0%}; of the whole run {whole / found - 1:+.1%}."
    )


def memory(settings: config.Config) -> dict[str, int]:
    """The most that the CPU's allocator had out during a step beyond what it had before, by phase: a step of each."""
    peaks: dict[str, int] = {}

    class Profile(Callback):
        profiler: torch.profiler.profile | None = None

        def on_step(self, run: TrainingRun, phase: Phase, line: object) -> None:
            if self.profiler is not None:
                self.profiler.__exit__(None, None, None)
                peaks[phase.name] = allocated(self.profiler)
                self.profiler = None
            if run.done % STEPS == 2:  # the third step of every phase
                cpu = [torch.profiler.ProfilerActivity.CPU]
                self.profiler = torch.profiler.profile(activities=cpu, profile_memory=True)
                self.profiler.__enter__()

    with contextlib.redirect_stdout(io.StringIO()):
        loop.train(settings, "never", callbacks=[Profile()])
    return peaks


def allocated(profiler: torch.profiler.profile) -> int:
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        profiler.export_chrome_trace(file.name)
        events = [
            e for e in json.loads(Path(file.name).read_text())["traceEvents"] if e["name"] == "[memory]"
        ]
    total = peak = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        total += event["args"]["Bytes"]
        peak = max(peak, total)
    return peak


def peak(plan: estimate.Estimate, peaks: dict[str, int]) -> str:
    held, rows = plan.memory["ddp"], []
    for phase in plan.phases:
        kept = BATCH * phase.work.activation_bytes + phase.work.batch_bytes
        found = peaks[phase.name]
        parts = [kept, held["images"], held["gradients"], found]
        errors = [f"{predicted / found - 1:+.0%}" for predicted in (sum(parts[:2]), sum(parts[:3]))]
        rows.append([phase.name, *(f"{size / 1e6:.1f}" for size in parts), *errors])
    columns = [
        "phase",
        "activations",
        "images",
        "gradients",
        "measured peak",
        "error of the first two",
        "of all three",
    ]
    return (
        f"## Memory of a step, MB\n\n{table(columns, rows)}\nWhat the allocator had out at most during one step, "
        "beyond weights, optimizer and teacher, which are there before it (torch.profiler). The plan counts all "
        "three, as DDP holds all gradients in every phase; one process has those of trained layers, and deep layers' "
        "while the shallow ones' activations are still there. Buffers of single operations are in the peak alone."
    )


def stored(settings: config.Config, folder: Path) -> dict[str, int]:
    """Bytes on the disk of the targets of one view of all images, by target, as `indistill targets` writes them."""
    one_view = settings.data.augment.model_copy(update={"views": 1})
    cached = settings.model_copy(
        update={
            "data": settings.data.model_copy(update={"augment": one_view}),
            "targets": config.Targets(source="cached", dir=str(folder)),
        }
    )
    with contextlib.redirect_stdout(io.StringIO()):
        commands_targets.write(cached)
    fields = sorted(path for path in (folder / "view-000").iterdir())
    return {path.name: sum(file.stat().st_size for file in path.iterdir()) for path in fields}


def targets(plan: estimate.Estimate, files: dict[str, int]) -> str:
    records = {name: size for phase in plan.phases for name, size in phase.record_bytes.items()}
    rows = []
    for name in sorted(records.keys() | files.keys()):
        predicted, found = records.get(name, 0) * plan.samples, files.get(name, 0)
        rows.append([name, f"{predicted:,}", f"{found:,}"])
    return (
        f"## Bytes of cached targets\n\n{table(['target', 'predicted', 'measured'], rows)}\nOne view of "
        f"{plan.samples} images, in float32: what `indistill targets` leaves on the disk."
    )


if __name__ == "__main__":
    main()
