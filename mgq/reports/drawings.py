"""Drawings of a report: the course of a training, and a matrix of confusions."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mgq.reports.html import GREY, Html, curve, dot, draw_text, line, make_scrollable, svg, text, ticks

WIDTH, HEIGHT = 360.0, 210.0
LEFT, RIGHT, TOP, BOTTOM = 40.0, 10.0, 10.0, 34.0
DOTS = 60
"""Up to so many values every one has a dot."""
STRONGEST = 0.7
"""How opaque the darkest cell of a matrix is: black or white figures stay readable on it."""
RIGHT_RGB, WRONG_RGB = "0 114 178", "213 94 0"


class Series(NamedTuple):
    """Values over epochs, as one line."""

    label: str
    colour: str
    points: Sequence[tuple[float, float]]
    dashes: str = ""


def curves(title: str, series: Sequence[Series], border: float | None = None, percent: bool = False) -> str:
    """A figure of all ``series``; ``border`` is the epoch after which QAT went on from float."""
    shown = [one._replace(points=[p for p in one.points if math.isfinite(p[1])]) for one in series]
    shown = [one for one in shown if one.points]
    if not shown:
        return ""
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

    parts = []
    for value in ticks(low, high, 5):
        y = place(0, value)[1]
        parts += [line(LEFT, y, WIDTH - RIGHT, y), draw_text(LEFT - 6, y + 4, f"{value:.4g}", "end")]
    base = HEIGHT - BOTTOM
    for epoch in ticks(0, last, 7):
        if epoch == int(epoch):
            parts.append(draw_text(place(epoch, low)[0], base + 14, f"{epoch:.0f}", "middle"))
    parts += [line(LEFT, base, WIDTH - RIGHT, base, GREY), draw_text(WIDTH - RIGHT, base + 28, "epoch", "end")]
    if border is not None:
        x = place(border, low)[0]
        parts += [line(x, TOP, x, base, GREY), draw_text(x + 4, TOP + 10, "QAT")]
    for one in shown:
        places = [place(*point) for point in one.points]
        parts.append(curve(places, one.colour, one.dashes))
        if len(places) <= DOTS:
            hints = (f"{one.label}, epoch {epoch:g}: {value:.4g}" for epoch, value in one.points)
            parts += [dot(x, y, one.colour, hint) for (x, y), hint in zip(places, hints, strict=True)]
    ends = "; ".join(f"{one.label} from {one.points[0][1]:.4g} to {one.points[-1][1]:.4g}" for one in shown)
    drawing = svg(WIDTH, HEIGHT, parts, f"{title} over {last:g} epochs: {ends}")
    return f'<figure class="curves"><figcaption>{text(title)}</figcaption>{drawing}{legend(shown)}</figure>'


def legend(series: Iterable[Series]) -> str:
    items = []
    for one in series:
        mark = curve([(0, 5), (22, 5)], one.colour, one.dashes)
        drawn = f'<svg width="22" height="10" viewBox="0 0 22 10" aria-hidden="true">{mark}</svg>'
        items.append(f"<li>{drawn}{text(one.label)}</li>")
    return f'<ul class="legend">{"".join(items)}</ul>'


def heat_map(cells: npt.NDArray[np.int64], names: Sequence[str], caption: str) -> str:
    """How often each class (row) got each answer (column): right ones blue, wrong ones orange, each by its share."""
    totals = np.maximum(cells.sum(1), 1)
    head = "".join(f'<th scope="col"><span>{text(name)}</span></th>' for name in names)
    rows = []
    for i, name in enumerate(names):
        row = "".join(cell_of(int(count), int(totals[i]), i == j) for j, count in enumerate(cells[i]))
        rows.append(f'<tr><th scope="row" class="name">{text(name)}</th>{row}</tr>')
    table = (
        f'<table class="heat"><caption>{text(caption)}</caption><thead><tr>'
        f'<th scope="col" class="name">class \\ answer</th>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
    )
    return make_scrollable(table, caption)


def cell_of(count: int, total: int, right: bool) -> str:
    if not count:
        return '<td class="dim">·</td>'
    strength = STRONGEST * count / total
    return f'<td style="background:rgb({RIGHT_RGB if right else WRONG_RGB} / {strength:.2f})">{count}</td>'


def bars(shares: Sequence[tuple[float, str]], label: str) -> Html:
    """Bars one below the other for values in percent, each of a colour."""
    height = 7.0 * len(shares)
    parts = [
        f'<rect x="0" y="{7 * i + 1}" width="{max(share, 0.5):.1f}" height="5" fill="{colour}"/>'
        for i, (share, colour) in enumerate(shares)
        if math.isfinite(share)
    ]
    return Html(svg(100, height, [*parts, line(100, 0, 100, height)], label))


def embed_image(jpeg: bytes, side: int, about: str) -> str:
    """An image of ``side`` pixels inside the page."""
    data = base64.b64encode(jpeg).decode()
    size = f'width="{side}" height="{side}"'
    return f'<img src="data:image/jpeg;base64,{data}" {size} alt="{text(about)}">'
