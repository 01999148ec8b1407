"""Fake quantization whose scale is trained by gradient descent: LSQ and TQT.

MegEngine has classes of these names. Its LSQ replaces its parameter whenever it is set, so that the optimizer loses it,
keeps values outside of its state, and leaves the paper's gradient scale to the caller; its TQT has scales that no
observer can have. These classes avoid that: every scale they take is one that a min-max observer can give, too.
"""

from __future__ import annotations

import math
from abc import abstractmethod

import megengine.functional as F
import numpy as np
import numpy.typing as npt
from megengine import Parameter, Tensor
from megengine.autodiff import Function
from megengine.core.tensor.dtype import QuantDtypeMeta
from megengine.quantization.fake_quant import _FakeQuantize
from megengine.quantization.observer import MinMaxObserver
from megengine.quantization.utils import QParams, QParamsModuleMixin, QuantMode, create_qparams

Array = npt.NDArray[np.float32]

SMALLEST_SCALE = 1e-5  # MegEngine's observers give none below
# Added, away from zero, before truncation it rounds halves away from zero, as MegEngine does; a half itself would also
# round up its lower neighbour.
ALMOST_HALF = np.nextafter(np.float32(0.5), np.float32(0))


class LearnedFakeQuantize(_FakeQuantize, QParamsModuleMixin):  # type: ignore[misc]
    """Rounding to int8 and back in float32, with one trained number from which the scale follows.

    ``trained`` is that number; the parameter object stays the same, so that an optimizer created earlier keeps training
    it. ``initialized`` is 1 once it was set from an observer. Where ``ceiling`` is given the range never exceeds it
    (behind a ReLU6): a gradient that would lead beyond is dropped. ``per_image``: the first axis is the batch.
    """

    def __init__(self, dtype: str | QuantDtypeMeta, ceiling: float | None = None, per_image: bool = True) -> None:
        super().__init__(dtype)
        self.half = float(self.qmax - self.qmin) / 2
        self.lowest, self.highest = SMALLEST_SCALE * self.half, math.inf if ceiling is None else ceiling
        self.per_image = per_image
        self.gain = Tensor(1.0, dtype="float32")
        self.trained = Parameter(self.to_trained(self.half), dtype="float32")
        self.initialized = Tensor(0.0, dtype="float32")

    @abstractmethod
    def to_trained(self, limit: float) -> float:
        """The value of ``trained`` that gives the range ``limit``."""

    @abstractmethod
    def free_limit(self) -> float:
        """The range that ``trained`` stands for, before it is held within bounds."""

    @abstractmethod
    def slope(self, elements: float) -> float:
        """What the gradient of the scale is multiplied by to be that of ``trained``.

        ``elements``: how many values are quantized, of a layer's weights or of one picture.
        """

    @abstractmethod
    def inner_bounds(self) -> tuple[float, float]:
        """Between these quotients of value and scale, not on them, a value counts as not clipped."""

    def limit(self) -> np.float32:
        """The range: what a min-max observer that gives the same scale has seen as its largest value."""
        return np.float32(min(max(self.free_limit(), self.lowest), self.highest))

    def get_qparams(self) -> QParams:
        # MinMaxObserver's formula. Not every float32 is a quotient by 127.5: by way of the range, all scales are.
        scale = F.maximum(Tensor(self.limit(), device=self.trained.device) / self.half, SMALLEST_SCALE)
        return create_qparams(QuantMode.SYMMERTIC, self.dtype, scale=scale)

    def fake_quant_forward(self, inp: Tensor, qparams: QParams | None = None) -> Tensor:
        return ScaleAndRound(self)(inp, self.trained)

    def initialize(self, observer: MinMaxObserver, gain: float = 1.0) -> None:
        """Take the range of ``observer``, if it has seen any and ``trained`` was not set before.

        ``gain``: how many times larger the values are than the parameters behind them, by a batch norm folded in.
        """
        if self.initialized.numpy() or observer.min_val.numpy() > observer.max_val.numpy():
            return
        self.gain[...] = Tensor(gain, dtype="float32")
        limit = float(observer.get_qparams().scale.numpy()) * self.half
        self.trained[...] = Tensor(self.to_trained(min(max(limit, self.lowest), self.highest)), dtype="float32")
        self.initialized[...] = Tensor(1.0, dtype="float32")


