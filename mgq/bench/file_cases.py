"""Deployed files, and files of other programs, in a benchmark. Reading it imports no MegEngine."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import numpy as np

from mgq.bench.cases import BenchmarkCase, LoadedWorker
from mgq.bench.peak import find_instruction
from mgq.bench.settings import FILES, Load, Precision, Settings
from mgq.bench.worker_loaders import FileLoader, Peak
from mgq.bench.workers import Batch, SubprocessWorker, WorkerConfig
from mgq.data.decoding import bundled_cat, read_image
from mgq.data.transforms import eval_crop, eval_resize, to_batch
from mgq.errors import InputError, printable
from mgq.export.formats import SUFFIXES
from mgq.export.onnx.onnx_file import read_onnx
from mgq.runtime.protocol import Runtime
from mgq.runtime.registry import BACKENDS, Backend
from mgq.system.environment import Machine
from mgq.weights.checkpoint import PIXELS_STEP

PEAK = "self-test"


def start_worker(
    what: str,
    load: Callable[[int], Runtime],
    threads: int,
    settings: Settings,
    *imports: str,
    stretched: tuple[int, int] | None = None,
) -> SubprocessWorker:
    """A worker in a process of its own, on the last ``threads`` cores: the first ones serve the system's interrupts."""
    cores = tuple(sorted(os.sched_getaffinity(0))[-threads:])
    copies = threads if settings.load is Load.THROUGHPUT else 1
    seat = WorkerConfig(load, threads // copies, copies, cores, imports)
    return SubprocessWorker(what, seat, cat_batch(settings.batch, settings.image_size, stretched))


@cache
def precision_of(path: Path) -> Precision:
    """The precision of an ONNX file. Raises InputError where no engine could read it."""
    return Precision.INT8 if read_onnx(path).quantized else Precision.FP32


@cache
def cat_batch(batch: int, image_size: int, stretched: tuple[int, int] | None = None) -> Batch:
    """uint8 (batch, 3, image_size, image_size), or of the height and width ``stretched``, BGR: the bundled cat, no two
    pictures alike."""
    cat = read_image(bundled_cat())
    crop = eval_crop(cat, image_size) if stretched is None else eval_resize(cat, stretched)
    return to_batch([np.roll(crop, number * crop.shape[1] // batch, axis=1) for number in range(batch)])


# ---- files that mgq did not write, beside networks of the zoo ----


def rivals(network: str, settings: Settings, threads: int) -> list[BenchmarkCase]:
    """Files of other programs, in every engine that reads them; their answers are not compared."""
    return [
        BenchmarkCase(
            network=network,
            precision=precision_of(path),
            engine=engine.name,
            load=partial(start_file, engine, path, settings, threads),
            threads=threads,
            answers=None,
            file=path.name,
        )
        for path in settings.against
        for engine in BACKENDS
        if engine.suffix == ".onnx" and engine.reads(path)
    ]


def read_stretched_size(path: Path) -> tuple[int, int] | None:
    """Height and width of the pictures that ``path`` takes, where they are no squares."""
    if path.suffix.lower() != SUFFIXES["onnx"]:
        return None
    height, width = read_onnx(path).shape[2:]
    return None if height is None or width is None or height == width else (height, width)


def start_file(engine: Backend, path: Path, settings: Settings, threads: int) -> LoadedWorker:
    engine.refuse_missing()
    worker = start_worker(
        path.name,
        FileLoader(engine.key, path.absolute()),
        threads,
        settings,
        engine.package,
        stretched=read_stretched_size(path),
    )
    return LoadedWorker(worker, str(path), path.stat().st_size)


# ---- deployed files alone ----


@dataclass(frozen=True)
class DeployedFile:
    """A file that is measured for itself: what it computes with, the pixels on a side and the batch that it takes; 0
    where it takes any."""

    path: Path
    precision: Precision
    image_size: int
    batch: int = 0


def read_deployed_file(path: Path) -> DeployedFile:
    """Raises InputError where no engine reads ``path``, or it is damaged."""
    suffix = path.suffix.lower()
    if suffix == SUFFIXES["onnx"]:
        batch, _, size, _ = read_onnx(path).shape
        return DeployedFile(path, precision_of(path), size or 0, batch or 0)
    if suffix == SUFFIXES["native"]:
        from mgq.runtime.library import LibraryRuntime

        return DeployedFile(path, Precision.INT8, LibraryRuntime(path).takes[2] or 0)
    raise InputError(f"{printable(path)} cannot be measured for itself: give .onnx files and native libraries")


def list_sizes(settings: Settings) -> tuple[tuple[int, int], ...]:
    """Height and width of the pictures by which the deployed files of ``settings`` are measured."""
    squares = {path: read_deployed_file(path).image_size or settings.image_size for path in settings.files}
    return tuple(dict.fromkeys(read_stretched_size(path) or (side, side) for path, side in squares.items()))


def find_batch(paths: Sequence[Path], wanted: int | None) -> int:
    """The batch by which the files at ``paths`` are measured: the one that they take, where they leave no other.

    Raises InputError where that is not the ``wanted`` one, or they differ.
    """
    found = {file.batch: file.path for file in map(read_deployed_file, paths) if file.batch}
    if wanted is not None:
        found.pop(wanted, None)
        for batch, path in found.items():
            raise InputError(f"{printable(path)} takes batches of {batch}: leave --batch out, or `mgq dump --batch 0`")
        return wanted
    if len(found) > 1:
        raise InputError(f"the files take batches of {' and '.join(map(str, sorted(found)))}: give them one by one")
    return next(iter(found), 1)


def file_cases(settings: Settings, machine: Machine) -> list[BenchmarkCase]:
    """Each of the deployed files in every engine that reads it, which all have to answer alike, and the self-tests."""
    found: list[BenchmarkCase] = []
    for threads in settings.threads:
        for file in map(read_deployed_file, settings.files):
            its = replace(settings, image_size=file.image_size or settings.image_size)
            found += [
                BenchmarkCase(
                    network=FILES,
                    precision=file.precision,
                    engine=engine.name,
                    load=partial(start_file, engine, file.path, its, threads),
                    rounds_otherwise=file.precision is Precision.INT8,
                    threads=threads,
                    answers=str(file.path),
                    file=file.path.name,
                    shares_network=settings.share_network,
                )
                for engine in BACKENDS
                if engine.suffix == file.path.suffix.lower() and engine.is_installed and engine.reads(file.path)
            ]
        found += peaks(FILES, settings, machine, threads)
    return found


# ---- the processor's ceiling ----


def peaks(network: str, settings: Settings, machine: Machine, threads: int) -> list[BenchmarkCase]:
    """The self-tests of the processor, where there are any for it."""
    return [
        BenchmarkCase(
            network=network,
            precision=precision,
            engine=PEAK,
            load=partial(start_peak, precision, settings, machine.features, threads),
            threads=threads,
            answers=None,
            is_peak=True,
        )
        for precision in settings.precisions
        if find_instruction(precision, machine.features) is not None
    ]


def start_peak(precision: Precision, settings: Settings, features: tuple[str, ...], threads: int) -> LoadedWorker:
    its = replace(settings, load=Load.LATENCY, batch=1, image_size=PIXELS_STEP)
    return LoadedWorker(start_worker(PEAK, Peak(precision, features), threads, its, "mgq.bench.peak"), "")
