"""Convolution, batch norm and their gradients on numpy arrays, by oneDNN.

oneDNN's fast kernels want channels in blocks of 16 or 8; a primitive tells which when its layout is left open. Programs
copy plain arrays into that layout and back; arrays that only programs read stay in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from ctypes import c_float, c_uint
from functools import cached_property, lru_cache
from itertools import product
from typing import NamedTuple

import numpy as np

from mgq.cpu_kernels.onednn import (
    BACKWARD,
    BFLOAT16,
    BLOCKS_OF_8,
    BLOCKS_OF_16,
    DIRECT_CONVOLUTION,
    FLOAT32,
    FORWARD_TRAINING,
    FUSE_RELU,
    GIVEN_STATISTICS,
    USE_SCALE,
    USE_SHIFT,
    Arg,
    Bytes,
    Descriptor,
    Layout,
    Memory,
    Program,
    Query,
    Shape,
    allocate_aligned,
    channels_last,
    dims,
    layout,
    library,
    open_layout,
)
from mgq.cpu_kernels.tensor_exchange import Array, empty

Pair = tuple[int, int]

# Shapes met in one run: layers times batch sizes. The programs of more are dropped, the oldest first.
PROGRAMS_KEPT = 1024
# The only kernel size with a fast gradient of depthwise weights, see _add_windows.
WINDOW = 3
# Input channels of a group from which on bfloat16 gains: with fewer a convolution reads more than it computes.
LEAST_BFLOAT16 = 16


class Geometry(NamedTuple):
    """A convolution without dilation: ``source`` (N, C, H, W), ``weights`` (O, C, KH, KW) or, in groups,
    (G, O / G, C / G, KH, KW), ``stride`` and symmetric ``padding`` (height, width), ``output`` (N, O, OH, OW).

    With ``channels_last`` the arrays of source, output and their gradients are (N, H, W, C). With ``bfloat16`` it
    rounds what it multiplies to that; all arrays are float32 still.
    """

    source: Shape
    weights: Shape
    stride: Pair
    padding: Pair
    output: Shape
    channels_last: bool = False
    bfloat16: bool = False

    @property
    def elements(self) -> int:
        """Of a channel of the output."""
        batch, _, height, width = self.output
        return batch * height * width

    def empty(self, shape: Shape) -> Array:
        """An uninitialized array for a source or an output of ``shape`` (N, C, H, W)."""
        batch, channels, height, width = shape
        return empty((batch, height, width, channels) if self.channels_last else shape)

    def feature(self, program: Program, name: str, shape: Shape) -> Memory:
        """A source or an output of ``shape`` (N, C, H, W), an array of the caller of ``program``."""
        return program.buffer(name, channels_last(shape)) if self.channels_last else program.array(name, shape)


@lru_cache(PROGRAMS_KEPT)
def geometry(
    source: Shape,
    weights: Shape,
    stride: Pair,
    padding: Pair,
    channels_last: bool = False,
    bfloat16: bool = False,
) -> Geometry:
    """A convolution of these; where ``bfloat16`` is asked for, it is taken where that has a fast kernel."""
    channels = weights[0] if len(weights) == 4 else weights[0] * weights[1]
    sizes = zip(source[2:], weights[-2:], stride, padding, strict=True)
    height, width = ((n + 2 * p - k) // s + 1 for n, k, s, p in sizes)
    gains = bfloat16 and weights[-3] >= LEAST_BFLOAT16
    return Geometry(source, weights, stride, padding, (source[0], channels, height, width), channels_last, gains)


class Norm(NamedTuple):
    """Batch norm with ``epsilon`` added to the variance, and maybe ReLU.

    By the batch's own statistics or, where they are ``fixed``, by given ones, which then are constants.
    """

    epsilon: float
    relu: bool
    fixed: bool = False


class Statistics(NamedTuple):
    """The statistics of a normalized convolution: ``mean`` and (biased) ``variance`` (C,), and bytes for the
    gradients."""

    mean: Array
    variance: Array
    kept: dict[str, Bytes]


def convolution(geometry: Geometry, source: Array, weights: Array) -> Array:
    output = geometry.empty(geometry.output)
    _forward(geometry).run(source=source, weights=weights, output=output)
    return output


def convolution_gradients(
    geometry: Geometry, source: Array, weights: Array, d_output: Array, wants_source: bool
) -> tuple[Array | None, Array]:
    """The gradients with respect to source (None where it is not wanted) and weights."""
    gradients = _Gradients(geometry, source, wants_source)
    _backward(geometry, wants_source).run(weights=weights, d_output=d_output, **gradients.arrays)
    return gradients.d_source, gradients.d_weights()


def convolve_normalized(
    geometry: Geometry,
    norm: Norm,
    source: Array,
    weights: Array,
    scale: Array,
    shift: Array,
    mean: Array,
    variance: Array,
) -> tuple[Array, Statistics]:
    """The convolution, normalized over batch, height and width, times ``scale`` (C,) plus ``shift`` (C,).

    ``mean`` and ``variance`` (C,) are read where ``norm`` is fixed, and written to where it is not.
    """
    program = _norm_forward(geometry, norm)
    names: tuple[str, ...] = ("convolved", "workspace")
    kept = {name: allocate_aligned(program.sizes[name]) for name in names if name in program.sizes}
    output = geometry.empty(geometry.output)
    program.run(
        source=source,
        weights=weights,
        scale=scale,
        shift=shift,
        output=output,
        mean=mean,
        variance=variance,
        **kept,
    )
    return output, Statistics(mean, variance, kept)


def compute_normalized_gradients(
    geometry: Geometry,
    norm: Norm,
    source: Array,
    weights: Array,
    scale: Array,
    statistics: Statistics,
    d_output: Array,
    wants_source: bool,
) -> tuple[Array | None, Array, Array, Array]:
    """The gradients with respect to source (None where it is not wanted), weights, scale and shift."""
    d_scale, d_shift = empty(scale.shape), empty(scale.shape)
    gradients = _Gradients(geometry, source, wants_source)
    _norm_backward(geometry, norm, wants_source).run(
        weights=weights,
        scale=scale,
        mean=statistics.mean,
        variance=statistics.variance,
        d_output=d_output,
        d_scale=d_scale,
        d_shift=d_shift,
        **statistics.kept,
        **gradients.arrays,
    )
    return gradients.d_source, gradients.d_weights(), d_scale, d_shift


class _Gradients:
    """The arrays that :func:`_add_gradients` reads the source from and writes to."""

    def __init__(self, geometry: Geometry, source: Array, wants_source: bool) -> None:
        self.geometry = geometry
        self.d_source = geometry.empty(geometry.source) if wants_source else None
        self.arrays: dict[str, Array] = {} if self.d_source is None else {"d_source": self.d_source}
        if _Convolution.of(geometry).needs_windows:
            height, width = geometry.padding
            around = ((height, height), (width, width))
            still = (0, 0)
            margins = (still, *around, still) if geometry.channels_last else (still, still, *around)
            self.arrays["padded"] = np.pad(source, margins)
            channels = geometry.weights[0]
            self.arrays |= {name: empty((channels, 1, 1, WINDOW, WINDOW)) for name, *_ in _windows(geometry)}
        else:
            self.arrays |= {"source": source, "d_weights": empty(geometry.weights)}

    def d_weights(self) -> Array:
        if "d_weights" in self.arrays:
            return self.arrays["d_weights"]
        whole = empty(self.geometry.weights)
        for name, top, left in _windows(self.geometry):
            part = whole[..., top : top + WINDOW, left : left + WINDOW]
            part[...] = self.arrays[name][..., : part.shape[-2], : part.shape[-1]]
        return whole


class _Convolution:
    """The three primitives of one convolution, in the layouts that they are fastest in."""

    def __init__(self, geometry: Geometry) -> None:
        self.geometry = geometry
        placed = channels_last if geometry.channels_last else open_layout
        # What is multiplied may be bfloat16; sums are float32, and so is what comes out.
        read = BFLOAT16 if geometry.bfloat16 else FLOAT32
        self._source, self._d_source = placed(geometry.source, read), placed(geometry.source)
        self._weights, self._d_weights = open_layout(geometry.weights, read), open_layout(geometry.weights)
        self._output, self._d_output = placed(geometry.output), placed(geometry.output, read)
        self._numbers = dims(geometry.stride), dims((0, 0)), dims(geometry.padding), dims(geometry.padding)

    @staticmethod
    @lru_cache(PROGRAMS_KEPT)
    def of(geometry: Geometry) -> _Convolution:
        return _Convolution(geometry)

    @cached_property
    def forward(self) -> Descriptor:
        return Descriptor(
            "convolution_forward",
            library().engine,
            FORWARD_TRAINING,
            DIRECT_CONVOLUTION,
            self._source.descriptor,
            self._weights.descriptor,
            None,
            self._output.descriptor,
            *self._numbers,
            None,
        )

    @cached_property
    def to_source(self) -> Descriptor:
        """The gradient with respect to the source."""
        return Descriptor(
            "convolution_backward_data",
            library().engine,
            DIRECT_CONVOLUTION,
            self._d_source.descriptor,
            self._weights.descriptor,
            self._d_output.descriptor,
            *self._numbers,
            self.forward.handle,
            None,
        )

    @cached_property
    def to_weights(self) -> Descriptor:
        """The gradient with respect to the weights."""
        return Descriptor(
            "convolution_backward_weights",
            library().engine,
            DIRECT_CONVOLUTION,
            self._source.descriptor,
            self._d_weights.descriptor,
            None,
            self._d_output.descriptor,
            *self._numbers,
            self.forward.handle,
            None,
        )

    @cached_property
    def needs_windows(self) -> bool:
        """Whether this is a depthwise convolution without a kernel of its own for the weights' gradient."""
        weights = self.geometry.weights
        depthwise = len(weights) == 5 and weights[1:3] == (1, 1)
        return depthwise and min(weights[-2:]) >= WINDOW and "gemm" in self.to_weights.implementation


