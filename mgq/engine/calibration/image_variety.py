"""Checks whether the images of a calibration are enough: how many there are, how many differ, how many are blank."""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

from mgq.errors import plural

FEWEST = 16
"""Fewer different pictures than these get a warning: their ranges may not hold for others."""
_MEND = "give 100 or so that are like those it will see"


class Likeness:
    """Counts images, and those that differ, as they are read."""

    def __init__(self) -> None:
        self.count = self.blank = 0
        self._seen: set[bytes] = set()

    def add(self, crop: npt.NDArray[np.uint8]) -> None:
        """Count a picture, uint8 (H, W, 3)."""
        self.count += 1
        self.blank += bool((crop == crop[0, 0]).all())
        self._seen.add(hashlib.blake2b(np.ascontiguousarray(crop).data, digest_size=16).digest())

    @property
    def different(self) -> int:
        """How many pictures there are, those with the same pixels counted once."""
        return len(self._seen)

    def warnings(self) -> list[str]:
        """A line for each thing that makes the ranges doubtful."""
        found = []
        if self.blank:
            found.append(
                f"{self.blank} of {self.count} calibration pictures {'is' if self.blank == 1 else 'are'} blank, of a"
                f" single colour: ranges from them do not hold for photos; {_MEND}"
            )
        if self.count > 1 and self.different == 1 and not self.blank:
            found.append(f"all {self.count} calibration pictures are alike to the pixel: they count as one; {_MEND}")
        elif 0 < self.different < FEWEST and self.blank < self.count:
            alike = f", {self.different} of them different" if self.different < self.count else ""
            found.append(
                f"calibrated on {plural(self.count, 'picture')}{alike}: "
                f"ranges of so few may not hold for others; {_MEND}"
            )
        return found
