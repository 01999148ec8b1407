"""The options of a report, and the deployed file that they name. Reading this imports no MegEngine."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mgq.engine.classifier.network_options import RUNS
from mgq.errors import InputError, printable
from mgq.export.formats import format_of
from mgq.reports.measurements import SHOWN
from mgq.runtime.registry import Backend
from mgq.zoo.registry import specs


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """The options of ``mgq report``; everything may be left out. :func:`mgq.reports.report.report` says what they mean.

    Raises InputError for a ``limit`` below 1 and for ``images`` below 0.
    """

    run: str | Path | None = None
    data: Path | None = None
    checkpoint: Path | None = None
    save: Path = RUNS
    output: Path | None = None
    limit: int | None = None
    images: int = SHOWN
    engines: bool | Sequence[Backend] = True
    key: str | None = None
    arch: str | None = None

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise InputError(f"--limit {self.limit} is too small: give at least 1")
        if self.images < 0:
            raise InputError(f"--pictures {self.images} is not possible: give 0 or more")

    def command_for(self, path: Path) -> str:
        """The command that makes the page about ``path``, a run or a file, again."""
        known = specs().get(self.arch or "")
        words = {
            "-a": known.typed if known is not None else self.arch,
            "-c": self.checkpoint if path.is_dir() else None,  # a file given by -c is `path`
            "--key": self.key,
            "-d": self.data,
            "--limit": self.limit,
            "--pictures": self.images if self.images != SHOWN else None,
            "-o": self.output,
        }
        said = [word for name, value in words.items() if value is not None for word in (name, str(value))]
        return shlex.join(["mgq", "report", str(path), *said, *([] if self.engines else ["--no-engines"])])

    def find_file(self) -> Path | None:
        """The deployed file that ``run`` names, or ``checkpoint`` without a ``run``; None where they name none.

        Raises InputError where it cannot be read, another program wrote it, or an option belongs to a run.
        """
        named = self.run if self.run is not None else self.checkpoint
        path = Path(named) if named is not None else None
        if path is None or format_of(path) is None or path.is_dir():
            return None
        if path.suffix.lower() == ".onnx":
            from mgq.export.onnx.foreign_file import is_foreign

            if is_foreign(path):
                if self.run is None:
                    return None  # it is a float network to compare a run with
                raise InputError(
                    f"{printable(path)} was written by another program: `mgq calibrate -c {printable(path)} -d PHOTOS` "
                    "makes an int8 file and a run of it"
                )
        for option, value in (("-c", self.checkpoint if self.run is not None else None), ("--key", self.key)):
            if value is not None:
                raise InputError(f"{printable(path)} is a finished file: leave out {option}")
        return path
