"""EasyQuant (Wu et al. 2020, arXiv:2006.16669): scales that let each layer's int8 output point where float's does.

Layer by layer, in the order in which they run, the scale of the weights and the scale of the output are chosen in turn
for the largest cosine similarity of the float output and the fake-quantized one, whose input comes from the layers
quantized before. The paper tries every scale on the whole output; here it is a sample of its positions, which tells the
same and takes seconds instead of minutes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import megengine.module.qat as Q
import numpy as np
import numpy.typing as npt
from megengine.module.qat import QATModule, QuantStub

from mgq.quant.estimators import HALF, Range
from mgq.quant.layerwise import Layer
from mgq.quant.patches import is_convolution, patches, picked, sampled_positions
from mgq.quant.ranges import folded_weight, set_range
from mgq.quant.relu6 import CEILING, QatConvBnRelu6

Array = npt.NDArray[np.float32]

ROUNDS = 2
WEIGHTS_HALF = 127.0  # range / step: int8 without -128
FRACTIONS = np.linspace(0.8, 1.2, 21)  # of the largest absolute value, as in MegEngine's own search


@dataclass
class Search:
    """Shown the layers of a network in turn, finds and sets their ranges: of activations and of weights, by name."""

    positions: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))
    activations: dict[str, Range] = field(default_factory=dict)
    weights: dict[str, Range] = field(default_factory=dict)

    def __call__(self, layer: Layer) -> None:
        if not isinstance(layer.module, QuantStub):
            self.choose(layer)

    def choose(self, layer: Layer) -> None:
        module, name = layer.module, layer.name
        exact, other = layer.output.numpy(), layer.fake_output.numpy()
        if exact.ndim != 4:  # not of the zoo: taken as it is
            self.activations[name] = float(exact.min()), float(exact.max())
            set_range(module.act_observer, *self.activations[name])
            return
        at = sampled_positions(exact.shape, self.positions)
        wanted = picked(exact, at)
        limit = largest = float(np.abs(exact).max())
        tries = np.minimum(largest * FRACTIONS, CEILING if isinstance(module, QatConvBnRelu6) else np.inf)
        if largest and is_convolution(module):
            sampled = SampledConvolution(module, layer.fake_inputs[0].numpy(), at)
            weight_limit = largest_weight = float(np.abs(sampled.weight).max())
            for _ in range(ROUNDS):
                weight_limit = best(
                    largest_weight * FRACTIONS,
                    wanted,
                    lambda w, limit=limit: quantized(sampled.output(w), limit / HALF, 128),
                )
                output = sampled.output(weight_limit)
                limit = best(tries, wanted, lambda x, output=output: quantized(output, x / HALF, 128))
            self.weights[name] = -weight_limit, weight_limit
            set_range(module.weight_observer, *self.weights[name])
        elif largest:
            output = picked(other, at)
            limit = best(tries, wanted, lambda x: quantized(output, x / HALF, 128))
        self.activations[name] = (-limit if exact.min() < 0 else 0.0), limit
        set_range(module.act_observer, *self.activations[name])


class SampledConvolution:
    """The convolution, batch norm and ReLU of ``module`` at some positions of its output, for any range of weights."""

    def __init__(self, module: QATModule, source: Array, at: Any) -> None:
        conv = module.conv if hasattr(module, "conv") else module
        self.module = module
        self.weight = folded_weight(module).numpy()
        groups = conv.groups
        self.outputs = self.weight.reshape(groups, -1, int(np.prod(self.weight.shape[-3:])))
        gathered = patches(source, conv.kernel_size, conv.stride, conv.padding, at)
        positions = gathered.shape[0]
        # (groups, positions, inputs a group * kernel)
        self.patches = np.ascontiguousarray(gathered.reshape(positions, groups, -1).transpose(1, 0, 2))
        self.bias = bias_of(module).reshape(groups, 1, -1)

    def output(self, limit: float) -> Array:
        """float32 (positions, channels) with weights quantized to ``limit``."""
        weight = quantized(self.outputs, limit / WEIGHTS_HALF, 127)
        result = self.patches @ weight.transpose(0, 2, 1) + self.bias
        result = result.transpose(1, 0, 2).reshape(result.shape[1], -1)
        if isinstance(self.module, Q.ConvBnRelu2d | Q.ConvRelu2d):
            np.maximum(result, 0, out=result)
        if isinstance(self.module, QatConvBnRelu6):
            np.minimum(result, np.float32(CEILING), out=result)
        return result


def bias_of(module: QATModule) -> Array:
    """(C,): with batch norm folded in, where there is one."""
    if hasattr(module, "bn"):
        was = module.weight_observer.enabled
        module.weight_observer.disable()
        _, bias = module.fold_weight_bias(module.bn.running_mean, module.bn.running_var)
        module.weight_observer.enabled = was
        return np.asarray(bias.numpy()).ravel()
    channels = module.out_channels
    return np.zeros(channels, np.float32) if module.bias is None else np.asarray(module.bias.numpy()).ravel()


def quantized(values: Array, step: float, levels: int) -> Array:
    """``values`` rounded to multiples of ``step``, to at most 127 and at least -``levels`` of them."""
    result: Array = np.rint(values * np.float32(1 / step))
    np.clip(result, -levels, 127, out=result)
    result *= np.float32(step)
    return result


def best(limits: npt.NDArray[np.float64], wanted: Array, made_with: Any) -> float:
    """The limit with which what is made points most nearly in the direction of ``wanted``."""
    similarities = [cosine(wanted, made_with(float(limit))) for limit in limits]
    return float(limits[int(np.argmax(similarities))])


def cosine(one: Array, other: Array) -> float:
    norms = float(np.linalg.norm(one)) * float(np.linalg.norm(other))
    return float(np.vdot(one, other)) / norms if norms else 0.0
