"""Draws the curves of a training as one image."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mgq.errors import printable
from mgq.io.atomic import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Two of Okabe and Ito's colours, which colour-blind people can tell apart, too.
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#555555"
INCHES, DOTS = (10.0, 7.0), 100
MARK_STYLES = (":", "--", "-.", (0, (6, 1, 1, 1, 1, 1)))
FEW_EPOCHS = 30  # up to here every epoch has a dot
STYLE = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.edgecolor": "white",
    "axes.titlesize": 11,
    "text.parse_math": False,  # a name may hold a "$"
}
Entries = Sequence[Mapping[str, Any]]


class Mark(NamedTuple):
    """A moment worth a vertical line: ``epoch`` epochs were finished when ``what`` happened."""

    epoch: float
    what: str


class Curve(NamedTuple):
    """The values of ``key`` as one line, ``label`` in the legend."""

    key: str
    label: str
    colour: str
    style: str = "-"


def write_curves(path: Path, metrics: Entries, title: str, marks: Sequence[Mark] = ()) -> str | None:
    """Draw loss, top-1, learning rate and speed of the epochs in ``metrics`` to the PNG file ``path``.

    1000x700 pixels. Values that are missing or not finite leave a gap. Never fails a training: returns None, or a
    line that says why there is no picture.
    """
    try:
        _write(path, metrics, title, marks)
    except Exception as error:
        return f"no curves in {printable(path)}: {printable(error)}"
    return None


def _write(path: Path, metrics: Entries, title: str, marks: Sequence[Mark]) -> None:
    import matplotlib

    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it tells of its font cache
    # The user's own matplotlibrc may ask for what is not here, such as LaTeX; and a letter that the font lacks is
    # drawn as a box, which is no reason to warn.
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        figure = figure_of(metrics, title, marks)
        with atomic_write(path) as temporary, temporary.open("wb") as file:
            figure.savefig(file, format="png")


def figure_of(metrics: Entries, title: str, marks: Sequence[Mark] = ()) -> Figure:
    """Four panels over the epochs: loss and top-1, large; learning rate and speed, small."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=INCHES, dpi=DOTS, layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", weight="bold")
    panels = figure.subplot_mosaic([["loss", "top1"], ["lr", "speed"]], height_ratios=[3, 1], sharex=True)
    _plot(panels["loss"], metrics, "loss", [Curve("loss", "train", BLUE), Curve("val_loss", "val", ORANGE, "--")])
    _plot(panels["top1"], metrics, "top-1 (%)", [Curve("top1", "train", BLUE), Curve("val_top1", "val", ORANGE, "--")])
    _plot(panels["lr"], metrics, "learning rate", [Curve("lr", "", GREY)])
    _plot(panels["speed"], metrics, "images/s", [Curve("images_per_second", "", GREY)])
    _mark_best(panels["top1"], metrics)
    for name in ("loss", "top1"):
        if panels[name].lines:
            panels[name].legend()
    for name in ("lr", "speed"):
        _start_at_zero(panels[name])
        panels[name].set_xlabel("epoch")
    _draw_marks(figure, list(panels.values()), marks)
    if not metrics:
        figure.text(0.5, 0.5, "no finished epoch yet", ha="center", color=GREY, size=14)
    return figure


def _plot(panel: Axes, metrics: Entries, title: str, curves: Sequence[Curve]) -> None:
    from matplotlib.ticker import MaxNLocator

    for curve in curves:
        points = _points(metrics, curve.key)
        if points:
            marker = "o" if len(points) <= FEW_EPOCHS else ""
            panel.plot(
                *zip(*points, strict=True), curve.style, c=curve.colour, label=curve.label, marker=marker, ms=3.5
            )
    panel.set_title(title, loc="left")
    panel.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    panel.tick_params(labelbottom=True)


def _points(metrics: Entries, key: str) -> list[tuple[int, float]]:
    """(epoch, value) of every entry that has ``key``; NaN for a value that is no finite number."""
    return [(entry["epoch"], _finite_or_nan(entry[key])) for entry in metrics if key in entry]


def _finite_or_nan(value: Any) -> float:
    return float(value) if value is not None and math.isfinite(value) else math.nan


def _mark_best(panel: Axes, metrics: Entries) -> None:
    """A ring around the first of the highest validation accuracies, its value in the legend."""
    found = [point for point in _points(metrics, "val_top1") if math.isfinite(point[1])]
    if found:
        epoch, value = max(found, key=lambda point: point[1])
        label = f"best val: {value:.1f} %, epoch {epoch}"
        panel.plot([epoch], [value], "o", c=ORANGE, ms=10, fillstyle="none", label=label)


def _start_at_zero(panel: Axes) -> None:
    highest = panel.dataLim.y1
    if math.isfinite(highest) and highest > 0:
        panel.set_ylim(0, 1.15 * highest)


def _draw_marks(figure: Figure, panels: Sequence[Axes], marks: Sequence[Mark]) -> None:
    """The marks as vertical lines in all ``panels``, named once above them, where no curve is."""
    handles = []
    for number, mark in enumerate(marks):
        style = MARK_STYLES[number % len(MARK_STYLES)]
        lines = [panel.axvline(mark.epoch, c=GREY, ls=style, lw=1, label=f"_{mark.what}") for panel in panels]
        handles.append(lines[0])
    if handles:
        names = [mark.what for mark in marks]
        figure.legend(handles, names, loc="outside upper right", ncols=min(4, len(names)), fontsize=9)
