"""Appends to files in whole pieces."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from mgq.io.atomic import explain_write_errors

_TAIL = 1 << 20  # bytes


def append_whole(path: Path, data: bytes, sync: bool = False) -> None:
    """Append ``data`` to ``path``, which is made where it is missing; with ``sync`` it is on the disk then.

    One write, so that a killed process leaves all of it or nothing; and nothing where the disk is full. Raises as
    :func:`mgq.io.atomic.explain_write_errors` does.
    """
    with explain_write_errors(path):
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            size = os.fstat(descriptor).st_size
            try:
                _write_all(descriptor, data)
            except OSError:
                os.ftruncate(descriptor, size)
                raise
            if sync:
                os.fsync(descriptor)
        finally:
            os.close(descriptor)


def drop_torn_line(path: Path) -> None:
    """Cut the text ``path``, where it is there, behind its last line end. A power cut may leave half a line."""
    with explain_write_errors(path), contextlib.suppress(FileNotFoundError), path.open("r+b") as file:
        end = size = file.seek(0, os.SEEK_END)
        while end:  # a file may be long, and what is torn is at its end
            start = max(0, end - _TAIL)
            file.seek(start)
            found = file.read(end - start).rfind(b"\n") + 1
            end = start + found
            if found:
                break
        if end != size:
            file.truncate(end)


def _write_all(descriptor: int, data: bytes) -> None:
    # A nearly full disk takes a part, and says why only when asked to take the rest.
    while data:
        data = data[os.write(descriptor, data) :]
