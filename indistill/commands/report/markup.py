"""HTML elements of the report, and numbers as text."""

from __future__ import annotations

import math
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

from indistill.commands.report import charts
from indistill.commands.report.charts import Chart


# --- the page --------------------------------------------------------------------------------------------------------
class Page:
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
            f'<div class="charts">{"".join(drawn)}</div>'
            if drawn
            else '<p class="none">Nothing recorded yet.</p>'
        )


def finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: finite(one) for key, one in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


# --- results ---------------------------------------------------------------------------------------------------------
def percent(value: float | None, unit: str = " %") -> str:
    return "–" if value is None else f"{100 * value:.2f}{unit}"


def duration(seconds: float) -> str:
    """12 s, 3:20 min, 5:07 h."""
    if seconds < 120:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02} min" if minutes < 120 else f"{minutes // 60}:{minutes % 60:02} h"


# --- tables of a run -------------------------------------------------------------------------------------------------
def moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
