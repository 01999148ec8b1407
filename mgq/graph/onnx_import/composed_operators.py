"""ONNX operators that become several layers each: activations, norms and moves that have no kernel of their own."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mgq.graph.onnx_import.comparisons import COMPARING, constant_for, refuse_other_ranks
from mgq.graph.onnx_import.einsum import read_einsum
from mgq.graph.onnx_import.operators import BatchMixedError, Operator, UnknownFormError, add_affine, look_up, read_truth
from mgq.graph.onnx_import.padding import read_pad
from mgq.graph.onnx_import.reductions import REDUCING
from mgq.graph.onnx_import.resizing import read_resize
from mgq.graph.onnx_import.transposed_convolution import read_col2im, read_transposed_convolution

Array = npt.NDArray[Any]
SELU = {"alpha": 1.67326319217681884765625, "gamma": 1.05070102214813232421875}
TANH_OF_GELU = 0.044715


# ---- activations ----


def read_selu(op: Operator) -> None:
    alpha, gain = (float(op.read_attribute(*given)) for given in SELU.items())
    op.give(add_affine(op, op.add("elu", op.layer(), alpha=alpha), gain))


def read_celu(op: Operator) -> None:
    alpha = float(op.read_attribute("alpha", 1.0))
    curved = op.add("elu", add_affine(op, op.layer(), 1 / alpha), alpha=1.0)
    op.give(add_affine(op, curved, alpha))


def read_mish(op: Operator) -> None:
    gate = op.add("tanh", op.add("softplus", op.layer()))
    op.give(op.add("mul", op.layer(), gate))


def read_softsign(op: Operator) -> None:
    op.give(op.add("div", op.layer(), add_affine(op, op.add("abs", op.layer()), 1.0, 1.0)))


def read_gelu(op: Operator) -> None:
    if op.read_attribute("approximate", "none") == "none":
        op.make("gelu", [op.layer()])
        return
    source = op.layer()
    cube = op.add("mul", source, op.add("mul", source, source))
    inner = op.add("add", source, add_affine(op, cube, TANH_OF_GELU))
    gate = op.add("tanh", add_affine(op, inner, math.sqrt(2 / math.pi)))
    op.give(op.add("mul", source, add_affine(op, gate, 0.5, 0.5)))


# ---- norms ----


def normalize(op: Operator, source: str, axes: Sequence[int], epsilon: float) -> str:
    """``source`` less its mean, divided by its deviation, along ``axes``."""
    centred = op.add("sub", source, op.add("mean", source, axes=list(axes)))
    variance = op.add("mean", op.add("mul", centred, centred), axes=list(axes))
    return op.add("div", centred, op.add("sqrt", add_affine(op, variance, 1.0, epsilon)))


def read_group_norm(op: Operator) -> None:
    """GroupNormalization, and InstanceNormalization, whose groups are single channels."""
    scale, shift, shape = op.constant(1), op.constant(2), op.shape()
    assert scale is not None and shift is not None
    channels = shape[1]
    groups = int(op.read_attribute("num_groups", channels))
    source = op.layer()
    if groups != channels:
        source = op.add("reshape", source, shape=[groups, channels // groups, *shape[2:]])
    rank = len(op.scope.draft.shape(source))
    source = normalize(op, source, range(2, rank), float(op.read_attribute("epsilon", 1e-5)))
    if groups != channels:
        source = op.add("reshape", source, shape=list(shape[1:]))
    each = [np.repeat(part, channels // part.size).reshape(-1, *(1,) * (len(shape) - 2)) for part in (scale, shift)]
    op.give(add_affine(op, source, *each))


def read_mean_variance(op: Operator) -> None:
    """MeanVarianceNormalization."""
    rank = len(op.shape())
    axes = sorted(op.axis(int(axis), rank) for axis in op.read_attribute("axes", [0, 2, 3]))
    if 0 in axes:
        raise BatchMixedError
    op.give(normalize(op, op.layer(), axes, 1e-9))


def read_layer_norm(op: Operator) -> None:
    shape = op.shape()
    first, epsilon = op.axis(int(op.read_attribute("axis", -1)), len(shape)), float(op.read_attribute("epsilon", 1e-5))
    scale, shift = op.constant(1), op.constant(2)
    assert scale is not None
    if first == 0:
        raise BatchMixedError
    if first == len(shape) - 1:
        tensors = {"scale": scale} if shift is None else {"scale": scale, "shift": shift}
        op.make("layer_norm", [op.layer()], tensors, eps=epsilon)
        return
    normal = normalize(op, op.layer(), range(first, len(shape)), epsilon)
    op.give(add_affine(op, normal, scale, 0.0 if shift is None else shift))


# ---- moves ----


def read_expand(op: Operator) -> None:
    shape, wanted = op.shape(), op.numbers("shape", 1)
    sizes = op.scope.shape_for_one([int(size) for size in wanted], math.prod(wanted) // op.scope.pictures)
    target = np.broadcast_shapes(shape, tuple(sizes))
    if target == shape:
        op.pass_through(op.layer())
    elif len(target) != len(shape) or target[0] != 1:
        raise UnknownFormError("adds axes, or pictures")
    else:
        op.make("expand", [op.layer()], shape=list(target[1:]))


def read_gather_nd(op: Operator) -> None:
    """By constant places along all of several axes in front, which are one for so long."""
    places, axes = op.constant(1), int(op.read_attribute("batch_dims", 0))
    assert places is not None
    if axes == 0:
        raise BatchMixedError
    if axes > 1 or len(places) != 1:
        raise UnknownFormError("looks up other places for each row")
    places, shape = places[0], op.shape()[1:]
    table, rest = shape[: places.shape[-1]], shape[places.shape[-1] :]
    found = np.ravel_multi_index(tuple(np.moveaxis(places % table, -1, 0)), table)
    flat = op.add("reshape", op.layer(), shape=[math.prod(table), *rest])
    look_up(op, flat, 1, found.ravel().tolist(), [*found.shape, *rest])


def read_gather_elements(op: Operator) -> None:
    """By constant places along one axis, others for each place on the other axes."""
    places, shape = op.constant(1), op.shape()
    axis = op.axis(int(op.read_attribute("axis", 0)), len(shape))
    assert places is not None
    if axis == 0 or len(places) != 1:
        raise BatchMixedError
    whole = list(np.indices(places.shape[1:]))
    whole[axis - 1] = places[0] % shape[axis]
    found = np.ravel_multi_index(tuple(whole), shape[1:])
    flat = op.add("reshape", op.layer(), shape=[math.prod(shape)])
    look_up(op, flat, 1, found.ravel().tolist(), places.shape[1:])


def read_cast_like(op: Operator) -> None:
    """To what layers hold, floats; or to what a constant does."""
    kind = op.scope.constant(op.inputs[1]).dtype if op.scope.is_constant(op.inputs[1]) else np.dtype(np.float32)
    if op.scope.is_constant(op.inputs[0]):
        op.scope.constants[op.node.output[0]] = op.scope.constant(op.inputs[0]).astype(kind)
    elif kind.kind == "b":
        read_truth(op)
    elif kind.kind != "f":
        raise UnknownFormError("turns layers into integers")
    else:
        op.pass_through(op.layer())


def read_tile(op: Operator) -> None:
    """Repeated as a whole along axes: each of these has one more in front, that of the repetitions."""
    repeats, shape = [int(count) for count in op.numbers("repeats", 1)], op.shape()
    if repeats[0] != 1:
        raise BatchMixedError
    parts = [([size] if count == 1 else [1, size], count) for size, count in zip(shape[1:], repeats[1:], strict=True)]
    if all(count == 1 for _, count in parts):
        op.pass_through(op.layer())
        return
    apart = [size for sizes, _ in parts for size in sizes]
    many = [size for sizes, count in parts for size in (sizes if count == 1 else [count, sizes[1]])]
    whole = op.add("expand", op.add("reshape", op.layer(), shape=apart), shape=many)
    op.make("reshape", [whole], shape=[size * count for size, count in zip(shape[1:], repeats[1:], strict=True)])


def read_space_to_depth(op: Operator) -> None:
    size, (channels, height, width) = int(op.read_attribute("blocksize", 1)), op.shape()[1:]
    parts = op.add("reshape", op.layer(), shape=[channels, height // size, size, width // size, size])
    moved = op.add("transpose", parts, axes=[0, 3, 5, 1, 2, 4])
    op.make("reshape", [moved], shape=[channels * size * size, height // size, width // size])


def read_depth_to_space(op: Operator) -> None:
    size, (channels, height, width) = int(op.read_attribute("blocksize", 1)), op.shape()[1:]
    rest = channels // (size * size)
    is_depth_first = op.read_attribute("mode", "DCR") == "DCR"
    shape, axes = (
        ([size, size, rest], [0, 3, 4, 1, 5, 2]) if is_depth_first else ([rest, size, size], [0, 1, 4, 2, 5, 3])
    )
    parts = op.add("reshape", op.layer(), shape=[*shape, height, width])
    moved = op.add("transpose", parts, axes=axes)
    op.make("reshape", [moved], shape=[rest, height * size, width * size])


def read_pow(op: Operator) -> None:
    """By one number or by several, also of one that is known, or of two layers."""
    if op.scope.is_constant(op.inputs[0]):
        base = op.constant(0)
        assert base is not None
        if not (base > 0).all():
            raise UnknownFormError("has powers of what is not above 0")
        grown = add_affine(op, op.layer(1), constant_for(op, op.layer(1), np.log(base.astype(np.float64))))
        op.give(op.add("exp", grown))
        return
    if not op.scope.is_constant(op.inputs[1]):
        refuse_other_ranks(op, [op.layer(0), op.layer(1)])
        op.make("powers", [op.layer(0), op.layer(1)])
        return
    power = constant_for(op, op.layer(), op.scope.constant(op.inputs[1]))
    if (power == power.flat[0]).all():
        op.make("pow", [op.layer()], power=float(power.flat[0]))
    else:
        op.make("powers", [op.layer()], {"power": power})


COMPOSED: dict[str, Callable[[Operator], None]] = {
    **COMPARING,
    **REDUCING,
    "CastLike": read_cast_like,
    "Celu": read_celu,
    "Col2Im": read_col2im,
    "ConvTranspose": read_transposed_convolution,
    "DepthToSpace": read_depth_to_space,
    "Einsum": read_einsum,
    "Expand": read_expand,
    "GatherElements": read_gather_elements,
    "GatherND": read_gather_nd,
    "Gelu": read_gelu,
    "GroupNormalization": read_group_norm,
    "InstanceNormalization": read_group_norm,
    "LayerNormalization": read_layer_norm,
    "MeanVarianceNormalization": read_mean_variance,
    "Mish": read_mish,
    "Pad": read_pad,
    "Pow": read_pow,
    "Resize": read_resize,
    "Selu": read_selu,
    "Softsign": read_softsign,
    "SpaceToDepth": read_space_to_depth,
    "Tile": read_tile,
    "Upsample": read_resize,
}
"""ONNX's name of an operator -> what reads it."""
