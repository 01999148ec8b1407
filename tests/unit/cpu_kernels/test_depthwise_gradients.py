from __future__ import annotations

from typing import Any

import megengine.module as M
import numpy as np
import pytest
from megengine import Tensor
from megengine.autodiff import GradManager

from mgq.cpu_kernels import depthwise_gradients
from mgq.cpu_kernels.depthwise_gradients import fast_depthwise_gradients


@pytest.fixture
def spread(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the gradients that went back the fast way."""
    found: list[tuple[int, ...]] = []
    stock = depthwise_gradients.spread_out

    def spread_out(d_output: Tensor, *rest: Any) -> Tensor:
        found.append(d_output._tuple_shape)
        return stock(d_output, *rest)

    monkeypatch.setattr(depthwise_gradients, "spread_out", spread_out)
    return found


def gradients_of(network: M.Module, images: np.ndarray[Any, Any], *, of_weights: bool = False) -> list[Any]:
    """The output of ``network``, and the gradient of its input and, where wanted, of its parameters."""
    source, manager = Tensor(images), GradManager()
    wanted = [source, *(network.parameters() if of_weights else ())]
    for tensor in wanted:
        tensor.grad = None
    manager.attach(wanted)
    with manager:
        output = network(source)
        weights = np.random.default_rng(1).standard_normal(output._tuple_shape).astype(np.float32)
        manager.backward(output, Tensor(weights))
    return [output.numpy(), *(tensor.grad.numpy() for tensor in wanted)]


@pytest.mark.parametrize(
    ("size", "options"),
    [
        ((9, 9), {"kernel_size": 3, "padding": 1}),
        ((9, 9), {"kernel_size": 3, "padding": 1, "stride": 2}),
        ((10, 7), {"kernel_size": 3, "padding": 1, "stride": 2}),
        ((8, 8), {"kernel_size": 5, "padding": 2, "stride": 2}),
        ((11, 10), {"kernel_size": 5, "padding": 1, "stride": 3}),
        ((9, 12), {"kernel_size": 3}),
        ((9, 12), {"kernel_size": (3, 5), "padding": (0, 2), "stride": (1, 2)}),
        ((6, 6), {"kernel_size": 1, "stride": 2}),
        ((6, 6), {"kernel_size": 3, "padding": 2, "bias": False}),
    ],
    ids=str,
)
def test_gradients_are_megengines(size: tuple[int, int], options: dict[str, Any], spread: list[Any]) -> None:
    network = M.Conv2d(8, 8, groups=8, **options)
    images = np.random.default_rng(0).standard_normal((2, 8, *size)).astype(np.float32)
    expected = gradients_of(network, images)
    assert not spread
    with fast_depthwise_gradients():
        found = gradients_of(network, images)
    assert len(spread) == 1
    for mine, stock in zip(found, expected, strict=True):
        np.testing.assert_allclose(mine, stock, rtol=1e-5, atol=1e-5)
    assert np.array_equal(gradients_of(network, images)[1], expected[1])  # afterwards all is as before


@pytest.mark.parametrize(
    "options",
    [
        {"groups": 1},
        {"groups": 4},
        {"groups": 8, "dilation": 2},
        {"groups": 8, "padding": 3},
    ],
    ids=str,
)
def test_other_convolutions_are_left_to_megengine(options: dict[str, Any], spread: list[Any]) -> None:
    network = M.Conv2d(8, 8, 3, **options)
    images = np.random.default_rng(0).standard_normal((2, 8, 9, 9)).astype(np.float32)
    expected = gradients_of(network, images)
    with fast_depthwise_gradients():
        found = gradients_of(network, images)
    assert not spread
    assert all(np.array_equal(mine, stock) for mine, stock in zip(found, expected, strict=True))


def test_wanted_gradients_of_weights_are_found(spread: list[Any]) -> None:
    network = M.Conv2d(8, 8, 3, padding=1, groups=8)
    images = np.random.default_rng(0).standard_normal((2, 8, 9, 9)).astype(np.float32)
    expected = gradients_of(network, images, of_weights=True)
    with fast_depthwise_gradients():
        found = gradients_of(network, images, of_weights=True)
    assert not spread
    assert all(np.array_equal(mine, stock) for mine, stock in zip(found, expected, strict=True))
