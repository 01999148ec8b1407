"""Gathers what a convolution reads for a sample of its output positions."""

from __future__ import annotations

from typing import Any

import megengine.module.qat as Q
import numpy as np
import numpy.typing as npt
from megengine.module.qat import QATModule

from mgq.cpu_kernels import numba_loops
from mgq.graph.layer_graph import pair

Array = npt.NDArray[np.float32]

POSITIONS = 256


def is_convolution(module: QATModule) -> bool:
    return isinstance(module, Q.Conv2d | Q.ConvBn2d | Q.ConvBnRelu2d)


def is_plain(conv: Any) -> bool:
    """Whether what ``conv`` reads lies without gaps."""
    return all(gap == 1 for gap in np.ravel(conv.dilation))


def output_size(conv: Any, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of what ``conv`` gives for an input of ``height`` x ``width``."""
    sizes = zip((height, width), conv.kernel_size, conv.stride, conv.padding, pair(conv.dilation), strict=True)
    rows, columns = ((size + 2 * pad - (kernel - 1) * gap - 1) // step + 1 for size, kernel, step, pad, gap in sizes)
    return rows, columns


def sample_positions(shape: tuple[int, ...], rng: np.random.Generator, number: int = POSITIONS) -> Any:
    """Indices of ``number`` pictures, rows and columns of an output of ``shape``; of all, where there are fewer. They
    are in order: neighbours read the same memory."""
    batch, _, height, width = shape
    total = batch * height * width
    chosen = rng.choice(total, min(total, number), replace=False)
    return np.unravel_index(np.sort(chosen), (batch, height, width))


def pick_positions(values: Array, at: Any) -> Array:
    """(N, C, H, W) -> (positions, C)."""
    image, row, column = at
    result: Array = values[image, :, row, column]
    return result


def patches(
    source: Array, kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int], at: Any
) -> Array:
    """What a convolution reads for some of its outputs: (N, C, H, W) -> (C, kernel height, width, positions)."""
    image, row, column = at
    result = np.empty((source.shape[1], *kernel, len(image)), np.float32)
    numba_loops.gather_patches(source, image, row * stride[0] - padding[0], column * stride[1] - padding[1], result)
    return result
