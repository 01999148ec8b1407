"""Instruction sets: dot products of four bytes, rounding, and packing to bytes, for each kind of processor. All give
the same bits. Vectors are 64 bytes wide for every processor; LLVM splits them where registers are narrower.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from mgq.export.native.emit.code import BYTES, FLOATS, INTS, Code, Value, constant, float_text

SHORTS, HALF, EIGHT = "<32 x i16>", "<16 x i16>", "<8 x i32>"
MAGIC = 12582912.0
"""1.5 * 2**23: a float32 below 2**22 plus this has the value, rounded half to even, in its lowest bits."""
MAGIC_BITS = 0x4B400000
TO_D = [16 * part + 4 * pixel + channel for part in range(4) for channel in range(4) for pixel in range(4)]
"""From layout A to D, and back, within 64 bytes."""
TO_P = [4 * part + pixel for pixel in range(4) for part in range(4)]
"""From layout A to P, and back, as 16 words."""
NOTHING = "zeroinitializer"


@dataclass(frozen=True)
class Range:
    """uint8 values ``low`` to ``high``; ``zero`` stands for 0."""

    zero: int
    low: int = 0
    high: int = 255


def halves(code: Code, kind: str, value: Value, count: int) -> list[Value]:
    """Two vectors of ``count`` elements each."""
    return [code.shuffle(kind, value, "undef", list(range(start, start + count))) for start in (0, count)]


def join_vectors(code: Code, kind: str, parts: list[Value], count: int) -> Value:
    return code.shuffle(kind, parts[0], parts[1], list(range(2 * count)))


class PortableIsa:
    """Plain vectors, for any processor that LLVM compiles for."""

    name = "portable"
    most: ClassVar[Mapping[int, int]] = {1: 4, 2: 2, 4: 1}
    """Pixels a tile, by its vectors of outputs."""
    widest = 4
    """Vectors of a classifier's outputs a tile."""
    unit = 1
    """Bytes of a value in layouts A and D. In layout P it is one byte."""

    def splits(self, vectors: int) -> list[int]:
        """``vectors`` of outputs as tiles."""
        return [1] * vectors

    def weight_order(self, layout: str) -> Sequence[int]:
        """Which of 64 weights, four inputs for each of 16 outputs, come first for a source in ``layout``."""
        return range(64)

    def weights(self, code: Code, pointer: Value) -> tuple[Value, ...]:
        """The 64 weights at ``pointer``, as operands of ``dot``."""
        return self.prepare(code, code.load(INTS, pointer, 64), True)

    def wide_weights(self, code: Code, pointer: Value) -> tuple[Value, ...]:
        """The same of weights that were widened to ``unit`` bytes each."""
        return self.weights(code, pointer)

    def inputs(self, code: Code, pointer: Value, layout: str) -> tuple[Value, ...]:
        """The four values at ``pointer``, broadcast to all outputs, as operands of ``dot``."""
        return self.prepare(code, code.broadcast(pointer), False)

    def prepare(self, code: Code, values: Value, signed: bool) -> tuple[Value, ...]:
        """64 bytes, INTS, as operands of ``dot``."""
        halves = []
        for place in (0, 8, 16, 24):
            moved = code.value(f"shl {INTS} {values}, {constant('i32', 24 - place, 16)}") if place < 24 else values
            halves.append(code.value(f"{'ashr' if signed else 'lshr'} {INTS} {moved}, {constant('i32', 24, 16)}"))
        return tuple(halves)

    def dot(self, code: Code, total: Value, values: tuple[Value, ...], weights: tuple[Value, ...]) -> Value:
        """``total`` plus the products of four unsigned bytes with four signed ones, 16 times."""
        for value, weight in zip(values, weights, strict=True):
            product = code.value(f"mul {INTS} {value}, {weight}")
            total = code.value(f"add {INTS} {total}, {product}")
        return total

    def scale(self, code: Code, total: Value, factor: Value) -> Value:
        value = code.value(f"sitofp {INTS} {total} to {FLOATS}")
        return code.value(f"fmul {FLOATS} {value}, {factor}")

    def limit(self, code: Code, value: Value, low: float, high: float, count: int = 16) -> Value:
        kind = f"<{count} x float>"
        for comparison, limit in (("olt", high), ("ogt", low)):
            bound = constant("float", float_text(limit), count)
            is_within = code.value(f"fcmp {comparison} {kind} {value}, {bound}")
            value = code.value(f"select <{count} x i1> {is_within}, {kind} {value}, {kind} {bound}")
        return value

    def round(self, code: Code, value: Value) -> Value:
        """Halves to even, INTS. Values beyond 2**22 have to be limited before."""
        moved = code.value(f"fadd {FLOATS} {value}, {constant('float', float_text(MAGIC), 16)}")
        bits = code.as_type(moved, FLOATS, INTS)
        return code.value(f"sub {INTS} {bits}, {constant('i32', MAGIC_BITS, 16)}")

    def integers(self, code: Code, value: Value, to: Range) -> Value:
        """``value`` as integers that ``pack`` takes, INTS."""
        return self.round(code, self.limit(code, value, to.low - to.zero, to.high - to.zero))

    def requantize(self, code: Code, value: Value, to: Range) -> Value:
        """``value``, FLOATS, rounded and limited to ``to``, without its zero point, still FLOATS."""
        limited = self.limit(code, value, to.low - to.zero, to.high - to.zero)
        return code.value(f"sitofp {INTS} {self.round(code, limited)} to {FLOATS}")

    def pack(self, code: Code, four: list[Value], to: Range) -> Value:
        """Four vectors of 16 integers as bytes: by four of the 16, one vector after the other."""
        narrow = [code.value(f"trunc {INTS} {value} to <16 x i8>") for value in four]
        pairs = [join_vectors(code, "<16 x i8>", narrow[i : i + 2], 16) for i in (0, 2)]
        order = [16 * vector + 4 * part + i for part in range(4) for vector in range(4) for i in range(4)]
        result = code.shuffle("<32 x i8>", pairs[0], pairs[1], order)
        if to.zero:
            result = code.value(f"xor {BYTES} {result}, {constant('i8', -128, 64)}")
        return result

    def put(self, code: Code, four: list[Value], to: Range, layout: str, pointer: Value) -> None:
        """Store four pixels of 16 integers at ``pointer``, in layout A or D."""
        packed = self.pack(code, four, to)
        if layout == "D":
            packed = code.shuffle(BYTES, packed, "undef", TO_D)
        code.store(BYTES, packed, pointer, 64)

    def put_bytes(self, code: Code, four: list[Value], pointer: Value) -> None:
        """Store four pixels of 16 bytes at ``pointer``, in layout A."""
        pairs = [join_vectors(code, "<16 x i8>", four[i : i + 2], 16) for i in (0, 2)]
        words = code.as_type(join_vectors(code, "<32 x i8>", pairs, 32), BYTES, INTS)
        code.store(INTS, code.shuffle(INTS, words, "undef", TO_P), pointer, 64)

    def pixel(self, code: Code, pointer: Value, number: int) -> Value:
        """The 16 values of pixel ``number`` of the four at ``pointer``, in layout A, as INTS."""
        four = code.load(BYTES, pointer, 64)
        order = [16 * part + 4 * number + i if b == 0 else 64 for part in range(4) for i in range(4) for b in range(4)]
        return code.as_type(code.shuffle(BYTES, four, NOTHING, order), BYTES, INTS)


