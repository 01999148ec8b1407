"""The engines that take part, and how each gets its network."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from types import MappingProxyType
from typing import TypeAlias

from mgq.bench.contest import Contestant, Loaded
from mgq.bench.settings import Precision, Settings, counted
from mgq.engine.dump import dump_classifier
from mgq.engine.networks import Classifier, newest_run, open_classifier, random_classifier
from mgq.errors import FailureError, InputError
from mgq.quant.modes import Mode
from mgq.runtime.lite import LiteRuntime
from mgq.runtime.megengine import EagerRuntime, TracedRuntime
from mgq.runtime.registry import engine_called
from mgq.zoo.registry import ModelSpec, spec_of
from mgq.zoo.weights import is_cached

MODES = {Precision.FP32: Mode.NORMAL, Precision.INT8: Mode.QUANTIZED}
RUNS = Path("runs")


@dataclass(frozen=True)
class Job:
    """What an engine is to run: one network in one precision. ``file`` is a free path without an ending."""

    network: str
    precision: Precision
    settings: Settings
    file: Path
    classifier: Callable[[], Classifier]


Loader: TypeAlias = Callable[[Job], Loaded]
"""Gets an engine ready to run a job. Raises an MgqError where it is not there: the reason and the mend."""


def eager(job: Job) -> Loaded:
    classifier = job.classifier()
    return Loaded(EagerRuntime(classifier.network, threads=job.settings.threads), classifier.origin)


def traced(job: Job) -> Loaded:
    classifier = job.classifier()
    return Loaded(TracedRuntime(classifier.network, threads=job.settings.threads), classifier.origin)


def lite(job: Job) -> Loaded:
    classifier = replace(job.classifier(), image_size=job.settings.image_size)
    path = job.file.with_name(f"{job.file.name}.megengine")
    dump_classifier(classifier, path, batch=job.settings.batch)
    return Loaded(LiteRuntime(path, threads=job.settings.threads), classifier.origin, path.stat().st_size)


def in_onnx(key: str, job: Job) -> Loaded:
    """The very same network as an ONNX file, int8 with MegEngine's scales."""
    engine = engine_called(key)
    if not engine.is_installed:
        raise InputError(engine.mend)
    classifier = replace(job.classifier(), image_size=job.settings.image_size)
    path = job.file.with_name(f"{job.file.name}.onnx")
    if not path.exists():
        dump_classifier(classifier, path, batch=job.settings.batch)
    return Loaded(engine.load(path, job.settings.threads), classifier.origin, path.stat().st_size)


# In the order of the table. The first one that runs a network is the reference for the answers of the others.
ENGINES: Mapping[str, Loader] = MappingProxyType(
    {
        "MegEngine eager": eager,
        "MegEngine traced": traced,
        "MegEngine Lite": lite,
        "ONNX Runtime": partial(in_onnx, "onnxruntime"),
        "OpenVINO": partial(in_onnx, "openvino"),
    }
)
ROUND_OTHERWISE = ("ONNX Runtime", "OpenVINO")


def contestants(settings: Settings, folder: Path, engines: Mapping[str, Loader]) -> list[Contestant]:
    """Every network in every precision in every engine. Networks are built once, when first asked for."""
    found = []
    for network in settings.networks:
        for precision in settings.precisions:
            file = folder / f"{network}.{precision.value}"
            job = Job(network, precision, settings, file, cache(partial(classifier_for, network, precision)))
            found += [
                Contestant(network, precision, name, partial(loaded, load, job), name in ROUND_OTHERWISE)
                for name, load in engines.items()
            ]
    return found


def loaded(load: Loader, job: Job) -> Loaded:
    """What ``load`` gives. Raises FailureError where the engine took another number of threads than asked for."""
    result = load(job)
    if result.runtime.threads != job.settings.threads:
        runtime = result.runtime
        raise FailureError(
            f"{runtime.name} runs on {counted(runtime.threads, 'thread')} where {job.settings.threads} were asked for"
        )
    return result


def classifier_for(network: str, precision: Precision) -> Classifier:
    """``network`` with the weights that are at hand, else with random ones, which serve speed as well."""
    mode = MODES[precision]
    if not weights_at_hand(spec_of(network), mode):
        return random_classifier(network, mode)
    try:
        return open_classifier(network, mode=mode, save=RUNS)
    except InputError as error:
        random = random_classifier(network, mode)
        return replace(random, origin=f"{random.origin}; not used: {error}")


def weights_at_hand(spec: ModelSpec, mode: Mode) -> bool:
    """Whether there are weights for ``mode`` on this machine, however good: no download."""
    packaged = spec.packaged is not None and spec.packaged.path() is not None
    return packaged or newest_run(spec, mode, RUNS) is not None or is_cached(spec, mode.value)
