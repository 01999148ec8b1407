"""What chooses a network, and what it is opened for. Importing this imports no MegEngine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

RUNS = Path("runs")
"""The folder of the runs, where none is named."""


@dataclass(frozen=True)
class NetworkOptions:
    """The options that choose a network and its engine; without any of them it is the built-in one.

    ``checkpoint`` may be a deployed file, which ``engine`` runs. Other words as for
    :func:`mgq.engine.classifier.open.open_classifier`; ``ranges`` is a file here.
    """

    arch: str | None = None
    checkpoint: Path | None = None
    key: str | None = None
    save: Path = RUNS
    pretrained: str | None = None
    ranges: Path | None = None
    width: float | None = None
    image_size: int | None = None
    target: str | None = None
    engine: str | None = None


@dataclass(frozen=True)
class Usage:
    """What a network is opened for.

    ``few``: no more than a few pictures will be asked about, so that an engine is chosen that starts soon. ``kept``:
    the built-in network may come from the file that is kept of it, which cannot be written again. ``threads``: of a
    file's engine, by default one a core.
    """

    few: bool = False
    kept: bool = False
    threads: int | None = None


ANY_USAGE = Usage()
