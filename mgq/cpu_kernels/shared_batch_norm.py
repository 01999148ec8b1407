"""Batch norm over a batch that lies in several processes, of plain tensors.

Feature maps, and so the zoo's own networks, have it in :class:`mgq.cpu_kernels.batch_norm.NormalizedMap`, which makes
the same exchanges.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import megengine.module as M
import numpy as np
from megengine import Tensor
from megengine.autodiff import Function

from mgq.cpu_kernels.fake_quantization import set_value
from mgq.cpu_kernels.numba_loops import make_compiler
from mgq.cpu_kernels.statistics_exchange import Exchange, exchange_of_batch_norm, share_gradients, share_moments
from mgq.cpu_kernels.tensor_exchange import tensors, values


def shared_batch_norm(stock: Callable[..., Any]) -> Callable[..., Any]:
    def forward(self: M.BatchNorm2d, source: Tensor) -> Tensor:
        exchange = exchange_of_batch_norm()
        if exchange is None or not self.training or not self.track_running_stats or self.freeze or not self.affine:
            return stock(self, source)
        function = SharedBatchNorm(exchange, self.eps)
        output = function(source, self.weight, self.bias)
        keep = np.float32(self.momentum)
        unbiased = function.variance * (function.elements / (function.elements - 1))
        for running, now in ((self.running_mean, function.mean), (self.running_var, unbiased)):
            old = running.numpy()
            set_value(running, old * keep + now.reshape(old.shape).astype(np.float32) * (np.float32(1) - keep))
        return output

    return forward


class SharedBatchNorm(Function):  # type: ignore[misc]
    """(source, weight, bias) -> batch norm by the statistics of all processes' batches.

    Once called, ``mean`` and (biased) ``variance`` float64 (C,) are those of all ``elements`` of a channel. Each
    process's gradients are those of its own loss through all statistics: their averages are the whole batch's.
    """

    def __init__(self, exchange: Exchange, epsilon: float) -> None:
        super().__init__()
        self.exchange, self.epsilon = exchange, epsilon

    def forward(self, source: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        array, scale, shift = values(source, weight, bias)
        channels = array.shape[1]
        own = array.size // channels
        sums, squares = np.zeros((2, channels))
        moments(array.reshape(len(array), channels, -1), sums, squares)
        self.elements, self.mean, self.variance = share_moments(self.exchange, own, sums / own, squares)
        self.inverse = 1 / np.sqrt(self.variance + self.epsilon)
        factor = scale.reshape(-1) * self.inverse
        output = np.empty_like(array)
        scale_and_shift(
            array.reshape(len(array), channels, -1),
            output.reshape(len(array), channels, -1),
            factor,
            shift.reshape(-1) - self.mean * factor,
        )
        self.saved = source, weight
        return Tensor(output, device=source.device)

    def backward(self, d_output: Tensor) -> list[Tensor | None]:
        array, scale, gradient = values(*self.saved, d_output)
        del self.saved
        channels = array.shape[1]
        rows = (len(array), channels, -1)
        d_shift, d_scale = np.zeros((2, channels))
        gradient_sums(array.reshape(rows), gradient.reshape(rows), self.mean, self.inverse, d_shift, d_scale)
        all_shift, all_scale = share_gradients(self.exchange, d_shift, d_scale)
        d_source = np.empty_like(array)
        source_gradient(
            array.reshape(rows),
            gradient.reshape(rows),
            d_source.reshape(rows),
            self.mean,
            self.inverse,
            scale.reshape(-1) * self.inverse,
            all_shift / self.elements,
            all_scale / self.elements,
        )
        found = [d_source, *(d.astype(np.float32).reshape(scale.shape) for d in (d_scale, d_shift))]
        return tensors(found, d_output.device)


@make_compiler()
def moments(source: Any, sums: Any, squares: Any) -> None:
    """The sum of each channel of ``source``, float32 (N, C, M), and of its squares around its mean: float64 (C,)."""
    batch, channels, elements = source.shape
    for c in range(channels):
        total = 0.0
        for n in range(batch):
            for i in range(elements):
                total += source[n, c, i]
        mean = total / (batch * elements)
        square = 0.0
        for n in range(batch):
            for i in range(elements):
                off = source[n, c, i] - mean
                square += off * off
        sums[c] = total
        squares[c] = square


@make_compiler()
def scale_and_shift(source: Any, target: Any, factor: Any, shift: Any) -> None:
    """``source``, float32 (N, C, M), times ``factor`` plus ``shift``, float64 (C,), into ``target``."""
    batch, channels, elements = source.shape
    for n in range(batch):
        for c in range(channels):
            for i in range(elements):
                target[n, c, i] = source[n, c, i] * factor[c] + shift[c]


@make_compiler()
def gradient_sums(source: Any, gradient: Any, mean: Any, inverse: Any, d_shift: Any, d_scale: Any) -> None:
    """Add up ``gradient``, float32 (N, C, M), and its products with the normalized ``source``: float64 (C,)."""
    batch, channels, elements = source.shape
    for c in range(channels):
        plain = 0.0
        product = 0.0
        for n in range(batch):
            for i in range(elements):
                plain += gradient[n, c, i]
                product += gradient[n, c, i] * (source[n, c, i] - mean[c])
        d_shift[c] = plain
        d_scale[c] = product * inverse[c]


@make_compiler()
def source_gradient(
    source: Any, gradient: Any, target: Any, mean: Any, inverse: Any, factor: Any, shift: Any, scale: Any
) -> None:
    """``factor`` times what is left of ``gradient`` without what moves mean and variance, into ``target``."""
    batch, channels, elements = source.shape
    for n in range(batch):
        for c in range(channels):
            for i in range(elements):
                normalized = (source[n, c, i] - mean[c]) * inverse[c]
                target[n, c, i] = factor[c] * (gradient[n, c, i] - shift[c] - normalized * scale[c])
