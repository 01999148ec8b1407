"""MegEngine's observers and fake quantization on numpy arrays, to the bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from megengine import Tensor
from megengine.quantization import FakeQuantize
from megengine.quantization.observer import ExponentialMovingAverageObserver, MinMaxObserver
from megengine.quantization.utils import QParams, QuantMode, create_qparams

from mgq.cpu_kernels.elementwise import Mask, fake_quantize, fake_quantize_rows
from mgq.cpu_kernels.statistics_exchange import merge_extremes
from mgq.cpu_kernels.tensor_exchange import Array
from mgq.quantization.half_to_even import EvenFakeQuantize
from mgq.quantization.qat import CurrentRangeObserver

ZERO, ONE = np.float32(0), np.float32(1)


@dataclass(frozen=True)
class Quantizer:
    """Rounding to multiples of ``scale``, from ``qmin`` to ``qmax`` times it when ``zero_point`` is 0."""

    scale: np.float32
    zero_point: np.float32
    qmin: np.float32
    qmax: np.float32

    def apply(self, array: Array) -> tuple[Array, Mask | None]:
        """A quantized copy of ``array``, and a mask of what was not clipped; None where nothing was clipped."""
        return fake_quantize(array, self.scale, self.zero_point, self.qmin, self.qmax)

    def apply_to_rows(self, array: Array, factors: Array, divide: bool) -> tuple[Array, Mask]:
        """Each row of ``array``, seen as (factors.size, elements), times its factor, quantized, and where it was not
        clipped. With ``divide`` the result is divided by the factors again. For a zero point of 0."""
        return fake_quantize_rows(array, factors, divide, self.scale, self.qmin, self.qmax)


def quantizer_of(qparams: QParams) -> Quantizer | None:
    """The quantizer that equals FakeQuantize with ``qparams``; None where the scale is not one number."""
    if qparams.scale is None or qparams.scale.size != 1:
        return None
    asymmetric = qparams.mode == QuantMode.ASYMMERTIC
    zero_point = qparams.zero_point.numpy().item() if asymmetric else 0
    meta = qparams.dtype_meta
    return Quantizer(
        np.float32(qparams.scale.numpy().item()), np.float32(zero_point), np.float32(meta.qmin), np.float32(meta.qmax)
    )


def is_plain(fake_quant: Any) -> bool:
    """Whether :class:`Quantizer` can replace ``fake_quant``, and it is enabled."""
    is_stock = type(fake_quant) is FakeQuantize or (type(fake_quant) is EvenFakeQuantize and fake_quant.training)
    return is_stock and bool(fake_quant.enabled)


def is_known(observer: Any) -> bool:
    """Whether :func:`update_observer` knows what ``observer`` does."""
    if type(observer) not in (MinMaxObserver, ExponentialMovingAverageObserver, CurrentRangeObserver):
        return False
    return bool(observer.mode == QuantMode.SYMMERTIC)


def update_observer(observer: MinMaxObserver, extremes: Callable[[], Array]) -> QParams:
    """Update a known ``observer`` with the ``extremes`` of an array, unless it is disabled; return its quantization
    parameters."""
    if observer.enabled:
        found = extremes()
        if not isinstance(observer, CurrentRangeObserver):  # weights are the same everywhere
            found = merge_extremes(found)
        qmin, qmax = np.split(found, 2)
        if isinstance(observer, ExponentialMovingAverageObserver):
            keep = observer.runtime_momentum.numpy()
            set_value(observer.min_val, observer.min_val.numpy() * keep + (ONE - keep) * qmin)
            set_value(observer.max_val, observer.max_val.numpy() * keep + (ONE - keep) * qmax)
            set_value(observer.runtime_momentum, observer.momentum.numpy())
        elif isinstance(observer, CurrentRangeObserver):
            set_value(observer.min_val, qmin)
            set_value(observer.max_val, qmax)
        else:
            set_value(observer.min_val, np.minimum(observer.min_val.numpy(), qmin))
            set_value(observer.max_val, np.maximum(observer.max_val.numpy(), qmax))
    largest = np.maximum(-np.minimum(ZERO, observer.min_val.numpy()), np.maximum(ZERO, observer.max_val.numpy()))
    scale = np.maximum(largest / np.float32((observer.qmax - observer.qmin) / 2), np.float32(observer.scale_limit))
    return create_qparams(observer.mode, observer.dtype, scale=Tensor(scale, device=observer.min_val.device))


def set_value(tensor: Tensor, value: Array) -> None:
    """Give ``tensor`` a new value of the same shape."""
    old = tensor.numpy()
    if not np.array_equal(old, value):
        tensor._reset(Tensor(value.astype(np.float32, copy=False).reshape(old.shape), device=tensor.device))
