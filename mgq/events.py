"""How long work reports its progress without knowing who watches."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple


class Progress(NamedTuple):
    """One step of long work: ``done`` of ``total`` units (``total`` is None while unknown)."""

    what: str
    done: int
    total: int | None
    unit: str = ""


OnProgress = Callable[[Progress], None]


def silent(_: Progress) -> None:
    """The listener of a caller who does not want to know."""
