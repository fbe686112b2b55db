"""The table of results over all runs."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

from indistill import config
from indistill.commands.report import charts
from indistill.commands.report.charts import number
from indistill.commands.report.markup import percent
from indistill.commands.report.read import Run, read_json
from indistill.config.run_dir import RunDir


class Row(NamedTuple):
    """A network in the table of results; None for what is not known."""

    role: str
    name: str
    parameters: int | None
    flops: int | None
    seconds: float | None
    top1: float | None
    map: float | None


def result_rows(run: Run, baseline: Run | None) -> list[Row]:
    rows = []
    if run.settings.teacher is not None:
        rows.append(_row(run, "teacher", run.settings.teacher, _teacher_scores(run)))
    if run.settings.student is not None:
        rows.append(_row(run, "student", run.settings.student, run.scores))
    if baseline is not None and baseline.settings.student is not None:
        row = _row(baseline, "student", baseline.settings.student, baseline.scores)
        same = all(
            run.networks.get("speed", {}).get(key) == baseline.networks.get("speed", {}).get(key)
            for key in _SAME
        )
        rows.append(
            row._replace(
                role="baseline", name=f"{row.name} in {baseline.name}", seconds=row.seconds if same else None
            )
        )
    return rows


_SAME = ("device", "batch", "precision", "threads", "torch")  # of two measurements that can be compared


def _row(run: Run, role: str, section: config.Model, scores: dict[str, float]) -> Row:
    found, seconds = run.networks.get(role, {}), run.networks.get("speed", {}).get("seconds", {})
    measured = found.get("parameters"), found.get("flops"), seconds.get(role)
    return Row(role, section.name, *measured, scores.get("top1"), scores.get("map_cosine"))


def _teacher_scores(run: Run) -> dict[str, float]:
    """Those of the run that its weights come from, if it is there."""
    file = run.settings.teacher.checkpoint
    if not file or Path(file) != RunDir(Path(file).parent).student:
        return {}
    return read_json(RunDir(Path(file).parent).summary).get("metrics", {})


def teacher_over_student(rows: Sequence[Row], key: str) -> float | None:
    """The teacher's over the student's."""
    both = [getattr(row, key) for row in rows if row.role in ("teacher", "student")]
    return both[0] / both[1] if len(both) == 2 and all(both) else None


def results_table(run: Run, rows: Sequence[Row], baseline: Run | None) -> list[str]:
    speed = run.networks.get("speed", {})
    columns = ["", "top-1 %", "mAP %", "parameters", "GFLOP an image", "ms an image", "network"]

    def cells(row: Row) -> list[str]:
        milliseconds = row.seconds and 1000 * row.seconds / speed["batch"]
        giga = row.flops and row.flops / 1e9
        size = f"{row.parameters:,}" if row.parameters else "–"
        scores = percent(row.top1, ""), percent(row.map, "")
        return [row.role, *scores, size, number(giga), number(milliseconds), row.name]

    table = [cells(row) for row in rows]
    ratios = [teacher_over_student(rows, key) for key in ("parameters", "flops", "seconds")]
    if any(ratios):
        table.append(
            ["teacher / student", "", "", *(f"{ratio:.2f}×" if ratio else "–" for ratio in ratios), ""]
        )
    if run.settings.stage == "heads":
        heads = {key: value for key, value in run.scores.items() if key.startswith("top1_head")}
        table += [[key.removeprefix("top1_"), percent(value, ""), *"–––––"] for key, value in heads.items()]
    notes = ["GFLOP: of a forward pass, a multiply-add counts as two operations."]
    if "seconds" in speed:
        threads = (
            f", {speed['threads']} thread{'s' * (speed['threads'] != 1)}" if speed.get("threads") else ""
        )
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
