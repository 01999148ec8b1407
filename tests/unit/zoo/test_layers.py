"""What layers of all families share."""

from __future__ import annotations

import megengine.module as M
from megengine import Parameter, Tensor

from mgq.quantization.modes import Mode, to_mode
from mgq.quantization.targets import ONNX
from mgq.zoo.layers import quick_walks
from mgq.zoo.registry import create_model


class Nested(M.Module):  # type: ignore[misc]
    """Parts of all kinds in which MegEngine finds modules and tensors, and others in which there are none."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = [M.Conv2d(1, 1, 1), (M.Linear(2, 2), {"deep": M.Identity(), "none": 3})]
        self.empty: list[M.Module] = []
        self.weight, self.buffer = Parameter([1.0]), Tensor([2.0])
        self.again = self.branches[0]
        self.text, self.nothing, self.numbers = "conv", None, [1, 2]

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs


def found_in(network: M.Module) -> list[list[tuple[str, int]]]:
    """Names and identities of modules, parameters and buffers, in order."""
    walks = network.named_modules(), network.named_parameters(), network.named_buffers()
    return [[(name, id(part)) for name, part in walk] for walk in walks]


def test_quick_walks_find_what_others_do() -> None:
    qat = to_mode(create_model("mobilenet_v2", classes=3), Mode.QAT, ONNX)
    for network in (Nested(), qat):
        slow = found_in(network)
        assert all(slow)
        with quick_walks():
            assert found_in(network) == slow
        assert found_in(network) == slow


def test_quick_walks_know_a_class_that_is_made_within() -> None:
    with quick_walks():
        before = found_in(M.Sequential(M.Identity()))
        kind = type("Later", (M.Identity,), {})
        network = M.Sequential(kind())
        assert [type(module) for _, module in network.named_modules()][-1] is kind
        assert len(found_in(network)[0]) == len(before[0])
