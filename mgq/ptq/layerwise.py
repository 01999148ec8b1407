"""Visits the layers of a network in order: each with the inputs that int8 layers give it, and beside it in float."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import megengine.functional as F
import megengine.module as M
import numpy as np
import numpy.typing as npt
from megengine import Tensor
from megengine.module.qat import QATModule

from mgq.quantization.qat_layers import find_quantized_layers
from mgq.zoo.layers import forward_hooks, forward_pre_hooks

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class FloatSide:
    """The same layer in the float network: ``inputs`` and ``output``, float32 (N, C, H, W) as a rule. ``fake_output``
    is its float output for the inputs that the int8 layers before it give.
    """

    inputs: Sequence[Tensor]
    output: Tensor
    fake_output: Tensor


@dataclass(frozen=True)
class Layer:
    """A quantized layer in the middle of a run. Its ranges may be set, its parameters changed.

    ``fake_inputs`` come from the layers before, quantized as they are by now.
    """

    name: str
    module: QATModule
    fake_inputs: Sequence[Tensor]
    beside: FloatSide | None = None

    @property
    def in_float(self) -> FloatSide:
        """The float side, which only :func:`visit_beside_float` has. Raises AssertionError elsewhere."""
        assert self.beside is not None
        return self.beside


Visitor = Callable[[Layer], None]


def visit_layers(network: M.Module, images: Array, *visitors: Visitor) -> Array:
    """Run ``network``, a ``qat`` one in evaluation state, in int8, and show each quantized layer to the ``visitors`` in
    turn, before it runs. Returns what it answers in the end, float32 (N, classes).

    ``images``: float32 (N, 3, H, W), pixels minus 128. Afterwards fake quantization is on and observers are off.
    """
    layers = find_quantized_layers(network)
    names = {id(module): name for name, module in layers.items()}

    def hook(module: QATModule, inputs: Sequence[Tensor]) -> None:
        layer = Layer(names[id(module)], module, inputs)
        for visitor in visitors:
            visitor(layer)

    for module in layers.values():
        module.set_fake_quant(True)
        module.set_observer(False)
    with forward_pre_hooks((module, hook) for module in layers.values()):
        answers: Array = network(Tensor(images)).numpy()
    return answers


def visit_beside_float(network: M.Module, images: Array, *visitors: Visitor) -> Array:
    """The same, with what each layer does in the float network. It takes more than twice the time."""
    layers = find_quantized_layers(network)
    names = {id(module): name for name, module in layers.items()}

    def hook(module: QATModule, inputs: Sequence[Tensor], outputs: Tensor) -> Tensor:
        # The batch is the images in float, then the same as the layers before made int8 of them.
        half = outputs._tuple_shape[0] // 2
        exact, fake = [tensor[:half] for tensor in inputs], [tensor[half:] for tensor in inputs]
        layer = Layer(names[id(module)], module, fake, FloatSide(exact, outputs[:half], outputs[half:]))
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
            answers: Array = network(Tensor(np.concatenate([images, images]))).numpy()
    finally:
        for module in layers.values():
            module.set_fake_quant(True)
    return answers[len(images) :]
