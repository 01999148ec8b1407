"""Describes how images are prepared for certain weights; registries and checkpoints keep it with them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from msgspec import Meta

GREY_OF_BGR = (0.114, 0.587, 0.299)
"""ITU-R BT.601, as Pillow and OpenCV do it."""
INTERPOLATIONS = ("bilinear", "bicubic")
MOST_RESIZE = 8.0


@dataclass(frozen=True)
class Preprocessing:
    """How pictures are prepared for certain weights, beside the crop's size.

    The shorter side becomes ``resize`` times the crop's side, by ``interpolation``; the middle is cut out. Raises
    ValueError for values that cannot be.
    """

    resize: Annotated[float, Meta(ge=1, le=MOST_RESIZE)] = 256 / 224
    interpolation: str = "bilinear"

    def __post_init__(self) -> None:
        if not 1 <= self.resize <= MOST_RESIZE or self.interpolation not in INTERPOLATIONS:
            raise ValueError("no such resize or interpolation")

    def shorter_side(self, size: int) -> int:
        """The pixels of a picture's shorter side before a crop of ``size`` pixels is taken."""
        return round(size * self.resize)


COMMON_PREPROCESSING = Preprocessing()
"""Resize to 256, crop 224, bilinear: the public example's and torchvision's."""
