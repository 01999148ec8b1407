"""Keeps the weights of single layers of an int8 network in float32 (mixed precision).

Such a layer still reads and gives int8, so that its neighbours do not change: the integers become floats, are convolved
with the float weights, and the result is rounded to the grid of the output.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import megengine.module as M
from megengine import Parameter, Tensor
from megengine.module.conv_bn import _ConvBnActivation2d
from megengine.module.qat import QATModule
from megengine.module.quantized import QuantizedModule
from megengine.utils.module_utils import set_expand_structure

from mgq.errors import InputError
from mgq.quantization.batch_norm_folding import FusedConv, activation_of
from mgq.quantization.qat_layers import find_quantized_layers, fold_bias, fold_weight, is_float_layer


def keep_in_float(network: M.Module, names: Iterable[str]) -> None:
    """Keep the weights and biases of the layers ``names`` of ``network`` (mode ``qat``) in float32. This cannot be
    undone: the observer and the fake quantization of their weights are removed, from the state, too. ``names`` are
    those of convolutions in :func:`mgq.quantization.qat_layers.find_quantized_layers`; a layer kept already
    stays so. Raises InputError for a name that is none, and ``network`` is unchanged then.
    """
    layers = find_quantized_layers(network)
    chosen = [find_float_layer(layers, name) for name in names]
    for layer in chosen:
        layer.weight_observer = layer.weight_fake_quant = None


def find_float_layer(layers: dict[str, QATModule], name: str) -> QATModule:
    """Raises InputError where ``layers`` has no convolution ``name``."""
    if name not in layers:
        example = next((known for known, layer in layers.items() if isinstance(layer, _ConvBnActivation2d)), None)
        hint = f"; the first that can be kept in float is '{example}'" if example else ""
        raise InputError(f"the network has no quantized layer '{name}'{hint}")
    if not isinstance(layers[name], _ConvBnActivation2d):
        raise InputError(f"layer '{name}' has no weights to keep in float; name a convolution")
    return layers[name]


def list_float_layers(network: M.Module) -> tuple[str, ...]:
    """The names of the layers of ``network``, mode ``qat``, whose weights stay float32, in the network's order."""
    return tuple(name for name, layer in find_quantized_layers(network).items() if is_float_layer(layer))


class FloatWeights(QuantizedModule):  # type: ignore[misc]
    """int8 (N, C, H, W) -> int8 (N, O, H, W): float32 convolution, bias and activation between them.

    Its sums are those of fake quantization but for rounding: rarely an output is one step off.
    """

    def __init__(self, conv: FusedConv, output_dtype: Any) -> None:
        super().__init__()
        self.conv = conv
        self.output_dtype = output_dtype
        self.eval()  # nothing else is possible

    def forward(self, inp: Tensor) -> Tensor:
        return self.conv(inp.astype("float32")).astype(self.output_dtype)

    @classmethod
    def from_qat_module(cls, qat_module: QATModule) -> FloatWeights:
        """``qat_module`` has a batch norm, and its output a range."""
        weight = Parameter(fold_weight(qat_module).numpy())
        bias = Parameter(fold_bias(qat_module).reshape(1, -1, 1, 1))
        conv = FusedConv(qat_module.conv, weight, bias, activation_of(qat_module))
        return cls(conv, qat_module.get_activation_dtype())


def replace_float_layers(network: M.Module) -> None:
    """Replace the layers of ``network``, mode ``qat``, that are kept in float by those that run between int8 ones."""
    kept = list(network._flatten(with_key=True, with_parent=True, predicate=is_float_layer))
    for name, layer, _ in kept:
        set_expand_structure(network, name, FloatWeights.from_qat_module(layer))
