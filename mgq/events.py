"""Callbacks by which long work reports progress and messages; without them they go to the log."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

from mgq.deprecation import find_renamed

LOG = logging.getLogger("mgq")
"""The logger for messages (level INFO) and progress (level DEBUG) without a callback."""


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


def log_progress(event: Progress) -> None:
    """The listener of a caller who gives none: progress is in the log, for who looks."""
    LOG.debug("%s: %s of %s %s %s", event.what, event.done, event.total, event.unit, event.detail)


OnMessage = Callable[[str], None]
"""Takes a line that should stay in sight."""


def log_message(line: str) -> None:
    """The reader of a caller who gives none: remarks are in the log."""
    LOG.info("%s", line)


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
    """What long work calls: with its progress, with messages, and now and then to ask whether it should stop.

    ``should_stop`` is asked within ``while_training`` alone.
    """

    on_progress: OnProgress = log_progress
    on_message: OnMessage = log_message
    should_stop: Callable[[], bool] = never_stop
    while_training: Callable[[], AbstractContextManager[None]] = nullcontext


NO_CALLBACKS = Callbacks()
"""A callback that ignores progress."""

RENAMED = {
    "ALONE": "NO_CALLBACKS",
    "OnRemark": "OnMessage",
    "Watcher": "Callbacks",
    "silent": "log_progress",
    "unheard": "log_message",
}
__getattr__ = find_renamed(__name__, RENAMED)
