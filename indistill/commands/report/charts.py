"""Charts and tables as self-contained HTML: curves in inline SVG, which scales, and labels as text.

A chart has two parts, its markup and its numbers. `page` embeds the numbers of all charts once, and a short
script shows them at a pointer, a finger or the arrow keys.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import Any, NamedTuple

MOST_POINTS = 1000  # per curve
_COLOURS = 8
_DOTS = 25  # points are marked if no curve of a chart has more
_LOG_RATIO = 30.0  # largest / smallest value from which a logarithmic axis is easier to read

Point = tuple[float, float | None]  # a value that is None, or not finite, interrupts the curve


@dataclass(frozen=True)
class Series:
    name: str
    points: Sequence[Point]
    colour: int | None = None  # None: its index in the chart


@dataclass(frozen=True)
class Band:
    """A range of the x axis, start <= x <= end."""

    name: str
    start: float
    end: float


@dataclass(frozen=True)
class Chart:
    title: str
    unit: str  # of the y axis
    series: Sequence[Series]
    x: str = "step"
    bands: Sequence[Band] = ()
    percent: bool = False  # values are fractions, shown as percentages
    from_zero: bool = False
    may_be_log: bool = False
    bars: bool = False  # bars from zero at integer x, instead of curves
    note: str = ""


# --- numbers ------------------------------------------------------------------------------------------------
def thin(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """Select at most `most` points, unchanged: the lowest and highest of each interval, so peaks remain."""
    points = [(x, y if y is not None and math.isfinite(y) else None) for x, y in points]
    if len(points) <= most:
        return points
    intervals = (most - 2) // 2
    kept = {0, len(points) - 1}
    for i in range(intervals):
        indices = range(i * len(points) // intervals, (i + 1) * len(points) // intervals)
        finite = [index for index in indices if points[index][1] is not None] or indices[:1]
        kept.add(min(finite, key=lambda index: points[index][1] or 0))
        kept.add(max(finite, key=lambda index: points[index][1] or 0))
    return [points[index] for index in sorted(kept)]


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Return round numbers within [low, high], at most `most` + 1 of them."""
    span = high - low
    if span < 1e-300:  # a smaller one has no power of ten in floats
        return [low]
    power = 10.0 ** math.floor(math.log10(span / most))
    step = next(power * factor for factor in (1, 2, 5, 10, 20) if span / (power * factor) <= most + 1e-9)
    return [
        round(i * step, 12) for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    ]


def log_ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Return round numbers within [low, high] for a logarithmic axis: powers of ten if there are enough."""
    first = math.ceil(math.log10(low) - 1e-9)
    last = math.floor(math.log10(high) + 1e-9)
    every = max(1, math.ceil((last - first + 1) / most))
    decades = [10.0**power for power in range(first, last + 1, every)]
    if len(decades) > 2:
        return decades
    finer = [f * 10.0**p for p in range(first - 1, last + 1) for f in (1, 2, 5)]
    return [tick for tick in finer if low <= tick * (1 + 1e-9) and tick <= high * (1 + 1e-9)]


def number(value: Any, digits: int = 4) -> str:
    """Format a value for people: 1,234 and 0.01234, and a dash for None and values that are not finite."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    if isinstance(value, int) or (abs(value) >= 10 ** (digits - 1) and abs(value) < 1e15):
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"


