"""The engines by name: what each reads, and how it is got."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from mgq.errors import InputError, no_such, printable
from mgq.machine import MEGENGINE_MEND

if TYPE_CHECKING:
    from mgq.runtime.protocol import FileRuntime

AUTO = "auto"


@dataclass(frozen=True)
class Backend:
    """An engine that runs files. ``key`` is its name on the command line, ``suffix`` that of its files.

    ``load`` takes a path and a number of threads; it imports the engine's ``package``. ``suits``: whether the engine is
    the choice for a file of its kind where nobody names one; ``reads``: whether it runs such a file at all. To ask
    either compiles nothing. ``shows_layers``: whether it gives more outputs than logits. ``starts_soon``: whether it is
    the choice where no more than a few pictures are asked about, which takes less than to start the others.
    """

    key: str
    name: str
    package: str
    suffix: str
    load: Callable[[Path, int], FileRuntime]
    mend: str = "pip install 'mgq[deploy]'"
    suits: Callable[[Path], bool] = lambda path: True
    reads: Callable[[Path], bool] = lambda path: True
    shows_layers: bool = True
    starts_soon: bool = False

    @property
    def is_installed(self) -> bool:
        return find_spec(self.package) is not None

    def refuse_missing(self) -> None:
        """Raises InputError, which says how to get it, where it is not installed."""
        if not self.is_installed:
            raise InputError(f"{self.name} is not installed: {self.mend}")


def open_in_openvino(path: Path, threads: int) -> FileRuntime:
    from mgq.runtime.openvino import OpenVino

    return OpenVino(path, threads)


def open_in_onnxruntime(path: Path, threads: int) -> FileRuntime:
    from mgq.runtime.onnxruntime import OnnxRuntime

    return OnnxRuntime(path, threads)


def open_in_lite(path: Path, threads: int) -> FileRuntime:
    from mgq.runtime.megengine_lite import LiteRuntime

    return LiteRuntime(path, threads)


def open_in_native(path: Path, threads: int) -> FileRuntime:
    from mgq.runtime.native import NativeRuntime

    return NativeRuntime(path, threads)


def open_library(path: Path, threads: int) -> FileRuntime:
    from mgq.runtime.library import LibraryRuntime

    return LibraryRuntime(path, threads)


def suits_onnxruntime(path: Path) -> bool:
    from mgq.runtime.engine_faults import onnxruntime_is_sound

    return onnxruntime_is_sound()


def is_for_native(path: Path) -> bool:
    """Whether the native engine runs ``path``, and has the kernels here with which it was measured as the fastest."""
    from mgq.export.native.cpu import LEVELS, NATIVE, get_level

    return get_level(NATIVE) is LEVELS[0] and can_run_native(path)


def can_run_native(path: Path) -> bool:
    from mgq.runtime.native import can_run

    return can_run(path)


BACKENDS = (
    Backend(
        "native",
        "native",
        "llvmlite",
        ".onnx",
        open_in_native,
        mend="pip install 'mgq[native]'",
        suits=is_for_native,
        reads=can_run_native,
        shows_layers=False,
    ),
    Backend("openvino", "OpenVINO", "openvino", ".onnx", open_in_openvino),
    Backend(
        "onnxruntime",
        "ONNX Runtime",
        "onnxruntime",
        ".onnx",
        open_in_onnxruntime,
        suits=suits_onnxruntime,
        starts_soon=True,
    ),
    Backend("library", "native library", "ctypes", ".so", open_library, shows_layers=False),
    Backend("lite", "MegEngine Lite", "megenginelite", ".megengine", open_in_lite, mend=MEGENGINE_MEND),
)
"""Where they read the same files the faster comes first: it is chosen where it suits them, unless another is named."""


def backend_names() -> tuple[str, ...]:
    """What ``--engine`` may say."""
    return (AUTO, *(backend.key for backend in BACKENDS))


def get_backend(key: str) -> Backend:
    """Raises InputError, which lists them, where there is no engine ``key``."""
    for backend in BACKENDS:
        if backend.key == key:
            return backend
    raise no_such("engine", key, backend_names())


def choose_backend(path: Path, key: str = AUTO, few: bool = False) -> Backend:
    """The engine called ``key``, or the fastest installed one, that reads ``path``; ``few``: the fastest for a few
    pictures, its start included.

    Raises InputError where no engine has that name, it does not read such files, or it is not installed.
    """
    if key != AUTO:
        get_backend(key)
    reading = [backend for backend in BACKENDS if backend.suffix == path.suffix.lower()]
    if not reading:
        known = " or ".join(dict.fromkeys(backend.suffix for backend in BACKENDS))
        raise InputError(f"no engine reads {printable(path)}: give a file that ends in {known}")
    chosen = [backend for backend in reading if key in (AUTO, backend.key)]
    if not chosen:
        others = " or ".join(backend.key for backend in reading)
        raise InputError(f"{key} does not read {path.suffix} files: leave --engine out, or pass {others}")
    if few:
        chosen.sort(key=lambda backend: not backend.starts_soon)
    found = chosen[0] if key != AUTO else fastest(chosen, path)
    found.refuse_missing()
    return found


def fastest(engines: Sequence[Backend], path: Path) -> Backend:
    """The first that suits ``path``, else the first that runs it at all, else one that is not installed."""
    installed = [backend for backend in engines if backend.is_installed]
    suiting = (backend for backend in installed if backend.suits(path))
    reading = (backend for backend in installed if backend.reads(path))
    missing = (backend for backend in engines if not backend.is_installed)
    return next(chain(suiting, reading, missing, engines))


def load(path: Path, key: str = AUTO, threads: int = 1) -> FileRuntime:
    """``path`` in the engine called ``key``, ready to run. Raises as :func:`choose_backend` and the engines do."""
    return choose_backend(path, key).load(path, threads)
