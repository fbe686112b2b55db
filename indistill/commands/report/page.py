"""The report of runs: `indistill report` makes one HTML file from what runs recorded in their directories.

Only the size and speed of the networks are computed here, once, and kept in `networks.json` in the run
directory. Both depend on the architecture alone, so no weights are loaded.
"""

from __future__ import annotations

import re
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any

from indistill import __version__, config
from indistill.commands.report import charts
from indistill.commands.report.charts import Band, Chart, Series, number
from indistill.commands.report.compare import add_comparison
from indistill.commands.report.markup import Page, duration, finite, moment, percent
from indistill.commands.report.networks import networks
from indistill.commands.report.read import STATES, Run, read, run_dirs, short_names
from indistill.commands.report.results import Row, result_rows, results_table, teacher_over_student
from indistill.config import Config, UserError, in_one_line, metric_names, printable, records
from indistill.config.destinations import check_kind
from indistill.config.files import replace_text
from indistill.config.metric_names import eval_key
from indistill.config.ranks import Ranks
from indistill.config.run_dir import RunDir
from indistill.training.callbacks import Callback, TrainingRun

_MOST_NAMES = 200  # bad samples, and checkpoints, that are listed


# --- writing ------------------------------------------------------------------------------------------------
def write(
    runs: Sequence[str | Path],
    output: str | Path | None = None,
    baseline: str | Path | None = None,
    measure: bool = True,
) -> Path:
    """Write the report of runs and return its file.

    The directory of a chain or of several students stands for all runs in it. The default file is
    `RUN/report.html`, for several directories `comparison.html` beside the first. `baseline` is a run to add
    to each table of results. With `measure`, speed is measured where it is not known yet. Raises UserError if
    a directory is not that of a run, if the file cannot be written, or if it exists and is not a report.
    """
    folders = [folder for run in runs for folder in run_dirs(Path(run))]
    first = Path(runs[0])
    default = RunDir(first).report if len(runs) == 1 else first.absolute().parent / "comparison.html"
    destination = Path(output or default)
    check_kind(destination, charts.MARK, kind="a report", remedy="choose another --output")
    found = _read_all(folders)
    other = None if baseline is None else read(run_dirs(Path(baseline))[0], str(baseline))
    found = [replace(run, networks=networks(run, measure)) for run in found]
    other = other and replace(other, networks=networks(other, measure))
    title = first.absolute().name if len(runs) == 1 else f"{len(found)} runs"
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        replace_text(destination, printable(html(found, title, other), lines=True))
    except OSError as error:
        raise UserError(
            f"{destination}: cannot be written ({error.strerror or error}): choose another --output"
        ) from None
    return destination


def _read_all(folders: Sequence[Path]) -> list[Run]:
    """Read runs; those whose config is not valid are left out with a warning. Raises UserError if all are."""
    found = []
    mistake: UserError | None = None
    for folder, name in zip(folders, short_names(folders)):
        try:
            found.append(read(folder, name))
        except UserError as error:
            mistake = error
            if len(folders) > 1:
                records.warn(f"{error}: the report leaves this run out")
    if mistake is not None and not found:
        raise mistake
    return found


class ReportAtEnd(Callback):
    """Writes the report of a run when it ends."""

    def on_end(self, run: TrainingRun, summary: dict[str, Any]) -> None:
        """Write the report without measuring speed. If that fails, the run does not."""
        if not Ranks.from_environment().is_main_process:
            return
        try:
            write([run.run_dir], measure=False)
        except Exception as error:  # whatever an unforeseen record makes of it
            reason = in_one_line(error, with_type=True)
            print(f"indistill: no report written: {reason}", file=sys.stderr, flush=True)


# --- the page -----------------------------------------------------------------------------------------------
def html(runs: Sequence[Run], title: str, baseline: Run | None = None) -> str:
    """Return the page of one run, or of several: first their comparison, then each."""
    page = Page()
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    subtitle = f"Written on {now} by indistill {__version__}"
    page.add(f'<header><h1>{escape(title)}</h1><p class="sub">{escape(subtitle)}</p></header><main>')
    if len(runs) > 1:
        add_comparison(page, runs)
        for run in runs:
            page.add(f'<details class="run"><summary>{escape(run.name)}</summary>')
            _report(page, run, baseline)
            page.add("</details>")
    else:
        _report(page, runs[0], baseline)
    page.add("</main>")
    data = {"charts": page.charts, "runs": {run.name: finite(run.summary) for run in runs}}
    return charts.page(title, "\n".join(page.parts), data)


