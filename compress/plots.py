"""Plots as inline SVG: no library, no script, and colours by CSS class, so that they follow the page into dark mode and onto paper.

Every plot is `WIDTH` units wide and scales with its column. Hovering tells exact values: a `<title>` per column of a plot rather than
per mark, which is easier to hit and keeps the page small.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup, escape

WIDTH = 440
LINE = 14
"""Height of a line of text."""
HEIGHT = 250
"""Of a plot with two axes."""
LETTER = 7.5
"""Width of a letter, generously: which font the page finds is not known here."""
BOLD = 8.5
"""The same of a bold one."""
TOP, BASE = 26, HEIGHT - 40
"""Where its vertical axis ends and where its horizontal one lies."""
COLOURS = 6
"""Classes `c0` to `c5` of the style sheet; what comes after them has class `again` too."""
MOST_NAMES = 13
"""So many names have room beside the ends of lines."""

Format = Callable[[float], str]


@dataclass(frozen=True)
class Series:
    """One value per block, and where many were summed up into it, the lowest and highest of them; `shade` numbers its colour."""

    name: str
    values: dict[int, float]
    lows: dict[int, float]
    highs: dict[int, float]
    shade: int


@dataclass(frozen=True)
class Run:
    """Neighbouring blocks of a row that are treated alike."""

    first: int
    last: int
    shade: str
    label: str


@dataclass(frozen=True)
class Dot:
    """One mark at a block; `loud` ones are to be seen."""

    block: int
    value: float
    loud: bool


@dataclass(frozen=True)
class Mark:
    """A named point of a plane; a `loud` one is to be seen."""

    x: float
    y: float
    name: str
    loud: bool


@dataclass(frozen=True)
class Point:
    """A named point of a plane with the interval its height may lie in; one of those that are `best` is joined to the others."""

    name: str
    x: float
    y: float
    interval: tuple[float, float]
    shade: int
    best: bool


@dataclass(frozen=True)
class Share:
    """What part of the ``cases`` in a cell of a table was right."""

    row: str
    column: str
    right: int
    cases: int


@dataclass(frozen=True)
class Scale:
    """From values to units of the drawing."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """Where `value` lies; on a logarithmic scale, what is too small for it lies at its lower end."""
        low, high, value = (math.log10(max(each, self.low)) for each in (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        return self.start + (self.end - self.start) * (value - low) / ((high - low) or 1)

    @property
    def ticks(self) -> list[float]:
        """Round numbers from `low` to `high`."""
        if not self.log:
            step = _step((self.high - self.low) / 4)
            return [step * index for index in range(math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9) + 1)]
        decades = range(math.floor(math.log10(self.low)) - 1, math.ceil(math.log10(self.high)) + 1)
        few = math.log10(self.high / self.low) < 2.5
        every = 1 if few else 1 + len(decades) // 9
        ticks = [factor * 10.0**decade for decade in decades if decade % every == 0 for factor in ((1, 2, 5) if few else (1,))]
        return [tick for tick in ticks if self.low * 0.999 <= tick <= self.high * 1.001]


def round_domain(values: Iterable[float]) -> tuple[float, float, bool]:
    """Ends of an axis that holds `values`, and whether it should be logarithmic: where they span more than a factor of five."""
    known = sorted(values)
    positive = [value for value in known if value > 0]
    if positive and positive[-1] / positive[0] > 5:
        low, high = _floor125(positive[0]), _ceil125(positive[-1])
        return low, high, True
    top = known[-1] if known and known[-1] > 0 else 1.0
    return 0.0, _step(top / 4) * math.ceil(top / _step(top / 4) - 1e-9), False


def along_blocks(series: Sequence[Series], blocks: range, domain: tuple[float, float, bool], unit: str, show: Format, label: str) -> Markup:
    """A line per series with its name at its end, unless there are too many; a band where a value sums up many."""
    named = len(series) <= MOST_NAMES
    right = 18 + LETTER * max(len(each.name) for each in series) if named else 14
    x, y = _frame(blocks, domain, right)
    parts = [_axes(x, y, unit, show, _block_ticks(blocks), "block")]
    for each in series:
        shade = shade_of(each.shade)
        for run in _unbroken(each.values):
            if any(each.highs[block] > each.lows[block] for block in run):
                upper = " ".join(f"{_n(x(block))},{_n(y(each.highs[block]))}" for block in run)
                lower = " ".join(f"{_n(x(block))},{_n(y(each.lows[block]))}" for block in reversed(run))
                parts.append(f'<polygon class="band {shade}" points="{upper} {lower}"/>')
            points = " ".join(f"{_n(x(block))} {_n(y(each.values[block]))}" for block in run)
            parts.append(f'<path class="line {shade}" d="M{points}"/>')
        dots = "".join(f"M{_n(x(block))} {_n(y(value))}h0" for block, value in each.values.items())
        parts.append(f'<path class="dots {shade}" stroke-width="{_dot_width(x, blocks, 5)}" d="{dots}"/>')
    parts += _end_labels(series, x, y, WIDTH - right + 8) if named else []
    parts += _hits(x, blocks, lambda block: [_value_text(each, block, show) for each in series if block in each.values])
    return _svg(HEIGHT, label, parts)


def dots_along_blocks(
    dots: Sequence[Dot], blocks: range, line: tuple[float, str] | None, unit: str, show: Format, notes: dict[int, str], label: str
) -> Markup:
    """A dot per member of a block on a logarithmic axis with a place for zero; `line` is a threshold with its name."""
    known = [dot.value for dot in dots] + ([line[0]] if line else [])
    low, high = _floor125(min((value for value in known if value > 0), default=1.0)), _ceil125(max(*known, 1.0))
    zeros = any(dot.value == 0 for dot in dots)
    x, y = _frame(blocks, (low, max(high, 2 * low), True), 14, lift=LINE if zeros else 0)
    parts = [_axes(x, y, unit, show, _block_ticks(blocks), "block")]
    if zeros:
        parts.append(f'<text class="tick" x="{_n(x.start - 16)}" y="{BASE + 4}" text-anchor="end">0</text>')
    for loud in (False, True):
        path = "".join(f"M{_n(x(dot.block))} {_n(y(dot.value) if dot.value > 0 else BASE)}h0" for dot in dots if dot.loud == loud)
        if path:
            parts.append(f'<path class="dots {"loud" if loud else "quiet"}" stroke-width="{_dot_width(x, blocks, 6 if loud else 4)}" d="{path}"/>')
    if line:
        at = _n(y(line[0]))
        parts.append(f'<path class="threshold" d="M{_n(x.start - 10)} {at}H{WIDTH - 4}"/>')
        parts.append(f'<text class="threshold-name" x="{WIDTH - 4}" y="{_n(y(line[0]) - 5)}" text-anchor="end">{escape(line[1])}</text>')
    parts += _hits(x, blocks, lambda block: [notes[block]] if block in notes else [])
    return _svg(HEIGHT, label, parts)


def front(curve: Sequence[tuple[float, float]], marks: Sequence[Mark], units: tuple[str, str], show: Format, label: str) -> Markup:
    """A falling line of positive values with marks on or above it; `units` of the axes, along and up."""
    every = [*curve, *((mark.x, mark.y) for mark in marks)]
    low, high, log = round_domain(value for _, value in every)
    x = Scale(min(place for place, _ in every), max(place for place, _ in every), 72, WIDTH - 24)
    y = Scale(low, high, BASE, TOP, log)
    parts = [_axes(x, y, units[1], show, x.ticks, units[0])]
    points = " ".join(f"{_n(x(place))} {_n(y(value))}" for place, value in curve)
    parts.append(f'<path class="line c0" d="M{points}"/>')
    taken = [(x(each.x) - 5, y(each.y) - 5, x(each.x) + 5, y(each.y) + 5) for each in marks]
    taken += [(x(place) - 1, y(value) - 1, x(place) + 1, y(value) + 1) for place, value in curve]
    for mark in sorted(marks, key=lambda mark: mark.loud):
        told = escape(f"{mark.name}: {mark.x:.4g} {units[0]}, {show(mark.y)}")
        shade, width = ("loud", 10) if mark.loud else ("c2", 8)
        parts.append(f'<path class="dots {shade}" stroke-width="{width}" d="M{_n(x(mark.x))} {_n(y(mark.y))}h0"><title>{told}</title></path>')
    for mark in sorted(marks, key=lambda mark: not mark.loud):
        if found := _free(x(mark.x), y(mark.y), LETTER * len(mark.name), taken, x.end + 20):
            taken.append(found)
            parts.append(_name(found, mark.name))
    return _svg(HEIGHT, label, parts)


def scatter(points: Sequence[Point], units: tuple[str, str], shows: tuple[Format, Format], label: str) -> Markup:
    """Points with their intervals, the best of them joined; `units` and `shows` along and up."""
    ends = [value for point in points for value in (point.y, *point.interval)]
    rough = round_domain([value for value in ends if value > 0] if all(point.y > 0 for point in points) else [])
    low, high, log = rough if rough[2] else (*padded(ends), False)
    x = Scale(*padded([point.x for point in points]), 72, WIDTH - 24)
    y = Scale(low, high, BASE, TOP, log)
    parts = [_axes(x, y, units[1] + (", log scale" if log else ""), shows[1], x.ticks, units[0], shows[0])]
    best = sorted({(x(point.x), y(point.y)) for point in points if point.best})
    if len(best) > 1:
        # In steps: between two sizes the best there is stays what the smaller one loses.
        steps = "".join(f"H{_n(across)}V{_n(up)}" for across, up in best[1:])
        parts.append(f'<path class="front" d="M{_n(best[0][0])} {_n(best[0][1])}{steps}"/>')
    taken = [(x(point.x) - 6, y(point.y) - 6, x(point.x) + 6, y(point.y) + 6) for point in points]
    for point in points:
        across, up, shade = x(point.x), y(point.y), shade_of(point.shade)
        told = f"{point.name}: {shows[0](point.x)}, {shows[1](point.y)}, 95 % {shows[1](point.interval[0])} to {shows[1](point.interval[1])}"
        parts.append(f"<g><title>{escape(told)}</title>")
        parts.append(f'<path class="line {shade}" d="M{_n(across)} {_n(y(point.interval[0]))}V{_n(y(point.interval[1]))}"/>')
        area = f'x="{_n(across - 5)}" y="{_n(up - 5)}" width="10" height="10" rx="{0 if "again" in shade else 5}"'
        parts.append(f'<rect class="point {shade} {"best" if point.best else "beaten"}" {area}/></g>')
    for point in points:
        if place := _free(x(point.x), y(point.y), LETTER * len(point.name), taken, x.end + 20):
            taken.append(place)
            parts.append(_name(place, point.name))
    return _svg(HEIGHT, label, parts)


def shade_of(number: int) -> str:
    """Class of the colour with that number; the second time around, lines are dashed and points square."""
    return f"c{number % COLOURS}" + (" again" if number // COLOURS % 2 else "")


def padded(values: Sequence[float]) -> tuple[float, float]:
    """Ends of a linear axis with some room around `values`."""
    low, high = min(values), max(values)
    room = 0.12 * (high - low) or 0.1 * abs(high) or 1.0
    return low - room, high + room


Box = tuple[float, float, float, float]


def _free(x: float, y: float, width: float, taken: Sequence[Box], right: float) -> Box | None:
    """Where around a point a name of that width covers nothing; None, nowhere: hovering still tells it."""
    for left, middle in ((x + 9, y), (x - 9 - width, y), (x - width / 2, y - 15), (x - width / 2, y + 15), (x + 6, y - 13), (x + 6, y + 13)):
        box = (left, middle - LINE / 2, left + width, middle + LINE / 2)
        inside = left >= 64 and box[2] <= right and box[1] >= TOP - LINE and box[3] <= BASE + 4
        if inside and not any(box[0] < other[2] and other[0] < box[2] and box[1] < other[3] and other[1] < box[3] for other in taken):
            return box
    return None


def _name(box: Box, name: str) -> str:
    return f'<text class="name" x="{_n(box[0])}" y="{_n(box[3] - 3)}">{escape(name)}</text>'


def runs_along_blocks(rows: Sequence[tuple[str, Sequence[Run]]], blocks: range, label: str) -> Markup:
    """A row per kind of linear, cut into runs of blocks that are treated alike."""
    left, row, top = 10 + LETTER * max(len(name) for name, _ in rows), 22, 4
    x = Scale(blocks.start, blocks.stop, left, WIDTH - 4)
    bottom = top + row * len(rows)
    parts = []
    for index, (name, runs) in enumerate(rows):
        y = top + row * index
        parts.append(f'<text class="name" x="{_n(left - 8)}" y="{y + 15}" text-anchor="end">{escape(name)}</text>')
        for run in runs:
            start, width = x(run.first), x(run.last + 1) - x(run.first) - 1
            span = f"block {run.first}" if run.first == run.last else f"blocks {run.first} to {run.last}"
            parts.append(f"<g><title>{escape(name)}, {span}: {escape(run.label)}</title>")
            area = f'x="{_n(start)}" y="{y + 1}" width="{_n(max(width, 1))}" height="{row - 3}"'
            parts.append(f'<rect class="cell {escape(run.shade)}" {area} rx="2"/>')
            if text := next((text for text in (run.label, run.label.partition(",")[0]) if LETTER * len(text) < width - 2), None):
                parts.append(f'<text class="cell-text" x="{_n(start + width / 2)}" y="{y + 15}" text-anchor="middle">{escape(text)}</text>')
            parts.append("</g>")
    for block in _block_ticks(blocks):
        parts.append(f'<text class="tick" x="{_n((x(block) + x(block + 1)) / 2)}" y="{bottom + 14}" text-anchor="middle">{block}</text>')
    parts.append(f'<text class="unit" x="{_n((left + WIDTH) / 2)}" y="{bottom + 32}" text-anchor="middle">block</text>')
    return _svg(bottom + 38, label, parts)


def stacked(bars: Sequence[tuple[str, Sequence[tuple[str, str, float]]]], show: Format, label: str) -> Markup:
    """Horizontal bars on one scale; each part has a name, a shade and a value, and each bar its sum at its end."""
    left, row, gap, top = 56, 46, 30, 22
    longest = max(sum(value for _, _, value in parts) for _, parts in bars) or 1.0
    x = Scale(0, longest, left, WIDTH - 4)
    drawn = []
    for index, (name, parts) in enumerate(bars):
        y, at = top + (row + gap) * index, 0.0
        total = sum(value for _, _, value in parts)
        drawn.append(f'<text class="name" x="{left - 8}" y="{y + row / 2 + 4:g}" text-anchor="end">{escape(name)}</text>')
        drawn.append(f'<text class="total" x="{left}" y="{y - 6}">{escape(show(total))}</text>')
        for part, shade, value in parts:
            width = x(at + value) - x(at)
            drawn.append(f"<g><title>{escape(part)}: {escape(show(value))}</title>")
            drawn.append(f'<rect class="part {escape(shade)}" x="{_n(x(at))}" y="{y}" width="{_n(max(width - 1, 0.5))}" height="{row}"/>')
            if BOLD * len(show(value)) < width - 8:
                drawn.append(f'<text class="part-text" x="{_n(x(at) + 6)}" y="{y + row / 2 + 4:g}">{escape(show(value))}</text>')
            drawn.append("</g>")
            at += value
    return _svg(top + (row + gap) * len(bars) - gap + 4, label, drawn)


def heat_map(shares: Sequence[Share], units: tuple[str, str], label: str) -> Markup:
    """A cell per share, the darker the more was right, rows and columns in the order in which they come; `units` of columns and of rows."""
    rows, columns = (list(dict.fromkeys(names)) for names in ((each.row for each in shares), (each.column for each in shares)))
    left, row, top = 18 + LETTER * max(map(len, rows)), 24, 22
    x = Scale(0, len(columns), left, WIDTH - 4)
    bottom, width = top + row * len(rows), (x.end - x.start) / len(columns)
    parts = [f'<text class="unit" x="2" y="12">{escape(units[1])}</text>']
    for index, name in enumerate(rows):
        parts.append(f'<text class="tick" x="{_n(left - 8)}" y="{top + row * index + 16}" text-anchor="end">{escape(name)}</text>')
    every = math.ceil(LETTER * (1 + max(map(len, columns))) / width)
    for index, name in enumerate(columns):
        if index % every == 0:
            parts.append(f'<text class="tick" x="{_n(x(index + 0.5))}" y="{bottom + 14}" text-anchor="middle">{escape(name)}</text>')
    for each in shares:
        start, y, share = x(columns.index(each.column)), top + row * rows.index(each.row), each.right / each.cases
        told = f"{units[0]} {each.column}, {units[1]} {each.row}: {each.right} of {each.cases}"
        parts.append(f"<g><title>{escape(told)}</title>")
        area = f'x="{_n(start)}" y="{y + 1}" width="{_n(max(width - 1, 1))}" height="{row - 2}"'
        parts.append(f'<rect class="heat" {area} rx="2" fill-opacity="{0.04 + 0.58 * share:.3f}"/>')
        if LETTER * len(text := f"{share:.0%}") < width - 2:
            parts.append(f'<text class="cell-text" x="{_n(start + width / 2)}" y="{y + 16}" text-anchor="middle">{text}</text>')
        parts.append("</g>")
    parts.append(f'<text class="unit" x="{_n((left + WIDTH) / 2)}" y="{bottom + 32}" text-anchor="middle">{escape(units[0])}</text>')
    return _svg(bottom + 38, label, parts)


def against_bound(value: float, interval: tuple[float, float], bound: tuple[float | None, float | None], good: bool, label: str) -> Markup:
    """A figure with its interval beside what its gate lets through: `bound` is the least and the most, the allowed side is shaded."""
    width, middle = 150, 11
    least, most = bound
    known = [value, *interval, *(limit for limit in bound if limit is not None)]
    pad = 0.18 * ((max(known) - min(known)) or abs(value) or 1.0)
    x = Scale(min(known) - pad, max(known) + pad, 2, width - 2)
    start, end = (x(least) if least is not None else x.start), (x(most) if most is not None else x.end)
    marks = "".join(f'<path class="bound" d="M{_n(x(limit))} 2V20"/>' for limit in bound if limit is not None)
    state = "good" if good else "bad"
    return Markup(
        f'<svg class="gate" viewBox="0 0 {width} 22" width="{width}" height="22" role="img" aria-label="{escape(label)}">'
        f'<title>{escape(label)}</title><path class="base" d="M2 {middle}H{width - 2}"/>'
        f'<rect class="allowed" x="{_n(start)}" y="5" width="{_n(max(end - start, 0))}" height="12"/>{marks}'
        f'<path class="interval {state}" d="M{_n(x(interval[0]))} {middle}H{_n(x(interval[1]))}"/>'
        f'<circle class="{state}" cx="{_n(x(value))}" cy="{middle}" r="4"/></svg>'
    )


def _frame(blocks: range, domain: tuple[float, float, bool], right: float, lift: int = 0) -> tuple[Scale, Scale]:
    """Scales of a plot over blocks; `lift` leaves room under the vertical axis."""
    low, high, log = domain
    # With a single block its mark stands in the middle, not on the axis.
    ends = (blocks.start, blocks.stop - 1) if len(blocks) > 1 else (blocks.start - 1, blocks.start + 1)
    return Scale(*ends, 72, WIDTH - right), Scale(low, high, BASE - lift, TOP, log)


def _axes(x: Scale, y: Scale, unit: str, show: Format, ticks: Sequence[float], name: str, along: Format = lambda value: f"{value:g}") -> str:
    """Both axes with what they count: `unit` up, `name` along, of which `ticks` are shown."""
    left, parts = x.start - 10, [f'<text class="unit" x="2" y="12">{escape(unit)}</text>']
    for tick in y.ticks:
        at = _n(y(tick))
        parts.append(f'<path class="grid" d="M{_n(left)} {at}H{_n(x.end + 4)}"/>')
        parts.append(f'<text class="tick" x="{_n(left - 6)}" y="{_n(y(tick) + 4)}" text-anchor="end">{escape(show(tick))}</text>')
    for tick in ticks:
        parts.append(f'<text class="tick" x="{_n(x(tick))}" y="{HEIGHT - 22}" text-anchor="middle">{escape(along(tick))}</text>')
    parts.append(f'<text class="unit" x="{_n((x.start + x.end) / 2)}" y="{HEIGHT - 4}" text-anchor="middle">{escape(name)}</text>')
    return "".join(parts)


def _end_labels(series: Sequence[Series], x: Scale, y: Scale, left: float) -> list[str]:
    """Names beside the ends of their lines, moved apart where they would touch."""
    ends = sorted((y(each.values[max(each.values)]), index) for index, each in enumerate(series) if each.values)
    places = [place for place, _ in ends]
    for index in range(1, len(places)):
        places[index] = max(places[index], places[index - 1] + LINE)
    overflow = max(places[-1] - y.start, 0) if places else 0
    for index in reversed(range(len(places))):
        ceiling = places[index + 1] - LINE if index + 1 < len(places) else math.inf
        places[index] = min(places[index] - (overflow if index + 1 == len(places) else 0), ceiling)
    parts = []
    for place, (end, index) in zip(places, ends, strict=True):
        shade = shade_of(series[index].shade)
        start = x(max(series[index].values))
        parts.append(f'<path class="leader {shade}" d="M{_n(start + 4)} {_n(end)}L{_n(left)} {_n(place)}"/>')
        parts.append(f'<text class="name" x="{_n(left + 4)}" y="{_n(place + 4)}">{escape(series[index].name)}</text>')
    return parts


def _hits(x: Scale, blocks: range, told: Callable[[int], list[str]]) -> list[str]:
    """An invisible column over each block that tells its values when hovered."""
    half = (x(blocks.start + 1) - x(blocks.start)) / 2
    columns = []
    for block in blocks:
        if lines := told(block):
            title = "<title>{}</title>".format(escape("\n".join([f"block {block}", *lines])))
            area = f'x="{_n(x(block) - half)}" y="{TOP - 6}" width="{_n(2 * half)}" height="{BASE - TOP + 8}"'
            columns.append(f'<rect class="hit" {area}>{title}</rect>')
    return columns


def _dot_width(x: Scale, blocks: range, most: float) -> str:
    """Dots get smaller where blocks are many, so that neighbours do not touch."""
    return _n(min(most, max(3.0, 0.6 * (x.end - x.start) / len(blocks))))


def _value_text(series: Series, block: int, show: Format) -> str:
    text = f"{series.name}: {show(series.values[block])}"
    low, high = series.lows[block], series.highs[block]
    return f"{text} ({show(low)} to {show(high)})" if high > low else text


def _unbroken(values: dict[int, float]) -> list[list[int]]:
    """Blocks in runs without a gap wider than the series' own stride, so that alternating kinds still make a line."""
    blocks = sorted(values)
    stride = min((after - before for before, after in pairwise(blocks)), default=1)
    runs: list[list[int]] = []
    for block in blocks:
        if runs and block - runs[-1][-1] <= stride:
            runs[-1].append(block)
        else:
            runs.append([block])
    return runs


def _block_ticks(blocks: range) -> list[int]:
    step = max(1, round(_step(len(blocks) / 8)))
    return [block for block in blocks if block % step == 0]


def _step(rough: float) -> float:
    """The next of 1, 2, 5, 10 ... that is not smaller."""
    return _ceil125(rough) if rough > 0 else 1.0


def _ceil125(value: float) -> float:
    decade = 10.0 ** math.floor(math.log10(value))
    return next(factor * decade for factor in (1, 2, 5, 10) if factor * decade >= value * 0.999999)


def _floor125(value: float) -> float:
    decade = 10.0 ** math.floor(math.log10(value))
    return next(factor * decade for factor in (5, 2, 1) if factor * decade <= value * 1.000001)


def _n(value: float) -> str:
    """A coordinate, to a tenth of a unit."""
    return f"{value:.1f}".removesuffix(".0")


def _svg(height: float, label: str, parts: Iterable[str]) -> Markup:
    return Markup(f'<svg class="plot" viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>')
