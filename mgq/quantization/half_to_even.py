"""Rounding as ONNX and its engines do it: halves to the even neighbour. MegEngine rounds them away from zero."""

from __future__ import annotations

import megengine.functional as F
import numpy as np
import numpy.typing as npt
from megengine import Tensor
from megengine.core.tensor.dtype import QuantDtypeMeta
from megengine.quantization import FakeQuantize
from megengine.quantization.utils import QParams

from mgq.quantization.floors import LEVELS, floor_of, steps_below

SHIFT = 1.5 * 2**23
"""Beside it float32 has no fractions: what is added to it is rounded, halves to even."""
INT32 = np.iinfo(np.int32)
LOWEST_STEPS = {"quint8_skewed": -31}
"""Where a grid ends below, by its name, where that is not as far from 0 as above."""


def ends_of(dtype: QuantDtypeMeta, scale: float) -> tuple[int, int]:
    """The lowest and the highest step of a grid of ``dtype`` and ``scale``."""
    floor = floor_of(dtype)
    if floor is None:
        return LOWEST_STEPS.get(dtype.name, dtype.qmin), dtype.qmax
    below = steps_below(floor, scale)
    return -below, LEVELS - below


def round_half_to_even(values: Tensor, qmin: int, qmax: int) -> Tensor:
    """``values`` clipped and rounded to integers, float32; the gradient is that of clipping.

    Neither limit may be beyond 2**22.
    """
    return (F.clip(values, qmin, qmax) + SHIFT) - SHIFT


class EvenFakeQuantize(FakeQuantize):  # type: ignore[misc]
    """Rounding of activations to integers and back in float32 by :func:`round_half_to_even`, ``steps`` of the result.

    In training state MegEngine's own operator does it: halves are rare, and it is faster with its gradient.
    """

    def __init__(self, dtype: str | QuantDtypeMeta, enable: bool = True) -> None:
        super().__init__(dtype, enable)
        self.qmin: int = LOWEST_STEPS.get(self.dtype.name, self.dtype.qmin)
        self.floor = floor_of(self.dtype)

    def fake_quant_forward(self, inp: Tensor, qparams: QParams | None = None) -> Tensor:
        assert qparams is not None
        if self.training and self.floor is None:
            return super().fake_quant_forward(inp, qparams)
        qmin, qmax = self.qmin, self.qmax
        if self.floor is not None:
            qmin, qmax = ends_of(self.dtype, float(qparams.scale.numpy().item()))
        if self.training:
            return super().fake_quant_forward(F.clip(inp, qmin * qparams.scale, qmax * qparams.scale), qparams)
        steps = round_half_to_even(inp * (1 / qparams.scale), qmin, qmax)
        result = steps * qparams.scale
        result.steps = steps
        return result


def bias_steps(bias: npt.NDArray[np.float32], scales: npt.NDArray[np.float32]) -> npt.NDArray[np.int32]:
    """``bias`` in terms of ``scales``, of a shape that fits it: what an ONNX file holds, int32."""
    steps = np.rint(bias / scales.astype(np.float64))
    integers: npt.NDArray[np.int32] = np.clip(steps, INT32.min, INT32.max).astype(np.int32)
    return integers


def bias_in_steps(bias: Tensor, scales: Tensor) -> Tensor:
    """:func:`bias_steps` as float32, with the gradient of a division."""
    quotient = bias / scales
    wanted = bias_steps(bias.numpy(), scales.numpy()).astype(np.float32)
    return quotient + Tensor(wanted - quotient.numpy(), device=bias.device)
