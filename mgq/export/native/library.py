"""Compiled networks in this process: loaded, and run on batches of images."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mgq.export.native.compiler import CompiledProgram, llvm
from mgq.export.native.emit.team import END, HEADER, LEAD, SERVE
from mgq.export.native.team import Bytes, Calls, Team, reserve

POINTER, NUMBER = ctypes.c_void_p, ctypes.c_size_t
FUNCTIONS = {
    LEAD: (POINTER, POINTER, NUMBER, POINTER, POINTER, NUMBER),
    SERVE: (POINTER, NUMBER),
    END: (POINTER,),
}
"""The exported functions and their argument types."""


@dataclass(eq=False)
class Library:
    """A compiled network with its constants. ``threads`` share the images of a batch, and the work on what is left."""

    compiled: CompiledProgram
    classes: int
    threads: int = 1

    def __post_init__(self) -> None:
        self.constants = reserve(len(self.compiled.constants))
        self.constants[:] = np.frombuffer(self.compiled.constants, np.uint8)
        self.engine = link_object(self.compiled.code)
        self.team = Team(self.calls(), self.classes, self.threads)

    def run(self, images: Bytes) -> npt.NDArray[np.float32]:
        """Logits float32 (N, classes) of ``images``, uint8 (N, 3, S, S) in BGR."""
        return self.team.run(images)

    @property
    def memory(self) -> Bytes:
        """The work area of the first thread, where a single image's tensors are."""
        return self.team.work[HEADER : HEADER + self.compiled.work]

    def calls(self) -> Calls:
        """The functions of the library. They hold references to what they need, but not to this object."""
        engine, constants, threads = self.engine, self.constants, self.threads
        lead, serve, end = (
            ctypes.CFUNCTYPE(None, *kinds)(engine.get_function_address(name)) for name, kinds in FUNCTIONS.items()
        )

        def run(images: int, count: int, logits: int, work: int, _: object = engine) -> None:
            lead(constants.ctypes.data, images, count, logits, work, threads)

        return Calls(HEADER + threads * self.compiled.work, run, serve, end)


def link_object(code: bytes) -> Any:
    """The object file ``code`` in memory, as long as what is returned is kept."""
    binding = llvm()
    target = binding.Target.from_default_triple().create_target_machine(codemodel="jitdefault", jit=True)
    engine = binding.create_mcjit_compiler(binding.parse_assembly(""), target)
    engine.add_object_file(binding.ObjectFileRef.from_data(code))
    engine.finalize_object()
    return engine
