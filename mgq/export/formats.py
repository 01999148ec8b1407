"""Files to deploy: their formats, and what they may take. Reading it imports nothing else."""

from __future__ import annotations

from pathlib import Path

SUFFIXES = {"megengine": ".megengine", "onnx": ".onnx", "native": ".so"}
"""Formats of files, and how their names end."""
INPUTS = ("uint8", "int8", "float32")


def format_of(path: Path | None) -> str | None:
    """The format that ``path`` is called by, in letters of either case; None for any other name."""
    if path is None:
        return None
    return next((name for name, suffix in SUFFIXES.items() if path.suffix.lower() == suffix), None)
