"""Compiled networks in this process: loaded, and run on batches of images."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mgq.export.native.compiler import Compiled, llvm
from mgq.export.native.emit.driver import ENTRY

Bytes = npt.NDArray[np.uint8]
POINTER = ctypes.c_void_p


def reserve(size: int) -> Bytes:
    """``size`` bytes that begin with a page."""
    return np.frombuffer(mmap.mmap(-1, max(size, 1)), np.uint8)


class Parts:
    """A batch in as many parts as there are ``threads``, each done by one of them."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.pool = ThreadPoolExecutor(threads) if threads > 1 else None

    def run(self, count: int, work: Callable[[int, slice], None]) -> None:
        """``work`` takes the number of a part, and which of the ``count`` images are in it."""
        parts = min(self.threads, count)
        if self.pool is None or parts < 2:
            work(0, slice(0, count))
            return
        bounds = [count * part // parts for part in range(parts + 1)]
        list(self.pool.map(lambda part: work(part, slice(bounds[part], bounds[part + 1])), range(parts)))


@dataclass(eq=False)
class Library:
    """A compiled network with its constants, and a work area for each of ``threads``.

    Images of a batch are split among the threads.
    """

    compiled: Compiled
    classes: int
    threads: int = 1

    def __post_init__(self) -> None:
        self.constants = reserve(len(self.compiled.constants))
        self.constants[:] = np.frombuffer(self.compiled.constants, np.uint8)
        self.work = [reserve(self.compiled.work) for _ in range(self.threads)]
        self.engine, self.function = link_object(self.compiled.code)
        self.parts = Parts(self.threads)

    def run(self, images: Bytes) -> npt.NDArray[np.float32]:
        """Logits float32 (N, classes) of ``images``, uint8 (N, 3, S, S) in BGR."""
        images = np.ascontiguousarray(images)
        logits = np.empty((len(images), self.classes), np.float32)
        self.parts.run(len(images), lambda part, chosen: self.run_part(images[chosen], logits[chosen], self.work[part]))
        return logits

    def run_part(self, images: Bytes, logits: npt.NDArray[np.float32], work: Bytes) -> None:
        for image, answer in zip(images, logits, strict=True):
            self.function(self.constants.ctypes.data, work.ctypes.data, image.ctypes.data, answer.ctypes.data)


def link_object(code: bytes) -> tuple[Any, Any]:
    """The object file ``code`` in memory: what keeps it there, and its function."""
    binding = llvm()
    target = binding.Target.from_default_triple().create_target_machine(codemodel="jitdefault", jit=True)
    engine = binding.create_mcjit_compiler(binding.parse_assembly(""), target)
    engine.add_object_file(binding.ObjectFileRef.from_data(code))
    engine.finalize_object()
    address = engine.get_function_address(ENTRY)
    return engine, ctypes.CFUNCTYPE(None, *[POINTER] * 4)(address)
