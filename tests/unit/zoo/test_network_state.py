"""All values of a network: those of MegEngine's own dictionaries, in less time."""

from __future__ import annotations

from copy import deepcopy

import megengine.module as M
import numpy as np
import pytest
from megengine import Tensor

from mgq.zoo.network_state import set_state, state_of
from tests.conftest import SIZE, Trio, blank, logits_of, smooth_images


def test_names_their_order_shapes_types_and_values_are_megengines(trio: Trio) -> None:
    for network in (trio.normal, trio.qat, trio.quantized):
        ours, megengines = state_of(network), network.state_dict()
        assert list(ours) == list(megengines)
        for name, value in megengines.items():
            assert (ours[name].shape, ours[name].dtype) == (value.shape, value.dtype)
            assert np.array_equal(ours[name], value)


def test_values_that_are_set_are_those_of_the_other_network(trio: Trio) -> None:
    images = smooth_images(1, SIZE, SIZE)
    for network in (trio.normal, trio.qat):
        other = deepcopy(network)
        for tensor in other.tensors():
            M.init.zeros_(tensor)
        set_state(other, state_of(network))
        assert np.array_equal(logits_of(other, images), logits_of(network, images))


def test_a_layer_of_two_modules_comes_under_both_names() -> None:
    layer = M.Linear(2, 3)
    network = M.Sequential(M.Sequential(layer), M.Sequential(layer))
    assert list(state_of(network)) == list(network.state_dict()) == ["0.0.bias", "0.0.weight", "1.0.bias", "1.0.weight"]


def test_names_and_shapes_that_differ_are_refused() -> None:
    network = blank("resnet18")
    state = state_of(network)
    with pytest.raises(KeyError, match=r"fc\.bias"):
        set_state(network, {name: value for name, value in state.items() if name != "fc.bias"})
    with pytest.raises(KeyError, match="left_over"):
        set_state(network, {**state, "left_over": state["fc.bias"]})
    for name in ("fc.bias", "conv_bn_relu1.bn.weight"):
        with pytest.raises(ValueError, match=f"{name} should be of shape"):
            set_state(network, {**state, name: np.zeros(3, np.float32)})


def test_a_batch_norm_takes_a_vector_and_what_older_megengines_wrote() -> None:
    norm = M.BatchNorm2d(4)
    for shape in ((4,), (1, 4, 1, 1)):
        values = np.arange(4, dtype=np.float32).reshape(shape)
        set_state(norm, {**state_of(norm), "weight": values})
        assert np.array_equal(state_of(norm)["weight"], np.arange(4))
        assert norm(Tensor(np.ones((1, 4, 2, 2), np.float32))).shape == (1, 4, 2, 2)
