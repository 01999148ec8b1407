"""The ``.megengine`` file: MegEngine's own graph, and behind it what is known of it, under one checksum.

MegEngine's loaders, the C++ ones too, read the graph from the start and ignore what follows it. Layout::

    graph | JSON, UTF-8 | length of the JSON, 8 bytes little endian | SHA-256 of all before it | b"mgqfile1"

The checksum is tested before a native loader sees the graph: those trust what they read.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mgq.errors import InputError, printable

MAGIC = b"mgqfile1"
TAIL = 8 + 32 + len(MAGIC)
MAX_BYTES = 1 << 30


class Sealed(NamedTuple):
    """What a ``.megengine`` file holds: MegEngine's graph, and what mgq wrote beside it."""

    graph: bytes
    about: dict[str, Any]


def sealed_bytes(graph: bytes, about: Mapping[str, Any]) -> bytes:
    """The contents of a file with ``graph`` and ``about``, which has to be plain data."""
    text = json.dumps(about).encode()
    body = graph + text + struct.pack("<Q", len(text))
    return body + hashlib.sha256(body).digest() + MAGIC


def read_sealed(path: Path) -> Sealed:
    """Raises InputError where ``path`` is missing, is not such a file, or is damaged."""
    name = printable(path)
    try:
        if path.stat().st_size > MAX_BYTES:
            raise InputError(f"{name} is larger than any network of mgq; pass another file")
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {name} ({error.strerror}); check the path") from None
    if len(data) < TAIL or not data.endswith(MAGIC):
        raise InputError(f"{name} is cut short or was not written by mgq; write it by `mgq dump`")
    body, digest = data[: -len(MAGIC) - 32], data[-len(MAGIC) - 32 : -len(MAGIC)]
    if hashlib.sha256(body).digest() != digest:
        raise InputError(f"{name} is damaged; write it again by `mgq dump`")
    (length,) = struct.unpack("<Q", body[-8:])
    if length > len(body) - 8:
        raise InputError(f"{name} is damaged; write it again by `mgq dump`")
    start = len(body) - 8 - length
    try:
        about = json.loads(body[start:-8])
    except (ValueError, RecursionError):
        about = None
    if not isinstance(about, dict):
        raise InputError(f"{name} is damaged; write it again by `mgq dump`")
    return Sealed(body[:start], about)