def _windows(geometry: Geometry) -> Iterator[tuple[str, int, int]]:
    """Name, top and left of 3x3 windows that cover the kernel. Small kernels' windows reach beyond it."""

    def starts(size: int) -> list[int]:
        return [*range(0, size - WINDOW, WINDOW), max(0, size - WINDOW)]

    height, width = geometry.weights[-2:]
    for top, left in product(starts(height), starts(width)):
        yield f"d_window_{top}_{left}", top, left


def _add_windows(program: Program, geometry: Geometry, d_output: Memory) -> None:
    """The gradient of depthwise weights, window by window.

    oneDNN has a fast kernel for 3x3 weights with little padding only, and is some 20 times slower without. The gradient
    with respect to a part of a kernel is that of a smaller convolution, without padding, of the part of the padded
    source that it sees.
    """
    padded = tuple(n + 2 * p for n, p in zip(geometry.source[2:], geometry.padding, strict=True))
    whole = (*geometry.source[:2], *padded)
    # Into blocks once, as the windows overlap; and taking them out of a plain array is 20 times slower.
    source = program.reorder(geometry.feature(program, "padded", whole), layout(whole, BLOCKS_OF_16))
    seen = tuple((n - 1) * s + WINDOW for n, s in zip(geometry.output[2:], geometry.stride, strict=True))
    shape = (*geometry.source[:2], *seen)
    weights = (*geometry.weights[:3], WINDOW, WINDOW)
    part = _Convolution(Geometry(shape, weights, geometry.stride, (0, 0), geometry.output)).to_weights
    d_output = program.reorder(d_output, part.layout(Query.D_OUTPUT))
    for name, top, left in _windows(geometry):
        d_window = program.array(name, weights)
        computed = program.choose_target(d_window, part.layout(Query.D_WEIGHTS))
        window = program.window(source, shape, (0, 0, top, left))
        seen_part = program.reorder(window, part.layout(Query.SOURCE))
        program.execute(part, {Arg.SOURCE: seen_part, Arg.D_OUTPUT: d_output, Arg.D_WEIGHTS: computed})
        program.copy(computed, d_window)


