"""Channels that are always 0: found where that is certain, cleared without a change of answers."""

from __future__ import annotations

import megengine
import megengine.module as M
import numpy as np
import numpy.typing as npt
import pytest
from megengine import Tensor

from mgq.ptq.dead_channels import clear_dead_channels
from mgq.ptq.presets import PLAIN
from mgq.ptq.range_measurement import as_input
from mgq.zoo.registry import spec_of
from tests.fakes.measured_ranges import simulate

DEAD = [1, 4, 5]
PIXELS = np.random.default_rng(0).integers(0, 256, (4, 3, 64, 64), dtype=np.uint8)


def network_of(arch: str) -> M.Module:
    megengine.random.seed(3)
    network = spec_of(arch).build(10)
    network.eval()
    return network


def logits(network: M.Module) -> npt.NDArray[np.float32]:
    found: npt.NDArray[np.float32] = network(Tensor(as_input(PIXELS))).numpy()
    return found


FIRST_TWO = {
    "resnet18": ("conv_bn_relu1", "layer1.0.conv_bn_relu1"),
    "mobilenet_v2": ("features.0", "features.1.conv.0"),
    "efficientnet_lite0": ("blocks.0.conv.0", "blocks.0.conv.1"),
}
"""Two convolutions, the second of which reads the first, with or without pooling between them."""


def stem_and_next(network: M.Module, arch: str) -> tuple[M.Module, M.Module]:
    modules = dict(network.named_modules())
    return modules[FIRST_TWO[arch][0]], modules[FIRST_TWO[arch][1]]


def with_dead_stem(arch: str) -> tuple[M.Module, M.Module, M.Module]:
    """A network three of whose stem channels are never positive, with large weights that read them."""
    network = network_of(arch)
    stem, following = stem_and_next(network, arch)
    bias = stem.bn.bias.numpy().copy()
    bias[0, DEAD] = -1e4
    stem.bn.bias[...] = Tensor(bias)
    weight = following.conv.weight.numpy().copy()
    (weight if weight.ndim == 5 else weight.swapaxes(0, 1))[DEAD] *= 50
    following.conv.weight[...] = Tensor(weight)
    return network, stem, following


@pytest.mark.parametrize("arch", ["mobilenet_v2", "efficientnet_lite0", "resnet18"])
def test_answers_stay_and_weights_that_never_matter_go(arch: str) -> None:
    network, _, _ = with_dead_stem(arch)
    cleared, dead = clear_dead_channels(network)
    stem, following = stem_and_next(cleared, arch)
    (name,) = [name for name, module in cleared.named_modules() if module is stem]
    assert dead[name] == 3
    np.testing.assert_allclose(logits(cleared), logits(network), rtol=1e-5, atol=1e-5)
    assert not stem.conv.weight.numpy()[DEAD].any()
    weight = following.conv.weight.numpy().copy()
    read = weight if weight.ndim == 5 else weight.swapaxes(0, 1)
    assert not read[DEAD].any() and read[0].any()


@pytest.mark.parametrize("arch", ["resnet18", "shufflenet_v1_x0_5_g3"])
def test_a_network_without_any_is_left_as_it_is(arch: str) -> None:
    network = network_of(arch)
    cleared, dead = clear_dead_channels(network)
    assert dead == {}
    assert np.array_equal(logits(cleared), logits(network))


def test_a_channel_that_one_image_could_wake_is_not_dead() -> None:
    network = network_of("mobilenet_v2")
    stem, _ = stem_and_next(network, "mobilenet_v2")
    (name,) = [name for name, module in network.named_modules() if module is stem]
    scale = stem.bn.weight.numpy().ravel() / np.sqrt(stem.bn.running_var.numpy().ravel() + stem.bn.eps)
    weight = stem.conv.weight.numpy()[0] * scale[0]
    most = float(np.maximum(weight, 0).sum() * 127 - np.minimum(weight, 0).sum() * 128)
    shift = float(stem.bn.running_mean.numpy().ravel()[0] * scale[0])
    for above, expected in ((1e-2, 0), (-1e-2, 1)):
        bias = stem.bn.bias.numpy().copy()
        bias[0, 0] = shift - most + above
        stem.bn.bias[...] = Tensor(bias)
        assert clear_dead_channels(network)[1].get(name, 0) == expected


def test_one_scale_a_layer_fits_the_rest_much_better() -> None:
    network, _, _ = with_dead_stem("mobilenet_v2")
    wanted = logits(network)

    def noise(source: M.Module) -> float:
        return float(np.square(logits(simulate(source, PIXELS, PLAIN)) - wanted).mean())

    assert noise(clear_dead_channels(network)[0]) < 0.5 * noise(network)


def test_in_place_or_not() -> None:
    network, stem, _ = with_dead_stem("mobilenet_v2")
    assert clear_dead_channels(network)[0] is not network and stem.conv.weight.numpy()[DEAD].any()
    assert clear_dead_channels(network, in_place=True)[0] is network and not stem.conv.weight.numpy()[DEAD].any()
