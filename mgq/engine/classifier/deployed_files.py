"""Opens deployed files as classifiers, and runs a classifier in another engine by way of a temporary file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mgq.engine.classifier.classifier import Classifier
from mgq.errors import InputError, name_in_errors, printable
from mgq.export.formats import SUFFIXES
from mgq.io.records import record_of
from mgq.io.temporary_folders import temporary_folder
from mgq.machine import usable_cores
from mgq.quantization.option_names import Mode
from mgq.runtime.protocol import FileRuntime
from mgq.runtime.registry import AUTO, choose_backend, get_backend
from mgq.weights.preprocessing import Preprocessing
from mgq.zoo.registry import spec_for


@dataclass(frozen=True)
class FileNetwork:
    """A deployed file in an engine, where a classifier has its network. ``size`` is the file's, in bytes."""

    runtime: FileRuntime
    size: int


@dataclass(frozen=True)
class DeployedInfo:
    """The metadata of a deployed file that are needed to run it."""

    arch: str
    mode: str
    classes: tuple[str, ...]
    image_size: int
    options: Mapping[str, Any]
    recipe: Mapping[str, Any]
    preprocessing: Preprocessing | None = None


def open_file(
    path: Path, key: str = AUTO, threads: int | None = None, arch: str | None = None, few: bool = False
) -> Classifier:
    """The network in ``path``, a deployed file of mgq's, in the engine called ``key``.

    ``few``: for no more than a few pictures, see :func:`mgq.runtime.registry.choose_backend`.

    Raises InputError where the file is damaged, is not mgq's, is of another ``arch``, or the engine cannot run it.
    """
    engine = choose_backend(path, key, few)
    runtime = engine.load(path, threads or usable_cores())
    try:
        about = record_of(DeployedInfo, runtime.about, others=True)
        with name_in_errors(printable(path)):
            spec, mode = spec_for(about.arch, about.options), Mode(about.mode)
    except ValueError:
        raise InputError(
            f"{printable(path)} does not say what it holds: write it by `mgq dump`, or, of another program's file, by "
            "`mgq calibrate -c`"
        ) from None
    classes, size = about.classes, about.image_size
    if (len(classes), spec.only_size or (size, size)) != (runtime.classes, tuple(runtime.takes[2:])):
        raise InputError(f"{printable(path)} says something else than it holds: write it by `mgq dump`")
    if arch is not None and arch != spec.name:
        raise InputError(f"{printable(path)} is a network of {spec.name}, not of {arch}; leave out -a")
    network = FileNetwork(runtime, path.stat().st_size)
    origin = f"{printable(path)}, in {runtime.name} {runtime.version}"
    return Classifier(
        network=network,
        fake_quantized=None,
        spec=spec,
        mode=mode,
        classes=classes,
        image_size=size,
        origin=origin,
        options=about.options,
        recipe=about.recipe,
        file=(path, engine.key),
        preprocessing=about.preprocessing or spec.preprocessing,
    )


def attach_backend(classifier: Classifier, key: str, threads: int | None = None) -> Classifier:
    """``classifier`` in the engine called ``key``, by way of a temporary file. Raises as the dump and the engine do."""
    with temporary_folder() as folder:
        path = write_for_backend(classifier, key, folder)
        engine = choose_backend(path, key)
        runtime = engine.load(path, threads or usable_cores())
        network = FileNetwork(runtime, path.stat().st_size)
    origin = f"{classifier.origin}; in {runtime.name} {runtime.version}"
    return replace(classifier, network=network, origin=origin, made_from=(classifier, engine.key))


def write_for_backend(classifier: Classifier, key: str, folder: Path) -> Path:
    """A file of ``classifier`` in ``folder`` that the engine called ``key`` reads. Raises as the dump does."""
    from mgq.engine.classifier.dump import dump_classifier, format_for

    suffix = SUFFIXES[format_for(classifier)] if key == AUTO else get_backend(key).suffix
    path = folder / f"network{suffix}"
    dump_classifier(classifier, path, batch=None if suffix == SUFFIXES["onnx"] else 1)
    return path
