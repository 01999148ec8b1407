"""Options for the import of an ONNX file of another program. Importing this imports no MegEngine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ImportWish:
    """Options for the import of a foreign file. None: the default, or what the file itself says.

    ``preprocess`` names a contract of :data:`mgq.zoo.input_contract.CONTRACTS`, which ``mean``, ``std``
    and the ``order`` of the channels, ``rgb`` or ``bgr``, change. ``size``: height and width, where the file leaves
    them open. ``labels``: a file of class names. ``scores``: the output that has a number for each class, of several.
    """

    preprocess: str | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    order: str | None = None
    size: tuple[int, int] | None = None
    labels: Path | None = None
    scores: str | None = None

    @property
    def is_open(self) -> bool:
        """Whether all options are left open."""
        return self == ImportWish()


NO_WISH = ImportWish()
