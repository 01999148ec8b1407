"""Builds a network from its blueprint: a module for each layer, run in order."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import megengine as mge
import megengine.module as M
import numpy as np
from megengine import Tensor
from megengine.quantization.quantize import disable_fake_quant, disable_observer

from mgq.errors import InputError, plural
from mgq.zoo.blueprint import INPUT, Blueprint, blueprint_in
from mgq.zoo.blueprint_layers import layer_of

Watch = Callable[[str, Tensor], None]
WAIT_AFTER = 64
"""Layers after which a run waits for MegEngine: it computes behind Python's back, and does not free what was deleted
before all that was begun is done, so that a long network keeps all its tensors."""


class BlueprintNetwork(M.Module):  # type: ignore[misc]
    """``forward``: float32 (N, C, H, W), pixels minus 128 in BGR by default -> float32 (N, classes)."""

    def __init__(self, blueprint: Blueprint) -> None:
        super().__init__()
        self.blueprint = blueprint
        self.quant = M.QuantStub()
        on_grid, lowest = blueprint.on_grid(), blueprint.lowest()
        for plan in blueprint.layers:
            setattr(self, plan.name, layer_of(plan, plan.name in on_grid, lowest[plan.name]))

    def forward(self, inp: Tensor) -> Tensor:
        return self.run(inp)

    def run(self, inp: Tensor, watch: Watch | None = None) -> Tensor:
        """Compute the logits; ``watch`` is called with the output of each layer. Tensors are freed after their last
        reader."""
        found, last = {INPUT: self.quant(inp)}, self.last_readers()
        for number, plan in enumerate(self.blueprint.layers, 1):
            found[plan.name] = getattr(self, plan.name)(*(found[name] for name in plan.inputs))
            if watch is not None:
                watch(plan.name, found[plan.name])
            for name in set(plan.inputs):
                if last[name] == plan.name:
                    del found[name]
            if number % WAIT_AFTER == 0:
                mge._full_sync()
        return found[self.blueprint.output]

    def set_floors(self) -> None:
        """Let convolutions know from where on what is read of them makes a difference."""
        for plan in self.blueprint.layers:
            if "floor" in plan.options:
                getattr(self, plan.name).floor = float(plan.options["floor"])

    def sample(self) -> Tensor:
        """An image of zeros of the only size that the network takes."""
        return Tensor(np.zeros((1, *self.blueprint.shape), np.float32))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name of a tensor -> its shape, for one picture."""
        found: dict[str, tuple[int, ...]] = {INPUT: (1, *self.blueprint.shape)}
        copy = deepcopy(self)
        copy.eval()
        disable_fake_quant(copy)
        disable_observer(copy)
        copy.run(self.sample(), lambda name, value: found.__setitem__(name, tuple(value._tuple_shape)))
        return found

    def last_readers(self) -> dict[str, str]:
        """Name of a tensor -> the layer that reads it last; the output has none."""
        found = {name: plan.name for plan in self.blueprint.layers for name in plan.inputs}
        return {**found, self.blueprint.output: ""}


def blueprint_network(blueprint: str, classes: int, source: str = "") -> BlueprintNetwork:
    """The network that the JSON ``blueprint`` describes; its ``source`` changes nothing.

    Raises InputError where it is damaged, or for another number of classes.
    """
    del source
    found = blueprint_in(blueprint)
    if found.classes != classes:
        raise InputError(f"the network has {plural(found.classes, 'class')}, not {classes}")
    try:
        return BlueprintNetwork(found)
    except (KeyError, TypeError, ValueError, AssertionError, IndexError):
        raise InputError("the description of the network is damaged: import the ONNX file again") from None


def sample_of(network: M.Module, size: int) -> Tensor:
    """A picture of zeros for ``network``, float32 (1, 3, ``size``, ``size``), or of the only size that it takes."""
    if isinstance(network, BlueprintNetwork):
        return network.sample()
    return Tensor(np.zeros((1, 3, size, size), np.float32))
