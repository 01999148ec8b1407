"""Fake quantization and real int8: the same answers, layer by layer and to the bit, for every network of the zoo."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import megengine
import megengine.module as M
import numpy as np
import numpy.typing as npt
import pytest
from megengine import Tensor

from mgq.ptq.presets import PLAIN
from mgq.ptq.steps import CorrectBias
from mgq.quantization.modes import Mode, to_mode
from mgq.quantization.qat_layers import find_quantized_layers
from mgq.zoo.registry import spec_of, specs
from tests.conftest import logits_of, slow, smooth_images
from tests.fakes.measured_ranges import simulate

IMAGES = smooth_images(4)
LARGE = {"resnet34", "resnet50", "efficientnet_lite1", "efficientnet_lite2"}
QUICK = ("mobilenet_v2", "shufflenet_v1_x0_5_g3", "efficientnet_lite0")
NETWORKS = [(name, {}) if name in QUICK else slow(name, {}) for name in specs() if name not in LARGE]
NETWORKS.append(slow("mobilenet_v2", {"activation": "relu6"}))


def pair_of(arch: str, **options: Any) -> tuple[M.Module, M.Module]:
    """A network with random weights, fake-quantized and in int8."""
    megengine.random.seed(3)
    network = spec_of(arch).build(10, **options)
    network.eval()
    simulated = simulate(network, IMAGES, (*PLAIN, CorrectBias()))
    return simulated, to_mode(simulated, Mode.QUANTIZED)


def outputs_of(
    network: M.Module, names: Mapping[str, Any], instead: Mapping[str, npt.NDArray[np.float32]] | None = None
) -> dict[str, npt.NDArray[np.float32]]:
    """float32 outputs of the layers called ``names``; the layers behind see what stands ``instead`` of them."""
    found: dict[str, npt.NDArray[np.float32]] = {}

    def note(name: str) -> Any:
        def hook(_: M.Module, __: object, output: Tensor) -> Tensor | None:
            found[name] = output.astype("float32").numpy()
            if instead is None:
                return None
            other = Tensor(instead[name])
            other.qparams.update(output.qparams)
            return other

        return hook

    modules = dict(network.named_modules())
    hooks = [modules[name].register_forward_hook(note(name)) for name in names]
    logits_of(network, IMAGES)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize(("arch", "options"), NETWORKS, ids=str)
def test_every_layer_is_that_of_int8(arch: str, options: dict[str, Any]) -> None:
    simulated, real = pair_of(arch, **options)
    layers = find_quantized_layers(simulated)
    there = outputs_of(real, layers)
    here = outputs_of(simulated, layers, there)
    for name, found in here.items():
        scale = float(layers[name].act_observer.get_qparams().scale.numpy())
        steps = np.rint(np.abs(found - there[name]) / scale)
        # Kernels of some shapes scale their sums in another order: then a value on the threshold falls elsewhere.
        assert steps.max() <= 1 and (steps > 0).mean() < 1e-3, name


def test_means_are_not_rounded_to_the_step_of_what_they_are_of() -> None:
    simulated, real = pair_of("resnet18")
    assert np.array_equal(logits_of(simulated, IMAGES), logits_of(real, IMAGES))


def test_a_float_input_is_not_taken_for_integers() -> None:
    simulated, _ = pair_of("shufflenet_v1_x0_5_g3")
    layer = simulated.first_conv[0]
    source = Tensor(np.random.default_rng(0).normal(0, 30, (1, 3, 16, 16)).astype(np.float32))
    fine = layer(source).numpy()
    coarse = layer(simulated.quant(source)).numpy()
    assert not np.array_equal(fine, coarse)
