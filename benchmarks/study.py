"""Run a study: methods x seeds x epochs x rates on one config, with a table and a plot of the scores.

    python benchmarks/study.py benchmarks/studies/cifar10_retrieval.yaml [--jobs 2]

An interrupted run resumes from its checkpoint. A finished run is a JSON line in benchmarks/results/studies/
and is not repeated, so these lines are enough to continue a study on another machine. See
benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import platform
import re
import statistics
import subprocess  # nosec B404  # for git
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from html import escape
from importlib.metadata import version
from pathlib import Path
from string import Template
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, ValidationError, model_validator

from indistill import Trainer, UserError, config

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = REPOSITORY / "benchmarks" / "results" / "studies"
RUNS = REPOSITORY / "runs"
LIBRARIES = ("indistill", "torch", "timm", "accelerate", "numpy")
OPERATIONAL = ("run_dir", "checkpoint", "log", "trackers")  # top-level keys that do not affect scores
PROGRESS_SECONDS = 60
CONFIDENCE = 0.95

Line = dict[str, Any]


# --- the study ----------------------------------------------------------------------------------------------


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Method(Section):
    title: str
    # `key.sub=value`, with $data, $runs, $seed, $epochs and $rate; applied after those of the study
    overrides: list[str] = []
    baseline: str | None = None  # the method to compare with; None: the study's baseline


class Prepared(Section):
    """A run with seed 0 whose weights the methods read from `$runs/NAME`."""

    epochs: PositiveFloat
    overrides: list[str] = []


class Targets(Section):
    """A config whose targets are stored first, once for each seed, with all that the methods read."""

    overrides: list[str]


class Cells(Section):
    """Every combination of these values. Seeds vary slowest, so that early results cover all methods."""

    methods: list[str]
    epochs: list[PositiveFloat]
    rates: list[PositiveFloat | None] = [None]


class Quick(Section):
    """The changes made by `--quick`, which checks that everything works."""

    epochs: PositiveFloat  # at most this many for each run
    overrides: list[str] = []


class Study(Section):
    title: str
    config: str  # relative to the study's file
    overrides: list[str] = []
    prepare: dict[str, Prepared] = {}  # run first, in this order
    targets: Targets | None = None
    methods: dict[str, Method]
    baseline: str
    seeds: list[int] = Field(min_length=1)
    cells: list[Cells]  # in the order in which they run
    # name in summary.json: title; the first is compared and plotted
    metrics: dict[str, str] = Field(min_length=1)
    quick: Quick

    @model_validator(mode="after")
    def _check_names(self) -> Study:
        named = [self.baseline, *(method.baseline for method in self.methods.values())]
        named += [name for cells in self.cells for name in cells.methods]
        if both := {*self.prepare, "targets"} & self.methods.keys():
            raise ValueError(f"{min(both)} is a method, and something to prepare: choose another name")
        for name in named:
            if name is not None and name not in self.methods:
                raise ValueError(f"{name} is not among the methods ({', '.join(self.methods)})")
        return self


@dataclass(frozen=True, eq=False)
class Run:
    study: Study
    path: Path  # the study's file
    method: str  # name of a method or of a prepared run
    seed: int
    epochs: float
    rate: float | None
    quick: bool
    runs: Path
    data: Path
    weights: Path

    @property
    def key(self) -> tuple[str, int, float, float | None]:
        return self.method, self.seed, self.epochs, self.rate

    @property
    def directory(self) -> Path:
        if self.method in self.study.prepare:
            return self.runs / self.method
        rate = "" if self.rate is None else f"-rate{self.rate:g}"
        return self.runs / f"{self.method}-{self.epochs:g}epochs{rate}-seed{self.seed}"

    @property
    def base(self) -> Path:
        return self.path.parent / self.study.config

    @property
    def reads_targets(self) -> bool:
        targets = config.read(self.base, self.templates()).get("targets") or {}
        return targets.get("source") == "cached"

    def templates(self) -> list[str]:
        """Return the overrides before $data and so on are replaced; they are the same on every machine."""
        own = {**self.study.methods, **self.study.prepare, "targets": self.study.targets}[self.method]
        quick = self.study.quick.overrides if self.quick else []
        return [*self.study.overrides, "seed=$seed", "duration=$epochs epochs", *own.overrides, *quick]

    def overrides(self) -> list[str]:
        values = {"seed": self.seed, "epochs": f"{self.epochs:g}"}
        values |= {"data": self.data, "runs": self.runs, "weights": self.weights}
        if self.rate is not None:
            values["rate"] = repr(self.rate)
        try:
            texts = [Template(text).substitute(values) for text in self.templates()]
        except (KeyError, ValueError) as error:
            raise UserError(
                f"{self.path}: {self.method}: unknown variable in its overrides ({error})"
            ) from None
        return [*texts, f"run_dir={self.directory}", f"data.cache_dir={self.runs / 'indices'}", "trackers=[]"]

    def fingerprint(self) -> str:
        """Return a hash of the run's settings; a line with another hash is of an earlier state of the study.

        It covers the config as written, not as validated, so that a new key of indistill does not change it.
        """
        tree = config.read(self.base, self.templates())
        settings: list[Any] = [
            {key: value for key, value in tree.items() if key not in OPERATIONAL},
            *self.key[1:],
        ]
        if any("$runs/" in text for text in self.templates()):
            settings.append({name: one.model_dump() for name, one in self.study.prepare.items()})
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]

    def epoch(self) -> float:
        """Return the epoch that the run has reached."""
        path = self.directory / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        for text in reversed(lines):
            with contextlib.suppress(
                KeyError, json.JSONDecodeError
            ):  # a line of scores, or an incomplete line
                return json.loads(text)["epoch"]
        return 0.0


def load(path: Path) -> Study:
    try:
        return Study.model_validate(yaml.safe_load(path.read_text()))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ": ".join([str(path), ".".join(map(str, first["loc"]))]).removesuffix(": ")
        raise UserError(f"{where}: {first['msg'].removeprefix('Value error, ')}") from None


def plan(study: Study, arguments: argparse.Namespace) -> tuple[list[Run], list[Run]]:
    """Return the prepared runs and the runs of the methods, in the order in which they are carried out."""
    longest = study.quick.epochs if arguments.quick else math.inf
    folders = {
        "runs": arguments.runs / arguments.study.stem,
        "data": arguments.data,
        "weights": arguments.weights,
    }

    def run(method: str, seed: int, epochs: float, rate: float | None) -> Run:
        absolute = {name: folder.absolute() for name, folder in folders.items()}
        return Run(
            study, arguments.study, method, seed, min(epochs, longest), rate, arguments.quick, **absolute
        )

    prepared = [run(name, 0, one.epochs, None) for name, one in study.prepare.items()]
    runs = [
        run(method, seed, epochs, rate)
        for cells in study.cells
        for epochs in cells.epochs
        for rate in cells.rates
        for seed in (study.seeds[:1] if arguments.quick else study.seeds)
        for method in cells.methods
    ]
    return prepared, list({run.key: run for run in runs}.values())


def check(runs: Sequence[Run]) -> None:
    """Raise UserError for an invalid config or missing files, before any work."""
    for run in runs:
        for folder, name in re.findall(r"\$(data|weights)/([\w./-]+)", " ".join(run.templates())):
            if not (path := getattr(run, folder) / name).exists():
                raise UserError(
                    f"no {path}: name the folder that has it with --{folder} (see benchmarks/README.md)"
                )
        _ = Trainer(run.base, *run.overrides()).settings


# --- running ------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    try:
        study = load(arguments.study)
        prepared, runs = plan(study, arguments)
        results = arguments.results / f"{arguments.study.stem}.jsonl"
        finished = known(results, [*prepared, *runs])
        due = [run for run in runs if run.key not in finished]
        check([*prepared, *due] if due else [])
        live = [run for run in due if not run.reads_targets]
        stored = [run for run in due if run.reads_targets]
        longest = {run.seed: run for run in sorted(stored, key=lambda run: run.epochs)}

        def keep(line: Line) -> None:
            if (line["method"], line["seed"], line["epochs"], line["rate"]) not in finished:
                append(results, line)
                write(study, results, prepared, runs)

        for run in prepared if due else ():  # each may read the one before it
            carry_out([run], train, 1, keep)
        carry_out(live, train, arguments.jobs, keep)
        for seed, run in longest.items():  # all methods of a seed before the targets of the next
            carry_out([replace(run, method="targets")], store_targets, 1)
            carry_out([run for run in stored if run.seed == seed], train, arguments.jobs, keep)
        print(f"\n{write(study, results, prepared, runs)}\nWritten to {results.with_suffix('.md')}")
    except UserError as error:
        print(f"study: {error}", file=sys.stderr)
        return 2
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", type=Path, help="YAML file such as those in benchmarks/studies/")
    parser.add_argument(
        "--jobs", type=int, default=1, help="number of runs at a time, each on one core (or all on one GPU)"
    )
    parser.add_argument(
        "--data",
        type=Path,
        default=os.environ.get("DATA", REPOSITORY.parent / "shared" / "data"),
        help="folder of the data sets, $data in the study (default: $DATA, else ../shared/data)",
    )
    parser.add_argument(
        "--weights",
        type=Path,
        default=RUNS / "weights",
        help="folder of converted weights, $weights in the study (default: runs/weights)",
    )
    parser.add_argument("--runs", type=Path, help="folder of the runs (default: runs/studies, or runs/quick)")
    parser.add_argument(
        "--results",
        type=Path,
        help="folder of lines, tables and plots (default: benchmarks/results/studies, or RUNS)",
    )
    parser.add_argument(
        "--quick", action="store_true", help="one seed and few epochs, to check that everything works"
    )
    arguments = parser.parse_args(argv)
    if arguments.jobs < 1:
        parser.error("--jobs must be positive")
    arguments.runs = arguments.runs or RUNS / ("quick" if arguments.quick else "studies")
    arguments.results = arguments.results or (arguments.runs if arguments.quick else RESULTS)
    return arguments


def carry_out(
    runs: Sequence[Run],
    action: Callable[[Run], Any],
    jobs: int,
    keep: Callable[[Any], None] = lambda result: None,
) -> None:
    """Call `action` on each run, `jobs` at a time, in processes with one thread; raise an action's error."""
    if not runs:
        return
    print(f"{len(runs)} x {action.__name__}, {jobs} at a time, in {runs[0].runs}", flush=True)
    os.environ["OMP_NUM_THREADS"] = "1"  # read when the workers import torch
    before = {run: run.epoch() for run in runs}
    begin = time.perf_counter()
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(jobs, len(runs)), mp_context=spawn, initializer=end_with_parent)
    pending = {pool.submit(action, run): run for run in runs}
    try:
        while pending:
            done, _ = wait(pending, timeout=PROGRESS_SECONDS, return_when="FIRST_COMPLETED")
            for future in done:
                keep(future.result())
                print(f"done: {action.__name__} {pending.pop(future).directory.name}", flush=True)
            show(list(pending.values()), before, time.perf_counter() - begin)
    except BaseException:  # an error in one run ends all runs, and so does Ctrl-C
        workers = list(pool._processes.values())  # read before shutdown, which discards them
        pool.shutdown(wait=False, cancel_futures=True)
        for worker in workers:
            worker.kill()
        raise
    pool.shutdown()


