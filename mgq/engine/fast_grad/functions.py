"""MegEngine operators with fast CPU kernels: the stock ones' results and gradients, up to float32 rounding."""

from __future__ import annotations

from typing import Any

import megengine as mge
import numpy as np
import numpy.typing as npt
from megengine import Tensor
from megengine.autodiff import Function
from megengine.core._imperative_rt.core2 import apply, get_grad_key
from megengine.core.ops.builtin import Elemwise

from mgq.engine.fast_grad import onednn
from mgq.engine.fast_grad.onednn import Array, Geometry

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


def empty(shape: tuple[int, ...]) -> Array:
    return np.empty(shape, np.float32)


class Convolution(Function):  # type: ignore[misc]
    """(source, weights) -> output of one convolution without bias.

    ``stock`` is MegEngine's own convolution of the two, where the output must be its to the bit.
    """

    def __init__(self, geometry: Geometry, wants_source: bool, stock: Any = None) -> None:
        super().__init__()
        self.geometry = geometry
        self.wants_source = wants_source
        self.stock = stock

    def forward(self, source: Tensor, weights: Tensor) -> Tensor:
        self.saved = source, weights
        if self.stock is not None:
            return self.stock(source, weights)
        x, w = values(source, weights)
        output = empty(self.geometry.output)
        onednn.convolution(self.geometry).run(source=x, weights=w, output=output)
        return Tensor(output, device=source.device)

    def backward(self, d_output: Tensor) -> tuple[Tensor | None, Tensor]:
        source, weights = self.saved
        del self.saved
        x, w, dy = values(source, weights, d_output)
        dx, dw = empty(x.shape if self.wants_source else ()), empty(w.shape)
        program = onednn.convolution_gradients(self.geometry, self.wants_source)
        program.run(source=x, weights=w, d_output=dy, d_source=dx, d_weights=dw)
        return Tensor(dx, device=source.device) if self.wants_source else None, Tensor(dw, device=source.device)


class NormalizedConvolution(Function):  # type: ignore[misc]
    """(source, weights, scale, shift) -> output of a convolution, batch norm by its own statistics and maybe ReLU.

    ``mean`` and ``variance`` (biased) of each channel, float32 (C,), are there once it was called.
    """

    def __init__(self, geometry: Geometry, epsilon: float, relu: bool, wants_source: bool) -> None:
        super().__init__()
        self.geometry = geometry
        self.options = epsilon, relu
        self.wants_source = wants_source
        self.mean, self.variance = empty((geometry.channels,)), empty((geometry.channels,))

    def forward(self, source: Tensor, weights: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        self.saved = source, weights, scale
        x, w, g, b = values(source, weights, scale, shift)
        program = onednn.normalized_convolution(self.geometry, *self.options)
        self.kept = {
            name: onednn.aligned_bytes(program.sizes[name])
            for name in ("convolved", "workspace")
            if name in program.sizes
        }
        output = empty(self.geometry.output)
        program.run(
            source=x, weights=w, scale=g, shift=b, output=output, mean=self.mean, variance=self.variance, **self.kept
        )
        return Tensor(output, device=source.device)

    def backward(self, d_output: Tensor) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
        source, weights, scale = self.saved
        kept = self.kept
        del self.saved, self.kept
        x, w, g, dy = values(source, weights, scale, d_output)
        dx = empty(x.shape if self.wants_source else ())
        dw, dg, db = empty(w.shape), empty(g.shape), empty(g.shape)
        program = onednn.normalized_convolution_gradients(self.geometry, *self.options, self.wants_source)
        program.run(
            source=x,
            weights=w,
            scale=g,
            d_output=dy,
            d_source=dx,
            d_weights=dw,
            d_scale=dg,
            d_shift=db,
            mean=self.mean,
            variance=self.variance,
            **kept,
        )
        gradients = (Tensor(gradient, device=source.device) for gradient in (dw, dg, db))
        return (Tensor(dx, device=source.device) if self.wants_source else None, *gradients)


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
