"""Emits the first and the last kernel: pixels in planes to rows of four bytes a pixel, and the mean over positions."""

from __future__ import annotations

from dataclasses import dataclass

from mgq.export.native.emit.code import FLOATS, INTS, Code, Value, constant
from mgq.export.native.emit.isa import PortableIsa, Range
from mgq.export.native.emit.rows import store_quad

POINTERS = tuple(("i8*", name) for name in ("source", "target"))


@dataclass(frozen=True)
class MeanKernel:
    """Of ``height`` x ``width`` positions of 16 channels in layout A, whose rows follow one another; to layout P."""

    height: int
    width: int
    to: Range
    limit: bool


def emit_pixels(height: int, width: int, channels: int, name: str) -> Code:
    """A row of ``channels`` planes at ``source`` to four bytes a pixel at ``target``, its first pixel."""
    code = Code(name, POINTERS)
    whole, rest = divmod(width, 16)
    for count, start, times in ((16, 0, whole), (1, 16 * whole, rest)):
        if times:
            put_pixels(code, ("%source", "%target"), (count, start, times), channels, height * width)
    return code


def put_pixels(
    code: Code, pointers: tuple[Value, Value], span: tuple[int, int, int], channels: int, plane: int
) -> None:
    """``times`` times ``count`` pixels from ``start`` on."""
    count, start, times = span
    narrow, wide = (f"<{count} x i8>", f"<{count} x i32>")

    def step(index: Value) -> None:
        first = code.number("add", code.number("mul", index, count), start)
        source = code.advance(pointers[0], first)
        word = ""
        for channel in range(channels):
            value = code.value(f"zext {narrow} {code.load(narrow, code.advance(source, channel * plane))} to {wide}")
            if channel:
                value = code.value(f"shl {wide} {value}, {constant('i32', 8 * channel, count)}")
                value = code.value(f"or {wide} {word}, {value}")
            word = value
        code.store(wide, word, code.advance(pointers[1], code.number("mul", first, 4)))

    code.for_each(times, step)


def emit_mean(isa: PortableIsa, kernel: MeanKernel, name: str) -> Code:
    pointers = ("source", "bias", "factors", "target")
    code = Code(name, (*(("i8*", p) for p in pointers), ("i64", "source_step")))
    whole, rest = divmod(kernel.width, 4)

    def row(_: Value, values: list[Value]) -> list[Value]:
        pointer, total = values
        if whole:
            pointer, total = code.repeat(whole, [("i8*", pointer), (INTS, total)], lambda _, v: add(4, v))
        if rest:
            pointer, total = add(rest, [pointer, total])
        return [pointer, total]

    def add(count: int, values: list[Value]) -> list[Value]:
        pointer, total = values
        for number in range(count):
            total = code.value(f"add {INTS} {total}, {isa.pixel(code, pointer, number)}")
        return [code.advance(pointer, "%source_step"), total]

    start = [("i8*", "%source"), (INTS, code.load(INTS, "%bias", 64))]
    ends = code.repeat(kernel.height, start, row)
    scaled = isa.scale(code, ends[1], code.load(FLOATS, "%factors", 64))
    one = (0, (0, None, None, None))
    store_quad(isa, code, [scaled, None, None, None], kernel.to, kernel.limit, "P", "%target", one, 0)
    return code
