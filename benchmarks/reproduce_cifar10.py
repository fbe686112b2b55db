"""Does InDistill help? Its CIFAR-10 experiment with baselines and ablations, several seeds each.

    make reproduce-cifar10 [DATA=../shared/data] [ARGS="--seeds 3 --jobs 2"]

Method: benchmarks/README.md. What was interrupted goes on where it was; what is done is not repeated.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import multiprocessing
import os
import platform
import shlex
import statistics
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor, wait
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from indistill import config
from indistill.config import Config, UserError

REPOSITORY = Path(__file__).resolve().parents[1]
CONFIG = REPOSITORY / "configs" / "cifar10_indistill_pkt.yaml"
RESULT = REPOSITORY / "benchmarks" / "results" / "cifar10.md"
RUNS = REPOSITORY / "runs" / "reproduce_cifar10"
LIBRARIES = ("indistill", "torch", "timm", "accelerate", "numpy")
FULL_EPOCHS = 70  # of the authors; shorter runs have the same shares
STEPS_PER_EPOCH = 390  # 50,000 images, 128 a step
EPOCHS = 12  # 8 methods x 3 seeds in 90 minutes on two cores
PROGRESS_SECONDS = 30

METRICS = {  # of summary.json, in the table's order
    "map_cosine_authors": "mAP, cosine, authors'",
    "map_l2_authors": "mAP, l2, authors'",
    "map_cosine": "mAP, cosine, interpolated",
    "map_l2": "mAP, l2, interpolated",
    "top1": "top-1",
}


class Method(NamedTuple):
    title: str
    overrides: tuple[str, ...] = ()  # of the base config, which is InDistill + PKT
    warmup: bool = True


KD = "kd.losses=[{name: ce}, {name: kd, temperature: 4}]"
METHODS = {
    "alone": Method("student alone", ("teacher=null", "kd.losses=[{name: ce}]"), warmup=False),
    "pkt": Method("PKT", warmup=False),
    "information_flow": Method("information flow (2005.00727)", warmup=False),
    "indistill_pkt": Method("**InDistill + PKT**"),
    "indistill_kd": Method("**InDistill + KD**", (KD,)),
    "reversed": Method("InDistill + PKT, deep to shallow", ("warmup.curriculum=reversed",)),
    "all_at_once": Method("InDistill + PKT, all pairs at once", ("warmup.curriculum=all_at_once",)),
    "random_pruning": Method("InDistill + PKT, channels by chance", ("warmup.prune.criterion=random",)),
}


class Run(NamedTuple):
    method: str
    seed: int
    epochs: float
    data: Path
    out: Path

    @property
    def dir(self) -> Path:
        return self.out / f"{self.method}-seed{self.seed}"

    def settings(self) -> Config:
        method = METHODS[self.method]
        overrides = [
            f"run_dir={self.dir}",
            f"seed={self.seed}",
            f"duration={self.epochs} epochs",
            f"data.root={self.data / 'cifar10'}",
            f"data.cache_dir={self.out / 'indices'}",
            f"teacher.checkpoint={self.data / 'published' / 'auxiliary_cifar10.pt'}",
            f"checkpoint.every_steps={STEPS_PER_EPOCH}",
            "kd.lr=0.001",  # the authors' rate
            "evaluate.similarity_samples=0",
            "trackers=[]",
        ]
        # The authors' phases: 3, 4 and 5 epochs of warm-up; a tenth of the rate from epoch 60 on.
        if method.warmup:
            overrides.append(f"warmup.durations=[{share(3)}, {share(4)}, {share(5)}]")
        else:
            overrides.append("warmup=null")
        overrides.append(f"kd.schedule.decay_at=[{share(60 - 12 * method.warmup)}]")  # since the warm-up's end
        if self.method == "information_flow":  # whose weight falls to 0.7 in a 70th of the run
            decay = 0.7 ** (FULL_EPOCHS / self.epochs)
            overrides.append(f"kd.losses=[{{name: information_flow, init: 100, decay: {decay:.6g}}}]")
        return config.load(CONFIG, [*overrides, *method.overrides])

    def summary(self) -> dict | None:
        """What the run ended with; None if it has not ended. Raises UserError if the directory holds another run."""
        saved, summary = self.dir / "config.yaml", self.dir / "summary.json"
        if saved.exists() and (difference := config.difference(config.load(saved), self.settings())):
            raise UserError(f"{self.dir} holds a run of another config ({difference}): choose another --out")
        return json.loads(summary.read_text()) if summary.exists() else None

    def step(self) -> int:
        """How far it is."""
        path = self.dir / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        with contextlib.suppress(IndexError, json.JSONDecodeError):  # nothing yet, or a line half written
            return json.loads(lines[-1])["step"]
        return 0


def share(full_epochs: float) -> str:
    return f"{100 * full_epochs / FULL_EPOCHS:.8f} percent"


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    runs = [
        Run(method, seed, arguments.epochs, arguments.data.absolute(), arguments.out.absolute())
        for seed in range(arguments.seeds)  # outside, so that an early look has all methods
        for method in arguments.methods
    ]
    try:
        for path in ("cifar10/cifar10-train-0000.tar.gz", "published/auxiliary_cifar10.pt"):
            if not (arguments.data / path).exists():
                raise UserError(f"no {arguments.data / path}: name the folder that has it with DATA or --data")
        begun = sum(run.step() > 0 for run in runs)
        begin = time.perf_counter()
        carry_out([run for run in runs if not run.summary()], arguments.jobs)
        minutes = (time.perf_counter() - begin) / 60
        text = report(runs, arguments, minutes, begun)
    except UserError as error:
        print(f"reproduce_cifar10: {error}", file=sys.stderr)
        return 2
    result = RESULT if arguments.out.absolute() == RUNS else arguments.out / "cifar10.md"
    result.parent.mkdir(parents=True, exist_ok=True)
    result.write_text(text)
    print(f"\n{text}\nWritten to {result}")
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data",
        type=Path,
        default=os.environ.get("DATA", REPOSITORY.parent / "shared" / "data"),
        help="folder with cifar10/ and published/; default: the environment's DATA, else ../shared/data",
    )
    parser.add_argument("--epochs", type=float, default=EPOCHS, help="of each run, in the authors' shares")
    parser.add_argument("--full", action="store_true", help=f"the authors' {FULL_EPOCHS} epochs")
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 0")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, each on one core (or all on one GPU)")
    parser.add_argument("--out", type=Path, default=RUNS, help="the runs; given, the table goes there too")
    arguments = parser.parse_args(argv)
    if arguments.epochs <= 0 or arguments.seeds < 1 or arguments.jobs < 1:
        parser.error("--epochs, --seeds and --jobs must be positive")
    if arguments.full:
        arguments.epochs = FULL_EPOCHS
    return arguments


# --- running ---------------------------------------------------------------------------------------------------------


def carry_out(runs: list[Run], jobs: int) -> None:
    """Each run once, `jobs` at a time, each process with one thread. Raises what a run raises."""
    if not runs:
        return
    print(f"{len(runs)} runs, {jobs} at a time, in {runs[0].out}", flush=True)
    os.environ["OMP_NUM_THREADS"] = "1"  # read when the workers import torch
    steps_before, begin = sum(run.step() for run in runs), time.perf_counter()
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(jobs, len(runs)), mp_context=spawn, initializer=end_with_parent)
    pending = {pool.submit(train, run): run for run in runs}
    try:
        while pending:
            done, _ = wait(pending, timeout=PROGRESS_SECONDS, return_when="FIRST_COMPLETED")
            for future in done:
                future.result()
                print(f"done: {pending.pop(future).dir.name}", flush=True)
            show(runs, steps_before, time.perf_counter() - begin)
    except BaseException:  # a mistake in one is a mistake in all; Ctrl-C too ends all
        pool.shutdown(wait=False, cancel_futures=True)
        for process in list(pool._processes.values()):
            process.kill()
        raise
    pool.shutdown()


def show(runs: list[Run], steps_before: int, seconds: float) -> None:
    finished = [run for run in runs if (run.dir / "summary.json").exists()]
    active = [run for run in runs if run not in finished and run.dir.exists()]
    steps = sum(run.step() for run in runs)
    total = sum(total_steps(run) for run in runs)
    left = f", {(total - steps) / (steps - steps_before) * seconds / 60:.0f} min left" if steps > steps_before else ""
    places = ((run.dir.name, run.step(), total_steps(run)) for run in active)
    where = ", ".join(f"{name} {f'at step {step} of {of}' if step < of else 'is scored'}" for name, step, of in places)
    print(f"{len(finished)} of {len(runs)} runs{left}{': ' * bool(where)}{where}", flush=True)


def total_steps(run: Run) -> int:
    return config.to_steps(f"{run.epochs} epochs", STEPS_PER_EPOCH, global_batch=128)


def end_with_parent() -> None:
    """Else a worker whose parent is killed would train on, beside the one that takes its place."""
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def train(run: Run) -> None:
    """One run, from its newest checkpoint, as `indistill train` does it. What it prints goes to log.txt."""
    from indistill.train import train as train_to_the_end  # seconds, once per process

    run.dir.mkdir(parents=True, exist_ok=True)
    with (run.dir / "log.txt").open("a") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        train_to_the_end(run.settings(), resume="auto")


# --- the table -------------------------------------------------------------------------------------------------------


def report(runs: list[Run], arguments: argparse.Namespace, minutes: float, begun: int) -> str:
    summaries = {run: run.summary() for run in runs}
    rows = []
    for method in arguments.methods:
        of_method = [summary for run, summary in summaries.items() if run.method == method]
        scores = [mean_and_deviation([s["metrics"].get(metric) for s in of_method]) for metric in METRICS]
        seconds = statistics.mean(s["seconds"] for s in of_method)
        rows.append([METHODS[method].title, *scores, f"{seconds:.0f}"])
    load = " ".join(f"{value:.1f}" for value in os.getloadavg())
    command = shlex.join(["python", "benchmarks/reproduce_cifar10.py", *sys.argv[1:]])
    earlier = f", without what {begun} of them had done before" * bool(begun)
    columns = ["%, mean ± standard deviation", *METRICS.values(), "seconds of training"]
    return f"""# CIFAR-10: InDistill, its baselines and ablations

`{command}`,
{datetime.date.today()}, {machine()}, {os.cpu_count()} cores, {platform.system()} {platform.machine()},
Python {platform.python_version()}, {arguments.jobs} at a time; load average {load} at the end.
{", ".join(f"{name} {version(name)}" for name in LIBRARIES)}.
{arguments.epochs:g} epochs a run, {arguments.seeds} seeds; {len(runs)} runs in {minutes:.0f} minutes{earlier}.

{table(columns, rows)}"""


def mean_and_deviation(scores: list[float | None]) -> str:
    """In percent; the deviation is the sample's (n - 1). Nothing for what the method does not train."""
    if None in scores:
        return ""
    percent = [100 * score for score in scores]
    deviation = f" ± {statistics.stdev(percent):.2f}" if len(percent) > 1 else ""
    return f"{statistics.mean(percent):.2f}{deviation}"


def machine() -> str:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return platform.processor()


def table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
