"""oneDNN's C interface, as much of it as training needs, through ctypes.

oneDNN is Intel's library behind the CPU kernels of PyTorch, fast on AMD as well; the package ``onednn-cpu-gomp`` is its
plain C library, version 3. Names and numbers are those of ``oneapi/dnnl/dnnl.h`` and ``dnnl_types.h``.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Mapping
from ctypes import byref, c_char_p, c_int, c_int64, c_size_t, c_uint, c_void_p
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mgq.cpu_kernels.numba_loops import address_of
from mgq.errors import FailureError

PACKAGE = "onednn-cpu-gomp"
MAJOR_VERSION = 3
ALIGNMENT = 64  # a cache line

Shape = tuple[int, ...]
Bytes = npt.NDArray[np.uint8]

CPU = 1
IN_ORDER = 1
BFLOAT16, FLOAT32 = 2, 3
ANY_LAYOUT = 1
PLAIN_LAYOUT = {1: 2, 4: 5, 5: 6}  # by the number of axes: a, abcd, abcde
BLOCKS_OF_16, BLOCKS_OF_8 = 78, 102  # nChw16c, nChw8c
FORWARD_TRAINING = 64
BACKWARD = 128
DIRECT_CONVOLUTION = 1
GIVEN_STATISTICS, USE_SCALE, USE_SHIFT, FUSE_RELU = 1, 2, 4, 8
NO_BUFFER = None


class Query:
    """Properties of a primitive descriptor."""

    SOURCE = 129
    D_SOURCE = 130
    WEIGHTS = 131
    D_WEIGHTS = 132
    OUTPUT = 133
    D_OUTPUT = 134
    WORKSPACE = 135


class Arg:
    """The role of an array in a primitive; ``D_`` marks the gradient with respect to it."""

    SOURCE = 1
    OUTPUT = 17
    WEIGHTS = 33
    MEAN = 49
    VARIANCE = 50
    SCALE = 51
    SHIFT = 52
    WORKSPACE = 64
    D_SOURCE = 129
    D_OUTPUT = 145
    D_WEIGHTS = 161
    D_SCALE = 255
    D_SHIFT = 256


class _Argument(ctypes.Structure):
    _fields_ = (("arg", c_int), ("memory", c_void_p))


class Library:
    """oneDNN loaded, with the one engine and the one stream that everything here runs on."""

    def __init__(self, path: Path) -> None:
        # Its threads would spin while they wait, and take the cores from MegEngine's and numpy's. Read when it loads.
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        try:
            self.c = ctypes.CDLL(str(path))
        except OSError as error:
            raise FailureError(
                f"oneDNN does not load: {error}; where libgomp is missing, install it (apt install libgomp1)"
            ) from None
        self.version = self._version()
        self._declare()
        self.engine = c_void_p()
        self.check(self.c.dnnl_engine_create(byref(self.engine), CPU, c_size_t(0)), "an engine")
        self.stream = c_void_p()
        self.check(self.c.dnnl_stream_create(byref(self.stream), self.engine, c_uint(IN_ORDER)), "a stream")
        # Programs share their memory objects and one scratch buffer.
        self.lock = threading.Lock()
        self._scratch = allocate_aligned(0)
        self._scratch_address = self._scratch.ctypes.data

    def _version(self) -> str:
        class Version(ctypes.Structure):
            _fields_ = tuple((name, c_int) for name in ("major", "minor", "patch"))

        self.c.dnnl_version.restype = ctypes.POINTER(Version)
        found = self.c.dnnl_version().contents
        if found.major != MAJOR_VERSION:
            raise FailureError(f"oneDNN {found.major}.{found.minor} is not version {MAJOR_VERSION}; install {PACKAGE}")
        return f"{found.major}.{found.minor}.{found.patch}"

    def _declare(self) -> None:
        self.c.dnnl_primitive_desc_query_md.restype = c_void_p
        self.c.dnnl_primitive_desc_query_md.argtypes = (c_void_p, c_int, c_int)
        self.c.dnnl_memory_desc_get_size.restype = c_size_t
        self.c.dnnl_memory_desc_get_size.argtypes = (c_void_p,)
        self.c.dnnl_memory_desc_equal.argtypes = (c_void_p, c_void_p)
        self.c.dnnl_memory_set_data_handle.argtypes = (c_void_p, c_void_p)
        self.c.dnnl_primitive_execute.argtypes = (c_void_p, c_void_p, c_int, c_void_p)
        for kind in ("memory", "memory_desc", "primitive", "primitive_desc"):
            getattr(self.c, f"dnnl_{kind}_destroy").argtypes = (c_void_p,)

    def check(self, status: int, what: str) -> None:
        if status:
            raise FailureError(f"oneDNN {self.version} could not make {what} (status {status})")

    def scratch(self, size: int) -> int:
        """Address of ``size`` bytes that are free until the next program runs."""
        if self._scratch.nbytes < size:
            self._scratch = allocate_aligned(size)
            self._scratch_address = self._scratch.ctypes.data
        return self._scratch_address


@cache
def library() -> Library:
    """oneDNN, loaded once. Raises FailureError that says how to get it."""
    try:
        files = metadata.files(PACKAGE) or []
    except metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name == f"libdnnl.so.{MAJOR_VERSION}":
            return Library(Path(str(file.locate())))
    raise FailureError(f"fast training on a CPU needs oneDNN, which is not there; `uv pip install {PACKAGE}` gets it")


def allocate_aligned(size: int) -> Bytes:
    """``size`` uninitialized bytes that begin on a cache line."""
    raw = np.empty(size + ALIGNMENT, np.uint8)
    start = -address_of(raw) % ALIGNMENT
    return raw[start : start + size]


class _OwnedObject:
    """A C object that is destroyed with its Python one."""

    def __init__(self, kind: str, handle: c_void_p) -> None:
        self.handle = handle
        self._destroy: Callable[[c_void_p], int] = getattr(library().c, f"dnnl_{kind}_destroy")

    def __del__(self) -> None:
        self._destroy(self.handle)


@dataclass(frozen=True)
class Layout:
    """How an array lies in memory: a oneDNN memory descriptor and the object that owns it."""

    descriptor: c_void_p
    owner: _OwnedObject

    @property
    def size(self) -> int:
        """In bytes, padding included."""
        return int(library().c.dnnl_memory_desc_get_size(self.descriptor))

    def equals(self, other: Layout) -> bool:
        return bool(library().c.dnnl_memory_desc_equal(self.descriptor, other.descriptor))

    def window(self, shape: Shape, start: Shape) -> Layout:
        """The part of ``shape`` that begins at ``start``; it lies where the whole array lies."""
        lib, made = library(), c_void_p()
        create = lib.c.dnnl_memory_desc_create_submemory
        lib.check(create(byref(made), self.descriptor, dims(shape), dims(start)), f"a window {shape}")
        return Layout(made, _OwnedObject("memory_desc", made))


def dims(values: Shape) -> ctypes.Array[c_int64]:
    return (c_int64 * len(values))(*values)


def layout(shape: Shape, tag: int, kind: int = FLOAT32) -> Layout:
    lib, made = library(), c_void_p()
    create = lib.c.dnnl_memory_desc_create_with_tag
    lib.check(create(byref(made), len(shape), dims(shape), kind, tag), f"an array {shape}")
    return Layout(made, _OwnedObject("memory_desc", made))


def make_plain_layout(shape: Shape) -> Layout:
    """The layout of a C-contiguous numpy array of ``shape``."""
    return layout(shape, PLAIN_LAYOUT[len(shape)])


def channels_last(shape: Shape, kind: int = FLOAT32) -> Layout:
    """That of a C-contiguous numpy array (N, H, W, C) whose ``shape`` is given as (N, C, H, W)."""
    lib, made = library(), c_void_p()
    _, channels, height, width = shape
    strides = (height * width * channels, 1, width * channels, channels)
    create = lib.c.dnnl_memory_desc_create_with_strides
    lib.check(create(byref(made), len(shape), dims(shape), kind, dims(strides)), f"an array {shape}")
    return Layout(made, _OwnedObject("memory_desc", made))


def open_layout(shape: Shape, kind: int = FLOAT32) -> Layout:
    """One that the primitive may choose."""
    return layout(shape, ANY_LAYOUT, kind)


class Descriptor(_OwnedObject):
    """What a primitive will compute, and in which layouts."""

    def __init__(self, operation: str, *arguments: object) -> None:
        lib, made = library(), c_void_p()
        create = getattr(lib.c, f"dnnl_{operation}_primitive_desc_create")
        lib.check(create(byref(made), *arguments), operation.replace("_", " "))
        super().__init__("primitive_desc", made)

    def layout(self, query: int) -> Layout:
        return Layout(c_void_p(library().c.dnnl_primitive_desc_query_md(self.handle, query, 0)), self)

    @property
    def implementation(self) -> str:
        """The name of the kernel."""
        name, implementation_query = c_char_p(), 8
        library().c.dnnl_primitive_desc_query(self.handle, implementation_query, 0, byref(name))
        return (name.value or b"").decode()


class Memory(_OwnedObject):
    """A placeholder for an array in a program; its address is set when the program runs."""

    def __init__(self, layout: Layout) -> None:
        lib, made = library(), c_void_p()
        lib.check(lib.c.dnnl_memory_create(byref(made), layout.descriptor, lib.engine, NO_BUFFER), "a memory object")
        super().__init__("memory", made)
        self.layout = layout
        self.address = 0

    def place(self, address: int) -> None:
        if address != self.address:
            library().c.dnnl_memory_set_data_handle(self.handle, address)
            self.address = address


class Program:
    """Primitives in a fixed order, with names for the arrays that the caller passes."""

    def __init__(self) -> None:
        self.sizes: dict[str, int] = {}
        """Bytes of every named array."""
        self._named: dict[str, Memory] = {}
        self._windows: list[tuple[str, Memory]] = []
        self._scratch: list[tuple[Memory, int]] = []
        self._scratch_size = 0
        self._scratch_base = 0
        self._steps: list[tuple[_OwnedObject, ctypes.Array[_Argument], tuple[Memory, ...]]] = []

    def array(self, name: str, shape: Shape) -> Memory:
        """A plain float32 array of the caller."""
        return self.buffer(name, make_plain_layout(shape))

    def buffer(self, name: str, layout: Layout) -> Memory:
        """Bytes of the caller in oneDNN's own layout, ``sizes[name]`` of them."""
        if name not in self._named:
            self._named[name] = Memory(layout)
            self.sizes[name] = layout.size
        return self._named[name]

    def window(self, whole: Memory, shape: Shape, start: Shape) -> Memory:
        """The part of an array of this program that has that ``shape`` and begins at ``start``."""
        memory = Memory(whole.layout.window(shape, start))
        name = next((name for name, named in self._named.items() if named is whole), None)
        if name is not None:
            self._windows.append((name, memory))
        else:
            offset = next(offset for other, offset in self._scratch if other is whole)
            self._scratch.append((memory, offset))
        return memory

    def scratch(self, layout: Layout) -> Memory:
        """A place that holds its contents only while the program runs."""
        memory = Memory(layout)
        self._scratch.append((memory, self._scratch_size))
        self._scratch_size += -(-layout.size // ALIGNMENT) * ALIGNMENT
        return memory

    def reorder(self, memory: Memory, layout: Layout) -> Memory:
        """``memory`` in ``layout``: itself, or a copy."""
        if memory.layout.equals(layout):
            return memory
        copy = self.scratch(layout)
        self.copy(memory, copy)
        return copy

    def choose_target(self, target: Memory, layout: Layout) -> Memory:
        """The memory to write to before copying to ``target``: ``target`` itself if it has this layout."""
        return target if target.layout.equals(layout) else self.scratch(layout)

    def copy(self, source: Memory, target: Memory) -> None:
        if source is target:
            return
        engine = library().engine
        descriptor = Descriptor("reorder", source.layout.descriptor, engine, target.layout.descriptor, engine, None)
        self.execute(descriptor, {Arg.SOURCE: source, Arg.OUTPUT: target})

    def execute(self, descriptor: Descriptor, arguments: Mapping[int, Memory]) -> None:
        lib, made = library(), c_void_p()
        lib.check(lib.c.dnnl_primitive_create(byref(made), descriptor.handle), descriptor.implementation)
        array = (_Argument * len(arguments))(*(_Argument(arg, memory.handle) for arg, memory in arguments.items()))
        self._steps.append((_OwnedObject("primitive", made), array, tuple(arguments.values())))

    def run(self, **arrays: npt.NDArray[np.float32] | Bytes) -> None:
        """Run on ``arrays``, one for each name: C-contiguous, of the sizes that were promised."""
        lib = library()
        for name, size in self.sizes.items():
            if arrays[name].nbytes != size or not arrays[name].flags.c_contiguous:
                raise ValueError(f"array '{name}' does not fit: {arrays[name].nbytes} bytes, not {size}")
        with lib.lock:
            self._place(arrays, lib.scratch(self._scratch_size))
            execute, stream = lib.c.dnnl_primitive_execute, lib.stream
            for primitive, arguments, _ in self._steps:
                lib.check(execute(primitive.handle, stream, len(arguments), arguments), "a step of a program")
            lib.check(lib.c.dnnl_stream_wait(stream), "an end")

    def _place(self, arrays: Mapping[str, npt.NDArray[np.float32] | Bytes], base: int) -> None:
        addresses = {name: address_of(arrays[name]) for name in self._named}
        for name, memory in self._named.items():
            memory.place(addresses[name])
        for name, memory in self._windows:
            memory.place(addresses[name])
        if base != self._scratch_base:
            for memory, offset in self._scratch:
                memory.place(base + offset)
            self._scratch_base = base
