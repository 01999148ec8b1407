"""Reads the fields of a TIFF, and of EXIF, which is a small TIFF.

Sources: TIFF 6.0, Exif 2.32.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

ORIENTATION = 274
"""The tag that says how a picture is turned."""
EXIF_MARK = b"Exif\0\0"
"""What EXIF begins with in a JPEG."""
ORIENTATIONS = range(1, 9)
FIELD_BYTES = {3: 2, 4: 4, 5: 8, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4}
_WHOLE_NUMBERS = {1: "u1", 3: "u2", 4: "u4"}


class Field(NamedTuple):
    """``amount`` values of a ``kind``, which begin at ``start``; ``order`` is < or >."""

    tag: int
    kind: int
    amount: int
    start: int
    order: str

    @property
    def length(self) -> int:
        return self.amount * FIELD_BYTES.get(self.kind, 1)

    def read_first(self, tiff: bytes) -> int:
        """The first of its whole numbers. Raises struct.error where it is cut off, IndexError where there is none."""
        return int(self._replace(amount=min(1, self.amount)).numbers(tiff)[0])

    def numbers(self, tiff: bytes) -> npt.NDArray[np.int64]:
        """The whole numbers it holds; none if it holds others. Raises struct.error where they are cut off."""
        form = _WHOLE_NUMBERS.get(self.kind)
        if form is None:
            return np.zeros(0, np.int64)
        if self.start + self.length > len(tiff):
            raise struct.error
        return np.frombuffer(tiff, self.order + form, self.amount, self.start).astype(np.int64)


def tiff_fields(tiff: bytes) -> Iterator[Field]:
    """The fields of the first directory. Raises struct.error where the bytes end before it does."""
    order = "<" if tiff.startswith(b"II") else ">"
    (at,) = struct.unpack_from(f"{order}I", tiff, 4)
    (entries,) = struct.unpack_from(f"{order}H", tiff, at)
    for entry in range(at + 2, at + 2 + 12 * entries, 12):
        tag, kind, amount, pointer = struct.unpack_from(f"{order}HHII", tiff, entry)
        field = Field(tag, kind, amount, pointer, order)
        yield field if field.length > 4 else field._replace(start=entry + 8)


def exif_orientation(tiff: bytes) -> int:
    """The orientation, 1 to 8, that an EXIF block tells; 1 where it has none or is malformed."""
    try:
        for field in tiff_fields(tiff):
            if field.tag == ORIENTATION:
                turn = field.read_first(tiff)
                return turn if turn in ORIENTATIONS else 1
    except (struct.error, IndexError):
        pass
    return 1
