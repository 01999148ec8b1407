"""A benchmark as a bar chart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mgq.bench.benchmark_report import Report, Row
from mgq.bench.settings import Precision, pluralize
from mgq.errors import InputError, printable

SUFFIXES = (".png", ".svg")
COLORS = {Precision.FP32: "#9aa5b1", Precision.INT8: "#d1495b"}
BAR, GAP = 0.28, 0.9
"""Inches of height a bar takes, and what a network's panel takes besides."""


def check_plot_path(path: Path) -> Path:
    """``path`` if a chart can have its format. Raises InputError."""
    if path.suffix.lower() not in SUFFIXES:
        raise InputError(f"--plot {printable(path)} is no name of a picture: let it end in {' or '.join(SUFFIXES)}")
    return path


def write_plot(report: Report, path: Path, suffix: str) -> None:
    """Write pictures a second of every sound row as bars, a panel a network, with the range of half the rounds.

    ``suffix``, one of ``SUFFIXES``, is the format, whatever ``path`` is called.
    """
    draw_report(report).savefig(path, format=suffix.lower()[1:], dpi=150)


def draw_report(report: Report) -> Any:
    from matplotlib.figure import Figure

    panels = {network: [row for row in report.rows_of(network) if row.sound] for network in report.settings.networks}
    heights = [len(rows) * BAR + GAP for rows in panels.values()]
    figure = Figure(figsize=(9, sum(heights) + 0.6), layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axis, (network, rows) in zip(axes, panels.items(), strict=True):
        draw_panel(axis, network, rows)
    size = report.settings.image_size
    axes[-1].set_xlabel(f"pictures a second at {size}x{size}, batch {report.settings.batch} (more is better)")
    figure.suptitle(f"mgq bench, {report.settings.load.value}: {report.machine.cpu}", fontsize=10)
    return figure


def draw_panel(axis: Any, network: str, rows: list[Row]) -> None:
    speeds = [row.speed for row in rows if row.speed is not None]
    places = range(len(rows))
    axis.barh(
        places,
        [speed.fps for speed in speeds],
        xerr=[speed.fps_iqr / 2 for speed in speeds],
        color=[COLORS[row.precision] for row in rows],
        error_kw={"ecolor": "#333333", "capsize": 2, "linewidth": 0.8},
    )
    for place, speed in zip(places, speeds, strict=True):
        end = speed.fps + speed.fps_iqr / 2
        axis.annotate(f"{speed.fps:.0f}", (end, place), (5, 0), textcoords="offset points", va="center", fontsize=7)
    axis.set_yticks(places, [label_of(row) for row in rows], fontsize=8)
    axis.invert_yaxis()
    axis.set_title(network, fontsize=9, loc="left", fontweight="bold")
    axis.margins(x=0.1)
    axis.spines[["top", "right"]].set_visible(False)


def label_of(row: Row) -> str:
    what = f"{row.file} " if row.file else ""
    return f"{what}{row.precision.value}  {row.engine}, {pluralize(row.threads, 'thread')}"
