"""MegEngine operators with fast CPU kernels, differentiable as the stock ones."""

from __future__ import annotations

import contextlib
from typing import Any

import megengine as mge
import megengine.functional as F
import numpy as np
import numpy.typing as npt
from megengine import Tensor
from megengine.autodiff import Function
from megengine.core._imperative_rt.core2 import apply, get_grad_key
from megengine.core.ops.builtin import Elemwise

from mgq.engine.fast_grad import onednn
from mgq.engine.fast_grad.onednn import Array, Geometry


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


class FastConvolution(Function):  # type: ignore[misc]
    """conv2d(source, weights) of one geometry, without a bias."""

    def __init__(self, geometry: Geometry, stock_forward: Any = None) -> None:
        super().__init__()
        self.geometry = geometry
        self.stock_forward = stock_forward

    def forward(self, source: Tensor, weights: Tensor) -> Tensor:
        self.saved = source, weights, needs_gradient(source)
        x, w = values(source, weights)
        y = empty(self.geometry.output)
        onednn.convolution(self.geometry).run(source=x, weights=w, output=y)
        return Tensor(y, device=source.device)

    def backward(self, d_output: Tensor) -> tuple[Tensor | None, Tensor]:
        source, weights, wants_source = self.saved
        del self.saved
        x, w, dy = values(source, weights, d_output)
        dx, dw = empty(x.shape if wants_source else (0,)), empty(w.shape)
        onednn.convolution_gradients(self.geometry, wants_source).run(
            source=x, weights=w, d_output=dy, d_source=dx, d_weights=dw
        )
        return Tensor(dx, device=source.device) if wants_source else None, Tensor(dw, device=source.device)


class FastConvBn(Function):
    def __init__(self, geometry: Geometry, epsilon: float, relu: bool, wants_source: bool) -> None:
        super().__init__()
        self.geometry, self.epsilon, self.relu, self.wants_source = geometry, epsilon, relu, wants_source

    def forward(self, source, weights, scale, shift):
        x, w, g, b = values(source, weights, scale, shift)
        p = onednn.normalized_convolution(self.geometry, self.epsilon, self.relu)
        c = (self.geometry.channels,)
        self.kept = {"mean": empty(c), "variance": empty(c), "convolved": onednn.aligned_bytes(p.sizes["convolved"])}
        if self.relu:
            self.kept["workspace"] = onednn.aligned_bytes(p.sizes["workspace"])
        y = empty(self.geometry.output)
        p.run(source=x, weights=w, scale=g, shift=b, output=y, **self.kept)
        self.saved = source, weights, scale
        return Tensor(y, device=source.device)

    def backward(self, d_output):
        source, weights, scale = self.saved
        x, w, g, dy = values(source, weights, scale, d_output)
        dev = source.device
        dx, dw, dg, db = empty(x.shape if self.wants_source else (0,)), empty(w.shape), empty(g.shape), empty(g.shape)
        onednn.normalized_convolution_gradients(self.geometry, self.epsilon, self.relu, self.wants_source).run(
            source=x, weights=w, scale=g, d_output=dy, d_source=dx, d_weights=dw, d_scale=dg, d_shift=db, **self.kept
        )
        del self.saved, self.kept
        return Tensor(dx) if self.wants_source else None, Tensor(dw), Tensor(dg), Tensor(db)
