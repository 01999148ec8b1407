"""Checks serialized graphs without MegEngine: only those that mgq could have written pass.

MegEngine's loaders trust what they read. An axis too many is written over the stack, a name that is missing is read
from address 0, a size may be anything. A checksum is no help where the file comes from a stranger. So a graph is passed
on only if it consists of the few operators that a classifier of the zoo has, with parameters that such a network can
have, each reading what operators before it made, and with tensors whose shapes follow from each other and fit their
data.

Format: ``schema_v2.fbs`` of MegEngine 1.13 (its format FBS_V2). Numbers of fields are theirs.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from mgq.export.megengine.flatbuffer import LONGEST_VECTOR, Table
from mgq.weights.finite_values import fault_of

Shape = tuple[int, ...]

FLOAT32, UINT8, INT8, INT32, QINT32, QINT8 = 0, 1, 2, 4, 12, 13
_BYTES = {FLOAT32: 4, UINT8: 1, INT8: 1, INT32: 4, QINT32: 4, QINT8: 1}
_INPUT_TYPES = {FLOAT32: "float32", UINT8: "uint8", INT8: "int8"}
_SCALED = (QINT32, QINT8)
_MOST_OPERATORS = LONGEST_VECTOR
_MOST_AXES = 5
_MOST_BYTES = 2**28
"""Of one tensor: the largest of a float MobileNetV2 has as many with 55 pictures of 224x224 at once."""
_MOST_STEP = 64
"""Pixels that a window, a stride or a border may have, a pooling over all that it sees excepted."""
_PLACE = b"xpux:0"
_SIZE_PREFIX = 4
_IDENTIFIER = b"mgv2"


class ForeignGraphError(Exception):
    """Why a graph is not passed on: the rest of a sentence that begins with the file's name."""

    def __init__(self, why: str = "holds a graph that mgq does not write") -> None:
        super().__init__(why)


class Face(NamedTuple):
    """What a graph takes and gives: the type of its input, such as ``uint8``, and both shapes."""

    input_type: str
    input: Shape
    output: Shape


class _Variable(NamedTuple):
    """What an operator made. ``values`` are those of a constant of a few whole numbers."""

    type: int
    shape: Shape
    values: Shape | None = None


def face_of(graph: memoryview) -> Face:
    """What ``graph`` takes and gives. Raises ForeignGraphError unless it is one that mgq can have written."""
    try:
        return _Reader(graph).face()
    except (struct.error, ValueError, KeyError, IndexError, OverflowError) as error:
        raise ForeignGraphError from error


def _demand(holds: bool) -> None:
    if not holds:
        raise ForeignGraphError


@dataclass
class _Reader:
    graph: memoryview
    variables: list[_Variable] = field(default_factory=list)
    input: _Variable | None = None
    data_left: int = 0

    def face(self) -> Face:
        model = self._model()
        operators = model.tables(2)
        _demand(0 < len(operators) <= _MOST_OPERATORS)
        self.data_left = len(self.graph)
        for operator in operators:
            made = self._make_variable(operator)
            _demand(all(size > 0 for size in made.shape))
            if math.prod(made.shape) * _BYTES[made.type] > _MOST_BYTES:
                raise ForeignGraphError(f"computes tensors of more than {_MOST_BYTES >> 20} MiB, which are not run")
            self.variables.append(made)
        self._check_names(model)
        (output,) = model.tables(4)
        _demand(set(output.fields) <= {0, 1})
        answer = self.variables[int(output.number(0))]
        _demand(self.input is not None and answer.type == FLOAT32 and len(answer.shape) == 2)
        assert self.input is not None
        return Face(_INPUT_TYPES[self.input.type], self.input.shape, answer.shape)

    def _model(self) -> Table:
        (size,) = struct.unpack_from("<I", self.graph, 0)
        _demand(size == len(self.graph) - _SIZE_PREFIX and bytes(self.graph[8:12]) == _IDENTIFIER)
        (root,) = struct.unpack_from("<I", self.graph, _SIZE_PREFIX)
        model = Table(self.graph, _SIZE_PREFIX + root)
        _demand(set(model.fields) <= {0, 1, 2, 3, 4, 5, 7} and not model.tables(5))
        about = model.table(7)
        _demand(about is None or set(about.fields) <= {3})
        return model

    def _check_names(self, model: Table) -> None:
        """MegEngine looks up the name of each variable, without asking whether there is one."""
        names = [entry.text(0) for entry in model.tables(3)]
        _demand(len(names) == len(self.variables) and None not in names)

    def _make_variable(self, operator: Table) -> _Variable:
        _demand(set(operator.fields) <= {0, 1, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12})
        kind = _KINDS.get(operator.text(0) or b"")
        _demand(kind is not None)
        assert kind is not None
        _demand((operator.number(1, "<Q"), operator.number(12)) == (kind.id, kind.version))
        _demand(operator.number(3, "<B") == kind.parameter and operator.integers(8) == (len(self.variables),))
        _demand(all(_is_place(place) for place in operator.tables(9)) and len(operator.tables(9)) <= 1)
        indices = operator.integers(7)
        _demand(len(indices) == kind.inputs and len(operator.tables(11)) == kind.tensors)
        return kind.made(self, operator, [self.variables[index] for index in indices])

    def tensor(self, operator: Table) -> tuple[Table, int, Shape]:
        """The tensor of ``operator``, its type and its shape."""
        (tensor,) = operator.tables(11)
        _demand(set(tensor.fields) <= {0, 1, 2, 3, 4, 5, 6} and _is_place(tensor.table(2)))
        layout = tensor.table(5)
        _demand(tensor.number(4, "<B") == 1 and layout is not None and not layout.fields)
        return tensor, _type_of(tensor.table(3)), tensor.integers(1)


