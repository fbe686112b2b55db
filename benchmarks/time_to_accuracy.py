"""Compare the cost at which students reach a given accuracy: alone, by KD, by InDistill, with other tools.

    OMP_NUM_THREADS=1 python benchmarks/time_to_accuracy.py --teacher FILE --data FOLDER --peers FOLDER

See benchmarks/README.md for the method. A finished contestant is a line in the folder of `--runs` and is not
repeated. Prints its tables and writes them to benchmarks/results/time_to_accuracy.md.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import multiprocessing
import os
import shutil
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from string import Template
from typing import Any

import study
import timm
import torch
from peers import STEPS
from report import RESULTS, heading, table
from safetensors.torch import save_model
from torch.utils.flop_counter import FlopCounterMode

from indistill import Callback, Trainer, config
from indistill.commands.report import page  # noqa: F401  # imported here, so that no training waits for it
from indistill.curriculum import Phase
from indistill.training import loop, optim, parts
from indistill.training import runs as _runs  # noqa: F401

STUDY = Path(__file__).parent / "studies" / "imagenette_cnn.yaml"
RESULT = RESULTS / "time_to_accuracy.md"
LIBRARIES = ("torch", "timm", "accelerate", "torchdistill")
TITLES = {
    "alone": "student alone",
    "kd": "KD, live teacher",
    "stored": "KD, stored targets",
    "indistill": "InDistill + KD, sequential",
    "all_at_once": "InDistill + KD, all pairs at once",
    "students": "three students at once, each",
    "timm": "timm, KD",
    "torchdistill": "torchdistill, KD",
}
ORDER = ("alone", "kd", "targets", "stored", "timm", "torchdistill", "indistill", "all_at_once", "students")
SAME = ("stored", "students", "timm", "torchdistill")  # these must compute what `kd` computes
METHODS = {"alone": "alone", "indistill": "kd_warmup", "all_at_once": "kd_all_at_once"}  # others: `kd`
STUDENTS = 3
FIRST = 10  # steps whose losses are compared
CLOSE, DRIFT = 1e-4, 1e-2  # relative difference allowed in the first step, and in the first ten

Line = dict[str, Any]


# --- measuring ----------------------------------------------------------------------------------------------


class Clock(Callback):
    """Records CPU time and operations up to each evaluation, the scores, and the first losses.

    Evaluations do not count. The clock starts with the first step. The operations of a phase's first step
    stand for all steps of that phase, because these do the same. Several students share one clock.
    """

    def __init__(self) -> None:
        self.started: float | None = None
        self.stopped = 0.0  # the process's CPU seconds after the last step
        self.aside = 0.0  # CPU seconds of evaluations
        self.counter: FlopCounterMode | None = None
        self.counted: dict[tuple[str, str], int] = {}  # FLOP of a step, by run and phase
        self.flop = 0
        self.losses: dict[str, list[float]] = {}
        self.ends: dict[str, list[float]] = {}  # CPU seconds up to the end of each step
        self.points: dict[str, list[dict[str, float]]] = {}

    def on_step_begin(self, run: Any, phase: Phase) -> None:
        self.started = self.started or time.process_time()
        if (run.settings.run_dir, phase.name) not in self.counted:
            self.counter = FlopCounterMode(display=False)
            self.counter.__enter__()

    def on_step(self, run: Any, phase: Phase, line: object) -> None:
        name = run.settings.run_dir
        if self.counter is not None:
            self.counter.__exit__(None, None, None)
            self.counted[name, phase.name] = self.counter.get_total_flops()
            self.counter = None
        self.flop += self.counted[name, phase.name]
        losses = self.losses.setdefault(name, [])
        if len(losses) < FIRST:
            losses.append(float(run.loss))
        self.stopped = time.process_time()
        self.ends.setdefault(name, []).append(self.stopped - self.aside)

    def on_evaluation(self, run: Any, scores: dict[str, float]) -> None:
        assert self.started is not None  # an evaluation follows a step
        point = {"top1": scores["top1"], "cpu": self.stopped - self.started - self.aside, "flop": self.flop}
        self.points.setdefault(run.settings.run_dir, []).append(point)
        self.aside += time.process_time() - self.stopped

    def line(self) -> Line:
        """Return what was recorded. Several students are listed in the order of the config."""
        ends = next(iter(self.ends.values()))
        last = ends[-len(ends) // len(next(iter(self.points.values()))) :]  # epoch
        steps = [after - before for before, after in itertools.pairwise(last)]
        return {
            "points": list(self.points.values()),
            "losses": list(self.losses.values()),
            "step": statistics.quantiles(steps, n=10)[0],
        }


def contest(name: str, arguments: argparse.Namespace) -> Line:
    """Train one contestant in this process, or store the targets, and return its line."""
    torch.set_num_threads(1)
    load, clock = os.getloadavg()[0], Clock()
    folder = arguments.runs / name
    shutil.rmtree(folder, ignore_errors=True)  # of an interrupted benchmark
    tree = settings_of(name, arguments)
    with open(arguments.runs / f"{name}.txt", "w") as log, contextlib.redirect_stdout(log):
        if name == "targets":
            begin = time.process_time()
            Trainer(tree).write_targets()
            return {"contestant": name, "load": load, "cpu": time.process_time() - begin}
        if name in STEPS:
            sys.path += [arguments.peers] if arguments.peers else []
            train_peer(name, Trainer(tree).settings, clock)
        else:
            Trainer(tree).train("never", [clock])
    return {"contestant": name, "load": load, **clock.line()}


# --- contestants --------------------------------------------------------------------------------------------


def settings_of(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the config of a contestant: the study's method, evaluated after each epoch, without workers."""
    of_study = study.load(STUDY)
    method = of_study.methods[METHODS.get(name, "kd")]
    texts = [*of_study.overrides, *method.overrides, *(of_study.quick.overrides if arguments.quick else ())]
    texts = [Template(text).safe_substitute(seed=0) for text in texts]
    texts += ["seed=0", f"duration={arguments.epochs} epochs", f"data.root={arguments.data}"]
    texts += [f"data.augment.views={arguments.views}", "data.workers=0", "evaluate.every=1 epochs"]
    texts += ["checkpoint={every_steps: null, keep_best: 0}", "trackers=[]"]
    texts += [f"run_dir={arguments.runs / name}", f"data.cache_dir={arguments.runs / 'indices'}"]
    if name in ("stored", "targets"):
        texts.append(f"targets.dir={arguments.runs / 'targets'}")
    else:
        texts.append("targets={source: live}")
    if name != "alone":
        texts.append(f"teacher.checkpoint={arguments.teacher}")
    tree = config.read(STUDY.parent / of_study.config, texts)
    if name == "students":
        student = tree.pop("student")
        tree["students"] = [
            {"name": f"student{i}", "student": student | initial(student, i, arguments.runs)}
            for i in range(STUDENTS)
        ]
    return tree


