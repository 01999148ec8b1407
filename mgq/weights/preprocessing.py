"""How pictures are prepared for certain weights: it travels with them, in registries and checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

INTERPOLATIONS = ("bilinear", "bicubic")
MOST_RESIZE = 8.0


@dataclass(frozen=True)
class Preprocessing:
    """How pictures are prepared for certain weights, beside the crop's size.

    The shorter side becomes ``resize`` times the crop's side, by ``interpolation``; the middle is cut out. Raises
    ValueError for values that cannot be.
    """

    resize: float = 256 / 224
    interpolation: str = "bilinear"

    def __post_init__(self) -> None:
        if not isinstance(self.resize, int | float) or isinstance(self.resize, bool):
            raise ValueError("resize is no number")
        if not 1 <= self.resize <= MOST_RESIZE or self.interpolation not in INTERPOLATIONS:
            raise ValueError("no such resize or interpolation")

    def shorter_side(self, size: int) -> int:
        """The pixels of a picture's shorter side before a crop of ``size`` pixels is taken."""
        return round(size * self.resize)


COMMON_PREPROCESSING = Preprocessing()
"""Resize to 256, crop 224, bilinear: the public example's and torchvision's."""


def preprocessing_in(body: Mapping[str, Any]) -> Preprocessing | None:
    """What ``body``, from JSON, says of it; None where it says nothing. Raises TypeError or ValueError for nonsense."""
    said = body.get("preprocessing")
    return None if said is None else Preprocessing(**said)
