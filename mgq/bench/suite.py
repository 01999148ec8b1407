"""The engines that take part: the files that they read are written here, and each is given to a process of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from types import MappingProxyType
from typing import TypeAlias

from mgq.bench.cases import BenchmarkCase, LoadedWorker, References
from mgq.bench.file_cases import cat_batch as cat_batch
from mgq.bench.file_cases import peaks, rivals
from mgq.bench.file_cases import precision_of as precision_of
from mgq.bench.file_cases import start_worker as start_worker
from mgq.bench.settings import Precision, Settings
from mgq.bench.worker_loaders import FromCheckpoint, FromFile
from mgq.bench.workers import SubprocessWorker
from mgq.engine.classifier.dump import dump_classifier, source_of
from mgq.engine.classifier.open import Classifier, find_newest_run, make_random_classifier, open_classifier
from mgq.engine.classifier.parity import compute_reference
from mgq.errors import FailureError, InputError
from mgq.export.formats import SUFFIXES
from mgq.graph.layer_graph import graph_of, macs_of
from mgq.quantization.modes import Mode
from mgq.quantization.targets import MEGENGINE, ONNX, Target
from mgq.runtime.protocol import Runtime
from mgq.runtime.registry import BACKENDS as FILE_ENGINES
from mgq.runtime.registry import get_backend
from mgq.system.environment import Machine
from mgq.zoo.registry import ModelSpec, spec_of
from mgq.zoo.weight_loading import is_cached

RUNS = Path("runs")
SIMULATED = "MegEngine's simulation"


@dataclass(frozen=True)
class NetworkJob:
    """What an engine is to run: one network in one precision, written for ``target``.

    Files come into ``folder``, once for all who ask; the network is built when first asked for.
    """

    network: str
    precision: Precision
    target: Target
    settings: Settings
    folder: Path

    @cached_property
    def classifier(self) -> Classifier:
        return replace(
            open_for_benchmark(self.network, self.precision, self.target), image_size=self.settings.image_size
        )

    @property
    def answers(self) -> str:
        """The name of what all who run it have to answer alike."""
        return f"{self.network} {self.precision.value} {self.target.name}"

    def file(self, suffix: str) -> Path:
        return self.folder / f"{self.answers.replace(' ', '.')}{suffix}"

    @cached_property
    def checkpoint(self) -> Path:
        path = self.file(".safetensors")
        self.classifier.write_checkpoint(path)
        return path

    @cached_property
    def megengine(self) -> Path:
        return self.dumped("megengine")

    @cached_property
    def onnx(self) -> Path:
        return self.dumped("onnx")

    def dumped(self, kind: str) -> Path:
        path = self.file(SUFFIXES[kind])
        dump_classifier(self.classifier, path, batch=self.settings.batch, kind=kind)
        return path


Start: TypeAlias = Callable[[NetworkJob, int], LoadedWorker]
"""Gets an engine going with a job on so many threads. Raises an MgqError where it cannot: the reason and the mend."""


def start_in_megengine(traced: bool, job: NetworkJob, threads: int) -> LoadedWorker:
    if threads > 1:
        name = "traced" if traced else "eager"
        raise FailureError(f"MegEngine {name} computes on one thread; for {threads}, use MegEngine Lite")
    mode = Mode.NORMAL if job.precision is Precision.FP32 else Mode.QUANTIZED
    load = FromCheckpoint(traced, job.checkpoint, mode.value, job.settings.image_size)
    return LoadedWorker(start_job_worker(load, job, threads, "mgq.runtime.megengine"), job.classifier.origin)


def start_in_backend(key: str, job: NetworkJob, threads: int) -> LoadedWorker:
    """An engine that reads a file."""
    engine = get_backend(key)
    engine.refuse_missing()
    path = job.megengine if engine.suffix == ".megengine" else job.onnx
    return LoadedWorker(
        start_job_worker(FromFile(key, path), job, threads, engine.package), job.classifier.origin, path.stat().st_size
    )


def start_job_worker(load: Callable[[int], Runtime], job: NetworkJob, threads: int, *imports: str) -> SubprocessWorker:
    return start_worker(f"{job.network} {job.precision.value}", load, threads, job.settings, *imports)


@dataclass(frozen=True)
class BenchmarkBackend:
    """An engine that takes part: how it starts, what its int8 networks are quantized for, and in what it computes."""

    start: Start
    target: Target
    rounds_otherwise: bool = False
    precisions: tuple[Precision, ...] = tuple(Precision)


# In the order of the table. The first one that runs a network is the reference for the answers of the others.
BENCHMARK_BACKENDS: Mapping[str, BenchmarkBackend] = MappingProxyType(
    {
        "MegEngine eager": BenchmarkBackend(partial(start_in_megengine, False), MEGENGINE),
        "MegEngine traced": BenchmarkBackend(partial(start_in_megengine, True), MEGENGINE),
        "MegEngine Lite": BenchmarkBackend(partial(start_in_backend, "lite"), MEGENGINE),
        "ONNX Runtime": BenchmarkBackend(partial(start_in_backend, "onnxruntime"), ONNX, rounds_otherwise=True),
        "OpenVINO": BenchmarkBackend(partial(start_in_backend, "openvino"), ONNX, rounds_otherwise=True),
        "native": BenchmarkBackend(
            partial(start_in_backend, "native"), ONNX, rounds_otherwise=True, precisions=(Precision.INT8,)
        ),
    }
)


@dataclass(frozen=True)
class BenchmarkSuite:
    """All that take part in the contest of one network; ``jobs`` are what its engines run."""

    network: str
    settings: Settings
    machine: Machine
    folder: Path
    backends: Mapping[str, BenchmarkBackend]

    @cached_property
    def jobs(self) -> dict[tuple[Precision, Target], NetworkJob]:
        """A job for each precision, and in int8 for each target."""
        return {
            (precision, target): NetworkJob(self.network, precision, target, self.settings, self.folder)
            for precision in self.settings.precisions
            for target in ((MEGENGINE, ONNX) if precision is Precision.INT8 else (MEGENGINE,))
        }

    def job(self, precision: Precision, backend: BenchmarkBackend) -> NetworkJob:
        return self.jobs[precision, backend.target if precision is Precision.INT8 else MEGENGINE]

    @cached_property
    def macs(self) -> int:
        """What one picture takes to multiply and add."""
        classifier = next(iter(self.jobs.values())).classifier
        return macs_of(graph_of(source_of(classifier), classifier.image_size))

    def cases(self) -> list[BenchmarkCase]:
        """Every precision in every engine on each number of threads, the other files, and the self-tests."""
        found: list[BenchmarkCase] = []
        for threads in self.settings.threads:
            for precision in self.settings.precisions:
                found += [self.case(precision, name, threads) for name in self.taking_part(precision, threads)]
            found += rivals(self.network, self.settings, threads)
            found += peaks(self.network, self.settings, self.machine, threads)
        return found

    def taking_part(self, precision: Precision, threads: int) -> list[str]:
        """Engines of one thread are no row where more are asked for besides; as a yardstick, the fastest one is."""
        names = [name for name, backend in self.backends.items() if precision in backend.precisions]
        if self.settings.yardstick and precision is Precision.FP32:
            there = [engine.name for engine in FILE_ENGINES if engine.is_installed and engine.name in names]
            return there[:1] or names[:1]
        single = ("MegEngine eager", "MegEngine traced")
        return [name for name in names if threads == min(self.settings.threads) or name not in single]

    def case(self, precision: Precision, name: str, threads: int) -> BenchmarkCase:
        backend = self.backends[name]
        job = self.job(precision, backend)
        is_int8 = precision is Precision.INT8
        return BenchmarkCase(
            network=self.network,
            precision=precision,
            engine=name,
            load=partial(backend.start, job, threads),
            rounds_otherwise=is_int8 and backend.rounds_otherwise,
            threads=threads,
            answers=job.answers,
            target=backend.target.name if is_int8 else "",
            macs=self.macs,
        )

    def references(self) -> References:
        """Whose answers count where MegEngine itself cannot run the int8 network: its simulation's."""
        found: References = {}
        if any(backend.target is ONNX for backend in self.backends.values()):
            job = self.jobs.get((Precision.INT8, ONNX))
            if job is not None:
                images = cat_batch(self.settings.batch, self.settings.image_size)
                found[job.answers] = (SIMULATED, compute_reference(job.classifier, images))
        return found


