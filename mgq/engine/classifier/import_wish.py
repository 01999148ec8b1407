"""What the user says of an ONNX file of another program. Reading it imports no MegEngine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ImportWish:
    """What is said of a foreign file: None where it is left to be told from the file, or is the default.

    ``preprocess`` names a contract of :data:`mgq.zoo.input_contract.CONTRACTS`, which ``mean``, ``std``
    and the ``order`` of the channels, ``rgb`` or ``bgr``, change. ``size``: height and width, where the file leaves
    them open. ``labels``: a file of class names.
    """

    preprocess: str | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    order: str | None = None
    size: tuple[int, int] | None = None
    labels: Path | None = None

    @property
    def is_open(self) -> bool:
        """Whether nothing is said."""
        return self == ImportWish()


NO_WISH = ImportWish()
