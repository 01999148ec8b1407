"""Quantizes ReLU6 without an operator of its own.

In float and fake quantization the clamp at 6 is computed. In int8 it is the saturation of the output type: the observed
range of a ReLU6 never exceeds 6, so the largest int8 value is at most 6.
"""

from __future__ import annotations

import megengine.functional as F
import megengine.module.qat as Q
import megengine.module.quantized as QD
from megengine import Tensor
from megengine.core.tensor.dtype import get_scale

from mgq.errors import FailureError
from mgq.quantization import exact_fake_quant, operations
from mgq.quantization.activations import RELU6
from mgq.quantization.exact_fake_quant import ExactSums
from mgq.zoo.layers import ConvBnRelu6

INT8_MAX = 127


class QatConvBnRelu6(ExactSums, Q.ConvBnRelu2d):  # type: ignore[misc]
    """Fake-quantized convolution, batch norm and ReLU6."""

    def forward(self, inp: Tensor) -> Tensor:
        return self.apply_quant_activation(F.clip(self.calc_conv_bn_qat(inp), RELU6.low, RELU6.high))


class QuantizedConvBnRelu6(QD.ConvBnRelu2d):  # type: ignore[misc]
    """int8 convolution whose saturation is the ReLU6."""

    @classmethod
    def from_qat_module(cls, qat_module: QatConvBnRelu6) -> QuantizedConvBnRelu6:
        """Raises FailureError where the scale represents a value above 6."""
        quantized: QuantizedConvBnRelu6 = super().from_qat_module(qat_module)
        largest = get_scale(quantized.output_dtype) * INT8_MAX
        if largest > RELU6.high * (1 + 1e-6):
            raise FailureError(
                f"a range of {largest:.3f} behind a ReLU6 would let values above 6 through; calibrate again"
            )
        return quantized


FLOAT_TO_QAT = {**exact_fake_quant.FLOAT_TO_QAT, **operations.FLOAT_TO_QAT, ConvBnRelu6: QatConvBnRelu6}
QAT_TO_QUANTIZED = {**exact_fake_quant.QAT_TO_QUANTIZED, QatConvBnRelu6: QuantizedConvBnRelu6}