class SaturatingIsa(PortableIsa):
    """Processors with instructions that round, and saturate to bytes."""

    def requantize(self, code: Code, value: Value, to: Range) -> Value:
        limited = self.limit(code, value, to.low - to.zero, to.high - to.zero)
        return code.call(FLOATS, "llvm.roundeven.v16f32", (FLOATS, limited))

    def finish(self, code: Code, result: Value, to: Range) -> Value:
        """Bytes that saturated around 0, moved to the zero point and limited."""
        if to.zero:
            result = code.value(f"xor {BYTES} {result}, {constant('i8', -128, 64)}")
        for name, limit, widest in (("umax", to.low, 0), ("umin", to.high, 255)):
            if limit != widest:
                bound = constant("i8", limit - 256 if limit > 127 else limit, 64)
                result = code.call(BYTES, f"llvm.{name}.v64i8", (BYTES, result), (BYTES, bound))
        return result


class Avx512Vnni(SaturatingIsa):
    name = "avx512-vnni"
    most: ClassVar[Mapping[int, int]] = {1: 16, 2: 14, 3: 9, 8: 1}
    widest = 8

    def splits(self, vectors: int) -> list[int]:
        if vectors < 3:
            return [vectors]
        if vectors % 3 == 1:
            return [3] * (vectors // 3 - 1) + [2, 2]
        return [3] * (vectors // 3) + [2] * (vectors % 3 // 2)

    def prepare(self, code: Code, values: Value, signed: bool) -> tuple[Value, ...]:
        return (values,)

    def dot(self, code: Code, total: Value, values: tuple[Value, ...], weights: tuple[Value, ...]) -> Value:
        name = "llvm.x86.avx512.vpdpbusd.512"
        return code.call(INTS, name, (INTS, total), (INTS, values[0]), (INTS, weights[0]))

    def integers(self, code: Code, value: Value, to: Range) -> Value:
        """Saturation is left to ``pack``. Values that overflow int32 would become negative: callers exclude them."""
        name = "llvm.x86.avx512.mask.cvtps2dq.512"
        return code.call(INTS, name, (FLOATS, value), (INTS, "undef"), ("i16", "-1"), ("i32", "4"))

    def pack(self, code: Code, four: list[Value], to: Range) -> Value:
        shorts = [
            code.call(SHORTS, "llvm.x86.avx512.packssdw.512", (INTS, four[i]), (INTS, four[i + 1])) for i in (0, 2)
        ]
        name = "llvm.x86.avx512.packsswb.512" if to.zero else "llvm.x86.avx512.packuswb.512"
        return self.finish(code, code.call(BYTES, name, (SHORTS, shorts[0]), (SHORTS, shorts[1])), to)


class HalfVectorIsa(SaturatingIsa):
    """256-bit vectors."""

    most: ClassVar[Mapping[int, int]] = {1: 4, 2: 2, 4: 1}

    def integers(self, code: Code, value: Value, to: Range) -> Value:
        parts = [round_half(code, half) for half in halves(code, FLOATS, value, 8)]
        return join_vectors(code, EIGHT, parts, 8)

    def pack(self, code: Code, four: list[Value], to: Range) -> Value:
        name = "llvm.x86.avx2.packsswb" if to.zero else "llvm.x86.avx2.packuswb"
        parts = [
            code.call("<32 x i8>", name, *((HALF, pair) for pair in side)) for side in self.pack_halves(code, four)
        ]
        return self.finish(code, join_vectors(code, "<32 x i8>", parts, 32), to)

    def pack_halves(self, code: Code, four: list[Value]) -> list[list[Value]]:
        """For 8 channels and the other 8: the first two pixels and the other two as 16-bit integers, four channels of
        one after those of the other."""
        split = [halves(code, INTS, value, 8) for value in four]
        return [pack_pairs(code, [value[side] for value in split]) for side in (0, 1)]


def round_half(code: Code, value: Value) -> Value:
    return code.call(EIGHT, "llvm.x86.avx.cvt.ps2dq.256", ("<8 x float>", value))


def pack_pairs(code: Code, four: list[Value]) -> list[Value]:
    """Four pixels of eight integers as two pairs, 16-bit integers."""
    return [code.call(HALF, "llvm.x86.avx2.packssdw", (EIGHT, four[i]), (EIGHT, four[i + 1])) for i in (0, 2)]


class Avx2(HalfVectorIsa):
    """Products by ``vpmaddwd``, which does not saturate: of 16-bit integers, as which layouts A and D hold values, so
    that each is widened once and not where it is read. Layout D has pairs of pixels, 16 channels of each."""

    name = "avx2"
    unit = 2

    def weight_order(self, layout: str) -> Sequence[int]:
        """Pairs of inputs: what lies together in layout A, and what ``prepare`` makes of bytes."""
        pairs = ((0, 1), (2, 3)) if layout == "A" else ((0, 2), (1, 3))
        return [4 * output + i for pair in pairs for output in range(16) for i in pair]

    def weights(self, code: Code, pointer: Value) -> tuple[Value, ...]:
        return self.widen(code, pointer), self.widen(code, code.advance(pointer, 32))

    def wide_weights(self, code: Code, pointer: Value) -> tuple[Value, ...]:
        return tuple(code.load(SHORTS, code.advance(pointer, place), 64) for place in (0, 64))

    def widen(self, code: Code, pointer: Value) -> Value:
        """32 signed bytes as SHORTS."""
        return code.value(f"sext <32 x i8> {code.load('<32 x i8>', pointer, 32)} to {SHORTS}")

    def inputs(self, code: Code, pointer: Value, layout: str) -> tuple[Value, ...]:
        if layout != "A":
            return self.prepare(code, code.broadcast(pointer), False)
        return tuple(code.as_type(code.broadcast(code.advance(pointer, place)), INTS, SHORTS) for place in (0, 4))

    def prepare(self, code: Code, values: Value, signed: bool) -> tuple[Value, ...]:
        """Unsigned bytes 0 and 2, and bytes 1 and 3, as 16-bit integers."""
        words = code.as_type(values, INTS, SHORTS)
        low = code.value(f"and {SHORTS} {words}, {constant('i16', 255, 32)}")
        return low, code.value(f"lshr {SHORTS} {words}, {constant('i16', 8, 32)}")

    def dot(self, code: Code, total: Value, values: tuple[Value, ...], weights: tuple[Value, ...]) -> Value:
        for value, weight in zip(values, weights, strict=True):
            pairs = zip(halves(code, SHORTS, value, 16), halves(code, SHORTS, weight, 16), strict=True)
            parts = [self.products(code, x, w) for x, w in pairs]
            total = code.value(f"add {INTS} {total}, {join_vectors(code, EIGHT, parts, 8)}")
        return total

    def products(self, code: Code, values: Value, weights: Value) -> Value:
        """Sums of two products, 8 times."""
        return code.call(EIGHT, "llvm.x86.avx2.pmadd.wd", (HALF, values), (HALF, weights))

    def put(self, code: Code, four: list[Value], to: Range, layout: str, pointer: Value) -> None:
        for side, pairs in enumerate(self.pack_halves(code, four)):
            if layout == "A":
                self.put_words(code, pairs, to, code.advance(pointer, 64 * side))
                continue
            for number, pair in enumerate(pairs):
                order = [8 * lane + 4 * pixel + i for lane in (0, 1) for i in range(4) for pixel in (0, 1)]
                place = code.advance(pointer, 64 * number + 32 * side)
                code.store(HALF, code.shuffle(HALF, self.narrow(code, pair, to), "undef", order), place, 32)

    def put_words(self, code: Code, pairs: list[Value], to: Range, pointer: Value) -> None:
        """Store eight channels of four pixels, given as by ``pack_pairs``, in layout A."""
        first, second = (self.narrow(code, pair, to) for pair in pairs)
        for word in (0, 1):
            order = [8 * word + 16 * pair + i for pair in (0, 1) for i in range(8)]
            code.store(HALF, code.shuffle(HALF, first, second, order), code.advance(pointer, 32 * word), 32)

    def put_eight(self, code: Code, totals: list[Value], factor: Value, to: Range, limit: bool, pointer: Value) -> None:
        """Scale, round and store four pixels of eight sums, in layout A."""
        kind, integers = "<8 x float>", []
        for total in totals:
            value = code.value(f"fmul {kind} {code.value(f'sitofp {EIGHT} {total} to {kind}')}, {factor}")
            if limit:
                value = self.limit(code, value, to.low - to.zero, to.high - to.zero, 8)
            integers.append(round_half(code, value))
        self.put_words(code, pack_pairs(code, integers), to, pointer)

    def narrow(self, code: Code, value: Value, to: Range) -> Value:
        """16-bit integers that saturated around 0, moved to the zero point and limited."""
        if to.zero:
            value = code.call(HALF, "llvm.sadd.sat.v16i16", (HALF, value), (HALF, constant("i16", to.zero, 16)))
        for name, limit in (("smax", to.low), ("smin", to.high)):
            value = code.call(HALF, f"llvm.{name}.v16i16", (HALF, value), (HALF, constant("i16", limit, 16)))
        return value

    def put_bytes(self, code: Code, four: list[Value], pointer: Value) -> None:
        wide = [code.value(f"zext <16 x i8> {value} to {INTS}") for value in four]
        self.put(code, wide, Range(0), "A", pointer)

    def pixel(self, code: Code, pointer: Value, number: int) -> Value:
        kinds = [f"<{count} x i16>" for count in (4, 8)]
        words = [code.load(kinds[0], code.advance(pointer, 32 * word + 8 * number), 8) for word in range(4)]
        pairs = [join_vectors(code, kinds[0], words[i : i + 2], 4) for i in (0, 2)]
        return code.value(f"zext {HALF} {join_vectors(code, kinds[1], pairs, 8)} to {INTS}")


class AvxVnni(HalfVectorIsa):
    """256-bit vectors and the dot product of four bytes."""

    name = "avx-vnni"

    def prepare(self, code: Code, values: Value, signed: bool) -> tuple[Value, ...]:
        return (values,)

    def dot(self, code: Code, total: Value, values: tuple[Value, ...], weights: tuple[Value, ...]) -> Value:
        split = [halves(code, INTS, value, 8) for value in (total, values[0], weights[0])]
        parts = [
            code.call(EIGHT, "llvm.x86.avx512.vpdpbusd.256", *((EIGHT, part[side]) for part in split))
            for side in (0, 1)
        ]
        return join_vectors(code, EIGHT, parts, 8)