def _report(page: Page, run: Run, baseline: Run | None) -> None:
    rows = result_rows(run, baseline)
    page.add(_headline(run), _cards(run, rows), *results_table(run, rows))
    bands = phases(run)
    page.add("<h2>Training</h2>")
    if bands:
        last = run.steps[-1]
        epoch = f" An epoch has {last['step'] / last['epoch']:,.0f} steps." if last.get("epoch") else ""
        names = ", ".join(band.name for band in bands)
        page.add(f'<p class="note">{escape(f"The coloured bands show the phases: {names}.{epoch}")}</p>')
    page.draw([_losses(run, bands), _accuracy(run, bands), _rate(run, bands)])
    if any(key.startswith(("cka_", "information_")) for key in run.keys):
        page.add("<h2>Similarity of teacher and student</h2>")
        page.draw(_similarities(run, bands))
    if run.plan.get("pairs"):
        page.add("<h2>Selected teacher channels</h2>", f'<p class="note">{escape(_plan_note(run))}</p>')
        page.draw(_channels(run))
    page.add("<h2>Training speed</h2>", *_phase_table(run, bands))
    page.draw(_throughput(run, bands))
    page.add("<h2>Checkpoints</h2>", *_checkpoints(run), "<h2>Starts and ends</h2>", *_starts(run))
    page.add("<h2>Skipped samples and steps</h2>", *_skipped(run))
    page.add("<h2>Environment and configuration</h2>", *_environment(run))
    page.add(
        f"<details><summary>config.yaml</summary><pre>{escape(config.dump(run.settings))}</pre></details>"
    )


# --- results ------------------------------------------------------------------------------------------------
def _headline(run: Run) -> str:
    state, kind = STATES.get(run.status, ("not finished", "open"))
    steps = max((line["step"] for line in run.lines), default=run.summary.get("step", 0))
    data = run.settings.data
    facts = [
        _trained(run.settings),
        f"{data.num_classes} classes" if data.num_classes else "without labels",
        f"{data.full_size} px",
        f"{data.global_batch:,} images per step",
        f"{steps:,} steps" if run.status == "done" else f"{steps:,} steps of {run.settings.duration}",
    ]
    return (
        f'<p><span class="state {kind}">{state}</span> {escape(", ".join(facts))}</p>'
        f'<p class="sub">{escape(str(run.path.absolute()))}</p>'
    )


def _trained(settings: Config) -> str:
    """Name what a run trains, and its teacher."""
    teachers = " and ".join(section.name for section in settings.teacher_sections.values())
    if settings.student is None:  # stage: heads
        return f"intermediate heads of {teachers}"
    return f"{settings.student.name} taught by {teachers}" if teachers else settings.student.name


def _cards(run: Run, rows: Sequence[Row]) -> str:
    cards = []
    if (top1 := metric_names.first(run.scores, "top1")) is not None:
        label = "top-1 of the deepest head" if run.settings.stage == "heads" else "top-1 of the student"
        cards.append((percent(top1), label))
    elif (neighbours := metric_names.first(run.scores, "knn_top1")) is not None:
        cards.append((percent(neighbours), "top-1 of k-NN on the student's embeddings"))
    of_teacher = next((row.top1 for row in rows if row.role == "teacher"), None)
    if top1 is not None and of_teacher is not None:
        cards.append((f"{100 * (top1 - of_teacher):+.2f}", "points compared with the teacher"))
    of_baseline = next((row.top1 for row in rows if row.role == "baseline"), None)
    if top1 is not None and of_baseline is not None:
        cards.append((f"{100 * (top1 - of_baseline):+.2f}", "points compared with the baseline"))
    if ratio := teacher_over_student(rows, "parameters"):
        cards.append((f"{ratio:.1f}×", "fewer parameters than the teacher"))
    if ratio := teacher_over_student(rows, "seconds"):
        cards.append((f"{ratio:.2f}×", "as fast as the teacher, measured"))
    if seconds := run.summary.get("seconds"):
        cards.append((duration(seconds), "of training"))
    markup = "".join(
        f'<div class="card"><b>{escape(value)}</b><span>{escape(label)}</span></div>'
        for value, label in cards
    )
    return f'<div class="cards">{markup}</div>' if cards else ""


