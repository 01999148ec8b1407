"""Progress bars for terminals."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.constrain import Constrain
from rich.control import Control
from rich.filesize import decimal
from rich.live_render import LiveRender
from rich.progress import BarColumn, ProgressColumn, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.segment import Segment
from rich.text import Text

from mgq.cli.amounts import format_amount
from mgq.cli.widths import measure_unfolded
from mgq.events import OnProgress, Progress

BAR = 24
SHORTEST_BAR = 4
MARGIN = 2
"""Characters at the end of each line that stay free: the terminal writes ^C there, and would begin a line for it."""


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


class LiveLines(LiveRender):
    """Lines that take themselves away, also where the terminal has become narrower since, and has wrapped them.

    Nearly all terminals wrap what is too long then; a few cut it off.
    """

    def __init__(self, console: Console) -> None:
        super().__init__("")
        self.console = console
        self.widths: list[int] = []

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        drawn = [part for part in super().__rich_console__(console, options) if isinstance(part, Segment)]
        self.widths = [Segment.get_line_length(line) for line in Segment.split_lines(drawn)]
        yield from drawn

    def position_cursor(self) -> Control:
        if self._shape is not None:
            now = self.console.width
            self._shape = self._shape[0], sum(max(1, -(-width // now)) for width in self.widths)
        return super().position_cursor()


class Bars(RichProgress):
    """A bar for each kind of work: its details stand behind it, or below it once they did not fit."""

    def __init__(self, console: Console) -> None:
        self.terminal = console
        self.bar = BarColumn(BAR)
        self.detail = TextColumn("{task.fields[detail]}", markup=False)
        self.row = (TextColumn("{task.description}"), self.bar, AmountColumn(), RateColumn(), TimeRemainingColumn())
        self.room = 0
        self.is_stacked = False
        super().__init__(*self.row, self.detail, console=console, transient=True)
        self.live._live_render = LiveLines(console)

    def get_renderables(self) -> Iterable[RenderableType]:
        self.fit(self.terminal.width - MARGIN)
        if not self.is_stacked:
            yield self.make_tasks_table(self.tasks)
            return
        for task in self.tasks:
            yield self.make_tasks_table([task])
            if task.fields["detail"]:
                yield Constrain(Text(task.fields["detail"]), self.room)

    def fit(self, room: int) -> None:
        """Choose columns that fit in ``room`` characters. What has made way once does not come back at that width."""
        if not self.tasks:
            return
        if room != self.room:
            self.room, self.is_stacked, self.bar.bar_width = room, False, BAR
        bar = self.bar.bar_width or 0
        self.columns = (*self.row, self.detail)
        self.is_stacked = self.is_stacked or self.measure() > room
        if self.is_stacked:
            self.columns = self.row
            self.bar.bar_width = max(0, bar - max(0, self.measure() - room))
            if self.bar.bar_width < SHORTEST_BAR:
                self.columns = tuple(column for column in self.row if column is not self.bar)

    def measure(self) -> int:
        """The characters that the longest line takes."""
        return measure_unfolded(self.make_tasks_table(self.tasks), self.terminal)


@contextlib.contextmanager
def bars(to: Console) -> Iterator[OnProgress]:
    """A progress callback that draws a bar for each kind of work."""
    with Bars(to) as display:
        tasks: dict[str, TaskID] = {}

        def listener(event: Progress) -> None:
            if event.what not in tasks:
                tasks[event.what] = display.add_task(event.what, total=event.total, unit=event.unit, detail="")
            display.update(tasks[event.what], completed=event.done, total=event.total, detail=event.detail)
            if event.total is not None and event.done >= event.total:  # what is done makes room for what comes
                display.remove_task(tasks.pop(event.what))

        yield listener
