"""Files to deploy: their formats, and what they may take. Reading it imports nothing else."""

from __future__ import annotations

SUFFIXES = {"megengine": ".megengine", "onnx": ".onnx"}
"""Formats of files, and how their names end."""
INPUTS = ("uint8", "int8", "float32")
