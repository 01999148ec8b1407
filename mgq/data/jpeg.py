"""Facts of JPEG files from their headers, and decoding at a part of their size.

Source: ITU-T T.81.
"""

from __future__ import annotations

import re
import struct
from typing import NamedTuple

import cv2
import numpy as np

from mgq.data.image_limits import CUT_SHORT, DAMAGED, RefusalError, admit
from mgq.data.pixel_decoders import UPRIGHT, Pixels, decode_by_opencv
from mgq.data.tiff_fields import EXIF_MARK, exif_orientation

# Bytes for each pixel that decoding takes at its peak, as measured; where it takes several scans, of the lines and of
# each component.
_COST, _COST_OF_LINES, _COST_OF_A_COMPONENT = 7, 4, 2
JPEG_MARK = b"\xff\xd8"
# Any marker but fill bytes and those inside a scan (stuffed zeros, restarts), so a search passes over scans.
_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_WITHOUT_LENGTH = frozenset({0x01, 0xD8})
_END, _SCAN, _EXIF = 0xD9, 0xDA, 0xE1
_MOST_COMPONENTS = 4
_MOST_PIXELS_A_BYTE = 8 * 64 * 4  # a block of 8x8 takes a bit or more; colours may have a quarter of the resolution
_MOST_SCANS = 200
_MOST_SCANNED = 1_500_000_000  # pixels, in all scans together


class JpegFacts(NamedTuple):
    """Facts from the headers of the JPEG that would be decoded; width and height before its orientation is applied."""

    width: int
    height: int
    orientation: int

    @property
    def upright(self) -> tuple[int, int]:
        """Width and height as it is looked at."""
        return (self.height, self.width) if self.orientation >= 5 else (self.width, self.height)


def jpeg_facts(data: bytes) -> JpegFacts | None:
    """The facts of a JPEG that :func:`mgq.data.decoding.read_image` would decode; None for everything else."""
    if not data.startswith(JPEG_MARK):
        return None
    try:
        return read_jpeg_facts(data)
    except (RefusalError, struct.error, IndexError):
        return None


def decode_reduced_jpeg(data: bytes, facts: JpegFacts, by: int) -> Pixels | None:
    """The picture upright at 1/2, 1/4 or 1/8 of its size, rounded up; None where the decoder finds otherwise.

    The decoder leaves out the high frequencies, which is the mean over squares in effect.
    """
    flag = {2: cv2.IMREAD_REDUCED_COLOR_2, 4: cv2.IMREAD_REDUCED_COLOR_4, 8: cv2.IMREAD_REDUCED_COLOR_8}[by]
    size = -(-facts.width // by), -(-facts.height // by)
    try:
        pixels = decode_by_opencv(data, size, flag | cv2.IMREAD_IGNORE_ORIENTATION)
    except RefusalError:
        return None
    return UPRIGHT[facts.orientation](np.asarray(pixels, np.uint8))


def read_jpeg_facts(data: bytes) -> JpegFacts:
    """Walk the segments to the end-of-image marker: a file without it has lost its last rows."""
    size: tuple[int, int] | None = None
    orientation = 1
    components = scans = 0
    at = 2
    while True:
        found = _MARKER.search(data, at)
        if found is None:
            raise RefusalError(CUT_SHORT)
        at = found.end()
        marker = data[at - 1]
        if marker == _END:
            break
        if marker in _WITHOUT_LENGTH:
            continue
        (length,) = struct.unpack_from(">H", data, at)
        if at + length > len(data):
            raise RefusalError(CUT_SHORT)
        if marker in _FRAMES and size is None:
            bits, height, width, components = struct.unpack_from(">BHHB", data, at + 2)
            admit(_COST, width, height)
            if bits != 8:
                raise RefusalError(f"has {bits} bits a sample, not 8 as a JPEG should: save it with 8")
            size = width, height
        elif marker == _SCAN:
            scans += 1
        elif marker == _EXIF and data.startswith(EXIF_MARK, at + 2):
            orientation = exif_orientation(data[at + 2 + len(EXIF_MARK) : at + length])
        at += length
    if size is None or not scans or components > _MOST_COMPONENTS:
        raise RefusalError(DAMAGED)
    if size[0] * size[1] > len(data) * _MOST_PIXELS_A_BYTE:
        raise RefusalError(CUT_SHORT)
    if scans > 1:  # all coefficients are kept until the last scan, and each goes through all of them
        admit(_COST_OF_LINES + components * _COST_OF_A_COMPONENT, *size)
        if scans > _MOST_SCANS or scans * size[0] * size[1] > _MOST_SCANNED:
            raise RefusalError(f"takes {scans} passes to decode, which no picture of its size needs: save it again")
    return JpegFacts(*size, orientation)
