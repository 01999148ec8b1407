"""Reading a whole file that may be of any length and kind."""

from __future__ import annotations

from pathlib import Path

from mgq.errors import InputError, printable


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


def text_of(path: Path, most: int) -> str:
    """The same as UTF-8 text. Raises UnicodeDecodeError, a ValueError, too."""
    return bytes_of(path, most).decode()
