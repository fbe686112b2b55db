"""Charts and tables as HTML that needs nothing else: curves in inline SVG, which stretches, and labels that stay text.

A chart comes in two parts, the markup and the numbers behind it, which a page embeds once for all its charts
(`page`): a few lines of JavaScript show them where a pointer, a finger or the arrow keys are.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

MOST_POINTS = 1000  # of a curve
_COLOURS = 8
_DOTS = 25  # where no curve of a chart has more points, each is marked
_LOG_RATIO = 30.0  # from here on positive values are easier to read on a logarithmic axis

Point = tuple[float, float | None]  # a value that is None, or not finite, interrupts the curve


@dataclass(frozen=True)
class Series:
    name: str
    points: Sequence[Point]
    colour: int | None = None  # else by its place in the chart


@dataclass(frozen=True)
class Band:
    """A stretch of the x axis, start <= x <= end."""

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
    percent: bool = False  # values are fractions, and shown as percentages
    from_zero: bool = False
    may_be_log: bool = False
    bars: bool = False  # of whole numbers x, from zero
    note: str = ""


# --- numbers ---------------------------------------------------------------------------------------------------------
def thin(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """At most `most` of the points, none changed: the lowest and highest of each stretch, so that no spike is lost."""
    points = [(x, y if y is not None and math.isfinite(y) else None) for x, y in points]
    if len(points) <= most:
        return points
    stretches, kept = (most - 2) // 2, {0, len(points) - 1}
    for i in range(stretches):
        places = range(i * len(points) // stretches, (i + 1) * len(points) // stretches)
        finite = [place for place in places if points[place][1] is not None] or places[:1]
        kept |= {
            min(finite, key=lambda place: points[place][1] or 0),
            max(finite, key=lambda p: points[p][1] or 0),
        }
    return [points[place] for place in sorted(kept)]


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers within [low, high], at most `most` + 1 of them."""
    span = high - low
    if span <= 0:
        return [low]
    power = 10.0 ** math.floor(math.log10(span / most))
    step = next(power * factor for factor in (1, 2, 5, 10, 20) if span / (power * factor) <= most + 1e-9)
    return [
        round(i * step, 12) for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    ]


def log_ticks(low: float, high: float, most: int = 5) -> list[float]:
    first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
    every = max(1, math.ceil((last - first + 1) / most))
    decades = [10.0**power for power in range(first, last + 1, every)]
    if len(decades) > 2:
        return decades
    finer = [f * 10.0**p for p in range(first - 1, last + 1) for f in (1, 2, 5)]
    return [tick for tick in finer if low <= tick * (1 + 1e-9) and tick <= high * (1 + 1e-9)]


def number(value: Any, digits: int = 4) -> str:
    """For people: 1,234 and 0.01234, and a dash for what is not known."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    if isinstance(value, int) or (abs(value) >= 10 ** (digits - 1) and abs(value) < 1e15):
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"


def short(value: float) -> str:
    """For an axis: 12k, 0.05, 1e-05."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


# --- charts ----------------------------------------------------------------------------------------------------------
class _Axis:
    """From values to 0..1000, and the ticks."""

    def __init__(self, low: float, high: float, log: bool, scale: float = 1.0) -> None:
        self.low, self.high, self.log = low, high, log
        self.labels = [
            (self.at(tick / scale), short(tick))
            for tick in (log_ticks if log else ticks)(low * scale, high * scale)
        ]

    def at(self, value: float) -> float:
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        value = math.log(value) if self.log else value
        return 1000 * (value - low) / (high - low) if high > low else 500.0


