"""Weights, biases and multipliers in the order in which kernels read them, in one block of constants."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from mgq.export.native.emit.isa import PortableIsa
from mgq.export.native.emit.windows import tap_table
from mgq.export.native.layout import LANES, Lanes, Storage
from mgq.export.native.program import Conv, Linear

Array = npt.NDArray[Any]
ALIGNMENT = 64
ENTRY = 20
"""Bytes of a tile in the table."""
OVERFLOW = 2.0**30
"""Scaled sums below this cannot overflow int32."""


@dataclass(eq=False)
class Constants:
    """Arrays one after the other, each on a multiple of 64 bytes."""

    parts: list[bytes] = field(default_factory=list)
    size: int = 0

    def add(self, values: Array) -> int:
        """The offset of ``values``."""
        content = np.ascontiguousarray(values).tobytes()
        content += bytes(-len(content) % ALIGNMENT)
        self.parts.append(content)
        self.size += len(content)
        return self.size - len(content)

    def content(self) -> bytes:
        return b"".join(self.parts)


@dataclass(frozen=True)
class Tiles:
    """``vectors`` of outputs of each tile, offset of the table of tiles, of biases and of multipliers; ``most`` bytes
    of weights a tile.

    A tile in the table is five int32: offset of its segments, their count, offset of its weights, its first vector, and
    how many times 32 bytes its weights are. A segment is two: bytes from the source's pixel, and how many words of four
    channels follow one another there.
    """

    vectors: tuple[int, ...]
    table: int
    bias: int
    factors: int
    limit: bool
    most: int

    def runs(self) -> list[tuple[int, int, int]]:
        """First tile, count and vectors of those alike that follow one another."""
        result: list[tuple[int, int, int]] = []
        for i, vectors in enumerate(self.vectors):
            if result and result[-1][2] == vectors:
                first, count, _ = result[-1]
                result[-1] = first, count + 1, vectors
            else:
                result.append((i, 1, vectors))
        return result


def fold_zero_point(layer: Conv | Linear, zero: int) -> Array:
    """The bias less what the zero point of the input adds to each sum, int32, which wraps as the sums do."""
    weights = layer.weight.reshape(len(layer.weight), -1).astype(np.int64).sum(1)
    folded: Array = (layer.bias.astype(np.int64) - zero * weights).astype(np.int32)
    return folded


def may_overflow(layer: Conv | Linear, bias: Array) -> bool:
    weights = np.abs(layer.weight.reshape(len(layer.weight), -1).astype(np.int64)).sum(1)
    most = (255.0 * weights + np.abs(bias.astype(np.float64))) * layer.multiplier
    return bool(len(most) and most.max() >= OVERFLOW)


def spread_weights(layer: Conv | Linear, source: Array, target: Lanes, lanes: int) -> tuple[Array, Array]:
    """Weights int8 (lanes out, lanes in, KH, KW), and which of the inputs an output has at all, bool (out, in)."""
    weight = layer.weight.reshape(*layer.weight.shape[:2], *(layer.weight.shape[2:] or (1, 1)))
    groups = layer.groups if isinstance(layer, Conv) else 1
    outputs, inputs = weight.shape[0] // groups, weight.shape[1]
    whole = np.zeros((target.count, lanes, *weight.shape[2:]), np.int8)
    used = np.zeros((target.count, lanes), bool)
    for group in range(groups):
        makes = slice(group * outputs, (group + 1) * outputs)
        place = np.ix_(target.places[makes], source[group * inputs : (group + 1) * inputs])
        whole[place] = weight[makes]
        used[place] = True
    return whole, used


def pack_tiles(
    constants: Constants,
    isa: PortableIsa,
    layer: Conv | Linear,
    source: Storage,
    places: tuple[Array, Lanes],
    zero: int,
) -> Tiles:
    """``places``: the lane of each input, and the lanes of the outputs."""
    inputs, target = places
    weights, used = spread_weights(layer, inputs, target, source.lanes)
    bias = fold_zero_point(layer, zero)
    if isinstance(layer, Linear):
        tiles = widest_tiles(target.vectors, isa.widest)
    else:
        tiles = [n for block in target.blocks for n in isa.splits(block)]
    rows, vector = [], 0
    for count in tiles:
        lanes = slice(vector * LANES, (vector + count) * LANES)
        offsets, words = words_of(used[lanes], weights.shape[2:], source)
        packed = pack_words(weights[lanes], words)
        packed = packed.reshape(-1, 4 * LANES)[:, list(isa.weight_order(source.layout))]
        segments = segments_of(offsets, 16 * source.unit if source.layout == "A" else 4)
        place = constants.add(np.array(segments, np.int32))
        rows.append((place, len(segments), constants.add(packed), vector, packed.nbytes // 32))
        vector += count
    table = constants.add(np.array(rows, np.int32))
    factors = constants.add(target.spread(layer.multiplier, np.float32))
    most = 32 * max(row[-1] for row in rows)
    starts = constants.add(target.spread(bias, np.int32))
    return Tiles(tuple(tiles), table, starts, factors, may_overflow(layer, bias), most)


def widest_tiles(vectors: int, widest: int) -> list[int]:
    """Tiles of ``widest`` vectors, and the rest one by one."""
    return [widest] * (vectors // widest) + [1] * (vectors % widest)


def words_of(used: Array, kernel: Sequence[int], source: Storage) -> tuple[list[int], list[tuple[int, int, int]]]:
    """Where each word of four channels lies from the pixel on, and its row, column and number."""
    read = np.flatnonzero(used.any(0).reshape(-1, 4).any(1))
    if source.layout == "A":
        return [16 * source.unit * int(word) for word in read], [(0, 0, int(word)) for word in read]
    words = [(row, column, int(word)) for row in range(kernel[0]) for column in range(kernel[1]) for word in read]
    return [row * source.row_bytes + column * source.step + 4 * word for row, column, word in words], words


def pack_words(weights: Array, words: list[tuple[int, int, int]]) -> Array:
    """(words, outputs, 4)"""
    rows, columns, numbers = (np.array(part) for part in zip(*words, strict=True))
    split = weights.reshape(len(weights), -1, 4, *weights.shape[2:])
    packed: Array = split[:, numbers, :, rows, columns]
    return packed


def segments_of(offsets: list[int], step: int) -> list[tuple[int, int]]:
    """Offsets that follow one another by ``step``, as first and count."""
    result: list[tuple[int, int]] = []
    for offset in offsets:
        if result and result[-1][0] + result[-1][1] * step == offset:
            result[-1] = result[-1][0], result[-1][1] + 1
        else:
            result.append((offset, 1))
    return result


def pack_depthwise(
    constants: Constants, isa: PortableIsa, layer: Conv, target: Lanes, zero: int
) -> tuple[int, int, int, bool]:
    """Offsets of weights, biases and multipliers, and whether scaled sums may overflow."""
    size = layer.weight.shape[2]
    whole = np.zeros((target.count, size, size), np.int8)
    whole[target.places] = layer.weight[:, 0]
    taps = tap_table(isa, size, layer.stride[0])
    packed = np.zeros((target.vectors, size, *taps.shape[:1], LANES, *taps.shape[1:]), np.int8)
    for (i, place), tap in np.ndenumerate(taps):
        if 0 <= tap < size:
            packed[:, :, i, :, place] = whole[:, :, tap].reshape(-1, LANES, size).transpose(0, 2, 1)
    bias = fold_zero_point(layer, zero)
    return (
        constants.add(packed),
        constants.add(target.spread(bias, np.int32)),
        constants.add(target.spread(layer.multiplier, np.float32)),
        may_overflow(layer, bias),
    )
