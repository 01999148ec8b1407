"""Keeps results in the user's cache, in entries that only this user can have written.

Results are trusted, so an entry that somebody else could have written, or that is damaged, is ignored and made
again. What cannot be written is not kept.
"""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path

from mgq.errors import MgqError
from mgq.io.atomic import atomic_write

CACHE_VARIABLE = "MGQ_CACHE"
MOST_BYTES = 1 << 30
_OTHERS_MAY_WRITE = stat.S_IWGRP | stat.S_IWOTH


def cache_folder() -> Path:
    """The folder of what is kept: ``$MGQ_CACHE`` where it is set, else mgq's own in the user's cache."""
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        return Path(chosen).expanduser().absolute()
    import platformdirs

    return platformdirs.user_cache_path("mgq")


def is_own(known: os.stat_result) -> bool:
    """Whether nobody but this user, and root, can have written it; on systems without such users, always."""
    return not hasattr(os, "geteuid") or (known.st_uid == os.geteuid() and not known.st_mode & _OTHERS_MAY_WRITE)


def read_private(path: Path) -> bytes | None:
    """The entry at ``path``; None where there is none, or none that can be trusted. Raises nothing."""
    try:
        if not is_own(path.parent.stat()):
            return None
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0))
        with os.fdopen(descriptor, "rb") as file:
            known = os.fstat(file.fileno())
            if not is_own(known) or not stat.S_ISREG(known.st_mode) or known.st_size > MOST_BYTES:
                return None
            content = file.read()
    except OSError:
        return None
    digest, _, whole = content.partition(b"\n")
    return whole if hashlib.sha256(whole).hexdigest().encode() == digest else None


def write_private(path: Path, content: bytes) -> bool:
    """Keep ``content`` at ``path``, whole or not at all; whether that could be done. Raises nothing."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not is_own(path.parent.stat()):
            return False
        with atomic_write(path) as temporary:
            temporary.write_bytes(b"\n".join((hashlib.sha256(content).hexdigest().encode(), content)))
    except (OSError, MgqError):
        return False
    return True
