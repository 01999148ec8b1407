"""The ``.megengine`` file: MegEngine's own graph, and behind it what is known of it, under one checksum.

MegEngine's loaders, the C++ ones too, read the graph from the start and ignore what follows it. Layout::

    graph | JSON, UTF-8 | length of the JSON, 8 bytes little endian | SHA-256 of all before it | b"mgqfile1"

Native loaders trust what they read. The checksum finds damage, but anybody can compute one. What a stranger may have
put into the graph is found by :mod:`mgq.export.megengine.graph_guard` before such a loader sees it.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mgq.errors import InputError, printable
from mgq.export.megengine.graph_guard import Face, ForeignGraphError, face_of
from mgq.io.limited_io import bytes_of, identify_stand_in, object_in

MAGIC = b"mgqfile1"
TAIL = 8 + 32 + len(MAGIC)
MAX_BYTES = 1 << 28


class MegEngineFile(NamedTuple):
    """What a ``.megengine`` file holds: MegEngine's graph, what mgq wrote beside it, what the graph takes and gives."""

    graph: bytes
    about: dict[str, Any]
    face: Face


def encode_file(graph: bytes, about: Mapping[str, Any]) -> bytes:
    """The contents of a file with ``graph`` and ``about``, which has to be plain data."""
    text = json.dumps(about).encode()
    body = graph + text + struct.pack("<Q", len(text))
    return body + hashlib.sha256(body).digest() + MAGIC


def read_megengine_file(path: Path) -> MegEngineFile:
    """Raises InputError where ``path`` is missing, no such file, damaged, or holds a graph that is not mgq's."""
    name = printable(path)
    try:
        data = bytes_of(path, MAX_BYTES)
    except OSError as error:
        raise InputError(f"cannot read {name} ({error.strerror}); check the path") from None
    if stand_in := identify_stand_in(data):
        raise InputError(f"{name} {stand_in}")
    if len(data) < TAIL or not data.endswith(MAGIC):
        raise InputError(f"{name} is cut short or was not written by mgq; write it by `mgq dump`")
    body, digest = memoryview(data)[: -len(MAGIC) - 32], data[-len(MAGIC) - 32 : -len(MAGIC)]
    if hashlib.sha256(body).digest() != digest:
        raise InputError(f"{name} is damaged; write it again by `mgq dump`")
    (length,) = struct.unpack("<Q", body[-8:])
    if length > len(body) - 8:
        raise InputError(f"{name} is damaged; write it again by `mgq dump`")
    start = len(body) - 8 - length
    try:
        about = object_in(bytes(body[start:-8]))
    except ValueError:
        raise InputError(f"{name} is damaged; write it again by `mgq dump`") from None
    try:
        return MegEngineFile(bytes(body[:start]), about, face_of(body[:start]))
    except ForeignGraphError as error:
        raise InputError(f"{name} {error}; write it by `mgq dump`") from None
