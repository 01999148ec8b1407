"""Emits the driver of a network: which kernel runs on which rows, in which order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from mgq.export.native.emit.code import Code, Value, constant
from mgq.export.native.emit.images import MeanKernel, emit_mean, emit_pixels
from mgq.export.native.emit.isa import SHORTS, PortableIsa, Range
from mgq.export.native.emit.rows import PARAMETERS, Residual, RowKernel, emit_row, emit_widen
from mgq.export.native.emit.team import ANSWER, PREPARE, Team
from mgq.export.native.emit.windows import (
    DepthwiseKernel,
    PoolKernel,
    emit_depthwise,
    emit_pool,
    weight_bytes,
)
from mgq.export.native.layout import LANES, Storage
from mgq.export.native.packing import ENTRY, Constants, Tiles, pack_depthwise, pack_tiles
from mgq.export.native.planner import BY_ROWS, Plan, Step, round_up, window_of
from mgq.export.native.program import Conv, Linear, MaxPool, Mean, Tensor

ARGUMENTS = (
    *(("i8*", name) for name in ("constants", "work", "own", "image", "logits")),
    *(("i64", name) for name in ("part", "parts")),
)
"""Constants, the work area of the image, that of this thread, one image and its logits, and which ``part`` of a group
of layers is to be computed."""


WIDENED_PIXELS = 16
"""On smaller maps weights are widened where they are read."""
Span = tuple[Value, Value]
"""The first, and the first behind."""
Tile = tuple[Tiles, int, int]
"""Tiles, the first of its kind among them, and its vectors of outputs."""


@dataclass(frozen=True)
class Module:
    """``text`` in LLVM's language, the constants that its code reads, and the bytes of a thread's work area."""

    text: str
    constants: bytes
    work: int


def emit_module(plan: Plan, isa: PortableIsa, attributes: str = "", linkage: str = "") -> Module:
    """The whole network for ``isa``; ``attributes`` stand behind each function's head, ``linkage`` is that of what
    :mod:`mgq.export.native.emit.team` says."""
    return Driver(plan, isa).module(attributes, linkage)


def range_of(tensor: Tensor) -> Range:
    return Range(tensor.zero, tensor.low, tensor.high)


class Driver:
    def __init__(self, plan: Plan, isa: PortableIsa) -> None:
        self.plan = plan
        self.isa = isa
        self.program = plan.program
        self.constants = Constants()
        self.kernels: dict[object, Code] = {}
        self.functions: list[Code] = []
        self.tiles: dict[int, Tiles] = {}
        self.depthwise: dict[int, tuple[int, int, int, bool]] = {}
        self.widened: dict[int, tuple[int, int]] = {}  # step -> where its wide weights are, and bytes from tile to tile
        self.room = 0

    def module(self, attributes: str, linkage: str) -> Module:
        for i, group in enumerate(self.plan.groups):
            self.function(f"group{i}", partial(self.emit_group, group=group))
        size = self.plan.size + round_up(self.room)
        team = Team([code.name for code in self.functions], size, self.pixels, self.program.classes)
        self.function(ANSWER, self.answer)
        prepare = Code(PREPARE, (("i8*", "own"),))
        self.borders(prepare)
        everything = [*self.kernels.values(), *self.functions, prepare]
        own = {f"@{code.name}(" for code in everything}
        declared = {line for code in everything for line in code.declared if not any(name in line for name in own)}
        written = (code.text(attributes) for code in everything)
        text = "\n".join([*sorted(declared), *written, team.text(attributes, linkage)])
        return Module(text, self.constants.content(), size)

    def function(self, name: str, emit: Callable[[Code], None]) -> None:
        code = Code(name, ARGUMENTS)
        emit(code)
        self.functions.append(code)

    def kernel(self, key: object, emit: Callable[[str], Code]) -> str:
        """The name of the kernel ``key``, which is made where it is new."""
        if key not in self.kernels:
            name = f"kernel{len(self.kernels)}"
            self.kernels[key] = emit(name)
        return self.kernels[key].name

    @property
    def pixels(self) -> int:
        """Bytes of an image."""
        tensor = self.program.tensors[self.program.input]
        return tensor.channels * tensor.height * tensor.width

    # Threads

    def share_of(self, code: Code, count: int) -> Span:
        """The first of ``count`` that is of this part, and the first behind it."""
        first, behind = (code.number("mul", count, part) for part in ("%part", code.number("add", "%part", 1)))
        return code.number("udiv", first, "%parts"), code.number("udiv", behind, "%parts")

    def by_first(self, code: Code, body: Callable[[], None]) -> None:
        """``body`` in one of the parts alone."""
        code.emit_if(code.value("icmp eq i64 %part, 0"), body)

    def storage(self, name: str) -> Storage:
        return self.plan.storages[self.plan.stored[name]]

    def address(self, code: Code, storage: Storage, offset: int = 0) -> Value:
        return code.advance(base_of(storage), storage.offset + storage.origin + offset)

    def row(self, code: Code, storage: Storage, y: Value, offset: int = 0) -> Value:
        """The first pixel of row ``y``."""
        place = y if storage.ring is None else code.number("and", y, storage.ring - 1)
        return code.advance(self.address(code, storage, offset), code.number("mul", place, storage.row_bytes))

    # What comes first

    def borders(self, code: Code) -> None:
        """What stands for the rows above and below an image."""
        self.fill(code, "%own", 0, self.plan.border)
        if self.isa.unit == 1:
            self.fill(code, code.advance("%own", self.plan.border), 128, self.plan.border)
            return

        def widen_entry(index: Value) -> None:
            place = code.advance("%own", code.number("add", code.number("shl", index, 6), self.plan.border))
            code.store(SHORTS, constant("i16", 128, 32), place, 64)

        code.for_each(self.plan.border // 64, widen_entry)

    def read_pixels(self, code: Code, group: list[Step], span: Span | None = None) -> None:
        """The rows ``span`` of the image, or all of them, where ``group`` is the one that reads it."""
        storage = self.storage(self.program.input)
        if group is not self.plan.groups[0]:
            return
        self.border(code, storage)
        tensor = self.program.tensors[self.program.input]
        shape = tensor.height, tensor.width, tensor.channels
        name = self.kernel(("pixels", *shape), partial(emit_pixels, *shape))

        def row(y: Value) -> None:
            source = code.advance("%image", code.number("mul", y, tensor.width))
            code.call("void", name, ("i8*", source), ("i8*", self.row(code, storage, y)))

        code.for_range(*(span or ("0", str(tensor.height))), row)

    def fill(self, code: Code, pointer: Value, value: int, size: int | Value) -> None:
        byte = value - 256 if value > 127 else value
        arguments = ("i8*", pointer), ("i8", str(byte)), ("i64", str(size)), ("i1", "false")
        code.call("void", "llvm.memset.p0i8.i64", *arguments)

    def fill_border(self, code: Code, storage: Storage, pointer: Value, size: int) -> None:
        """``size`` bytes of what lies around ``storage``: whole pixels where they have a colour."""
        if storage.colour is None:
            self.fill(code, pointer, storage.fill, size)
            return
        word = int.from_bytes(bytes(storage.colour), "little", signed=True)

        def put_pixel(index: Value) -> None:
            code.store("i32", str(word), code.advance(pointer, code.number("mul", index, 4)))

        code.for_each(size // 4, put_pixel)

    def border(self, code: Code, storage: Storage) -> None:
        """Fill what lies around the image in layout P."""
        if storage.layout != "P" or not storage.pad:
            return
        if storage.ring is not None:
            self.fill(code, code.advance(base_of(storage), storage.offset), storage.fill, storage.size)
            return
        if storage.own:
            self.edges(code, storage)
        else:
            self.by_first(code, lambda: self.edges(code, storage))

    def edges(self, code: Code, storage: Storage) -> None:
        base = code.advance(base_of(storage), storage.offset)
        edge, side = storage.pad * storage.row_bytes, 2 * storage.pad * storage.step
        self.fill_border(code, storage, base, edge + side // 2)
        self.fill_border(code, storage, code.advance(base, storage.size - edge - side // 2), edge + side // 2)
        if storage.height > 1:
            first = code.advance(base, edge + storage.row_bytes - side // 2)

            def fill_between(y: Value) -> None:
                self.fill_border(code, storage, code.advance(first, code.number("mul", y, storage.row_bytes)), side)

            code.for_each(storage.height - 1, fill_between)

    # Groups

    def emit_group(self, code: Code, group: list[Step]) -> None:
        """This part of ``group``: some rows of its last step, with what they need, or some channels."""
        for step in group:
            self.border(code, self.storage(step.target))
        layer = group[0].layer
        if isinstance(layer, Mean):
            self.emit_mean(code, group[0], layer)
            return
        if isinstance(layer, Linear):
            self.emit_linear(code, group[0], layer)
            return
        for step in group:
            self.pack(step)
        self.reserve_wide(code, group)
        if self.storage(group[-1].target).height < BY_ROWS and not self.is_by_row(group):
            self.read_pixels(code, group)
            self.emit_by_channels(code, group)
            return
        spans = self.spans(code, group)
        self.read_pixels(code, group, spans[0])
        if self.is_by_row(group):
            self.emit_rows(code, group, spans[1:])
            return
        for step, span in zip(group, spans[1:], strict=True):
            self.emit_span(code, step, span)

    # Weights of as many bytes as values

    def reserve_wide(self, code: Code, group: list[Step]) -> None:
        """Reserve memory for the widened weights of ``group``: of one tile at a time, or of all tiles, which are
        widened here, where every tile is used once for each row."""
        by_row, place = self.is_by_row(group), 0
        for step in group:
            target = self.storage(step.target)
            tiles = self.tiles.get(id(step))
            if self.isa.unit == 1 or tiles is None or target.height * target.width < WIDENED_PIXELS:
                continue
            size = self.isa.unit * tiles.most
            self.widened[id(step)] = self.plan.size + place, size if by_row else 0
            self.room = max(self.room, place + size * (len(tiles.vectors) if by_row else 1))
            if by_row:
                place += size * len(tiles.vectors)
                self.widen_all(code, step, tiles)

    def widen_all(self, code: Code, step: Step, tiles: Tiles) -> None:
        for first, count, vectors in tiles.runs():
            tile = tiles, first, vectors
            code.for_each(count, partial(self.widen, code, step, tile))

    def widen(self, code: Code, step: Step, tile: Tile, index: Value) -> None:
        """The weights of tile number ``index`` behind the first of its kind, where they are kept wide."""
        if id(step) in self.widened:
            tiles, first, _ = tile
            name = self.kernel("widen", partial(emit_widen, self.isa))
            entry = self.entry(code, tiles, first, index)
            source, count = (code.load_offset(code.advance(entry, place)) for place in (8, 16))
            target = self.wide_place(code, step, first, index)
            code.call("void", name, ("i8*", code.advance("%constants", source)), ("i8*", target), ("i64", count))

    def wide_place(self, code: Code, step: Step, first: int, index: Value) -> Value:
        place, size = self.widened[id(step)]
        return code.advance(code.advance("%own", place + size * first), code.number("mul", index, size) if size else 0)

    def entry(self, code: Code, tiles: Tiles, first: int, index: Value) -> Value:
        """Tile number ``index`` behind ``first`` in the table."""
        return code.advance(
            "%constants", code.number("add", code.number("mul", index, ENTRY), tiles.table + ENTRY * first)
        )

    def is_by_row(self, group: list[Step]) -> bool:
        """Whether each row goes through all steps before the next one comes."""
        return len(group) > 1 and self.storage(group[0].target).ring is not None

    def spans(self, code: Code, group: list[Step]) -> list[Span]:
        """First row, and the first behind, of what is needed of the source and of each step for this part."""
        found = [self.share_of(code, self.storage(group[-1].target).height)]
        for step in reversed(group):
            first, behind = found[0]
            height = self.storage(step.source).height
            last = self.rows_needed(code, step, code.number("sub", behind, 1), height)
            found.insert(0, (self.first_needed(code, step, first), last))
        return found

    def emit_span(self, code: Code, step: Step, span: Span) -> None:
        """All of the rows ``span``. Of a convolution one tile of outputs after the other: its weights stay near."""
        if not isinstance(step.layer, Conv) or step.layer.is_depthwise:
            code.for_range(*span, lambda y: self.emit_row(code, step, y))
            return
        summands = self.summands(step)
        for first, count, vectors in self.tiles[id(step)].runs():
            tile = self.tiles[id(step)], first, vectors

            def rows(i: Value, tile: Tile = tile) -> None:
                self.widen(code, step, tile, i)
                code.for_range(*span, lambda y: self.tile_row(code, step, tile, i, y, summands))

            code.for_each(count, rows)

    def emit_by_channels(self, code: Code, group: list[Step]) -> None:
        step, *following = group
        layer, target = step.layer, self.storage(step.target)
        if isinstance(layer, Conv) and not layer.is_depthwise:
            summands, place = self.summands(step), 0
            whole = self.share_of(code, len(self.tiles[id(step)].vectors))
            for first, count, vectors in self.tiles[id(step)].runs():
                tile = self.tiles[id(step)], first, vectors
                if following:
                    begin = code.choose_larger(code.number("sub", whole[0], first), 0)
                    end = code.choose_larger(code.number("sub", whole[1], first), count, "slt")
                    self.whole_tiles(code, group, tile, (begin, end), place, summands)
                else:
                    self.rows_of_tiles(code, step, tile, count, summands)
                place += count * vectors
        elif isinstance(layer, Conv):
            self.channels_of_depthwise(code, step, self.share_of(code, target.lanes // LANES))
        else:
            code.for_range(*self.share_of(code, target.height), lambda y: self.emit_row(code, step, y))

    def channels_of_depthwise(self, code: Code, step: Step, span: Span) -> None:
        """All rows of some channels, by 16."""
        first, behind = span
        layer, count = step.layer, code.number("sub", behind, first)
        assert isinstance(layer, Conv)

        def rows() -> None:
            height = self.storage(step.target).height
            code.for_each(height, lambda y: self.depthwise_row(code, step, layer, y, (first, count)))

        code.emit_if(code.value(f"icmp sgt i64 {count}, 0"), rows)

    def whole_tiles(self, code: Code, group: list[Step], tile: Tile, span: Span, place: int, summands: int) -> None:
        """Some tiles of a run that begins with vector ``place``, and the same channels of the depthwise step behind."""
        step, depthwise = group
        height, vectors = self.storage(step.target).height, tile[2]

        def rows(i: Value) -> None:
            self.widen(code, step, tile, i)
            code.for_each(height, lambda y: self.tile_row(code, step, tile, i, y, summands))

        code.for_range(*span, rows)
        ends = [code.number("add", code.number("mul", end, vectors), place) for end in span]
        self.channels_of_depthwise(code, depthwise, (ends[0], ends[1]))

    def rows_of_tiles(self, code: Code, step: Step, tile: Tile, count: int, summands: int) -> None:
        """This part of all rows of ``count`` tiles of a kind."""
        height = self.storage(step.target).height
        begin, end = self.share_of(code, count * height)

        def rows(i: Value) -> None:
            self.widen(code, step, tile, i)
            before = code.number("mul", i, height)
            top = code.choose_larger(code.number("sub", begin, before), 0)
            bottom = code.choose_larger(code.number("sub", end, before), height, "slt")
            code.for_range(top, bottom, lambda y: self.tile_row(code, step, tile, i, y, summands))

        above = code.number("add", end, height - 1)
        code.for_range(code.number("udiv", begin, height), code.number("udiv", above, height), rows)

    def emit_rows(self, code: Code, group: list[Step], spans: list[Span]) -> None:
        """Each row of the last step, with what it needs of the steps before."""
        done = [code.slot() for _ in group]
        for slot, (first, _) in zip(done, spans, strict=True):
            code.put(slot, first)

        def produce(i: int, limit: Value) -> None:
            def body(y: Value) -> None:
                if i:
                    produce(i - 1, self.rows_needed(code, group[i], y, self.storage(group[i - 1].target).height))
                self.emit_row(code, group[i], y)

            code.loop_while_below(done[i], limit, body)

        produce(len(group) - 1, spans[-1][1])

    def first_needed(self, code: Code, step: Step, y: Value) -> Value:
        """The first row of the source that row ``y`` is made of."""
        layer = step.layer
        assert isinstance(layer, Conv | MaxPool)
        above = code.number("sub", code.number("mul", y, layer.stride[0]), layer.padding[0])
        return code.choose_larger(above, 0)

    def rows_needed(self, code: Code, step: Step, y: Value, height: int) -> Value:
        """How many rows of the source have to be there for row ``y``."""
        layer = step.layer
        assert isinstance(layer, Conv | MaxPool)
        last = window_of(layer) - layer.padding[0]
        wanted = code.number("add", code.number("mul", y, layer.stride[0]), last)
        too_many = code.value(f"icmp sgt i64 {wanted}, {height}")
        return code.choose(too_many, "i64", str(height), wanted)

    def pack(self, step: Step) -> None:
        layer = step.layer
        if isinstance(layer, MaxPool):
            return
        assert isinstance(layer, Conv | Linear)
        source = self.program.tensors[step.source]
        lanes = self.plan.lanes[step.target]
        if isinstance(layer, Conv) and layer.is_depthwise:
            self.depthwise[id(step)] = pack_depthwise(self.constants, self.isa, layer, lanes, source.zero)
            return
        places = self.plan.lanes[step.source].places, lanes
        self.tiles[id(step)] = pack_tiles(
            self.constants, self.isa, layer, self.storage(step.source), places, source.zero
        )

    def emit_row(self, code: Code, step: Step, y: Value) -> None:
        layer = step.layer
        if isinstance(layer, MaxPool):
            self.pool_row(code, step, layer, y)
        elif isinstance(layer, Conv) and layer.is_depthwise:
            self.depthwise_row(code, step, layer, y)
        else:
            tiles = self.tiles[id(step)]
            summands = self.summands(step)
            for first, count, vectors in tiles.runs():

                def tile(i: Value, first: int = first, vectors: int = vectors) -> None:
                    self.tile_row(code, step, (tiles, first, vectors), i, y, summands)

                code.for_each(count, tile)

    def summands(self, step: Step) -> int:
        """The offset of the two factors of the sum, own first."""
        if step.sum is None or step.added is None:
            return 0
        factors = dict(zip(step.sum.inputs, step.sum.multipliers, strict=True))
        order = [factors[step.layer.output], factors[step.added]]
        return self.constants.add(np.repeat(np.array(order, np.float32), 16))

    def tile_row(self, code: Code, step: Step, tile: Tile, index: Value, y: Value, summands: int) -> None:
        """Row ``y`` of tile number ``index`` behind the first of its kind."""
        tiles, first, vectors = tile
        layer, target = step.layer, self.storage(step.target)
        source = self.storage(step.source)
        assert isinstance(layer, Conv)
        stride = layer.stride[0]
        offset = 0
        if source.layout == "P":
            offset = -layer.padding[0] * source.row_bytes - layer.padding[1] * source.step
        other = self.storage(step.added) if step.added is not None else None
        key = RowKernel(
            target.width,
            vectors,
            source.layout,
            stride if source.layout == "A" else stride * source.step,
            target.layout,
            target.pad if target.layout == "D" else 0,
            range_of(self.program.tensors[step.target]),
            self.residual(step),
            tiles.limit,
            target.right if target.layout == "D" else 0,
            id(step) in self.widened,
        )
        name = self.kernel(key, partial(emit_row, self.isa, key))
        packed, vector = self.tile_values(code, tiles, first, index)

        def advance(pointer: Value, layout: str) -> Value:
            return code.advance(pointer, code.number("mul", vector, 16 if layout == "P" else 64 * self.isa.unit))

        if key.wide:
            packed["weights"] = self.wide_place(code, step, first, index)
        residual = "null"
        if other is not None:
            residual = advance(self.row(code, other, y), other.layout)
        values = {
            **packed,
            "source": self.row(code, source, code.number("mul", y, stride), offset),
            "target": advance(self.row(code, target, y), target.layout),
            "residual": residual,
            "sum": code.advance("%constants", summands),
            "source_step": str(source.step),
            "target_step": str(target.step),
            "residual_step": str(other.step if other else 0),
        }
        code.call("void", name, *((kind, values[name]) for kind, name in PARAMETERS))

    def tile_values(self, code: Code, tiles: Tiles, first: int, index: Value) -> tuple[dict[str, Value], Value]:
        """What a kernel is given of tile number ``index`` behind ``first``, and the tile's first vector."""
        entry = self.entry(code, tiles, first, index)
        segments, count, weights, vector = (code.load_offset(code.advance(entry, 4 * i)) for i in range(4))
        wide = code.number("shl", vector, 6)
        places = {
            "segments": segments,
            "weights": weights,
            "bias": code.number("add", wide, tiles.bias),
            "factors": code.number("add", wide, tiles.factors),
        }
        return {"count": count, **{name: code.advance("%constants", place) for name, place in places.items()}}, vector

    def residual(self, step: Step) -> Residual | None:
        if step.added is None:
            return None
        zero = self.program.tensors[step.added].zero
        return Residual(range_of(self.program.tensors[step.layer.output]), self.storage(step.added).layout, zero)

    def window_rows(self, code: Code, step: Step, y: Value, offset: int = 0) -> list[Value]:
        """Pointers to the rows of the source around row ``y``; the border's where there are none."""
        layer, source = step.layer, self.storage(step.source)
        assert isinstance(layer, Conv | MaxPool)
        first = code.number("sub", code.number("mul", y, layer.stride[0]), layer.padding[0])
        outside = code.advance("%own", self.plan.border if source.fill else 0)
        rows = []
        for i in range(window_of(layer)):
            number = code.number("add", first, i)
            inside = code.value(f"icmp ult i64 {number}, {source.height}")
            rows.append(code.choose(inside, "i8*", self.row(code, source, number, offset), outside))
        return rows

    def depthwise_row(
        self, code: Code, step: Step, layer: Conv, y: Value, channels: tuple[Value, Value] | None = None
    ) -> None:
        """``channels``: first and number, by 16, where it is not all of them."""
        weights, bias, factors, limit = self.depthwise[id(step)]
        source, target = self.storage(step.source), self.storage(step.target)
        size = window_of(layer)
        to = range_of(self.program.tensors[step.target])
        key = DepthwiseKernel(size, layer.stride[0], target.width, to, limit)
        name = self.kernel(key, partial(emit_depthwise, self.isa, key))
        pointers = [
            *self.window_rows(code, step, y),
            *(code.advance("%constants", o) for o in (weights, bias, factors)),
        ]
        pointers.append(self.row(code, target, y))
        count = str(target.lanes // LANES)
        if channels is not None:
            first, count = channels
            wide, values = code.number("shl", first, 6), code.number("mul", first, 64 * self.isa.unit)
            weighed = code.number("mul", first, weight_bytes(self.isa, size, layer.stride[0]))
            moves = [*[values] * size, weighed, wide, wide, values]
            pointers = [code.advance(pointer, move) for pointer, move in zip(pointers, moves, strict=True)]
        numbers = str(source.step), str(target.step), count
        arguments = [*(("i8*", p) for p in pointers), *(("i64", n) for n in numbers)]
        code.call("void", name, *arguments)

    def pool_row(self, code: Code, step: Step, layer: MaxPool, y: Value) -> None:
        source, target = self.storage(step.source), self.storage(step.target)
        key = PoolKernel(window_of(layer), layer.stride[0], target.width, source.lanes, target.layout)
        name = self.kernel(key, partial(emit_pool, self.isa, key))
        pointers = [*self.window_rows(code, step, y, -layer.padding[1] * source.step), *["null"] * 3]
        pointers.append(self.row(code, target, y))
        numbers = source.step, target.step, target.lanes // 16
        arguments = [*(("i8*", p) for p in pointers), *(("i64", str(n)) for n in numbers)]
        code.call("void", name, *arguments)

    # The end

    def emit_mean(self, code: Code, step: Step, layer: Mean) -> None:
        source, target = self.storage(step.source), self.storage(step.target)
        tensor = self.program.tensors[step.source]
        key = MeanKernel(
            source.height, source.width, range_of(self.program.tensors[step.target]), layer.multiplier > 2**14
        )
        name = self.kernel(key, partial(emit_mean, self.isa, key))
        bias = self.constants.add(np.full(16, -tensor.zero * source.height * source.width, np.int32))
        factors = self.constants.add(np.full(16, layer.multiplier, np.float32))

        def vector(index: Value) -> None:
            pointers = [
                code.advance(self.address(code, source), code.number("mul", index, 64 * self.isa.unit)),
                code.advance("%constants", bias),
                code.advance("%constants", factors),
                code.advance(self.address(code, target), code.number("shl", index, 4)),
            ]
            code.call("void", name, *(("i8*", p) for p in pointers), ("i64", str(source.step)))

        code.for_range(*self.share_of(code, source.lanes // LANES), vector)

    def emit_linear(self, code: Code, step: Step, layer: Linear) -> None:
        self.pack(step)
        tiles = self.tiles[id(step)]
        source, target = self.storage(step.source), self.storage(step.target)
        for first, count, vectors in tiles.runs():
            key = RowKernel(1, vectors, "P", 0, "F")
            name = self.kernel(key, partial(emit_row, self.isa, key))

            def tile(index: Value, first: int = first, name: str = name) -> None:
                packed, vector = self.tile_values(code, tiles, first, index)
                values = {
                    **packed,
                    "source": self.address(code, source),
                    "target": code.advance(self.address(code, target), code.number("shl", vector, 6)),
                    "residual": "null",
                    "sum": "null",
                }
                code.call("void", name, *((kind, values.get(key, "0")) for kind, key in PARAMETERS))

            code.for_range(*self.share_of(code, count), tile)

    def answer(self, code: Code) -> None:
        """The logits from the work area to where they are wanted."""
        target = self.storage(self.program.output)
        size = str(4 * self.program.classes)
        pointers = ("i8*", "%logits"), ("i8*", self.address(code, target))
        code.call("void", "llvm.memcpy.p0i8.p0i8.i64", *pointers, ("i64", size), ("i1", "false"))


def base_of(storage: Storage) -> Value:
    return "%own" if storage.own else "%work"
