"""A classifier of another program that takes pixels: what it is fed is computed in front, the rest stays as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mgq.errors import InputError, printable
from mgq.export.onnx.float_input import FloatInput
from mgq.export.onnx.foreign_file import FLOAT, UINT8, model_in
from mgq.export.onnx.onnx_file import import_package
from mgq.weights.preprocessing import GREY_OF_BGR

Array = npt.NDArray[np.float32]

PIXELS = "mgq_pixels"


def write_pixel_file(source: Path, entry: FloatInput, size: tuple[int, int], target: Path) -> Path:
    """Write to ``target`` the classifier in ``source``, for uint8 (N, 3, H, W) in BGR of that ``size``; N is 1 where
    its own input says so.

    ``entry`` says what its own input is fed. Outputs but the answer are left out. Raises InputError where it takes
    several pictures at once, has weights in other files, or has no such input.
    """
    onnx, model = import_package("onnx"), model_in(source)
    graph, name = model.graph, printable(source)
    fed = next((value for value in graph.input if value.name == entry.name), None)
    if fed is None or fed.type.tensor_type.shape.dim[0].dim_value not in (0, 1):
        raise InputError(f"{name} does not take one picture as '{printable(entry.name)[:80]}'")
    if any(tensor.data_location for tensor in graph.initializer):
        raise InputError(f"{name} has weights in other files")
    nodes = front_nodes(onnx.helper, entry, fed.type.tensor_type.elem_type)
    kept = [output for output in graph.output if output.name == entry.output] or list(graph.output)[:1]
    pictures = fed.type.tensor_type.shape.dim[0].dim_value or "N"
    front = onnx.helper.make_tensor_value_info(PIXELS, UINT8, [pictures, 3, *size])
    replace_all(graph.input, [front, *(value for value in graph.input if value.name != entry.name)])
    replace_all(graph.node, [*nodes, *graph.node])
    replace_all(graph.output, kept)
    target.write_bytes(model.SerializeToString())
    return target


def replace_all(field: Any, values: list[Any]) -> None:
    """Let ``values`` be all that a repeated ``field`` of a message holds."""
    copies = [type(value).FromString(value.SerializeToString()) for value in values]
    del field[:]
    field.extend(copies)


def front_nodes(helper: Any, entry: FloatInput, kind: int) -> list[Any]:
    """What turns pixels into the input that ``entry`` describes, of ONNX's element type ``kind``: one convolution
    orders the channels, or makes grey of them, and takes mean and deviation."""
    names = [f"mgq_{name}" for name in ("floats", "weight", "bias", "fed", "cast")]
    weight, bias = scale_channels(entry)
    constants = [
        helper.make_node("Constant", [], [name], value=helper.make_tensor(name, FLOAT, array.shape, array.ravel()))
        for name, array in zip(names[1:3], (weight, bias), strict=True)
    ]
    nodes = [
        helper.make_node("Cast", [PIXELS], names[:1], to=FLOAT),
        *constants,
        helper.make_node("Conv", names[:3], names[3:4]),
        helper.make_node("Cast", names[3:4], names[4:], to=kind),
    ]
    if entry.channels_last:
        return [*nodes, helper.make_node("Transpose", names[4:], [entry.name], perm=[0, 2, 3, 1])]
    nodes[-1].output[0] = entry.name
    return nodes


def scale_channels(entry: FloatInput) -> tuple[Array, Array]:
    """Weight (C, 3, 1, 1) and bias (C,) of the convolution that makes what ``entry`` describes of pixels in BGR."""
    if entry.image[0] == 1:
        weight = np.array(GREY_OF_BGR)[None]
    else:
        weight = np.eye(3)[::-1] if entry.order == "rgb" else np.eye(3)
    if entry.takes_pixels:  # whole numbers, nearest
        return weight.astype(np.float32)[..., None, None], np.full(len(weight), 0.5, np.float32)
    mean, std = (values.reshape(-1) for values in entry.scales())
    return (weight / std[:, None]).astype(np.float32)[..., None, None], (-mean / std).astype(np.float32)
