"""Decodes by OpenCV or Pillow, and makes 8 bits, BGR, opaque and upright of what they give."""

from __future__ import annotations

import importlib
import io
import struct
import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

import cv2
import numpy as np
import numpy.typing as npt

from mgq.data.image_limits import DAMAGED, RefusalError, admit
from mgq.data.tiff_fields import ORIENTATION
from mgq.machine import is_debugging

if TYPE_CHECKING:
    from PIL.ImageFile import ImageFile

Pixels: TypeAlias = npt.NDArray[np.uint8]
Samples: TypeAlias = npt.NDArray[np.uint8 | np.uint16]


def decode_by_opencv(data: bytes | bytearray, size: tuple[int, int], flags: int) -> Samples:
    """Grey, BGR or BGRA, as ``flags`` say, of exactly the ``size`` (width, height) that was admitted."""
    try:
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error as error:
        raise RefusalError(DAMAGED) from error
    if pixels is None or pixels.shape[1::-1] != size:
        raise RefusalError(DAMAGED)
    return np.asarray(pixels, pixels.dtype)


# What Pillow's plugins raise for damaged files; a fault of ours would raise something else.
_PILLOW_COMPLAINTS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    IndexError,
    KeyError,
    EOFError,
    ArithmeticError,
    MemoryError,
    RuntimeError,
    AssertionError,
    struct.error,
    zlib.error,
)


def _pillow_reader(plugin: str) -> type[ImageFile]:
    """Pillow's class for files of a kind. It is imported when the first such file comes, for most are JPEG."""
    if not is_debugging():
        import logging

        logging.getLogger("PIL").addHandler(logging.NullHandler())
    reader: type[ImageFile] = getattr(importlib.import_module(f"PIL.{plugin}ImagePlugin"), f"{plugin}ImageFile")
    return reader


def decode_by_pillow(data: bytes, plugin: str, cost: int, turned: bool = False) -> Samples:
    """Grey, BGR or BGRA of the first frame; ``turned`` as the orientation that Pillow finds says.

    The plugin is called directly, because ``Image.open`` warns of pictures above a limit lower than ours.
    """
    from PIL.Image import DecompressionBombError

    try:
        with _pillow_reader(plugin)(io.BytesIO(data)) as image:
            admit(cost, *image.size)  # A GIF's frame may be larger than the canvas in its header.
            image.load()
            pixels = _by_channels(image)
            turn = image.getexif().get(ORIENTATION, 1) if turned else 1
            return UPRIGHT[turn](to_eight_bits(pixels)) if turn in UPRIGHT else pixels
    except (*_PILLOW_COMPLAINTS, DecompressionBombError) as error:
        raise RefusalError(DAMAGED) from error


def _by_channels(image: ImageFile) -> Samples:
    if image.mode.startswith("I;16"):
        return np.asarray(image).astype(np.uint16)
    if image.mode in {"I", "F", "LAB"}:
        raise RefusalError(
            f"has samples of a kind that is not read (Pillow calls it {image.mode}): save it as 8-bit RGB"
        )
    if image.has_transparency_data:
        return as_uint8(cv2.cvtColor(np.asarray(image.convert("RGBA")), cv2.COLOR_RGBA2BGRA))
    return as_uint8(cv2.cvtColor(np.asarray(image.convert("RGB")), cv2.COLOR_RGB2BGR))


_ROWS_AT_ONCE = 256


def as_uint8(pixels: npt.NDArray[np.generic]) -> Pixels:
    return pixels.astype(np.uint8, copy=False)


def to_eight_bits(pixels: Samples) -> Pixels:
    return as_uint8(pixels if pixels.dtype == np.uint8 else pixels >> 8)


def lay_on_white(pixels: Pixels) -> Pixels:
    """BGR of grey, BGR or BGRA, laid on white: what a transparent pixel hides must not reach the network."""
    if pixels.ndim == 2:
        return as_uint8(cv2.cvtColor(pixels, cv2.COLOR_GRAY2BGR))
    if pixels.shape[2] == 3:
        return pixels
    laid = np.empty((*pixels.shape[:2], 3), np.uint8)
    for top in range(0, len(pixels), _ROWS_AT_ONCE):  # In bands, to keep the 16-bit intermediates small.
        band = pixels[top : top + _ROWS_AT_ONCE].astype(np.uint16)
        alpha = band[:, :, 3:]
        laid[top : top + _ROWS_AT_ONCE] = (band[:, :, :3] * alpha + (255 - alpha) * 255 + 127) // 255
    return laid


# How to undo each EXIF orientation. OpenCV's functions are several times faster than copying NumPy views.
UPRIGHT: dict[int, Callable[[Pixels], Pixels]] = {
    1: lambda pixels: pixels,
    2: lambda pixels: as_uint8(cv2.flip(pixels, 1)),
    3: lambda pixels: as_uint8(cv2.rotate(pixels, cv2.ROTATE_180)),
    4: lambda pixels: as_uint8(cv2.flip(pixels, 0)),
    5: lambda pixels: as_uint8(cv2.transpose(pixels)),
    6: lambda pixels: as_uint8(cv2.rotate(pixels, cv2.ROTATE_90_CLOCKWISE)),
    7: lambda pixels: as_uint8(cv2.rotate(cv2.transpose(pixels), cv2.ROTATE_180)),
    8: lambda pixels: as_uint8(cv2.rotate(pixels, cv2.ROTATE_90_COUNTERCLOCKWISE)),
}