def initial(student: dict[str, Any], i: int, folder: Path) -> dict[str, Any]:
    """Return the key of other initial weights, written to a file; the first student keeps the seed's."""
    if i == 0:
        return {}
    torch.manual_seed(i)
    file = folder / f"initial{i}.safetensors"
    save_model(timm.create_model(student["name"], num_classes=10, **student["kwargs"]), str(file))
    return {"checkpoint": str(file)}


def train_peer(name: str, settings: config.Config, clock: Clock) -> None:
    """Train with another tool on indistill's batches, with its initial weights, optimizer and rates."""
    run = loop.Run(settings, "never")
    run.build()
    teacher = parts.create_teacher(settings).eval()
    optimizer = optim.create(run.student, settings.optimizer, fused=True)
    rates = optim.PhaseOptim(optimizer, settings, run.timetable)
    step = STEPS[name](teacher, run.student, optimizer)
    phase, sets = run.pace.curriculum.at(0), {"eval_sets": run.eval_sets, "bank": None}
    for batch in run.batches:
        clock.on_step_begin(run, phase)
        rates.begin_step(run.done, phase)
        run.loss = step(run.student.normalise(batch.images), batch.labels)
        run.done += 1
        clock.on_step(run, phase, None)
        if run.timetable.evaluate_at(run.done):
            (scores,) = loop.evaluation(run.accelerator, settings, student=run.student, teacher=None, **sets)
            clock.on_evaluation(run, scores)


