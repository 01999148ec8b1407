"""Runs networks of the zoo in all backends: writes the files that they read, starts each in a process of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TypeAlias

from mgq.bench.cases import BenchmarkCase, LoadedWorker, References
from mgq.bench.file_cases import cat_batch as cat_batch
from mgq.bench.file_cases import peaks, rivals
from mgq.bench.file_cases import precision_of as precision_of
from mgq.bench.file_cases import start_worker as start_worker
from mgq.bench.settings import Precision, Settings
from mgq.bench.worker_loaders import CheckpointLoader, FileLoader
from mgq.bench.workers import SubprocessWorker
from mgq.engine.classifier.dump import dump_classifier, source_of
from mgq.engine.classifier.network_options import RUNS
from mgq.engine.classifier.open import Classifier, find_newest_run, make_random_classifier, open_classifier
from mgq.engine.classifier.parity import compute_reference
from mgq.errors import FailureError, InputError
from mgq.export.formats import SUFFIXES
from mgq.graph.layer_graph import macs_of
from mgq.graph.network_reader import graph_of
from mgq.quantization.modes import Mode
from mgq.quantization.targets import MEGENGINE, ONNX, Target, get_target
from mgq.runtime.protocol import Runtime
from mgq.runtime.registry import BACKENDS, TRACED, Backend
from mgq.system.environment import Machine
from mgq.zoo.registry import ModelSpec, spec_of
from mgq.zoo.weight_loading import is_cached

SIMULATED = "MegEngine's simulation"


@dataclass(frozen=True)
class NetworkJob:
    """What a backend is to run: one network in one precision, written for ``target``.

    Each file is written into ``folder`` once, when it is first asked for; so is the network built.
    """

    network: str
    precision: Precision
    target: Target
    settings: Settings
    folder: Path

    @cached_property
    def classifier(self) -> Classifier:
        return replace(
            open_for_benchmark(self.network, self.precision, self.target, self.settings.save),
            image_size=self.settings.image_size,
        )

    @property
    def answers(self) -> str:
        """A name: all backends that run a job of this name must give the same answers."""
        return f"{self.network} {self.precision.value} {self.target.name}"

    def file(self, suffix: str) -> Path:
        return self.folder / f"{self.answers.replace(' ', '.')}{suffix}"

    @cached_property
    def checkpoint(self) -> Path:
        path = self.file(".safetensors")
        self.classifier.write_checkpoint(path)
        return path

    @cached_property
    def _written(self) -> dict[str, Path]:
        return {}

    def write_file(self, suffix: str) -> Path:
        """The network as a file of the format that ends in ``suffix``."""
        if suffix not in self._written:
            path = self.file(suffix)
            kind = next(kind for kind, its in SUFFIXES.items() if its == suffix)
            dump_classifier(self.classifier, path, batch=self.settings.batch, kind=kind)
            self._written[suffix] = path
        return self._written[suffix]


Start: TypeAlias = Callable[[Backend, NetworkJob, int], LoadedWorker]
"""Starts a backend with a job on a number of threads. Raises an MgqError where it cannot: the reason and the mend."""


def start_backend(backend: Backend, job: NetworkJob, threads: int) -> LoadedWorker:
    return (start_on_file if backend.suffix else start_in_memory)(backend, job, threads)


def start_in_memory(backend: Backend, job: NetworkJob, threads: int) -> LoadedWorker:
    """MegEngine itself, on a network that is built from a checkpoint."""
    if threads > 1:
        raise FailureError(f"{backend.name} computes on one thread; for {threads}, use MegEngine Lite")
    mode = Mode.NORMAL if job.precision is Precision.FP32 else Mode.QUANTIZED
    load = CheckpointLoader(backend is TRACED, job.checkpoint, mode.value, job.settings.image_size)
    return LoadedWorker(start_job_worker(load, job, threads, "mgq.runtime.megengine"), job.classifier.origin)


def start_on_file(backend: Backend, job: NetworkJob, threads: int) -> LoadedWorker:
    backend.refuse_missing()
    path = job.write_file(backend.suffix)
    worker = start_job_worker(FileLoader(backend.key, path), job, threads, backend.package)
    return LoadedWorker(worker, job.classifier.origin, path.stat().st_size)


def start_job_worker(load: Callable[[int], Runtime], job: NetworkJob, threads: int, *imports: str) -> SubprocessWorker:
    return start_worker(f"{job.network} {job.precision.value}", load, threads, job.settings, *imports)


def computes_in(backend: Backend, precision: Precision) -> bool:
    return precision is Precision.INT8 or not backend.int8_only


@dataclass(frozen=True)
class BenchmarkSuite:
    """All cases of one network; ``jobs`` are what its backends run, each started by ``start``."""

    network: str
    settings: Settings
    machine: Machine
    folder: Path
    backends: Sequence[Backend]
    start: Start = start_backend

    @cached_property
    def jobs(self) -> dict[tuple[Precision, Target], NetworkJob]:
        """A job for each precision, and in int8 for each target."""
        return {
            (precision, target): NetworkJob(self.network, precision, target, self.settings, self.folder)
            for precision in self.settings.precisions
            for target in ((MEGENGINE, ONNX) if precision is Precision.INT8 else (MEGENGINE,))
        }

    def job(self, precision: Precision, backend: Backend) -> NetworkJob:
        return self.jobs[precision, get_target(backend.target) if precision is Precision.INT8 else MEGENGINE]

    @cached_property
    def macs(self) -> int:
        """Multiply-accumulates for one image."""
        classifier = next(iter(self.jobs.values())).classifier
        return macs_of(graph_of(source_of(classifier), classifier.image_size))

    def cases(self) -> list[BenchmarkCase]:
        """Every precision in every engine on each number of threads, the other files, and the self-tests."""
        found: list[BenchmarkCase] = []
        for threads in self.settings.threads:
            for precision in self.settings.precisions:
                found += [self.case(precision, backend, threads) for backend in self.select(precision, threads)]
            found += rivals(self.network, self.settings, threads)
            found += peaks(self.network, self.settings, self.machine, threads)
        return found

    def select(self, precision: Precision, threads: int) -> list[Backend]:
        """Backends of one thread have a row for the fewest threads alone; the yardstick is the fastest backend."""
        able = [backend for backend in self.backends if computes_in(backend, precision)]
        if self.settings.yardstick and precision is Precision.FP32:
            there = [backend for backend in BACKENDS if backend.is_installed and backend in able]
            return there[:1] or able[:1]
        return [backend for backend in able if threads == min(self.settings.threads) or not backend.one_thread]

    def case(self, precision: Precision, backend: Backend, threads: int) -> BenchmarkCase:
        job = self.job(precision, backend)
        is_int8 = precision is Precision.INT8
        return BenchmarkCase(
            network=self.network,
            precision=precision,
            engine=backend.name,
            load=partial(self.start, backend, job, threads),
            rounds_otherwise=is_int8 and backend.rounds_otherwise,
            threads=threads,
            answers=job.answers,
            target=backend.target if is_int8 else "",
            macs=self.macs,
        )

    def references(self) -> References:
        """The answers to compare with where MegEngine cannot run the int8 network: those of its simulation."""
        found: References = {}
        if any(backend.target == ONNX.name for backend in self.backends):
            job = self.jobs.get((Precision.INT8, ONNX))
            if job is not None:
                images = cat_batch(self.settings.batch, self.settings.image_size)
                found[job.answers] = (SIMULATED, compute_reference(job.classifier, images))
        return found


def open_for_benchmark(network: str, precision: Precision, target: Target, save: Path = RUNS) -> Classifier:
    """``network`` with weights of a run under ``save``, or other ones of this machine, else with random ones.

    An int8 network that MegEngine can run serves the target onnx with its own scales, too. It comes in mode
    ``quantized`` for MegEngine, and as the simulation of what engines run, ``qat``, for the target onnx.
    """
    mode = Mode.NORMAL if precision is Precision.FP32 else Mode.QUANTIZED if target is MEGENGINE else Mode.QAT
    random = partial(make_random_classifier, network, mode, target=target)
    if not has_weights(spec_of(network), mode, save):
        return random()
    wanted = [None] if mode is Mode.NORMAL else [MEGENGINE.name] if target is MEGENGINE else [ONNX.name, None]
    problem: InputError | None = None
    for name in wanted:
        try:
            return open_classifier(network, mode=mode, save=save, target=name)
        except InputError as error:
            problem = problem or error
    found = random()
    return replace(found, origin=f"{found.origin}; not used: {problem}")


def has_weights(spec: ModelSpec, mode: Mode, save: Path) -> bool:
    """Whether there are weights for ``mode`` on this machine, or in a run under ``save``, without a download."""
    packaged = spec.packaged is not None and spec.packaged.path() is not None
    return packaged or find_newest_run(spec, mode, save) is not None or is_cached(spec, mode.value)
