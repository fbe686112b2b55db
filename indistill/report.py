"""A run for people to look at: `indistill report` makes one HTML file of what runs have left in their directories.

Everything shown is what the run recorded. Only the size of the networks and their speed are found here, once, and kept
in `networks.json` beside the run. A network's architecture decides both, so that no weights are loaded.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from indistill import __version__, charts, config
from indistill.charts import Band, Chart, Series, number
from indistill.config import Config, UserError
from indistill.config.files import read_lines
from indistill.training.callbacks import Callback, TrainingRun

if TYPE_CHECKING:
    from torch import nn

_NETWORKS = "networks.json"
_SPEED_SECONDS = 5.0  # for the rounds of measuring, the first of which is not counted
_MOST_ROUNDS = 50
_LEAST_ROUNDS = 3
_BATCH = {"cpu": 8, "cuda": 64}  # images of a forward pass
_MOST_NAMES = 200  # of bad samples, and of checkpoints, that are listed
_STATES = {
    "done": ("finished", "good"),
    "running": ("running, or killed", "open"),
    "requeue": ("stopped, to be started again", "open"),
    "failed": ("failed", "bad"),
}


class Run(NamedTuple):
    """What a run directory holds. What is missing, or damaged, is empty."""

    path: Path
    name: str
    settings: Config
    lines: list[dict[str, Any]]  # of metrics.jsonl
    summary: dict[str, Any]
    status: str
    history: list[dict[str, Any]]
    plan: dict[str, Any]
    networks: dict[str, Any]
    checkpoints: list[dict[str, Any]]  # step, bytes and scores, oldest first
    bad: list[str]  # samples that could not be decoded, by the newest checkpoint

    @property
    def steps(self) -> list[dict[str, Any]]:
        """The lines of steps; the others hold scores, or what a checkpoint cost."""
        return [line for line in self.lines if "loss" in line]

    def points(self, key: str) -> list[charts.Point]:
        return [(line["step"], line[key]) for line in self.lines if isinstance(line.get(key, ""), int | float | None)]

    @property
    def scores(self) -> dict[str, float]:
        """The latest, of the end of the run where it has one."""
        latest: dict[str, float] = {}
        for line in self.lines:
            latest |= {key: value for key, value in line.items() if key.startswith("top")}
        return latest | self.summary.get("metrics", {})


# --- writing ---------------------------------------------------------------------------------------------------------


def write(
    runs: Sequence[str | Path],
    output: str | Path | None = None,
    baseline: str | Path | None = None,
    measure: bool = True,
) -> Path:
    """Report runs, a chain's or several students' directory standing for the runs in it; returns the file.

    By default that is `RUN/report.html`, of several `comparison.html` beside the first. `baseline` is a run to stand in
    each table of results; `measure` has the speed of networks measured where it is not known yet. Raises UserError for
    what is no run directory and for a file that cannot be written.
    """
    folders = [folder for run in runs for folder in run_dirs(Path(run))]
    names = _names(folders)
    found = [read(folder, name) for folder, name in zip(folders, names)]
    other = None if baseline is None else read(run_dirs(Path(baseline))[0], str(baseline))
    found = [run._replace(networks=networks(run, measure)) for run in found]
    other = other and other._replace(networks=networks(other, measure))
    first = Path(runs[0])
    default = first / "report.html" if len(runs) == 1 else first.absolute().parent / "comparison.html"
    destination = Path(output or default)
    title = first.absolute().name if len(runs) == 1 else f"{len(found)} runs"
    partial = destination.with_name(f".{destination.name}-{os.getpid()}")
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(html(found, title, other), encoding="utf-8")
        partial.replace(destination)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise UserError(
            f"{destination}: cannot be written ({error.strerror or error}): choose another --output"
        ) from None
    return destination


class ReportAtEnd(Callback):
    """Writes the report of a run when it ends."""

    def on_end(self, run: TrainingRun, summary: dict[str, Any]) -> None:
        """Write it without measuring anything, which is cheap. A report that fails does not fail the run."""
        if os.environ.get("RANK", "0") != "0":
            return
        try:
            write([run.run_dir], measure=False)
        except Exception as error:  # whatever an unforeseen record makes of it
            print(f"indistill: no report written: {type(error).__name__}: {error}", file=sys.stderr, flush=True)


# --- reading ---------------------------------------------------------------------------------------------------------


def run_dirs(path: Path) -> list[Path]:
    """The run directories that `path` stands for, by their first start. Raises UserError if there are none."""
    if (path / "config.yaml").is_file():
        return [path]
    inside = [file.parent for file in path.glob("*/config.yaml")]
    if not inside:
        what = "holds no config.yaml, and no folder in it does" if path.is_dir() else "no such directory"
        raise UserError(f"{path}: {what}: give the run_dir of a run, of a chain or of several students")

    def began(folder: Path) -> tuple[float, str]:
        starts = [line["time"] for line in _history(folder) if line["event"] == "start"]
        return (starts[0] if starts else (folder / "config.yaml").stat().st_mtime), folder.name

    return sorted(inside, key=began)


def read(folder: Path, name: str) -> Run:
    """Raises UserError if the config is not one of this version's."""
    kept = []
    bad: list[str] = []
    for path in sorted((folder / "checkpoints").glob("step-*")):
        state = _json(path / "state.json")
        with contextlib.suppress(OSError):
            size = sum(file.stat().st_size for file in path.iterdir())
            kept.append(
                {"name": path.name, "step": state.get("step"), "bytes": size, "scores": state.get("scores") or {}}
            )
        bad = (state.get("parts") or {}).get("log", {}).get("bad", bad)
    status = [(where / "status") for where in (folder, folder.parent)]
    words = [word for file in status if (word := _text(file).partition("\n")[0]) in _STATES]
    lines = [line for line in _lines(folder / "metrics.jsonl") if isinstance(line.get("step"), int)]
    summary = _json(folder / "summary.json")
    return Run(
        path=folder,
        name=name,
        settings=config.load(folder / "config.yaml"),
        lines=lines,
        summary=summary,
        status="done" if summary else words[0] if words and words[0] != "done" else "",
        history=_history(folder),
        plan=_json(folder / "prune_plan.json"),
        networks=_json(folder / _NETWORKS),
        checkpoints=kept,
        bad=bad,
    )


