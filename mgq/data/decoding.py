"""Decodes image files to the pixels that other programs show, or says in one line why not.

Size, orientation and completeness are read from the file's own structure first. A picture that is
absurdly large or cut short is refused before a decoder sees it: decoders allocate whatever size a header
claims, and answer some cut files with half a grey picture.

OpenCV decodes JPEG (for speed) and PNG (it keeps 16 bits and refuses missing rows), ``mgq.data.netpbm`` the formats of
Netpbm. Pillow decodes the others, of whose faults OpenCV complains on standard error.

Sources: the W3C PNG specification, RFC 9649 (WebP), TIFF 6.0, GIF 89a.
"""

from __future__ import annotations

import os
import stat
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from mgq.data.image_headers import (
    J2K_MARK,
    JP2_MARK,
    CutShortError,
    DamagedError,
    avif_sizes,
    check_jpeg2000,
    is_avif,
    jpeg2000_facts,
)
from mgq.data.image_limits import CUT_SHORT, DAMAGED, MAX_BYTES, TOO_HEAVY, RefusalError, admit
from mgq.data.jpeg import JPEG_MARK, read_jpeg_facts
from mgq.data.netpbm import begins_as_netpbm, netpbm_header, netpbm_samples
from mgq.data.pixel_decoders import (
    UPRIGHT,
    Pixels,
    Samples,
    decode_by_opencv,
    decode_by_pillow,
    lay_on_white,
    to_eight_bits,
)
from mgq.data.tiff_fields import EXIF_MARK, FIELD_BYTES, exif_orientation, tiff_fields
from mgq.errors import InputError, no_such_path, printable
from mgq.io.limited_io import identify_stand_in


def read_image(source: Path | bytes, name: str | None = None) -> Pixels:
    """The pixels of a picture file, or of the bytes of one: uint8 of shape (H, W, 3), channels in BGR order.

    Reads JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF, JPEG 2000, PBM to PAM, TGA, PCX, SGI, Sun raster and QOI, known by
    their content and not by their suffix; of several frames or pages the first. The picture is turned as its EXIF
    orientation says and laid on white where it is transparent; of 16 bits a sample the upper 8 are kept. ``name`` is
    what messages call it (by default the path).

    Raises InputError for a file that is missing, empty, cut short, damaged, not a picture, or over ``MAX_SIDE``,
    ``MAX_PIXELS``, ``MAX_MEMORY`` or ``MAX_BYTES``. Damage inside the scan of a JPEG that is otherwise whole cannot be
    told from content: libjpeg carries on as well as it can.
    """
    if name is None:
        name = "the picture" if isinstance(source, bytes) else str(source)
    try:
        return _pixels(source if isinstance(source, bytes) else _bytes_of(source))
    except FileNotFoundError as error:
        raise no_such_path(name) from error
    except RefusalError as refusal:
        raise InputError(f"{printable(name)} {refusal}") from refusal.__cause__


def bundled_cat() -> Path:
    """The photograph of a cat that is installed with the program (CC0; see assets/README.md)."""
    return Path(__file__).with_name("cat.jpg")


READ = "JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF, JPEG 2000, PPM, TGA"
"""The kinds that people have, as messages list them."""
HEAD_BYTES = 4096
"""The bytes at the start of a file by which images are recognized."""


def begins_as_image(head: bytes) -> bool:
    """Whether a file that begins with ``head``, of ``HEAD_BYTES`` or the whole of it, is of a kind that is read.

    A TGA is not recognized: it has no signature.
    """
    return any(is_mine(head) for is_mine, _ in _FORMATS if is_mine is not _is_tga)


