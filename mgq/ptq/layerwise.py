"""A network layer by layer: what each answers in float, beside what the int8 layers before it let it see."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import megengine.functional as F
import megengine.module as M
import numpy as np
import numpy.typing as npt
from megengine import Tensor
from megengine.module.qat import QATModule

from mgq.quantization.activation_ranges import find_quantized_layers
from mgq.zoo.layers import forward_hooks

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Layer:
    """A quantized layer in the middle of a run. Its ranges may be set, its parameters changed.

    ``inputs`` and ``output`` are those of the float network, float32 (N, C, H, W) as a rule. ``fake_inputs`` come from
    the layers before, quantized as they are by now; ``fake_output`` is what the layer makes of them in float.
    """

    name: str
    module: QATModule
    inputs: Sequence[Tensor]
    output: Tensor
    fake_inputs: Sequence[Tensor]
    fake_output: Tensor


Visitor = Callable[[Layer], None]


def visit_layers(network: M.Module, images: Array, *visitors: Visitor) -> None:
    """Run ``network``, a ``qat`` one in evaluation state, and show each quantized layer to the ``visitors`` in turn.

    ``images``: float32 (N, 3, H, W), pixels minus 128. Afterwards fake quantization is on and observers are off.
    """
    layers = find_quantized_layers(network)
    names = {id(module): name for name, module in layers.items()}

    def hook(module: QATModule, inputs: Sequence[Tensor], outputs: Tensor) -> Tensor:
        # The batch is the pictures in float, then the same as the layers before made int8 of them.
        half = outputs._tuple_shape[0] // 2
        exact, fake = [tensor[:half] for tensor in inputs], [tensor[half:] for tensor in inputs]
        layer = Layer(names[id(module)], module, exact, outputs[:half], fake, outputs[half:])
        for visitor in visitors:
            visitor(layer)
        module.set_fake_quant(True)
        quantized = module.forward(*fake)
        module.set_fake_quant(False)
        return F.concat([outputs[:half], quantized])

    for module in layers.values():
        module.set_fake_quant(False)
        module.set_observer(False)
    try:
        with forward_hooks((module, hook) for module in layers.values()):
            network(Tensor(np.concatenate([images, images]))).numpy()
    finally:
        for module in layers.values():
            module.set_fake_quant(True)