def _is_place(place: Table | None) -> bool:
    return place is not None and set(place.fields) == {0} and place.text(0) == _PLACE


def _type_of(table: Table | None) -> int:
    """The type that ``table`` tells; of a quantized one the scale is a positive number."""
    if table is None:
        return FLOAT32
    fields, kind = set(table.fields), int(table.number(0, "<B"))
    if kind in _SCALED:
        parameters = table.table(2)
        _demand(fields == {0, 1, 2} and table.number(1, "<B") == 1 and parameters is not None)
        assert parameters is not None
        scale = parameters.number(0, "<f")
        _demand(set(parameters.fields) == {0} and math.isfinite(scale) and scale > 0)
    else:
        _demand(fields <= {0})
    _demand(kind in _BYTES)
    return kind


def _parameters(operator: Table, allowed: set[int]) -> dict[int, int]:
    table = operator.table(4)
    _demand(table is not None)
    assert table is not None
    _demand(set(table.fields) <= allowed)
    return table.numbers()


# ---- what each operator makes ----

_Inputs = list[_Variable]


def _constant(reader: _Reader, operator: Table, _: _Inputs) -> _Variable:
    tensor, kind, shape = reader.tensor(operator)
    data = tensor.read_bytes(6)
    _demand(0 not in tensor.fields and data is not None and 1 <= len(shape) <= _MOST_AXES and kind not in (UINT8, INT8))
    assert data is not None
    _demand(len(data) == math.prod(shape) * _BYTES[kind])
    # Several constants may not show the same bytes: each becomes memory of its own.
    reader.data_left -= len(data)
    _demand(reader.data_left >= 0)
    if kind == FLOAT32:
        fault = fault_of(np.frombuffer(data, "<f4"), is_variance=False)
        if fault:
            raise ForeignGraphError(f"has {fault} in its constant {len(reader.variables)}")
    few = kind == INT32 and len(shape) == 1 and shape[0] <= _MOST_AXES
    return _Variable(kind, shape, struct.unpack(f"<{shape[0]}i", data) if few else None)


def _feed(reader: _Reader, operator: Table, _: _Inputs) -> _Variable:
    tensor, kind, shape = reader.tensor(operator)
    _demand(reader.input is None and not _parameters(operator, set()))
    _demand(tensor.text(0) == b"data" and 6 not in tensor.fields)
    _demand(kind in _INPUT_TYPES and len(shape) == 4 and shape[1] == 3)
    reader.input = _Variable(kind, shape)
    return reader.input


def _convert(_: _Reader, operator: Table, inputs: _Inputs) -> _Variable:
    kind = _type_of(operator.table(4))
    _demand(operator.table(4) is not None and kind in (FLOAT32, QINT8))
    return _Variable(kind, inputs[0].shape)


_BINARY = {16, 18, 19, 37}  # sum, larger, smaller, ReLU of the sum
_BINARY_OF_INTEGERS = {6, 7}  # sum, ReLU of the sum


def _elementwise(_: _Reader, operator: Table, inputs: _Inputs) -> _Variable:
    left, right = inputs
    _demand(_parameters(operator, {0}).get(0) in _BINARY and left.type == right.type == FLOAT32)
    return _Variable(FLOAT32, _broadcast(left.shape, right.shape))


def _broadcast(left: Shape, right: Shape) -> Shape:
    axes = max(len(left), len(right))
    left, right = (1,) * (axes - len(left)) + left, (1,) * (axes - len(right)) + right
    _demand(all(a == b or 1 in (a, b) for a, b in zip(left, right, strict=True)))
    return tuple(map(max, left, right))


def _elementwise_of_integers(_: _Reader, operator: Table, inputs: _Inputs) -> _Variable:
    left, right = inputs
    _demand(_parameters(operator, {0}).get(0) in _BINARY_OF_INTEGERS and left.shape == right.shape)
    _demand(left.type == right.type == _type_of(operator.table(10)) == QINT8)
    return _Variable(QINT8, left.shape)