def _add_convolution(program: Program, convolution: _Convolution, output: Memory) -> None:
    forward = convolution.forward
    source = convolution.geometry.feature(program, "source", convolution.geometry.source)
    weights = program.array("weights", convolution.geometry.weights)
    computed = program.choose_target(output, forward.layout(Query.OUTPUT))
    program.execute(
        forward,
        {
            Arg.SOURCE: program.reorder(source, forward.layout(Query.SOURCE)),
            Arg.WEIGHTS: program.reorder(weights, forward.layout(Query.WEIGHTS)),
            Arg.OUTPUT: computed,
        },
    )
    program.copy(computed, output)


def _add_gradients(program: Program, convolution: _Convolution, d_output: Memory, wants_source: bool) -> None:
    geometry = convolution.geometry
    # The layout that one gradient wants is the other's too, as a rule: one copy serves both.
    if wants_source:
        to_source = convolution.to_source
        d_output = program.reorder(d_output, to_source.layout(Query.D_OUTPUT))
        d_source = geometry.feature(program, "d_source", geometry.source)
        computed = program.choose_target(d_source, to_source.layout(Query.D_SOURCE))
        weights = program.array("weights", geometry.weights)
        program.execute(
            to_source,
            {
                Arg.D_OUTPUT: d_output,
                Arg.WEIGHTS: program.reorder(weights, to_source.layout(Query.WEIGHTS)),
                Arg.D_SOURCE: computed,
            },
        )
        program.copy(computed, d_source)
    if convolution.needs_windows:
        _add_windows(program, geometry, d_output)
        return
    to_weights = convolution.to_weights
    source = geometry.feature(program, "source", geometry.source)
    d_weights = program.array("d_weights", geometry.weights)
    computed = program.choose_target(d_weights, to_weights.layout(Query.D_WEIGHTS))
    program.execute(
        to_weights,
        {
            Arg.SOURCE: program.reorder(source, to_weights.layout(Query.SOURCE)),
            Arg.D_OUTPUT: program.reorder(d_output, to_weights.layout(Query.D_OUTPUT)),
            Arg.D_WEIGHTS: computed,
        },
    )
    program.copy(computed, d_weights)


