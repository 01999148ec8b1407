"""How long work reports its progress, and callbacks that take it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from mgq.deprecation import find_renamed


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
    """For a caller who does not want to see progress."""


OnMessage = Callable[[str], None]
"""Takes a line that should stay in sight."""


def ignore_message(_: str) -> None:
    """For a caller who wants no messages."""


def never_stop() -> bool:
    return False


def duration(seconds: float) -> str:
    """``seconds`` in words, to two figures or so: ``8 s``, ``1 min 40 s``, ``12 min``."""
    if seconds < 55:
        return f"{max(1, round(seconds))} s"
    minutes, rest = divmod(round(seconds / 10) * 10, 60)
    return f"{minutes} min {rest} s" if rest and minutes < 10 else f"{minutes + (rest >= 30)} min"


@dataclass(frozen=True)
class Callbacks:
    """What long work calls: with its progress, with messages, and now and then to ask whether it should stop."""

    on_progress: OnProgress = ignore_progress
    on_message: OnMessage = ignore_message
    should_stop: Callable[[], bool] = never_stop


NO_CALLBACKS = Callbacks()
"""For work whose progress nobody wants to see."""

RENAMED = {
    "ALONE": "NO_CALLBACKS",
    "OnRemark": "OnMessage",
    "Watcher": "Callbacks",
    "silent": "ignore_progress",
    "unheard": "ignore_message",
}
__getattr__ = find_renamed(__name__, RENAMED)
