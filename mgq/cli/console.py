"""Prints results, progress, remarks and errors. No other package of mgq prints."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from mgq.cli.amounts import format_amount
from mgq.cli.widths import measure_unfolded
from mgq.errors import printable
from mgq.events import OnProgress, Progress
from mgq.system.end_signals import END_REQUEST

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Column, Table
    from rich.text import Text

    out: Console
    err: Console

COMMAND = "  mgq "
"""How a line begins that is a command to be copied."""
PLAIN_STEPS = 10
"""In a pipe, long work prints a line at every tenth of it."""


UNKNOWN_WIDTH = 80
"""Columns where the terminal does not know its own."""
STREAMS = {"out": "stdout", "err": "stderr"}
FORCING = ("FORCE_COLOR", "TTY_COMPATIBLE")
"""Variables that make rich draw in a pipe as on a terminal."""


def __getattr__(name: str) -> Console:
    """``out`` and ``err``, rich's consoles, made when they are first asked for: in a pipe a few lines need none."""
    if name not in STREAMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from rich.console import Console

    made = globals()[name] = Console(stderr=name == "err", highlight=False)
    if made.width < 1:  # COLUMNS=0, as terminals say that know no width: rich would draw nothing
        made.width = UNKNOWN_WIDTH
    return made


def console(name: str) -> Console:
    """The console ``out`` or ``err``."""
    found: Console = getattr(sys.modules[__name__], name)
    return found


def is_pipe(name: str) -> bool:
    """Whether what ``out`` or ``err`` shows needs nothing of rich's, which takes a while to be imported."""
    return (
        name not in globals()
        and not any(variable in os.environ for variable in FORCING)
        and not getattr(sys, STREAMS[name]).isatty()
    )


def say(text: str, style: str | None = None, to: Console | None = None) -> None:
    """Print ``text``: on a terminal wrapped between words, in a pipe with lines as long as they are.

    A command to be copied stays one line everywhere.
    """
    if to is None:
        say_on("out", text, style)
    else:
        to.print(text, style=style, markup=False, soft_wrap=not to.is_terminal or text.startswith(COMMAND))


def say_on(name: str, text: str, style: str | None = None) -> None:
    """Print ``text`` on ``out`` or ``err``, by name."""
    if is_pipe(name):
        getattr(sys, STREAMS[name]).write(f"{text}\n")
    else:
        say(text, style, console(name))


NARROWEST = 12
"""A column whose text may be folded is made no narrower, in characters."""


def show_table(table: Table, to: Console | None = None) -> None:
    """Print ``table``, folding the columns that are not ``no_wrap``; where it is too wide for that, each row as lines
    of their own. So no column is lost at any width. A later column without a heading, if there are some, is decoration.
    The title, which rich would break where the table ends, is a line of its own: in a pipe it stays whole.
    """
    to = to or console("out")
    widths = [measure_width(column, table.show_header) for column in table.columns]
    whole = measure_unfolded(table, to)
    lines = whole - sum(max(width, c.min_width or 0) for width, c in zip(widths, table.columns, strict=True))
    for column, width in zip(table.columns, widths, strict=True):
        if column.no_wrap:
            column.min_width = max(width, column.min_width or 0)
        elif whole > to.width:
            column.min_width = None
    least = sum(c.min_width or min(width, NARROWEST) for width, c in zip(widths, table.columns, strict=True))
    if table.title is not None:
        to.print(as_text(table.title), soft_wrap=not to.is_terminal)
        table.title = None
    if lines + least <= to.width:
        print_without_padding(table, to)
    else:
        say(stack_rows(table), to=to)


def print_without_padding(table: Table, to: Console) -> None:
    """Print ``table``; in a pipe without the spaces that rich puts behind each line."""
    if to.is_terminal:
        to.print(table)
        return
    with to.capture() as drawn:
        to.print(table)
    to.file.write("".join(f"{line.rstrip()}\n" for line in drawn.get().removesuffix("\n").split("\n")))


def measure_width(column: Column, with_heading: bool) -> int:
    """The characters of the longest line in ``column``."""
    cells = [*column.cells, column.header] if with_heading else column.cells
    return max((line.cell_len for cell in cells for line in as_text(cell).split(allow_blank=True)), default=0)


def as_text(cell: RenderableType) -> Text:
    from rich.text import Text

    return cell if isinstance(cell, Text) else Text(str(cell))


def stack_rows(table: Table) -> str:
    """The rows of ``table``, one below the other, a line a column."""
    headings = [as_text(column.header).plain.replace("\n", " ").strip() for column in table.columns]
    rows = zip(*([as_text(cell).plain for cell in column.cells] for column in table.columns), strict=True)
    named = any(headings)
    blocks = []
    for row in rows:
        lines = []
        for place, (heading, cell) in enumerate(zip(headings, row, strict=True)):
            if heading:
                lines.append(f"{heading}: {cell}")
            elif cell and (place == 0 or not named):
                lines.append(cell)
        blocks.append("\n".join(lines) if named else " ".join(lines))
    return "\n" + "\n\n".join(blocks) + "\n" if named else "\n".join(blocks)


def print_error(text: str) -> None:
    say_on("err", f"error: {printable(text)}", style="red")


def note(text: str) -> None:
    """A remark beside the result: to standard error, so that a pipe gets the result alone."""
    say_on("err", printable(text), style="dim")


@contextlib.contextmanager
def progress(every: int | None = None) -> Iterator[OnProgress]:
    """A listener that draws bars on a terminal, and prints a plain line now and then into a pipe.

    With ``every``, steps that have a detail get a line at each ``every``-th of them, on a terminal too.
    """
    if every is not None or is_pipe("err") or not console("err").is_terminal:
        yield obey_signals(plain_lines(every))
        return
    from mgq.cli.progress_bars import bars

    with bars(console("err")) as listener:
        yield obey_signals(listener)


def obey_signals(listener: OnProgress) -> OnProgress:
    """``listener``, which ends the work where a signal wanted that and was lost."""

    def listen(event: Progress) -> None:
        END_REQUEST.obey()
        listener(event)

    return listen


def plain_lines(every: int | None = None) -> OnProgress:
    said: dict[str, int] = {}

    def listener(event: Progress) -> None:
        if every is not None and event.detail:
            said[event.what] = said.get(event.what, 0) + 1
            if said[event.what] % every == 0:
                note(line_of(event))
        elif event.total and event.total >= PLAIN_STEPS:
            step = event.done * PLAIN_STEPS // event.total
            if step < said.get(event.what, 0):  # it is done once more
                said[event.what] = 0
            if step > said.get(event.what, 0):
                said[event.what] = step
                note(line_of(event))

    return listener


def line_of(event: Progress) -> str:
    amount = format_amount(event.done, event.unit)
    if event.total is not None:
        amount += f" of {format_amount(event.total, event.unit)}"
    unit = "" if event.unit == "B" else f" {event.unit}"
    return f"{event.what}: {amount}{unit}" + (f", {event.detail}" if event.detail else "")
