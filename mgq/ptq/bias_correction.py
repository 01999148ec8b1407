"""Bias correction (Nagel et al. 2019, arXiv:1906.04721, section 4.2): int8 outputs that are right on average.

Rounded weights and inputs shift the mean of a layer's output, channel by channel: most where the weights of a channel
are few or small against the scale that they share, as in a depthwise convolution. The shift is measured on images and
subtracted from the bias. Layers are corrected in their order, so that each one sees the corrected outputs of those
before it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import megengine.module as M
import numpy as np
import numpy.typing as npt
from megengine import Tensor
from megengine.module.qat import QATModule

from mgq.graph.layer_graph import Convolution, Graph, pair
from mgq.ptq.layerwise import Layer
from mgq.ptq.patches import is_convolution, output_size
from mgq.quantization.half_to_even import ends_of
from mgq.quantization.qat_layers import add_to_bias, bias_parameter, find_quantized_layers, fold_weight, quantize_weight
from mgq.system.side_process import SideProcess, share_halves
from mgq.zoo.layers import forward_hooks

Values = npt.NDArray[np.float64]

DIGITS = 6


@dataclass
class BiasCorrection:
    """A visitor of layers that corrects the bias of each. ``found``: layer name -> what was added, float32 (O,).

    With ``of_weights`` it corrects only the shift that comes from rounding the weights, not that of earlier layers and
    of clipping: where outliers are clipped on purpose, the mean over all positions does not describe the error at most
    of them.
    """

    of_weights: bool = False
    exact_weights: dict[str, Tensor] = field(default_factory=dict)
    """Layer name -> weights before rounding, where the layer holds rounded ones."""
    found: dict[str, tuple[float, ...]] = field(default_factory=dict)

    def __call__(self, layer: Layer) -> None:
        module = layer.module
        if not is_convolution(module) or bias_parameter(module) is None:
            return
        weight = self.exact_weights.pop(layer.name, None)
        weight = fold_weight(module) if weight is None else weight
        seen = mean_patch(module, layer.fake_inputs[0])
        wanted = seen if self.of_weights else mean_patch(module, layer.in_float.inputs[0])
        exact, fake = average_output(weight, wanted), average_output(quantize_weight(module), seen)
        self.found[layer.name] = shift_bias(module, exact - fake)

    def remember_weights(self, layer: Layer) -> None:
        """A visitor that keeps the weights of ``layer``; it runs before the visitor that rounds them."""
        if is_convolution(layer.module):
            self.exact_weights[layer.name] = fold_weight(layer.module)


def shift_bias(module: M.Module, correction: Values) -> tuple[float, ...]:
    """Add ``correction`` (O,) to the bias of ``module``, in the digits that a file of ranges holds; what was added."""
    added = tuple(float(f"{value:.{DIGITS}g}") for value in correction)
    add_to_bias(module, added)
    return added


def find_last_linear(network: M.Module) -> tuple[str, M.Module] | None:
    """The name of the last linear layer of ``network``, and that layer; None where there is none, or it has no bias."""
    linear = [(name, module) for name, module in network.named_modules() if isinstance(module, M.Linear)]
    return linear[-1] if linear and linear[-1][1].bias is not None else None


def correct_rounding_shifts(
    watched: M.Module,
    network: M.Module,
    graph: Graph,
    batches: Sequence[npt.NDArray[np.float32]],
    side: SideProcess | None = None,
) -> dict[str, tuple[float, ...]]:
    """Correct the biases of ``watched``, a ``qat`` network with ranges, for what rounding takes from the inputs of its
    convolutions on average. Returns what was added, by layer, (O,).

    ``network``: the same in mode ``normal``, whose ``graph`` tells who reads what. ``batches``: float32 (N, 3, H, W),
    pixels minus 128; the ``side`` process takes half of them, where there is one. Rounding errors of a channel do not
    cancel where its values are nearly all the same; those of clipping are left alone (see :class:`BiasCorrection`).
    """
    layers, found = find_quantized_layers(watched), {}
    errors = measure_rounding_shifts(layers, network, batches, side)
    for node in graph.nodes:
        module = layers.get(node.output)
        if not isinstance(node, Convolution) or node.inputs[0] not in errors or module is None:
            continue
        if bias_parameter(module) is None:
            continue
        means = average_inputs(module, errors[node.inputs[0]])
        found[node.output] = shift_bias(module, average_output(quantize_weight(module), means))
    return found


def measure_rounding_shifts(
    layers: Mapping[str, QATModule],
    network: M.Module,
    batches: Sequence[npt.NDArray[np.float32]],
    side: SideProcess | None = None,
) -> dict[str, Values]:
    """Layer name -> (C, H, W), the mean over ``batches`` of what rounding takes from the values of this layer of
    ``network``. The grids are those of ``layers``; tensors of another rank are left out."""
    modules = dict(network.named_modules())
    grids = {name: Grid.of(layer) for name, layer in layers.items() if layer.act_fake_quant and name in modules}
    here, later = share_halves(side, sum_rounding_errors, batches, grids, network)
    number = sum(map(len, batches))
    return {name: (summed + later.get(name, 0.0)) / number for name, summed in here.items()}


@dataclass(frozen=True)
class Grid:
    """The integers from ``low`` to ``high``, times ``scale``."""

    scale: float
    low: float
    high: float

    @classmethod
    def of(cls, layer: QATModule) -> Grid:
        """The grid behind ``layer``."""
        scale = float(layer.act_observer.get_qparams().scale.numpy())
        return cls(scale, *ends_of(layer.act_fake_quant.dtype, scale))

    def sum_errors(self, values: npt.NDArray[np.float32]) -> Values:
        """What rounding to this grid takes from ``values``, summed over the first axis; nothing where they saturate."""
        steps = values / np.float32(self.scale)
        np.clip(steps, self.low, self.high, out=steps)
        steps -= np.rint(steps)
        found: Values = steps.sum(axis=0).astype(np.float64) * self.scale
        return found


def sum_rounding_errors(
    grids: Mapping[str, Grid], network: M.Module, batches: Sequence[npt.NDArray[np.float32]]
) -> dict[str, Values]:
    """Layer name -> (C, H, W), the sum over ``batches`` of what rounding to its grid takes from the values of this
    layer of ``network``."""
    modules, sums = dict(network.named_modules()), dict[str, Values]()

    def hook_of(name: str) -> Callable[[M.Module, object, Tensor], None]:
        def add(_: M.Module, __: object, output: Tensor) -> None:
            if output.ndim == 4:
                sums[name] = sums.get(name, 0.0) + grids[name].sum_errors(output.numpy())

        return add

    with forward_hooks((modules[name], hook_of(name)) for name in grids):
        for batch in batches:
            network(Tensor(batch)).numpy()
    return sums


def mean_patch(module: QATModule, source: Tensor) -> Values:
    """(groups, inputs): the mean, over images and positions, of what an output of the convolution ``module`` reads."""
    summed = source.sum(axis=0).numpy().astype(np.float64)
    found: Values = average_inputs(module, summed) / source._tuple_shape[0]
    return found


def average_inputs(module: QATModule, values: Values) -> Values:
    """(groups, inputs): the mean, over all positions, of what an output of the convolution ``module`` reads of
    ``values`` (C, H, W)."""
    conv = module.conv if hasattr(module, "conv") else module
    found: Values = window_means(values, conv).reshape(conv.groups, -1)
    return found


def window_means(values: Values, conv: Any) -> Values:
    """(C, H, W) -> (C, kernel height, width): the mean input of each weight of ``conv``, with zero padding."""
    padded = np.pad(values, ((0, 0), *((pad, pad) for pad in conv.padding)))
    (rows, columns), (down, right), gaps = output_size(conv, *values.shape[1:]), conv.stride, pair(conv.dilation)
    found = np.empty((len(values), *conv.kernel_size))
    for y, x in np.ndindex(*conv.kernel_size):
        met = padded[:, y * gaps[0] :: down, x * gaps[1] :: right]
        found[:, y, x] = met[:, :rows, :columns].mean(axis=(1, 2))
    return found


def average_output(weight: Tensor, mean: Values) -> Values:
    """(O,): the mean output, without a bias, of a convolution with ``weight`` that reads ``mean`` (groups, inputs)."""
    groups, inputs = mean.shape
    found: Values = (weight.numpy().reshape(groups, -1, inputs) @ mean[:, :, None]).ravel()
    return found
