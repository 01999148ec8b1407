"""Reads the Netpbm formats, PBM, PGM, PPM and PAM: a header in words, and samples as bytes or as words.

Read here and not by Pillow, which takes a step of Python for each sample of some of them, nor by OpenCV, which leaves
samples of odd depths as they are. Source: the manual pages of Netpbm, ``pbm(5)`` to ``pam(5)``.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

Samples: TypeAlias = npt.NDArray[np.uint8 | np.uint16]

_GAP = rb"(?:\s|#[^\r\n]*[\r\n])+"
_NUMBER = rb"([0-9]{1,9})"
_BITMAP = re.compile(rb"P[14]" + _GAP + _NUMBER + _GAP + _NUMBER + rb"(?:\s|#[^\r\n]*[\r\n])")
_IMAGE = re.compile(rb"P[2356]" + _GAP + _NUMBER + _GAP + _NUMBER + _GAP + _NUMBER + rb"(?:\s|#[^\r\n]*[\r\n])")
_PAM = re.compile(rb"P7\n(?:(?:#[^\n]{0,999}|[A-Z]{1,16}[ \t]+[^\n]{1,999}|)\n){1,99}?ENDHDR\n")
_PAM_LINE = re.compile(rb"^(WIDTH|HEIGHT|DEPTH|MAXVAL)[ \t]+([0-9]{1,9})[ \t]*$", re.MULTILINE)
_COMMENT = re.compile(rb"#[^\r\n]*")
_LONGEST_HEADER = 10_000
_MOST = 65_535
_INTS_OF_TEXT = 12  # bytes of memory for each sample in words, as they are read


class Netpbm(NamedTuple):
    """What a header says. ``start`` is where the samples begin; ``plain``: they are words, not bytes."""

    width: int
    height: int
    channels: int
    most: int
    start: int
    plain: bool
    bits: bool

    @property
    def length(self) -> int:
        """The least number of bytes that the samples take, in the file."""
        samples = self.width * self.height * self.channels
        if self.plain:
            return samples if self.bits else 2 * samples - 1
        if self.bits:
            return -(-self.width // 8) * self.height
        return samples * (1 if self.most < 256 else 2)

    @property
    def cost(self) -> int:
        """Bytes for each pixel that reading takes at its peak."""
        return self.channels * (_INTS_OF_TEXT if self.plain else 6) + 4


def begins_as_netpbm(data: bytes) -> bool:
    """Whether ``data``, which may be the first bytes alone, begins with a header of this family."""
    head = data[:_LONGEST_HEADER]
    return any(pattern.match(head) for pattern in (_BITMAP, _IMAGE)) or head.startswith((b"P7\nWIDTH ", b"P7\n#"))


def netpbm_header(data: bytes) -> Netpbm | None:
    """The header at the beginning of ``data``; None where it is none, or says what cannot be."""
    head = data[:_LONGEST_HEADER]
    if found := _BITMAP.match(head):
        return Netpbm(int(found[1]), int(found[2]), 1, 1, found.end(), head[1:2] == b"1", True)
    if found := _IMAGE.match(head):
        most, kind = int(found[3]), head[1:2]
        channels = 3 if kind in b"36" else 1
        header = Netpbm(int(found[1]), int(found[2]), channels, most, found.end(), kind in b"23", False)
        return header if 1 <= most <= _MOST else None
    if found := _PAM.match(head):
        said = {key: int(value) for key, value in _PAM_LINE.findall(found[0])}
        if set(said) == {b"WIDTH", b"HEIGHT", b"DEPTH", b"MAXVAL"}:
            size = said[b"WIDTH"], said[b"HEIGHT"]
            header = Netpbm(*size, said[b"DEPTH"], said[b"MAXVAL"], found.end(), False, False)
            return header if 1 <= header.channels <= 4 and 1 <= header.most <= _MOST else None
    return None


def netpbm_samples(header: Netpbm, data: bytes) -> Samples:
    """uint8 or uint16 (H, W, channels), of the whole range of their kind. Raises ValueError where ``data`` has less."""
    count = header.width * header.height * header.channels
    values: npt.NDArray[Any]
    if header.bits:
        values = _bits(header, data)
    elif header.plain:
        text = _COMMENT.sub(b" ", data[header.start :])
        if text.translate(None, b"0123456789 \t\r\n\v\f"):
            raise ValueError("a sample is no number")
        values = np.fromstring(text.decode("ascii"), np.int32, count, sep=" ")
        if values.size < count:
            raise ValueError("samples are missing")
    else:
        values = np.frombuffer(data, np.uint8 if header.most < 256 else np.dtype(">u2"), count, header.start)
    shape = header.height, header.width, header.channels
    return _to_full_range(values, header.most).reshape(shape)


def _bits(header: Netpbm, data: bytes) -> npt.NDArray[np.uint8]:
    """1 where it is white."""
    if header.plain:
        text = _COMMENT.sub(b"", data[header.start :]).translate(None, b" \t\r\n\v\f")
        black = np.asarray(np.frombuffer(text, np.uint8, header.width * header.height) - ord("0"), np.uint8)
        if black.max(initial=0) > 1:
            raise ValueError("a bit is neither 0 nor 1")
    else:
        packed = np.frombuffer(data, np.uint8, header.length, header.start).reshape(header.height, -1)
        black = np.unpackbits(packed, axis=1, count=header.width)
    return np.asarray(1 - black, np.uint8)


def _to_full_range(values: npt.NDArray[Any], most: int) -> Samples:
    """``values`` of 0 to ``most`` as uint8, or as uint16 where they are finer."""
    if most == 255:
        return values.astype(np.uint8)
    if most == _MOST:
        return values.astype(np.uint16)
    return np.asarray((np.minimum(values, most).astype(np.uint32) * 255 + most // 2) // most, np.uint8)
