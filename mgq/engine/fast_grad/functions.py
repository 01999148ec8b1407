"""MegEngine operators with fast CPU kernels: the stock ones' results and gradients, up to float32 rounding."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import megengine as mge
import numpy as np
import numpy.typing as npt
from megengine import Tensor
from megengine.autodiff import Function
from megengine.core._imperative_rt.core2 import apply, get_grad_key
from megengine.core.ops.builtin import Elemwise

from mgq.engine.fast_grad import kernels
from mgq.engine.fast_grad.kernels import Array, Geometry, Norm

Scalar = np.float32
# The float32 next below a half. Added, away from zero, before truncation it rounds halves away from zero; a half itself
# would also round up its lower neighbour.
ALMOST_HALF = np.uint32(0x3EFFFFFF)
SIGN = np.uint32(0x80000000)


def needs_gradient(*tensors: Tensor) -> bool:
    """Whether a gradient with respect to one of ``tensors`` is being recorded."""
    return get_grad_key(tensors) is not None


def values(*tensors: Tensor) -> list[Array]:
    """The values of CPU ``tensors``, read where they lie when they are contiguous. They must not be written to.

    MegEngine computes in a thread of its own, and DLPack does not wait for it: so this does.
    """
    mge._full_sync()
    return [np.ascontiguousarray(np.from_dlpack(tensor)) for tensor in tensors]


def tensors(arrays: Iterable[Array | None], device: Any) -> list[Tensor | None]:
    return [None if array is None else Tensor(array, device=device) for array in arrays]


class Convolution(Function):  # type: ignore[misc]
    """(source, weights) -> output of one convolution without bias.

    ``stock`` is MegEngine's own convolution of the two, where the output must be its to the bit.
    """

    def __init__(self, geometry: Geometry, wants_source: bool, stock: Callable[..., Tensor] | None = None) -> None:
        super().__init__()
        self.geometry = geometry
        self.wants_source = wants_source
        self.stock = stock

    def forward(self, source: Tensor, weights: Tensor) -> Tensor:
        self.saved = source, weights
        if self.stock is not None:
            return self.stock(source, weights)
        output = kernels.convolution(self.geometry, *values(source, weights))
        return Tensor(output, device=source.device)

    def backward(self, d_output: Tensor) -> list[Tensor | None]:
        arrays = values(*self.saved, d_output)
        del self.saved
        gradients = kernels.convolution_gradients(self.geometry, *arrays, self.wants_source)
        return tensors(gradients, d_output.device)


class NormalizedConvolution(Function):  # type: ignore[misc]
    """(source, weights, scale, shift) -> output of a convolution, batch norm by its own statistics and maybe ReLU.

    ``mean`` and ``variance`` (biased) of each channel, float32 (C,), are there once it was called.
    """

    def __init__(self, geometry: Geometry, norm: Norm, wants_source: bool) -> None:
        super().__init__()
        self.geometry = geometry
        self.norm = norm
        self.wants_source = wants_source

    def forward(self, source: Tensor, weights: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        result = kernels.normalized_convolution(self.geometry, self.norm, *values(source, weights, scale, shift))
        output = Tensor(result.output, device=source.device)
        self.mean, self.variance = result.mean, result.variance
        # The output is large and not needed again.
        self.saved = (source, weights, scale), result._replace(output=kernels.empty((0,)))
        return output

    def backward(self, d_output: Tensor) -> list[Tensor | None]:
        tensors_, result = self.saved
        del self.saved
        *inputs, gradient = values(*tensors_, d_output)
        gradients = kernels.normalized_convolution_gradients(
            self.geometry, self.norm, *inputs, result, gradient, self.wants_source
        )
        return tensors(gradients, d_output.device)


class AddRelu(Function):  # type: ignore[misc]
    """max(a + b, 0). MegEngine's own gradient of ReLU branches on every element."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        (self.output,) = apply(Elemwise(mode="FUSE_ADD_RELU"), a, b)
        return self.output

    def backward(self, d_output: Tensor) -> tuple[Tensor, Tensor]:
        # RELU6_GRAD is vectorized: it passes the gradient where 0 < output < 6, so the output is first held below 1.
        (held,) = apply(Elemwise(mode="MIN"), self.output, Tensor(1.0, device=d_output.device))
        (gradient,) = apply(Elemwise(mode="RELU6_GRAD"), held, d_output)
        del self.output
        return gradient, gradient


class FakeQuantization(Function):  # type: ignore[misc]
    """(x,) -> x rounded to a multiple of ``scale`` (halves away from zero) and clipped, as MegEngine's FakeQuant.

    The gradient passes where nothing was clipped, and is 0 elsewhere.
    """

    def __init__(self, scale: Scalar, zero_point: Scalar, lowest: int, highest: int) -> None:
        super().__init__()
        self.scale, self.zero_point = scale, zero_point
        self.lowest, self.highest = Scalar(lowest), Scalar(highest)

    def forward(self, x: Tensor) -> Tensor:
        (array,) = values(x)
        steps = rounded(np.divide(array, self.scale))
        if self.zero_point:
            steps += self.zero_point
        self.passes = None
        if steps.size and not (steps.min() >= self.lowest and steps.max() <= self.highest):
            self.passes = (steps >= self.lowest) & (steps <= self.highest)
            np.clip(steps, self.lowest, self.highest, out=steps)
        if self.zero_point:
            steps -= self.zero_point
        steps *= self.scale
        return Tensor(steps, device=x.device)

    def backward(self, d_output: Tensor) -> Tensor:
        if self.passes is None:
            return d_output
        (gradient,) = values(d_output)
        return Tensor(gradient * self.passes, device=d_output.device)


def rounded(array: Array) -> Array:
    """``array`` rounded to integers in place, halves away from zero."""
    half: npt.NDArray[np.uint32] = array.view(np.uint32) & SIGN
    half |= ALMOST_HALF
    array += half.view(np.float32)
    return np.trunc(array, out=array)
