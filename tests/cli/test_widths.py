"""Tables at any width of a terminal: every cell is shown, whole, and no line is longer than the terminal."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pytest
from rich.console import Console

from mgq.cli import bench, eval, infer, models, training
from mgq.cli import console as console_module
from mgq.cli.console import as_text, out, show_table
from mgq.engine.classifier.evaluation_result import Evaluation
from mgq.engine.classifier.predict import ClassScore, Prediction

if TYPE_CHECKING:
    from rich.table import Table

NAMES = ("Egyptian cat", "a class whose name is longer than most terminals are wide, which happens", "n02123045", "猫")
WIDTHS = (20, 24, 30, 37, 40, 50, 60, 72, 79, 80, 81, 100, 120, 200, 300)


def evaluation() -> Evaluation:
    labels = np.arange(4).repeat(3)
    predictions = np.roll(labels, 1)
    return Evaluation(12, 1.25, 66.7, 100.0, 1.5, predictions, labels, np.arange(12), NAMES)


def answer_table() -> Table:
    guesses = tuple(
        ClassScore(i, name, share) for i, (name, share) in enumerate(zip(NAMES, (0.9, 0.08, 0.015, 0.005), strict=True))
    )
    return infer.table_of(Prediction("photos/with a long name of its own/cat.jpg", guesses, 12.3))


def comparison_table() -> Table:
    found = SimpleNamespace(top1=93.54, top5=100.0)
    sizes: dict[str, Any] = {"normal_bytes": 44_800_000, "quantized_bytes": 11_200_000}
    comparison = SimpleNamespace(normal=found, qat=SimpleNamespace(top1=93.0, top5=99.9), quantized=found, **sizes)
    return training.table_of(cast(Any, comparison), "fake-quantized, calibrated")


TABLES: dict[str, Callable[[], Table]] = {
    "infer": answer_table,
    "classes": lambda: eval.class_table(evaluation()),
    "confusions": lambda: eval.confusion_table(evaluation().confused()),
    "figures": lambda: eval.figures(evaluation()),
    "train": comparison_table,
    "bench": lambda: bench.plain_table(
        ["engine", "FPS", "IQR", "p50", "peak"], [["OpenVINO", "31.9", "0.75", "31", "9%"]]
    ),
}


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", TABLES)
def test_every_cell_is_shown_at_every_width(
    name: str, width: int, terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = io.StringIO()
    console = Console(file=stream, width=width, force_terminal=terminal, color_system=None, highlight=False)
    monkeypatch.setattr("mgq.cli.console.out", console)
    show_table(TABLES[name](), console)
    shown = stream.getvalue()
    table, room = TABLES[name](), squeezed(shown)
    for column in table.columns:
        for cell in [*column.cells, *([column.header] if table.show_header else [])]:
            words = squeezed(as_text(cell).plain)
            # What is folded beside other columns is in pieces; a bar is a decoration.
            assert (words in room if column.no_wrap else set(words) <= set(room)) or set(words) == {"█"}
    assert "…" not in shown
    if terminal:
        assert max(as_text(line).cell_len for line in shown.splitlines()) <= width


def squeezed(text: str) -> str:
    return re.sub(r"[\s─]", "", text)


def test_nothing_changes_where_there_is_room() -> None:
    for make in TABLES.values():
        plain, shown = io.StringIO(), io.StringIO()
        Console(file=plain, width=100).print(make())
        show_table(make(), Console(file=shown, width=100))
        assert shown.getvalue() == "".join(f"{line.rstrip()}\n" for line in plain.getvalue().splitlines())


def test_a_terminal_that_knows_no_width_has_the_usual_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "0")
    monkeypatch.delitem(vars(console_module), "out", raising=False)
    assert console_module.console("out").width == console_module.UNKNOWN_WIDTH


def test_a_path_stays_whole_in_a_pipe() -> None:
    path = f"photos of 猫/{'a folder with a long name/' * 4}cat.jpg"
    guesses = (ClassScore(0, "cat", 0.9), ClassScore(1, "dog", 0.1))
    stream = io.StringIO()
    show_table(infer.table_of(Prediction(path, guesses, 12.3)), Console(file=stream, width=80))
    lines = stream.getvalue().split("\n")
    assert lines[0] == f"{path}  12.3 ms"
    assert not any(line.endswith(" ") for line in lines)


@pytest.mark.parametrize("width", [20, 45, 80, 200])
def test_models_are_shown_whole(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(out, "width", width)
    weights = {"version": None, "from": "a package", "at_hand": True, "publisher": "a paper"}
    entry = {"name": "shufflenet_v1_x0_5_g3", "parameters": 880_000, "macs_224": 51e6, "weights_at_hand": ["runs/x: y"]}
    models.show([{**entry, "weights": [{**weights, "top1_float": 69.8, "top1_int8": None}]}])
    shown = capsys.readouterr().out
    for word in ("shufflenet_v1_x0_5_g3", "0.88 M", "51 M", "69.8", "runs/x"):
        assert word in shown
