"""Runs a shared library of ``mgq dump --format native`` that the user has named: its code runs in this process."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mgq.errors import InputError, printable
from mgq.export.native.machine_code import AGAIN, refuse_other_files
from mgq.export.native.team import Calls, Team
from mgq.export.onnx.onnx_file import read_metadata
from mgq.runtime.protocol import check_threads

FUNCTIONS = {
    "mgq_name": ctypes.c_char_p,
    "mgq_cpu": ctypes.c_char_p,
    "mgq_about": ctypes.c_char_p,
    "mgq_image_size": ctypes.c_int32,
    "mgq_classes": ctypes.c_int32,
    "mgq_runs_here": ctypes.c_int32,
    "mgq_team_size": ctypes.c_size_t,
    "mgq_team_run": ctypes.c_int32,
    "mgq_team_help": ctypes.c_int32,
    "mgq_team_end": None,
}
ARGUMENTS = {
    "mgq_team_size": (ctypes.c_int32,),
    "mgq_team_run": (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int32),
    "mgq_team_help": (ctypes.c_void_p, ctypes.c_int32),
    "mgq_team_end": (ctypes.c_void_p,),
}


class LibraryRuntime:
    """Takes and returns what :class:`mgq.runtime.protocol.Runtime` says; ``threads`` share batches and single images.

    Raises InputError where the file is missing, no library of mgq's, or for another processor, for more threads than
    cores, and for images of another shape than it takes.
    """

    name = "native library"
    batch: int | None = None

    def __init__(self, path: Path, threads: int = 1) -> None:
        self.path = path
        self.threads = check_threads(threads)
        self.functions = open_library(path)
        self.version: str = self.functions["mgq_cpu"]().decode()
        if not self.functions["mgq_runs_here"]():
            raise InputError(
                f"{printable(path)} is for {self.version} processors, which this one is not: dump it with --cpu native"
            )
        self.classes: int = self.functions["mgq_classes"]()
        size: int = self.functions["mgq_image_size"]()
        self.takes: tuple[int | None, ...] = (None, 3, size, size)
        self.team = Team(calls_of(self.functions, self.threads), self.classes, self.threads)

    @cached_property
    def about(self) -> Mapping[str, Any]:
        return read_metadata(self.functions["mgq_about"]().decode())

    def outputs(self, batch: npt.NDArray[np.uint8]) -> dict[str, npt.NDArray[Any]]:
        return {"logits": self.run(batch)}

    def run(self, batch: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        if batch.ndim != 4 or batch.shape[1:] != self.takes[1:] or batch.dtype != np.uint8:
            size = self.takes[3]
            shape = "x".join(map(str, batch.shape))
            raise InputError(
                f"{printable(self.path)} takes uint8 pictures of shape Nx3x{size}x{size}, not {batch.dtype} {shape}"
            )
        return self.team.run(batch)


def calls_of(functions: Mapping[str, Any], threads: int) -> Calls:
    run, help_with, end = (functions[f"mgq_team_{name}"] for name in ("run", "help", "end"))

    def all_run(images: int, count: int, logits: int, work: int) -> None:
        run(images, count, logits, work, threads)

    return Calls(functions["mgq_team_size"](threads), all_run, help_with, end)


def open_library(path: Path) -> dict[str, Any]:
    """The functions of the library at ``path``. Raises InputError for a file that is none of mgq's."""
    refuse_other_files(path)
    try:
        loaded = ctypes.CDLL(str(path.absolute()))
    except OSError as error:
        why = error.strerror or printable(str(error))[:200]
        raise InputError(f"cannot load {printable(path)}: {why}; {AGAIN} again") from None
    functions = {}
    for name, result in FUNCTIONS.items():
        function = getattr(loaded, name, None)
        if function is None:
            raise InputError(f"{printable(path)} has no {name}: {AGAIN}")
        function.restype, function.argtypes = result, ARGUMENTS.get(name, ())
        functions[name] = function
    return functions
