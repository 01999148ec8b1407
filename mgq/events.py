"""How long work reports its progress without knowing who watches: to callbacks or, without them, to the log."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

LOG = logging.getLogger("mgq")
"""Where remarks (level INFO) and progress (level DEBUG) go that no callback takes."""


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


def silent(event: Progress) -> None:
    """The listener of a caller who gives none: progress is in the log, for who looks."""
    LOG.debug("%s: %s of %s %s %s", event.what, event.done, event.total, event.unit, event.detail)


OnRemark = Callable[[str], None]
"""Takes a line that is worth keeping in sight."""


def unheard(line: str) -> None:
    """The reader of a caller who gives none: remarks are in the log."""
    LOG.info("%s", line)


def never() -> bool:
    return False


@dataclass(frozen=True)
class Watcher:
    """Who watches long work: it tells its progress and its remarks, and asks now and then whether it should stop."""

    on_progress: OnProgress = silent
    on_remark: OnRemark = unheard
    should_stop: Callable[[], bool] = never


ALONE = Watcher()
"""The watcher of work that nobody watches."""
