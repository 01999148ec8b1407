"""Recognizes shared libraries. Their code runs in the process that loads them, so only libraries that the user names
are loaded."""

from __future__ import annotations

import platform
from pathlib import Path

from mgq.errors import InputError, printable
from mgq.io.limited_io import STAND_IN, identify_stand_in

HEAD = 20
MACHINES = {"x86_64": 62, "aarch64": 183}
"""Linux's names of processors -> their numbers in ELF files."""
AGAIN = "write it by `mgq dump --format native`"


def refuse_other_files(path: Path) -> None:
    """Raises InputError where ``path`` is missing, is no shared library, or is one for another kind of processor."""
    name = printable(path)
    try:
        with path.open("rb") as file:
            head = file.read(STAND_IN)
    except OSError as error:
        raise InputError(f"cannot read {name}: {error.strerror}; check the path") from None
    if stand_in := identify_stand_in(head):
        raise InputError(f"{name} {stand_in}")
    if len(head) < HEAD or not head.startswith(b"\x7fELF\x02\x01"):
        raise InputError(f"{name} is no shared library: {AGAIN}")
    machine = MACHINES.get(platform.machine())
    if machine is not None and int.from_bytes(head[18:20], "little") != machine:
        raise InputError(f"{name} is for processors other than {platform.machine()}: {AGAIN} here")