def short(value: float) -> str:
    """Format a value for an axis: 12k, 0.05, 1e-05."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


# --- charts -------------------------------------------------------------------------------------------------
class _Axis:
    """Maps values to 0..1000, and has the labels of the ticks at their positions."""

    def __init__(self, low: float, high: float, log: bool = False, scale: float = 1.0) -> None:
        self.low = low
        self.high = high
        self.log = log
        shown = (log_ticks if log else ticks)(low * scale, high * scale)
        self.labels = [(self.at(tick / scale), short(tick)) for tick in shown]

    def at(self, value: float) -> float:
        low = math.log(self.low) if self.log else self.low
        high = math.log(self.high) if self.log else self.high
        value = math.log(value) if self.log else value
        return 1000 * (value - low) / (high - low) if high > low else 500.0


class _Axes(NamedTuple):
    x: _Axis
    y: _Axis


def _x_axis(chart: Chart, series: Sequence[Series]) -> _Axis:
    half = 0.5 if chart.bars else 0.0  # of a bar's width
    xs = [x for one in series for x, _ in one.points] + [band.end for band in chart.bands]
    return _Axis(min(0, *xs) - half, max(1, *xs) + half)


def _y_axis(chart: Chart, series: Sequence[Series]) -> _Axis:
    values = [y for one in series for _, y in one.points if y is not None]
    low = min(values)
    high = max(values)
    scale = 100.0 if chart.percent else 1.0
    if chart.may_be_log and low > 0 and high / low > _LOG_RATIO:
        return _Axis(low / 1.15, high * 1.15, True, scale)
    if chart.from_zero or chart.bars:
        low = min(0.0, low)
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    low = low if low == 0 and (chart.from_zero or chart.bars) else low - margin
    high += margin
    if chart.percent and min(values) >= 0 and max(values) <= 1:
        low = max(low, 0.0)
        high = min(high, 1.0)
        if low == high:  # all values are 0, or all are 1
            low = max(0.0, low - 0.05)
            high = min(1.0, high + 0.05)
    return _Axis(low, high, False, scale)


def draw(chart: Chart, index: int) -> tuple[str, dict[str, Any]] | None:
    """Return a chart's markup and its numbers, which the page lists at `index`.

    Series without points are left out; None if all are.
    """
    series = [replace(one, points=thin(one.points)) for one in chart.series]
    series = [one for one in series if any(y is not None for _, y in one.points)]
    if not series:
        return None
    if len(series) > 1:
        series = [replace(one, colour=i) if one.colour is None else one for i, one in enumerate(series)]
    axes = _Axes(_x_axis(chart, series), _y_axis(chart, series))
    return _figure(chart, series, axes, index), _numbers(chart, series, axes)


def _figure(chart: Chart, series: Sequence[Series], axes: _Axes, index: int) -> str:
    unit = ", ".join(part for part in (chart.unit, "logarithmic" if axes.y.log else "") if part)
    thinned = any(len(one.points) > MOST_POINTS for one in chart.series)
    note = " ".join(part for part in (chart.note, _THINNED if thinned else "") if part)
    label = f"{chart.title}, {unit}, by {chart.x}: {', '.join(one.name for one in series)}"
    label = escape(f"{label}. Arrow keys show the values.", quote=True)
    y_labels = [
        f'<span class="y" style="top:{100 - at / 10:.2f}%">{text}</span>' for at, text in axes.y.labels
    ]
    x_labels = [f'<span class="x" style="left:{at / 10:.2f}%">{text}</span>' for at, text in axes.x.labels]
    parts = [
        f"<figure><figcaption><b>{escape(chart.title)}</b> ",
        f'<span class="unit">{escape(unit)}</span></figcaption>',
        _legend(series),
        f'<div class="plot" data-chart="{index}" tabindex="0" role="group" aria-label="{label}">',
        *y_labels,
        *x_labels,
        f'<span class="xlabel">{escape(chart.x)}</span>{_band_names(chart.bands, axes.x)}',
        '<svg viewBox="0 0 1000 1000" preserveAspectRatio="none" aria-hidden="true">',
        *_shapes(chart, series, axes),
        '</svg><div class="cross" hidden></div><div class="tip" hidden role="status"></div></div>',
        f'<p class="note">{escape(note)}</p>' if note else "",
        "</figure>",
    ]
    return "".join(parts)


_THINNED = (
    f"At most {MOST_POINTS:,} points of each curve are shown, with exact values: the lowest and highest of "
    "each interval."
)


def _legend(series: Sequence[Series]) -> str:
    """Return the names of the series; a single one in the default colour needs none."""
    if series[0].colour is None:
        return ""
    names = [f'<span class="name"><i class="f{_colour(one)}"></i>{escape(one.name)}</span>' for one in series]
    return f'<div class="names">{"".join(names)}</div>'


def _shapes(chart: Chart, series: Sequence[Series], axes: _Axes) -> list[str]:
    """Return the SVG elements of a chart: bands, grid, and curves or bars."""
    grid = [f'<path class="grid" d="M0 {1000 - at:.1f}H1000"/>' for at, _ in axes.y.labels]
    if chart.bars:
        return [_bands(chart.bands, axes.x), *grid, *(_bars(one, axes) for one in series)]
    dots = all(len(one.points) <= _DOTS for one in series)
    return [_bands(chart.bands, axes.x), *grid, *(_curve(one, axes, dots) for one in series)]


def _numbers(chart: Chart, series: Sequence[Series], axes: _Axes) -> dict[str, Any]:
    """Return what the page's script reads of a chart."""
    curves = [
        {
            "name": one.name,
            "colour": _colour(one),
            "x": [x for x, _ in one.points],
            "y": [y for _, y in one.points],
        }
        for one in series
    ]
    return {
        "title": chart.title,
        "x": chart.x,
        "range": [axes.x.low, axes.x.high],
        "percent": chart.percent,
        "bars": chart.bars,
        "bands": [[band.name, band.start, band.end] for band in chart.bands],
        "series": curves,
    }


