"""EasyQuant (Wu et al. 2020, arXiv:2006.16669): scales by the cosine similarity of int8 and float outputs of a layer.

Layer by layer, in the order in which they run, the scale of the weights and the scale of the output are chosen in turn
for the largest cosine similarity of the float output and the fake-quantized one, whose input comes from the layers
quantized before. The paper tries every scale on the whole output; here it tries them on a sample of positions, which
gives the same scales in seconds instead of minutes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import megengine.module.qat as Q
import numpy as np
import numpy.typing as npt
from megengine.module.qat import QATModule, QuantStub

from mgq.ptq.layerwise import Layer
from mgq.ptq.patches import is_convolution, patches, pick_positions, sample_positions
from mgq.quantization.batch_norm_folding import activation_of
from mgq.quantization.qat_layers import (
    GridRange,
    Range,
    fold_bias,
    fold_weight,
    is_float_layer,
    quant_levels,
    quantize_weight,
    set_grid,
    set_range,
)
from mgq.quantization.targets import ChannelFakeQuantize

Array = npt.NDArray[np.float32]

ROUNDS = 2
WEIGHTS_HALF = 127.0  # range / step: int8 without -128
FRACTIONS = np.linspace(0.8, 1.2, 21)  # of the largest absolute value, as in MegEngine's own search


@dataclass
class Search:
    """A visitor of layers that finds their ranges and sets their grids. ``activations`` and ``weights``: layer name ->
    range."""

    positions: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))
    activations: dict[str, Range] = field(default_factory=dict)
    weights: dict[str, GridRange] = field(default_factory=dict)

    def __call__(self, layer: Layer) -> None:
        if not isinstance(layer.module, QuantStub):
            self.choose(layer)

    def choose(self, layer: Layer) -> None:
        module, name = layer.module, layer.name
        exact, other = layer.in_float.output.numpy(), layer.in_float.fake_output.numpy()
        if exact.ndim != 4:  # not of the zoo: taken as it is
            self.activations[name] = Range(float(exact.min()), float(exact.max()))
            set_grid(module, self.activations[name])
            return
        at = sample_positions(exact.shape, self.positions)
        wanted = pick_positions(exact, at)
        limit = largest = float(np.abs(exact).max())
        tries = np.minimum(largest * FRACTIONS, activation_of(module).high)
        grid = OutputGrid.of(module)
        if largest and is_convolution(module):
            sampled = SampledConvolution(module, layer.fake_inputs[0].numpy(), at)
            if is_float_layer(module) or isinstance(module.weight_fake_quant, ChannelFakeQuantize):
                limit = find_best_limit(
                    tries, wanted, grid.make_quantizer(sampled.with_weights(quantize_weight(module).numpy()))
                )
            else:
                limit, weight_limit = search_in_turn(sampled, largest, tries, wanted, grid)
                self.weights[name] = -weight_limit, weight_limit
                set_range(module.weight_observer, *self.weights[name])
        elif largest:
            limit = find_best_limit(tries, wanted, grid.make_quantizer(pick_positions(other, at)))
        self.activations[name] = Range(-limit if exact.min() < 0 else 0.0, limit)
        set_grid(module, self.activations[name])


@dataclass(frozen=True)
class OutputGrid:
    """The integers behind a layer, and how many steps its range has."""

    half: float
    lowest: int
    highest: int

    @classmethod
    def of(cls, module: QATModule) -> OutputGrid:
        return cls(quant_levels(module), module.act_observer.qmin, module.act_observer.qmax)

    def make_quantizer(self, output: Array) -> Callable[[float], Array]:
        """A function from a limit of the range to ``output`` quantized with that limit."""
        return lambda limit: round_to_step(output, limit / self.half, self.lowest, self.highest)


def search_in_turn(
    sampled: SampledConvolution, largest: float, tries: npt.NDArray[np.float64], wanted: Array, grid: OutputGrid
) -> tuple[float, float]:
    """The ranges of a convolution's output, whose ``largest`` value is known, and of its weights."""
    limit, largest_weight = largest, float(np.abs(sampled.weight).max())

    def run(weight_limit: float, now: float) -> Array:
        return grid.make_quantizer(sampled.output(weight_limit))(now)

    for _ in range(ROUNDS):
        weight_limit = find_best_limit(largest_weight * FRACTIONS, wanted, partial(run, now=limit))
        limit = find_best_limit(tries, wanted, grid.make_quantizer(sampled.output(weight_limit)))
    return limit, weight_limit


class SampledConvolution:
    """The convolution, batch norm and ReLU of ``module`` at some positions of its output, for any range of weights."""

    def __init__(self, module: QATModule, source: Array, at: Any) -> None:
        conv = module.conv if hasattr(module, "conv") else module
        self.module = module
        self.weight = fold_weight(module).numpy()
        groups = conv.groups
        self.outputs = self.weight.reshape(groups, -1, int(np.prod(self.weight.shape[-3:])))
        gathered = patches(source, conv.kernel_size, conv.stride, conv.padding, at)
        # (groups, positions, inputs a group * kernel)
        self.patches = np.ascontiguousarray(gathered.reshape(groups, -1, gathered.shape[-1]).transpose(0, 2, 1))
        self.bias = fold_bias(module).reshape(groups, 1, -1)

    def output(self, limit: float) -> Array:
        """float32 (positions, channels) with weights quantized to ``limit``."""
        return self.with_weights(round_to_step(self.outputs, limit / WEIGHTS_HALF, -127, 127))

    def with_weights(self, weight: Array) -> Array:
        """float32 (positions, channels) with ``weight``, (outputs, ...) or (groups, outputs a group, ...)."""
        weight = weight.reshape(self.outputs.shape)
        result = self.patches @ weight.transpose(0, 2, 1) + self.bias
        result = result.transpose(1, 0, 2).reshape(result.shape[1], -1)
        if isinstance(self.module, Q.ConvBnRelu2d | Q.ConvRelu2d):
            np.maximum(result, 0, out=result)
        if activation_of(self.module).clips:
            np.minimum(result, np.float32(activation_of(self.module).high), out=result)
        return result


def round_to_step(values: Array, step: float, lowest: int, highest: int) -> Array:
    """``values`` rounded to multiples of ``step``, from ``lowest`` to ``highest`` of them."""
    result: Array = np.rint(values * np.float32(1 / step))
    np.clip(result, lowest, highest, out=result)
    result *= np.float32(step)
    return result


def find_best_limit(limits: npt.NDArray[np.float64], wanted: Array, made_with: Any) -> float:
    """The one of ``limits`` whose result, by ``made_with``, has the largest cosine similarity with ``wanted``."""
    similarities = [cosine(wanted, made_with(float(limit))) for limit in limits]
    return float(limits[int(np.argmax(similarities))])


def cosine(one: Array, other: Array) -> float:
    norms = float(np.linalg.norm(one)) * float(np.linalg.norm(other))
    return float(np.vdot(one, other)) / norms if norms else 0.0