# --- charts of a run ----------------------------------------------------------------------------------------
def phases(run: Run) -> list[Band]:
    """Return the steps of each phase, from the log, which has a line at the end of each phase."""
    bands: list[Band] = []
    for line in run.steps:
        name = line.get("phase", "")
        if bands and bands[-1].name == name:
            bands[-1] = Band(name, bands[-1].start, line["step"])
        else:
            bands.append(Band(name, bands[-1].end if bands else 0, line["step"]))
    return bands


def _losses(run: Run, bands: Sequence[Band]) -> Chart:
    """Chart the loss, and those of its terms that differ from it."""
    names = "|".join(re.escape(loss.name) for loss in run.settings.losses)
    terms = [key for key in run.keys if re.fullmatch(rf"mse_pair\d+|([\w.-]+/)?({names})(_\d+)?", key)]
    other = [key for key in terms if any(line.get(key) not in (None, line["loss"]) for line in run.steps)]
    series = [Series(key, run.points(key)) for key in ("loss", *other)]
    note = "Terms are shown before they are multiplied by their weights." if other else ""
    return Chart(
        "Loss", "mean since the previous logged step", series, bands=bands, may_be_log=True, note=note
    )


def _accuracy(run: Run, bands: Sequence[Band]) -> Chart:
    keys = sorted(key for key in run.keys if metric_names.is_accuracy(key))
    return Chart(
        "Accuracy",
        "% of data.eval",
        [Series(key, run.points(key)) for key in keys],
        bands=bands,
        percent=True,
    )


def _rate(run: Run, bands: Sequence[Band]) -> Chart:
    return Chart("Learning rate", "", [Series("lr", run.points("lr"))], bands=bands, from_zero=True)


def _similarities(run: Run, bands: Sequence[Band]) -> list[Chart]:
    layers = [key.removeprefix("cka_") for key in run.keys if key.startswith("cka_")]
    first = eval_key(next(iter(run.settings.data.eval_sets), ""))
    samples = f"Computed on at most {run.settings.evaluate.similarity_samples} images of {first}."
    alignment = [Series(layer, run.points(f"cka_{layer}")) for layer in layers]
    divergence = [Series("divergence", run.points("information_flow_divergence"))]
    information = [Series(layer, run.points(f"information_student_{layer}")) for layer in layers]
    return [
        Chart(
            "Alignment of the maps (linear CKA)",
            "from 0 to 1",
            alignment,
            bands=bands,
            from_zero=True,
            note=samples,
        ),
        Chart(
            "Divergence of the information flow",
            "",
            divergence,
            bands=bands,
            may_be_log=True,
            note="Between teacher and student, over all layers; 0: the same flow.",
        ),
        Chart(
            "Information in the student's layers",
            "QMI with the labels",
            information,
            bands=bands,
            from_zero=True,
        ),
    ]


def _plan_note(run: Run) -> str:
    note = (
        f"Criterion {run.plan.get('criterion')}, mode {run.plan.get('mode')}: the most important channels "
        "are kept, as many as the student has."
    )
    if run.plan.get("importance"):
        return note
    return f"{note} Importances were not recorded; the charts only mark the kept channels."


def _channels(run: Run) -> list[Chart]:
    drawn = []
    scores = run.plan.get("importance") or [None] * len(run.plan["pairs"])
    for i, (pair, importance) in enumerate(zip(run.plan["pairs"], scores), start=1):
        width, kept = pair["teacher_width"], pair["kept"]
        stages = f"teacher stage {pair['teacher_stage']}, student stage {pair['student_stage']}"
        kept = set(range(width) if kept is None else kept)
        height = importance or [1.0] * width
        groups = (("kept", sorted(kept), 0), ("left out", sorted(set(range(width)) - kept), 7))
        series = [
            Series(name, [(channel, height[channel]) for channel in members], colour)
            for name, members, colour in groups
            if members
        ]
        unit = f"{'importance' if importance else 'marks'}, {stages}"
        drawn.append(Chart(f"Pair {i}: {len(kept)} of {width}", unit, series, x="channel", bars=True))
    return drawn


def _throughput(run: Run, bands: Sequence[Band]) -> list[Chart]:
    wait = Series("waiting for data", run.points("data_wait_fraction"))
    rate = Series("images/s", run.points("images_per_second"))
    return [
        Chart("Throughput", "images/s, all processes", [rate], bands=bands, from_zero=True),
        Chart("Waiting for data", "% of training time", [wait], bands=bands, percent=True, from_zero=True),
    ]


