"""What the kernels ask of a processor: dot products of four bytes, rounding, and packing to bytes.

All give the same bits. Vectors are 64 bytes wide for every processor; LLVM splits them where registers are narrower.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from mgq.export.native.emit.code import BYTES, FLOATS, INTS, Code, Value, constant, float_text

SHORTS = "<32 x i16>"
MAGIC = 12582912.0
"""1.5 * 2**23: a float32 below 2**22 plus this has the value, rounded half to even, in its lowest bits."""
MAGIC_BITS = 0x4B400000


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


class Portable:
    """Plain vectors, for any processor that LLVM compiles for."""

    name = "portable"
    most: ClassVar[Mapping[int, int]] = {1: 4, 2: 2, 4: 1}
    """Pixels a tile, by its vectors of outputs."""
    widest = 4
    """Vectors of a classifier's outputs a tile."""

    def splits(self, vectors: int) -> list[int]:
        """``vectors`` of outputs as tiles."""
        return [1] * vectors

    def prepare(self, code: Code, values: Value, signed: bool) -> tuple[Value, ...]:
        """What ``dot`` wants of 64 bytes, INTS."""
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

    def scaled(self, code: Code, total: Value, factor: Value) -> Value:
        value = code.value(f"sitofp {INTS} {total} to {FLOATS}")
        return code.value(f"fmul {FLOATS} {value}, {factor}")

    def limited(self, code: Code, value: Value, low: float, high: float) -> Value:
        for comparison, limit in (("olt", high), ("ogt", low)):
            bound = constant("float", float_text(limit), 16)
            is_within = code.value(f"fcmp {comparison} {FLOATS} {value}, {bound}")
            value = code.value(f"select <16 x i1> {is_within}, {FLOATS} {value}, {FLOATS} {bound}")
        return value

    def rounded(self, code: Code, value: Value) -> Value:
        """Halves to even, INTS. Values beyond 2**22 have to be limited before."""
        moved = code.value(f"fadd {FLOATS} {value}, {constant('float', float_text(MAGIC), 16)}")
        bits = code.as_type(moved, FLOATS, INTS)
        return code.value(f"sub {INTS} {bits}, {constant('i32', MAGIC_BITS, 16)}")

    def integers(self, code: Code, value: Value, to: Range) -> Value:
        """``value`` as integers that ``packed`` takes, INTS."""
        return self.rounded(code, self.limited(code, value, to.low - to.zero, to.high - to.zero))

    def requantized(self, code: Code, value: Value, to: Range) -> Value:
        """``value``, FLOATS, rounded and limited to ``to``, without its zero point, still FLOATS."""
        limited = self.limited(code, value, to.low - to.zero, to.high - to.zero)
        return code.value(f"sitofp {INTS} {self.rounded(code, limited)} to {FLOATS}")

    def packed(self, code: Code, four: list[Value], to: Range) -> Value:
        """Four vectors of 16 integers as bytes: by four of the 16, one vector after the other."""
        narrow = [code.value(f"trunc {INTS} {value} to <16 x i8>") for value in four]
        pairs = [join_vectors(code, "<16 x i8>", narrow[i : i + 2], 16) for i in (0, 2)]
        order = [16 * vector + 4 * part + i for part in range(4) for vector in range(4) for i in range(4)]
        result = code.shuffle("<32 x i8>", pairs[0], pairs[1], order)
        if to.zero:
            result = code.value(f"xor {BYTES} {result}, {constant('i8', -128, 64)}")
        return result


class Saturating(Portable):
    """Processors that round, and saturate to bytes, by instructions of their own."""

    def requantized(self, code: Code, value: Value, to: Range) -> Value:
        limited = self.limited(code, value, to.low - to.zero, to.high - to.zero)
        return code.call(FLOATS, "llvm.roundeven.v16f32", (FLOATS, limited))

    def finished(self, code: Code, result: Value, to: Range) -> Value:
        """Bytes that saturated around 0, moved to the zero point and limited."""
        if to.zero:
            result = code.value(f"xor {BYTES} {result}, {constant('i8', -128, 64)}")
        for name, limit, widest in (("umax", to.low, 0), ("umin", to.high, 255)):
            if limit != widest:
                bound = constant("i8", limit - 256 if limit > 127 else limit, 64)
                result = code.call(BYTES, f"llvm.{name}.v64i8", (BYTES, result), (BYTES, bound))
        return result