# --- the report ---------------------------------------------------------------------------------------------


def check(lines: dict[str, Line]) -> str:
    """Return the differences from KD's first losses. Raises SystemExit if one of them is too large."""
    parts_of = []
    for name in SAME:
        if name not in lines:
            continue
        pairs = zip(lines[name]["losses"][0], lines["kd"]["losses"][0], strict=True)
        errors = [abs(theirs / ours - 1) for theirs, ours in pairs]
        parts_of.append(f"{TITLES[name]} {errors[0]:.1e} and {max(errors):.1e}")
        if errors[0] > CLOSE or max(errors) > DRIFT:
            raise SystemExit(f"time_to_accuracy: {name} does not compute the same KD: {parts_of[-1]}")
    return f"First loss, and first {FIRST}: relative difference from KD's: {'; '.join(parts_of)}.\n"


def curves(lines: dict[str, Line], arguments: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    """Return the points of each row of the table, by its title, per student."""
    rows: dict[str, list[dict[str, float]]] = {}
    for name, title in TITLES.items():
        if name not in lines:
            continue
        share = STUDENTS if name == "students" else 1
        points = lines[name]["points"][0]
        # Of several students, the first one's score, and the cost when the last one is there.
        points = [last | {"top1": p["top1"]} for p, last in zip(points, lines[name]["points"][-1])]
        costs = [{"cpu": p["cpu"] / share, "flop": p["flop"] / share} for p in points]
        step = {"step": lines[name]["step"] / share}
        rows[title] = [p | of_student | step for p, of_student in zip(points, costs)]
        if name == "stored" and "targets" in lines:
            cpu = lines["targets"]["cpu"]
            flop = (lines["kd"]["points"][0][-1]["flop"] - points[-1]["flop"]) / arguments.epochs
            rows["the same, and storing them"] = [
                p | {"cpu": p["cpu"] + cpu, "flop": p["flop"] + flop * arguments.views} for p in rows[title]
            ]
    return rows


def cost(point: dict[str, float] | None) -> list[str]:
    """Return core-hours and TFLOP as cells; a threshold that was not reached has none."""
    return ["-", "-"] if point is None else [f"{point['cpu'] / 3600:.4f}", f"{point['flop'] / 1e12:.2f}"]


def report(lines: dict[str, Line], arguments: argparse.Namespace, begin: str) -> str:
    rows = curves(lines, arguments)
    texts = [begin, METHOD.format(**vars(arguments)), summary(rows)]
    texts.append("## Top-1, % / core-hours / TFLOP after each epoch\n")
    cells = [
        [title, *(" / ".join([percent(p["top1"]), *cost(p)]) for p in points)]
        for title, points in rows.items()
    ]
    texts.append(table(["", *(str(i + 1) for i in range(arguments.epochs))], cells))
    if "students" in lines:
        finals = ", ".join(percent(points[-1]["top1"]) for points in lines["students"]["points"])
        texts.append(f"Final top-1 of the three students, which begin with other weights: {finals} %.\n")
    texts += [check(lines)] if "kd" in lines else []
    loads = [f"{name} {line['load']:.1f}" for name, line in lines.items()]
    texts.append(f"Load average when each began: {', '.join(loads)}.\n")
    return "\n".join(texts)


def summary(rows: dict[str, list[dict[str, float]]]) -> str:
    """Return the table of the costs of all epochs, and of those until the two scores are reached."""
    ends = {"alone's": "alone", "KD's": "kd"}
    goals = {of: rows[TITLES[name]][-1]["top1"] for of, name in ends.items() if TITLES[name] in rows}
    columns = ["", "top-1, %", "core-hours", "TFLOP"]
    for of, goal in goals.items():
        columns += [f"core-hours to {of} {percent(goal)} %", "TFLOP to that"]
    cells = []
    for title, points in rows.items():
        reached = [next((p for p in points if p["top1"] >= goal), None) for goal in goals.values()]
        costs = [cell for point in (points[-1], *reached) for cell in cost(point)]
        cells.append([title, percent(points[-1]["top1"]), *costs, f"{1000 * points[-1]['step']:.0f}"])
    return table([*columns, "ms per step"], cells)


def percent(score: float) -> str:
    return f"{100 * score:.1f}"


METHOD = """A ResNet of 0.5 M parameters, taught by EfficientNet-Lite0, Imagenette at 96 pixels, {epochs}
epochs with {views} views of each image, batches of 64, AdamW, one seed, one thread.
CPU time of the process from the first step on, with the loading of images and without evaluations; the
time of a step is the fastest tenth of the last epoch's, which other processes affect least.
Operations are counted in one step of each phase (torch.utils.flop_counter), a multiply-add as two.
"""


# --- running ------------------------------------------------------------------------------------------------


def main() -> None:
    arguments = parse()
    sys.path += [arguments.peers] if arguments.peers else []
    command = "OMP_NUM_THREADS=1 python benchmarks/time_to_accuracy.py --teacher FILE --data FOLDER"
    command += f" --peers FOLDER --epochs {arguments.epochs} --views {arguments.views}"
    begin = heading("Time to a given accuracy", command, LIBRARIES)
    arguments.runs.mkdir(parents=True, exist_ok=True)
    file = arguments.runs / "lines.jsonl"
    known = [json.loads(text) for text in file.read_text().splitlines()] if file.exists() else []
    lines: dict[str, Line] = {line["contestant"]: line for line in known}
    spawn = multiprocessing.get_context("spawn")
    for name in [name for name in ORDER if name in arguments.only]:
        if name not in lines:
            print(f"time_to_accuracy: {name}", file=sys.stderr, flush=True)
            with ProcessPoolExecutor(1, mp_context=spawn) as pool:  # a process of its own
                lines[name] = pool.submit(contest, name, arguments).result()
            with file.open("a") as appended:
                appended.write(json.dumps(lines[name]) + "\n")
        if "kd" in lines:  # with which the others are compared
            text = report(lines, arguments, begin)  # at once, in case the benchmark is interrupted
            (arguments.runs / RESULT.name if arguments.quick else RESULT).write_text(text)
    print(text if "kd" in lines else "time_to_accuracy: the tables need the contestant kd")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--teacher", type=Path, required=True, help="the study's teacher, a safetensors file")
    parser.add_argument("--data", type=Path, required=True, help="folder of Imagenette's shards")
    parser.add_argument("--peers", help="folder in which torchdistill is installed, as for step.py")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--views", type=int, default=2, help="different views of each image, also stored")
    parser.add_argument("--runs", type=Path, help="folder of lines and runs (default: in runs/)")
    parser.add_argument("--only", nargs="+", choices=ORDER, default=ORDER, help="contestants")
    parser.add_argument(
        "--quick", action="store_true", help="one epoch of one shard, to check that all works"
    )
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.epochs = arguments.views = 1
    name = "quick" if arguments.quick else f"{arguments.epochs}epochs-{arguments.views}views"
    arguments.runs = (arguments.runs or study.RUNS / "time_to_accuracy") / name
    arguments.runs = arguments.runs.absolute()
    return arguments


if __name__ == "__main__":
    main()