def _y_axis(chart: Chart, values: Sequence[float]) -> _Axis:
    low, high, scale = min(values), max(values), 100.0 if chart.percent else 1.0
    if chart.may_be_log and low > 0 and high / low > _LOG_RATIO:
        return _Axis(low / 1.15, high * 1.15, True, scale)
    if chart.from_zero or chart.bars:
        low = min(0.0, low)
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    low = low if low == 0 and (chart.from_zero or chart.bars) else low - margin
    high += margin
    if chart.percent and min(values) >= 0 and max(values) <= 1:
        low, high = max(low, 0.0), min(high, 1.0)
        if low == high:  # all of them the same, at an end
            low, high = max(0.0, low - 0.05), min(1.0, high + 0.05)
    return _Axis(low, high, False, scale)


def draw(chart: Chart, place: int) -> tuple[str, dict[str, Any]] | None:
    """A chart's markup and its numbers, whose place in the page's list is `place`; None if there are none.

    Series without any are left out.
    """
    series = [Series(one.name, thin(one.points), one.colour) for one in chart.series]
    series = [one for one in series if any(y is not None for _, y in one.points)]
    if not series:
        return None
    xs = [x for one in series for x, _ in one.points]
    y_axis = _y_axis(chart, [y for one in series for _, y in one.points if y is not None])
    half = 0.5 if chart.bars else 0.0
    xs += [band.end for band in chart.bands]
    x_axis = _Axis(min(0, *xs) - half, max(1, *xs) + half, False)

    shapes = [_bands(chart.bands, x_axis)]
    shapes += [f'<path class="grid" d="M0 {1000 - at:.1f}H1000"/>' for at, _ in y_axis.labels]
    colours = [i if one.colour is None else one.colour for i, one in enumerate(series)]
    dots = all(len(one.points) <= _DOTS for one in series)
    for colour, one in zip(colours, series):
        shapes.append(
            _bars(one, x_axis, y_axis, colour) if chart.bars else _curve(one, x_axis, y_axis, colour, dots)
        )
    unit = ", ".join(part for part in (chart.unit, "logarithmic" if y_axis.log else "") if part)
    thinned = any(len(one.points) > MOST_POINTS for one in chart.series)
    note = " ".join(part for part in (chart.note, _THINNED if thinned else "") if part)
    names = [
        f'<span class="name"><i class="f{c % _COLOURS}"></i>{escape(s.name)}</span>'
        for c, s in zip(colours, series)
    ]
    told = f"{chart.title}, {unit}, by {chart.x}: {', '.join(one.name for one in series)}"
    label = escape(f"{told}. Arrow keys show the values.", quote=True)
    html = (
        f'<figure><figcaption><b>{escape(chart.title)}</b> <span class="unit">{escape(unit)}</span></figcaption>'
        + (
            f'<div class="names">{"".join(names)}</div>'
            if len(series) > 1 or series[0].colour is not None
            else ""
        )
        + f'<div class="plot" data-chart="{place}" tabindex="0" role="group" aria-label="{label}">'
        + "".join(
            f'<span class="y" style="top:{100 - at / 10:.2f}%">{text}</span>' for at, text in y_axis.labels
        )
        + "".join(f'<span class="x" style="left:{at / 10:.2f}%">{text}</span>' for at, text in x_axis.labels)
        + f'<span class="xlabel">{escape(chart.x)}</span>{_band_names(chart.bands, x_axis)}'
        + '<svg viewBox="0 0 1000 1000" preserveAspectRatio="none" aria-hidden="true">'
        + "".join(shapes)
        + '</svg><div class="cross" hidden></div><div class="tip" hidden role="status"></div></div>'
        + (f'<p class="note">{escape(note)}</p>' if note else "")
        + "</figure>"
    )
    numbers = {
        "title": chart.title,
        "x": chart.x,
        "range": [x_axis.low, x_axis.high],
        "percent": chart.percent,
        "bars": chart.bars,
        "bands": [[band.name, band.start, band.end] for band in chart.bands],
        "series": [
            {
                "name": one.name,
                "colour": colour % _COLOURS,
                "x": [x for x, _ in one.points],
                "y": [y for _, y in one.points],
            }
            for colour, one in zip(colours, series)
        ],
    }
    return html, numbers


