"""Compare runs: a table of their results, their curves, and the differences between their configs."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from indistill import config
from indistill.commands.report import charts
from indistill.commands.report.charts import Chart, Series, number
from indistill.commands.report.markup import Page, duration, percent
from indistill.commands.report.read import STATES, Run
from indistill.commands.report.results import Row, result_rows, teacher_over_student
from indistill.config import metric_names
from indistill.config.metric_names import eval_key


def add_comparison(page: Page, runs: Sequence[Run]) -> None:
    """Add the comparison of several runs to a page."""
    page.add(
        "<h2>Side by side</h2>",
        charts.table(["", *(run.name for run in runs)], _side_by_side(runs), "Comparison"),
    )

    def overlaid(title: str, unit: str, key: str, **how: Any) -> Chart:
        return Chart(title, unit, [Series(run.name, run.points(key), i) for i, run in enumerate(runs)], **how)

    page.draw([
        overlaid("Loss", "sum of each run's losses", "loss", may_be_log=True),
        *(overlaid(*_title(key), key, percent=True) for key in _accuracies(runs)),
        overlaid("Divergence of the information flow", "", "information_flow_divergence", may_be_log=True),
        overlaid("Throughput", "images/s, all processes", "images_per_second", from_zero=True),
    ])  # fmt: skip
    page.add("<h2>Differences between the configs</h2>", *_differences(runs))


def _accuracies(runs: Sequence[Run]) -> list[str]:
    """Return the names of the top-1 of all evaluation sets in the logs."""
    keys = dict.fromkeys(key for run in runs for key in run.keys)
    return [key for key in keys if metric_names.split(key)[1] in ("top1", "knn_top1")]


def _title(key: str) -> tuple[str, str]:
    """Return title and unit of the chart of an accuracy."""
    name, score = metric_names.split(key)
    return {"top1": "Top-1", "knn_top1": "Top-1 of k-NN"}[score], f"% of {eval_key(name)}"


def _teachers(run: Run) -> str:
    return ", ".join(section.name for section in run.settings.teacher_sections.values()) or "–"


def _side_by_side(runs: Sequence[Run]) -> list[list[str]]:
    """Return the rows of the table that has a column for each run."""
    results = [{row.role: row for row in result_rows(run, None)} for run in runs]
    rows = [
        ["state", *(STATES.get(run.status, ("not finished", ""))[0] for run in runs)],
        ["student", *(run.settings.student.name if run.settings.student else "–" for run in runs)],
        ["teacher", *(_teachers(run) for run in runs)],
    ]

    def row(label: str, text: Callable[[Run, dict[str, Row]], str]) -> None:
        rows.append([label, *(text(run, of_run) for run, of_run in zip(runs, results))])

    def of_student(key: str, show: Callable[[Any], str]) -> Callable[[Run, dict[str, Row]], str]:
        return lambda run, of_run: show(getattr(of_run.get("student"), key, None))

    def times(key: str) -> Callable[[Run, dict[str, Row]], str]:
        return lambda run, of_run: (
            f"{ratio:.2f}×" if (ratio := teacher_over_student([*of_run.values()], key)) else "–"
        )

    row("parameters", of_student("parameters", lambda value: f"{value:,}" if value else "–"))
    row("GFLOP per image", of_student("flops", lambda value: number(value and value / 1e9)))
    row("compression", times("parameters"))
    row("measured speed-up", times("seconds"))
    row("steps", lambda run, _: number(max((line["step"] for line in run.lines), default=0)))
    row(
        "training time",
        lambda run, _: duration(run.summary["seconds"]) if run.summary.get("seconds") else "–",
    )
    row("images/s", lambda run, _: number(run.summary.get("images_per_second")))
    row("last loss", lambda run, _: number(next((line["loss"] for line in run.steps[::-1]), None)))
    for key in _score_names(runs):
        row(f"{key} %", partial(_score, key))
    row("bad samples", lambda run, _: number(run.steps[-1].get("bad_samples", 0) if run.steps else 0))
    row("starts", lambda run, _: number(sum(line["event"] == "start" for line in run.history) or None))
    return rows


def _score_names(runs: Sequence[Run]) -> list[str]:
    """Return the names of all accuracies, and of the scores of retrieval."""
    keys = dict.fromkeys(key for run in runs for key in run.scores)
    retrieval = ("map_", "precision_")
    return [
        key
        for key in keys
        if metric_names.is_accuracy(key) or metric_names.split(key)[1].startswith(retrieval)
    ]


def _score(key: str, run: Run, _: dict[str, Row]) -> str:
    return percent(run.scores.get(key), "")


def _differences(runs: Sequence[Run]) -> list[str]:
    """Return the table of the keys in which the configs differ."""
    flat = [config.flatten(run.settings, without=("run_dir",)) for run in runs]
    keys = dict.fromkeys(key for one in flat for key in one)
    rows = [
        [key, *(json.dumps(one[key]) if key in one else "–" for one in flat)]
        for key in keys
        if any(one.get(key, "–") != flat[0].get(key, "–") for one in flat)
    ]
    if not rows:
        return ['<p class="none">The configs differ in run_dir alone.</p>']
    return [
        f'<div class="texts">{charts.table(["key", *(run.name for run in runs)], rows, "Differences")}</div>'
    ]
