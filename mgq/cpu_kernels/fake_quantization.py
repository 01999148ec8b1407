"""MegEngine's observers and fake quantization on numpy arrays, to the bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from megengine import Tensor
from megengine.quantization import FakeQuantize
from megengine.quantization.observer import ExponentialMovingAverageObserver, MinMaxObserver
from megengine.quantization.utils import QParams, QuantMode, _builtin_quant_dtypes

from mgq.cpu_kernels import numba_loops
from mgq.cpu_kernels.elementwise import Mask, fake_quantize, find_passing_rows, round_rows
from mgq.cpu_kernels.statistics_exchange import merge_extremes
from mgq.cpu_kernels.tensor_exchange import Array, read_state, write_state
from mgq.quantization.half_to_even import EvenFakeQuantize
from mgq.quantization.qat import CurrentRangeObserver
from mgq.quantization.targets import UnitScaleObserver

ZERO, ONE = np.float32(0), np.float32(1)
UNKNOWN: Array = np.full(2, np.nan, np.float32)
"""Extremes that nobody has looked for."""


class Quantizer(NamedTuple):
    """Rounding to multiples of ``scale``, from ``qmin`` to ``qmax`` times it when ``zero_point`` is 0."""

    scale: np.float32
    zero_point: np.float32
    qmin: np.float32
    qmax: np.float32

    def apply_in_place(self, array: Array, positive: bool = False) -> Mask | None:
        """Quantize ``array`` in place; where it was not clipped, None where it was nowhere.

        What is 0 or less counts as clipped where ``positive`` is set: behind a ReLU.
        """
        return fake_quantize(array, self.scale, self.zero_point, self.qmin, self.qmax, positive)

    def apply(self, array: Array) -> tuple[Array, Mask | None]:
        """``array`` quantized, in memory of its own, and where it was not clipped."""
        output = array.copy()
        return output, self.apply_in_place(output)

    def apply_to_rows(self, array: Array, factors: Array, divide: bool, ends: Array) -> tuple[Array, Mask | None]:
        """Each row of ``array``, seen as (factors.size, elements), times its factor, quantized, and where it was not
        clipped, None where it was nowhere. With ``divide`` the result is divided by the factors again. For a zero point
        of 0. ``ends``: the extremes of what is quantized, or UNKNOWN ones."""
        levels = self.scale, self.qmin, self.qmax
        rounded = round_rows(array, factors, divide, *levels)
        # Rounding keeps the order, so the ends tell of all.
        if numba_loops.are_within(ends, *levels):
            return rounded, None
        return rounded, find_passing_rows(array, factors, *levels)


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
    return is_stock and bool(fake_quant.enabled) and getattr(fake_quant, "floor", None) is None


def is_known(observer: Any) -> bool:
    """Whether :func:`update_observer` knows what ``observer`` does."""
    if type(observer) not in (MinMaxObserver, ExponentialMovingAverageObserver, CurrentRangeObserver):
        return False
    return bool(observer.mode == QuantMode.SYMMERTIC)


def is_unit(observer: Any) -> bool:
    """Whether ``observer`` says 1 whatever it sees, as that of the pixels does."""
    return type(observer) is UnitScaleObserver and bool(observer.mode == QuantMode.SYMMERTIC)


class ObservedParams(QParams):  # type: ignore[misc]
    """What an observer has to say, symmetric with one ``scale``: a tensor once somebody asks for it."""

    def __init__(self, observer: MinMaxObserver, scale: np.float32) -> None:
        self.number, self.like = scale, observer.min_val
        self._scale: Tensor | None = None
        # As create_qparams makes it.
        meta = observer.dtype
        super().__init__(observer.mode, _builtin_quant_dtypes[meta] if isinstance(meta, str) else meta, None, None)

    @property
    def scale(self) -> Tensor:
        if self._scale is None:
            self._scale = Tensor(np.full(self.like._tuple_shape, self.number), device=self.like.device, no_cache=True)
        return self._scale

    @scale.setter
    def scale(self, scale: Tensor | None) -> None:
        self._scale = scale

    @property
    def quantizer(self) -> Quantizer:
        """What FakeQuantize does with it."""
        return Quantizer(self.number, ZERO, np.float32(self.dtype_meta.qmin), np.float32(self.dtype_meta.qmax))


def update_observer(observer: MinMaxObserver, extremes: Callable[[], Array]) -> ObservedParams:
    """Let a known ``observer`` see an array with these ``extremes``, unless it is disabled; what it has to say then."""
    lowest, highest = read_state(observer.min_val, observer.max_val)
    low, high = lowest.reshape(-1)[0], highest.reshape(-1)[0]
    if observer.enabled:
        low, high = widen_range(observer, low, high, extremes())
    half = np.float32((observer.qmax - observer.qmin) / 2)
    scale = numba_loops.scale_of_range(low, high, half, np.float32(observer.scale_limit))  # a float of Python's
    return ObservedParams(observer, np.float32(scale))


def widen_range(
    observer: MinMaxObserver, low: np.float32, high: np.float32, extremes: Array
) -> tuple[np.float32, np.float32]:
    """The range of ``observer``, ``low`` to ``high`` till now, once it has seen ``extremes``; it keeps it."""
    kind = type(observer)  # asked for instances, abstract classes go through Python every time
    if kind is not CurrentRangeObserver:  # weights are the same everywhere
        extremes = merge_extremes(extremes)
    least, largest = extremes[0], extremes[1]
    if kind is ExponentialMovingAverageObserver:
        now, later = read_state(observer.runtime_momentum, observer.momentum)
        keep = now.reshape(-1)[0]
        least, largest = low * keep + (ONE - keep) * least, high * keep + (ONE - keep) * largest
        change(observer.runtime_momentum, keep, later.reshape(-1)[0])
    elif kind is not CurrentRangeObserver:
        least, largest = np.minimum(low, least), np.maximum(high, largest)
    change(observer.min_val, low, least)
    change(observer.max_val, high, largest)
    return least, largest


def change(tensor: Tensor, old: np.float32, new: np.float32) -> None:
    """Give ``tensor``, of one number, the value ``new`` where it is not its ``old`` one."""
    if old != new:
        write_state(tensor, np.array([new], np.float32))


def set_value(tensor: Tensor, value: Array) -> None:
    """Give ``tensor`` a new value of the same shape."""
    if not np.array_equal(tensor.numpy(), value):
        write_state(tensor, value.astype(np.float32, copy=False))
