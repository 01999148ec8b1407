"""How long work reports its progress without knowing who watches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple


class Progress(NamedTuple):
    """One step of long work: ``done`` of ``total`` units (``total`` is None while unknown).

    ``detail`` is what the work has found so far, in a few words, such as ``top-1 83.1 %``.
    """

    what: str
    done: int
    total: int | None
    unit: str = ""
    detail: str = ""


OnProgress = Callable[[Progress], None]


def ignore_progress(_: Progress) -> None:
    """The listener of a caller who does not want to know."""


OnMessage = Callable[[str], None]
"""Takes a line that is worth keeping in sight."""


def ignore_message(_: str) -> None:
    """The reader of a caller who wants no remarks."""


def never_stop() -> bool:
    return False


@dataclass(frozen=True)
class Callbacks:
    """Who watches long work: it tells its progress and its remarks, and asks now and then whether it should stop."""

    on_progress: OnProgress = ignore_progress
    on_message: OnMessage = ignore_message
    should_stop: Callable[[], bool] = never_stop


NO_CALLBACKS = Callbacks()
"""The watcher of work that nobody watches."""
