"""Batch-norm folding: a float network whose convolutions have their batch norms in weight and bias."""

from __future__ import annotations

from copy import deepcopy

import megengine.functional as F
import megengine.module as M
import numpy as np
from megengine import Parameter, Tensor
from megengine.module.conv_bn import _ConvBnActivation2d
from megengine.utils.module_utils import set_expand_structure

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


def folded(network: M.Module) -> M.Module:
    """A copy of ``network`` (mode ``normal``) without batch norms, for inference; equal but for rounding.

    With scale s = weight / sqrt(running_var + eps), the convolution's weight becomes w * s and its bias
    (b - running_mean) * s + batch norm's bias, computed in float64.
    """
    network = deepcopy(network)
    layers = list(
        network._flatten(with_key=True, with_parent=True, predicate=lambda m: isinstance(m, _ConvBnActivation2d))
    )
    for name, layer, _ in layers:
        set_expand_structure(network, name, folded_layer(layer))
    network.eval()
    return network


def folded_layer(layer: _ConvBnActivation2d) -> M.Conv2d:
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
    result.weight = Parameter(scaled.reshape(weight.shape).astype(np.float32))
    result.bias = Parameter(((bias - mean) * scale + shift).astype(np.float32).reshape(1, -1, 1, 1))
    return result
