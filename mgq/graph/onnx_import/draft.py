"""A network on its way from ONNX to a blueprint: layers, their constants, and what they give for one picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from megengine import Tensor

from mgq.zoo.blueprint import INPUT, Blueprint, LayerPlan
from mgq.zoo.blueprint_layers import layer_of
from mgq.zoo.layers import without_initialization
from mgq.zoo.network_state import set_state

Array = npt.NDArray[Any]
EPSILON = 1e-5
"""Of a batch norm that is none."""


@dataclass
class NetworkDraft:
    """``plans`` in order; ``tensors``: layer -> parameter -> its value; ``samples``: what each layer gives for the
    picture ``samples[INPUT]``; ``sources``: name of a layer -> that of the tensor of the ONNX file that it makes."""

    plans: list[LayerPlan] = field(default_factory=list)
    tensors: dict[str, dict[str, Array]] = field(default_factory=dict)
    samples: dict[str, Array] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    output: str = INPUT
    has_one_score: bool = False
    """Whether the answer of the file is the score of the second of two classes alone."""
    numbers: dict[str, int] = field(default_factory=dict)
    norms: dict[str, tuple[dict[str, Array], float]] = field(default_factory=dict)
    """Layers that are batch norms: their four parameters and epsilon."""
    _index: tuple[dict[str, LayerPlan], dict[str, list[LayerPlan]]] | None = None

    def new_name(self, kind: str) -> str:
        self.numbers[kind] = self.numbers.get(kind, 0) + 1
        return f"{kind}_{self.numbers[kind]}"

    def add(
        self,
        kind: str,
        inputs: Sequence[str],
        source: str,
        options: Mapping[str, Any] | None = None,
        tensors: Mapping[str, Array] | None = None,
    ) -> str:
        """One more layer behind the others, run on the sample: its name."""
        tensors = {name: np.ascontiguousarray(value, np.float32) for name, value in (tensors or {}).items()}
        options = dict(options or {})
        if kind not in ("conv", "linear") and tensors:
            options["constants"] = {name: list(value.shape) for name, value in tensors.items()}
        plan = LayerPlan(kind, self.new_name(kind), tuple(inputs), options)
        self.plans.append(plan)
        self._index = None
        self.tensors[plan.name] = tensors
        self.sources[plan.name] = source
        self.samples[plan.name] = self.run(plan)
        return plan.name

    def run(self, plan: LayerPlan) -> Array:
        """What the layer ``plan`` makes of the samples."""
        with without_initialization():
            module = layer_of(plan, False, 0.0)
        if self.tensors[plan.name]:
            set_state(module, self.tensors[plan.name])
        module.eval()
        result: Array = module(*(Tensor(self.samples[name]) for name in plan.inputs)).numpy()
        return result

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.samples[name].shape)

    def plan(self, name: str) -> LayerPlan | None:
        """The layer called ``name``; None for the picture, and for what is no longer there."""
        return self.index()[0].get(name)

    def index(self) -> tuple[dict[str, LayerPlan], dict[str, list[LayerPlan]]]:
        """Layers by name, and those that read each tensor: told anew where layers changed."""
        if self._index is None:
            readers: dict[str, list[LayerPlan]] = {}
            for plan in self.plans:
                for name in dict.fromkeys(plan.inputs):
                    readers.setdefault(name, []).append(plan)
            self._index = {plan.name: plan for plan in self.plans}, readers
        return self._index

    def tensors_of(self, name: str) -> dict[str, Array]:
        """Parameter -> value, of the layer ``name``."""
        return dict(self.tensors[name])

    def set_tensors(self, name: str, tensors: Mapping[str, Array]) -> None:
        self.tensors[name] = {key: np.ascontiguousarray(value, np.float32) for key, value in tensors.items()}

    @property
    def state(self) -> dict[str, Array]:
        """Name of a parameter -> its value."""
        return {f"{plan.name}.{key}": value for plan in self.plans for key, value in self.tensors[plan.name].items()}

    def readers(self, name: str) -> list[LayerPlan]:
        return self.index()[1].get(name, [])

    def is_read_once(self, name: str) -> bool:
        """Whether one layer alone reads what ``name`` gives, once, and it is not the answer."""
        readers = self.readers(name)
        return len(readers) == 1 and readers[0].inputs.count(name) == 1 and self.output != name

    def is_read_once_or_last(self, name: str) -> bool:
        return self.is_read_once(name) or (self.output == name and not self.readers(name))

    def find_layer(self, name: str) -> LayerPlan:
        found = self.plan(name)
        assert found is not None
        return found

    def insert_before(
        self,
        plan: LayerPlan,
        kind: str,
        inputs: Sequence[str],
        options: Mapping[str, Any],
        tensors: Mapping[str, Array] | None = None,
    ) -> str:
        """One more layer in front of ``plan``, run on the samples: its name."""
        name = self.add(kind, inputs, "", options, tensors)
        added = self.plans.pop()
        self.plans.insert(self.plans.index(plan), added)
        self._index = None
        return name

    def replace(self, old: LayerPlan, new: LayerPlan) -> None:
        self.plans[self.plans.index(old)] = new
        self._index = None

    def rename_inputs(self, old: str, new: str) -> None:
        """Whatever reads ``old`` reads ``new`` from now on, the answer included."""
        self.plans = [
            plan.with_inputs(new if name == old else name for name in plan.inputs) if old in plan.inputs else plan
            for plan in self.plans
        ]
        self._index = None
        if self.output == old:
            self.output = new

    def remove(self, plan: LayerPlan) -> None:
        self.plans.remove(plan)
        self._index = None
        del self.tensors[plan.name]

    def skip(self, plan: LayerPlan) -> None:
        """Take ``plan`` out: what reads it reads its only input."""
        self.rename_inputs(plan.name, plan.inputs[0])
        self.remove(plan)

    def take_over(self, name: str, plan: LayerPlan) -> None:
        """The layer ``name`` gives from now on what ``plan`` gave, to all that read it."""
        self.sources[name], self.samples[name] = self.sources[plan.name], self.samples[plan.name]
        self.rename_inputs(plan.name, name)

    def absorb(self, into: LayerPlan, plan: LayerPlan, changed: LayerPlan) -> None:
        """``into`` does what ``plan`` behind it does, too, as ``changed``."""
        self.replace(into, changed)
        self.take_over(into.name, plan)
        self.remove(plan)

    def drop_unread(self) -> None:
        """Take out the layers that do nothing for the answer."""
        needed = {self.output}
        for plan in reversed(list(self.plans)):
            if plan.name in needed:
                needed |= set(plan.inputs)
            else:
                self.remove(plan)

    def blueprint(self) -> Blueprint:
        channels, height, width = self.shape(INPUT)[1:]
        plain = Blueprint(tuple(self.plans), self.output, (channels, height, width), self.shape(self.output)[1])
        return plain.with_float_islands().with_floors()


def convolution_tensors(weight: Array, bias: Array | None, groups: int) -> dict[str, Array]:
    """The state of a convolution (O, C / groups, H, W) whose batch norm is an identity but for the ``bias``."""
    outputs = len(weight)
    shape = (1, outputs, 1, 1)
    return {
        "conv.weight": split_groups(weight, groups),
        "bn.weight": np.ones(shape),
        "bn.bias": np.zeros(shape) if bias is None else bias.reshape(shape),
        "bn.running_mean": np.zeros(shape),
        "bn.running_var": np.full(shape, 1 - EPSILON),
    }


def split_groups(weight: Array, groups: int) -> Array:
    """Weights (O, C / groups, H, W) in MegEngine's shape."""
    return weight if groups == 1 else weight.reshape(groups, -1, *weight.shape[1:])


def merge_groups(weight: Array) -> Array:
    return weight.reshape(-1, *weight.shape[-3:])


def convolution_options(weight: Array, groups: int, **given: Any) -> dict[str, Any]:
    """The options of a convolution with ``weight`` (O, C / groups, H, W): plain but for what is ``given``."""
    return {
        "inputs": weight.shape[1] * groups,
        "outputs": weight.shape[0],
        "kernel": list(weight.shape[2:]),
        "stride": [1, 1],
        "padding": [0, 0],
        "dilation": [1, 1],
        "groups": groups,
        "activation": "",
        "eps": EPSILON,
        "normalized": False,
        **given,
    }


def with_options(plan: LayerPlan, **options: Any) -> LayerPlan:
    return replace(plan, options={**plan.options, **options})
