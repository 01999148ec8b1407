"""A reader of FlatBuffers for untrusted files. Every offset is checked: one that reaches outside of the file raises
struct.error or ValueError. Format: "FlatBuffer Internals" of its documentation.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import cached_property

LONGEST_TEXT = 256
LONGEST_VECTOR = 10_000
"""Of numbers and tables: each becomes an object of its own."""
MOST_FIELDS = 64


@dataclass(frozen=True)
class Table:
    """The table at ``at`` of ``data``. Fields are known by their index in the schema; those that are 0 are missing."""

    data: memoryview
    at: int

    @cached_property
    def fields(self) -> dict[int, int]:
        """Index -> where it lies, of the fields that are there."""
        vtable = self.at - self._read_signed(self.at)
        if vtable < 0:
            raise ValueError("a table begins before the file")
        length, size = struct.unpack_from("<HH", self.data, vtable)
        if length > 4 + 2 * MOST_FIELDS:
            raise ValueError("a table of more fields than any has")
        offsets = struct.unpack_from(f"<{max(0, length - 4) // 2}H", self.data, vtable + 4)
        if any(offset >= size for offset in offsets):
            raise ValueError("a field lies outside its table")
        return {index: self.at + offset for index, offset in enumerate(offsets) if offset}

    def number(self, index: int, kind: str = "<I") -> int | float:
        """The number in field ``index``, of the ``kind`` that ``struct`` names; 0 where it is missing."""
        at = self.fields.get(index)
        return 0 if at is None else struct.unpack_from(kind, self.data, at)[0]

    def numbers(self) -> dict[int, int]:
        """All fields that are there as whole numbers of four bytes."""
        return {index: struct.unpack_from("<i", self.data, at)[0] for index, at in self.fields.items()}

    def table(self, index: int) -> Table | None:
        at = self._follow_pointer(index)
        return None if at is None else Table(self.data, at)

    def tables(self, index: int) -> list[Table]:
        at = self._follow_pointer(index)
        if at is None:
            return []
        return [Table(self.data, place + self._read_unsigned(place)) for place in self._places(at, 4)]

    def integers(self, index: int) -> tuple[int, ...]:
        """The vector of 32-bit numbers in field ``index``; empty where it is missing."""
        at = self._follow_pointer(index)
        return () if at is None else tuple(self._read_unsigned(place) for place in self._places(at, 4))

    def text(self, index: int) -> bytes | None:
        """The text in field ``index`` as UTF-8, and of a long one the beginning; None where it is missing."""
        raw = self.read_bytes(index)
        return None if raw is None else bytes(raw[:LONGEST_TEXT])

    def read_bytes(self, index: int) -> memoryview | None:
        """The bytes in field ``index``; None where it is missing."""
        at = self._follow_pointer(index)
        if at is None:
            return None
        places = self._places(at, 1)
        return self.data[places.start : places.stop]

    def _follow_pointer(self, index: int) -> int | None:
        at = self.fields.get(index)
        return None if at is None else at + self._read_unsigned(at)

    def _places(self, at: int, width: int) -> range:
        """Where the elements of the vector at ``at`` lie. None is ever made that is longer than the file or, of other
        than bytes, than ``LONGEST_VECTOR``."""
        start, length = at + 4, self._read_unsigned(at)
        if width > 1 and length > LONGEST_VECTOR:
            raise ValueError("a vector longer than any is")
        if start + length * width > len(self.data):
            raise ValueError("a vector reaches outside the file")
        return range(start, start + length * width, width)

    def _read_unsigned(self, at: int) -> int:
        value: int = struct.unpack_from("<I", self.data, at)[0]
        return value

    def _read_signed(self, at: int) -> int:
        value: int = struct.unpack_from("<i", self.data, at)[0]
        return value