_THINNED = f"Of each curve at most {MOST_POINTS:,} points are shown, their values exact: each stretch's lowest and highest."


def _curve(series: Series, x_axis: _Axis, y_axis: _Axis, colour: int, dots: bool) -> str:
    parts, marks, pen = [], [], "M"
    for x, y in series.points:
        if y is None:
            pen = "M"
            continue
        at = f"{x_axis.at(x):.1f} {1000 - y_axis.at(y):.1f}"
        parts.append(f"{pen}{at}h0" if pen == "M" else f"{pen}{at}")  # h0 shows a point that stands alone
        marks.append(f"M{at}h0")
        pen = "L"
    line = f'<path class="s{colour % _COLOURS}" d="{"".join(parts)}"/>'
    return line + (f'<path class="s{colour % _COLOURS} dot" d="{"".join(marks)}"/>' if dots else "")


def _bars(series: Series, x_axis: _Axis, y_axis: _Axis, colour: int) -> str:
    width = 800 / (x_axis.high - x_axis.low)
    base = 1000 - y_axis.at(0.0)
    rectangles = "".join(
        f"M{x_axis.at(x) - width / 2:.2f} {base:.1f}V{1000 - y_axis.at(y):.1f}h{width:.2f}V{base:.1f}z"
        for x, y in series.points
        if y is not None
    )
    return f'<path class="b{colour % _COLOURS}" d="{rectangles}"/>'


def _bands(bands: Sequence[Band], axis: _Axis) -> str:
    """Those of the warm-up; what follows stays plain."""
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
        name = name if right - left > 8 else ""  # on a phone it would run into the next
        style = f"left:{left:.2f}%;width:{right - left:.2f}%"
        names.append(f'<span class="band" style="{style}" title="{escape(band.name)}">{escape(name)}</span>')
    return "".join(names)


# --- tables and the page ---------------------------------------------------------------------------------------------
def table(columns: Sequence[str], rows: Iterable[Sequence[Any]], label: str) -> str:
    """Cells are text, escaped here; the first of a row is its heading. A wide one scrolls inside itself."""
    head = "".join(f'<th scope="col">{escape(str(column))}</th>' for column in columns)
    body = "".join(
        f'<tr><th scope="row">{escape(str(first))}</th>{"".join(f"<td>{escape(str(cell))}</td>" for cell in rest)}</tr>'
        for first, *rest in rows
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(label)}"><table><thead><tr>{head}</tr>'
        f"</thead><tbody>{body}</tbody></table></div>"
    )


def page(title: str, body: str, data: dict[str, Any]) -> str:
    """The whole file. `data` must be JSON, without numbers that are not finite."""
    embedded = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n{body}\n"
        f'<script type="application/json" id="data">{embedded}</script>\n<script>{_SCRIPT}</script>\n</body>\n</html>\n'
    )


