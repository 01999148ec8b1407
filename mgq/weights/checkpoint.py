"""mgq's checkpoint: a safetensors file whose metadata says what the tensors are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from msgspec import Meta

from mgq.errors import InputError, printable
from mgq.io.atomic import atomic_write
from mgq.io.records import record_of
from mgq.weights.preprocessing import Preprocessing

KEY = "mgq"
TRAINING_KEY = "mgq training"  # of the state that a run goes on from, which is no checkpoint
FORMAT = 1
MOST_PIXELS = 4096
"""The most pixels on a side of a network's input: larger than any network uses, and it fits into memory."""
PIXELS_STEP = 32
"""Sides are multiples of this: every network of the zoo halves its input five times."""


@dataclass(frozen=True)
class CheckpointInfo:
    """The metadata of a checkpoint: all that a verb needs to open it without further options.

    ``mode`` is the mode of the network. The tensors of a ``quantized`` one are those of its ``qat`` network, because
    MegEngine's int8 layers do not hold their activation scales. ``float_layers`` are the names of the layers whose
    weights stay float32 among int8 ones. Without ``preprocessing`` it is the architecture's.
    """

    arch: str
    mode: str
    classes: tuple[str, ...]
    image_size: Annotated[int, Meta(ge=1, le=MOST_PIXELS)]
    origin: str
    options: Mapping[str, Any] = field(default_factory=dict)
    target: str = "megengine"
    step: int | None = None
    recipe: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    float_layers: tuple[str, ...] = ()
    preprocessing: Preprocessing | None = None


def check_size(pixels: int) -> int:
    """Return Return Return Return ``pixels`` if a network can take images of that size. Raises InputError that names
    the nearest size."""
    if PIXELS_STEP <= pixels <= MOST_PIXELS and pixels % PIXELS_STEP == 0:
        return pixels
    near = min(MOST_PIXELS, max(PIXELS_STEP, round(pixels / PIXELS_STEP) * PIXELS_STEP))
    wrong = "too large" if pixels > MOST_PIXELS else "too small" if pixels <= 0 else f"not a multiple of {PIXELS_STEP}"
    raise InputError(f"--image-size {pixels} is {wrong}: {near} would do")


def write_checkpoint(path: Path, state: Mapping[str, npt.NDArray[Any]], info: CheckpointInfo) -> None:
    """Write ``state`` and ``info`` to ``path`` so that the file is there whole or not at all."""
    write_tensors(path, state, {KEY: json.dumps({"format": FORMAT, **asdict(info)})})


def write_tensors(path: Path, tensors: Mapping[str, npt.NDArray[Any]], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file that is there whole or not at all. Raises as ``atomic_write`` does."""
    from safetensors.numpy import save_file

    dense = {name: np.asarray(value, order="C") for name, value in tensors.items()}
    with atomic_write(path) as temporary:
        save_file(dense, str(temporary), metadata=dict(metadata))


def info_of(metadata: Mapping[str, str], name: str) -> CheckpointInfo | None:
    """Parse the ``metadata`` of the safetensors file ``name``; None where it is not mgq's.

    Raises InputError where it is mgq's and damaged, of a later format, or the state of a training.
    """
    if TRAINING_KEY in metadata:
        raise InputError(f"{name} is what --resume goes on from, not a checkpoint; pass the one that lies beside it")
    if KEY not in metadata:
        return None
    try:
        return record_of(CheckpointInfo, body_of(metadata[KEY], FORMAT, name))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise InputError(f"{name} has damaged metadata; write the checkpoint again") from None


def body_of(text: str, known: int, name: str) -> dict[str, Any]:
    """Parse the JSON ``text`` in the file ``name``; its format has to be the ``known`` one. Raises InputError for
    another format, and ValueError, KeyError or TypeError for damaged text.
    """
    body: dict[str, Any] = json.loads(text)
    version = body.pop("format")
    if version != known:
        raise InputError(f"{name} has checkpoint format {printable(version)[:80]}, this mgq reads {known}; update mgq")
    return body
