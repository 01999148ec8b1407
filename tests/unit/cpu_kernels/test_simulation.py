"""The fast simulation of int8: the same bits as MegEngine's own operations."""

from __future__ import annotations

import contextlib
from typing import Any

import megengine
import megengine.module as M
import numpy as np
import pytest
from megengine import Tensor
from megengine.autodiff import GradManager

from mgq.cpu_kernels import elementwise
from mgq.cpu_kernels.simulation import fast_simulation
from mgq.ptq.range_measurement import as_input
from mgq.ptq.steps import Draft, ExactScales, RangesFromImages
from mgq.quantization.exact_fake_quant import ExactConvBn2d, ExactConvBnRelu2d
from mgq.quantization.half_to_even import EvenFakeQuantize
from mgq.quantization.relu6 import QatConvBnRelu6
from mgq.quantization.targets import MEGENGINE, ONNX, ONNX_AVX2, Target
from mgq.zoo.registry import spec_of
from tests.conftest import logits_of, smooth_images

IMAGES = smooth_images(2)
NETWORKS: list[tuple[str, dict[str, Any]]] = [
    ("mobilenet_v2", {}),
    ("mobilenet_v2", {"activation": "relu6"}),
    ("shufflenet_v1_x0_5_g3", {}),
    ("resnet18", {}),
]


def quantized(arch: str, target: Target, **options: Any) -> M.Module:
    megengine.random.seed(3)
    network = spec_of(arch).build(10, **options)
    network.eval()
    random = np.random.default_rng(4)
    for norm in (module for module in network.modules() if isinstance(module, M.BatchNorm2d)):
        for values in (norm.weight, norm.running_var):
            values[...] = Tensor(random.uniform(0.5, 1.5, values._tuple_shape).astype(np.float32))
        for values in (norm.bias, norm.running_mean):
            values[...] = Tensor(random.normal(0, 0.2, values._tuple_shape).astype(np.float32))
    draft = RangesFromImages().apply(Draft(network, IMAGES, target))
    if target is not MEGENGINE:
        draft = ExactScales().apply(draft)
    assert draft.watched is not None
    return draft.watched


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many elements each layer that was served had."""
    found: list[int] = []

    def requantize(sums: Any, *rest: Any) -> Any:
        found.append(sums.size)
        return stock(sums, *rest)

    stock = elementwise.requantize
    monkeypatch.setattr(elementwise, "requantize", requantize)
    return found


@pytest.mark.parametrize("target", [ONNX, ONNX_AVX2, MEGENGINE], ids=lambda target: target.name)
@pytest.mark.parametrize(("arch", "options"), NETWORKS, ids=str)
def test_logits_are_the_same_to_the_bit(arch: str, options: dict[str, Any], target: Target, calls: list[int]) -> None:
    network = quantized(arch, target, **options)
    slowly = logits_of(network, IMAGES)
    assert not calls
    with fast_simulation():
        fast = logits_of(network, IMAGES)
    convolutions = sum(isinstance(module, M.BatchNorm2d) for module in network.modules())
    assert len(calls) >= convolutions
    assert np.array_equal(fast, slowly)
    served = len(calls)
    logits_of(network, IMAGES)
    assert len(calls) == served  # afterwards all is as before


def test_gradients_are_megengines(calls: list[int]) -> None:
    network = quantized("mobilenet_v2", ONNX)
    found = []
    for fast in (False, True):
        pixels, manager = Tensor(as_input(IMAGES)), GradManager()
        manager.attach([pixels])
        with fast_simulation() if fast else contextlib.nullcontext(), manager:
            manager.backward(network(pixels).sum())
        found.append(pixels.grad.numpy())
    assert not calls
    assert np.array_equal(*found)


def test_training_for_int8_finds_its_own_fast_layers_afterwards() -> None:
    """A method that was inherited is inherited again: what is put into the base class later must be found."""
    before = {
        owner: dict(vars(owner)) for owner in (ExactConvBn2d, ExactConvBnRelu2d, QatConvBnRelu6, EvenFakeQuantize)
    }
    with pytest.raises(KeyError), fast_simulation():
        raise KeyError
    for owner, own in before.items():
        assert dict(vars(owner)) == own