def _colour(series: Series) -> int:
    """Return the index of a colour of the page's style."""
    return (series.colour or 0) % _COLOURS


def _curve(series: Series, axes: _Axes, dots: bool) -> str:
    parts = []
    marks = []
    pen = "M"
    for x, y in series.points:
        if y is None:
            pen = "M"
            continue
        at = f"{axes.x.at(x):.1f} {1000 - axes.y.at(y):.1f}"
        parts.append(f"{pen}{at}h0" if pen == "M" else f"{pen}{at}")  # h0 shows a single point
        marks.append(f"M{at}h0")
        pen = "L"
    colour = _colour(series)
    line = f'<path class="s{colour}" d="{"".join(parts)}"/>'
    return line + (f'<path class="s{colour} dot" d="{"".join(marks)}"/>' if dots else "")


def _bars(series: Series, axes: _Axes) -> str:
    width = 800 / (axes.x.high - axes.x.low)
    base = 1000 - axes.y.at(0.0)
    rectangles = "".join(
        f"M{axes.x.at(x) - width / 2:.2f} {base:.1f}V{1000 - axes.y.at(y):.1f}h{width:.2f}V{base:.1f}z"
        for x, y in series.points
        if y is not None
    )
    return f'<path class="b{_colour(series)}" d="{rectangles}"/>'


def _bands(bands: Sequence[Band], axis: _Axis) -> str:
    """Return the background bands of the warm-up phases; later phases have none."""
    return "".join(
        f'<path class="band{i % 2}" d="M{axis.at(band.start):.1f} 0V1000H{axis.at(band.end):.1f}V0z"/>'
        for i, band in enumerate(bands)
        if band.name.startswith("warmup")
    )


def _band_names(bands: Sequence[Band], axis: _Axis) -> str:
    names = []
    for band in bands:
        left, right = axis.at(band.start) / 10, axis.at(band.end) / 10
        name = band.name if right - left > 22 else band.name.removeprefix("warmup ")
        name = name if right - left > 8 else ""  # on a phone it would overlap the next
        style = f"left:{left:.2f}%;width:{right - left:.2f}%"
        names.append(f'<span class="band" style="{style}" title="{escape(band.name)}">{escape(name)}</span>')
    return "".join(names)


# --- tables and the page ------------------------------------------------------------------------------------
def table(columns: Sequence[str], rows: Iterable[Sequence[Any]], label: str) -> str:
    """Return a table, with escaped cells. The first cell of a row is its heading; a wide table scrolls."""
    head = "".join(f'<th scope="col">{escape(str(column))}</th>' for column in columns)
    body = "".join(_row(*row) for row in rows)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(label)}">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _row(heading: Any, *cells: Any) -> str:
    rest = "".join(f"<td>{escape(str(cell))}</td>" for cell in cells)
    return f'<tr><th scope="row">{escape(str(heading))}</th>{rest}</tr>'


MARK = b": indistill</title>"  # at the beginning of every report


def page(title: str, body: str, data: dict[str, Any]) -> str:
    """Return the HTML file. Raises ValueError if a number in `data` is not finite."""
    embedded = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}{MARK.decode()}\n<style>{_STYLE}</style>\n</head>\n<body>\n{body}\n"
        f'<script type="application/json" id="data">{embedded}</script>\n<script>{_SCRIPT}</script>\n'
        "</body>\n</html>\n"
    )