def show(pending: Sequence[Run], before: dict[str, float], seconds: float) -> None:
    left = {run: run.epochs - run.epoch() for run in pending}
    done = sum(run.epochs for run in before) - sum(before.values()) - sum(left.values())
    estimate = (
        f", {sum(left.values()) / done * seconds / 60:.0f} minutes left" if done > 0.01 and pending else ""
    )
    active = [f"{run.directory.name} at epoch {run.epoch():.1f}" for run in pending if run.epoch() > 0]
    print(f"{len(pending)} runs to do{estimate}; {', '.join(active)}".removesuffix("; "), flush=True)


def end_with_parent() -> None:
    """Exit when the parent exits, so that no worker of a killed study trains on in the same directory."""
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def train(run: Run) -> Line:
    """Train, or resume from the newest checkpoint, and return the line. Output goes to log.txt."""
    marker = run.directory / "study.txt"
    run.directory.mkdir(parents=True, exist_ok=True)
    if marker.exists() and marker.read_text() != run.fingerprint():
        raise UserError(f"{run.directory} holds a run of other settings: remove it, or choose another --runs")
    marker.write_text(run.fingerprint())
    summary = run.directory / "summary.json"
    begun = summary.exists() or (run.directory / "metrics.jsonl").exists()
    begin = time.process_time()
    if not summary.exists():
        with logged(run):
            Trainer(run.base, *run.overrides()).train()
    return line(run, json.loads(summary.read_text()), None if begun else time.process_time() - begin)