def _bytes_of(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                return file.read(MAX_BYTES + 1)  # A pipe or a device, which may have no end.
            if status.st_size > MAX_BYTES:
                raise RefusalError(TOO_HEAVY)
            return file.read()
    except FileNotFoundError:
        raise
    except IsADirectoryError as error:
        raise RefusalError("is a folder, not a picture: name a picture in it") from error
    except OSError as error:
        raise RefusalError(f"cannot be read ({error.strerror}): check the path and its permissions") from error


def _pixels(data: bytes) -> Pixels:
    if not data:
        raise RefusalError("is empty (0 bytes): copy or download it again")
    if len(data) > MAX_BYTES:
        raise RefusalError(TOO_HEAVY)
    plan_of = next((plan_of for is_mine, plan_of in _FORMATS if is_mine(data)), None)
    if plan_of is None:
        raise RefusalError(_describe_content(data))
    try:
        plan = plan_of(data)
    except (CutShortError, struct.error, IndexError) as error:
        raise RefusalError(CUT_SHORT) from error
    except DamagedError as error:
        raise RefusalError(DAMAGED) from error
    return UPRIGHT[plan.orientation](lay_on_white(to_eight_bits(plan.decode())))


_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1")


def _describe_content(data: bytes) -> str:
    """Why a file of no known kind is not read; what people often have in a picture's place is named."""
    start = data[:200].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if data[4:8] == b"ftyp" and data[8:12] in _HEIF_BRANDS:
        return "is a HEIF picture, which is not read: save it as JPEG"
    if stand_in := identify_stand_in(data, "picture"):
        return stand_in
    if start.startswith((b"<svg", b"%pdf")) or (start.startswith(b"<?xml") and b"<svg" in data[:4096]):
        return "is a drawing (SVG, PDF), which is not read: save it as PNG"
    return f"is not a picture that can be read ({READ}): save it as one of these"


class _Plan(NamedTuple):
    """What to do with a file whose structure is sound.

    ``decode`` gives grey (H, W), BGR (H, W, 3) or BGRA (H, W, 4), not yet turned.
    """

    decode: Callable[[], Samples]
    orientation: int = 1


# Bytes for each pixel that decoding takes at its peak, the decoder's own included, as measured.
_COST_PNG, _COST_PNG_ALPHA, _COST_PNG_HOLE, _COST_PNG_16 = 7, 9, 11, 21
_COST_WEBP, _COST_GIF, _COST_BMP, _COST_TIFF = 24, 13, 14, 16
_COST_AVIF, _COST_JPEG_2000, _COST_OTHERS = 28, 32, 22


def _jpeg(data: bytes) -> _Plan:
    facts = read_jpeg_facts(data)
    flags = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
    return _Plan(lambda: decode_by_opencv(data, (facts.width, facts.height), flags), facts.orientation)


# ---- PNG ----

_PNG_MARK = b"\x89PNG\r\n\x1a\n"
_PNG_KEPT = frozenset({b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"})
_PNG_GREY, _PNG_PALETTE = 0, 3
_PNG_ALPHA = {4, 6}


def _png(data: bytes) -> _Plan:
    """Walk the chunks and keep those that make the pixels, each proved by its checksum.

    The others (colour profiles, text, further frames) are left out: libpng complains of many on standard
    error, and text may unpack to a thousand times its size.
    """
    view = memoryview(data)
    kept = bytearray(_PNG_MARK)
    seen: set[bytes] = set()
    width = height = depth = colour = 0
    transparent_grey: int | None = None
    orientation = 1
    at = len(_PNG_MARK)
    while b"IEND" not in seen:
        length, kind = struct.unpack_from(">I4s", data, at)
        body, end = at + 8, at + 12 + length
        if not seen and kind != b"IHDR":
            raise RefusalError(DAMAGED)
        if kind == b"IHDR":
            width, height, depth, colour = struct.unpack_from(">IIBB", data, body)
            admit(_COST_PNG_16 if depth == 16 else _COST_PNG, width, height)
        if end > len(data):
            raise RefusalError(CUT_SHORT)
        if kind in _PNG_KEPT:
            if zlib.crc32(view[at + 4 : end - 4]) != int.from_bytes(view[end - 4 : end], "big"):
                raise RefusalError(DAMAGED)
            kept += view[at:end]
            seen.add(kind)
        elif kind == b"eXIf":
            orientation = exif_orientation(data[body : end - 4])
        if kind == b"tRNS" and colour == _PNG_GREY:
            transparent_grey = int.from_bytes(view[body : body + 2], "big")
        at = end
    if depth < 16:
        admit(_COST_PNG_ALPHA if colour in _PNG_ALPHA else _COST_PNG_HOLE if b"tRNS" in seen else 1, width, height)
    if b"IDAT" not in seen or (colour == _PNG_PALETTE and b"PLTE" not in seen):
        raise RefusalError(DAMAGED)

    def decode() -> Samples:
        pixels = decode_by_opencv(kept, (width, height), cv2.IMREAD_UNCHANGED)
        return pixels if transparent_grey is None else _make_transparent(pixels, transparent_grey, depth)

    return _Plan(decode, orientation)


def _make_transparent(grey: Samples, hole: int, depth: int) -> Samples:
    """``grey`` as BGRA, transparent where it is ``hole`` (of ``depth`` bits), which OpenCV ignores."""
    most = np.iinfo(grey.dtype).max
    alpha = np.where(grey == hole * most // (2**depth - 1), grey.dtype.type(0), grey.dtype.type(most))
    return np.dstack([grey, grey, grey, alpha])


# ---- the formats that Pillow decodes ----


def _webp(data: bytes) -> _Plan:
    kind = data[12:16]
    if kind == b"VP8X":
        size = 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
    elif kind == b"VP8L":
        packed = int.from_bytes(data[21:25], "little")
        size = 1 + (packed & 0x3FFF), 1 + (packed >> 14 & 0x3FFF)
    elif kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, 26)
        size = width & 0x3FFF, height & 0x3FFF
    else:
        raise RefusalError(DAMAGED)
    admit(_COST_WEBP, *size)
    if 8 + int.from_bytes(data[4:8], "little") > len(data):
        raise RefusalError(CUT_SHORT)
    return _Plan(lambda: decode_by_pillow(data, "WebP", _COST_WEBP), _webp_orientation(data))


def _webp_orientation(data: bytes) -> int:
    at = 12
    while at + 8 <= len(data):
        kind, length = struct.unpack_from("<4sI", data, at)
        if kind == b"EXIF":
            return exif_orientation(data[at + 8 : at + 8 + length].removeprefix(EXIF_MARK))
        at += 8 + length + length % 2
    return 1


def _gif(data: bytes) -> _Plan:
    admit(_COST_GIF, *struct.unpack_from("<HH", data, 6))  # where it has none, Pillow takes its frame's
    return _Plan(lambda: decode_by_pillow(data, "Gif", _COST_GIF))


def _pillow_planner(plugin: str, cost: int) -> Callable[[bytes], _Plan]:
    """How to read a format whose size Pillow finds in the header, before it makes room for the picture."""
    return lambda data: _Plan(lambda: decode_by_pillow(data, plugin, cost))


_BMP_HEADERS = frozenset({12, 40, 52, 56, 64, 108, 124})


def _is_bmp(data: bytes) -> bool:
    """Whether the size of the second header is one that exists, since any text may begin with BM."""
    return data.startswith(b"BM") and int.from_bytes(data[14:18], "little") in _BMP_HEADERS


_TIFF_WIDTH, _TIFF_HEIGHT = 256, 257
_TIFF_STRIPS, _TIFF_TILES = (273, 279), (324, 325)
_TIFF_TILE_SIZE = (322, 323)
_MOST_NUMBERS = 1_000_000  # in a field, each of which becomes an object; strips and tiles have most of them


def _tiff(data: bytes) -> _Plan:
    """Check that all fields, strips and tiles lie in the file. Pillow heeds the orientation by itself."""
    fields = list(tiff_fields(data))
    tags = {field.tag: field for field in fields}
    # Of two fields of one tag, some readers take the first and some the last.
    if len(tags) < len(fields) or _TIFF_WIDTH not in tags or _TIFF_HEIGHT not in tags:
        raise RefusalError(DAMAGED)
    if any(field.kind in FIELD_BYTES and field.amount > _MOST_NUMBERS for field in fields):
        raise RefusalError(DAMAGED)
    admit(_COST_TIFF, tags[_TIFF_WIDTH].read_first(data), tags[_TIFF_HEIGHT].read_first(data))
    if any(field.start + field.length > len(data) for field in tags.values()):
        raise RefusalError(CUT_SHORT)
    for offsets, lengths in (_TIFF_STRIPS, _TIFF_TILES):
        if offsets in tags and lengths in tags:
            starts, sizes = tags[offsets].numbers(data), tags[lengths].numbers(data)
            parts = min(starts.size, sizes.size)
            if max(starts[:parts] + sizes[:parts], default=0) > len(data):
                raise RefusalError(CUT_SHORT)
    if all(tag in tags for tag in _TIFF_TILE_SIZE):
        admit(_COST_TIFF, *(tags[tag].read_first(data) for tag in _TIFF_TILE_SIZE))
    return _Plan(lambda: decode_by_pillow(data, "Tiff", _COST_TIFF))


def _avif(data: bytes) -> _Plan:
    for size in avif_sizes(data):
        admit(_COST_AVIF, *size)
    return _Plan(lambda: decode_by_pillow(data, "Avif", _COST_AVIF, turned=True))


def _jpeg_2000(data: bytes) -> _Plan:
    facts = jpeg2000_facts(data)
    admit(_COST_JPEG_2000, facts.width, facts.height)
    check_jpeg2000(data, facts)
    return _Plan(lambda: decode_by_pillow(data, "Jpeg2K", _COST_JPEG_2000))


def _netpbm(data: bytes) -> _Plan:
    header = netpbm_header(data)
    if header is None:
        raise RefusalError(DAMAGED)
    admit(header.cost, header.width, header.height)
    if header.start + header.length > len(data):
        raise RefusalError(CUT_SHORT)

    def decode() -> Samples:
        try:
            samples = netpbm_samples(header, data)
        except ValueError as error:
            raise RefusalError(DAMAGED) from error
        return _bgr_of(samples)

    return _Plan(decode)


def _bgr_of(samples: Samples) -> Samples:
    """Grey (H, W), BGR or BGRA of samples (H, W, 1 to 4): grey, grey and alpha, RGB, RGBA."""
    channels = samples.shape[2]
    order = {1: [0], 2: [0, 0, 0, 1], 3: [2, 1, 0], 4: [2, 1, 0, 3]}[channels]
    return samples[:, :, 0] if channels == 1 else np.ascontiguousarray(samples[:, :, order])


# How a TGA may hold its pixels: kind -> bits of each, and of the entries of its palette.
_TGA_DEPTHS = {1: (8,), 2: (16, 24, 32), 3: (1, 8, 16), 9: (8,), 10: (16, 24, 32), 11: (8, 16)}
_TGA_HEADER = struct.Struct("<BBBHHBHHHHBB")


def _is_tga(data: bytes) -> bool:
    """Whether the header, which has no mark, says nothing impossible."""
    if len(data) <= _TGA_HEADER.size:
        return False
    _, has_palette, kind, first, entries, entry_bits, _, _, width, height, depth, flags = _TGA_HEADER.unpack_from(data)
    if depth not in _TGA_DEPTHS.get(kind, ()) or not (width and height) or flags & 0xC0:
        return False
    palette = (first + entries <= 256 and entry_bits in (16, 24, 32)) if has_palette == 1 else not entry_bits
    return palette and has_palette == (kind & 7 == 1)


def _tga(data: bytes) -> _Plan:
    opaque = data[17] & 0x0F == 0  # what stands in the place of alpha means nothing

    def decode() -> Samples:
        pixels = decode_by_pillow(data, "Tga", _COST_OTHERS)
        return np.ascontiguousarray(pixels[:, :, :3]) if opaque and pixels.ndim == 3 else pixels

    return _Plan(decode)


_PCX_PALETTE, _PCX_PALETTE_MARK = 769, 12


def _is_pcx(data: bytes) -> bool:
    """Whether version, packing and depth are those that exist, and the margins lie in the right order."""
    if len(data) < 128 or data[0] != 10 or data[1] not in (0, 2, 3, 5) or data[2] != 1 or data[3] not in (1, 2, 4, 8):
        return False
    left, top, right, bottom = struct.unpack_from("<4H", data, 4)
    return bool(left <= right and top <= bottom)


def _pcx(data: bytes) -> _Plan:
    has_palette = data[1] == 5 and data[3] == 8 and data[65] == 1
    if has_palette and data[-_PCX_PALETTE] != _PCX_PALETTE_MARK:
        raise RefusalError(CUT_SHORT)
    return _Plan(lambda: decode_by_pillow(data, "Pcx", _COST_OTHERS))


_FORMATS: tuple[tuple[Callable[[bytes], bool], Callable[[bytes], _Plan]], ...] = (
    (lambda data: data.startswith(JPEG_MARK), _jpeg),
    (lambda data: data.startswith(_PNG_MARK), _png),
    (lambda data: data.startswith(b"RIFF") and data[8:12] == b"WEBP", _webp),
    (lambda data: data.startswith((b"GIF87a", b"GIF89a")), _gif),
    (_is_bmp, _pillow_planner("Bmp", _COST_BMP)),
    (lambda data: data.startswith((b"II*\0", b"MM\0*")), _tiff),
    (is_avif, _avif),
    (lambda data: data.startswith((JP2_MARK, J2K_MARK)), _jpeg_2000),
    (begins_as_netpbm, _netpbm),
    (lambda data: data.startswith(b"qoif"), _pillow_planner("Qoi", _COST_OTHERS)),
    (lambda data: data.startswith(b"\x59\xa6\x6a\x95"), _pillow_planner("Sun", _COST_OTHERS)),
    (lambda data: data.startswith((b"\x01\xda\0", b"\x01\xda\1")), _pillow_planner("Sgi", _COST_OTHERS)),
    (_is_pcx, _pcx),
    (_is_tga, _tga),
)
