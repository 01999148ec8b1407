"""Compiled networks on disk, by what they were made from: the content of the file, the processor, and mgq's own code.

A cache holds code, so an entry counts only where it is this user's alone, and whole. Any other is made again, and what
cannot be written is not cached.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from mgq.errors import MgqError
from mgq.export.native.compiler import Compiled
from mgq.io.atomic import atomic_write

MAGIC = b"mgq native 1\n"
"""Then a hash of all that follows: sizes, what is known of the file, machine code and constants."""
MOST_BYTES = 1 << 30
KEPT = 32
"""So many entries are kept, those that were used last."""
VARIABLE = "MGQ_NATIVE_CACHE"
"""The folder of the cache, where it is not the user's own cache folder."""


@dataclass(frozen=True)
class Entry:
    """A compiled network and what is known of it: of the file that it was made from, say."""

    compiled: Compiled
    about: Mapping[str, Any]


def cache_folder() -> Path:
    import platformdirs

    return Path(os.environ.get(VARIABLE) or platformdirs.user_cache_path("mgq") / "native")


@cache
def own_code() -> str:
    """A hash of the code that compiles networks, and of LLVM's version."""
    from importlib.metadata import version

    digest = hashlib.sha256(version("llvmlite").encode())
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def key_of(content: bytes, level: str) -> str:
    digest = hashlib.sha256(content).hexdigest()
    return hashlib.sha256("\n".join((digest, level, own_code())).encode()).hexdigest()[:40]


def read_entry(key: str) -> Entry | None:
    """The entry ``key``; None where there is none, or none that can be trusted."""
    try:
        folder = cache_folder()
        if not is_own(folder.stat()):
            return None
        descriptor = os.open(folder / f"{key}.native", os.O_RDONLY | os.O_NOFOLLOW)
        with os.fdopen(descriptor, "rb") as file:
            known = os.fstat(file.fileno())
            if not is_own(known) or not stat.S_ISREG(known.st_mode) or known.st_size > MOST_BYTES:
                return None
            content = file.read()
        with contextlib.suppress(OSError):
            os.utime(folder / f"{key}.native")
    except OSError:
        return None
    return parse_entry(content)


def is_own(known: os.stat_result) -> bool:
    """Whether nobody but this user, and root, can have written it."""
    return known.st_uid == os.geteuid() and not known.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def parse_entry(content: bytes) -> Entry | None:
    """None where ``content`` is damaged."""
    digest, _, whole = content[len(MAGIC) :].partition(b"\n")
    if not content.startswith(MAGIC) or hashlib.sha256(whole).hexdigest().encode() != digest:
        return None
    head, _, rest = whole.partition(b"\n")
    with contextlib.suppress(ValueError, KeyError, TypeError):
        known = json.loads(head)
        about, code = int(known["about"]), int(known["code"])
        compiled = Compiled(rest[about : about + code], rest[about + code :], int(known["work"]))
        return Entry(compiled, json.loads(rest[:about]))
    return None


def write_entry(key: str, entry: Entry) -> bool:
    """Keep ``entry``; whether that could be done."""
    about = json.dumps(dict(entry.about)).encode()
    sizes = {"about": len(about), "code": len(entry.compiled.code), "work": entry.compiled.work}
    whole = b"".join((json.dumps(sizes).encode(), b"\n", about, entry.compiled.code, entry.compiled.constants))
    digest = hashlib.sha256(whole).hexdigest().encode()
    folder = cache_folder()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not is_own(folder.stat()):
            return False
        with atomic_write(folder / f"{key}.native") as temporary:
            temporary.write_bytes(b"".join((MAGIC, digest, b"\n", whole)))
    except (OSError, MgqError):
        return False
    forget_old(folder)
    return True


def forget_old(folder: Path) -> None:
    """Delete all entries but those that were used last."""
    with contextlib.suppress(OSError):  # another process may be at it
        by_age = sorted(folder.glob("*.native"), key=lambda path: path.stat().st_mtime_ns)
        for path in by_age[:-KEPT]:
            path.unlink(missing_ok=True)