def store_targets(run: Run) -> None:
    """Store the targets that the methods read with this run's seed; existing ones are kept."""
    run.directory.mkdir(parents=True, exist_ok=True)
    with logged(run):
        Trainer(run.base, *run.overrides()).write_targets()


@contextlib.contextmanager
def logged(run: Run) -> Iterator[None]:
    """Append the output of the block to the run's log.txt."""
    with (
        (run.directory / "log.txt").open("a") as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        yield


# --- the lines ----------------------------------------------------------------------------------------------


def line(run: Run, summary: dict[str, Any], cpu_seconds: float | None) -> Line:
    """Return the run's line. `cpu_seconds` includes start and evaluation; None if the run was interrupted."""
    method, seed, epochs, rate = run.key
    settings = Trainer(run.base, *run.overrides()).settings
    checkpoint = (
        Path(settings.teacher.checkpoint) if settings.teacher and settings.teacher.checkpoint else None
    )
    return {
        "method": method,
        "seed": seed,
        "epochs": epochs,
        "rate": rate,
        "fingerprint": run.fingerprint(),
        "teacher": checkpoint and hashlib.sha256(checkpoint.read_bytes()).hexdigest()[:16],
        "scores": summary["metrics"],
        "steps": summary["step"],
        "seconds": round(summary["seconds"], 1),
        "cpu_seconds": cpu_seconds and round(cpu_seconds, 1),
        "date": str(datetime.date.today()),
        "commit": commit(),
        "machine": machine(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}},
    }


