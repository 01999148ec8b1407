"""Resize and Upsample: pixels repeated or chosen, or blended by fixed weights, which is a product of matrices."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from mgq.graph.onnx_import.operators import MOST_PLACES, BatchMixedError, Operator, UnknownFormError

Values = npt.NDArray[np.float64]
USUAL = "half_pixel"
OLD = "asymmetric"
"""How Upsample, and Resize of opset 10, place pixels."""


def read_resize(op: Operator) -> None:
    sizes, scales = sizes_of(op)
    shape = op.shape()
    if len(shape) != 4 or (sizes[:2], scales[:2]) != (list(shape[:2]), [1, 1]):
        raise BatchMixedError if sizes[0] != shape[0] else UnknownFormError("resizes other things than pictures")
    is_old = op.node.op_type == "Upsample" or op.scope.opset < 11
    where = OLD if is_old else str(op.read_attribute("coordinate_transformation_mode", USUAL))
    if where not in PLACES:
        raise UnknownFormError(f"places pixels by the mode {where}")
    if max(sizes) > MOST_PLACES:
        raise UnknownFormError("makes more pixels than a classifier needs")
    lines = [PLACES[where](shape[axis], sizes[axis], scales[axis]) for axis in (2, 3)]
    mode = str(op.read_attribute("mode", "nearest"))
    if mode == "nearest":
        rounding = "floor" if is_old else str(op.read_attribute("nearest_mode", "round_prefer_floor"))
        choose(op, [round_places(line, rounding, shape[axis]) for axis, line in zip((2, 3), lines, strict=True)])
    elif mode in ("linear", "cubic"):
        if op.scope.holds_pixels(op.layer()):
            raise UnknownFormError(
                "blends integers, which each engine rounds in its own way: cast pixels to float32 first"
            )
        weigh = weigh_all if op.read_attribute("antialias", 0) else weigh_neighbours
        rows, columns = (
            weigh(op, mode, line, shape[axis], scales[axis]) for axis, line in zip((2, 3), lines, strict=True)
        )
        op.make("resize", [op.layer()], {"columns": columns.T, "rows": rows})
    else:
        raise UnknownFormError(f"blends pixels by the mode {mode}")


def sizes_of(op: Operator) -> tuple[list[int], list[float]]:
    """Length and scale of each axis of the result."""
    shape = op.shape()
    place = 1 if op.node.op_type == "Upsample" or op.scope.opset < 11 else 2
    scales, sizes = op.numbers("scales", place), op.numbers("sizes", 3) if place == 2 else None
    axes = [int(axis) % len(shape) for axis in op.read_attribute("axes", range(len(shape)))]
    whole, factors = list(shape), [1.0] * len(shape)
    if sizes and (policy := str(op.read_attribute("keep_aspect_ratio_policy", "stretch"))) != "stretch":
        choice = min if policy == "not_larger" else max
        factor = choice(size / shape[axis] for axis, size in zip(axes, sizes, strict=True))
        sizes = [math.floor(shape[axis] * factor + 0.5) for axis in axes]
    for axis, given in zip(axes, scales or sizes or (), strict=True):
        factors[axis] = float(given) if scales else given / shape[axis]
        whole[axis] = math.floor(shape[axis] * given) if scales else int(given)
    if min(whole) < 1:
        raise UnknownFormError("makes pictures of no pixels")
    return whole, factors


# ---- where the pixels of the result lie among those of the source ----


def place_in_middle(size: int, new: int, scale: float) -> Values:
    return (np.arange(new) + 0.5) / scale - 0.5


def place_in_middle_of_several(size: int, new: int, scale: float) -> Values:
    return place_in_middle(size, new, scale) if new > 1 else np.zeros(1)


def place_symmetrically(size: int, new: int, scale: float) -> Values:
    return size / 2 * (1 - new / (scale * size)) + place_in_middle(size, new, scale)


def place_at_start(size: int, new: int, scale: float) -> Values:
    return np.arange(new) / scale


def place_on_corners(size: int, new: int, scale: float) -> Values:
    return np.arange(new) * ((size - 1) / max(new - 1, 1))


PLACES: dict[str, Callable[[int, int, float], Values]] = {
    USUAL: place_in_middle,
    "pytorch_half_pixel": place_in_middle_of_several,
    "half_pixel_symmetric": place_symmetrically,
    OLD: place_at_start,
    "align_corners": place_on_corners,
}


# ---- what becomes of them ----

ROUNDINGS: dict[str, Callable[[Values], Values]] = {
    "round_prefer_floor": lambda places: np.ceil(places - 0.5),
    "round_prefer_ceil": lambda places: np.floor(places + 0.5),
    "floor": np.floor,
    "ceil": np.ceil,
}


def round_places(places: Values, rounding: str, size: int) -> list[int]:
    """The pixel that is chosen at each of ``places``."""
    if rounding not in ROUNDINGS:
        raise UnknownFormError(f"rounds places by the mode {rounding}")
    return [int(place) for place in np.clip(ROUNDINGS[rounding](places), 0, size - 1)]


def choose(op: Operator, chosen: list[list[int]]) -> None:
    """Pixels at the rows and columns ``chosen``: repeated where each is taken equally often, one after the other."""
    _, channels, height, width = op.shape()
    repeats = [len(places) // size for places, size in zip(chosen, (height, width), strict=True)]
    even = [
        [place // count for place in range(size * count)] for size, count in zip((height, width), repeats, strict=True)
    ]
    source = op.layer()
    if chosen == even:
        rows, columns = repeats
        parts = op.add("reshape", source, shape=[channels, height, 1, width, 1])
        many = op.add("expand", parts, shape=[channels, height, rows, width, columns])
        op.make("reshape", [many], shape=[channels, height * rows, width * columns])
        return
    for axis, places in enumerate(chosen, 2):
        if places != list(range(op.shape()[axis])):
            source = op.add("slice", source, axis=axis, indices=places)
    op.give(source)


def weigh_neighbours(op: Operator, mode: str, places: Values, size: int, _: float) -> Values:
    """(new, size): what share each pixel of the source has in each of the result along one axis."""
    first = np.floor(places).astype(int)
    part = places - first
    shares = np.zeros((len(places), size))
    for step, share in weights_of(mode, part, float(op.read_attribute("cubic_coeff_a", -0.75))).items():
        inside = (first + step >= 0) & (first + step < size)
        if mode == "cubic" and op.read_attribute("exclude_outside", 0):
            share = share * inside
        np.add.at(shares, (np.arange(len(places)), np.clip(first + step, 0, size - 1)), share)
    total: Values = shares / shares.sum(axis=1, keepdims=True)
    return total


def weigh_all(op: Operator, mode: str, places: Values, size: int, scale: float) -> Values:
    """The same of a picture that becomes smaller, where all pixels that become one have a share in it."""
    shrink = min(scale, 1.0)
    reach = math.ceil(2 / shrink) + 1
    spots = np.arange(-reach, size + reach)  # those outside are as the ones on the border
    far = np.abs(spots - places[:, None]) * shrink
    shares = (
        np.maximum(1 - far, 0) if mode == "linear" else cubic(far, float(op.read_attribute("cubic_coeff_a", -0.75)))
    )
    if op.read_attribute("exclude_outside", 0):
        shares = shares * ((spots >= 0) & (spots < size))
    found = np.zeros((len(places), size))
    np.add.at(found.T, np.clip(spots, 0, size - 1), shares.T)
    total: Values = found / found.sum(axis=1, keepdims=True)
    return total


def cubic(far: Values, sharpness: float) -> Values:
    """The share of a pixel that is so ``far``, in pixels, from a place."""
    near = ((sharpness + 2) * far - (sharpness + 3)) * far * far + 1
    farther = ((sharpness * far - 5 * sharpness) * far + 8 * sharpness) * far - 4 * sharpness
    return np.where(far <= 1, near, np.where(far < 2, farther, 0.0))


def weights_of(mode: str, part: Values, sharpness: float) -> dict[int, Values]:
    """The shares of the pixels around a place that lies ``part`` of the way from one to the next."""
    if mode == "linear":
        return {0: 1 - part, 1: part}
    return {step: cubic(np.abs(step - part), sharpness) for step in (-1, 0, 1, 2)}
