"""What long work looks like on a terminal, at any width."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from rich.text import Text

from mgq.cli.console import say
from mgq.cli.progress_bars import MARGIN, Bars, LiveLines, bars
from mgq.events import Progress

DETAIL = "loss 1.417, top-1 43.9 %, ranks at 15 14, 783 681 ms"
UP = "\x1b[1A"


def terminal(width: int) -> Console:
    return Console(
        file=io.StringIO(), width=width, height=30, force_terminal=True, color_system=None, legacy_windows=False
    )


def lines_at(width: int, *details: str) -> list[str]:
    """The lines of one kind of work, drawn once for each of ``details``; the last ones."""
    console = terminal(width)
    display = Bars(console)
    task = display.add_task("epoch 2/6", total=1216, unit="pictures", detail="")
    for done, detail in enumerate(details, 1):
        display.update(task, completed=1000 + done, detail=detail)
        with console.capture() as drawn:
            console.print(display.get_renderable())
    return [line.rstrip() for line in drawn.get().splitlines()]


@pytest.mark.parametrize(("width", "lines"), [(140, 1), (80, 2), (60, 2), (34, 3)])
def test_nothing_is_cut_off(width: int, lines: int) -> None:
    drawn = lines_at(width, DETAIL)
    assert len(drawn) == lines and max(map(len, drawn)) <= width - MARGIN
    assert "1,001/1,216" in drawn[0] and DETAIL in " ".join(drawn) and "…" not in "".join(drawn)
    assert ("━" in drawn[0]) == (width > 34)


def test_what_has_made_way_stays_below() -> None:
    assert len(lines_at(80, "short")) == 1
    assert len(lines_at(80, DETAIL, "short")) == 2


def test_lines_that_a_narrower_terminal_has_wrapped_are_taken_away() -> None:
    console = terminal(80)
    live = LiveLines(console)
    live.set_renderable(Text("x" * 70 + "\n" + "x" * 30))
    console.print(live)
    assert str(live.position_cursor()).count(UP) == 1
    console.width = 40
    assert str(live.position_cursor()).count(UP) == 2


def test_bars_draw_and_take_themselves_away() -> None:
    console = terminal(60)
    with bars(console) as listener:
        listener(Progress("calibrate", 3, 10, "pictures", "so far"))
    assert isinstance(console.file, io.StringIO)
    drawn = console.file.getvalue()
    assert "3/10" in drawn and drawn.endswith(f"{UP}\x1b[2K")


def test_a_command_to_be_copied_stays_one_line() -> None:
    console = terminal(40)
    command = "  mgq train --resume -a resnet18 -s /a/folder/of/runs --jobs 2"
    say(command, to=console)
    assert isinstance(console.file, io.StringIO) and console.file.getvalue().splitlines() == [command]
