"""The picture of a training shows what was measured, and never stops one."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mgq.engine.runs.curves import Mark, figure_of, write_curves
from tests.conftest import one_line_about


def entry(epoch: int, **other: Any) -> dict[str, Any]:
    return {"epoch": epoch, "loss": 2 / epoch, "top1": 50.0 + epoch, "lr": 0.1, "images_per_second": 60.0, **other}


def validated(epoch: int, top1: float) -> dict[str, Any]:
    return entry(epoch, val_loss=3 / epoch, val_top1=top1, val_top5=99.0)


def panel(figure: Figure, title: str) -> Axes:
    return next(axes for axes in figure.axes if axes.get_title("left") == title)


def line(figure: Figure, title: str, label: str) -> tuple[list[float], list[float]]:
    """The (x, y) of the line ``label`` of a panel."""
    found = next(line for line in panel(figure, title).lines if str(line.get_label()).startswith(label))
    return list(np.asarray(found.get_xdata())), list(np.asarray(found.get_ydata()))


def test_every_panel_shows_its_values_at_their_epochs() -> None:
    figure = figure_of([entry(1), validated(2, 60.0), entry(3), validated(4, 70.0)], "net")
    assert line(figure, "loss", "train") == ([1, 2, 3, 4], [2, 1, 2 / 3, 0.5])
    assert line(figure, "loss", "val") == ([2, 4], [1.5, 0.75])
    assert line(figure, "top-1 (%)", "train") == ([1, 2, 3, 4], [51, 52, 53, 54])
    assert line(figure, "top-1 (%)", "val") == ([2, 4], [60, 70])
    assert list(np.asarray(panel(figure, "learning rate").lines[0].get_ydata())) == [0.1] * 4
    assert list(np.asarray(panel(figure, "images/s").lines[0].get_ydata())) == [60.0] * 4


def test_the_first_of_the_best_epochs_is_marked_and_named() -> None:
    figure = figure_of([validated(1, 60.0), validated(2, 71.25), validated(3, 71.25), validated(4, math.nan)], "net")
    assert line(figure, "top-1 (%)", "best") == ([2], [71.25])
    legend = panel(figure, "top-1 (%)").get_legend()
    assert legend is not None
    assert "best val: 71.2 %, epoch 2" in [text.get_text() for text in legend.get_texts()]


def test_what_is_not_finite_leaves_a_gap() -> None:
    figure = figure_of([entry(1), entry(2, loss=math.nan), entry(3, loss=math.inf), entry(4, loss=None)], "net")
    epochs, values = line(figure, "loss", "train")
    assert epochs == [1, 2, 3, 4]
    assert values[0] == 2 and all(math.isnan(value) for value in values[1:])


def test_marks_stand_in_every_panel_and_are_named_once() -> None:
    marks = [Mark(1.5, "observers frozen"), Mark(2, "batch norm frozen")]
    figure = figure_of([validated(epoch, 60.0) for epoch in (1, 2, 3)], "net", marks)
    for title in ("loss", "top-1 (%)", "learning rate", "images/s"):
        assert line(figure, title, "_observers frozen")[0] == [1.5, 1.5]
        assert line(figure, title, "_batch norm frozen")[0] == [2, 2]
    assert [text.get_text() for legend in figure.legends for text in legend.get_texts()] == [m.what for m in marks]
    first, second = (handle.get_linestyle() for handle in figure.legends[0].get_lines())
    assert first != second


@pytest.mark.parametrize(
    ("metrics", "title"),
    [
        ([], "no epoch"),
        ([validated(1, 60.0)], "one epoch"),
        ([entry(epoch, loss=math.nan, lr=0.0) for epoch in (1, 2)], "nothing finite"),
        ([{"epoch": 1}], "nothing but the epoch"),
        ([validated(epoch, 60.0) for epoch in range(1, 400)], "many epochs"),
        ([validated(1, 60.0)], "a $ and a {brace}, \\frac, 花"),
    ],
)
def test_it_is_an_image_of_1000_by_700_whatever_there_is(
    metrics: list[dict[str, Any]], title: str, tmp_path: Path
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert write_curves(tmp_path / "c.png", metrics, title, [Mark(1, "observers frozen")]) is None
    image = cv2.imread(str(tmp_path / "c.png"))
    assert image is not None
    assert image.shape == (700, 1000, 3)
    assert image.min() < 100 and image.max() == 255


def test_the_users_own_settings_of_matplotlib_are_neither_used_nor_changed(tmp_path: Path) -> None:
    import matplotlib

    assert write_curves(tmp_path / "plain.png", [validated(1, 60.0)], "net") is None
    with matplotlib.rc_context({"axes.facecolor": "black", "savefig.dpi": 30}):
        assert write_curves(tmp_path / "same.png", [validated(1, 60.0)], "net") is None
        assert matplotlib.rcParams["axes.facecolor"] == "black"
    assert (tmp_path / "plain.png").read_bytes() == (tmp_path / "same.png").read_bytes()


def test_what_cannot_be_drawn_or_written_is_one_line_and_the_old_image_stays(tmp_path: Path) -> None:
    path = tmp_path / "c.png"
    assert write_curves(path, [validated(1, 60.0)], "net") is None
    before = path.read_bytes()
    problem = write_curves(path, [entry(1, loss="two\nlines")], "net")
    assert problem is not None and one_line_about(problem, "c.png")
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    problem = write_curves(tmp_path / "missing" / "c.png", [], "net")
    assert problem is not None and one_line_about(problem, "missing")
