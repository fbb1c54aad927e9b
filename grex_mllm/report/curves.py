"""Training curves as inline SVG: raw points pale, smoothed line strong, linear and logarithmic without any script."""

from __future__ import annotations

import math
from collections.abc import Sequence

from grex_mllm.report.html import escape
from grex_mllm.report.run_files import LogSeries

WIDTH, HEIGHT = 340, 196
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 12, 26
MAX_RAW_POINTS = 320
SMOOTHING_SHARE = 0.05  # of the points lie in the window of the smoothed line
UNINTERESTING = {"elapsed_s"}
Points = Sequence[tuple[float, float]]


def smooth(values: Sequence[float]) -> list[float]:
    """Return the mean over a window around each point, cut at the ends: it does not lag behind."""
    reach = round(SMOOTHING_SHARE * len(values) / 2)
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    ends = ((max(0, place - reach), min(len(values), place + reach + 1)) for place in range(len(values)))
    return [(sums[stop] - sums[start]) / (stop - start) for start, stop in ends]


def thin(points: Points, most: int = MAX_RAW_POINTS) -> list[tuple[float, float]]:
    """Return at most `most` points: the extremes of each stretch stay, so that spikes are not hidden."""
    if len(points) <= most:
        return list(points)
    size = math.ceil(2 * len(points) / most)
    kept: list[tuple[float, float]] = []
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        ends = {min(stretch, key=lambda point: point[1]), max(stretch, key=lambda point: point[1])}
        kept.extend(sorted(ends))
    return kept


def linear_ticks(low: float, high: float, most: int = 4) -> list[float]:
    """Return round numbers in [low, high]."""
    span = high - low
    if span <= 0:
        return [low]
    raw = span / most
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(index * step, 12) for index in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Return powers of ten in [low, high], with 2 and 5 between them where they are few."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 3), (1, 2, 5), (1, 2, 3, 4, 5, 6, 8)):
        ticks = [factor * 10.0**power for power in powers for factor in factors if low <= factor * 10.0**power <= high]
        if len(ticks) >= 3:
            return ticks[:: math.ceil(len(ticks) / 5)]
    return ticks or [low]