class Avx512Vnni(Saturating):
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
        """Saturation is left to ``packed``. What overflows int32 would come out negative: callers rule that out."""
        name = "llvm.x86.avx512.mask.cvtps2dq.512"
        return code.call(INTS, name, (FLOATS, value), (INTS, "undef"), ("i16", "-1"), ("i32", "4"))

    def packed(self, code: Code, four: list[Value], to: Range) -> Value:
        shorts = [
            code.call(SHORTS, "llvm.x86.avx512.packssdw.512", (INTS, four[i]), (INTS, four[i + 1])) for i in (0, 2)
        ]
        name = "llvm.x86.avx512.packsswb.512" if to.zero else "llvm.x86.avx512.packuswb.512"
        return self.finished(code, code.call(BYTES, name, (SHORTS, shorts[0]), (SHORTS, shorts[1])), to)


class Avx2(Saturating):
    """256-bit vectors; products by ``vpmaddwd``, which does not saturate."""

    name = "avx2"
    most: ClassVar[Mapping[int, int]] = {1: 4, 2: 2, 4: 1}

    def prepare(self, code: Code, values: Value, signed: bool) -> tuple[Value, ...]:
        """Bytes 0 and 2, and bytes 1 and 3, as 16-bit integers."""
        words = code.as_type(values, INTS, SHORTS)
        shift, eight = "ashr" if signed else "lshr", constant("i16", 8, 32)
        if signed:
            low = code.value(f"ashr {SHORTS} {code.value(f'shl {SHORTS} {words}, {eight}')}, {eight}")
        else:
            low = code.value(f"and {SHORTS} {words}, {constant('i16', 255, 32)}")
        return low, code.value(f"{shift} {SHORTS} {words}, {eight}")

    def dot(self, code: Code, total: Value, values: tuple[Value, ...], weights: tuple[Value, ...]) -> Value:
        name = "llvm.x86.avx2.pmadd.wd"
        for value, weight in zip(values, weights, strict=True):
            pairs = zip(halves(code, SHORTS, value, 16), halves(code, SHORTS, weight, 16), strict=True)
            parts = [code.call("<8 x i32>", name, ("<16 x i16>", x), ("<16 x i16>", w)) for x, w in pairs]
            total = code.value(f"add {INTS} {total}, {join_vectors(code, '<8 x i32>', parts, 8)}")
        return total

    def integers(self, code: Code, value: Value, to: Range) -> Value:
        parts = [
            code.call("<8 x i32>", "llvm.x86.avx.cvt.ps2dq.256", ("<8 x float>", half))
            for half in halves(code, FLOATS, value, 8)
        ]
        return join_vectors(code, "<8 x i32>", parts, 8)

    def packed(self, code: Code, four: list[Value], to: Range) -> Value:
        split = [halves(code, INTS, value, 8) for value in four]
        name = "llvm.x86.avx2.packsswb" if to.zero else "llvm.x86.avx2.packuswb"
        parts = []
        for side in (0, 1):
            shorts = [
                code.call(
                    "<16 x i16>",
                    "llvm.x86.avx2.packssdw",
                    ("<8 x i32>", split[i][side]),
                    ("<8 x i32>", split[i + 1][side]),
                )
                for i in (0, 2)
            ]
            parts.append(code.call("<32 x i8>", name, ("<16 x i16>", shorts[0]), ("<16 x i16>", shorts[1])))
        return self.finished(code, join_vectors(code, "<32 x i8>", parts, 32), to)


class AvxVnni(Avx2):
    """256-bit vectors and the dot product of four bytes."""

    name = "avx-vnni"

    def prepare(self, code: Code, values: Value, signed: bool) -> tuple[Value, ...]:
        return (values,)

    def dot(self, code: Code, total: Value, values: tuple[Value, ...], weights: tuple[Value, ...]) -> Value:
        split = [halves(code, INTS, value, 8) for value in (total, values[0], weights[0])]
        parts = [
            code.call("<8 x i32>", "llvm.x86.avx512.vpdpbusd.256", *(("<8 x i32>", part[side]) for part in split))
            for side in (0, 1)
        ]
        return join_vectors(code, "<8 x i32>", parts, 8)