@lru_cache(PROGRAMS_KEPT)
def _forward(geometry: Geometry) -> Program:
    program = Program()
    _add_convolution(program, _Convolution.of(geometry), geometry.feature(program, "output", geometry.output))
    return program


@lru_cache(PROGRAMS_KEPT)
def _backward(geometry: Geometry, wants_source: bool) -> Program:
    program = Program()
    d_output = geometry.feature(program, "d_output", geometry.output)
    _add_gradients(program, _Convolution.of(geometry), d_output, wants_source)
    return program


def _batch_norm(array: Layout, norm: Norm) -> Descriptor:
    return Descriptor(
        "batch_normalization_forward",
        library().engine,
        FORWARD_TRAINING,
        array.descriptor,
        array.descriptor,
        c_float(norm.epsilon),
        _flags(norm),
        None,
    )


def _batch_norm_gradients(array: Layout, norm: Norm) -> Descriptor:
    forward = _batch_norm(array, norm)
    return Descriptor(
        "batch_normalization_backward",
        library().engine,
        BACKWARD,
        array.descriptor,
        array.descriptor,
        array.descriptor,
        c_float(norm.epsilon),
        _flags(norm),
        forward.handle,
        None,
    )


def _flags(norm: Norm) -> c_uint:
    fixed = GIVEN_STATISTICS if norm.fixed else 0
    return c_uint(USE_SCALE | USE_SHIFT | (FUSE_RELU if norm.relu else 0) | fixed)


def _normalizable(geometry: Geometry, norm: Norm) -> Layout:
    """The layout in which a convolution's result is normalized: its own if batch norm has a kernel for it."""
    own = _Convolution.of(geometry).forward.layout(Query.OUTPUT)
    for candidate in (own, *(layout(geometry.output, tag) for tag in (BLOCKS_OF_16, BLOCKS_OF_8))):
        if _batch_norm(candidate, norm).implementation.startswith("bnorm_jit"):
            return candidate
    return own


@lru_cache(PROGRAMS_KEPT)
def _norm_forward(geometry: Geometry, norm: Norm) -> Program:
    program = Program()
    array = _normalizable(geometry, norm)
    convolved = program.buffer("convolved", array)
    _add_convolution(program, _Convolution.of(geometry), convolved)
    batch_norm = _batch_norm(array, norm)
    channels = (geometry.output[1],)
    output = geometry.feature(program, "output", geometry.output)
    computed = program.choose_target(output, array)
    arguments = {
        Arg.SOURCE: convolved,
        Arg.SCALE: program.array("scale", channels),
        Arg.SHIFT: program.array("shift", channels),
        Arg.MEAN: program.array("mean", channels),
        Arg.VARIANCE: program.array("variance", channels),
        Arg.OUTPUT: computed,
    }
    if norm.relu:
        arguments[Arg.WORKSPACE] = program.buffer("workspace", batch_norm.layout(Query.WORKSPACE))
    program.execute(batch_norm, arguments)
    program.copy(computed, output)
    return program


@lru_cache(PROGRAMS_KEPT)
def _norm_backward(geometry: Geometry, norm: Norm, wants_source: bool) -> Program:
    program = Program()
    array = _normalizable(geometry, norm)
    channels = (geometry.output[1],)
    d_convolved = program.scratch(array)
    arguments = {
        Arg.SOURCE: program.buffer("convolved", array),
        Arg.MEAN: program.array("mean", channels),
        Arg.VARIANCE: program.array("variance", channels),
        Arg.SCALE: program.array("scale", channels),
        Arg.D_OUTPUT: program.reorder(geometry.feature(program, "d_output", geometry.output), array),
        Arg.D_SOURCE: d_convolved,
        Arg.D_SCALE: program.array("d_scale", channels),
        Arg.D_SHIFT: program.array("d_shift", channels),
    }
    if norm.relu:
        arguments[Arg.WORKSPACE] = program.buffer("workspace", _batch_norm(array, norm).layout(Query.WORKSPACE))
    program.execute(_batch_norm_gradients(array, norm), arguments)
    _add_gradients(program, _Convolution.of(geometry), d_convolved, wants_source)
    return program
