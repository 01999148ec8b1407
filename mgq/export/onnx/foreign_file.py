"""Float ONNX classifiers that other programs wrote: read whole, checked, with data in files beside them."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mgq.errors import InputError, plural, printable
from mgq.export.onnx.foreign_answer import MOST_SHOWN, Answer, find_answer, leave_out_unread
from mgq.export.onnx.guard import MOST_BYTES as OWN_MOST_BYTES
from mgq.export.onnx.half_floats import widen, widen_halves
from mgq.export.onnx.onnx_file import INTEGER_OPERATORS, METADATA, import_package
from mgq.io.limited_io import bytes_of, identify_stand_in
from mgq.weights.finite_values import fault_of

Array = npt.NDArray[Any]
MOST_BYTES = (1 << 31) - 1
"""Of a file, and of the data beside it: ONNX's own limit."""
OPSETS = range(7, 23)
FLOAT, UINT8 = 1, 2
OTHER_NAMES = {"double": "float64", "undefined": "numbers of no kind"}
"""Of ONNX's types, where they are not called as in NumPy."""
CHANNELS = (1, 3)
MOST_PICTURES = 256
"""That a file may take at once: so many are run through it."""
OWN_MARK = b"\n\x03" + METADATA.encode()
"""How the entry of mgq's metadata begins in a file: to find it takes no time, and no parser."""
USUAL_END = 1 << 18
"""So many bytes at the end of a file of mgq's hold its metadata, unless the names of its classes are very long."""
QUANTIZED = INTEGER_OPERATORS | {"MatMulInteger", "QLinearAdd", "DynamicQuantizeLinear"}


@dataclass(frozen=True)
class ForeignFile:
    """A model without functions, in float32. ``shape`` is that of its input ``input`` for one picture: (1, C, H, W), or
    (1, H, W, C) where ``channels_last``. So many ``pictures`` are given at once, any number where that is None.
    ``constants``: name -> value, of all weights. ``output`` is the answer's name. ``takes_pixels``: the input is uint8,
    else float32. ``halves``: what it was in before, float16 or bfloat16. ``choice``: how the answer was chosen."""

    path: Path
    model: Any = field(repr=False)
    input: str
    shape: tuple[int, ...]
    channels_last: bool
    opset: int
    constants: dict[str, Array] = field(repr=False)
    pictures: int | None
    output: str
    takes_pixels: bool = False
    halves: str | None = None
    choice: Answer | None = None

    @property
    def image(self) -> tuple[int, int, int]:
        """Channels, height and width."""
        _, *axes = self.shape
        channels, height, width = (axes[2], axes[0], axes[1]) if self.channels_last else axes
        return channels, height, width


def is_foreign(path: Path) -> bool:
    """Whether ``path`` is called an ONNX file, and no file that mgq wrote. Raises InputError where it is none."""
    if path.suffix.lower() != ".onnx":
        return False
    if has_own_mark(path):
        return False  # what else is in it is checked where it is read
    return not any(entry.key == METADATA for entry in model_in(path).metadata_props)


