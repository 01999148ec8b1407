"""Saves and loads the state of a training, so that it resumes to the bit: one file under one checksum.

The file is a safetensors file. Its metadata holds JSON with everything but the tensors, and the SHA-256 of that JSON
and of every tensor's name, dtype, shape and bytes. safetensors itself tells a file that was cut short, not one whose
bytes have changed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from mgq.errors import InputError, printable
from mgq.io.records import record_of
from mgq.weights.checkpoint import TRAINING_KEY, body_of, write_tensors
from mgq.weights.state_file import LONGEST_HEADER

FORMAT = 1
CHECKSUM_KEY = "sha256"
START_AGAIN = "start again without --resume"
Tensors = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Parts:
    """All of a training's state but its tensors, as the file has it."""

    progress: Mapping[str, Any]
    recipe: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class TrainingState:
    """The state of a training, from which it can be resumed.

    ``tensors`` are its arrays: parameters, momentum, averages, observers. They keep shape and dtype (bool, integers,
    floats of 16 to 64 bits, complex64). ``progress`` and ``recipe`` are plain JSON, with text as keys and lists for
    tuples; integers of any length and floats come back exactly, NaN and infinities too.
    """

    tensors: Tensors
    progress: Mapping[str, Any]
    recipe: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)


def write_training_state(path: Path, state: TrainingState) -> None:
    """Make ``path`` hold ``state``, or leave it as it was. Raises as ``mgq.io.atomic.atomic_write`` does."""
    parts = {"progress": state.progress, "recipe": state.recipe, "versions": state.versions}
    text = json.dumps({"format": FORMAT, **{name: dict(part) for name, part in parts.items()}})
    write_tensors(path, state.tensors, {TRAINING_KEY: text, CHECKSUM_KEY: checksum(text, state.tensors)})


def read_training_state(path: Path) -> TrainingState:
    """The state in ``path``; its arrays can be written to.

    Raises InputError, one line, where the file is missing, cannot be read, is cut short or changed, is something
    else, or is of a later format.
    """
    name = printable(path)
    try:
        with path.open("rb") as start:
            if int.from_bytes(start.read(8), "little") > LONGEST_HEADER:
                raise _damaged_state(name)
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (it has no other way)
    except OSError as error:
        raise InputError(f"cannot read {name} ({error.strerror or printable(error)}); check the path") from error
    except (SafetensorError, KeyError, ValueError, TypeError, AttributeError, OverflowError) as error:
        raise _damaged_state(name) from error
    if TRAINING_KEY not in metadata:
        raise InputError(f"{name} is not the state of a training; --resume needs the one that mgq wrote")
    text = metadata[TRAINING_KEY]
    if metadata.get(CHECKSUM_KEY) != checksum(text, tensors):
        raise _damaged_state(name)
    try:
        parts = record_of(Parts, body_of(text, FORMAT, name))
        return TrainingState(tensors, parts.progress, parts.recipe, parts.versions)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise _damaged_state(name) from None


def checksum(text: str, tensors: Tensors) -> str:
    """SHA-256, hexadecimal, of ``text`` and of every tensor's name, dtype, shape and bytes."""
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        head = json.dumps([name, value.dtype.name, value.shape])
        digest.update(f"{len(head)} {head}".encode())
        digest.update(np.asarray(value, order="C").reshape(-1).view(np.uint8).data)
    digest.update(text.encode())
    return digest.hexdigest()


def _damaged_state(name: str) -> InputError:
    return InputError(f"{name} is damaged or cut short, nothing can go on from it; {START_AGAIN}")