def open_for_benchmark(network: str, precision: Precision, target: Target) -> Classifier:
    """``network`` with the weights that are at hand, else with random ones, which serve speed as well.

    An int8 network that MegEngine can run serves the target onnx with its own scales, too. It comes in mode
    ``quantized`` for MegEngine, and as the simulation of what engines run, ``qat``, for the target onnx.
    """
    mode = Mode.NORMAL if precision is Precision.FP32 else Mode.QUANTIZED if target is MEGENGINE else Mode.QAT
    random = partial(make_random_classifier, network, mode, target=target)
    if not has_weights(spec_of(network), mode):
        return random()
    wanted = [None] if mode is Mode.NORMAL else [MEGENGINE.name] if target is MEGENGINE else [ONNX.name, None]
    problem: InputError | None = None
    for name in wanted:
        try:
            return open_classifier(network, mode=mode, save=RUNS, target=name)
        except InputError as error:
            problem = problem or error
    found = random()
    return replace(found, origin=f"{found.origin}; not used: {problem}")


def has_weights(spec: ModelSpec, mode: Mode) -> bool:
    """Whether there are weights for ``mode`` on this machine, however good: no download."""
    packaged = spec.packaged is not None and spec.packaged.path() is not None
    return packaged or find_newest_run(spec, mode, RUNS) is not None or is_cached(spec, mode.value)
