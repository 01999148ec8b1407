"""Rounding whose errors make up for each other: nearer outputs than the nearest integers give, on the same grid."""

from __future__ import annotations

import megengine.module as M
import numpy as np
import numpy.typing as npt
import pytest
from megengine import Tensor

from mgq.ptq.bias_correction import average_output, mean_patch
from mgq.ptq.calibrate import calibrate_network
from mgq.ptq.gptq import (
    DAMPING,
    covariances,
    damp_covariance,
    energies,
    factors_of_inverses,
    refit_weights,
    round_channels,
    round_with_compensation,
    set_folded_weight,
    settle_integers,
)
from mgq.ptq.patches import output_size, patches, sample_positions
from mgq.ptq.steps import RangesFromImages, RoundWeights
from mgq.quantization.modes import Mode, to_mode
from mgq.quantization.option_names import MSE
from mgq.quantization.qat_layers import fold_weight, observe_weights
from mgq.quantization.targets import ChannelFakeQuantize
from tests.conftest import SIZE, logits_of, trio_of
from tests.fakes.measured_ranges import measure_ranges, simulate
from tests.fakes.small_network import IMAGES, net

Array = npt.NDArray[np.float32]

FITTED = (RangesFromImages(MSE), RoundWeights(refit=True))


def layer(inputs: int, outputs: int, groups: int = 1) -> tuple[Array, Array]:
    """Weights (groups, outputs, inputs) in steps, and what they see (groups, inputs, positions), much alike."""
    rng = np.random.default_rng(0)
    mixed = rng.normal(size=(groups, inputs, inputs)) / np.sqrt(inputs) + 0.3 * np.eye(inputs)
    seen = np.maximum(rng.normal(size=(groups, 2_000, inputs)) @ mixed, 0)
    seen -= seen.mean(1, keepdims=True)
    weights = rng.normal(0, 20, (groups, outputs, inputs)).astype(np.float32)
    return weights, seen.transpose(0, 2, 1).astype(np.float32)


def varying(seen: Array) -> npt.NDArray[np.float64]:
    return damp_covariance(covariances(seen, seen), DAMPING)


@pytest.mark.parametrize(("inputs", "outputs", "groups"), [(9, 1, 16), (64, 8, 2), (300, 20, 1)])
def test_outputs_are_nearer_than_by_the_nearest_integers(inputs: int, outputs: int, groups: int) -> None:
    weights, seen = layer(inputs, outputs, groups)
    rounded, nearest = round_with_compensation(weights, varying(seen)), np.rint(weights)
    errors = [float(np.square((found - weights) @ seen).sum()) for found in (rounded, nearest)]
    assert errors[0] < 0.85 * errors[1]


def test_moving_single_weights_makes_it_nearer_still() -> None:
    weights, seen = layer(64, 8, 2)
    once = round_with_compensation(weights, varying(seen))
    again = settle_integers(once, weights, varying(seen), 127)
    assert (energies(again - weights, varying(seen)) <= energies(once - weights, varying(seen)) + 1e-9).all()
    assert (again != once).any() and np.abs(again).max() <= 127


def test_the_best_of_some_scales_loses_little_of_a_small_kernel() -> None:
    weights, seen = layer(9, 1, 16)
    seen += 3 * seen.mean(axis=1, keepdims=True)  # neighbours are alike, as in a picture
    quantizer, covariance = ChannelFakeQuantize("qint8_narrow"), varying(seen)
    integers, scales = round_channels(quantizer, weights, covariance)
    one = np.abs(weights).max(axis=2, keepdims=True) / 127
    alone = energies(round_with_compensation(weights / one, covariance) * one - weights, covariance)
    tried = energies(integers * scales - weights, covariance)
    assert np.abs(integers).max() <= 127 and np.array_equal(integers, np.rint(integers))
    assert 10 * np.log10(alone.sum() / tried.sum()) > 2


def test_weights_are_integers_near_what_they_were_and_within_int8() -> None:
    weights, seen = layer(64, 8)
    weights[0, 0, :3] = 126.9, -127.4, 140
    rounded = round_with_compensation(weights, varying(seen))
    assert np.array_equal(rounded, np.rint(rounded)) and np.abs(rounded).max() == 127
    assert np.abs(rounded - np.clip(weights, -127, 127)).max() <= 3


def test_fitted_weights_make_up_for_what_is_seen_wrongly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mgq.ptq.gptq.RIDGE", 0.3)  # what is seen here is not taken by chance
    weights, exact = layer(64, 8, 2)
    # A tenth is lost of one input, another is mixed up with its neighbour: what a layer before may have done.
    seen = exact.copy()
    seen[:, 3] *= 0.9
    seen[:, 8] += 0.1 * exact[:, 9]
    fitted = refit_weights(weights, seen, exact)
    wanted = weights @ exact
    errors = [float(np.square(found @ seen - wanted).sum()) for found in (fitted, weights)]
    assert errors[0] < 0.15 * errors[1]


def test_weights_that_see_what_they_did_are_not_changed() -> None:
    weights, seen = layer(64, 8, 2)
    np.testing.assert_array_equal(refit_weights(weights, seen, seen), weights)
    assert np.isfinite(refit_weights(weights, seen * 0, seen)).all()


