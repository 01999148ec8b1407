"""Compares the float and the int8 file of one network on this machine, in each backend."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mgq.engine.classifier.dump import dump_classifier
from mgq.engine.classifier.open import Classifier, convert
from mgq.engine.classifier.parity import list_backends
from mgq.machine import usable_cores
from mgq.ptq.pipeline import snr_of
from mgq.quantization.modes import Mode
from mgq.runtime.protocol import BatchRuntime, in_batches
from mgq.runtime.registry import Backend

ROUNDS, SECONDS = 60, 3.0
"""Turns that each file gets in an engine, and seconds after which it is enough."""
WARM_UP = 3
EQUAL_SPEED = 0.97
"""Of float's speed: what is slower than that counts as slower."""

Images = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class EngineRow:
    """Both files in one engine: milliseconds for a picture, the middle of all turns; what int8 answers to the pictures,
    in percent of them as float does, and its logits against float's in dB. An engine for int8 alone has no float."""

    engine: str
    version: str
    float_ms: float | None
    int8_ms: float
    same: float
    snr: float

    @property
    def speedup(self) -> float | None:
        return None if self.float_ms is None else self.float_ms / self.int8_ms

    @property
    def is_slower(self) -> bool:
        return self.speedup is not None and self.speedup < EQUAL_SPEED


@dataclass(frozen=True)
class Deployment:
    """The int8 file, both sizes in bytes, the pictures compared, and what each engine makes of them."""

    path: Path
    float_bytes: int
    int8_bytes: int
    images: int
    threads: int
    rows: tuple[EngineRow, ...]

    @property
    def slower(self) -> tuple[str, ...]:
        """The engines in which int8 is slower than float."""
        return tuple(row.engine for row in self.rows if row.is_slower)

    def to_json(self) -> dict[str, Any]:
        rows = [{**vars(row), "speedup": row.speedup} for row in self.rows]
        return {**vars(self), "path": str(self.path), "rows": rows}


def deploy(normal: Classifier, int8: Classifier, path: Path, images: Images) -> Deployment:
    """Write the int8 network to the ``.onnx`` file ``path``, and measure it beside a float file of ``normal``.

    ``images``: uint8 (N, 3, H, W), as the networks see them. Raises as the dump does.
    """
    dumped = dump_classifier(convert(int8, Mode.QUANTIZED), path, batch=None)
    with tempfile.TemporaryDirectory(prefix="mgq-deploy-") as folder:
        beside = dump_classifier(normal, Path(folder) / "float.onnx", batch=None)
        threads = usable_cores()
        exact = normal_logits(normal, images)
        rows = tuple(engine_row(engine, beside.path, path, exact, images) for engine in list_backends(path))
    return Deployment(path, beside.size, dumped.size, len(images), threads, rows)


def normal_logits(normal: Classifier, images: Images) -> npt.NDArray[np.float64]:
    return np.concatenate([normal.logits(images[i : i + 1]) for i in range(len(images))]).astype(np.float64)


def engine_row(
    engine: Backend, floats: Path, integers: Path, exact: npt.NDArray[np.float64], images: Images
) -> EngineRow:
    """Both files in ``engine``, int8 alone where it does not run float; ``exact`` are the logits of float."""
    threads = usable_cores()
    int8 = engine.load(integers, threads)
    found = in_batches(int8, images).astype(np.float64)
    same = float((exact.argmax(1) == found.argmax(1)).mean() * 100)
    runtimes: list[BatchRuntime] = [int8]
    if engine.reads(floats):
        runtimes.append(engine.load(floats, threads))
    int8_ms, *float_ms = milliseconds(runtimes, images[:1])
    return EngineRow(int8.name, int8.version, float_ms[0] if float_ms else None, int8_ms, same, snr_of(found, exact))


def milliseconds(runtimes: Sequence[BatchRuntime], image: Images) -> list[float]:
    """For each of ``runtimes`` the middle of what a picture takes; they have their turns one after the other."""
    for runtime in runtimes:
        for _ in range(WARM_UP):
            runtime.run(image)
    taken: list[list[float]] = [[] for _ in runtimes]
    end = time.perf_counter() + SECONDS
    for _ in range(ROUNDS):
        for runtime, turns in zip(runtimes, taken, strict=True):
            start = time.perf_counter()
            runtime.run(image)
            turns.append((time.perf_counter() - start) * 1e3)
        if time.perf_counter() > end:
            break
    return [statistics.median(turns) for turns in taken]
