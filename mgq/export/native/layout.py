"""Memory layouts: where the channels and pixels of a tensor lie."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import ceil
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
LANES = 16
"""Channels a vector."""


@dataclass(frozen=True, eq=False)
class Lanes:
    """Channel c lies in lane ``places[c]`` of ``count``; ``blocks`` are how many vectors belong together."""

    places: Array
    blocks: tuple[int, ...]

    @property
    def vectors(self) -> int:
        return sum(self.blocks)

    @property
    def count(self) -> int:
        return self.vectors * LANES

    def spread(self, values: Array, dtype: Any) -> Array:
        """``values``, one a channel, in their lanes; 0 elsewhere."""
        result = np.zeros(self.count, dtype)
        result[self.places] = values
        return result


def arrange(makers: Array, readers: Array) -> Lanes:
    """Lanes for channels that group ``makers[c]`` makes and group ``readers[c]`` reads.

    What one group makes begins with a vector of its own, so that a tile of outputs reads one group of inputs; within it
    what one group reads lies together.
    """
    places = np.zeros(len(makers), np.int64)
    blocks: list[int] = []
    for group in np.unique(makers):
        inside = np.flatnonzero(makers == group)
        ordered = inside[np.argsort(readers[inside], kind="stable")]
        places[ordered] = sum(blocks) * LANES + np.arange(len(inside))
        blocks.append(ceil(len(inside) / LANES))
    return Lanes(places, tuple(blocks))


@dataclass(eq=False)
class Storage:
    """A tensor in memory: ``layout`` as in :mod:`mgq.export.native.emit.rows`, ``pad`` pixels at each side.

    In layout D ``pad`` is left of a row and ``right`` behind it.

    ``ring``: how many rows are kept at a time, a power of 2; None for all. ``fill`` is what the border holds,
    ``colour`` where it holds four values for each pixel.
    ``spare`` more groups of four pixels are readable behind a row. ``own``: each thread has one, with what it needs.
    ``unit``: bytes of a value in layouts A and D.
    """

    name: str
    layout: str
    lanes: int
    height: int
    width: int
    pad: int = 0
    fill: int = 0
    colour: tuple[int, int, int, int] | None = None
    ring: int | None = None
    spare: int = 0
    own: bool = False
    right: int = 0
    unit: int = 1
    offset: int = field(default=0)

    @property
    def step(self) -> int:
        """Bytes from four pixels to the next four, in layout P from pixel to pixel."""
        return self.lanes * (1 if self.layout == "P" else 4 * self.unit)

    @property
    def row_bytes(self) -> int:
        if self.layout == "P":
            return (self.width + 2 * self.pad) * self.step
        around = self.pad + self.right if self.layout == "D" else 0
        return (ceil((self.width + around) / 4) + self.spare) * self.step

    @property
    def rows(self) -> int:
        above = 2 * self.pad if self.layout == "P" and self.ring is None else 0
        return self.ring or self.height + above

    @property
    def size(self) -> int:
        return self.rows * self.row_bytes

    @property
    def origin(self) -> int:
        """Where the first pixel of the image lies (in layout D, of its border)."""
        if self.layout != "P":
            return 0
        return self.pad * self.step + (self.pad * self.row_bytes if self.ring is None else 0)

    def read(self, memory: Array, lanes: Lanes) -> Array:
        """The tensor, uint8 (C, H, W), out of the bytes of the work area; it has to be whole."""
        part = memory[self.offset : self.offset + self.size].reshape(self.rows, self.row_bytes)
        if self.layout == "P":
            pixels = part.reshape(self.rows, -1, self.lanes)[self.pad :, self.pad :].transpose(2, 0, 1)
        else:
            values = part if self.unit == 1 else np.frombuffer(part.tobytes(), np.uint16)
            if self.layout == "D" and self.unit > 1:
                pairs = values.reshape(self.rows, -1, self.lanes // LANES, 2, LANES, 2)
                pixels = pairs.transpose(2, 4, 0, 1, 3, 5).reshape(self.lanes, self.rows, -1)
            else:
                order = (0, 1, 2, 4, 3) if self.layout == "A" else (0, 1, 2, 3, 4)
                quads = values.reshape(self.rows, -1, self.lanes // 4, 4, 4).transpose(order)
                pixels = quads.transpose(2, 3, 0, 1, 4).reshape(self.lanes, self.rows, -1)
            pixels = pixels[:, :, self.pad if self.layout == "D" else 0 :]
        return np.asarray(pixels[lanes.places, : self.height, : self.width])