# Contrast to the background: 7 for text, 4.5 for each colour, 3 for the grey of channels that are left out.
_STYLE = """
:root { --bg: #ffffff; --fg: #1b1f24; --muted: #4d5661; --line: #d5dae0; --card: #f6f8fa; --band0: #e6eef9;
  --band1: #f3f1e4; --c0: #0b5cad; --c1: #b34700; --c2: #08734a; --c3: #8136a8; --c4: #b0203a; --c5: #0b6e82;
  --c6: #77590c; --c7: #89929c; }
@media screen and (prefers-color-scheme: dark) {
  :root { --bg: #14171c; --fg: #e8ebef; --muted: #aab3be; --line: #353c46; --card: #1c2027; --band0: #1d2938;
    --band1: #2b291f; --c0: #6cb2ff; --c1: #ffa868; --c2: #5ccf98; --c3: #d09bf5; --c4: #ff8c9d;
    --c5: #5ccfe0; --c6: #dfbf5f; --c7: #6f7985; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0 auto; padding: 1rem; max-width: 76rem; background: var(--bg); color: var(--fg);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { margin: .2rem 0; font-size: 1.6rem; line-height: 1.2; overflow-wrap: anywhere; }
h2 { margin: 2.2rem 0 .6rem; font-size: 1.2rem; border-bottom: 1px solid var(--line); padding-bottom: .2rem; }
p { margin: .4rem 0; overflow-wrap: anywhere; }
a { color: var(--c0); }
.sub, .note, .none, .unit { color: var(--muted); }
.note, .unit { font-size: .85rem; }
.state { display: inline-block; padding: 0 .55em; border: 1px solid currentColor; border-radius: 1em;
  font-weight: 600;
  font-size: .85rem; }
.state.good { color: var(--c2); } .state.bad { color: var(--c4); } .state.open { color: var(--c1); }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: .6rem;
  margin: 1rem 0; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .5rem .75rem; }
.card b { display: block; font-size: 1.45rem; line-height: 1.3; font-variant-numeric: tabular-nums; }
.card span { color: var(--muted); font-size: .85rem; }
.scroll { overflow-x: auto; margin: .6rem 0; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .28rem .7rem; text-align: right; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
th[scope=row], th:first-child { text-align: left; font-weight: 600; position: sticky; left: 0;
  background: var(--bg); }
thead th { color: var(--muted); font-weight: 500; }
.texts td { text-align: left; white-space: normal; min-width: 5rem; overflow-wrap: anywhere; }
.texts td:last-child { min-width: 10rem; }
.texts th { text-align: left; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 21rem), 1fr));
  gap: 1.2rem 2rem; }
figure { margin: 0; min-width: 0; }
.names { display: flex; flex-wrap: wrap; gap: .1rem .9rem; font-size: .85rem; }
.name i { display: inline-block; width: .75em; height: .75em; margin-right: .35em; border-radius: 2px; }
.plot { position: relative; height: 14rem; margin: 1.5rem .9rem 2.6rem 3.2rem; touch-action: pan-y;
  cursor: crosshair; }
.plot:focus-visible, .scroll:focus-visible { outline: 2px solid var(--c0); outline-offset: 3px; }
.plot svg { display: block; width: 100%; height: 100%; overflow: visible; border-left: 1px solid var(--muted);
  border-bottom: 1px solid var(--muted); }
.plot > span { position: absolute; font-size: .75rem; line-height: 1; color: var(--muted);
  white-space: nowrap; }
.plot .y { right: 100%; margin-right: .4rem; transform: translateY(-50%); }
.plot .x { top: 100%; margin-top: .4rem; transform: translateX(-50%); }
.plot .xlabel { top: 100%; right: 0; margin-top: 1.35rem; }
.plot .band { bottom: 100%; margin-bottom: .3rem; text-align: center; overflow: hidden; text-overflow: clip; }
path { fill: none; vector-effect: non-scaling-stroke; stroke-width: 1.75; stroke-linejoin: round;
  stroke-linecap: round; }
path.grid { stroke: var(--line); stroke-width: 1; }
path.dot { stroke-width: 6; }
path.band0 { fill: var(--band0); } path.band1 { fill: var(--band1); }
.cross { position: absolute; top: 0; bottom: 0; width: 0; border-left: 1px solid var(--fg);
  pointer-events: none; }
.tip { position: absolute; top: .25rem; max-width: 88%; padding: .35rem .55rem; background: var(--bg);
  color: var(--fg);
  border: 1px solid var(--muted); border-radius: .35rem; font-size: .8rem; line-height: 1.35;
  pointer-events: none;
  font-variant-numeric: tabular-nums; z-index: 1; }
.tip div { display: flex; justify-content: space-between; gap: .9rem; }
.tip i { display: inline-block; width: .65em; height: .65em; margin-right: .35em; border-radius: 2px; }
@media (max-width: 32rem) { th, td { padding: .28rem .45rem; }
  th[scope=row] { min-width: 7.5rem; white-space: normal; overflow-wrap: anywhere; } }
[hidden] { display: none !important; }
details { margin: .8rem 0; }
summary { cursor: pointer; font-weight: 600; overflow-wrap: anywhere; }
details.run { border-top: 2px solid var(--line); padding-top: .6rem; }
details.run > summary { font-size: 1.25rem; }
pre { overflow-x: auto; padding: .7rem; background: var(--card); border: 1px solid var(--line);
  border-radius: .4rem;
  font-size: .8rem; line-height: 1.4; }
@media print { html { font-size: 11px; } body { max-width: none; } figure, tr, .card { break-inside: avoid; }
  i { print-color-adjust: exact; } th, td { white-space: normal; }
  .plot { height: 9rem; } .charts { grid-template-columns: 1fr 1fr; } pre { white-space: pre-wrap; } }
""" + "".join(
    f".s{i} {{ stroke: var(--c{i}) }} .f{i} {{ background: var(--c{i}) }} "
    f".b{i} {{ fill: var(--c{i}); stroke: none }}\n"
    for i in range(_COLOURS)
)

