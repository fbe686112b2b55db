"""Compare the predictions of `indistill plan` with the training that follows.

    OMP_NUM_THREADS=1 python benchmarks/plan_check.py [--rounds 4]

See benchmarks/README.md for the method. Prints its tables and writes them to
benchmarks/results/plan_check.md, or plan_check_progressive.md.
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
from indistill.commands.plan import estimate
from indistill.commands.targets.write import write
from indistill.curriculum import Phase
from indistill.training import loop
from indistill.training.callbacks import TrainingRun

SIZE, BATCH, STEPS, LAST = 96, 16, 5, 6
RESULT = RESULTS / "plan_check.md"
GROWING_RESULT = RESULTS / "plan_check_progressive.md"
GROWING = {
    "from": 128,
    "to": 224,
    "until": "70 percent",
}  # as in docs/data.md
GROWING_BATCH, GROWING_STEPS = 8, 60


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--progressive", action="store_true", help="time images of each size instead")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.progressive:
        GROWING_RESULT.write_text(progressive(arguments.rounds))
        print(GROWING_RESULT.read_text())
        return
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
        f"ResNet-34 to a ResNet-18 of half the width, {BATCH} images of {SIZE} pixels per step, one process "
        f"and thread, float32, {arguments.rounds} runs of {4 * STEPS + LAST} steps.",
        times(plan, runs),
        peak(plan, peaks),
        targets(plan, files),
    ]
    RESULT.write_text("\n\n".join(parts) + "\n")
    print(RESULT.read_text())


def at(settings: config.Config, run_dir: Path) -> config.Config:
    return settings.model_copy(update={"run_dir": str(run_dir)})


def times(plan: estimate.Estimate, runs: list[list[recorded.Step]]) -> str:
    """Compare CPU seconds per step with those predicted from the rate of operations measured in KD."""
    measured: dict[str, list[float]] = {phase.name: [] for phase in plan.phases}
    for steps in runs:
        for before, step in recorded.within_phases(steps):
            measured[step.phase].append(step.cpu - before.cpu)
    flops = {p.name: (p.work.teacher_flops + p.work.student_flops) * BATCH for p in plan.phases}
    last = plan.phases[-1].name
    rate = flops[last] / statistics.median(measured[last])
    rows, errors = [], []
    for name, seconds in measured.items():
        measured_seconds = statistics.median(seconds)
        predicted = flops[name] / rate
        errors.append(predicted / measured_seconds - 1)
        spread = f"{min(seconds):.3f} to {max(seconds):.3f}"
        error = "calibrated" if name == last else f"{errors[-1]:+.0%}"
        shown = [f"{flops[name] / 1e9:.2f}", f"{predicted:.3f}", f"{measured_seconds:.3f}"]
        rows.append([name, *shown, spread, error])
    shares = [phase.steps / plan.phases[-1].steps for phase in plan.phases]
    predicted_run = sum(flops[n] / rate * s for n, s in zip(flops, shares))
    measured_run = sum(statistics.median(measured[n]) * s for n, s in zip(flops, shares))
    columns = ["phase", "GFLOP per step", "predicted s", "measured s", "its range", "error"]
    return (
        f"## Time of a step\n\n{table(columns, rows)}\nCPU time of the process: the median over the steps of "
        f"all runs, except the first step of each phase. Only machine.flops_per_second is fitted, to {last}: "
        f"{rate:.3g}. The largest error is {max(map(abs, errors)):.0%}; that of the whole run is "
        f"{predicted_run / measured_run - 1:+.1%}."
    )


def progressive(rounds: int) -> str:
    """Compare the CPU seconds of steps at each size of a run of progressive resolution with `plan`'s."""
    size = GROWING["to"]
    command = f"python benchmarks/plan_check.py --progressive --rounds {rounds}"
    with recorded.scratch(samples=64, size=int(size)) as folder:
        tree = recorded.tree(folder, folder / "run", GROWING, GROWING_BATCH, 0, GROWING_STEPS)
        tree |= {"warmup": None, "student": {"name": "resnet18"}}
        tree["kd"] = {"losses": [{"name": "ce"}, {"name": "kd"}]}
        settings = config.parse(tree, "benchmark")
        plan = estimate.of_run(settings, world=1)
        sizes: list[str] = [phase.name.split()[-2] for phase in plan.phases for _ in range(phase.steps)]
        measured: dict[str, list[float]] = {name: [] for name in sizes}
        for i in range(rounds):
            steps = recorded.train(at(settings, folder / f"run{i}"))
            for k in range(1, len(steps)):
                if sizes[k] == sizes[k - 1]:  # the first step of a size allocates its memory
                    measured[sizes[k]].append(steps[k].cpu - steps[k - 1].cpu)
    return (
        f"{heading('Plan and run: progressive resolution', command, recorded.LIBRARIES)}\n\n"
        f"ResNet-34 to ResNet-18, {GROWING_BATCH} images per step, from {GROWING['from']} to {size} pixels "
        f"until {GROWING['until']}, one process and thread, float32, {rounds} runs of {len(sizes)} steps.\n\n"
        f"{ratios(plan, measured)}\nCPU time of the process: the median over the steps of all runs, except "
        f"the first step of each size. Ratios are to a step, or a run, with images of {size} pixels. "
        "Nothing is fitted.\n"
    )


