"""Convolutions row by row: tiles of a few pixels times one to four vectors of 16 outputs.

Layouts of a row: ``A`` is [4 pixels][C / 4][4 pixels][4 channels]; ``D`` is [4 pixels][C][4 pixels], from some pixels
left of the image; ``P`` is [pixel][C], with some pixels at both sides; ``F`` is a float32 for each output.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil

from mgq.export.native.emit.code import BYTES, FLOATS, INTS, Code, Value, constant, float_text
from mgq.export.native.emit.isa import NOTHING, TO_P, PortableIsa, Range

Quad = tuple[int | None, ...]
PARAMETERS = (
    *(("i8*", name) for name in ("source", "segments", "weights", "bias", "factors", "target", "residual", "sum")),
    *(("i64", name) for name in ("count", "source_step", "target_step", "residual_step")),
)


@dataclass(frozen=True)
class Residual:
    """What is added: the range of the convolution's own output, layout and zero of the other summand."""

    own: Range
    layout: str
    zero: int


@dataclass(frozen=True)
class RowKernel:
    """``step``: from one output pixel to the next in the source, in pixels for layout A and in bytes for P.

    ``limit``: the scaled sums may be beyond int32. ``pad`` and ``right``: pixels left of the image
    and behind it in layout D. ``wide``: the weights were widened.
    """

    width: int
    vectors: int
    source: str
    step: int
    target: str
    pad: int = 0
    to: Range | None = None
    residual: Residual | None = None
    limit: bool = False
    right: int = 0
    wide: bool = False


def emit_widen(isa: PortableIsa, name: str) -> Code:
    """``count`` times 32 weights from one place to another, widened to the unit of ``isa``."""
    code = Code(name, (("i8*", "source"), ("i8*", "target"), ("i64", "count")))
    kind = f"<32 x i{8 * isa.unit}>"

    def widen(_: Value, values: list[Value]) -> list[Value]:
        source, target = values
        narrow = code.load("<32 x i8>", source, 32)
        code.store(kind, code.value(f"sext <32 x i8> {narrow} to {kind}"), target, 64)
        return [code.advance(source, 32), code.advance(target, 32 * isa.unit)]

    code.repeat("%count", [("i8*", "%source"), ("i8*", "%target")], widen)
    return code


def emit_row(isa: PortableIsa, kernel: RowKernel, name: str) -> Code:
    """The function ``name`` for one row and one tile of outputs."""
    code = Code(name, PARAMETERS)
    for first, tile, same in groups(kernel, isa):
        emit_tiles(isa, kernel, code, first, tile, same)
    return code


def groups(kernel: RowKernel, isa: PortableIsa) -> Iterator[tuple[int, list[Quad], int]]:
    """First pixel, tile relative to it, and how many of the same kind follow one another."""
    tiles = tiles_of(kernel, isa)
    start = 0
    while start < len(tiles):
        first, tile = tiles[start]
        same = 1
        while start + same < len(tiles) and tiles[start + same][1] == tile:
            same += 1
        yield first, tile, same
        start += same


