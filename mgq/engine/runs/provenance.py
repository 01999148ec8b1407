"""Records what the bits of a run depend on, in its folder."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mgq.data.datasets import Dataset
from mgq.data.image_sources import Source
from mgq.engine.classifier.open import versions
from mgq.io.atomic import write_text_atomically
from mgq.io.limited_io import object_in
from mgq.machine import package_version, usable_cores
from mgq.runtime.registry import list_packages
from mgq.system.environment import this_machine

ENVIRONMENT = "environment.json"
BENEATH = ("llvmlite", "scipy", "safetensors", "pillow")
"""What computes or reads besides the packages that `mgq --version` tells of."""


def this_process(workers: int | None = None) -> dict[str, Any]:
    """The command, the versions of all that computes, and the processor; ``workers`` are the threads asked for."""
    machine = this_machine()
    return {
        "command": command_line(),
        "versions": {
            **versions(),
            **{name: found for name in (*list_packages().values(), *BENEATH) if (found := package_version(name))},
        },
        "cpu": machine.cpu,
        "instructions": list(machine.features),
        "usable_cores": machine.usable_cores,
        "workers": usable_cores() if workers is None else workers,
        "system": machine.system,
        "variables": list(machine.variables),
    }


def command_line() -> str:
    """What was typed, ready for a shell; of another program than mgq its own name and words."""
    program = Path(sys.argv[0])
    return shlex.join(["mgq" if program.stem in ("mgq", "__main__") else program.name, *sys.argv[1:]])


def write_environment(folder: Path, found: Mapping[str, Any]) -> None:
    """Write ``found``, plain JSON, as what the bits in ``folder`` depend on."""
    write_text_atomically(folder / ENVIRONMENT, json.dumps(found, indent=2) + "\n")


def read_environment(folder: Path) -> dict[str, Any]:
    """What :func:`write_environment` wrote to ``folder``; empty where that cannot be read."""
    try:
        return object_in((folder / ENVIRONMENT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def listing_of(images: Dataset | Sequence[Source]) -> dict[str, Any]:
    """How many ``images`` there are, and the SHA-256 of their names with class folders and sizes in bytes.

    Drawn pictures follow from the recipe, and standard input is read once: their SHA-256 is None.
    """
    paths: list[Path | None]
    if isinstance(images, Sequence):
        paths = [source.path for source in images]
    elif len(images) and isinstance(images.image(0), Path):
        paths = [path if isinstance(path, Path) else None for path in map(images.image, range(len(images)))]
    else:
        paths = [None] * len(images)
    known = [path for path in paths if path is not None]
    return {"pictures": len(paths), "sha256": digest_of(known) if known and len(known) == len(paths) else None}


def digest_of(paths: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(os.fsencode(f"{'/'.join(path.parts[-2:])}\0{_size(path)}\n"))
    return digest.hexdigest()


def _size(path: Path) -> int:
    """Bytes; -1 for what cannot be read, which the loader names when it gets there."""
    try:
        return path.stat().st_size
    except OSError:
        return -1