_SCRIPT = """
"use strict";
const charts = JSON.parse(document.getElementById("data").textContent).charts;
const format = (value, percent) => value === null ? "not finite" :
  String(Number((percent ? 100 * value : value).toPrecision(6))) + (percent ? " %" : "");

function nearest(xs, x) {
  let low = 0, high = xs.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (xs[middle] <= x) low = middle; else high = middle;
  }
  return Math.abs(xs[high] - x) < Math.abs(xs[low] - x) ? high : low;
}

for (const plot of document.querySelectorAll("[data-chart]")) {
  const chart = charts[plot.dataset.chart], [first, last] = chart.range;
  const cross = plot.querySelector(".cross"), tip = plot.querySelector(".tip");
  const all = [...new Set(chart.series.flatMap(series => series.x))].sort((a, b) => a - b);
  let at = -1;

  function row(name, value, colour) {
    const line = document.createElement("div"), left = document.createElement("span");
    const right = document.createElement("b");
    if (colour !== undefined) {
      left.append(Object.assign(document.createElement("i"), {className: "f" + colour}));
    }
    left.append(name);
    right.append(value);
    line.append(left, right);
    return line;
  }

  function show(index) {
    at = index;
    const x = all[index], share = (x - first) / (last - first);
    const band = chart.bands.find(([, start, end]) => x > start && x <= end);
    const rows = [row(chart.x + (band ? ", " + band[0] : ""), x.toLocaleString("en"))];
    for (const series of chart.series) {
      const i = nearest(series.x, x), away = Math.abs(series.x[i] - x);
      if (away > (chart.bars ? 0 : 0.03 * (last - first))) continue;
      const where = away ? " (at " + series.x[i].toLocaleString("en") + ")" : "";
      rows.push(row(series.name + where, format(series.y[i], chart.percent), series.colour));
    }
    tip.replaceChildren(...rows);
    cross.style.left = 100 * share + "%";
    tip.style.left = share < 0.5 ? "auto" : "0.3rem";
    tip.style.right = share < 0.5 ? "0.3rem" : "auto";
    cross.hidden = tip.hidden = false;
  }

  function hide() { cross.hidden = tip.hidden = true; }
  function point(event) {
    const box = plot.getBoundingClientRect();
    show(nearest(all, first + (last - first) * (event.clientX - box.left) / box.width));
  }
  plot.addEventListener("pointermove", point);
  plot.addEventListener("pointerdown", point);
  plot.addEventListener("pointerleave", event => { if (event.pointerType === "mouse") hide(); });
  plot.addEventListener("blur", hide);
  plot.addEventListener("keydown", event => {
    const moved = {ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: all.length - 1}[event.key];
    if (event.key === "Escape") hide();
    if (moved === undefined) return;
    event.preventDefault();
    show(Math.max(0, Math.min(all.length - 1, moved)));
  });
}
"""