def _names(folders: Sequence[Path]) -> list[str]:
    """As short as they can be and still differ."""
    if len(folders) == 1:
        return [folders[0].absolute().name]
    wholes = [str(folder.absolute()) for folder in folders]
    common = os.path.commonpath(wholes) if len(set(wholes)) > 1 else os.path.dirname(wholes[0])
    return [os.path.relpath(whole, common) for whole in wholes]


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):
        return ""


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _history(folder: Path) -> list[dict[str, Any]]:
    lines = _lines(folder / "history.jsonl")
    return [one for one in lines if one.get("event") in ("start", "end") and isinstance(one.get("time"), int | float)]


def _lines(path: Path) -> list[dict[str, Any]]:
    try:
        return [line for line in read_lines(path) if isinstance(line, dict)]
    except (OSError, UnicodeDecodeError):
        return []


# --- the networks: size, and speed -----------------------------------------------------------------------------------


def networks(run: Run, measure: bool) -> dict[str, Any]:
    """What `networks.json` says, with what it lacked: parameters, operations and, to `measure`, seconds."""
    known = dict(run.networks)
    sections = {"teacher": run.settings.teacher, "student": run.settings.student}
    sections = {role: section for role, section in sections.items() if section is not None}
    for role, section in sections.items():
        if "parameters" not in known.get(role, {}):
            known[role] = {"name": section.name, **_told(lambda section=section: size(section, run.settings.data))}
    if measure and "seconds" not in known.get("speed", {}):
        known["speed"] = _told(lambda: speed(list(sections.items()), run.settings))
    if known != run.networks:
        with contextlib.suppress(OSError):
            (run.path / _NETWORKS).write_text(json.dumps(known, indent=2) + "\n")
    return known


