"""What the bits of a run depend on, as its folder tells."""

from __future__ import annotations

import hashlib
import os
import shlex
import sys
from pathlib import Path
from typing import Any

from mgq.data.datasets import Dataset
from mgq.data.loader import cores
from mgq.engine.environment import this_machine
from mgq.engine.networks import versions
from mgq.machine import package_version

PACKAGES = ("opencv-python", "onednn-cpu-gomp", "numba", "llvmlite", "scipy", "safetensors", "pillow")


def this_process(workers: int | None = None) -> dict[str, Any]:
    """The command, the versions of all that computes, and the processor; ``workers`` are the threads asked for."""
    machine = this_machine()
    return {
        "command": shlex.join(["mgq", *sys.argv[1:]]),
        "versions": {**versions(), **{name: found for name in PACKAGES if (found := package_version(name))}},
        "cpu": machine.cpu,
        "instructions": list(machine.features),
        "usable_cores": machine.usable_cores,
        "workers": cores() if workers is None else workers,
        "system": machine.system,
        "variables": list(machine.variables),
    }


def listing_of(dataset: Dataset) -> dict[str, Any]:
    """How many pictures ``dataset`` has, and the SHA-256 of their names with class folders and sizes in bytes.

    Drawn pictures follow from the recipe: they have no names, and the SHA-256 is None.
    """
    if not len(dataset) or not isinstance(dataset.picture(0), Path):
        return {"pictures": len(dataset), "sha256": None}
    digest = hashlib.sha256()
    for index in range(len(dataset)):
        path = dataset.picture(index)
        assert isinstance(path, Path)
        digest.update(os.fsencode(f"{'/'.join(path.parts[-2:])}\0{_size(path)}\n"))
    return {"pictures": len(dataset), "sha256": digest.hexdigest()}


def _size(path: Path) -> int:
    """Bytes; -1 for what cannot be read, which the loader names when it gets there."""
    try:
        return path.stat().st_size
    except OSError:
        return -1