def commit() -> str | None:
    """Return the commit of this repository, with a + if files differ from it; None without git."""
    command = [
        "git",
        "-C",
        str(REPOSITORY),
        "describe",
        "--always",
        "--abbrev=12",
        "--exclude=*",
        "--dirty=+",
    ]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        result = subprocess.run(command, capture_output=True, text=True, check=True)  # nosec B603  # constant
        return result.stdout.strip()
    return None


def machine() -> str:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    model = platform.processor()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return f"{model}, {os.cpu_count()} cores, {platform.system()} {platform.machine()}"


def append(results: Path, line: Line) -> None:
    results.parent.mkdir(parents=True, exist_ok=True)
    with results.open("a") as file:
        file.write(json.dumps(line) + "\n")


def known(results: Path, runs: Sequence[Run]) -> dict[tuple, Line]:
    """Return the line of each run that has one with the same settings, by the run's key."""
    fingerprints = {run.key: run.fingerprint() for run in runs}
    lines: dict[tuple, Line] = {}
    for number, text in enumerate(results.read_text().splitlines() if results.exists() else (), start=1):
        try:
            one = json.loads(text)
            key = (one["method"], one["seed"], one["epochs"], one["rate"])
        except (json.JSONDecodeError, KeyError, TypeError):
            raise UserError(f"{results}: line {number} is not a result of a run: remove it") from None
        if one["fingerprint"] == fingerprints.get(key):
            lines.setdefault(key, one)
    return lines


# --- the table and the plot ---------------------------------------------------------------------------------