def tiles_of(kernel: RowKernel, isa: PortableIsa) -> list[tuple[int, list[Quad]]]:
    """Tiles of a row: their first pixel and, relative to it, their quads."""
    most = isa.most[kernel.vectors]
    if kernel.target in "PF":
        by_quads = kernel.source == "A" or (kernel.residual is not None and kernel.residual.layout == "A")
        return list(spans(kernel.width, max(4, most // 4 * 4) if by_quads else most))
    pad = kernel.pad if kernel.target == "D" else 0
    count = ceil((kernel.width + pad + (kernel.right if kernel.target == "D" else 0)) / 4)
    quads = [
        tuple(x if 0 <= x < kernel.width else None for x in range(4 * q - pad, 4 * q - pad + 4)) for q in range(count)
    ]
    tiles: list[list[Quad]] = []
    for quad in quads:
        fits = bool(tiles) and pixels_in([*tiles[-1], quad]) <= most and len(tiles[-1]) < 4
        if fits:
            tiles[-1].append(quad)
        else:
            tiles.append([quad])
    starts = [sum(len(tile) for tile in tiles[:i]) for i in range(len(tiles))]
    return [
        (4 * start, [tuple(None if x is None else x - 4 * start for x in quad) for quad in tile])
        for start, tile in zip(starts, tiles, strict=True)
    ]


def spans(width: int, most: int) -> Iterator[tuple[int, list[Quad]]]:
    size = ceil(width / ceil(width / most))
    size = min(most, ceil(size / 4) * 4) if most % 4 == 0 else size
    for first in range(0, width, size):
        count = min(size, width - first)
        yield first, [tuple(x if x < count else None for x in range(q, q + 4)) for q in range(0, count, 4)]


def pixels_in(tile: Sequence[Quad]) -> int:
    return sum(x is not None for quad in tile for x in quad)


def emit_tiles(isa: PortableIsa, kernel: RowKernel, code: Code, first: int, tile: list[Quad], same: int) -> None:
    """``same`` times ``tile``, from pixel ``first`` on."""
    by_quads = kernel.target in "AD"
    size = 4 * len(tile) if by_quads else pixels_in(tile)

    def move(pointer: Value, layout: str, step: str, count: int) -> Value:
        units = count // 4 if layout in "AD" else count
        return code.advance(pointer, code.number("mul", step, units)) if units else pointer

    def source_at(pointer: Value, count: int) -> Value:
        if kernel.source == "A":
            return move(pointer, "A", "%source_step", count * kernel.step)
        return code.advance(pointer, count * kernel.step)

    layout = kernel.residual.layout if kernel.residual else "A"
    carried = [
        ("i8*", source_at("%source", first)),
        ("i8*", move("%target", kernel.target, "%target_step", first)),
        ("i8*", move("%residual", layout, "%residual_step", first)),
    ]

    def body(_: Value, values: list[Value]) -> list[Value]:
        source, target, residual = values
        totals = sums(isa, kernel, code, tile, source) if pixels_in(tile) else {}
        for j, quad in enumerate(tile):
            for vector in range(kernel.vectors):
                finish_quad(isa, kernel, code, (j, quad), vector, totals, (target, residual))
        return [
            source_at(source, size),
            move(target, kernel.target, "%target_step", size),
            move(residual, layout, "%residual_step", size),
        ]

    code.repeat(same, carried, body)


def sums(
    isa: PortableIsa, kernel: RowKernel, code: Code, tile: list[Quad], source: Value
) -> dict[tuple[int, int], Value]:
    """Bias and products of all pixels of ``tile`` with all vectors, INTS."""
    pixels = [x for quad in tile for x in quad if x is not None]
    keys = [(x, vector) for x in pixels for vector in range(kernel.vectors)]
    biases = [code.load(INTS, code.advance("%bias", 64 * vector), 64) for vector in range(kernel.vectors)]
    places = {x: divmod(x * kernel.step, 4) if kernel.source == "A" else (0, 0) for x in pixels}
    advance = 16 * isa.unit if kernel.source == "A" else 4
    size, read = (64 * isa.unit, isa.wide_weights) if kernel.wide else (64, isa.weights)

    def segment(index: Value, values: list[Value]) -> list[Value]:
        entry = code.advance("%segments", code.number("shl", index, 3))
        offset, length = code.load_offset(entry), code.load_offset(code.advance(entry, 4))
        begin = code.advance(source, offset)
        quads = sorted({quad for quad, _ in places.values()})
        pointers = {
            quad: code.advance(begin, code.number("mul", "%source_step", quad) if quad else 0) for quad in quads
        }

        def word(_: Value, values: list[Value]) -> list[Value]:
            weights, distance, *totals = values
            prepared = [read(code, code.advance(weights, size * vector)) for vector in range(kernel.vectors)]
            bases = {quad: code.advance(pointer, distance) for quad, pointer in pointers.items()}
            results = []
            for i, x in enumerate(pixels):
                quad, pixel = places[x]
                within = 4 * isa.unit * pixel if kernel.source == "A" else x * kernel.step
                four = isa.inputs(code, code.advance(bases[quad], within), kernel.source)
                for vector in range(kernel.vectors):
                    total = totals[i * kernel.vectors + vector]
                    results.append(isa.dot(code, total, four, prepared[vector]))
            return [code.advance(weights, size * kernel.vectors), code.number("add", distance, advance), *results]

        weights, *totals = values
        kinds = [("i8*", weights), ("i64", "0"), *((INTS, total) for total in totals)]
        weights, _, *totals = code.repeat(length, kinds, word)
        return [weights, *totals]

    start = [("i8*", "%weights"), *((INTS, biases[vector]) for _, vector in keys)]
    _, *totals = code.repeat("%count", start, segment)
    return dict(zip(keys, totals, strict=True))


def finish_quad(
    isa: PortableIsa,
    kernel: RowKernel,
    code: Code,
    place: tuple[int, Quad],
    vector: int,
    totals: dict[tuple[int, int], Value],
    pointers: tuple[Value, Value],
) -> None:
    """Scale, add, round and store four pixels of 16 outputs."""
    j, quad = place
    target, residual = pointers
    factors = code.load(FLOATS, code.advance("%factors", 64 * vector), 64)
    values = [None if x is None else isa.scale(code, totals[x, vector], factors) for x in quad]
    if kernel.target == "F":
        for x, value in zip(quad, values, strict=True):
            if value is not None:
                code.store(FLOATS, value, code.advance(target, 64 * vector + (x or 0)))
        return
    assert kernel.to is not None
    if kernel.residual is not None:
        others = residual_of(isa, kernel.residual, code, residual, (j, quad), vector)
        values = [
            None if mine is None else sum_values(isa, kernel.residual, code, mine, other)
            for mine, other in zip(values, others, strict=True)
        ]
    store_quad(isa, code, values, kernel.to, kernel.limit, kernel.target, target, (j, quad), vector)


def store_quad(
    isa: PortableIsa,
    code: Code,
    values: Sequence[Value | None],
    to: Range,
    limit: bool,
    layout: str,
    target: Value,
    place: tuple[int, Quad],
    vector: int,
) -> None:
    j, quad = place
    if limit:
        values = [v and isa.limit(code, v, to.low - to.zero, to.high - to.zero) for v in values]
    integers = [NOTHING if value is None else isa.integers(code, value, to) for value in values]
    if layout in "AD":
        row = code.advance(target, code.number("mul", "%target_step", j) if j else 0)
        isa.put(code, integers, to, layout, code.advance(row, 64 * isa.unit * vector))
        return
    packed = isa.pack(code, integers, to)
    words = code.shuffle(INTS, code.as_type(packed, BYTES, INTS), "undef", TO_P)
    for i, x in enumerate(quad):
        if x is not None:
            pixel = code.shuffle(INTS, words, "undef", range(4 * i, 4 * i + 4))
            row = code.advance(target, code.number("mul", "%target_step", x) if x else 0)
            code.store("<4 x i32>", pixel, code.advance(row, 16 * vector), 16)


def residual_of(
    isa: PortableIsa, residual: Residual, code: Code, pointer: Value, place: tuple[int, Quad], vector: int
) -> list[Value]:
    """The other summands of a quad without their zero point, FLOATS."""
    j, quad = place
    results = []
    if residual.layout == "A":
        row = code.advance(pointer, code.number("mul", "%residual_step", j) if j else 0)
        four = code.advance(row, 64 * isa.unit * vector)
    for i, x in enumerate(quad):
        if x is None:
            results.append(NOTHING)
            continue
        if residual.layout == "A":
            integers = isa.pixel(code, four, i)
        else:
            row = code.advance(pointer, code.number("mul", "%residual_step", x) if x else 0)
            integers = code.value(
                f"zext <16 x i8> {code.load('<16 x i8>', code.advance(row, 16 * vector), 16)} to {INTS}"
            )
        value = code.value(f"sitofp {INTS} {integers} to {FLOATS}")
        if residual.zero:
            value = code.value(f"fsub {FLOATS} {value}, {constant('float', float_text(residual.zero), 16)}")
        results.append(value)
    return results


def sum_values(isa: PortableIsa, residual: Residual, code: Code, mine: Value, other: Value) -> Value:
    """Own value, put on its own grid first, and the other one, each times its factor."""
    parts = []
    for value, place in ((isa.requantize(code, mine, residual.own), 0), (other, 64)):
        factor = code.load(FLOATS, code.advance("%sum", place), 64)
        parts.append(code.value(f"fmul {FLOATS} {value}, {factor}"))
    return code.value(f"fadd {FLOATS} {parts[0]}, {parts[1]}")
