"""Plans the execution: which layers are computed together, and where in the work area every tensor lies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from mgq.export.native.emit.windows import quads_read
from mgq.export.native.layout import LANES, Lanes, Storage, arrange
from mgq.export.native.program import Conv, Layer, Linear, MaxPool, Mean, Program, Shuffle, Sum, Tensor, make_refusal

Array = npt.NDArray[Any]
ALIGNMENT = 4096
FUSED_PIXELS = 400
"""Blocks of at least so many pixels run row by row: what lies between their layers stays in the first cache."""
BY_ROWS = 14
"""Threads share maps of so many rows by rows: they read what they have made. Others they share by channels."""


@dataclass(frozen=True, eq=False)
class Step:
    """A layer with its tensors in memory. ``added`` is what is added to a convolution, ``sum`` the layer that says so.

    ``orders``: for the input, the output and ``added``: which channel of the stored tensor each of its channels is.
    """

    layer: Layer
    source: str
    target: str
    sum: Sum | None = None
    added: str | None = None


@dataclass(eq=False)
class Family:
    """Tensors whose channels have the same order in memory, with the steps that make and read each channel."""

    channels: int
    makers: Array | None = None
    readers: Array | None = None
    lanes: Lanes | None = None

    def arrange(self) -> Lanes:
        if self.lanes is None:
            nobody = np.zeros(self.channels, np.int64)
            makers = nobody if self.makers is None else self.makers
            self.lanes = arrange(makers, nobody if self.readers is None else self.readers)
        return self.lanes


@dataclass(eq=False)
class Plan:
    """``groups`` of steps that a thread runs without waiting for the others: row by row where the maps are large.

    ``storages`` are the tensors in memory, ``stored`` says which of them a tensor is, ``lanes`` where its channels lie.
    The work area has ``size`` bytes and begins with two rows of ``border`` bytes of what stands for 0.
    """

    program: Program
    groups: list[list[Step]] = field(default_factory=list)
    storages: dict[str, Storage] = field(default_factory=dict)
    lanes: dict[str, Lanes] = field(default_factory=dict)
    stored: dict[str, str] = field(default_factory=dict)
    border: int = 0
    size: int = 0


def make_plan(program: Program, keep: bool = False, unit: int = 1) -> Plan:
    """``unit`` are the bytes of a value in layouts A and D, ``keep``: every tensor stays in the work area, for tests.

    Raises InputError for layers that no kernel runs.
    """
    return Planner(program, keep, unit).plan()


class Planner:
    def __init__(self, program: Program, keep: bool, unit: int) -> None:
        self.program = program
        self.keep = keep
        self.unit = unit
        self.stored: dict[str, str] = {program.input: program.input}  # tensor -> the one that is in memory for it
        self.families: dict[str, tuple[Family, Array]] = {}
        self.steps: list[Step] = []

    def plan(self) -> Plan:
        self.read_layers()
        plan = Plan(self.program)
        plan.groups = self.group()
        for name, (family, order) in self.families.items():
            lanes = family.arrange()
            plan.lanes[name] = replace(lanes, places=lanes.places[order])
        plan.lanes[self.program.input] = Lanes(np.arange(self.program.tensors[self.program.input].channels), (1,))
        plan.stored = self.stored
        plan.storages = self.storages(plan)
        self.place(plan)
        return plan

    # Layers to steps

    def read_layers(self) -> None:
        """Make the steps: a sum joins the convolution that makes the later of its summands, a shuffle is only another
        order. Raises InputError for a sum that has no such convolution to itself."""
        users: dict[str, list[Layer]] = {}
        for layer in self.program.layers:
            for name in layer.inputs:
                users.setdefault(name, []).append(layer)
        position = {layer.output: i for i, layer in enumerate(self.program.layers)}
        by_output = {layer.output: layer for layer in self.program.layers}
        merged: dict[str, Sum] = {}
        for layer in self.program.layers:
            if isinstance(layer, Sum):
                last = max(layer.inputs, key=lambda name: position.get(name, -1))
                maker = by_output.get(last)
                if (
                    not isinstance(maker, Conv)
                    or maker.is_depthwise
                    or len(users[last]) > 1
                    or len(set(layer.inputs)) < 2
                ):
                    raise make_refusal("a sum without a convolution of its own in front")
                merged[last] = layer
        for layer in self.program.layers:
            if isinstance(layer, Shuffle):
                self.alias(layer)
            elif not isinstance(layer, Sum):
                self.add_step(layer, merged.get(layer.output))

    def alias(self, layer: Shuffle) -> None:
        (source,) = layer.inputs
        family, order = self.families[source]
        self.families[layer.output] = family, order[list(layer.order)]
        self.stored[layer.output] = self.stored[source]

    def add_step(self, layer: Layer, total: Sum | None) -> None:
        source = layer.inputs[0]
        target = total.output if total else layer.output
        self.stored[target] = target
        added = next(name for name in total.inputs if name != layer.output) if total else None
        self.steps.append(Step(layer, source, target, total, added))
        if isinstance(layer, Linear):
            family, order = Family(self.program.classes), np.arange(self.program.classes)
        elif added is not None:
            family, order = self.families[added]
        elif isinstance(layer, Conv) and not layer.is_depthwise:
            family, order = Family(len(layer.weight)), np.arange(len(layer.weight))
        else:
            family, order = self.families[source]
        self.families[target] = family, order
        if isinstance(layer, Conv) and not layer.is_depthwise and layer.groups > 1:
            self.note_groups(layer, source, (family, order))

    def note_groups(self, layer: Conv, source: str, target: tuple[Family, Array]) -> None:
        reads, order = self.families[source]
        if reads.readers is None:
            reads.readers = np.zeros(reads.channels, np.int64)
            reads.readers[order] = np.arange(len(order)) * layer.groups // len(order)
        family, order = target
        if family.makers is None:
            family.makers = np.zeros(family.channels, np.int64)
            family.makers[order] = np.arange(len(order)) * layer.groups // len(order)

    # Steps to groups

    def group(self) -> list[list[Step]]:
        readers: dict[str, int] = {}
        for step in self.steps:
            for name in (step.source, step.added):
                if name is not None:
                    readers[self.stored[name]] = readers.get(self.stored[name], 0) + 1
        groups: list[list[Step]] = []
        for step in self.steps:
            last = groups[-1][-1] if groups else None
            follows = last is not None and self.stored[step.source] == last.target and readers[last.target] == 1
            if last is not None and follows and not self.keep and self.runs_with(groups[-1], step):
                groups[-1].append(step)
            else:
                groups.append([step])
        return groups

    def runs_with(self, group: list[Step], step: Step) -> bool:
        """Whether each thread reads in ``step`` only what it computed itself in the last of ``group``."""
        last, length = group[-1], len(group)
        tensor = self.program.tensors[last.target]
        if not isinstance(last.layer, Conv):
            return False
        if isinstance(step.layer, MaxPool):
            return length == 1 and not last.layer.is_depthwise and is_large(tensor)
        if not isinstance(step.layer, Conv):
            return False
        if step.layer.is_depthwise:
            return length == 1 and not last.layer.is_depthwise
        follows = length == 2 and last.layer.is_depthwise and is_pointwise(step.layer)
        return follows and (is_large(self.program.tensors[group[0].target]) or tensor.height >= BY_ROWS)

    # Steps to memory

    def storages(self, plan: Plan) -> dict[str, Storage]:
        """How each tensor lies in memory, by name. Raises InputError for a layout that no kernel reads."""
        result = {}
        first = self.program.tensors[self.program.input]
        for name in (self.program.input, *(step.target for step in self.steps if not isinstance(step.layer, Linear))):
            tensor = self.program.tensors[name]
            layout, pad, spare, pooled = self.layout_of(name)
            self.refuse_layout(name, layout)
            lanes = 4 if name == first.name else plan.lanes[name].count
            if name == first.name and (layout != "P" or first.channels > 4):
                raise make_refusal("a network that does not begin with a convolution")
            fill = 0 if pooled else tensor.zero
            result[name] = Storage(
                name, layout, lanes, tensor.height, tensor.width, pad, fill, spare=spare, unit=self.unit
            )
            if layout == "D":
                result[name].right = max(layer.padding[3] for layer in self.depthwise_readers(name))
        result[first.name].own = True
        result[first.name].colour = self.colour_of_border()
        for group in plan.groups:
            for step, following in pairwise(group):
                size = window_of(following.layer)
                result[step.target].own = True
                if is_large(self.program.tensors[group[0].target]):
                    result[step.target].ring = 1 << (size - 1).bit_length()
        logits = self.steps[-1].target
        result[logits] = Storage(logits, "P", 4 * plan.lanes[logits].count, 1, 1)
        return result

    def colour_of_border(self) -> tuple[int, int, int, int] | None:
        """What lies around the image, as four bytes of a pixel; None for what stands for 0."""
        readers = [step.layer for step in self.steps if self.stored[step.source] == self.program.input]
        colours = {layer.colour for layer in readers if isinstance(layer, Conv) and any(layer.padding)}
        if len(colours) > 1:
            raise make_refusal("convolutions of pixels with unlike borders")
        colour = colours.pop() if colours else None
        if colour is None:
            return None
        first, second, third, fourth = (*colour, 0, 0, 0)[:4]
        return first, second, third, fourth

    def layout_of(self, name: str) -> tuple[str, int, int, bool]:
        """Layout, border, spare groups of four pixels, and whether a pooling reads it."""
        wanted, pad, spare, pooled = set(), 0, 0, False
        tensor = self.program.tensors[name]
        for step in self.steps:
            if step.added is not None and self.stored[step.added] == name:
                target = self.layout_of(step.target)[0]
                wanted.add("P" if target == "D" else target)  # no summand is read in layout D
            if self.stored[step.source] != name:
                continue
            layer = step.layer
            if isinstance(layer, Conv | MaxPool):
                check_square(layer)
                pad = max(pad, *layer.padding)
            if isinstance(layer, Conv) and layer.is_depthwise:
                wanted.add("D")
                spare = max(spare, spare_quads(layer, tensor.width))
            elif isinstance(layer, MaxPool):
                wanted.add("P")
                pooled = True
            elif isinstance(layer, Conv):
                wanted.add("A" if is_pointwise(layer) and name != self.program.input else "P")
            elif isinstance(layer, Mean):
                wanted.add("mean")
            else:
                wanted.add("P")
        if "D" in wanted:
            if wanted != {"D"}:
                raise make_refusal("a depthwise convolution whose input another layer reads, too")
            lefts = {layer.padding[1] for layer in self.depthwise_readers(name)}
            if len(lefts) > 1:
                raise make_refusal("depthwise convolutions of unlike padding that read the same")
            return "D", lefts.pop(), spare, False
        if isinstance(self.maker_of(name), Mean):
            wanted.add("P")  # the only layout that a mean is written in
        if "P" in wanted:
            if "mean" in wanted:
                raise make_refusal("an average whose input a convolution reads, too")
            if pooled and wanted != {"P"} and tensor.zero:
                raise make_refusal("a pooling whose input another layer reads, too")
            return "P", pad, 0, pooled
        return "A", 0, 0, False

    def maker_of(self, name: str) -> Layer | None:
        return next((step.layer for step in self.steps if step.target == name), None)

    def depthwise_readers(self, name: str) -> list[Conv]:
        layers = [step.layer for step in self.steps if self.stored[step.source] == name]
        return [layer for layer in layers if isinstance(layer, Conv) and layer.is_depthwise]

    def refuse_layout(self, name: str, layout: str) -> None:
        """Raise InputError where what makes the tensor ``name`` has no kernel that writes ``layout``."""
        maker = self.maker_of(name)
        if isinstance(maker, Conv) and maker.is_depthwise and layout != "A":
            raise make_refusal(f"the depthwise convolution {name}, which neither a 1x1 convolution nor a mean reads")
        if layout == "D" and not isinstance(maker, Conv):
            raise make_refusal("a depthwise convolution without a dense one in front")

    def place(self, plan: Plan) -> None:
        """Offsets in the work area: tensors that are never needed at the same time share their place."""
        windows = [s for s in plan.storages.values() if s.layout == "D" or s.fill == 0]
        plan.border = -(-max([s.row_bytes for s in windows], default=0) // 64) * 64 + 64
        start = round_up(2 * plan.border)
        spans = {self.program.input: [0, 0]}
        for i, group in enumerate(plan.groups):
            for step in group:
                spans.setdefault(step.target, [i, i])
                for name in (step.source, step.added):
                    if name is not None:
                        spans[self.stored[name]][1] = i
        placed: list[tuple[Storage, list[int]]] = []
        last = len(plan.groups)
        for name, span in spans.items():
            storage = plan.storages[name]
            lifetime = [0, last] if self.keep else span
            offset = start
            for other, lives in sorted(placed, key=lambda item: item[0].offset):
                overlaps = lifetime[0] <= lives[1] and lives[0] <= lifetime[1]
                if overlaps and other.offset < offset + round_up(storage.size + 256):
                    offset = max(offset, other.offset + round_up(other.size + 256))
            storage.offset = offset
            placed.append((storage, lifetime))
            plan.size = max(plan.size, offset + round_up(storage.size + 256))


def is_large(tensor: Tensor) -> bool:
    return tensor.height * tensor.width >= FUSED_PIXELS


def round_up(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def is_pointwise(layer: Conv) -> bool:
    return layer.weight.shape[2:] == (1, 1) and not any(layer.padding)


def window_of(layer: Layer) -> int:
    """Rows of the source that a row of ``layer`` is made of."""
    if isinstance(layer, MaxPool):
        return layer.kernel[0]
    return int(layer.weight.shape[2]) if isinstance(layer, Conv) else 1


def spare_quads(layer: Conv, width: int) -> int:
    """What a depthwise kernel reads behind a row of ``width`` pixels, in groups of four."""
    _, left, _, right = layer.padding
    size, stride = layer.weight.shape[3], layer.stride[1]
    outputs = (width + left + right - size) // stride + 1
    read = (-(-outputs // 4) - 1) * stride + quads_read(size, stride)
    return max(0, read - -(-(width + left + right) // 4))


def check_square(layer: Conv | MaxPool) -> None:
    kernel: Sequence[int] = layer.kernel if isinstance(layer, MaxPool) else layer.weight.shape[2:]
    if kernel[0] != kernel[1] or layer.stride[0] != layer.stride[1]:
        raise make_refusal("a window that is not square")


__all__ = ["LANES", "Family", "Plan", "Step", "make_plan", "window_of"]
