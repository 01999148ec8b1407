"""Emits depthwise convolutions and max pooling: each output row is computed from some rows of the source, given as
pointers."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Any

import numpy as np
import numpy.typing as npt

from mgq.export.native.emit.code import FLOATS, INTS, Code, Value, constant
from mgq.export.native.emit.isa import EIGHT, HALF, NOTHING, SHORTS, Avx2, PortableIsa, Range, halves
from mgq.export.native.emit.rows import store_quad


@dataclass(frozen=True)
class DepthwiseKernel:
    """``size`` x ``size`` at ``stride``, rows of layout D to rows of layout A, ``width`` outputs."""

    size: int
    stride: int
    width: int
    to: Range
    limit: bool


@dataclass(frozen=True)
class PoolKernel:
    """The largest of ``size`` x ``size`` at ``stride``: rows of layout P of ``lanes`` channels to layout A or P."""

    size: int
    stride: int
    width: int
    lanes: int
    target: str


def row_parameters(size: int) -> tuple[tuple[str, str], ...]:
    return (
        *(("i8*", f"row{i}") for i in range(size)),
        *(("i8*", name) for name in ("weights", "bias", "factors", "target")),
        *(("i64", name) for name in ("source_step", "target_step", "vectors")),
    )


def pieces(size: int, stride: int) -> list[list[tuple[int, bool, int]]]:
    """For each of four outputs: quad, whether it is read two pixels on, and the first byte's tap."""
    result = []
    for output in range(4):
        first = output * stride
        quad, rest = divmod(first, 4)
        if rest + size <= 4:
            result.append([(quad, False, -rest)])
        elif size <= 3:
            result.append([(quad, True, 2 - rest)])
        else:
            last = (first + size - 1) // 4
            result.append([(q, False, 4 * q - first) for q in range(quad, last + 1)])
    return result


def patterns(size: int, stride: int) -> list[int]:
    """The first bytes' taps that occur: one vector of weights a row each."""
    return sorted({tap for output in pieces(size, stride) for _, _, tap in output})


def pairs_of(size: int, stride: int, output: int) -> tuple[int, int, int]:
    """For one of four outputs: the first pair of pixels that it reads, where in that it begins, and how many it
    reads."""
    first, phase = divmod(output * stride, 2)
    return first, phase, ceil((phase + size) / 2)


def pair_taps(size: int, stride: int) -> list[tuple[int, int]]:
    """Where in a pair a window begins, and the number of the pair: one vector of weights a row each."""
    found = {pairs_of(size, stride, output)[1:] for output in range(4)}
    return [(phase, pair) for phase, count in sorted(found) for pair in range(count)]


def tap_table(isa: PortableIsa, size: int, stride: int) -> npt.NDArray[Any]:
    """For each vector of weights of a row, the taps of a channel, one behind the other; others than 0 to ``size`` - 1
    are none."""
    if isinstance(isa, Avx2):
        return np.array([[2 * pair - phase, 2 * pair - phase + 1] for phase, pair in pair_taps(size, stride)])
    return np.array([range(first, first + 4) for first in patterns(size, stride)])


def weight_bytes(isa: PortableIsa, size: int, stride: int) -> int:
    """Bytes of the weights of 16 channels."""
    return int(16 * tap_table(isa, size, stride).size * size)


def quads_read(size: int, stride: int) -> int:
    """Quads of the source that four outputs are made of."""
    return ceil((3 * stride + size) / 4)


def emit_depthwise(isa: PortableIsa, kernel: DepthwiseKernel, name: str) -> Code:
    code = Code(name, row_parameters(kernel.size))
    width = weight_bytes(isa, kernel.size, kernel.stride)
    pointers = ["%weights", "%bias", "%factors", "%target", *(f"%row{i}" for i in range(kernel.size))]

    def vector(_: Value, values: list[Value]) -> list[Value]:
        weights, bias, factors, target, *rows = values
        start = code.load(INTS, bias, 64)
        factor = code.load(FLOATS, factors, 64)
        if isinstance(isa, Avx2):
            emit_pairs(isa, kernel, code, weights, (start, factor, target), rows)
        else:
            emit_quads(isa, kernel, code, weights, (start, factor, target), rows)
        moves = (width, 64, 64, *(64 * isa.unit for _ in (target, *rows)))
        return [code.advance(pointer, move) for pointer, move in zip(values, moves, strict=True)]

    code.repeat("%vectors", [("i8*", pointer) for pointer in pointers], vector)
    return code


