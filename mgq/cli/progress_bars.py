"""Progress bars for terminals."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, ProgressColumn, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.text import Text

from mgq.cli.amounts import counted
from mgq.events import OnProgress, Progress


class AmountColumn(ProgressColumn):
    """How much of how much, bytes as kB and MB."""

    def render(self, task: Task) -> Text:
        unit = str(task.fields["unit"])
        total = "?" if task.total is None else counted(task.total, unit)
        return Text(f"{counted(task.completed, unit)}/{total}")


class RateColumn(ProgressColumn):
    """Units a second."""

    def render(self, task: Task) -> Text:
        unit = str(task.fields["unit"])
        if not task.speed:
            return Text("")
        return Text(f"{decimal(int(task.speed))}/s" if unit == "B" else f"{task.speed:.1f} {unit}/s")


@contextlib.contextmanager
def bars(to: Console) -> Iterator[OnProgress]:
    """A progress callback that draws a bar for each kind of work."""
    columns = (TextColumn("{task.description}"), BarColumn(24), AmountColumn(), RateColumn(), TimeRemainingColumn())
    detail = TextColumn("{task.fields[detail]}", markup=False)
    with RichProgress(*columns, detail, console=to, transient=True) as display:
        tasks: dict[str, TaskID] = {}

        def listener(event: Progress) -> None:
            if event.what not in tasks:
                tasks[event.what] = display.add_task(event.what, total=event.total, unit=event.unit, detail="")
            display.update(tasks[event.what], completed=event.done, total=event.total, detail=event.detail)
            if event.total is not None and event.done >= event.total:  # what is done makes room for what comes
                display.remove_task(tasks.pop(event.what))

        yield listener
