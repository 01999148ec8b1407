"""Convolution, batch norm and their gradients by oneDNN, on numpy arrays.

oneDNN is Intel's library behind the CPU kernels of PyTorch, fast on AMD as well; the package ``onednn-cpu-gomp`` is
its plain C library. This is the small part of its C interface (version 3) that training needs, through ctypes.
Names and numbers are those of ``oneapi/dnnl/dnnl.h`` and ``dnnl_types.h``.

oneDNN's fast kernels want channels in blocks of 16 or 8. Which, a primitive tells when its layout is left open; the
programs below then copy plain arrays into that layout and back, and keep in it what only they read.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Mapping
from ctypes import byref, c_char_p, c_float, c_int, c_int64, c_size_t, c_uint, c_void_p
from dataclasses import dataclass, field
from functools import cache, lru_cache
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mgq.errors import FailureError

PACKAGE = "onednn-cpu-gomp"
MAJOR_VERSION = 3
ALIGNMENT = 64  # a cache line
# Shapes met in one run: layers times batch sizes. Compiled kernels of more are dropped, the oldest first.
PROGRAMS_KEPT = 1024

Array = npt.NDArray[np.float32]
Shape = tuple[int, ...]
Pair = tuple[int, int]
Handle = c_void_p

CPU = 1
IN_ORDER = 1
FLOAT32 = 3
ANY_LAYOUT = 1
PLAIN_LAYOUT = {1: 2, 4: 5, 5: 6}  # by the number of axes: a, abcd, abcde
BLOCKS_OF_16, BLOCKS_OF_8 = 78, 102  # nChw16c, nChw8c
FORWARD_TRAINING = 64
BACKWARD = 128
DIRECT_CONVOLUTION = 1
USE_SCALE, USE_SHIFT, FUSE_RELU = 2, 4, 8
NO_BUFFER = None


class Query:
    """What a primitive descriptor is asked for."""

    SOURCE = 129
    D_SOURCE = 130
    WEIGHTS = 131
    D_WEIGHTS = 132
    OUTPUT = 133
    D_OUTPUT = 134
    WORKSPACE = 135


class Arg:
    """What an array is to a primitive; ``D_`` is the gradient with respect to it."""

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


class Geometry(NamedTuple):
    """A convolution without dilation: ``source`` (N, C, H, W), ``weights`` (O, C, KH, KW) or, in groups,
    (G, O / G, C / G, KH, KW), ``stride`` and symmetric ``padding`` (height, width)."""

    source: Shape
    weights: Shape
    stride: Pair
    padding: Pair

    @property
    def channels(self) -> int:
        """Of the output."""
        return self.weights[0] if len(self.weights) == 4 else self.weights[0] * self.weights[1]

    @property
    def output(self) -> Shape:
        sizes = zip(self.source[2:], self.weights[-2:], self.stride, self.padding, strict=True)
        return (self.source[0], self.channels, *((n + 2 * p - k) // s + 1 for n, k, s, p in sizes))


class _Argument(ctypes.Structure):
    _fields_ = (("arg", c_int), ("memory", c_void_p))


class Library:
    """oneDNN loaded, with the one engine and the one stream that everything here runs on."""

    def __init__(self, path: Path) -> None:
        try:
            self.c = ctypes.CDLL(str(path))
        except OSError as error:
            raise FailureError(
                f"oneDNN does not load: {error}; where libgomp is missing, install it (apt install libgomp1)"
            ) from None
        self.version = self._version()
        self._declare()
        self.engine = Handle()
        self.check(self.c.dnnl_engine_create(byref(self.engine), CPU, c_size_t(0)), "an engine")
        self.stream = Handle()
        self.check(self.c.dnnl_stream_create(byref(self.stream), self.engine, c_uint(IN_ORDER)), "a stream")
        # Programs share their memory objects and one scratch buffer.
        self.lock = threading.Lock()
        self._scratch = aligned_bytes(0)

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
            self._scratch = aligned_bytes(size)
        return self._scratch.ctypes.data


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


def aligned_bytes(size: int) -> npt.NDArray[np.uint8]:
    """``size`` uninitialized bytes that begin on a cache line."""
    raw = np.empty(size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size]


class _Owned:
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
    owner: _Owned

    @property
    def size(self) -> int:
        """In bytes, padding included."""
        return int(library().c.dnnl_memory_desc_get_size(self.descriptor))

    def equals(self, other: Layout) -> bool:
        return bool(library().c.dnnl_memory_desc_equal(self.descriptor, other.descriptor))


def layout(shape: Shape, tag: int) -> Layout:
    lib, made = library(), c_void_p()
    dims = (c_int64 * len(shape))(*shape)
    lib.check(
        lib.c.dnnl_memory_desc_create_with_tag(byref(made), len(shape), dims, FLOAT32, tag), f"an array {shape}"
    )
    return Layout(made, _Owned("memory_desc", made))


def plain(shape: Shape) -> Layout:
    """That of a C-contiguous numpy array."""
    return layout(shape, PLAIN_LAYOUT[len(shape)])


def open_layout(shape: Shape) -> Layout:
    """One that the primitive may choose."""
    return layout(shape, ANY_LAYOUT)


class Descriptor(_Owned):
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


class Memory(_Owned):
    """A place for an array in a program; where it is, is said when the program runs."""

    def __init__(self, layout: Layout) -> None:
        lib, made = library(), c_void_p()
        lib.check(lib.c.dnnl_memory_create(byref(made), layout.descriptor, lib.engine, NO_BUFFER), "a memory object")
        super().__init__("memory", made)
        self.layout = layout

    def place(self, address: int) -> None:
        library().c.dnnl_memory_set_data_handle(self.handle, address)


class Program:
    """Primitives in a fixed order, with names for the arrays that the caller passes."""

    def __init__(self) -> None:
        self._named: dict[str, Memory] = {}
        self._scratch: list[tuple[Memory, int]] = []
        self._scratch_size = 0
        self._steps: list[tuple[_Owned, ctypes.Array[_Argument], tuple[Memory, ...]]] = []

    def array(self, name: str, shape: Shape) -> Memory:
        """A plain float32 array of the caller."""
        return self.kept(name, plain(shape))

    def kept(self, name: str, layout: Layout) -> Memory:
        """Bytes of the caller in oneDNN's own layout, ``sizes[name]`` of them."""
        return self._named.setdefault(name, Memory(layout))

    def scratch(self, layout: Layout) -> Memory:
        memory = Memory(layout)
        self._scratch.append((memory, self._scratch_size))
        self._scratch_size += -(-layout.size // ALIGNMENT) * ALIGNMENT
        return memory

    def brought(self, memory: Memory, layout: Layout) -> Memory:
        """``memory`` in ``layout``: itself, or a copy."""
        if memory.layout.equals(layout):
            return memory
        copy = self.scratch(layout)
        self.copy(memory, copy)
        return copy

    def landing(self, target: Memory, layout: Layout) -> Memory:
        """Where to compute what is to be copied to ``target``: ``target`` itself if it has this layout."""
        return target if target.layout.equals(layout) else self.scratch(layout)

    def copy(self, source: Memory, target: Memory) -> None:
        if source is target:
            return
        engine = library().engine
        descriptor = Descriptor(
            "reorder", source.layout.descriptor, engine, target.layout.descriptor, engine, None
        )
        self.execute(descriptor, {Arg.SOURCE: source, Arg.OUTPUT: target})

    def execute(self, descriptor: Descriptor, arguments: Mapping[int, Memory]) -> None:
        lib, made = library(), c_void_p()
        lib.check(lib.c.dnnl_primitive_create(byref(made), descriptor.handle), descriptor.implementation)
        array = (_Argument * len(arguments))(*((arg, memory.handle) for arg, memory in arguments.items()))
        self._steps.append((_Owned("primitive", made), array, tuple(arguments.values())))

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of every named array."""
        return {name: memory.layout.size for name, memory in self._named.items()}

    def run(self, **arrays: npt.NDArray[np.float32] | npt.NDArray[np.uint8]) -> None:
        """Run on ``arrays``, one for each name: C-contiguous, of the sizes that were promised."""
        lib = library()
        for name, memory in self._named.items():
            array = arrays[name]
            if array.nbytes != memory.layout.size or not array.flags.c_contiguous:
                raise ValueError(f"array '{name}' does not fit: {array.nbytes} bytes, not {memory.layout.size}")
        with lib.lock:
            for name, memory in self._named.items():
                memory.place(arrays[name].ctypes.data)
            base = lib.scratch(self._scratch_size)
            for memory, offset in self._scratch:
                memory.place(base + offset)
            for primitive, arguments, _ in self._steps:
                status = lib.c.dnnl_primitive_execute(primitive.handle, lib.stream, len(arguments), arguments)
                lib.check(status, "a step of a program")
            lib.check(lib.c.dnnl_stream_wait(lib.stream), "an end")


def pair(values: Pair) -> ctypes.Array[c_int64]:
    return (c_int64 * 2)(*values)


@dataclass
class Convolution:
    """The three primitives of one convolution, in the layouts that they are fastest in."""

    geometry: Geometry
    forward: Descriptor = field(init=False)

    def __post_init__(self) -> None:
        self._arrays = tuple(
            open_layout(shape) for shape in (self.geometry.source, self.geometry.weights, self.geometry.output)
        )
        source, weights, output = (array.descriptor for array in self._arrays)
        self.forward = Descriptor(
            "convolution_forward",
            library().engine,
            FORWARD_TRAINING,
            DIRECT_CONVOLUTION,
            source,
            weights,
            None,
            output,
            *self._geometry(),
            None,
        )

    def _geometry(self) -> tuple[ctypes.Array[c_int64], ...]:
        padding = self.geometry.padding
        return pair(self.geometry.stride), pair((0, 0)), pair(padding), pair(padding)

    def to_source(self) -> Descriptor:
        """The gradient with respect to the source."""
        source, weights, output = (array.descriptor for array in self._arrays)
        return Descriptor(
            "convolution_backward_data",
            library().engine,
            DIRECT_CONVOLUTION,
            source,
            weights,
            output,
            *self._geometry(),
            self.forward.handle,
            None,
        )

    def to_weights(self) -> Descriptor:
        """The gradient with respect to the weights."""
        source, weights, output = (array.descriptor for array in self._arrays)
        return Descriptor(
            "convolution_backward_weights",
            library().engine,
            DIRECT_CONVOLUTION,
            source,
            weights,
            None,
            output,
            *self._geometry(),
            self.forward.handle,
            None,
        )


def _add_convolution(program: Program, convolution: Convolution, output: Memory) -> None:
    forward = convolution.forward
    source = program.array("source", convolution.geometry.source)
    weights = program.array("weights", convolution.geometry.weights)
    computed = program.landing(output, forward.layout(Query.OUTPUT))
    program.execute(
        forward,
        {
            Arg.SOURCE: program.brought(source, forward.layout(Query.SOURCE)),
            Arg.WEIGHTS: program.brought(weights, forward.layout(Query.WEIGHTS)),
            Arg.OUTPUT: computed,
        },
    )
    program.copy(computed, output)


def _add_gradients(program: Program, convolution: Convolution, d_output: Memory, wants_source: bool) -> None:
    geometry = convolution.geometry
    to_weights = convolution.to_weights()
    # The layout of the gradient is the same for both as a rule, and then one copy serves both.
    d_output = program.brought(d_output, to_weights.layout(Query.D_OUTPUT))
    if wants_source:
        to_source = convolution.to_source()
        d_source = program.array("d_source", geometry.source)
        computed = program.landing(d_source, to_source.layout(Query.D_SOURCE))
        weights = program.array("weights", geometry.weights)
        program.execute(
            to_source,
            {
                Arg.D_OUTPUT: program.brought(d_output, to_source.layout(Query.D_OUTPUT)),
                Arg.WEIGHTS: program.brought(weights, to_source.layout(Query.WEIGHTS)),
                Arg.D_SOURCE: computed,
            },
        )
        program.copy(computed, d_source)
    source = program.array("source", geometry.source)
    d_weights = program.array("d_weights", geometry.weights)
    computed = program.landing(d_weights, to_weights.layout(Query.D_WEIGHTS))
    program.execute(
        to_weights,
        {
            Arg.SOURCE: program.brought(source, to_weights.layout(Query.SOURCE)),
            Arg.D_OUTPUT: d_output,
            Arg.D_WEIGHTS: computed,
        },
    )
    program.copy(computed, d_weights)


@lru_cache(PROGRAMS_KEPT)
def convolution(geometry: Geometry) -> Program:
    """``source``, ``weights`` -> ``output``."""
    program = Program()
    _add_convolution(program, Convolution(geometry), program.array("output", geometry.output))
    return program


@lru_cache(PROGRAMS_KEPT)
def convolution_gradients(geometry: Geometry, wants_source: bool) -> Program:
    """``source``, ``weights``, ``d_output`` -> ``d_weights`` and, where wanted, ``d_source``.

    Without it ``weights`` are not needed.
    """
    program = Program()
    d_output = program.array("d_output", geometry.output)
    _add_gradients(program, Convolution(geometry), d_output, wants_source)
    return program


def _normalizable(geometry: Geometry, epsilon: float, relu: bool) -> Layout:
    """The layout in which a convolution's result is normalized: its own if batch norm has a kernel for it."""
    own = Convolution(geometry).forward.layout(Query.OUTPUT)
    blocked = (layout(geometry.output, tag) for tag in (BLOCKS_OF_16, BLOCKS_OF_8))
    for candidate in (own, *blocked):
        if _batch_norm_forward(candidate, epsilon, relu).implementation.startswith("bnorm_jit"):
            return candidate
    return own


def _batch_norm_forward(array: Layout, epsilon: float, relu: bool) -> Descriptor:
    flags = USE_SCALE | USE_SHIFT | (FUSE_RELU if relu else 0)
    return Descriptor(
        "batch_normalization_forward",
        library().engine,
        FORWARD_TRAINING,
        array.descriptor,
        array.descriptor,
        c_float(epsilon),
        c_uint(flags),
        None,
    )


@lru_cache(PROGRAMS_KEPT)
def normalized_convolution(geometry: Geometry, epsilon: float, relu: bool) -> Program:
    """``source``, ``weights``, ``scale``, ``shift`` -> ``output``, ``mean``, ``variance``.

    The convolution's result is normalized by its own mean and (biased) variance over batch, height and width, scaled
    and shifted, and with ``relu`` made non-negative. ``convolved`` and, with ``relu``, ``workspace`` are bytes that the
    gradients need; ``sizes`` tells how many.
    """
    program = Program()
    conv = Convolution(geometry)
    array = _normalizable(geometry, epsilon, relu)
    convolved = program.kept("convolved", array)
    _add_convolution(program, conv, convolved)
    norm = _batch_norm_forward(array, epsilon, relu)
    channels = (geometry.channels,)
    output = program.array("output", geometry.output)
    computed = program.landing(output, array)
    arguments = {
        Arg.SOURCE: convolved,
        Arg.SCALE: program.array("scale", channels),
        Arg.SHIFT: program.array("shift", channels),
        Arg.MEAN: program.array("mean", channels),
        Arg.VARIANCE: program.array("variance", channels),
        Arg.OUTPUT: computed,
    }
    if relu:
        arguments[Arg.WORKSPACE] = program.kept("workspace", norm.layout(Query.WORKSPACE))
    program.execute(norm, arguments)
    program.copy(computed, output)
    return program


@lru_cache(PROGRAMS_KEPT)
def normalized_convolution_gradients(geometry: Geometry, epsilon: float, relu: bool, wants_source: bool) -> Program:
    """The gradients of :func:`normalized_convolution`.

    Takes ``d_output``, ``source``, ``weights`` (where the source's gradient is wanted), ``scale``, ``mean``,
    ``variance``, ``convolved`` and, with ``relu``, ``workspace``; gives ``d_weights``, ``d_scale``, ``d_shift`` and,
    where wanted, ``d_source``.
    """
    program = Program()
    conv = Convolution(geometry)
    array = _normalizable(geometry, epsilon, relu)
    forward = _batch_norm_forward(array, epsilon, relu)
    backward = Descriptor(
        "batch_normalization_backward",
        library().engine,
        BACKWARD,
        array.descriptor,
        array.descriptor,
        array.descriptor,
        c_float(epsilon),
        c_uint(USE_SCALE | USE_SHIFT | (FUSE_RELU if relu else 0)),
        forward.handle,
        None,
    )
    channels = (geometry.channels,)
    d_convolved = program.scratch(array)
    arguments = {
        Arg.SOURCE: program.kept("convolved", array),
        Arg.MEAN: program.array("mean", channels),
        Arg.VARIANCE: program.array("variance", channels),
        Arg.SCALE: program.array("scale", channels),
        Arg.D_OUTPUT: program.brought(program.array("d_output", geometry.output), array),
        Arg.D_SOURCE: d_convolved,
        Arg.D_SCALE: program.array("d_scale", channels),
        Arg.D_SHIFT: program.array("d_shift", channels),
    }
    if relu:
        arguments[Arg.WORKSPACE] = program.kept("workspace", forward.layout(Query.WORKSPACE))
    program.execute(backward, arguments)
    _add_gradients(program, conv, d_convolved, wants_source)
    return program
