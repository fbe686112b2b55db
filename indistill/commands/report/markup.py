"""The page of the report as it is built, and values formatted for people."""

from __future__ import annotations

import math
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

from indistill.commands.report import charts
from indistill.commands.report.charts import Chart


class Page:
    """The parts of a page in order, and the numbers of its charts."""

    def __init__(self) -> None:
        self.parts: list[str] = []
        self.charts: list[dict[str, Any]] = []

    def add(self, *parts: str) -> None:
        self.parts += parts

    def draw(self, drawings: Iterable[Chart]) -> None:
        """Add charts side by side; charts without points are left out."""
        drawn = []
        for chart in drawings:
            if parts := charts.draw(chart, len(self.charts)):
                markup, numbers = parts
                drawn.append(markup)
                self.charts.append(numbers)
        self.add(
            f'<div class="charts">{"".join(drawn)}</div>'
            if drawn
            else '<p class="none">Nothing recorded yet.</p>'
        )


def finite(value: Any) -> Any:
    """Replace numbers that are not finite by None, in nested mappings."""
    if isinstance(value, dict):
        return {key: finite(one) for key, one in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def percent(value: float | None, unit: str = " %") -> str:
    """Format a fraction as a percentage: 71.23 %, and a dash for None."""
    return "–" if value is None else f"{100 * value:.2f}{unit}"


def duration(seconds: float) -> str:
    """Format a duration: 12 s, 3:20 min, 5:07 h."""
    if seconds < 120:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02} min" if minutes < 120 else f"{minutes // 60}:{minutes % 60:02} h"


def moment(seconds: float) -> str:
    """Format seconds since the epoch as a date and time in UTC."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