@pytest.mark.parametrize("inputs", [9, 96])
def test_the_factors_are_those_of_the_inverses(inputs: int) -> None:
    matrices = varying(layer(inputs, 8, 3)[1])
    factors = factors_of_inverses(matrices)
    assert np.array_equal(factors, np.triu(factors))
    np.testing.assert_allclose(factors.transpose(0, 2, 1) @ factors, np.linalg.inv(matrices), rtol=1e-8, atol=1e-10)


def test_inputs_that_vary_apart_are_rounded_to_the_nearest() -> None:
    weights, _ = layer(32, 4)
    assert np.array_equal(round_with_compensation(weights, np.eye(32)[None]), np.rint(weights))


def test_inputs_that_never_vary_do_not_matter() -> None:
    weights, seen = layer(32, 4)
    seen[:, 5:] = 0
    assert np.isfinite(round_with_compensation(weights, varying(seen))).all()
    assert np.isfinite(round_with_compensation(weights, varying(seen * 0))).all()


@pytest.mark.parametrize("name", ["first", "second", "third"])
def test_weights_are_set_through_batch_norm(name: str) -> None:
    module = getattr(to_mode(net(), Mode.QAT), name)
    old = fold_weight(module).numpy()
    new = np.random.default_rng(1).normal(0, 1, old.shape).astype(np.float32)
    set_folded_weight(module, old, new)
    np.testing.assert_allclose(fold_weight(module).numpy(), new, rtol=1e-4, atol=1e-5)


def test_a_dead_output_stays_as_it_is() -> None:
    module = to_mode(net(), Mode.QAT).first
    module.bn.weight[:, 2] = Tensor(0.0)
    before = module.conv.weight.numpy()[2]
    old = fold_weight(module).numpy()
    set_folded_weight(module, old, old + 1)
    assert np.array_equal(module.conv.weight.numpy()[2], before)


def test_the_grid_of_a_calibrated_network_is_found_again_from_its_weights() -> None:
    calibrated, ranges = calibrate_network(net(), IMAGES, "net", "", FITTED)
    assert set(ranges.weight_ranges) == {"first", "second", "third"} and not ranges.bias_corrections
    before = logits_of(calibrated, IMAGES)
    observe_weights(calibrated)
    np.testing.assert_allclose(logits_of(calibrated, IMAGES), before, rtol=1e-4, atol=1e-4)
    for name in ranges.weight_ranges:
        module = getattr(calibrated, name)
        steps = fold_weight(module).numpy() / module.weight_observer.get_qparams().scale.numpy()
        np.testing.assert_allclose(steps, np.rint(steps), atol=2e-3)


@pytest.mark.slow
def test_int8_of_a_network_of_the_zoo_follows_its_simulation() -> None:
    network = trio_of("efficientnet_lite0").normal
    images = np.random.default_rng(0).integers(0, 256, (4, 3, SIZE, SIZE), dtype=np.uint8)
    calibrated = simulate(network, images, FITTED)
    simulated, real = logits_of(calibrated, images), logits_of(to_mode(calibrated, Mode.QUANTIZED), images)
    assert np.corrcoef(simulated.ravel(), real.ravel())[0, 1] > 0.99
    assert measure_ranges(network, [images], "x", "", {}).bias_corrections


@pytest.mark.parametrize("gap", [1, 2])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "groups"), [(1, 1, 0, 1), (3, 2, 1, 6), (5, 1, 2, 2), (3, 2, 0, 1)]
)
def test_the_mean_output_needs_no_convolution(kernel: int, stride: int, padding: int, groups: int, gap: int) -> None:
    """The mean of what a convolution reads, times its weights, is the mean of what it gives."""
    conv = M.Conv2d(6, 12, kernel, stride, padding, gap, groups, bias=False)
    source = Tensor(np.random.default_rng(0).normal(1, 1, (3, 6, 17, 14)).astype(np.float32))
    output = conv(source)
    assert output_size(conv, 17, 14) == output._tuple_shape[2:]
    found = average_output(conv.weight, mean_patch(conv, source))
    np.testing.assert_allclose(found, output.mean(axis=(0, 2, 3)).numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("kernel", "stride", "padding"),
    [((1, 1), (1, 1), (0, 0)), ((1, 1), (2, 2), (0, 0)), ((1, 1), (1, 1), (1, 1)), ((3, 5), (2, 1), (1, 2))],
)
def test_patches_are_what_a_convolution_reads_at_each_position(
    kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int]
) -> None:
    source = np.random.default_rng(0).standard_normal((3, 4, 9, 7)).astype(np.float32)
    conv = M.Conv2d(4, 6, kernel, stride, padding)
    rows, columns = output_size(conv, 9, 7)
    at = sample_positions((3, 6, rows, columns), np.random.default_rng(1), 40)
    sums = np.einsum("chwp,ochw->po", patches(source, kernel, stride, padding, at), conv.weight.numpy())
    image, row, column = at
    np.testing.assert_allclose(sums, conv(Tensor(source)).numpy()[image, :, row, column], rtol=1e-4, atol=1e-5)
