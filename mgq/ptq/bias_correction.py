"""Bias correction (Nagel et al. 2019, arXiv:1906.04721, section 4.2): int8 outputs that are right on average.

Rounded weights and inputs shift the mean of a layer's output, channel by channel: most where the weights of a channel
are few or small against the scale that they share, as in a depthwise convolution. The shift is measured on pictures and
taken out of the bias, before the activation and layer after layer, so that each sees what those before it really give.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, field

import megengine.functional as F
import megengine.module as M
import numpy as np
import numpy.typing as npt
from megengine import Tensor
from megengine.module.qat import QATModule

from mgq.ptq.layerwise import Layer, visit_layers
from mgq.ptq.patches import is_convolution
from mgq.quantization.activation_ranges import add_to_bias, bias_parameter, fold_weight, quantize_weight

DIGITS = 6


@dataclass
class BiasCorrection:
    """Shown the layers of a network in turn, corrects each; ``found`` is what was added, by the names of the layers.

    With ``of_weights`` it corrects what rounding the weights shifts, and not what the layers before and clipping do:
    where outliers are clipped on purpose, the mean of all positions is no measure of what is wrong at most of them.
    """

    of_weights: bool = False
    exact_weights: dict[str, Tensor] = field(default_factory=dict)
    """Weights before they were rounded, where they are no longer in the layer, by its name."""
    found: dict[str, tuple[float, ...]] = field(default_factory=dict)

    def __call__(self, layer: Layer) -> None:
        module = layer.module
        if not is_convolution(module) or bias_parameter(module) is None:
            return
        weight = self.exact_weights.pop(layer.name, None)
        weight = fold_weight(module) if weight is None else weight
        exact = average_output(module, (layer.fake_inputs if self.of_weights else layer.inputs)[0], weight)
        fake = average_output(module, layer.fake_inputs[0], quantize_weight(module))
        correction = tuple(float(f"{value:.{DIGITS}g}") for value in exact - fake)
        add_to_bias(module, correction)
        self.found[layer.name] = correction

    def remember_weights(self, layer: Layer) -> None:
        """To be shown a layer before another visitor rounds its weights."""
        if is_convolution(layer.module):
            self.exact_weights[layer.name] = fold_weight(layer.module)


def correct_biases(network: M.Module, images: npt.NDArray[np.float32], in_place: bool = False) -> M.Module:
    """A copy of ``network``, or itself, a ``qat`` one with ranges, whose outputs are right on average.

    ``images``: float32 (N, 3, H, W), pixels minus 128.
    """
    network = network if in_place else deepcopy(network)
    visit_layers(network, images, BiasCorrection())
    return network


def average_output(module: QATModule, source: Tensor, weight: Tensor) -> npt.NDArray[np.float32]:
    """(C,): the mean over pictures and positions of the convolution of ``module``, without its bias."""
    conv = module.conv if hasattr(module, "conv") else module
    output = F.conv2d(source, weight, None, conv.stride, conv.padding, conv.dilation, conv.groups)
    mean: npt.NDArray[np.float32] = output.mean(axis=(0, 2, 3)).numpy()
    return mean