def _convolve(_: _Reader, operator: Table, inputs: _Inputs) -> _Variable:
    source, weights, bias = inputs
    of = _parameters(operator, {0, 2, 4, 5, 6, 7})
    (policy,) = operator.tables(6)
    _demand(operator.text(5) == b"\x37" and not policy.fields)
    _demand(of.get(0, 0) in (0, 1) and of.get(2, 0) in (0, 1))
    made = _type_of(operator.table(10))
    types = (source.type, weights.type, bias.type, made)
    _demand(types in ((QINT8, QINT8, QINT32, QINT8), (FLOAT32,) * 4))
    batch, channels, height, width = source.shape
    if of.get(2, 0):
        groups, outputs, inputs_each, *kernel = weights.shape
    else:
        groups, (outputs, inputs_each, *kernel) = 1, weights.shape
    _demand(groups * inputs_each == channels and bias.shape == (1, groups * outputs, 1, 1))
    extents = [
        _windows(extent, window, border, stride)
        for extent, window, border, stride in zip(
            (height, width), kernel, (of.get(4, 0), of.get(5, 0)), (of.get(6, 1), of.get(7, 1)), strict=True
        )
    ]
    return _Variable(made, (batch, groups * outputs, *extents))


def _windows(extent: int, window: int, border: int, stride: int) -> int:
    """How many windows there are along an axis, and not more than a network has."""
    _demand(0 <= border < window and 1 <= stride <= max(_MOST_STEP, extent) and 1 <= window <= max(_MOST_STEP, extent))
    return (extent + 2 * border - window) // stride + 1


def _pool(_: _Reader, operator: Table, inputs: _Inputs) -> _Variable:
    (source,) = inputs
    of = _parameters(operator, {0, 1, 2, 3, 4, 5, 6})
    _demand(of.get(0, 0) in (0, 1, 2) and source.type in (FLOAT32, QINT8))
    batch, channels, height, width = source.shape
    high = _windows(height, of.get(5, 2), of.get(1, 0), of.get(3, 2))
    return _Variable(source.type, (batch, channels, high, _windows(width, of.get(6, 2), of.get(2, 0), of.get(4, 2))))


def _reshape(_: _Reader, operator: Table, inputs: _Inputs) -> _Variable:
    source, wanted = inputs
    free = _parameters(operator, {0}).get(0)
    _demand(wanted.values is not None)
    assert wanted.values is not None
    shape = list(wanted.values)
    if free is not None:
        _demand(0 <= free < len(shape))
        shape[free] = 1
        rest = math.prod(shape)
        _demand(all(size > 0 for size in shape) and math.prod(source.shape) % rest == 0)
        shape[free] = math.prod(source.shape) // rest
    _demand(all(size > 0 for size in shape) and math.prod(shape) == math.prod(source.shape))
    return _Variable(source.type, tuple(shape))


def _multiply(_: _Reader, operator: Table, inputs: _Inputs) -> _Variable:
    """Rows of the first with rows of the second, as a linear layer has them."""
    left, right = inputs
    table = operator.table(4)
    _demand(table is not None and set(table.fields) == {1} and table.number(1, "<B") == 1)
    _demand(left.type == right.type == FLOAT32 and len(left.shape) == len(right.shape) == 2)
    _demand(left.shape[1] == right.shape[1])
    return _Variable(FLOAT32, (left.shape[0], right.shape[0]))


def _shuffle(_: _Reader, operator: Table, inputs: _Inputs) -> _Variable:
    (source,) = inputs
    table = operator.table(4)
    _demand(table is not None and set(table.fields) == {0, 1})
    assert table is not None
    pattern = table.integers(0)
    _demand(table.number(1) == len(source.shape) and sorted(pattern) == list(range(len(source.shape))))
    return _Variable(source.type, tuple(source.shape[axis] for axis in pattern))


class _Kind(NamedTuple):
    """An operator: MegEngine's number and version of it, the kind of its parameters, how many inputs and tensors."""

    id: int
    version: int
    parameter: int
    inputs: int
    tensors: int
    made: Callable[[_Reader, Table, _Inputs], _Variable]


_KINDS = {
    b"ImmutableTensor": _Kind(0x60D52856BBD5A2B1, 2, 0, 0, 1, _constant),
    b"Host2DeviceCopy": _Kind(0x21D09889FD709229, 2, 63, 0, 1, _feed),
    b"TypeCvtV2": _Kind(0x32E652780D108CB9, 1, 67, 1, 0, _convert),
    b"Elemwise": _Kind(0xD6C488C11172EC08, 1, 17, 2, 0, _elementwise),
    b"ElemwiseMultiType": _Kind(0x6827FAF790D6934A, 1, 18, 2, 0, _elementwise_of_integers),
    b"ConvBiasForward": _Kind(0xC2910E49BE9F970A, 2, 6, 3, 0, _convolve),
    b"PoolingV1": _Kind(0x47872BBDCA5F8C6B, 1, 9, 1, 0, _pool),
    b"ReshapeV1": _Kind(0xBA3296A9AA9B5098, 1, 54, 2, 0, _reshape),
    b"MatrixMulV2": _Kind(0x3107308C558DE242, 1, 20, 2, 0, _multiply),
    b"Dimshuffle": _Kind(0xAFB80BBEC293EA6C, 1, 64, 1, 0, _shuffle),
}