def _told(find: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What is found, or why it could not be: each library fails in its own way."""
    try:
        return find()
    except Exception as error:
        return {"unknown": " ".join(f"{type(error).__name__}: {error}".split())[:300]}


def _create(section: config.Model, data: config.Data) -> nn.Module:
    """The timm model of a section, without its weights."""
    import timm

    from indistill import models  # noqa: F401  registers the small networks

    return timm.create_model(section.name, **{"num_classes": data.num_classes, **section.kwargs}).eval()


def size(section: config.Model, data: config.Data) -> dict[str, int]:
    """Parameters, and operations of an image's forward pass (a multiply-add counts as two), found without computing."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"), torch.no_grad():
        net = _create(section, data)
        with FlopCounterMode(display=False) as counter:
            net(torch.empty(1, 3, data.image_size, data.image_size))
    return {"parameters": sum(p.numel() for p in net.parameters()), "flops": counter.get_total_flops()}


def speed(sections: Sequence[tuple[str, config.Model]], settings: Config) -> dict[str, Any]:
    """Median seconds of each network's forward pass on the same images, in turns: what disturbs one disturbs the other.

    In the run's precision on a GPU, in float32 on CPUs, as evaluation runs them: normalised and channels_last.
    """
    import torch

    from indistill.distributed import engine
    from indistill.models.network import DTYPES, Network

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = settings.mixed_precision if device.type == "cuda" else "no"
    half = (0.5, 0.5, 0.5)
    with torch.random.fork_rng():
        nets = {role: Network(_create(section, settings.data), half, half) for role, section in sections}
    nets = {role: net.to(device).eval() for role, net in nets.items()}
    batch = _BATCH[device.type]
    images = torch.zeros(batch, 3, settings.data.image_size, settings.data.image_size, dtype=torch.uint8, device=device)

    def seconds(net: nn.Module) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        begin = time.perf_counter()
        net(images)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - begin

    autocast = torch.autocast(device.type, DTYPES[precision], enabled=precision != "no")
    rounds: list[dict[str, float]] = []
    with torch.inference_mode(), autocast:
        begin = time.perf_counter()
        while len(rounds) <= _LEAST_ROUNDS or (
            time.perf_counter() - begin < _SPEED_SECONDS and len(rounds) <= _MOST_ROUNDS
        ):
            rounds.append({role: seconds(net) for role, net in nets.items()})
    counted = rounds[1:]
    return {
        "seconds": {role: statistics.median(one[role] for one in counted) for role in nets},
        "rounds": len(counted),
        "batch": batch,
        "precision": precision,
        "device": engine.device_name(device),
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "torch": torch.__version__,
    }


# --- the page --------------------------------------------------------------------------------------------------------


class _Page:
    """Markup in order, and the numbers of its charts."""

    def __init__(self) -> None:
        self.parts: list[str] = []
        self.charts: list[dict[str, Any]] = []

    def add(self, *parts: str) -> None:
        self.parts += parts

    def draw(self, drawings: Iterable[Chart]) -> None:
        """Side by side; charts without any point are left out."""
        drawn = []
        for chart in drawings:
            if found := charts.draw(chart, len(self.charts)):
                drawn.append(found[0])
                self.charts.append(found[1])
        self.add(
            f'<div class="charts">{"".join(drawn)}</div>' if drawn else '<p class="none">Nothing recorded yet.</p>'
        )


def html(runs: Sequence[Run], title: str, baseline: Run | None = None) -> str:
    """The page of one run, or of several: their comparison first, then each."""
    page = _Page()
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    told = f"As of {now}, indistill {__version__}"
    page.add(f'<header><h1>{escape(title)}</h1><p class="sub">{escape(told)}</p></header><main>')
    if len(runs) > 1:
        _compare(page, runs)
        for run in runs:
            page.add(f'<details class="run"><summary>{escape(run.name)}</summary>')
            _report(page, run, baseline)
            page.add("</details>")
    else:
        _report(page, runs[0], baseline)
    page.add("</main>")
    data = {"charts": page.charts, "runs": {run.name: _finite(run.summary) for run in runs}}
    return charts.page(f"{title}: indistill", "\n".join(page.parts), data)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _report(page: _Page, run: Run, baseline: Run | None) -> None:
    rows = _results(run, baseline)
    page.add(_headline(run), _cards(run, rows), *_results_table(run, rows, baseline))
    bands = phases(run)
    page.add("<h2>Training</h2>")
    if bands:
        last = run.steps[-1]
        epoch = f" An epoch has {last['step'] / last['epoch']:,.0f} steps." if last.get("epoch") else ""
        names = ", ".join(band.name for band in bands)
        page.add(f'<p class="note">{escape(f"Bands are the phases: {names}.{epoch}")}</p>')
    page.draw([_losses(run, bands), _accuracy(run, bands), _rate(run, bands)])
    if any(key.startswith(("cka_", "information_")) for line in run.lines for key in line):
        page.add("<h2>How alike teacher and student are</h2>")
        page.draw(_similarities(run, bands))
    if run.plan.get("pairs"):
        page.add("<h2>Which teacher channels are taught</h2>", f'<p class="note">{escape(_plan_note(run))}</p>')
        page.draw(_channels(run))
    page.add("<h2>Speed of training</h2>", *_phase_table(run, bands))
    page.draw(_throughput(run, bands))
    page.add("<h2>Checkpoints</h2>", *_checkpoints(run), "<h2>Starts and ends</h2>", *_starts(run))
    page.add("<h2>Samples and steps left out</h2>", *_left_out(run))
    page.add("<h2>Environment and configuration</h2>", *_environment(run))
    page.add(f"<details><summary>config.yaml</summary><pre>{escape(config.dump(run.settings))}</pre></details>")


# --- results ---------------------------------------------------------------------------------------------------------


class _Row(NamedTuple):
    """A network in the table of results; None for what is not known."""

    role: str
    name: str
    parameters: int | None
    flops: int | None
    seconds: float | None
    top1: float | None
    map: float | None


def _results(run: Run, baseline: Run | None) -> list[_Row]:
    rows = []
    if run.settings.teacher is not None:
        rows.append(_row(run, "teacher", run.settings.teacher, _teacher_scores(run)))
    if run.settings.student is not None:
        rows.append(_row(run, "student", run.settings.student, run.scores))
    if baseline is not None and baseline.settings.student is not None:
        row = _row(baseline, "student", baseline.settings.student, baseline.scores)
        same = all(
            run.networks.get("speed", {}).get(key) == baseline.networks.get("speed", {}).get(key) for key in _SAME
        )
        rows.append(
            row._replace(role="baseline", name=f"{row.name} in {baseline.name}", seconds=row.seconds if same else None)
        )
    return rows


_SAME = ("device", "batch", "precision", "threads", "torch")  # of two measurements that can be compared


def _row(run: Run, role: str, section: config.Model, scores: dict[str, float]) -> _Row:
    found, seconds = run.networks.get(role, {}), run.networks.get("speed", {}).get("seconds", {})
    measured = found.get("parameters"), found.get("flops"), seconds.get(role)
    return _Row(role, section.name, *measured, scores.get("top1"), scores.get("map_cosine"))


def _teacher_scores(run: Run) -> dict[str, float]:
    """Those of the run that its weights come from, if it is there."""
    file = run.settings.teacher.checkpoint
    if not file or Path(file).name != "student.safetensors":
        return {}
    return _json(Path(file).parent / "summary.json").get("metrics", {})


def _ratio(rows: Sequence[_Row], key: str) -> float | None:
    """The teacher's over the student's."""
    both = [getattr(row, key) for row in rows if row.role in ("teacher", "student")]
    return both[0] / both[1] if len(both) == 2 and all(both) else None


def _headline(run: Run) -> str:
    state, kind = _STATES.get(run.status, ("not finished", "open"))
    steps = max((line["step"] for line in run.lines), default=run.summary.get("step", 0))
    data = run.settings.data
    what = "intermediate heads" if run.settings.stage == "heads" else run.settings.student.name
    if run.settings.teacher is not None:
        what += (
            f" taught by {run.settings.teacher.name}"
            if run.settings.stage != "heads"
            else f" of {run.settings.teacher.name}"
        )
    facts = [
        what, f"{data.num_classes} classes", f"{data.image_size} px", f"{data.global_batch:,} images a step",
        f"{steps:,} steps", f"of {run.settings.duration} asked for" * (run.status != "done"),
    ]  # fmt: skip
    return (
        f'<p><span class="state {kind}">{state}</span> {escape(", ".join(fact for fact in facts if fact))}</p>'
        f'<p class="sub">{escape(str(run.path.absolute()))}</p>'
    )


def _cards(run: Run, rows: Sequence[_Row]) -> str:
    cards = []
    if (top1 := run.scores.get("top1")) is not None:
        cards.append(
            (percent(top1), "top-1 of the student" if run.settings.stage != "heads" else "top-1, deepest head")
        )
    of_teacher = next((row.top1 for row in rows if row.role == "teacher"), None)
    if top1 is not None and of_teacher is not None:
        cards.append((f"{100 * (top1 - of_teacher):+.2f}", "points against the teacher"))
    of_baseline = next((row.top1 for row in rows if row.role == "baseline"), None)
    if top1 is not None and of_baseline is not None:
        cards.append((f"{100 * (top1 - of_baseline):+.2f}", "points against the baseline"))
    if ratio := _ratio(rows, "parameters"):
        cards.append((f"{ratio:.1f}×", "fewer parameters"))
    if ratio := _ratio(rows, "seconds"):
        cards.append((f"{ratio:.2f}×", "as fast, measured"))
    if seconds := run.summary.get("seconds"):
        cards.append((duration(seconds), "of training"))
    markup = "".join(
        f'<div class="card"><b>{escape(value)}</b><span>{escape(what)}</span></div>' for value, what in cards
    )
    return f'<div class="cards">{markup}</div>' if cards else ""


def _results_table(run: Run, rows: Sequence[_Row], baseline: Run | None) -> list[str]:
    speed = run.networks.get("speed", {})
    columns = ["", "top-1 %", "mAP %", "parameters", "GFLOP an image", "ms an image", "network"]

    def cells(row: _Row) -> list[str]:
        milliseconds = row.seconds and 1000 * row.seconds / speed["batch"]
        giga = row.flops and row.flops / 1e9
        size = f"{row.parameters:,}" if row.parameters else "–"
        scores = percent(row.top1, ""), percent(row.map, "")
        return [row.role, *scores, size, number(giga), number(milliseconds), row.name]

    table = [cells(row) for row in rows]
    ratios = [_ratio(rows, key) for key in ("parameters", "flops", "seconds")]
    if any(ratios):
        table.append(["teacher / student", "", "", *(f"{ratio:.2f}×" if ratio else "–" for ratio in ratios), ""])
    if run.settings.stage == "heads":
        heads = {key: value for key, value in run.scores.items() if key.startswith("top1_head")}
        table += [[key.removeprefix("top1_"), percent(value, ""), *"–––––"] for key, value in heads.items()]
    notes = ["GFLOP: of a forward pass, a multiply-add counts as two operations."]
    if "seconds" in speed:
        threads = f", {speed['threads']} thread{'s' * (speed['threads'] != 1)}" if speed.get("threads") else ""
        precision = {"no": "float32"}.get(speed["precision"], speed["precision"])
        notes.append(
            f"ms: median of {speed['rounds']} forward passes, the networks in turns, on batches of {speed['batch']} in "
            f"{precision}, {speed['device']}{threads}, torch {speed['torch']}."
        )
    elif "unknown" in speed:
        notes.append(f"Speed not measured: {speed['unknown']}.")
    else:
        notes.append("Speed not measured yet: `indistill report` does.")
    notes += [
        f"{role}: {run.networks[role]['unknown']}."
        for role in ("teacher", "student")
        if "unknown" in run.networks.get(role, {})
    ]
    if run.settings.teacher is not None and run.settings.stage != "heads":
        known = bool(_teacher_scores(run))
        notes.append(f"The teacher's scores are those of {Path(run.settings.teacher.checkpoint).parent}." if known else
                     "The teacher's scores are not recorded: `indistill eval` finds them.")  # fmt: skip
    if any(row.map is not None for row in rows):
        notes.append("mAP: of the embeddings, cosine, interpolated.")
    return [
        "<h2>Results</h2>",
        charts.table(columns, table, "Results"),
        f'<p class="note">{escape(" ".join(notes))}</p>',
    ]


def percent(value: float | None, unit: str = " %") -> str:
    return "–" if value is None else f"{100 * value:.2f}{unit}"


def duration(seconds: float) -> str:
    """12 s, 3:20 min, 5:07 h."""
    if seconds < 120:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02} min" if minutes < 120 else f"{minutes // 60}:{minutes % 60:02} h"


# --- charts of a run -------------------------------------------------------------------------------------------------


def phases(run: Run) -> list[Band]:
    """Where each phase lies, by the lines of steps: there is one at each phase's end."""
    bands: list[Band] = []
    for line in run.steps:
        name = line.get("phase", "")
        if bands and bands[-1].name == name:
            bands[-1] = Band(name, bands[-1].start, line["step"])
        else:
            bands.append(Band(name, bands[-1].end if bands else 0, line["step"]))
    return bands


def _losses(run: Run, bands: Sequence[Band]) -> Chart:
    """The whole and those terms that say something else."""
    names = "|".join(re.escape(loss.name) for loss in run.settings.kd.losses)
    keys = dict.fromkeys(key for line in run.steps for key in line)
    terms = [key for key in keys if re.fullmatch(rf"mse_pair\d+|({names})(_\d+)?", key)]
    other = [key for key in terms if any(line.get(key) not in (None, line["loss"]) for line in run.steps)]
    series = [Series(key, run.points(key)) for key in ("loss", *other)]
    note = "Terms are shown without their weights." if other else ""
    return Chart("Loss", "mean since the last line", series, bands=bands, may_be_log=True, note=note)


def _accuracy(run: Run, bands: Sequence[Band]) -> Chart:
    keys = sorted({key for line in run.lines for key in line if key.startswith("top")})
    return Chart(
        "Accuracy", "% of data.eval", [Series(key, run.points(key)) for key in keys], bands=bands, percent=True
    )


def _rate(run: Run, bands: Sequence[Band]) -> Chart:
    return Chart("Learning rate", "", [Series("lr", run.points("lr"))], bands=bands, from_zero=True)


def _similarities(run: Run, bands: Sequence[Band]) -> list[Chart]:
    layers = list(dict.fromkeys(
        key.removeprefix("cka_") for line in run.lines for key in line if key.startswith("cka_")
    ))  # fmt: skip
    samples = f"On at most {run.settings.evaluate.similarity_samples} images of data.eval."
    drawn = [
        Chart(
            "Alignment of the maps (linear CKA)", "0 to 1", [Series(one, run.points(f"cka_{one}")) for one in layers],
            bands=bands, from_zero=True, note=samples,
        ),
        Chart(
            "Divergence of the information flow", "", [Series("divergence", run.points("information_flow_divergence"))],
            bands=bands, may_be_log=True, note="Of student from teacher, over all layers; 0 would be the same flow.",
        ),
    ]  # fmt: skip
    information = [Series(one, run.points(f"information_student_{one}")) for one in layers]
    drawn.append(
        Chart("Information of the student's layers", "QMI with the labels", information, bands=bands, from_zero=True)
    )
    return drawn


def _plan_note(run: Run) -> str:
    criterion, mode = run.plan.get("criterion"), run.plan.get("mode")
    note = f"Criterion {criterion}, mode {mode}: the channels of highest importance stay, as many as the student has."
    return (
        note if run.plan.get("importance") else f"{note} Importances were not recorded: kept channels alone are marked."
    )


def _channels(run: Run) -> list[Chart]:
    drawn = []
    scores = run.plan.get("importance") or [None] * len(run.plan["pairs"])
    for i, (pair, importance) in enumerate(zip(run.plan["pairs"], scores), start=1):
        width, kept = pair["teacher_width"], pair["kept"]
        stages = f"teacher stage {pair['teacher_stage']}, student stage {pair['student_stage']}"
        kept = set(range(width) if kept is None else kept)
        height = importance or [1.0] * width
        groups = {"kept": sorted(kept), "left out": sorted(set(range(width)) - kept)}
        series = [
            Series(name, [(c, height[c]) for c in members], colour=colour)
            for (name, members), colour in zip(groups.items(), (0, 7))
            if members
        ]
        drawn.append(
            Chart(
                f"Pair {i}: {len(kept)} of {width}", f"{'importance' if importance else 'marks'}, {stages}",
                series, x="channel", bars=True,
            )
        )  # fmt: skip
    return drawn


def _throughput(run: Run, bands: Sequence[Band]) -> list[Chart]:
    wait = Series("waiting for data", run.points("data_wait_fraction"))
    rate = Series("images/s", run.points("images_per_second"))
    return [
        Chart("Throughput", "images a second, all processes", [rate], bands=bands, from_zero=True),
        Chart("Waiting for data", "% of the time", [wait], bands=bands, percent=True, from_zero=True),
    ]


# --- tables of a run -------------------------------------------------------------------------------------------------


def _phase_table(run: Run, bands: Sequence[Band]) -> list[str]:
    seconds = run.summary.get("phase_seconds", {})
    rows = []
    for band in bands:
        of_phase = [line for line in run.steps if line.get("phase") == band.name]
        waits = [line["data_wait_fraction"] for line in of_phase if "data_wait_fraction" in line]
        took = seconds.get(band.name)
        steps = band.end - band.start
        images = steps * run.settings.data.global_batch / took if took else None
        wait = percent(statistics.mean(waits), "") if waits else "–"
        rows.append([band.name, f"{steps:,}", duration(took) if took else "–", number(images), wait])
    columns = ["phase", "steps", "time", "images/s", "waiting for data, % (mean of the lines)"]
    return [charts.table(columns, rows, "Phases")] if rows else []


def _checkpoints(run: Run) -> list[str]:
    stalls = [line["checkpoint_stall_seconds"] for line in run.lines if "checkpoint_stall_seconds" in line]
    told = (
        f"{len(stalls)} saved; they held training up for {number(sum(stalls))} s in all, the longest for "
        f"{number(max(stalls))} s." if stalls else "None saved."
    )  # fmt: skip
    rows = [
        [one["name"], number(one["step"]), f"{one['bytes'] / 1e6:,.1f}", percent(one["scores"].get("top1"), "")]
        for one in run.checkpoints[-_MOST_NAMES:]
    ]
    table = charts.table(["kept", "step", "MB", "top-1 %"], rows, "Checkpoints") if rows else ""
    return [f"<p>{escape(told)}</p>", table]


def _starts(run: Run) -> list[str]:
    """A row for each start, with its end: the line after it, unless that is another start."""
    if not run.history:
        return ['<p class="none">Not recorded.</p>']
    rows = []
    for line, following in zip(run.history, [*run.history[1:], {}]):
        if line["event"] != "start":
            continue
        ended = following if following.get("event") == "end" else {}
        if ended:
            how, after = (
                f"{ended.get('how')}: {ended.get('reason')}".removesuffix(": "),
                duration(ended["time"] - line["time"]),
            )
        else:
            last = not following and run.status in ("running", "")
            how, after = ("running, or killed" if last else "killed or crashed, without a word"), "–"
        where = f"{line.get('world_size', '?')} × {line.get('device', '?')}, {line.get('host', '?')}"
        rows.append([moment(line["time"]), number(line.get("step")), where, after, how])
    starts = len(rows)
    told = "Started once." if starts == 1 else f"Started {starts} times: {starts - 1} restart{'s' * (starts > 2)}."
    table = charts.table(["start", "from step", "on", "for", "end"], rows, "Starts and ends")
    return [f"<p>{told}</p>", f'<div class="texts">{table}</div>']


def moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _left_out(run: Run) -> list[str]:
    last = run.steps[-1] if run.steps else {}
    bad = max(len(run.bad), last.get("bad_samples", 0))
    skipped = last.get("skipped_steps", 0)
    told = f"{bad:,} of the samples could not be decoded: the next of its stream stood in for each." if bad else ""
    told = told or "Every sample could be decoded."
    left_out = f"{skipped:,} steps were skipped" if skipped else "No step was skipped"
    told += f" {left_out} for a loss or gradient that was not finite."
    names = "".join(f"<li>{escape(str(name))}</li>" for name in run.bad[:_MOST_NAMES])
    more = f"<p>and {len(run.bad) - _MOST_NAMES:,} more</p>" if len(run.bad) > _MOST_NAMES else ""
    listed = f"<details><summary>Their names, by the newest checkpoint</summary><ul>{names}</ul>{more}</details>"
    return [f"<p>{escape(told)}</p>", listed if names else ""]


def _environment(run: Run) -> list[str]:
    starts = [line for line in run.history if line["event"] == "start"]
    if not starts:
        return ['<p class="none">The environment was not recorded.</p>']
    latest = dict(starts[-1])
    latest.update(latest.pop("software", {}))
    rows = [[key.replace("_", " "), value] for key, value in latest.items() if key not in ("event", "time", "step")]
    return [f'<div class="texts">{charts.table(["latest start", ""], rows, "Environment")}</div>']


# --- several runs ----------------------------------------------------------------------------------------------------


def _compare(page: _Page, runs: Sequence[Run]) -> None:
    page.add(
        "<h2>Side by side</h2>", charts.table(["", *(run.name for run in runs)], _side_by_side(runs), "Comparison")
    )

    def overlaid(title: str, unit: str, key: str, **how: Any) -> Chart:
        return Chart(title, unit, [Series(run.name, run.points(key), i) for i, run in enumerate(runs)], **how)

    page.draw([
        overlaid("Loss", "of each run's own losses", "loss", may_be_log=True),
        overlaid("Top-1", "% of data.eval", "top1", percent=True),
        overlaid("Divergence of the information flow", "", "information_flow_divergence", may_be_log=True),
        overlaid("Throughput", "images a second, all processes", "images_per_second", from_zero=True),
    ])  # fmt: skip
    page.add("<h2>What their configs differ in</h2>", *_differences(runs))


def _side_by_side(runs: Sequence[Run]) -> list[list[str]]:
    results = [{row.role: row for row in _results(run, None)} for run in runs]
    rows = [
        ["state", *(_STATES.get(run.status, ("not finished", ""))[0] for run in runs)],
        ["student", *(run.settings.student.name if run.settings.student else "–" for run in runs)],
        ["teacher", *(run.settings.teacher.name if run.settings.teacher else "–" for run in runs)],
    ]

    def row(label: str, text: Callable[[Run, dict[str, _Row]], str]) -> None:
        rows.append([label, *(text(run, of_run) for run, of_run in zip(runs, results))])

    def of_student(key: str, show: Callable[[Any], str]) -> Callable[[Run, dict[str, _Row]], str]:
        return lambda run, of_run: show(getattr(of_run.get("student"), key, None))

    def times(key: str) -> Callable[[Run, dict[str, _Row]], str]:
        return lambda run, of_run: f"{ratio:.2f}×" if (ratio := _ratio([*of_run.values()], key)) else "–"

    row("parameters", of_student("parameters", lambda value: f"{value:,}" if value else "–"))
    row("GFLOP an image", of_student("flops", lambda value: number(value and value / 1e9)))
    row("compression", times("parameters"))
    row("speed-up, measured", times("seconds"))
    row("steps", lambda run, _: number(max((line["step"] for line in run.lines), default=0)))
    row("training", lambda run, _: duration(run.summary["seconds"]) if run.summary.get("seconds") else "–")
    row("images/s", lambda run, _: number(run.summary.get("images_per_second")))
    row("last loss", lambda run, _: number(next((line["loss"] for line in run.steps[::-1]), None)))
    scores = dict.fromkeys(key for run in runs for key in run.scores if key.startswith(("top", "map_", "precision_")))
    for key in scores:
        row(f"{key} %", lambda run, _, key=key: percent(run.scores.get(key), ""))
    row("bad samples", lambda run, _: number(run.steps[-1].get("bad_samples", 0) if run.steps else 0))
    row("starts", lambda run, _: number(sum(line["event"] == "start" for line in run.history) or None))
    return rows


def _differences(runs: Sequence[Run]) -> list[str]:
    flat = [config.flatten(run.settings, without=("run_dir",)) for run in runs]
    keys = dict.fromkeys(key for one in flat for key in one)
    rows = [
        [key, *(json.dumps(one[key]) if key in one else "–" for one in flat)]
        for key in keys
        if any(one.get(key, "–") != flat[0].get(key, "–") for one in flat)
    ]
    if not rows:
        return ['<p class="none">Nothing but the run directory.</p>']
    return [f'<div class="texts">{charts.table(["key", *(run.name for run in runs)], rows, "Differences")}</div>']
