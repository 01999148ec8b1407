"""The built-in network as an int8 file for ONNX engines: written once into the user's cache, run without MegEngine."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import mgq
from mgq.engine.classifier.classifier import Classifier
from mgq.engine.classifier.deployed_files import open_file
from mgq.engine.classifier.run_lookup import DEFAULT_ARCH, find_newest_run
from mgq.errors import InputError, MgqError
from mgq.events import OnProgress, log_progress
from mgq.export.formats import SUFFIXES
from mgq.io.atomic import atomic_write
from mgq.io.private_cache import cache_folder, is_own
from mgq.machine import WITHOUT_MEGENGINE, has_megengine
from mgq.quantization import option_names
from mgq.quantization.option_names import ONNX, Mode
from mgq.runtime.registry import AUTO, BACKENDS
from mgq.zoo.pretrained import version_in
from mgq.zoo.registry import ModelSpec, spec_of

RANGES = Path(option_names.__file__).parent / "default_ranges"


@dataclass(frozen=True)
class BuiltinFile:
    """The ``.onnx`` file of a network in the cache; it is complete."""

    path: Path

    def open(self, engine: str = AUTO, few: bool = False, threads: int | None = None) -> Classifier:
        """The file as a classifier. Its origin is that of the weights, not the path in the cache."""
        found = open_file(self.path, engine, threads, few=few)
        runtime = found.network.runtime
        return replace(found, origin=f"{runtime.about['origin']}; in {runtime.name} {runtime.version}")


def builtin_file(
    arch: str | None,
    save: Path,
    pretrained: str | None,
    start_megengine: Callable[[], None],
    on_progress: OnProgress = log_progress,
) -> BuiltinFile | None:
    """The file of the built-in network, where that is meant; else None: another one is, or it cannot be kept here.

    It is written where it is not there, is damaged, or is of another version of mgq or of the weights. Raises
    InputError where that needs MegEngine, which is not installed.
    """
    spec = spec_of(arch or DEFAULT_ARCH)
    ranges = RANGES / f"{spec.name}.{ONNX}.json"
    if spec.packaged is None or version_in(pretrained or False) is not None or not ranges.is_file():
        return None
    if not pretrained and find_newest_run(spec, Mode.QUANTIZED, save) is not None:
        return None
    if not any(engine.is_installed for engine in BACKENDS if engine.suffix == SUFFIXES["onnx"]):
        return None
    name = f"{spec.name}.{version_key(spec.packaged.sha256, ranges)}"
    found = find_file(name)
    if found is not None:
        return BuiltinFile(found)
    if not has_megengine():
        raise InputError(f"the file of the built-in network is not there yet, and {WITHOUT_MEGENGINE}; or pass -c FILE")
    if spec.packaged.path() is None:
        return None
    start_megengine()
    found = write_file(spec, name, on_progress)
    return None if found is None else BuiltinFile(found)


def version_key(weights: str, ranges: Path) -> str:
    """The versions that the file depends on: mgq's, the hash of the weights, the ranges."""
    parts = (mgq.__version__, weights, hashlib.sha256(ranges.read_bytes()).hexdigest())
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def folder() -> Path:
    return cache_folder() / "networks"


def find_file(name: str) -> Path | None:
    """The file ``name`` in the cache, whose name ends in the hash of its content; None without a whole one."""
    try:
        if not is_own(folder().stat()):
            return None
        for path in folder().glob(f"{name}.*.onnx"):
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            if is_own(path.stat()) and path.name == f"{name}.{digest}.onnx":
                return path
    except OSError:
        pass
    return None


def write_file(spec: ModelSpec, name: str, on_progress: OnProgress) -> Path | None:
    """Write the file to the cache; None where it cannot be written."""
    from mgq.engine.classifier.dump import source_of
    from mgq.engine.classifier.open import open_classifier
    from mgq.export.onnx.writer import write_onnx

    qat = open_classifier(spec.name, mode=Mode.QAT, pretrained=True, on_progress=on_progress, target=ONNX)
    about = asdict(replace(qat, mode=Mode.QUANTIZED).info())
    try:
        folder().mkdir(mode=0o700, parents=True, exist_ok=True)
        if not is_own(folder().stat()):
            return None
        with atomic_write(folder() / f"{name}.new") as temporary:
            write_onnx(source_of(qat), temporary, image_size=qat.image_size, batch=None, provenance=about)
        new = folder() / f"{name}.new"
        return new.replace(folder() / f"{name}.{hashlib.sha256(new.read_bytes()).hexdigest()}.onnx")
    except (OSError, MgqError):  # a full disk, or a place that cannot be written: it is answered without
        return None
