"""Casts weights to MegEngine's int8 type without an operator, which would cost memory for good.

MegEngine caches prepared operators by the types of their inputs and never frees them, and every scale is a type of its
own. A cast takes 20 kB, a convolution 90 kB (MegEngine 1.13.0): a program that converts the network to int8 in every
epoch would grow by megabytes each time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from megengine import Tensor
from megengine.core.tensor.array_method import ArrayMethodMixin
from megengine.core.tensor.dtype import get_scale, is_quantize

from mgq.quantization.learned_scales import round_in_place

LOWEST, HIGHEST = -128, 127


@contextlib.contextmanager
def casts_in_numpy() -> Iterator[None]:
    """Within it, ``Tensor.astype`` to a ``qint8`` computes in numpy and leaves nothing behind in MegEngine.

    It divides by the scale as fake quantization does. MegEngine's operator multiplies by its inverse: less than one
    weight in a million, halfway between two steps, goes to the other one there.
    """
    stock = ArrayMethodMixin.astype

    def astype(self: Tensor, dtype: Any) -> Tensor:
        if not (is_quantize(dtype) and dtype == np.int8):
            return stock(self, dtype)
        steps = round_in_place(self.numpy() / np.float32(get_scale(dtype))).clip(LOWEST, HIGHEST)
        return Tensor(steps.astype(dtype), dtype=dtype, device=self.device)

    ArrayMethodMixin.astype = astype
    try:
        yield
    finally:
        ArrayMethodMixin.astype = stock