def emit_quads(
    isa: PortableIsa,
    kernel: DepthwiseKernel,
    code: Code,
    weights: Value,
    parameters: tuple[Value, Value, Value],
    rows: list[Value],
) -> None:
    """All quads of a row for 16 channels."""
    taps = patterns(kernel.size, kernel.stride)
    prepared = {
        (row, tap): isa.weights(code, code.advance(weights, 64 * (row * len(taps) + i)))
        for row in range(kernel.size)
        for i, tap in enumerate(taps)
    }
    start, factor, target = parameters
    count = quads_read(kernel.size, kernel.stride)
    firsts = [code.load(INTS, row, 64) for row in rows]

    def quad(_: Value, values: list[Value]) -> list[Value]:
        target, *rest = values
        pointers, carried = rest[: kernel.size], rest[kernel.size :]
        totals = [start] * 4
        following, after = [], []
        for row, (pointer, known) in enumerate(zip(pointers, carried, strict=True)):
            quads = [known]
            for i in range(1, count):
                place = code.advance(pointer, code.number("mul", "%source_step", i))
                quads.append(code.load(INTS, place, 64))
            totals = [
                total_of_row(isa, code, total, output, quads, row, prepared)
                for total, output in zip(totals, pieces(kernel.size, kernel.stride), strict=True)
            ]
            following.append(quads[kernel.stride])
            after.append(code.advance(pointer, code.number("mul", "%source_step", kernel.stride)))
        scaled = [isa.scale(code, total, factor) for total in totals]
        store_quad(isa, code, scaled, kernel.to, kernel.limit, "A", target, (0, (0, 1, 2, 3)), 0)
        return [code.advance(target, "%target_step"), *after, *following]

    kinds = [("i8*", target), *(("i8*", row) for row in rows), *((INTS, first) for first in firsts)]
    code.repeat(ceil(kernel.width / 4), kinds, quad)


def emit_pairs(
    isa: Avx2,
    kernel: DepthwiseKernel,
    code: Code,
    weights: Value,
    parameters: tuple[Value, Value, Value],
    rows: list[Value],
) -> None:
    """All quads of a row for 16 channels, of pairs of pixels: eight channels first, so that registers suffice."""
    taps = pair_taps(kernel.size, kernel.stride)
    prepared = {
        (row, *tap): halves(code, SHORTS, isa.widen(code, code.advance(weights, 32 * (row * len(taps) + i))), 16)
        for row in range(kernel.size)
        for i, tap in enumerate(taps)
    }
    start, factor, target = parameters
    starts, factors = halves(code, INTS, start, 8), halves(code, FLOATS, factor, 8)

    def total(side: int, output: int, rows: list[Value]) -> Value:
        first, phase, count = pairs_of(kernel.size, kernel.stride, output)
        result = starts[side]
        for number, row in enumerate(rows):
            for pair in range(count):
                quad, half = divmod(first + pair, 2)
                place = code.advance(row, code.number("mul", "%source_step", quad) if quad else 0)
                read = code.load(HALF, code.advance(place, 64 * half + 32 * side), 32)
                products = isa.products(code, read, prepared[number, phase, pair][side])
                result = code.value(f"add {EIGHT} {result}, {products}")
        return result

    for side in (0, 1):

        def quad(_: Value, values: list[Value], side: int = side) -> list[Value]:
            target, *rows = values
            totals = [total(side, output, rows) for output in range(4)]
            isa.put_eight(code, totals, factors[side], kernel.to, kernel.limit, code.advance(target, 64 * side))
            ahead = code.number("mul", "%source_step", kernel.stride)
            return [code.advance(target, "%target_step"), *(code.advance(row, ahead) for row in rows)]

        code.repeat(ceil(kernel.width / 4), [("i8*", target), *(("i8*", row) for row in rows)], quad)


def total_of_row(
    isa: PortableIsa,
    code: Code,
    total: Value,
    output: list[tuple[int, bool, int]],
    quads: list[Value],
    row: int,
    prepared: dict[tuple[int, int], tuple[Value, ...]],
) -> Value:
    for quad, is_shifted, tap in output:
        value = quads[quad]
        if is_shifted:
            arguments = (INTS, quads[quad + 1]), (INTS, value), (INTS, constant("i32", 16, 16))
            value = code.call(INTS, "llvm.fshr.v16i32", *arguments)
        total = isa.dot(code, total, isa.prepare(code, value, False), prepared[row, tap])
    return total


def emit_pool(isa: PortableIsa, kernel: PoolKernel, name: str) -> Code:
    code = Code(name, row_parameters(kernel.size))

    def vector(index: Value, _: list[Value]) -> list[Value]:
        offset = code.number("shl", index, 4)
        rows = [code.advance(f"%row{i}", offset) for i in range(kernel.size)]
        unit = 4 if kernel.target == "A" else 1
        target = code.advance("%target", code.number("mul", index, 64 * isa.unit if kernel.target == "A" else 16))

        def pixels(count: int, target: Value, rows: list[Value]) -> None:
            found = [emit_maximum(kernel, code, rows, x) for x in range(count)]
            if kernel.target == "P":
                code.store("<16 x i8>", found[0], target, 16)
                return
            isa.put_bytes(code, found + [NOTHING] * (4 - count), target)

        def step(_: Value, values: list[Value]) -> list[Value]:
            target, *rows = values
            pixels(unit, target, rows)
            ahead = unit * kernel.stride * kernel.lanes
            return [code.advance(target, "%target_step"), *(code.advance(row, ahead) for row in rows)]

        whole, rest = divmod(kernel.width, unit)
        values = [target, *rows]
        if whole:
            values = code.repeat(whole, [("i8*", value) for value in values], step)
        if rest:
            pixels(rest, values[0], values[1:])
        return []

    code.repeat("%vectors", [], vector)
    return code


def emit_maximum(kernel: PoolKernel, code: Code, rows: list[Value], x: int) -> Value:
    found = None
    for row in rows:
        for column in range(kernel.size):
            value = code.load("<16 x i8>", code.advance(row, (x * kernel.stride + column) * kernel.lanes), 16)
            both = ("<16 x i8>", value), ("<16 x i8>", found or value)
            found = value if found is None else code.call("<16 x i8>", "llvm.umax.v16i8", *both)
    assert found is not None
    return found
