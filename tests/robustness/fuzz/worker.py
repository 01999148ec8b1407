"""A process that reads inputs one after the other and says of each how it went, until one of them ends it.

``python -m tests.robustness.fuzz.worker FOLDER PLAN``: the plan is JSON, a list of [reader, seed, first, last]. Each
input lies in FOLDER while it is read, so that it is there after a crash. A line of JSON on standard output
tells of each.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mgq.errors import MgqError

TOO_MUCH = 1 << 30
"""Bytes above what the process had before: more is a breach."""
_CEILING = 6 << 30  # of address space above what libraries take, so that the machine survives a breach


def kilobytes(name: str) -> int:
    """An entry of what the system knows of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    raise KeyError(name)


def outcome(read: Any, path: Path) -> dict[str, Any]:
    """How reading ``path`` went, how long it took, and how much memory above what was there before."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, start = kilobytes("VmRSS"), time.perf_counter()
    told: dict[str, Any] = {"how": "accepted"}
    try:
        read(path)
    except MgqError as error:
        line = str(error)
        told = {"how": "refused"} if line.isprintable() and 0 < len(line) < 2000 else {"how": "bad line", "why": line}
    except BaseException:
        told = {"how": "traceback", "why": traceback.format_exc(limit=-6)}
    seconds = time.perf_counter() - start
    return {**told, "seconds": seconds, "memory": 1024 * max(0, kilobytes("VmHWM") - before)}


def is_fault(told: Mapping[str, Any]) -> bool:
    return told["how"] not in ("refused", "accepted") or told["memory"] > TOO_MUCH


def kept_input(folder: Path, reader: str, number: int, suffix: str) -> Path:
    """Where an input stays that a reader fails on."""
    return folder / f"{reader}-{number}{suffix}".replace(" ", "_").replace(",", "")


def main(folder: Path, plan: list[tuple[str, int, int, int]]) -> None:
    from tests.conftest import State  # noqa: F401  (imports MegEngine, quietly)
    from tests.robustness.fuzz.readers import reader_called

    told = os.fdopen(os.dup(1), "w", buffering=1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)  # libraries speak here, too
    os.dup2(nowhere, 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    limited = False
    for name, seed, first, last in plan:
        reader = reader_called(name)
        seeds = reader.seeds()
        path = folder / f"input{reader.suffix}"
        path.write_bytes(seeds[0])
        outcome(reader.read, path)  # imports what it needs
        if not limited:
            size = kilobytes("VmSize") * 1024
            resource.setrlimit(resource.RLIMIT_AS, (size + _CEILING, size + _CEILING))
            limited = True
        for number in range(first, last):
            path.write_bytes(reader.input(number, seed, seeds))
            found = outcome(reader.read, path)
            if is_fault(found):
                kept_input(folder, name, number, reader.suffix).write_bytes(path.read_bytes())
            told.write(json.dumps({"reader": name, "number": number, **found}) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
