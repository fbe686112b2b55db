"""The table of results of a run: its teacher, its student and a baseline."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

from indistill import config
from indistill.commands.report import charts
from indistill.commands.report.charts import number
from indistill.commands.report.markup import percent
from indistill.commands.report.read import Run, record
from indistill.config import metric_names
from indistill.config.records import Summary
from indistill.config.run_dir import RunDir


class Row(NamedTuple):
    """A network in the table of results; None where a value is not known."""

    role: str
    name: str
    parameters: int | None
    flops: int | None  # per image, forward
    seconds: float | None  # per batch
    top1: float | None
    map: float | None


_SAME = ("device", "batch", "precision", "threads", "torch")  # of two speeds that can be compared


def result_rows(run: Run, baseline: Run | None) -> list[Row]:
    """Return the rows of teacher, student and baseline, as far as the run has them."""
    rows = []
    for role, section in run.settings.teacher_sections.items():
        rows.append(_row(run, role, section, _scores_of(section)))
    if run.settings.student is not None:
        rows.append(_row(run, "student", run.settings.student, run.scores))
    if baseline is not None and baseline.settings.student is not None:
        row = _row(baseline, "student", baseline.settings.student, baseline.scores)
        own = run.networks.get("speed", {})
        other = baseline.networks.get("speed", {})
        comparable = all(own.get(key) == other.get(key) for key in _SAME)
        name = f"{row.name} in {baseline.name}"
        rows.append(row._replace(role="baseline", name=name, seconds=row.seconds if comparable else None))
    return rows


def _row(run: Run, role: str, section: config.Model, scores: dict[str, float]) -> Row:
    counted = run.networks.get(role, {})
    return Row(
        role=role,
        name=section.name,
        parameters=counted.get("parameters"),
        flops=counted.get("flops"),
        seconds=run.networks.get("speed", {}).get("seconds", {}).get(role),
        top1=metric_names.first(scores, "top1"),
        map=metric_names.first(scores, "map_cosine"),
    )


def _scores_of(teacher: config.Teacher) -> dict[str, float]:
    """Return the scores of the run that produced the teacher's weights, if its directory is available."""
    file = teacher.checkpoint
    if not file or Path(file) != RunDir(Path(file).parent).student:
        return {}
    return record(RunDir(Path(file).parent).summary, Summary).get("metrics", {})


def teacher_over_student(rows: Sequence[Row], key: str) -> float | None:
    """Return the teacher's value of a column divided by the student's; None if either is not known."""
    both = [getattr(row, key) for row in rows if row.role in ("teacher", "student")]
    return both[0] / both[1] if len(both) == 2 and all(both) else None


def results_table(run: Run, rows: Sequence[Row]) -> list[str]:
    """Return the section of results: heading, table and notes."""
    columns = ["", "top-1 %", "mAP %", "parameters", "GFLOP per image", "ms per image", "network"]
    batch = run.networks.get("speed", {}).get("batch")
    table = [_cells(row, batch) for row in rows]
    ratios = [teacher_over_student(rows, key) for key in ("parameters", "flops", "seconds")]
    if any(ratios):
        shown = [f"{ratio:.2f}×" if ratio else "–" for ratio in ratios]
        table.append(["teacher / student", "", "", *shown, ""])
    if run.settings.stage == "heads":
        heads = {key: value for key, value in run.scores.items() if "top1_head" in key}
        table += [[key.replace("top1_", ""), percent(value, ""), *"–––––"] for key, value in heads.items()]
    return [
        "<h2>Results</h2>",
        charts.table(columns, table, "Results"),
        *_backbone_table(run),
        f'<p class="note">{escape(" ".join(_notes(run, rows)))}</p>',
    ]


_COLUMNS = {
    "top1": "top-1 %",
    "top5": "top-5 %",
    "knn_top1": "k-NN top-1 %",
    "knn_top5": "k-NN top-5 %",
    "probe_top1": "linear probe top-1 %",
    "probe_top5": "linear probe top-5 %",
    "map_cosine": "mAP %",
}


def _backbone_table(run: Run) -> list[str]:
    """Return the table of the student's scores on each evaluation set, if it says more than the results."""
    sets = dict.fromkeys(metric_names.split(key)[0] for key in run.scores)
    of_set = {
        name: {
            score: run.scores[key]
            for score in _COLUMNS
            if (key := f"{name}/{score}".lstrip("/")) in run.scores
        }
        for name in sets
    }
    keys = [key for key in _COLUMNS if any(key in scores for scores in of_set.values())]
    if not any(of_set) and not any(key.startswith(("knn_", "probe_")) for key in keys):
        return []
    rows = [
        [name or "data.eval", *(percent(scores.get(key), "") for key in keys)]
        for name, scores in of_set.items()
        if scores
    ]
    return [charts.table(["evaluated on", *(_COLUMNS[key] for key in keys)], rows, "Evaluation sets")]


def _cells(row: Row, batch: int | None) -> list[str]:
    milliseconds = 1000 * row.seconds / batch if row.seconds and batch else None
    giga = row.flops / 1e9 if row.flops else None
    parameters = f"{row.parameters:,}" if row.parameters else "–"
    scores = [percent(row.top1, ""), percent(row.map, "")]
    return [row.role, *scores, parameters, number(giga), number(milliseconds), row.name]


def _notes(run: Run, rows: Sequence[Row]) -> list[str]:
    """Return the sentences below the table."""
    notes = ["GFLOP: of a forward pass; a multiply-add counts as two operations.", _speed_note(run)]
    for role in (*run.settings.teacher_sections, "student"):
        if "unknown" in run.networks.get(role, {}):
            notes.append(f"The size of the {role} is not known: {run.networks[role]['unknown']}.")
    teacher = run.settings.teacher
    if teacher is not None and run.settings.stage != "heads":
        if teacher.checkpoint and _scores_of(teacher):
            notes.append(f"The teacher's scores are those of the run in {Path(teacher.checkpoint).parent}.")
        else:
            notes.append("The teacher's scores were not recorded; `indistill eval` computes them.")
    if any(row.map is not None for row in rows):
        notes.append("mAP: of the embeddings, by cosine similarity, interpolated.")
    return notes


def _speed_note(run: Run) -> str:
    speed = run.networks.get("speed", {})
    if "unknown" in speed:
        return f"Speed could not be measured: {speed['unknown']}."
    if "seconds" not in speed:
        return "Speed is not measured yet; `indistill report` measures it."
    threads = ""
    if speed.get("threads"):
        threads = ", 1 thread" if speed["threads"] == 1 else f", {speed['threads']} threads"
    precision = {"no": "float32"}.get(speed["precision"], speed["precision"])
    return (
        f"ms: median of {speed['rounds']} forward passes, the networks in turns, on batches of "
        f"{speed['batch']} images in {precision}, on {speed['device']}{threads}, torch {speed['torch']}."
    )