class LearnedStepSize(LearnedFakeQuantize):
    """LSQ, learned step size quantization (Esser et al. 2020, arXiv:1902.08153): ``trained`` is the scale by ``gain``.

    The paper scales its gradient so that scale and weights move at one pace. It quantizes the weights that are trained;
    ours have a batch norm folded in, which at the first layer makes them some 60 times smaller, so its scale would move
    too fast by the same factor. Divided by that gain it is a scale of the trained weights, as in the paper.
    """

    def to_trained(self, limit: float) -> float:
        return limit / self.half / float(self.gain.numpy())

    def free_limit(self) -> float:
        return float(self.trained.numpy()) * float(self.gain.numpy()) * self.half

    def slope(self, elements: float) -> float:
        # Section 2.2: the gradient is scaled by 1 / sqrt(N Q_P).
        return float(self.gain.numpy()) / math.sqrt(elements * self.qmax)

    def inner_bounds(self) -> tuple[float, float]:
        # Equation 3: -Q_N < v/s < Q_P.
        return self.qmin, self.qmax


class TrainedThreshold(LearnedFakeQuantize):
    """TQT, trained quantization thresholds (Jain et al. 2020, arXiv:1903.08066): ``trained`` is log2 of the threshold.

    The paper rounds the scale up to a power of two, for engines that shift; ours multiply by any scale, so it is left
    as it is. The paper's gradient (equations 7 and 8) passes straight through that rounding and is the same.
    """

    def to_trained(self, limit: float) -> float:
        return math.log2(limit / self.half * (self.qmax + 1))

    def free_limit(self) -> float:
        return float(2.0 ** float(self.trained.numpy()) * (self.half / (self.qmax + 1)))

    def slope(self, elements: float) -> float:
        return float(self.limit()) / self.half * math.log(2)

    def inner_bounds(self) -> tuple[float, float]:
        # Equation 7: n <= round(x/s) <= p.
        return self.qmin - 0.5, self.qmax + 0.5


class ScaleAndRound(Function):  # type: ignore[misc]
    """(values, ``trained``) -> values fake-quantized as FakeQuantize does it, to the bit, with gradients for both."""

    def __init__(self, quantizer: LearnedFakeQuantize) -> None:
        super().__init__()
        self.quantizer = quantizer

    def forward(self, inp: Tensor, trained: Tensor) -> Tensor:
        q = self.quantizer
        scale = q.get_qparams().scale
        self.saved = inp, trained, scale
        if not is_on_cpu(inp):
            return F.clip(F.round(inp / scale), q.qmin, q.qmax) * scale
        steps = round_in_place(inp.numpy() / scale.numpy())
        np.clip(steps, q.qmin, q.qmax, out=steps)
        steps *= scale.numpy()
        return Tensor(steps, device=inp.device)

    def backward(self, d_output: Tensor) -> tuple[Tensor, Tensor]:
        q = self.quantizer
        inp, trained, scale = self.saved
        del self.saved
        gradients = cpu_gradients if is_on_cpu(inp) else stock_gradients
        d_input, d_scale = gradients(q, inp, scale, d_output)
        elements = inp.size / (inp._tuple_shape[0] if q.per_image else 1)
        d_trained = d_scale * q.slope(elements)
        limit = q.free_limit()
        # Descending along the gradient would lead further beyond the bounds of the range.
        if (limit >= q.highest and d_trained < 0) or (limit <= q.lowest and d_trained > 0):
            d_trained = 0.0
        return d_input, Tensor(d_trained, dtype="float32", device=trained.device)


def stock_gradients(q: LearnedFakeQuantize, inp: Tensor, scale: Tensor, d_output: Tensor) -> tuple[Tensor, float]:
    """Gradients of the values and of the scale.

    The derivative of s clip(round(v/s)) with respect to s is round(v/s) - v/s where v passes straight through the
    rounding, and the bound where it is clipped.
    """
    steps = inp / scale
    lowest, highest = q.inner_bounds()
    passes = F.logical_and(steps > lowest, steps < highest).astype("float32")
    d_scale = d_output * (F.clip(F.round(steps), q.qmin, q.qmax) - steps * passes)
    return d_output * passes, float(d_scale.sum().numpy())


def cpu_gradients(q: LearnedFakeQuantize, inp: Tensor, scale: Tensor, d_output: Tensor) -> tuple[Tensor, float]:
    """:func:`stock_gradients` by numpy, which is several times faster on a CPU."""
    d_values = d_output.numpy()
    steps = inp.numpy() / scale.numpy()
    lowest, highest = q.inner_bounds()
    clipped = steps.min() <= lowest or steps.max() >= highest
    passes = (steps > lowest) & (steps < highest) if clipped else None
    slopes = round_in_place(steps.copy())
    if passes is not None:
        np.clip(slopes, q.qmin, q.qmax, out=slopes)
        steps *= passes
    slopes -= steps
    d_scale = float(np.vdot(slopes, d_values))
    return d_output if passes is None else Tensor(d_values * passes, device=inp.device), d_scale


def round_in_place(array: Array) -> Array:
    """``array`` rounded to integers in place, halves away from zero."""
    array += np.copysign(ALMOST_HALF, array)
    return np.trunc(array, out=array)


def is_on_cpu(tensor: Tensor) -> bool:
    return str(tensor.device.physical_locator[0]) == "cpu"
