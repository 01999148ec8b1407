"""The backends: one record each, which ``infer``, ``bench``, ``doctor``, ``report`` and ``--version`` read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from mgq.errors import InputError, no_such, printable
from mgq.machine import MEGENGINE_MEND, PACKAGES
from mgq.quantization.option_names import MEGENGINE, ONNX

if TYPE_CHECKING:
    from mgq.runtime.protocol import FileRuntime

AUTO = "auto"


def refuse_to_load(path: Path, threads: int) -> FileRuntime:
    raise InputError(f"no file is run here: give {printable(path)} to a backend that reads files")


@dataclass(frozen=True, kw_only=True)
class Backend:
    """What runs networks. ``key`` is its name on the command line, ``name`` the one that is shown.

    ``package`` is the module that it imports, ``distribution`` what pip calls it, ``mend`` how to get it, ``probe`` a
    program that ends well where it works. ``target`` is what its int8 networks are quantized for.

    ``suffix`` is that of its files; empty where it runs networks in memory. ``load`` takes a path and a number of
    threads, and imports the package. ``suits``: whether the backend is the choice for a file of its kind where nobody
    names one. ``reads``: whether it runs such a file at all. To ask either compiles nothing. ``shows_layers``: whether
    it gives more outputs than logits. ``starts_soon``: whether it is the choice for a few images, because the others
    take longer to start.

    ``int8_only`` and ``one_thread`` are its limits. ``compared``: whether ``bench`` measures it on networks of the zoo;
    a file that it reads is measured in any case.
    """

    key: str
    name: str
    package: str
    suffix: str
    distribution: str
    target: str = ONNX
    load: Callable[[Path, int], FileRuntime] = refuse_to_load
    mend: str = "pip install 'mgq[deploy]'"
    probe: str = ""
    suits: Callable[[Path], bool] = lambda path: True
    reads: Callable[[Path], bool] = lambda path: True
    shows_layers: bool = True
    starts_soon: bool = False
    int8_only: bool = False
    one_thread: bool = False
    compared: bool = True

    @property
    def is_installed(self) -> bool:
        return find_spec(self.package) is not None

    @property
    def rounds_otherwise(self) -> bool:
        """Whether its int8 answers may differ from MegEngine's in the last step: it rounds ties to even."""
        return self.target != MEGENGINE

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
        key="native",
        name="native",
        package="llvmlite",
        suffix=".onnx",
        distribution="llvmlite",
        load=open_in_native,
        mend="pip install 'mgq[native]'",
        suits=is_for_native,
        reads=can_run_native,
        shows_layers=False,
        int8_only=True,
    ),
    Backend(
        key="openvino",
        name="OpenVINO",
        package="openvino",
        suffix=".onnx",
        distribution="openvino",
        load=open_in_openvino,
        probe="import openvino; openvino.Core().available_devices",
    ),
    Backend(
        key="onnxruntime",
        name="ONNX Runtime",
        package="onnxruntime",
        suffix=".onnx",
        distribution="onnxruntime",
        load=open_in_onnxruntime,
        suits=suits_onnxruntime,
        starts_soon=True,
    ),
    Backend(
        key="library",
        name="native library",
        package="ctypes",
        suffix=".so",
        distribution="mgq",
        load=open_library,
        shows_layers=False,
        int8_only=True,
        compared=False,  # the same kernels as in the native backend
    ),
    Backend(
        key="lite",
        name="MegEngine Lite",
        package="megenginelite",
        suffix=".megengine",
        distribution="megengine",
        target=MEGENGINE,
        load=open_in_lite,
        mend=MEGENGINE_MEND,
    ),
)
"""The backends that run files, the fastest first: of those that read a file, the first that suits it is the default."""
TRACED, EAGER = (
    Backend(
        key=key,
        name=f"MegEngine {key}",
        package="megengine",
        suffix="",
        distribution="megengine",
        target=MEGENGINE,
        mend=MEGENGINE_MEND,
        one_thread=True,
    )
    for key in ("traced", "eager")
)
COMPARED = tuple(backend for backend in reversed((*BACKENDS, TRACED, EAGER)) if backend.compared)
"""Those that ``bench`` measures, in the order of its table. The first that runs a network is the reference for the
answers of the others."""


def list_packages() -> dict[str, str]:
    """What numbers depend on besides Python, backends included: shown name -> what pip calls it."""
    known = set(PACKAGES.values())
    return {**PACKAGES, **{its.name: its.distribution for its in reversed(BACKENDS) if its.distribution not in known}}


def backend_names() -> tuple[str, ...]:
    """What ``--engine`` may say."""
    return (AUTO, *(backend.key for backend in BACKENDS))


def get_backend(key: str) -> Backend:
    """The backend ``key``. Raises InputError, which lists them, where there is none."""
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