# --- tables of a run ----------------------------------------------------------------------------------------
def _phase_table(run: Run, bands: Sequence[Band]) -> list[str]:
    seconds = run.summary.get("phase_seconds", {})
    waits_of: dict[str, list[float]] = {}
    for line in run.steps:
        if "data_wait_fraction" in line:
            waits_of.setdefault(line.get("phase", ""), []).append(line["data_wait_fraction"])
    rows = []
    for band in bands:
        waits = waits_of.get(band.name)
        took = seconds.get(band.name)
        steps = band.end - band.start
        images = steps * run.settings.data.global_batch / took if took else None
        wait = percent(statistics.fmean(waits), "") if waits else "–"
        rows.append([band.name, f"{steps:,}", duration(took) if took else "–", number(images), wait])
    columns = ["phase", "steps", "time", "images/s", "waiting for data, %"]
    return [charts.table(columns, rows, "Phases")] if rows else []


def _checkpoints(run: Run) -> list[str]:
    stalls = [line["checkpoint_stall_seconds"] for line in run.lines if "checkpoint_stall_seconds" in line]
    text = "No checkpoint was saved."
    if stalls:
        text = (
            f"{len(stalls)} saved. They interrupted training for {number(sum(stalls))} s in total, at most "
            f"{number(max(stalls))} s each."
        )
    rows = [
        [
            one["name"],
            number(one["step"]),
            f"{one['bytes'] / 1e6:,.1f}",
            percent(metric_names.deciding(one["scores"]), ""),
        ]
        for one in run.checkpoints[-_MOST_NAMES:]
    ]
    table = charts.table(["kept", "step", "MB", "top-1 %"], rows, "Checkpoints") if rows else ""
    return [f"<p>{escape(text)}</p>", table]


def _starts(run: Run) -> list[str]:
    """Return the table of starts, each with its end: the next line, unless that is another start."""
    if not run.history:
        return ['<p class="none">Not recorded.</p>']
    rows = []
    for line, following in zip(run.history, [*run.history[1:], {}]):
        if line["event"] != "start":
            continue
        ended = following if following.get("event") == "end" else {}
        if not following and run.summary:  # a callback's on_end writes this page, before the end is recorded
            written = RunDir(run.path).summary.stat().st_mtime
            ended = {"how": "done", "time": written} if written >= line["time"] else {}
        if ended:
            how = f"{ended.get('how')}: {ended.get('reason', '')}".removesuffix(": ")
            after = duration(ended["time"] - line["time"])
        else:
            last = not following and run.status in ("running", "")
            how = "running or killed" if last else "killed or crashed; no end was recorded"
            after = "–"
        where = f"{line.get('world_size', '?')} × {line.get('device', '?')}, {line.get('host', '?')}"
        rows.append([moment(line["time"]), number(line.get("step")), where, after, how])
    text = "Started once." if len(rows) == 1 else f"Started {len(rows)} times."
    table = charts.table(["start", "from step", "devices", "duration", "end"], rows, "Starts and ends")
    return [f"<p>{text}</p>", f'<div class="texts">{table}</div>']


def _skipped(run: Run) -> list[str]:
    """Describe samples that could not be decoded, and steps that were not finite."""
    last = run.steps[-1] if run.steps else {}
    bad = max(len(run.bad), last.get("bad_samples", 0))
    skipped = last.get("skipped_steps", 0)
    text = "All samples could be decoded."
    if bad:
        text = f"{bad:,} samples could not be decoded and were replaced by the next in their stream."
    steps = f"{skipped:,} steps were skipped" if skipped else "No step was skipped"
    text = f"{text} {steps} because of a loss or gradient that was not finite."
    names = "".join(f"<li>{escape(str(name))}</li>" for name in run.bad[:_MOST_NAMES])
    more = f"<p>and {len(run.bad) - _MOST_NAMES:,} more</p>" if len(run.bad) > _MOST_NAMES else ""
    summary = "<summary>Names of these samples, from the newest checkpoint</summary>"
    listed = f"<details>{summary}<ul>{names}</ul>{more}</details>"
    return [f"<p>{escape(text)}</p>", listed if names else ""]


def _environment(run: Run) -> list[str]:
    starts = [line for line in run.history if line["event"] == "start"]
    if not starts:
        return ['<p class="none">The environment was not recorded.</p>']
    latest = dict(starts[-1])
    latest.update(latest.pop("software", {}))
    rows = [
        [key.replace("_", " "), value]
        for key, value in latest.items()
        if key not in ("event", "time", "step")
    ]
    return [f'<div class="texts">{charts.table(["last start", ""], rows, "Environment")}</div>']
