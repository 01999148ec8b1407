"""The engines by name: what each reads, and how it is got."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from mgq.errors import InputError, no_such, printable

if TYPE_CHECKING:
    from mgq.runtime.protocol import FileRuntime

AUTO = "auto"


@dataclass(frozen=True)
class Engine:
    """An engine that runs files. ``key`` is its name on the command line, ``suffix`` that of its files.

    ``load`` takes a path and a number of threads; it imports the engine's ``package``. ``suits``: whether the engine is
    the choice for a file of its kind where nobody names one; ``reads``: whether it runs such a file at all. To ask
    either compiles nothing.
    ``shows_layers``: whether it gives more outputs than logits.
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


def is_for_native(path: Path) -> bool:
    """Whether the native engine runs ``path``, and has the kernels here with which it was measured as the fastest."""
    from mgq.export.native.cpu import LEVELS, NATIVE, level_called

    return level_called(NATIVE) is LEVELS[0] and runs_in_native(path)


def runs_in_native(path: Path) -> bool:
    from mgq.runtime.native import runs

    return runs(path)


ENGINES = (
    Engine(
        "native",
        "native",
        "llvmlite",
        ".onnx",
        native,
        mend="pip install llvmlite",
        suits=is_for_native,
        reads=runs_in_native,
        shows_layers=False,
    ),
    Engine("openvino", "OpenVINO", "openvino", ".onnx", openvino),
    Engine("onnxruntime", "ONNX Runtime", "onnxruntime", ".onnx", onnxruntime),
    Engine("library", "native library", "ctypes", ".so", library, shows_layers=False),
    Engine("lite", "MegEngine Lite", "megenginelite", ".megengine", lite, "pip install --force-reinstall megengine"),
)
"""Where they read the same files the faster comes first: it is chosen where it suits them, unless another is named."""


def engine_names() -> tuple[str, ...]:
    """What ``--engine`` may say."""
    return (AUTO, *(engine.key for engine in ENGINES))


def engine_called(key: str) -> Engine:
    """Raises InputError, which lists them, where there is no engine ``key``."""
    for engine in ENGINES:
        if engine.key == key:
            return engine
    raise no_such("engine", key, engine_names())


def engine_for(path: Path, key: str = AUTO) -> Engine:
    """The engine called ``key``, or the fastest installed one, that reads ``path``.

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
    found = chosen[0] if key != AUTO else fastest(chosen, path)
    found.refuse_missing()
    return found


def fastest(engines: Sequence[Engine], path: Path) -> Engine:
    """The first that suits ``path``, else the first that runs it at all, else one that is not installed."""
    installed = [engine for engine in engines if engine.is_installed]
    suiting = (engine for engine in installed if engine.suits(path))
    reading = (engine for engine in installed if engine.reads(path))
    missing = (engine for engine in engines if not engine.is_installed)
    return next(chain(suiting, reading, missing, engines))


def load(path: Path, key: str = AUTO, threads: int = 1) -> FileRuntime:
    """``path`` in the engine called ``key``, ready to run. Raises as :func:`engine_for` and the engines do."""
    return engine_for(path, key).load(path, threads)