def write(study: Study, results: Path, prepared: Sequence[Run], runs: Sequence[Run]) -> str:
    """Write the tables and the plot beside the lines; return the Markdown."""
    lines = known(results, runs)
    results.parent.mkdir(parents=True, exist_ok=True)
    plot = curves(study, lines)
    if plot:
        results.with_suffix(".svg").write_text(plot)
    first = known(results, prepared)
    text = report(study, lines, first, runs, results.with_suffix(".svg").name if plot else None)
    count = len(results.read_text().splitlines()) if results.exists() else 0
    if left_out := count - len(lines) - len(first):
        text += f"\nLeft out are {left_out} more lines, of other settings or of runs done twice.\n"
    results.with_suffix(".md").write_text(text)
    return text


def report(
    study: Study, lines: dict[tuple, Line], prepared: dict[tuple, Line], runs: Sequence[Run], plot: str | None
) -> str:
    metric = next(iter(study.metrics.values()))
    parts = [f"# {study.title}", f"{len(lines)} of {len(runs)} runs are finished."]
    if lines:
        parts.append(
            "Scores in %: mean ± standard deviation (n - 1) over the seeds. Differences: "
            f'"{metric}" minus that of the baseline, paired by seed, with the {100 * CONFIDENCE:g} % '
            "interval of Student's t."
        )
    for line in prepared.values():
        shown = [f"{name} {100 * value:.2f}" for name, value in line["scores"].items()]
        parts.append(
            f"Before them, `{line['method']}` was trained for {line['epochs']:g} epochs: {', '.join(shown)}."
        )
    if plot:
        parts.append(f"![{metric}, %, by epochs]({plot})")
    for epochs, rate in dict.fromkeys((run.epochs, run.rate) for run in runs):
        rows = [
            row(study, lines, method, epochs, rate)
            for method in study.methods
            if any(
                (line["method"], line["epochs"], line["rate"]) == (method, epochs, rate)
                for line in lines.values()
            )
        ]
        if rows:
            columns = ["", "seeds", *study.metrics.values(), "difference", "to", "CPU minutes"]
            parts += [
                f"## {epochs:g} epochs{'' if rate is None else f', rate {rate:g}'}",
                table(columns, rows),
            ]
    return "\n\n".join([*parts, *provenance(list(lines.values()))]) + "\n"


def row(study: Study, lines: dict[tuple, Line], method: str, epochs: float, rate: float | None) -> list[str]:
    own = of_method(lines, method, epochs, rate)
    metric = next(iter(study.metrics))
    baseline = study.methods[method].baseline or study.baseline
    base = {} if baseline == method else scores(of_method(lines, baseline, epochs, rate), metric)
    difference = paired(scores(own, metric), base)
    seconds = [line["cpu_seconds"] for line in own.values() if line["cpu_seconds"]]
    return [
        study.methods[method].title,
        str(len(own)),
        *(mean_and_deviation(list(scores(own, name).values())) for name in study.metrics),
        difference,
        study.methods[baseline].title if difference else "",
        f"{statistics.mean(seconds) / 60:.1f}" if seconds else "",
    ]


def of_method(lines: dict[tuple, Line], method: str, epochs: float, rate: float | None) -> dict[int, Line]:
    """Return the method's lines by seed."""
    keys = [key for key in lines if (key[0], *key[2:]) == (method, epochs, rate)]
    return {key[1]: lines[key] for key in sorted(keys, key=lambda key: key[1])}


def scores(lines: dict[int, Line], metric: str) -> dict[int, float]:
    """Return the scores in percent by seed, without lines that lack the metric."""
    return {seed: 100 * line["scores"][metric] for seed, line in lines.items() if metric in line["scores"]}


def mean_and_deviation(values: Sequence[float]) -> str:
    if not values:
        return ""
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{deviation}"


def paired(own: dict[int, float], base: dict[int, float]) -> str:
    """Return the mean difference over the seeds that both have, with its interval if there are several."""
    differences = [own[seed] - base[seed] for seed in own.keys() & base.keys()]
    if not differences:
        return ""
    mean = statistics.mean(differences)
    if len(differences) == 1:
        return f"{mean:+.2f}"
    from scipy import stats

    quantile = stats.t.ppf((1 + CONFIDENCE) / 2, len(differences) - 1)
    half = quantile * statistics.stdev(differences) / math.sqrt(len(differences))
    return f"{mean:+.2f} [{mean - half:+.2f}, {mean + half:+.2f}]"


