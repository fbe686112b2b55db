"""A run for people to look at: `indistill report` makes one HTML file of what runs have left in their directories.

Everything shown is what the run recorded. Only the size of the networks and their speed are found here, once, and kept
in `networks.json` beside the run. A network's architecture decides both, so that no weights are loaded.
"""

from __future__ import annotations

import re
import statistics
import sys
from collections.abc import Sequence
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
from indistill.config import UserError, in_one_line
from indistill.config.files import replace_text
from indistill.config.ranks import Ranks
from indistill.config.run_dir import RunDir
from indistill.training.callbacks import Callback, TrainingRun

_MOST_NAMES = 200  # of bad samples, and of checkpoints, that are listed


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
    names = short_names(folders)
    found = [read(folder, name) for folder, name in zip(folders, names)]
    other = None if baseline is None else read(run_dirs(Path(baseline))[0], str(baseline))
    found = [run._replace(networks=networks(run, measure)) for run in found]
    other = other and other._replace(networks=networks(other, measure))
    first = Path(runs[0])
    default = RunDir(first).report if len(runs) == 1 else first.absolute().parent / "comparison.html"
    destination = Path(output or default)
    title = first.absolute().name if len(runs) == 1 else f"{len(found)} runs"
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        replace_text(destination, html(found, title, other))
    except OSError as error:
        raise UserError(
            f"{destination}: cannot be written ({error.strerror or error}): choose another --output"
        ) from None
    return destination


class ReportAtEnd(Callback):
    """Writes the report of a run when it ends."""

    def on_end(self, run: TrainingRun, summary: dict[str, Any]) -> None:
        """Write it without measuring anything, which is cheap. A report that fails does not fail the run."""
        if not Ranks.from_environment().is_main_process:
            return
        try:
            write([run.run_dir], measure=False)
        except Exception as error:  # whatever an unforeseen record makes of it
            reason = in_one_line(error, with_type=True)
            print(f"indistill: no report written: {reason}", file=sys.stderr, flush=True)


# --- the page --------------------------------------------------------------------------------------------------------
def html(runs: Sequence[Run], title: str, baseline: Run | None = None) -> str:
    """The page of one run, or of several: their comparison first, then each."""
    page = Page()
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    told = f"As of {now}, indistill {__version__}"
    page.add(f'<header><h1>{escape(title)}</h1><p class="sub">{escape(told)}</p></header><main>')
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
    return charts.page(f"{title}: indistill", "\n".join(page.parts), data)


def _report(page: Page, run: Run, baseline: Run | None) -> None:
    rows = result_rows(run, baseline)
    page.add(_headline(run), _cards(run, rows), *results_table(run, rows, baseline))
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
        page.add(
            "<h2>Which teacher channels are taught</h2>", f'<p class="note">{escape(_plan_note(run))}</p>'
        )
        page.draw(_channels(run))
    page.add("<h2>Speed of training</h2>", *_phase_table(run, bands))
    page.draw(_throughput(run, bands))
    page.add("<h2>Checkpoints</h2>", *_checkpoints(run), "<h2>Starts and ends</h2>", *_starts(run))
    page.add("<h2>Samples and steps left out</h2>", *_left_out(run))
    page.add("<h2>Environment and configuration</h2>", *_environment(run))
    page.add(
        f"<details><summary>config.yaml</summary><pre>{escape(config.dump(run.settings))}</pre></details>"
    )


# --- results ---------------------------------------------------------------------------------------------------------
def _headline(run: Run) -> str:
    state, kind = STATES.get(run.status, ("not finished", "open"))
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


def _cards(run: Run, rows: Sequence[Row]) -> str:
    cards = []
    if (top1 := run.scores.get("top1")) is not None:
        cards.append(
            (
                percent(top1),
                "top-1 of the student" if run.settings.stage != "heads" else "top-1, deepest head",
            )
        )
    of_teacher = next((row.top1 for row in rows if row.role == "teacher"), None)
    if top1 is not None and of_teacher is not None:
        cards.append((f"{100 * (top1 - of_teacher):+.2f}", "points against the teacher"))
    of_baseline = next((row.top1 for row in rows if row.role == "baseline"), None)
    if top1 is not None and of_baseline is not None:
        cards.append((f"{100 * (top1 - of_baseline):+.2f}", "points against the baseline"))
    if ratio := teacher_over_student(rows, "parameters"):
        cards.append((f"{ratio:.1f}×", "fewer parameters"))
    if ratio := teacher_over_student(rows, "seconds"):
        cards.append((f"{ratio:.2f}×", "as fast, measured"))
    if seconds := run.summary.get("seconds"):
        cards.append((duration(seconds), "of training"))
    markup = "".join(
        f'<div class="card"><b>{escape(value)}</b><span>{escape(what)}</span></div>' for value, what in cards
    )
    return f'<div class="cards">{markup}</div>' if cards else ""


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
        "Accuracy",
        "% of data.eval",
        [Series(key, run.points(key)) for key in keys],
        bands=bands,
        percent=True,
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
        Chart(
            "Information of the student's layers",
            "QMI with the labels",
            information,
            bands=bands,
            from_zero=True,
        )
    )
    return drawn


def _plan_note(run: Run) -> str:
    criterion, mode = run.plan.get("criterion"), run.plan.get("mode")
    note = f"Criterion {criterion}, mode {mode}: the channels of highest importance stay, as many as the student has."
    return (
        note
        if run.plan.get("importance")
        else f"{note} Importances were not recorded: kept channels alone are marked."
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
        [
            one["name"],
            number(one["step"]),
            f"{one['bytes'] / 1e6:,.1f}",
            percent(one["scores"].get("top1"), ""),
        ]
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
    told = (
        "Started once."
        if starts == 1
        else f"Started {starts} times: {starts - 1} restart{'s' * (starts > 2)}."
    )
    table = charts.table(["start", "from step", "on", "for", "end"], rows, "Starts and ends")
    return [f"<p>{told}</p>", f'<div class="texts">{table}</div>']


def _left_out(run: Run) -> list[str]:
    last = run.steps[-1] if run.steps else {}
    bad = max(len(run.bad), last.get("bad_samples", 0))
    skipped = last.get("skipped_steps", 0)
    told = (
        f"{bad:,} of the samples could not be decoded: the next of its stream stood in for each."
        if bad
        else ""
    )
    told = told or "Every sample could be decoded."
    left_out = f"{skipped:,} steps were skipped" if skipped else "No step was skipped"
    told += f" {left_out} for a loss or gradient that was not finite."
    names = "".join(f"<li>{escape(str(name))}</li>" for name in run.bad[:_MOST_NAMES])
    more = f"<p>and {len(run.bad) - _MOST_NAMES:,} more</p>" if len(run.bad) > _MOST_NAMES else ""
    listed = (
        f"<details><summary>Their names, by the newest checkpoint</summary><ul>{names}</ul>{more}</details>"
    )
    return [f"<p>{escape(told)}</p>", listed if names else ""]


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
    return [f'<div class="texts">{charts.table(["latest start", ""], rows, "Environment")}</div>']