# To the background text has a contrast of 7, each colour one of 4.5, and the grey of what is left out one of 3.
_STYLE = """
:root { --bg: #ffffff; --fg: #1b1f24; --muted: #4d5661; --line: #d5dae0; --card: #f6f8fa; --band0: #e6eef9;
  --band1: #f3f1e4; --c0: #0b5cad; --c1: #b34700; --c2: #08734a; --c3: #8136a8; --c4: #b0203a; --c5: #0b6e82;
  --c6: #77590c; --c7: #89929c; }
@media screen and (prefers-color-scheme: dark) {
  :root { --bg: #14171c; --fg: #e8ebef; --muted: #aab3be; --line: #353c46; --card: #1c2027; --band0: #1d2938;
    --band1: #2b291f; --c0: #6cb2ff; --c1: #ffa868; --c2: #5ccf98; --c3: #d09bf5; --c4: #ff8c9d; --c5: #5ccfe0;
    --c6: #dfbf5f; --c7: #6f7985; } }
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
.state { display: inline-block; padding: 0 .55em; border: 1px solid currentColor; border-radius: 1em; font-weight: 600;
  font-size: .85rem; }
.state.good { color: var(--c2); } .state.bad { color: var(--c4); } .state.open { color: var(--c1); }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: .6rem; margin: 1rem 0; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .5rem .75rem; }
.card b { display: block; font-size: 1.45rem; line-height: 1.3; font-variant-numeric: tabular-nums; }
.card span { color: var(--muted); font-size: .85rem; }
.scroll { overflow-x: auto; margin: .6rem 0; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .28rem .7rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th[scope=row], th:first-child { text-align: left; font-weight: 600; position: sticky; left: 0; background: var(--bg); }
thead th { color: var(--muted); font-weight: 500; }
.texts td { text-align: left; white-space: normal; min-width: 5rem; overflow-wrap: anywhere; }
.texts td:last-child { min-width: 10rem; }
.texts th { text-align: left; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 21rem), 1fr)); gap: 1.2rem 2rem; }
figure { margin: 0; min-width: 0; }
.names { display: flex; flex-wrap: wrap; gap: .1rem .9rem; font-size: .85rem; }
.name i { display: inline-block; width: .75em; height: .75em; margin-right: .35em; border-radius: 2px; }
.plot { position: relative; height: 14rem; margin: 1.5rem .9rem 2.6rem 3.2rem; touch-action: pan-y; cursor: crosshair; }
.plot:focus-visible, .scroll:focus-visible { outline: 2px solid var(--c0); outline-offset: 3px; }
.plot svg { display: block; width: 100%; height: 100%; overflow: visible; border-left: 1px solid var(--muted);
  border-bottom: 1px solid var(--muted); }
.plot > span { position: absolute; font-size: .75rem; line-height: 1; color: var(--muted); white-space: nowrap; }
.plot .y { right: 100%; margin-right: .4rem; transform: translateY(-50%); }
.plot .x { top: 100%; margin-top: .4rem; transform: translateX(-50%); }
.plot .xlabel { top: 100%; right: 0; margin-top: 1.35rem; }
.plot .band { bottom: 100%; margin-bottom: .3rem; text-align: center; overflow: hidden; text-overflow: clip; }
path { fill: none; vector-effect: non-scaling-stroke; stroke-width: 1.75; stroke-linejoin: round;
  stroke-linecap: round; }
path.grid { stroke: var(--line); stroke-width: 1; }
path.dot { stroke-width: 6; }
path.band0 { fill: var(--band0); } path.band1 { fill: var(--band1); }
.cross { position: absolute; top: 0; bottom: 0; width: 0; border-left: 1px solid var(--fg); pointer-events: none; }
.tip { position: absolute; top: .25rem; max-width: 88%; padding: .35rem .55rem; background: var(--bg); color: var(--fg);
  border: 1px solid var(--muted); border-radius: .35rem; font-size: .8rem; line-height: 1.35; pointer-events: none;
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
pre { overflow-x: auto; padding: .7rem; background: var(--card); border: 1px solid var(--line); border-radius: .4rem;
  font-size: .8rem; line-height: 1.4; }
@media print { html { font-size: 11px; } body { max-width: none; } figure, tr, .card { break-inside: avoid; }
  i { print-color-adjust: exact; } th, td { white-space: normal; }
  .plot { height: 9rem; } .charts { grid-template-columns: 1fr 1fr; } pre { white-space: pre-wrap; } }
""" + "".join(
    f".s{i} {{ stroke: var(--c{i}) }} .f{i} {{ background: var(--c{i}) }} .b{i} {{ fill: var(--c{i}); stroke: none }}\n"
    for i in range(_COLOURS)
)

_SCRIPT = """
"use strict";
const charts = JSON.parse(document.getElementById("data").textContent).charts;
const said = (value, percent) => value === null ? "not finite" :
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
    if (colour !== undefined) left.append(Object.assign(document.createElement("i"), {className: "f" + colour}));
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
      rows.push(row(series.name + where, said(series.y[i], chart.percent), series.colour));
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