def provenance(lines: Sequence[Line]) -> list[str]:
    """Return the origin of the lines, and a warning if they do not share a teacher."""
    if not lines:
        return []
    origins = {
        "Machines": {line["machine"] for line in lines},
        "Commits": {str(line["commit"]) for line in lines},
        "Libraries": {
            " ".join(f"{name} {number}" for name, number in line["versions"].items()) for line in lines
        },
        "Dates": {min(line["date"] for line in lines), max(line["date"] for line in lines)},
    }
    parts = ["\n".join(f"- {name}: {'; '.join(sorted(values))}" for name, values in origins.items())]
    if len({line["teacher"] for line in lines} - {None}) > 1:
        parts.append("**Not all of these runs had the same teacher**: compare the lines' `teacher`.")
    return parts


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def curves(study: Study, lines: dict[tuple, Line]) -> str | None:
    """Draw the first metric over epochs as SVG, one line per method and rate; None without two budgets."""
    from indistill.commands.report import charts

    metric, title = next(iter(study.metrics.items()))
    budgets = sorted({key[2] for key in lines})
    rates = list(dict.fromkeys(rate for *_, rate in lines))
    series = []
    for rate, method in itertools.product(rates, study.methods):
        values = {
            epochs: scores(of_method(lines, method, epochs, rate), metric).values() for epochs in budgets
        }
        points = [
            (epochs, statistics.mean(of_seeds) / 100) for epochs, of_seeds in values.items() if of_seeds
        ]
        name = study.methods[method].title.replace("*", "")
        if len(points) > 1:
            series.append(charts.Series(f"{name}, rate {rate:g}" if len(rates) > 1 else name, points))
    if not series:
        return None
    return standalone(charts, charts.Chart(title, "%", series, x="epochs", percent=True))


def standalone(charts: Any, chart: Any) -> str:
    """Return a chart of the report as an SVG file: its curves and style, with the page's labels as text."""
    html, _ = charts.draw(chart, 0)
    shapes = re.search(r"<svg[^>]*>(.*)</svg>", html)[1]
    style = re.search(r"<style>(.*)</style>", charts.page("", "", {}), re.DOTALL)[1]
    texts = []
    for axis, at, label in re.findall(r'<span class="([xy])" style="\w+:([\d.]+)%">(.*?)</span>', html):
        x, y = (70 + 7 * float(at), 370) if axis == "x" else (62, 44 + 3 * float(at))
        texts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{"middle" if axis == "x" else "end"}">{label}</text>'
        )
    names = re.findall(r'<i class="f(\d)"></i>(.*?)</span>', html) or [("0", escape(chart.series[0].name))]
    for i, (colour, name) in enumerate(names):
        y = 415 + 20 * i
        texts.append(f'<path class="s{colour}" d="M70 {y - 4}h22"/><text x="100" y="{y}">{name}</text>')
    height = 425 + 20 * len(names)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 800 {height}" width="800" role="img">'
        f"<title>{escape(chart.title)}</title><style>{escape(style, quote=False)}\n"
        "text { font: 13px system-ui, sans-serif; fill: var(--fg) }</style>"
        f'<rect width="800" height="{height}" style="fill: var(--bg)"/>'
        f'<text x="70" y="24" style="font-weight: 600">{escape(chart.title)}, {escape(chart.unit)}</text>'
        f'<text x="770" y="392" text-anchor="end">{escape(chart.x)}</text>{"".join(texts)}'
        '<svg x="70" y="40" width="700" height="300" viewBox="0 0 1000 1000" preserveAspectRatio="none" '
        f'overflow="visible"><path class="grid" d="M0 0V1000H1000"/>{shapes}</svg></svg>\n'
    )


if __name__ == "__main__":
    sys.exit(main())
