"""The course of a training as one picture."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mgq.errors import printable
from mgq.files.atomic import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Two of Okabe and Ito's colours, told apart by the colour-blind, too.
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#777777"
INCHES, DOTS = (10.0, 7.0), 100


class Mark(NamedTuple):
    """A moment worth a vertical line: ``epoch`` epochs were finished when ``what`` happened."""

    epoch: float
    what: str


def write_curves(
    path: Path, metrics: Sequence[Mapping[str, Any]], title: str, marks: Sequence[Mark] = ()
) -> str | None:
    """Draw loss, top-1, learning rate and speed of the epochs in ``metrics`` to the PNG file ``path``.

    1000x700 pixels. Values that are missing or not finite leave a gap. Never fails a training: returns None, or a
    line that says why there is no picture.
    """
    try:
        _draw(path, metrics, title, marks)
    except Exception as error:
        return f"no curves in {printable(path)}: {printable(error)}"
    return None


def _draw(path: Path, metrics: Sequence[Mapping[str, Any]], title: str, marks: Sequence[Mark]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=INCHES, dpi=DOTS, layout="constrained")
    figure.suptitle(title)
    panels = figure.subplot_mosaic([["loss", "top1"], ["lr", "speed"]], height_ratios=[3, 1])
    _lines(panels["loss"], metrics, "loss", {"loss": ("train", BLUE, "-"), "val_loss": ("val", ORANGE, "-")})
    _lines(panels["top1"], metrics, "top-1 (%)", {"top1": ("train", BLUE, "-"), "val_top1": ("val", ORANGE, "-")})
    _lines(panels["lr"], metrics, "learning rate", {"lr": ("", GREY, "-")})
    _lines(panels["speed"], metrics, "pictures/s", {"images_per_second": ("", GREY, "-")})
    _mark_best(panels["top1"], metrics)
    for name in ("lr", "speed"):
        panels[name].set_ylim(bottom=0)
        panels[name].set_xlabel("epoch")
    for panel in panels.values():
        for mark in marks:
            panel.axvline(mark.epoch, color=GREY, linestyle=":", linewidth=1)
    for mark in marks:
        panels["loss"].annotate(
            f" {mark.what}",
            (mark.epoch, 0.02),
            xycoords=("data", "axes fraction"),
            rotation=90,
            fontsize=8,
            color=GREY,
            va="bottom",
            ha="right",
        )
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        figure.savefig(file, format="png")


def _lines(
    panel: Axes, metrics: Sequence[Mapping[str, Any]], label: str, kinds: Mapping[str, tuple[str, str, str]]
) -> None:
    from matplotlib.ticker import MaxNLocator

    for key, (name, colour, style) in kinds.items():
        epochs, values = _series(metrics, key, float)
        if epochs:
            marker = "o" if len(epochs) < 30 else ""
            panel.plot(epochs, values, style, color=colour, label=name, marker=marker, markersize=3)
    panel.set_ylabel(label)
    panel.grid(alpha=0.25)
    panel.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if len(kinds) > 1 and panel.lines:
        panel.legend(frameon=False)


def _series(
    metrics: Sequence[Mapping[str, Any]], key: str, of: Callable[[Any], float]
) -> tuple[list[int], list[float]]:
    found = [(int(entry["epoch"]), of(entry[key])) for entry in metrics if key in entry]
    return [epoch for epoch, _ in found], [value if math.isfinite(value) else math.nan for _, value in found]


def _mark_best(panel: Axes, metrics: Sequence[Mapping[str, Any]]) -> None:
    epochs, values = _series(metrics, "val_top1", float)
    finite = [(value, -epoch) for epoch, value in zip(epochs, values, strict=True) if math.isfinite(value)]
    if finite:
        value, epoch = max(finite)
        panel.plot([-epoch], [value], "o", color=ORANGE, markersize=8, fillstyle="none")
        panel.annotate(
            f"{value:.1f} %", (-epoch, value), xytext=(0, -14), textcoords="offset points", ha="center", color=ORANGE
        )
