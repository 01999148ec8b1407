"""Reads whole files up to a limit, whatever their length and kind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mgq.errors import InputError, printable

LONGEST_JSON = 1 << 22
"""Bytes of JSON about a file: what is made of them takes up to ten times the memory."""

STAND_IN = 200
"""Bytes at the start of a file by which what stands in for it is told."""


def bytes_of(path: Path, most: int) -> bytes:
    """What is in ``path``, of which more than ``most`` bytes are never read, however long it is.

    Raises InputError where there is more, OSError where it cannot be read.
    """
    with path.open("rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        size = f"{most >> 20} MiB" if most >= 1 << 20 else f"{most >> 10} KiB"
        raise InputError(f"{printable(path)} is larger than {size}, the most that is read of such a file")
    return data


def identify_stand_in(data: bytes, wanted: str = "file") -> str | None:
    """What often lies where a ``wanted`` was to be downloaded, and what to do: the rest of a sentence; else None."""
    start = data[:STAND_IN].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith(b"version https://git-lfs"):
        return f"is a pointer of Git LFS and not the {wanted}: get that by `git lfs pull`"
    if start.startswith((b"<!doctype html", b"<html")):
        return f"is a web page and not the {wanted}: download the {wanted} itself"
    return None if data else "is empty: get it again"


def text_of(path: Path, most: int) -> str:
    """The content as UTF-8 text. Raises UnicodeDecodeError, a ValueError, too."""
    return bytes_of(path, most).decode("utf-8-sig")  # which editors of Windows write


def object_in(data: bytes | str) -> dict[str, Any]:
    """The JSON object in ``data``. Raises ValueError where it is none, or longer than ``LONGEST_JSON``."""
    if len(data) > LONGEST_JSON:
        raise ValueError(f"more than {LONGEST_JSON} bytes of JSON")
    try:
        found = json.loads(data)
    except RecursionError as error:
        raise ValueError("JSON that is nested too deep") from error
    if not isinstance(found, dict):
        raise ValueError("no JSON object")
    return found
