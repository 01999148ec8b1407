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

from mgq.engine.classifier.dump import Dump, dump_classifier, source_of
from mgq.engine.classifier.open import Classifier, convert
from mgq.engine.classifier.parity import list_backends
from mgq.export.onnx.writer import plain_graph
from mgq.graph.engine_forms import FORMS, adapt_to_engine
from mgq.machine import usable_cores
from mgq.ptq.pipeline import snr_of
from mgq.quantization.modes import Mode
from mgq.runtime.protocol import BatchRuntime, run_in_batches
from mgq.runtime.registry import Backend

ROUNDS, SECONDS = 60, 3.0
"""Turns that each file gets in an engine, and seconds after which it is enough."""
WARM_UP = 3
EQUAL_SPEED = 0.97
"""Share of float's speed below which a file counts as slower."""

Images = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class EngineRow:
    """The fastest int8 file beside float in one engine: milliseconds for a picture, the middle of all turns; what int8
    answers to the pictures, in percent of them as float does, and its logits against float's in dB.

    An engine for int8 alone has no float. ``path`` is the int8 file."""

    engine: str
    version: str
    float_ms: float | None
    int8_ms: float
    same: float
    snr: float
    path: Path

    @property
    def speedup(self) -> float | None:
        return None if self.float_ms is None else self.float_ms / self.int8_ms

    @property
    def is_slower(self) -> bool:
        return self.speedup is not None and self.speedup < EQUAL_SPEED


@dataclass(frozen=True)
class Deployment:
    """The int8 file for any engine, both sizes in bytes, the number of images compared, and a row for each engine."""

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

    @property
    def is_worthless(self) -> bool:
        """Whether int8 is slower than float in every engine here."""
        return bool(self.rows) and len(self.slower) == len(self.rows)

    @property
    def files(self) -> dict[Path, list[str]]:
        """The int8 files, that for any engine first -> the engines for which they are the fastest."""
        found: dict[Path, list[str]] = {self.path: []}
        for row in self.rows:
            found.setdefault(row.path, []).append(row.engine)
        return found

    def to_json(self) -> dict[str, Any]:
        rows = [{**vars(row), "path": str(row.path), "speedup": row.speedup} for row in self.rows]
        return {**vars(self), "path": str(self.path), "rows": rows}


def deploy(normal: Classifier, int8: Classifier, path: Path, images: Images, keep_input: bool = False) -> Deployment:
    """Write the int8 network to the ``.onnx`` file ``path``, and measure it beside a float file of ``normal``.

    Where an engine runs another form of it sooner, that lies in a file beside it, whose name has the engine's in it.
    ``images``: uint8 (N, 3, H, W), as the networks see them. ``keep_input`` is as for the dump.
    Raises as that does.
    """
    int8 = convert(int8, Mode.QUANTIZED)
    dumped = dump_classifier(int8, path, batch=None, keep_input=keep_input)
    with tempfile.TemporaryDirectory(prefix="mgq-deploy-") as folder:
        beside = dump_classifier(normal, Path(folder) / "float.onnx", batch=None)
        exact = normal_logits(normal, images)
        rows = tuple(
            engine_row(
                engine, beside.path, [path, *write_engine_form(int8, path, engine.key, keep_input)], exact, images
            )
            for engine in list_backends(path)
        )
    drop_slower_forms(path, rows)
    return Deployment(path, beside.size, dumped.size, len(images), usable_cores(), rows)


def measure_file(normal: Classifier, dumped: Dump, images: Images) -> Deployment:
    """An int8 file that is there already beside a float one of ``normal``. Raises as the dump does."""
    with tempfile.TemporaryDirectory(prefix="mgq-deploy-") as folder:
        beside = dump_classifier(normal, Path(folder) / "float.onnx", batch=None)
        exact = normal_logits(normal, images)
        engines = list_backends(dumped.path)
        rows = tuple(engine_row(engine, beside.path, [dumped.path], exact, images) for engine in engines)
    return Deployment(dumped.path, beside.size, dumped.size, len(images), usable_cores(), rows)


def write_candidates(normal: Classifier, int8: Classifier, folder: Path) -> list[Path]:
    """A float file in ``folder``, the int8 one for any engine, and those in the form for an engine that is installed.

    Raises as the dump does.
    """
    name = normal.spec.name
    floats = dump_classifier(normal, folder / f"{name}.float.onnx", batch=None).path
    integers = dump_classifier(int8, folder / f"{name}.int8.onnx", batch=None).path
    forms = [form for engine in list_backends(integers) for form in write_engine_form(int8, integers, engine.key)]
    return [floats, integers, *forms]


def write_engine_form(int8: Classifier, path: Path, engine: str, keep_input: bool = False) -> list[Path]:
    """The network in the form for the ``engine``, in a file beside ``path``; none where it needs no other form."""
    if engine not in FORMS:
        return []
    beside = path.with_name(f"{path.stem}.{engine}{path.suffix}")
    graph = plain_graph(source_of(int8), int8.image_size)
    if adapt_to_engine(graph, engine) is graph:
        beside.unlink(missing_ok=True)  # of another network that lay here
        return []
    return [dump_classifier(int8, beside, batch=None, engine=engine, keep_input=keep_input).path]


def drop_slower_forms(path: Path, rows: Sequence[EngineRow]) -> None:
    """Delete the files beside ``path`` that are the fastest in no engine."""
    kept = {row.path for row in rows}
    for engine in FORMS:
        beside = path.with_name(f"{path.stem}.{engine}{path.suffix}")
        if beside not in kept:
            beside.unlink(missing_ok=True)


def normal_logits(normal: Classifier, images: Images) -> npt.NDArray[np.float64]:
    return np.concatenate([normal.logits(images[i : i + 1]) for i in range(len(images))]).astype(np.float64)


def engine_row(
    engine: Backend, floats: Path, integers: Sequence[Path], exact: npt.NDArray[np.float64], images: Images
) -> EngineRow:
    """The fastest of the files ``integers`` in ``engine`` beside ``floats``, or alone where it does not run float.

    ``exact`` are the logits of float.
    """
    threads = usable_cores()
    candidates = [engine.load(path, threads) for path in integers]
    runtimes: list[BatchRuntime] = [*candidates]
    if engine.reads(floats):
        runtimes.append(engine.load(floats, threads))
    taken = milliseconds(runtimes, images[:1])
    int8_ms = min(taken[: len(candidates)])
    place = taken.index(int8_ms)
    float_ms = taken[-1] if len(runtimes) > len(candidates) else None
    int8 = candidates[place]
    found = run_in_batches(int8, images).astype(np.float64)
    same = float((exact.argmax(1) == found.argmax(1)).mean() * 100)
    return EngineRow(int8.name, int8.version, float_ms, int8_ms, same, snr_of(found, exact), integers[place])


def milliseconds(runtimes: Sequence[BatchRuntime], image: Images) -> list[float]:
    """The median time of each of ``runtimes`` for an image, in milliseconds; they run in turns."""
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