def ratios(plan: estimate.Estimate, measured: dict[str, list[float]]) -> str:
    """The table of `progressive`, from the seconds of steps by size, in the order of the plan's phases."""
    medians = [statistics.median(seconds) for seconds in measured.values()]
    rows = []
    for phase, (name, seconds), median in zip(plan.phases, measured.items(), medians):
        predicted, found = phase.hours / phase.full_size_hours, median / medians[-1]
        spread = f"{min(seconds):.3f} to {max(seconds):.3f}"
        compared = [f"{predicted:.2f}", f"{found:.2f}", f"{predicted / found - 1:+.0%}"]
        rows.append([f"{name} px", str(phase.steps), f"{median:.3f}", spread, *compared])
    steps = sum(phase.steps for phase in plan.phases)
    predicted = sum(phase.hours for phase in plan.phases) / sum(p.full_size_hours for p in plan.phases)
    found = sum(phase.steps * median for phase, median in zip(plan.phases, medians)) / (steps * medians[-1])
    rows.append(
        ["run", str(steps), "", "", f"{predicted:.2f}", f"{found:.2f}", f"{predicted / found - 1:+.0%}"]
    )
    columns = ["images", "steps", "CPU s per step", "its range", "plan's ratio", "measured ratio", "error"]
    return table(columns, rows)


def memory(settings: config.Config) -> dict[str, int]:
    """Return the peak of CPU memory allocated during one step of each phase, less that before the step."""
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
    held = plan.memory["ddp"]
    rows = []
    for phase in plan.phases:
        kept = BATCH * phase.work.activation_bytes + phase.work.batch_bytes
        measured = peaks[phase.name]
        parts = [kept, held["images"], held["gradients"], measured]
        errors = [f"{predicted / measured - 1:+.0%}" for predicted in (sum(parts[:2]), sum(parts[:3]))]
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
        f"## Memory of a step, MB\n\n{table(columns, rows)}\nThe measured peak is the most memory that was "
        "allocated during one step, less weights, optimizer and teacher, which are allocated before "
        "(torch.profiler). The plan counts all three columns, because DDP holds all gradients in every "
        "phase. A single process holds only the gradients of trained layers, those of deep layers at the "
        "same time as the activations of shallow ones. Buffers of single operations are only in the "
        "measured peak."
    )


def stored(settings: config.Config, folder: Path) -> dict[str, int]:
    """Write one view of all images as `indistill targets` does; return the bytes on disk by target."""
    one_view = settings.data.augment.model_copy(update={"views": 1})
    cached = settings.model_copy(
        update={
            "data": settings.data.model_copy(update={"augment": one_view}),
            "targets": config.Targets(source="cached", dir=str(folder)),
        }
    )
    with contextlib.redirect_stdout(io.StringIO()):
        write(cached)
    fields = sorted(path for path in (folder / "view-000").iterdir())
    return {path.name: sum(file.stat().st_size for file in path.iterdir()) for path in fields}


def targets(plan: estimate.Estimate, files: dict[str, int]) -> str:
    records = {name: size for phase in plan.phases for name, size in phase.record_bytes.items()}
    rows = []
    for name in sorted(records.keys() | files.keys()):
        predicted = records.get(name, 0) * plan.samples
        rows.append([name, f"{predicted:,}", f"{files.get(name, 0):,}"])
    return (
        f"## Bytes of cached targets\n\n{table(['target', 'predicted', 'measured'], rows)}\nOne view of "
        f"{plan.samples} images in float32, as written by `indistill targets`."
    )


if __name__ == "__main__":
    main()
