"""Windows over three axes, along one of which they are one number wide: that axis goes among the channels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mgq.graph.onnx_import.draft import NetworkDraft

Array = npt.NDArray[Any]


def find_idle_axis(kernel: Sequence[int], stride: Sequence[int], pads: Sequence[int]) -> int | None:
    """The first of three axes along which windows leave each number alone; None without one."""
    for axis in range(3):
        if kernel[axis] == stride[axis] == 1 and pads[axis] == pads[axis + 3] == 0:
            return axis
    return None


def without_axis(values: Sequence[int], axis: int) -> list[int]:
    """``values``, one for each of three axes or two (before and behind), without those of ``axis``."""
    return [value for place, value in enumerate(values) if place % 3 != axis]


def run_without_axis(draft: NetworkDraft, source: str, axis: int, run: Callable[[str], str]) -> str:
    """What ``run`` makes of ``source``, (N, C, ...) of three axes, where the numbers along ``axis`` lie side by side:
    (N, axis x C, ...) of the other two."""
    place, (channels, *sizes) = axis + 2, draft.shape(source)[1:]
    others = [other for other in (2, 3, 4) if other != place]
    order = [0, place, 1, *others]
    moved = draft.add("transpose", [source], "", {"axes": order})
    flat = [sizes[axis] * channels, *(sizes[other - 2] for other in others)]
    done = run(draft.add("reshape", [moved], "", {"shape": flat}))
    rows, *behind = draft.shape(done)[1:]
    apart = draft.add("reshape", [done], "", {"shape": [sizes[axis], rows // sizes[axis], *behind]})
    return draft.add("transpose", [apart], "", {"axes": [int(back) for back in np.argsort(order)]})


def repeat_weights(weight: Array, axis: int, times: int) -> Array:
    """``weight`` without ``axis``, along which it is one number wide, so many ``times``: for each number along it."""
    return np.concatenate([weight.squeeze(axis + 2)] * times)
