"""The engines by name: what each reads, and how it is got."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from mgq.errors import InputError, no_such, printable
from mgq.machine import MEGENGINE_MEND

if TYPE_CHECKING:
    from mgq.runtime.protocol import FileRuntime

AUTO = "auto"


@dataclass(frozen=True)
class Engine:
    """An engine that runs files. ``key`` is its name on the command line, ``suffix`` that of its files.

    ``load`` takes a path and a number of threads; it imports the engine's ``package``. ``suits``: whether the engine is
    the choice for a file of its kind where nobody names one; ``reads``: whether it runs such a file at all.
    ``shows_layers``: whether it gives more outputs than logits. ``starts_soon``: whether it is the choice where no more
    than a few pictures are asked about, which takes less than to start the others.
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


def openvino(path: Path, threads: int) -> FileRuntime:
    from mgq.runtime.openvino import OpenVino

    return OpenVino(path, threads)


def onnxruntime(path: Path, threads: int) -> FileRuntime:
    from mgq.runtime.onnxruntime import OnnxRuntime

    return OnnxRuntime(path, threads)


def lite(path: Path, threads: int) -> FileRuntime:
    from mgq.runtime.megengine_lite import LiteRuntime

    return LiteRuntime(path, threads)


def native(path: Path, threads: int) -> FileRuntime:
    from mgq.runtime.native import NativeRuntime

    return NativeRuntime(path, threads)


def library(path: Path, threads: int) -> FileRuntime:
    from mgq.runtime.library import LibraryRuntime

    return LibraryRuntime(path, threads)


def suits_onnxruntime(path: Path) -> bool:
    from mgq.runtime.engine_faults import onnxruntime_is_sound

    return onnxruntime_is_sound()


def is_for_native(path: Path) -> bool:
    """Whether the native engine runs ``path``, and has its fastest kernels here."""
    from mgq.export.native.cpu import LEVELS, NATIVE, level_called

    return level_called(NATIVE) is LEVELS[0] and runs_in_native(path)


def runs_in_native(path: Path) -> bool:
    """What it compiles to find out is cached."""
    from mgq.runtime.native import runs

    return runs(path)


ENGINES = (
    Engine("openvino", "OpenVINO", "openvino", ".onnx", openvino),
    Engine(
        "onnxruntime", "ONNX Runtime", "onnxruntime", ".onnx", onnxruntime, suits=suits_onnxruntime, starts_soon=True
    ),
    Engine(
        "native",
        "native",
        "llvmlite",
        ".onnx",
        native,
        mend="pip install 'mgq[native]'",
        suits=is_for_native,
        reads=runs_in_native,
        shows_layers=False,
    ),
    Engine("library", "native library", "ctypes", ".so", library, shows_layers=False),
    Engine("lite", "MegEngine Lite", "megenginelite", ".megengine", lite, mend=MEGENGINE_MEND),
)
"""Where they read the same files, the one that is chosen unless another is named comes first: the faster, but for the
native engine, which takes one core for one image however many it is given."""


def engine_names() -> tuple[str, ...]:
    """What ``--engine`` may say."""
    return (AUTO, *(engine.key for engine in ENGINES))


def engine_called(key: str) -> Engine:
    """Raises InputError, which lists them, where there is no engine ``key``."""
    for engine in ENGINES:
        if engine.key == key:
            return engine
    raise no_such("engine", key, engine_names())


def engine_for(path: Path, key: str = AUTO, few: bool = False) -> Engine:
    """The engine called ``key``, or the fastest installed one, that reads ``path``; ``few``: the fastest for a few
    pictures, its start included.

    Raises InputError where no engine has that name, it does not read such files, or it is not installed.
    """
    if key != AUTO:
        engine_called(key)
    reading = [engine for engine in ENGINES if engine.suffix == path.suffix.lower()]
    if not reading:
        known = " or ".join(dict.fromkeys(engine.suffix for engine in ENGINES))
        raise InputError(f"no engine reads {printable(path)}: give a file that ends in {known}")
    chosen = [engine for engine in reading if key in (AUTO, engine.key)]
    if not chosen:
        others = " or ".join(engine.key for engine in reading)
        raise InputError(f"{key} does not read {path.suffix} files: leave --engine out, or pass {others}")
    if few:
        chosen.sort(key=lambda engine: not engine.starts_soon)
    installed = (engine for engine in chosen if engine.is_installed)
    # One by one, for to ask the native engine is to compile the network.
    found = next((engine for engine in installed if key != AUTO or engine.suits(path)), chosen[0])
    found.refuse_missing()
    return found


def load(path: Path, key: str = AUTO, threads: int = 1) -> FileRuntime:
    """``path`` in the engine called ``key``, ready to run. Raises as :func:`engine_for` and the engines do."""
    return engine_for(path, key).load(path, threads)