def tick_text(value: float) -> str:
    """Return a short number: 0.05, 2k, 1.5M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.0e}" if 0 < abs(value) < 1e-3 else f"{value:.3g}"


def chart(series: LogSeries, css_class: str, logarithmic: bool = False) -> str:
    """Return one SVG figure of one series. css_class sets the colour; logarithmic charts leave out values of zero and below."""
    points = [point for point in series.points if not logarithmic or point[1] > 0]
    if not points:
        return ""
    smoothed = list(zip([step for step, _ in points], smooth([value for _, value in points])))
    low, high = _value_range([value for _, value in points], [value for _, value in smoothed], logarithmic)
    first, last = points[0][0], points[-1][0]

    def x_of(step: float) -> float:
        return LEFT + (step - first) / ((last - first) or 1) * (WIDTH - LEFT - RIGHT)

    def y_of(value: float) -> float:
        share = math.log(value / low) / math.log(high / low) if logarithmic else (value - low) / (high - low)
        return TOP + (1 - min(max(share, -0.05), 1.05)) * (HEIGHT - TOP - BOTTOM)

    def path_of(line: Points) -> str:
        return "M" + "L".join(f"{x_of(step):.1f} {y_of(value):.1f}" for step, value in line)

    grid = "".join(
        f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y_of(tick):.1f}" y2="{y_of(tick):.1f}"/>'
        f'<text x="{LEFT - 6}" y="{y_of(tick) + 3.5:.1f}" text-anchor="end">{tick_text(tick)}</text>'
        for tick in (log_ticks(low, high) if logarithmic else linear_ticks(low, high))
    )
    steps = "".join(
        f'<text x="{x_of(tick):.1f}" y="{HEIGHT - 8}" text-anchor="{_anchor(x_of(tick))}">{tick_text(tick)}</text>'
        for tick in linear_ticks(first, last)
    )
    end_step, end_value = smoothed[-1]
    scale = "logarithmic" if logarithmic else "linear"
    summary = (
        f"{series.name} of {series.task} over steps {first:g} to {last:g}, {scale} axis: "
        f"from {smoothed[0][1]:.4g} to {end_value:.4g}, smoothed"
    )
    return (
        f'<figure class="chart {css_class}"><figcaption><b>{escape(series.name)}</b><span>{end_value:.4g}</span></figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(summary)}"><g class="grid">{grid}{steps}</g>'
        f'<path class="raw" d="{path_of(thin(points))}"/><path class="smooth" d="{path_of(thin(smoothed))}"/>'
        f'<circle cx="{x_of(end_step):.1f}" cy="{y_of(end_value):.1f}" r="3"/></svg></figure>'
    )


def _anchor(x: float) -> str:
    return "end" if x > WIDTH - RIGHT - 12 else "middle"


def _value_range(values: list[float], smoothed: list[float], logarithmic: bool) -> tuple[float, float]:
    """Return the ends of the value axis: the highest percent of raw points may stand above it, the smoothed line never."""
    high = max(sorted(values)[int(0.99 * (len(values) - 1))], max(smoothed))
    low = min(min(values), min(smoothed))
    if logarithmic:
        low = max(low, high * 1e-8)
        return (low / 1.1, high * 1.1) if low < high else (low / 2, high * 2)
    low = min(0.0, low)
    return (low, high * 1.04) if high > low else (low - 0.5, high + 0.5)


def training_section(losses: list[LogSeries], rates: list[LogSeries]) -> str:
    """Return the curves of grounding and generation apart, each with a switch between a linear and a logarithmic axis."""
    order = {"total": 0, "loss": 0}
    blocks = []
    for task in sorted({series.task for series in losses}, key=lambda name: (name != "grounding", name)):
        mine = sorted((series for series in losses if series.task == task), key=lambda series: (order.get(series.name, 1), series.name))
        blocks.append(_switchable(task, mine))
    if rates:
        distinct = {
            (series.name.split(" ")[0], tuple(series.points)): series for series in reversed(rates) if series.name not in UNINTERESTING
        }
        shown = [series for series in reversed(distinct.values()) if len({value for _, value in series.points}) > 1]
        charts = "".join(chart(_rate(series), "rate") for series in shown)
        blocks.append(f'<h3>Rates and resources</h3><div class="charts">{charts}</div>' if charts else "")
    return "".join(blocks)


def _rate(series: LogSeries) -> LogSeries:
    """Name a rate for a reader, and memory in GiB."""
    name = series.name.replace("_per_s", " per second").replace("_", " ")
    if series.name.endswith("_bytes"):
        return LogSeries(series.task, name.replace(" bytes", ", GiB"), [(step, value / 2**30) for step, value in series.points])
    return LogSeries(
        series.task, name.removesuffix(" s") + ", s" if series.name.endswith("_s") and "per_s" not in series.name else name, series.points
    )


def _switchable(task: str, series: list[LogSeries]) -> str:
    name, heading = escape(task), "Validation" if task == "validation" else f"Losses of {escape(task)}"
    linear = "".join(chart(one, name, logarithmic=False) for one in series)
    logarithmic = "".join(chart(one, name, logarithmic=True) for one in series)
    return (
        f'<h3>{heading}</h3><fieldset class="switch"><legend class="hidden">Axis of {heading}</legend>'
        f'<input type="radio" name="axis-{name}" id="linear-{name}" class="pick-linear" checked><label for="linear-{name}">linear</label>'
        f'<input type="radio" name="axis-{name}" id="log-{name}" class="pick-log"><label for="log-{name}">logarithmic</label>'
        f'<div class="charts linear">{linear}</div><div class="charts log">{logarithmic}</div></fieldset>'
    )
