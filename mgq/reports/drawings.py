"""Draws training curves, confusion matrices and bars as lists of shapes in pixels."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from mgq.reports.html import GREY, RULE

WIDTH, HEIGHT = 360.0, 210.0
LEFT, RIGHT, TOP, BOTTOM = 40.0, 10.0, 10.0, 34.0
DOTS = 60
"""Curves of at most this many values have a dot for each."""
STRONGEST = 0.7
"""How opaque the darkest cell of a matrix is: black or white figures stay readable on it."""
RIGHT_RGB, WRONG_RGB = "0 114 178", "213 94 0"


@dataclass(frozen=True)
class Text:
    kind: ClassVar[str] = "text"
    x: float
    y: float
    words: object
    anchor: str = "start"


@dataclass(frozen=True)
class Line:
    kind: ClassVar[str] = "line"
    x1: float
    y1: float
    x2: float
    y2: float
    colour: str = RULE


@dataclass(frozen=True)
class Curve:
    kind: ClassVar[str] = "curve"
    points: Sequence[tuple[float, float]]
    colour: str
    dashes: str = ""


@dataclass(frozen=True)
class Dot:
    kind: ClassVar[str] = "dot"
    x: float
    y: float
    colour: str
    hint: str


@dataclass(frozen=True)
class Bar:
    kind: ClassVar[str] = "bar"
    x: float
    y: float
    width: float
    height: float
    colour: str


@dataclass(frozen=True)
class Outline:
    """``steps`` as SVG writes them."""

    kind: ClassVar[str] = "path"
    steps: str
    colour: str


Shape: TypeAlias = Text | Line | Curve | Dot | Bar | Outline


class Drawing(NamedTuple):
    """Shapes on ``width`` x ``height`` pixels; ``label`` says what is to be seen to those who do not see it."""

    width: float
    height: float
    label: str
    parts: Sequence[Shape]


class Series(NamedTuple):
    """Values over epochs, as one line."""

    label: str
    colour: str
    points: Sequence[tuple[float, float]]
    dashes: str = ""

    @property
    def mark(self) -> Curve:
        """What stands for it in a legend of 22 x 10 pixels."""
        return Curve([(0, 5), (22, 5)], self.colour, self.dashes)


class Figure(NamedTuple):
    """A drawing of ``series`` with its title."""

    title: str
    drawing: Drawing
    series: Sequence[Series]


def curves(
    title: str, series: Sequence[Series], border: float | None = None, percent: bool = False
) -> Iterator[Figure]:
    """A figure of all ``series``, if they have values; ``border`` is the epoch after which QAT went on from float."""
    shown = [one._replace(points=[p for p in one.points if math.isfinite(p[1])]) for one in series]
    shown = [one for one in shown if one.points]
    if not shown:
        return
    values = [y for one in shown for _, y in one.points]
    low, high = min(values), max(values)
    margin = 0.08 * (high - low) or max(abs(high), 1.0) * 0.05
    low, high = low - margin, high + margin
    if percent:
        low, high = max(low, 0.0), min(high, 100.0) if high > max(values) else high
    last = max(2.0, *(x for one in shown for x, _ in one.points))

    def place(epoch: float, value: float) -> tuple[float, float]:
        x = LEFT + (WIDTH - LEFT - RIGHT) * epoch / last
        return x, TOP + (HEIGHT - TOP - BOTTOM) * (high - value) / (high - low)

    parts: list[Shape] = []
    for value in ticks(low, high, 5):
        y = place(0, value)[1]
        parts += [Line(LEFT, y, WIDTH - RIGHT, y), Text(LEFT - 6, y + 4, f"{value:.4g}", "end")]
    base = HEIGHT - BOTTOM
    for epoch in ticks(0, last, 7):
        if epoch == int(epoch):
            parts.append(Text(place(epoch, low)[0], base + 14, f"{epoch:.0f}", "middle"))
    parts += [Line(LEFT, base, WIDTH - RIGHT, base, GREY), Text(WIDTH - RIGHT, base + 28, "epoch", "end")]
    if border is not None:
        x = place(border, low)[0]
        parts += [Line(x, TOP, x, base, GREY), Text(x + 4, TOP + 10, "QAT")]
    for one in shown:
        places = [place(*point) for point in one.points]
        parts.append(Curve(places, one.colour, one.dashes))
        if len(places) <= DOTS:
            hints = (f"{one.label}, epoch {epoch:g}: {value:.4g}" for epoch, value in one.points)
            parts += [Dot(x, y, one.colour, hint) for (x, y), hint in zip(places, hints, strict=True)]
    ends = "; ".join(f"{one.label} from {one.points[0][1]:.4g} to {one.points[-1][1]:.4g}" for one in shown)
    yield Figure(title, Drawing(WIDTH, HEIGHT, f"{title} over {last:g} epochs: {ends}", parts), shown)


class HeatMap(NamedTuple):
    """How often each class (row) got each answer (column), with a colour for each count."""

    caption: str
    names: Sequence[str]
    rows: Sequence[tuple[str, Sequence[tuple[int, str]]]]


def heat_map(counts: npt.NDArray[np.int64], names: Sequence[str], caption: str) -> HeatMap:
    """Right answers blue, wrong ones orange, each by its share."""
    strengths = STRONGEST * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    rows = []
    for i, name in enumerate(names):
        colours = [f"rgb({RIGHT_RGB if i == j else WRONG_RGB} / {s:.2f})" for j, s in enumerate(strengths[i])]
        rows.append((name, list(zip(counts[i].tolist(), colours, strict=True))))
    return HeatMap(caption, names, rows)


def bars(shares: Sequence[tuple[float, str]], label: str) -> Drawing:
    """Bars one below the other for values in percent, each of a colour."""
    height = 7.0 * len(shares)
    parts: list[Shape] = [
        Bar(0, 7 * i + 1, max(share, 0.5), 5, colour)
        for i, (share, colour) in enumerate(shares)
        if math.isfinite(share)
    ]
    return Drawing(100, height, label, [*parts, Line(100, 0, 100, height)])


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers from ``low`` to ``high``, ``most`` at most, in steps of 1, 2 or 5 times a power of ten."""
    span = high - low
    if not (math.isfinite(span) and span > 0):
        return [low]
    step = 10.0 ** math.floor(math.log10(span / most))
    step *= next(factor for factor in (1, 2, 5, 10, 20) if span / (step * factor) < most)
    first = math.ceil(low / step - 1e-9)
    return [(first + i) * step for i in range(most) if (first + i) * step <= high + 1e-9 * span]
