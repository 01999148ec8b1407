"""Formats of deployed files and their inputs. Importing this imports nothing else."""

from __future__ import annotations

from pathlib import Path

SUFFIXES = {"megengine": ".megengine", "onnx": ".onnx", "native": ".so"}
"""Formats of files, and how their names end."""
INPUTS = ("uint8", "int8", "float32")


def format_of(path: Path | None) -> str | None:
    """The format by the suffix of ``path``, upper or lower case; None for any other suffix."""
    if path is None:
        return None
    return next((name for name, suffix in SUFFIXES.items() if path.suffix.lower() == suffix), None)
