"""Float convolutions for inference: batch norms folded into weight and bias, bias and activation in one operator."""

from __future__ import annotations

from copy import deepcopy

import megengine.functional as F
import megengine.module as M
import megengine.module.qat as Q
import numpy as np
from megengine import Parameter, Tensor
from megengine.functional.nn import conv_bias_activation
from megengine.module.conv_bn import _ConvBnActivation2d
from megengine.utils.module_utils import set_expand_structure

from mgq.quantization.activations import IDENTITY, RELU, RELU6, Activation
from mgq.quantization.relu6 import QatConvBnRelu6
from mgq.zoo.layers import ConvBnRelu6, without_initialization


class ConvRelu6(M.Conv2d):  # type: ignore[misc]
    """Convolution and ReLU6, float32."""

    def forward(self, inp: Tensor) -> Tensor:
        return F.relu6(super().forward(inp))


FOLDED: dict[type[M.Module], type[M.Module]] = {
    M.ConvBn2d: M.Conv2d,
    M.ConvBnRelu2d: M.ConvRelu2d,
    ConvBnRelu6: ConvRelu6,
}


def fold_batch_norms(network: M.Module) -> M.Module:
    """A copy of ``network`` (mode ``normal``) without batch norms, for inference; equal but for rounding.

    With scale s = weight / sqrt(running_var + eps), the convolution's weight becomes w * s and its bias
    (b - running_mean) * s + batch norm's bias, computed in float64.
    """
    network = deepcopy(network)
    layers = list(
        network._flatten(with_key=True, with_parent=True, predicate=lambda m: isinstance(m, _ConvBnActivation2d))
    )
    for name, layer, _ in layers:
        set_expand_structure(network, name, fold_layer(layer))
    network.eval()
    return network


def fold_layer(layer: _ConvBnActivation2d) -> M.Conv2d:
    conv, bn = layer.conv, layer.bn
    with without_initialization():
        result = FOLDED[type(layer)](
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            conv.stride,
            conv.padding,
            conv.dilation,
            conv.groups,
        )
    scale, shift, mean, var = (
        value.numpy().astype(np.float64).ravel() for value in (bn.weight, bn.bias, bn.running_mean, bn.running_var)
    )
    scale = scale / np.sqrt(var + bn.eps)
    weight = conv.weight.numpy()
    bias = 0.0 if conv.bias is None else conv.bias.numpy().astype(np.float64).ravel()
    scaled = weight.reshape(scale.size, -1) * scale[:, None]
    with np.errstate(over="ignore"):  # who asks for finite answers will find that they are not
        result.weight = Parameter(scaled.reshape(weight.shape).astype(np.float32))
        result.bias = Parameter(((bias - mean) * scale + shift).astype(np.float32).reshape(1, -1, 1, 1))
    return result


def activation_of(convolution: M.Module) -> Activation:
    """The activation in the layer of ``convolution``, in any mode but ``quantized``."""
    if isinstance(convolution, ConvBnRelu6 | QatConvBnRelu6 | ConvRelu6):
        return RELU6
    return RELU if isinstance(convolution, M.ConvBnRelu2d | Q.ConvBnRelu2d | M.ConvRelu2d) else IDENTITY


class FusedConv(M.Module):  # type: ignore[misc]
    """A float32 convolution like ``conv``, its bias and its activation as the operator that MegEngine deploys.

    ``weight`` has the shape of that of ``conv``, ``bias`` is (1, O, 1, 1), ``activation`` is as :func:`activation_of`
    has it. A convolution and a sum of their own round otherwise than that one does.
    """

    def __init__(self, conv: M.Conv2d, weight: Parameter, bias: Parameter, activation: Activation) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias
        self.stride, self.padding, self.dilation, self.groups = conv.stride, conv.padding, conv.dilation, conv.groups
        self.nonlinear_mode = "relu" if activation is RELU else "identity"
        self.relu6 = activation is RELU6

    def forward(self, inp: Tensor) -> Tensor:
        result = conv_bias_activation(
            inp,
            self.weight,
            self.bias,
            np.float32,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            nonlinear_mode=self.nonlinear_mode,
        )
        return F.relu6(result) if self.relu6 else result
