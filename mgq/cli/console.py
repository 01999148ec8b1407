"""All that the command line draws: progress, remarks, errors. No other room prints."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, ProgressColumn, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.text import Text

from mgq.errors import printable
from mgq.events import OnProgress, Progress
from mgq.machine import hush_decoders, mute_stderr

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Column, Table

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

PLAIN_STEPS = 10
"""In a pipe, long work prints a line at every tenth of the way."""


def say(text: str, style: str | None = None, to: Console = out) -> None:
    """Print ``text``: on a terminal wrapped between words, in a pipe with lines as long as they are."""
    to.print(text, style=style, markup=False, soft_wrap=not to.is_terminal)


NARROWEST = 12
"""A column whose text may be folded is made no narrower, in characters."""
_ENDLESS = 1_000_000


def show_table(table: Table, to: Console = out) -> None:
    """Print ``table``, folding the columns that are not ``no_wrap``; where it is too wide for that, each row as lines
    of their own. So no column is lost at any width. A later column without a heading, if there are some, is decoration.
    """
    from rich.measure import Measurement

    widths = [widest(column, table.show_header) for column in table.columns]
    whole = Measurement.get(to, to.options.update(width=_ENDLESS), table).maximum
    lines = whole - sum(max(width, c.min_width or 0) for width, c in zip(widths, table.columns, strict=True))
    for column, width in zip(table.columns, widths, strict=True):
        if column.no_wrap:
            column.min_width = max(width, column.min_width or 0)
        elif whole > to.width:
            column.min_width = None
    least = sum(c.min_width or min(width, NARROWEST) for width, c in zip(widths, table.columns, strict=True))
    if lines + least <= to.width:
        to.print(table)
    else:
        say(stack_rows(table), to=to)


def widest(column: Column, with_heading: bool) -> int:
    """The characters of the longest line in ``column``."""
    cells = [*column.cells, column.header] if with_heading else column.cells
    return max((line.cell_len for cell in cells for line in as_text(cell).split(allow_blank=True)), default=0)


def as_text(cell: RenderableType) -> Text:
    return cell if isinstance(cell, Text) else Text(str(cell))


def stack_rows(table: Table) -> str:
    """The rows of ``table``, one below the other, a line a column."""
    headings = [as_text(column.header).plain.replace("\n", " ").strip() for column in table.columns]
    rows = zip(*([as_text(cell).plain for cell in column.cells] for column in table.columns), strict=True)
    named = any(headings)
    blocks = [] if table.title is None else [as_text(table.title).plain]
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
    say(f"error: {printable(text)}", style="red", to=err)


def note(text: str) -> None:
    """A remark beside the result: to standard error, so that a pipe gets the result alone."""
    say(printable(text), style="dim", to=err)


def format_amount(amount: float, unit: str) -> str:
    return decimal(int(amount)) if unit == "B" else f"{amount:,.0f}"


class AmountColumn(ProgressColumn):
    """How much of how much, bytes as kB and MB."""

    def render(self, task: Task) -> Text:
        unit = str(task.fields["unit"])
        total = "?" if task.total is None else format_amount(task.total, unit)
        return Text(f"{format_amount(task.completed, unit)}/{total}")


class RateColumn(ProgressColumn):
    """Units a second."""

    def render(self, task: Task) -> Text:
        unit = str(task.fields["unit"])
        if not task.speed:
            return Text("")
        return Text(f"{decimal(int(task.speed))}/s" if unit == "B" else f"{task.speed:.1f} {unit}/s")


@contextlib.contextmanager
def progress(every: int | None = None) -> Iterator[OnProgress]:
    """A listener that draws bars on a terminal, and prints a plain line now and then into a pipe.

    With ``every``, steps that have a detail get a line at each ``every``-th of them, on a terminal too.
    """
    if every is not None or not err.is_terminal:
        yield plain_lines(every)
        return
    columns = (TextColumn("{task.description}"), BarColumn(24), AmountColumn(), RateColumn(), TimeRemainingColumn())
    detail = TextColumn("{task.fields[detail]}", markup=False)
    with RichProgress(*columns, detail, console=err, transient=True) as display:
        tasks: dict[str, TaskID] = {}

        def listener(event: Progress) -> None:
            if event.what not in tasks:
                tasks[event.what] = display.add_task(event.what, total=event.total, unit=event.unit, detail="")
            display.update(tasks[event.what], completed=event.done, total=event.total, detail=event.detail)
            if event.total is not None and event.done >= event.total:  # what is done makes room for what comes
                display.remove_task(tasks.pop(event.what))

        yield listener


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


def import_megengine() -> None:
    """Import MegEngine; but for debugging without what its library says while it looks for a GPU."""
    warnings.filterwarnings("ignore", message=".*pkg_resources.*")
    # It opens files through clients of four cloud services, half of the import: here all files are local.
    sys.modules.setdefault("megfile", LocalFiles("megfile"))
    # It asks whether its in-house twin is installed beside it, which takes a third of a second to find out.
    sys.modules.setdefault("pkg_resources", NoPackages("pkg_resources"))
    import numpy as np

    # MegEngine makes the processor flush subnormals to zero; asked later, numpy would warn of that.
    np.finfo(np.float32), np.finfo(np.float64)
    with mute_stderr():
        import megengine

        (megengine.tensor([0.0]) + 1).numpy()
        megengine.is_cuda_available()


def prepare_process() -> None:
    """What a process that helps needs before its work: what this one has."""
    hush_decoders()
    import_megengine()


class NoPackages(ModuleType):
    """Stands for ``pkg_resources`` where nothing but a look through the installed packages is wanted of it."""

    working_set = ()


class LocalFiles(ModuleType):
    """Stands for the module ``megfile``, of which mgq uses nothing but ``smart_open`` for local files."""

    smart_open = staticmethod(open)

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)

        def unused(*_: object, **__: object) -> None:
            raise RuntimeError(f"{self.__name__}.{name} is not available in the mgq command")

        return unused
