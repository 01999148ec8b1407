"""A cache of compiled networks on disk. The key is made of the file's content, the processor and mgq's own code.
Entries are machine code, so one is used only if it is complete and only this user can write it; otherwise it is
compiled again. A failure to write is ignored.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from mgq.export.native.compiler import CompiledProgram
from mgq.io.private_cache import read_private, write_private

KEPT = 32
"""The number of entries that are kept, the last used ones."""
VARIABLE = "MGQ_NATIVE_CACHE"
"""The folder of the cache, where it is not the user's own cache folder."""


@dataclass(frozen=True)
class Entry:
    """A compiled network and what is known of it: of the file that it was made from, say."""

    compiled: CompiledProgram
    about: Mapping[str, Any]


def cache_folder() -> Path:
    import platformdirs

    return Path(os.environ.get(VARIABLE) or platformdirs.user_cache_path("mgq") / "native")


@cache
def own_code() -> str:
    """A hash of the code that compiles networks, and of LLVM's version."""
    import llvmlite  # only its version: LLVM's own is part of it

    digest = hashlib.sha256(llvmlite.__version__.encode())
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def key_of(content: bytes, level: str) -> str:
    digest = hashlib.sha256(content).hexdigest()
    return hashlib.sha256("\n".join((digest, level, own_code())).encode()).hexdigest()[:40]


def read_entry(key: str) -> Entry | None:
    """The entry ``key``; None where there is none, or none that can be trusted."""
    path = cache_folder() / f"{key}.native"
    content = read_private(path)
    if content is None:
        return None
    with contextlib.suppress(OSError):
        os.utime(path)
    return parse_entry(content)


def parse_entry(content: bytes) -> Entry | None:
    """None where ``content`` is no entry."""
    head, _, rest = content.partition(b"\n")
    with contextlib.suppress(ValueError, KeyError, TypeError):
        known = json.loads(head)
        about, code = int(known["about"]), int(known["code"])
        compiled = CompiledProgram(rest[about : about + code], rest[about + code :], int(known["work"]))
        return Entry(compiled, json.loads(rest[:about]))
    return None


def write_entry(key: str, entry: Entry) -> bool:
    """Store ``entry``; return whether it was written."""
    about = json.dumps(dict(entry.about)).encode()
    sizes = {"about": len(about), "code": len(entry.compiled.code), "work": entry.compiled.work}
    whole = b"".join((json.dumps(sizes).encode(), b"\n", about, entry.compiled.code, entry.compiled.constants))
    folder = cache_folder()
    kept = write_private(folder / f"{key}.native", whole)
    if kept:
        forget_old(folder)
    return kept


def forget_old(folder: Path) -> None:
    """Delete all entries but those that were used last."""
    with contextlib.suppress(OSError):  # another process may be at it
        by_age = sorted(folder.glob("*.native"), key=lambda path: path.stat().st_mtime_ns)
        for path in by_age[:-KEPT]:
            path.unlink(missing_ok=True)
