"""Reads the sizes that AVIF and JPEG 2000 files claim, before a decoder sees the file.

Both keep what they hold in boxes: a length, a name, a content. What a box says of the picture's size need not be what
the compressed picture itself says, and a decoder makes room for that. So both are read.

Sources: ISO/IEC 14496-12 (boxes), AV1 Image File Format 1.1, AV1 Bitstream Specification 5.5, ITU-T T.800 (JPEG 2000).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

Size = tuple[int, int]
"""Width and height in pixels."""


class CutShortError(Exception):
    """The file ends before what it says it holds."""


class DamagedError(Exception):
    """The file says what cannot be."""


class Box(NamedTuple):
    """``data[start:end]`` is what is in it."""

    name: bytes
    start: int
    end: int


def boxes(data: bytes, start: int = 0, end: int | None = None) -> Iterator[Box]:
    """The boxes one after the other. Raises CutShortError where one reaches beyond ``end``."""
    end = len(data) if end is None else end
    while start + 8 <= end:
        length, name = struct.unpack_from(">I4s", data, start)
        head = 8
        if length == 1:
            (length,) = struct.unpack_from(">Q", data, start + 8)
            head = 16
        stop = end if length == 0 else start + length
        if stop > end or stop < start + head:
            raise CutShortError
        yield Box(name, start + head, stop)
        start = stop


# ---- AVIF ----

_BRANDS = (b"avif", b"avis")
_CONTAINERS = {b"iprp", b"ipco", b"moov", b"trak", b"mdia", b"minf", b"stbl"}
_FULL = 4  # bytes of version and flags
_SEQUENCE_HEADER, _MOST_UNITS = 1, 10_000
_MOST_EXTENTS = 10_000


def is_avif(data: bytes) -> bool:
    """Whether ``data``, or what is more than its first 64 bytes, is an AVIF, by the brands it gives itself."""
    return data[4:8] == b"ftyp" and any(
        brand in data[8 : min(64, int.from_bytes(data[:4], "big"))] for brand in _BRANDS
    )


def avif_sizes(data: bytes) -> list[Size]:
    """All sizes in it: of pictures, and of the frames that are compressed in it, of which there is one at least.

    Raises CutShortError and DamagedError, and struct.error or IndexError where the file ends too early.
    """
    claimed: list[Size] = []
    frames: list[Size] = []
    waiting = [(0, len(data))]
    while waiting:
        for box in boxes(data, *waiting.pop()):
            if box.name == b"meta":
                waiting.append((box.start + _FULL, box.end))
                frames += _frames_in(data, _extents(data, box))
            elif box.name in _CONTAINERS:
                waiting.append((box.start, box.end))
            elif box.name == b"ispe":
                claimed.append(struct.unpack_from(">II", data, box.start + _FULL))
            elif box.name in (b"stco", b"co64"):
                count, first = struct.unpack_from(">IQ" if box.name == b"co64" else ">II", data, box.start + _FULL)
                frames += _frames_in(data, [(first, len(data))] if count else [])
    if not claimed or not frames:
        raise DamagedError
    return claimed + frames


def _extents(data: bytes, meta: Box) -> list[tuple[int, int]]:
    """The start and end of each item of a ``meta`` box, from its ``iloc`` box."""
    inside = {box.name: box for box in boxes(data, meta.start + _FULL, meta.end)}
    if b"iloc" not in inside:
        return []
    at = inside[b"iloc"].start
    idat = inside[b"idat"].start if b"idat" in inside else 0
    version, _, sizes, more = data[at], data[at + 1 : at + 4], data[at + 4], data[at + 5]
    reader = _Bytes(data, at + 6)
    offset_size, length_size, base_size, index_size = sizes >> 4, sizes & 15, more >> 4, more & 15
    found: list[tuple[int, int]] = []
    for _ in range(reader.number(2 if version < 2 else 4)):
        reader.number(2 if version < 2 else 4)
        method = reader.number(2) & 15 if version in (1, 2) else 0
        reader.number(2)
        base = reader.number(base_size) + (idat if method == 1 else 0)
        for _ in range(reader.number(2)):
            if version in (1, 2):
                reader.number(index_size)
            start = base + reader.number(offset_size)
            length = reader.number(length_size)
            end = start + length if length else len(data)
            if end > len(data):
                raise CutShortError
            found.append((start, end))
            if len(found) > _MOST_EXTENTS:
                raise DamagedError
    return found


class _Bytes:
    """Numbers one after the other, the most significant byte first."""

    def __init__(self, data: bytes, at: int) -> None:
        self.data, self.at = data, at

    def number(self, size: int) -> int:
        if self.at + size > len(self.data):
            raise CutShortError
        self.at += size
        return int.from_bytes(self.data[self.at - size : self.at], "big")


def _frames_in(data: bytes, extents: list[tuple[int, int]]) -> list[Size]:
    """The sizes that the sequence headers in these parts of the file allow frames to have."""
    found = []
    units = 0
    for start, end in extents:
        at = start
        while at < end and units < _MOST_UNITS:
            units += 1
            head = data[at]
            if head & 0x80 or not head & 0x02:  # not a unit of AV1, or the last one, which may do without a length
                break
            body, length = _leb128(data, at + 1 + (head >> 2 & 1))
            if (head >> 3 & 15) == _SEQUENCE_HEADER:
                found.append(_frame_size(data[body : body + length]))
            at = body + length
    if units >= _MOST_UNITS:
        raise DamagedError
    return found


def _leb128(data: bytes, at: int) -> tuple[int, int]:
    """Read a LEB128 number at ``at``: the position behind it, and the number."""
    value = 0
    for i in range(8):
        value |= (data[at + i] & 0x7F) << 7 * i
        if not data[at + i] & 0x80:
            return at + i + 1, value
    raise DamagedError


class _Bits:
    def __init__(self, data: bytes) -> None:
        self.value, self.left = int.from_bytes(data[:256], "big"), 8 * min(256, len(data))

    def number(self, bits: int) -> int:
        self.left -= bits
        if self.left < 0:
            raise DamagedError
        return self.value >> self.left & (1 << bits) - 1


def _frame_size(header: bytes) -> Size:
    """``max_frame_width_minus_1`` and so on of a sequence header (AV1, 5.5.1), each plus 1."""
    bits = _Bits(header)
    bits.number(4)
    if bits.number(1):  # reduced_still_picture_header
        bits.number(5)
    else:
        delay = 0
        if bits.number(1):
            delay = _timing(bits)
        display_delay = bits.number(1)
        for _ in range(bits.number(5) + 1):
            bits.number(12)
            if bits.number(5) > 7:
                bits.number(1)
            if delay and bits.number(1):
                bits.number(2 * delay + 1)
            if display_delay and bits.number(1):
                bits.number(4)
    wide, high = bits.number(4) + 1, bits.number(4) + 1
    return bits.number(wide) + 1, bits.number(high) + 1


def _timing(bits: _Bits) -> int:
    """Passes over ``timing_info`` and ``decoder_model_info``; the length of a buffer delay, 0 without the latter."""
    bits.number(64)
    if bits.number(1):  # equal_picture_interval, then a number as long as there are zeros before it
        zeros = 0
        while not bits.number(1):
            zeros += 1
        bits.number(zeros)
    if not bits.number(1):
        return 0
    delay = bits.number(5) + 1
    bits.number(42)
    return delay


# ---- JPEG 2000 ----

JP2_MARK = b"\0\0\0\x0cjP  \r\n\x87\n"
J2K_MARK = b"\xff\x4f\xff\x51"
_SIZ, _COD, _COC, _SOT, _SOD, _EOC = 0xFF51, 0xFF52, 0xFF53, 0xFF90, 0xFF93, 0xFFD9
_MOST_TILES, _MOST_BLOCKS = 4_096, 1_000_000
_MOST_COMPONENTS = 4
_LEAST_COD, _LEAST_COC = 10, 7  # bytes


class Jpeg2000(NamedTuple):
    """What a codestream says of itself."""

    width: int
    height: int
    components: int


def jpeg2000_facts(data: bytes) -> Jpeg2000:
    """The facts in the header of a JPEG 2000 codestream, in boxes or not.

    Raises CutShortError and DamagedError, the latter also for more tiles than a picture needs; struct.error where the
    file ends too early.
    """
    start, end = _codestream(data)
    marker, length = struct.unpack_from(">HH", data, start)
    if marker != _SIZ:
        raise DamagedError
    if start + 2 + length > end:
        raise CutShortError
    return _sizes(data, start + 4)


def _codestream(data: bytes) -> tuple[int, int]:
    """The range of the codestream's markers, behind the first."""
    start, end = 0, len(data)
    if data.startswith(JP2_MARK):
        stream = next((box for box in boxes(data) if box.name == b"jp2c"), None)
        if stream is None:
            raise CutShortError
        start, end = stream.start, stream.end
    if not data.startswith(J2K_MARK, start):
        raise DamagedError
    return start + 2, end


