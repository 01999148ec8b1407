"""Compiled networks in this process: loaded, and run on batches of images."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mgq.export.native.compiler import Compiled, llvm
from mgq.export.native.emit.team import END, HEADER, LEAD, SERVE
from mgq.export.native.team import Bytes, Calls, Team, reserve

POINTER, NUMBER = ctypes.c_void_p, ctypes.c_size_t


@dataclass(eq=False)
class Library:
    """A compiled network with its constants. ``threads`` share the images of a batch, and the work on what is left."""

    compiled: Compiled
    classes: int
    threads: int = 1

    def __post_init__(self) -> None:
        constants = reserve(len(self.compiled.constants))
        constants[:] = np.frombuffer(self.compiled.constants, np.uint8)
        self.team = Team(calls_of(self.compiled, constants, self.threads), self.classes, self.threads)

    def run(self, images: Bytes) -> npt.NDArray[np.float32]:
        """Logits float32 (N, classes) of ``images``, uint8 (N, 3, S, S) in BGR."""
        return self.team.run(images)

    @property
    def memory(self) -> Bytes:
        """The work area of the first thread, where a single image's tensors are."""
        return self.team.work[HEADER : HEADER + self.compiled.work]


def calls_of(compiled: Compiled, constants: Bytes, threads: int) -> Calls:
    engine, (lead, serve, end) = linked(compiled.code)

    def run(images: int, count: int, logits: int, work: int, _: object = engine) -> None:
        lead(constants.ctypes.data, images, count, logits, work, threads)

    return Calls(HEADER + threads * compiled.work, run, serve, end)


def linked(code: bytes) -> tuple[Any, tuple[Any, ...]]:
    """The object file ``code`` in memory: what keeps it there, and its functions to lead, to serve and to end."""
    binding = llvm()
    target = binding.Target.from_default_triple().create_target_machine(codemodel="jitdefault", jit=True)
    engine = binding.create_mcjit_compiler(binding.parse_assembly(""), target)
    engine.add_object_file(binding.ObjectFileRef.from_data(code))
    engine.finalize_object()
    kinds = {
        LEAD: (POINTER, POINTER, NUMBER, POINTER, POINTER, NUMBER),
        SERVE: (POINTER, NUMBER),
        END: (POINTER,),
    }
    functions = (ctypes.CFUNCTYPE(None, *kind)(engine.get_function_address(name)) for name, kind in kinds.items())
    return engine, tuple(functions)
