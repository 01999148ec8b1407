"""MegEngine's observers and fake quantization on numpy arrays, to the bit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from megengine import Tensor
from megengine.quantization import FakeQuantize
from megengine.quantization.observer import ExponentialMovingAverageObserver, MinMaxObserver
from megengine.quantization.utils import QParams, QuantMode, create_qparams

from mgq.engine.fast_grad.elementwise import Mask, extremes, in_pieces
from mgq.engine.fast_grad.exchange import Array, empty
from mgq.quant.qat import CurrentRangeObserver

ZERO, ONE = np.float32(0), np.float32(1)
# The float32 next below a half. Added, away from zero, before truncation it rounds halves away from zero; a half itself
# would also round up its lower neighbour.
ALMOST_HALF = np.uint32(0x3EFFFFFF)
SIGN = np.uint32(0x80000000)


@dataclass(frozen=True)
class Quantizer:
    """Rounding to multiples of ``scale``, from ``lowest`` to ``highest`` times it when ``zero_point`` is 0."""

    scale: np.float32
    zero_point: np.float32
    lowest: np.float32
    highest: np.float32

    def applied(self, array: Array) -> tuple[Array, Mask | None]:
        """``array`` quantized, in memory of its own, and where it was not clipped; None where it was nowhere."""
        output, passes = empty(array.shape), np.empty(array.shape, np.bool_)
        source, target, marks = array.reshape(-1), output.reshape(-1), passes.reshape(-1)

        def apply(piece: slice) -> bool:
            steps = np.divide(source[piece], self.scale, out=target[piece])
            rounded(steps)
            if self.zero_point:
                steps += self.zero_point
            inside = bool(steps.min() >= self.lowest and steps.max() <= self.highest)
            if inside:
                marks[piece] = True
            else:
                np.logical_and(steps >= self.lowest, steps <= self.highest, out=marks[piece])
                np.clip(steps, self.lowest, self.highest, out=steps)
            if self.zero_point:
                steps -= self.zero_point
            steps *= self.scale
            return inside

        return output, None if all(in_pieces(apply, source.size)) else passes


def rounded(array: Array) -> Array:
    """``array`` rounded to integers in place, halves away from zero."""
    half: npt.NDArray[np.uint32] = array.view(np.uint32) & SIGN
    half |= ALMOST_HALF
    array += half.view(np.float32)
    return np.trunc(array, out=array)


def quantizer_of(qparams: QParams) -> Quantizer | None:
    """What FakeQuantize does with ``qparams``; None where the scale is not one number."""
    if qparams.scale is None or qparams.scale.size != 1:
        return None
    asymmetric = qparams.mode == QuantMode.ASYMMERTIC
    zero_point = qparams.zero_point.numpy().item() if asymmetric else 0
    meta = qparams.dtype_meta
    return Quantizer(
        np.float32(qparams.scale.numpy().item()), np.float32(zero_point), np.float32(meta.qmin), np.float32(meta.qmax)
    )


def is_plain(fake_quant: Any) -> bool:
    """Whether ``fake_quant`` is one that :class:`Quantizer` can stand for, and at work."""
    return type(fake_quant) is FakeQuantize and fake_quant.enabled


def is_known(observer: Any) -> bool:
    """Whether :func:`observed` knows what ``observer`` does."""
    if type(observer) not in (MinMaxObserver, ExponentialMovingAverageObserver, CurrentRangeObserver):
        return False
    return bool(observer.mode == QuantMode.SYMMERTIC)


def observed(observer: MinMaxObserver, array: Array) -> QParams:
    """Let a known ``observer`` see ``array``, unless it is disabled; what it has to say then."""
    if observer.enabled:
        lowest, highest = np.split(extremes(array), 2)
        if isinstance(observer, ExponentialMovingAverageObserver):
            keep = observer.runtime_momentum.numpy()
            set_value(observer.min_val, observer.min_val.numpy() * keep + (ONE - keep) * lowest)
            set_value(observer.max_val, observer.max_val.numpy() * keep + (ONE - keep) * highest)
            set_value(observer.runtime_momentum, observer.momentum.numpy())
        elif isinstance(observer, CurrentRangeObserver):
            set_value(observer.min_val, lowest)
            set_value(observer.max_val, highest)
        else:
            set_value(observer.min_val, np.minimum(observer.min_val.numpy(), lowest))
            set_value(observer.max_val, np.maximum(observer.max_val.numpy(), highest))
    largest = np.maximum(-np.minimum(ZERO, observer.min_val.numpy()), np.maximum(ZERO, observer.max_val.numpy()))
    scale = np.maximum(largest / np.float32((observer.qmax - observer.qmin) / 2), np.float32(observer.scale_limit))
    return create_qparams(observer.mode, observer.dtype, scale=Tensor(scale, device=observer.min_val.device))


def set_value(tensor: Tensor, value: Array) -> None:
    """Give ``tensor`` a new value of the same shape."""
    old = tensor.numpy()
    if not np.array_equal(old, value):
        tensor._reset(Tensor(value.astype(np.float32).reshape(old.shape), device=tensor.device))
