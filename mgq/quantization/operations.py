"""Fake quantization of layers of imported networks: computed in float, the result rounded to a grid."""

from __future__ import annotations

from typing import Any

from megengine import Tensor
from megengine.module.qat import QATModule

from mgq.quantization.exact_fake_quant import FlooredOutput
from mgq.zoo.blueprint_layers import FloatOperation, GriddedFloatOperation, Operation


class QatOperation(FlooredOutput, Operation, QATModule):  # type: ignore[misc]
    """Fake-quantized :class:`mgq.zoo.blueprint_layers.Operation`."""

    with_weight = False

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.apply_quant_activation(super().forward(*inputs))

    @classmethod
    def from_float_module(cls, float_module: Operation) -> QatOperation:
        return cls(float_module.kind, float_module.options, float_module.lowest)


class QatFloatOperation(FlooredOutput, FloatOperation, QATModule):  # type: ignore[misc]
    """Fake-quantized :class:`mgq.zoo.blueprint_layers.GriddedFloatOperation`: its constants stay in float."""

    with_weight = False

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.apply_quant_activation(super().forward(*inputs))

    @classmethod
    def from_float_module(cls, float_module: GriddedFloatOperation) -> QatFloatOperation:
        shapes = {name: getattr(float_module, name).shape for name in float_module.constants}
        result = cls(float_module.kind, float_module.options, float_module.lowest, shapes)
        for name in float_module.constants:
            setattr(result, name, getattr(float_module, name))
        return result


FLOAT_TO_QAT: dict[Any, Any] = {Operation: QatOperation, GriddedFloatOperation: QatFloatOperation}