def has_own_mark(path: Path) -> bool:
    """Whether ``OWN_MARK`` is in ``path``, near whose end mgq's files have it; not in what is larger than they are, or
    cannot be read."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            if size > OWN_MOST_BYTES:
                return False
            for start in (max(0, size - USUAL_END), 0):
                file.seek(start)
                if OWN_MARK in file.read(OWN_MOST_BYTES):
                    return True
    except OSError:
        pass
    return False


def model_in(path: Path) -> Any:
    """The ``onnx.ModelProto`` in ``path``. Raises InputError where it cannot be read, or is none."""
    onnx, name = import_package("onnx"), printable(path)
    try:
        if path.stat().st_size > MOST_BYTES:
            raise InputError(f"{name} is larger than 2 GB, more than a classifier has: give a smaller network")
        data = bytes_of(path, MOST_BYTES)
        if stand_in := identify_stand_in(data):
            raise InputError(f"{name} {stand_in}")
        model = onnx.load_from_string(data)
    except OSError as error:
        raise InputError(f"cannot read {name}: {error.strerror}; check the path") from None
    except InputError:
        raise
    except Exception:
        raise InputError(f"{name} is damaged, cut off, or no ONNX file: write it again") from None
    if not model.graph.node or not model.graph.output:
        raise InputError(f"{name} is damaged, cut off, or no ONNX file: write it again")
    return model


def read_foreign(
    path: Path,
    size: tuple[int, int] | None = None,
    scores: str | None = None,
    count_names: Callable[[Mapping[str, str]], int | None] = lambda metadata: None,
) -> ForeignFile:
    """The float classifier in ``path``. ``size``, height and width, is for inputs that leave it open, ``scores`` the
    output that is wanted of several, and ``count_names`` tells by the file's metadata of how many classes it is.

    Raises InputError, which names what is wrong, for what is no float32 classifier of pictures.
    """
    model, name = model_in(path), printable(path)
    classes = count_names({entry.key: entry.value for entry in model.metadata_props})
    try:
        return check_model(path, model, size, scores, classes)
    except InputError as error:
        raise InputError(f"{name} {error}") from None


def check_model(
    path: Path, model: Any, size: tuple[int, int] | None, scores: str | None = None, classes: int | None = None
) -> ForeignFile:
    opsets = [entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")]
    if not opsets or opsets[0] not in OPSETS:
        said = opsets[0] if opsets else "none"
        raise InputError(f"has opset {said}: export it with one from {OPSETS[0]} to {OPSETS[-1]}")
    if len(model.functions):
        model = import_package("onnx.inliner").inline_local_functions(model)
    if any(node.op_type in QUANTIZED for node in model.graph.node):
        raise InputError("is quantized already: give the float file that it was made from")
    halves = widen_halves(model)
    known = {tensor.name for tensor in model.graph.initializer}
    refuse_no_pictures([value for value in model.graph.input if value.name not in known])
    answer = find_answer(model, scores, classes)
    needed = leave_out_unread(model.graph, answer.scores)
    refuse_untranslated(model)
    inputs = leave_out_inputs(model.graph, known, needed)
    if len(inputs) != 1:
        told = ", ".join(repr(printable(value.name)[:40]) for value in inputs[:MOST_SHOWN])
        raise InputError(f"has {plural(len(inputs), 'input')} ({told}): a classifier of pictures has one")
    shape, last = image_shape(inputs[0], size)
    if len(model.graph.sparse_initializer):
        raise InputError("has sparse weights: export it with all their zeros")
    constants = {
        tensor.name: array_of(tensor, path.parent) for tensor in model.graph.initializer if tensor.name in needed
    }
    del model.graph.initializer[:]
    kind = inputs[0].type.tensor_type
    pictures, takes_pixels = size_of(kind.shape.dim[0]), kind.elem_type == UINT8
    name = inputs[0].name
    form = (opsets[0], constants, pictures, answer.scores, takes_pixels, halves, answer)
    return ForeignFile(path, model, name, shape, last, *form)


def refuse_untranslated(model: Any) -> None:
    """Raise InputError that names the first operator of ONNX's own domain that ONNX does not have: exporters leave
    those of their framework in a file, with a warning, where they know no translation."""
    onnx = import_package("onnx")
    for place, node in enumerate(model.graph.node):
        if node.domain in ("", "ai.onnx") and not onnx.defs.has(node.op_type):
            name = printable(node.name or f"number {place + 1}")[:80]
            raise InputError(
                f"has a {printable(node.op_type)[:40]} '{name}', which is no operator of ONNX: its exporter did not "
                "translate it; see its warnings, or export with another program"
            )


def refuse_no_pictures(inputs: Sequence[Any]) -> None:
    """Raise InputError where the only one of ``inputs`` has too few axes for pictures, or does not say them."""
    if len(inputs) == 1:
        if not inputs[0].type.tensor_type.HasField("shape"):
            raise InputError("does not say the shape of its input: write it again with shapes, such as Nx3x224x224")
        axes = len(inputs[0].type.tensor_type.shape.dim)
        if axes != 4:
            raise InputError(f"takes {plural(axes, 'axis')}, not pictures (N, C, H, W): give a classifier of pictures")


def leave_out_inputs(graph: Any, weights: set[str], needed: set[str]) -> list[Any]:
    """Take out of ``graph`` the inputs that nothing reads: old files list all ``weights`` among them, and Keras leaves
    those there whose readers it folded. The others that are no weights."""
    given = [value for value in graph.input if value.name not in weights]
    read = [value for value in given if value.name in needed] or given
    for value in [value for value in graph.input if value.name not in needed and value not in read]:
        graph.input.remove(value)
    return read


def size_of(axis: Any) -> int | None:
    """None where ``axis`` is open; some exporters say -1 then."""
    return int(axis.dim_value) if axis.dim_value > 0 else None


def image_shape(value: Any, size: tuple[int, int] | None) -> tuple[tuple[int, ...], bool]:
    """The shape of the input ``value`` for one picture, and whether its channels come last."""
    kind = value.type.tensor_type
    if kind.elem_type not in (FLOAT, UINT8):
        named = import_package("onnx").TensorProto.DataType.Name(kind.elem_type).lower()
        raise InputError(f"takes pictures as {OTHER_NAMES.get(named, named)}: export it for float32 or uint8 ones")
    axes = [size_of(axis) for axis in kind.shape.dim]
    if len(axes) != 4:
        raise InputError(f"takes {plural(len(axes), 'axis')}, not pictures (N, C, H, W): give a classifier of pictures")
    fixed = int(kind.shape.dim[0].dim_value) if kind.shape.dim[0].HasField("dim_value") else 1
    if fixed == 0 or fixed > MOST_PICTURES:
        raise InputError(f"takes {plural(fixed, 'picture')} at once: export it for one, or for any number")
    last = axes[1] not in CHANNELS and axes[3] in CHANNELS
    channels, height, width = (axes[3], axes[1], axes[2]) if last else axes[1:]
    if channels is None and not last:
        channels = 3
    if channels not in CHANNELS:
        raise InputError(f"takes {channels} channels: a classifier of pictures takes 3, or 1 of grey")
    if size is not None:
        if (height, width) != (None, None) and (height or size[0], width or size[1]) != size:
            own = "x".join(str(axis or "any") for axis in (height, width))
            raise InputError(f"takes {own} pixels, not {size[0]}x{size[1]}: leave --size out, or let it fit")
        height, width = size
    if height is None or width is None:
        raise InputError("leaves the height or width of its pictures open: say it by --size 224, or --size 48x192")
    if not (1 <= height <= 4096 and 1 <= width <= 4096):
        raise InputError(f"takes pictures of {height}x{width}, which no classifier does")
    shape = (1, height, width, channels) if last else (1, channels, height, width)
    return shape, last


def array_of(tensor: Any, folder: Path) -> Array:
    """The numbers of ``tensor``, which may lie in a file in ``folder``. Raises InputError where they are no weights."""
    onnx, name = import_package("onnx"), printable(tensor.name)[:80]
    if tensor.data_location or len(tensor.external_data):
        tensor = with_data_beside(tensor, folder)
    try:
        value: Array = onnx.numpy_helper.to_array(widen(tensor))
    except Exception:
        raise InputError(f"has a constant {name} of another size than it says: write it again") from None
    fault = fault_of(value, False)
    if fault and not is_mask(value):
        raise InputError(f"has {fault} in {name}: export it again")
    return value


def is_mask(value: Array) -> bool:
    """Whether infinities among the numbers of ``value`` may leave places out of a softmax or a maximum, or say that
    there is no limit."""
    return not np.isnan(value).any() and (value.size == 1 or bool((value < np.inf).all()))


def with_data_beside(tensor: Any, folder: Path) -> Any:
    """``tensor`` with the data that lies in another file of ``folder``, and nowhere else."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    name, place = printable(tensor.name)[:80], entries.get("location", "")
    if "\0" in place:
        raise InputError(f"says nonsense of where {name} lies: write it again")
    whole, home = (folder / place).resolve(), folder.resolve()
    if not place or home not in whole.parents:
        raise InputError(f"keeps {name} outside of its folder, in {printable(place)[:80]!r}, which is not read")
    try:
        offset, size = int(entries.get("offset", 0)), whole.stat().st_size
        length = int(entries.get("length", size - offset))
        if not (0 <= offset <= size and 0 <= length <= min(size - offset, MOST_BYTES)):
            raise InputError(f"lacks data of {name}: {printable(place)[:80]} is too short; copy it again")
        with whole.open("rb") as file:
            file.seek(offset)
            data = file.read(length)
    except OSError as error:
        raise InputError(f"lacks the data file {printable(place)[:80]} beside it: {error.strerror}") from None
    except ValueError:
        raise InputError(f"says nonsense of where {name} lies: write it again") from None
    result = type(tensor)()
    result.CopyFrom(tensor)
    del result.external_data[:]
    result.data_location, result.raw_data = 0, data
    if math.prod(result.dims) < 0:
        raise InputError(f"has a constant {name} of an impossible shape")
    return result
