"""Deployed files as classifiers, and classifiers by way of a file in the engine of one's choice."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

from mgq.engine.classifier.dump import dump_classifier, format_for
from mgq.engine.classifier.open import Classifier
from mgq.engine.classifier.runtime_module import RuntimeModule
from mgq.errors import InputError, naming, printable
from mgq.export.formats import SUFFIXES
from mgq.machine import usable_cores
from mgq.quantization.modes import Mode
from mgq.runtime.registry import AUTO, choose_backend, get_backend
from mgq.weights.checkpoint import names_in
from mgq.weights.preprocessing import preprocessing_in
from mgq.zoo.registry import spec_for


def open_file(path: Path, key: str = AUTO, threads: int | None = None, arch: str | None = None) -> Classifier:
    """The network in ``path``, an ``.onnx`` or ``.megengine`` file of mgq's, in the engine called ``key``.

    Raises InputError where the file is damaged, is not mgq's, is of another ``arch``, or the engine cannot run it.
    """
    engine = choose_backend(path, key)
    runtime = engine.load(path, threads or usable_cores())
    about = runtime.about
    try:
        with naming(printable(path)):
            spec, mode = spec_for(about["arch"], dict(about["options"])), Mode(about["mode"])
        classes, size = names_in(about["classes"]), about["image_size"]
        options, recipe = dict(about["options"]), dict(about["recipe"])
        preprocessing = preprocessing_in(about) or spec.preprocessing
    except (KeyError, TypeError, ValueError):
        raise InputError(f"{printable(path)} does not say what it holds: write it by `mgq dump`") from None
    image = spec.only_size or (size, size)
    if (len(classes), image) != (runtime.classes, tuple(runtime.takes[2:])):
        raise InputError(f"{printable(path)} says something else than it holds: write it by `mgq dump`")
    if arch is not None and arch != spec.name:
        raise InputError(f"{printable(path)} is a network of {spec.name}, not of {arch}; leave out -a")
    network = RuntimeModule(runtime, path.stat().st_size)
    origin = f"{printable(path)}, in {runtime.name} {runtime.version}"
    file = (path, engine.key)
    return Classifier(network, None, spec, mode, classes, size, origin, options, recipe, file, None, preprocessing)


def attach_backend(classifier: Classifier, key: str, threads: int | None = None) -> Classifier:
    """``classifier`` in the engine called ``key``, by way of a temporary file. Raises as the dump and the engine do."""
    with tempfile.TemporaryDirectory(prefix="mgq-") as folder:
        path = write_for_backend(classifier, key, Path(folder))
        engine = choose_backend(path, key)
        runtime = engine.load(path, threads or usable_cores())
        network = RuntimeModule(runtime, path.stat().st_size)
    origin = f"{classifier.origin}; in {runtime.name} {runtime.version}"
    return replace(classifier, network=network, origin=origin, made_from=(classifier, engine.key))


def write_for_backend(classifier: Classifier, key: str, folder: Path) -> Path:
    """A file of ``classifier`` in ``folder`` that the engine called ``key`` reads. Raises as the dump does."""
    suffix = SUFFIXES[format_for(classifier)] if key == AUTO else get_backend(key).suffix
    path = folder / f"network{suffix}"
    dump_classifier(classifier, path, batch=None if suffix == SUFFIXES["onnx"] else 1)
    return path