def check_jpeg2000(data: bytes, facts: Jpeg2000) -> None:
    """Walk the markers of the codestream to its end, tile by tile.

    Raises as :func:`jpeg2000_facts`, and DamagedError for more blocks than a picture needs: a decoder makes room for
    each.
    """
    at, end = _codestream(data)
    next_tile = 0
    while True:
        (marker,) = struct.unpack_from(">H", data, at)
        if at + 2 > end:
            raise CutShortError
        if marker == _EOC:
            return
        if marker == _SOD:
            if not next_tile:
                raise DamagedError
            at, next_tile = next_tile, 0
            continue
        (length,) = struct.unpack_from(">H", data, at + 2)
        if length < 2 or marker < 0xFF00:
            raise DamagedError
        if at + 2 + length > end:
            raise CutShortError
        if marker in (_COD, _COC):
            _refuse_many_blocks(data[at + 4 : at + 2 + length], marker, facts)
        elif marker == _SOT:
            (part,) = struct.unpack_from(">I", data, at + 6)
            next_tile = at + part if part else end - 2  # without a length it goes to the end
            if next_tile > end - 2:
                raise CutShortError
            if next_tile <= at:
                raise DamagedError
        at += 2 + length


def _sizes(data: bytes, at: int) -> Jpeg2000:
    _, right, bottom, left, top, tile_width, tile_height, tiles_left, tiles_top, components = struct.unpack_from(
        ">H8IH", data, at
    )
    if not (tile_width and tile_height and left < right and top < bottom and 1 <= components <= _MOST_COMPONENTS):
        raise DamagedError
    tiles = -(-(right - tiles_left) // tile_width) * -(-(bottom - tiles_top) // tile_height)
    if tiles > _MOST_TILES or tiles_left > left or tiles_top > top:
        raise DamagedError
    return Jpeg2000(right - left, bottom - top, components)


def _refuse_many_blocks(style: bytes, marker: int, facts: Jpeg2000) -> None:
    """Raises DamagedError where a coding style cuts the picture in more blocks or precincts than any needs."""
    if len(style) < (_LEAST_COD if marker == _COD else _LEAST_COC):
        raise DamagedError
    has_precincts = style[0] & 1
    levels, block_width, block_height, *_ = style[5:] if marker == _COD else style[2:]
    if marker == _COC:
        has_precincts = style[1] & 1
    sizes = style[10:] if marker == _COD else style[7:]
    pixels = facts.width * facts.height * facts.components
    blocks = pixels >> (block_width & 15) + (block_height & 15) + 4
    precincts = 0
    if has_precincts:
        for level, size in enumerate(sizes[: levels + 1]):  # from the smallest resolution on
            precincts += pixels >> 2 * (levels - level) + (size & 15) + (size >> 4)
    if blocks + precincts > _MOST_BLOCKS:
        raise DamagedError
