"""Rounds weights so that the errors of an output cancel, after GPTQ (Frantar et al. 2022, arXiv:2210.17323).

Weights are rounded one input at a time, and what the output loses by it is given to the inputs not rounded yet, as far
as these vary together on real pictures. The output is then nearer to float's than with every weight rounded to the
nearest integer. Then single weights move by a step as long as that helps. Where each output has a scale of its own,
several are tried: for the nine weights of a depthwise convolution, of which neighbours read nearly the same, one of
them makes nearly no error. Before that, weights may be fitted by ridge regression to the inputs that the int8 layers
before give, so that each layer also corrects errors of those before it (the aim of GPTAQ, Li et al. 2025,
arXiv:2504.02692). Means are not considered: bias correction takes care of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from megengine import Tensor
from megengine.module.qat import QATModule

from mgq.cpu_kernels.weight_rounding import compensate_block, move_by_steps
from mgq.ptq.layerwise import Layer
from mgq.ptq.patches import is_convolution, is_plain, output_size, patches, sample_positions
from mgq.quantization.qat_layers import GridRange, fold_weight, is_float_layer, set_range
from mgq.quantization.targets import WEIGHT_LEVELS, ChannelFakeQuantize

Array = npt.NDArray[np.float32]
Values = npt.NDArray[np.float64]

VALUES = 1 << 24
"""The most numbers in the sample of a layer's inputs."""
MOST_INPUTS = 8192
"""Weights of outputs with more inputs are rounded to the nearest: a covariance takes the square of their number."""
FEWEST, MOST = 512, 8192
"""Positions of a layer's output, at which its input is looked at."""
POSITIONS_PER_INPUT = 256
"""More for each input of an output add little to what is known of how they vary together; to fit weights they do."""
DAMPING = 0.1
"""Of the mean variance, added to each. The paper takes 0.01; images that nobody has seen are better off with more.

Weights alone, in dB of the logits of 100 or 200 unseen photos, with 0.01 and 0.1: MobileNetV2 31.96 and 32.27,
EfficientNet-Lite0 31.14 and 31.57, Lite2 32.26 and 32.50, MobileNetV2 for ``megengine`` 25.62 and 25.94. 0.3 gave 32.39
and 31.19 on the first two."""
RIDGE = 3.0
"""Share of the mean variance that is added to each when weights are fitted, as a regularization.

On EfficientNet-Lite0, 100 pictures, the logits of 400 others came within 17.5 dB of float's at 0.1, 18.3 at 0.3, 19.2
at 1 and 19.5 at 3."""
BLOCK = 128
SMALL_KERNEL, TRIALS, WIDEST = 64, 24, 1.35
"""The most weights of a kernel for which several scales are tried, how many, and the largest over the least."""
SWEEPS = 2
"""How often each weight may move after it was rounded."""


@dataclass
class GPTQ:
    """A visitor of layers that rounds their weights to the grid of their ranges. With ``refit`` it fits the weights
    beforehand to the inputs that the int8 layers before give. ``weights``: the ranges of these grids by name, where a
    layer has one scale; no others fit the weights from now on.
    """

    refit: bool = True
    positions: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))
    weights: dict[str, GridRange] = field(default_factory=dict)

    def __call__(self, layer: Layer) -> None:
        module = layer.module
        if not is_convolution(module) or is_float_layer(module):
            return
        weight = fold_weight(module).numpy()
        conv = module.conv if hasattr(module, "conv") else module
        if not is_plain(conv) or np.prod(weight.shape[-3:]) > MOST_INPUTS:
            return
        at = self.positions_of(layer, conv)
        seen = gather_centred(layer.fake_inputs[0], conv, at)
        groups = weight.reshape(conv.groups, -1, int(np.prod(weight.shape[-3:])))
        fitted = (
            refit_weights(groups, seen, gather_centred(layer.in_float.inputs[0], conv, at)) if self.refit else groups
        )
        covariance = damp_covariance(covariances(seen, seen), DAMPING)
        if isinstance(module.weight_fake_quant, ChannelFakeQuantize):
            rounded, steps = round_channels(module.weight_fake_quant, fitted, covariance)
            module.weight_fake_quant.fix_scales(steps.ravel())
        else:
            steps = self.step_for(module, groups, fitted).astype(np.float64)
            rounded = round_jointly(fitted / steps, covariance, WEIGHT_LEVELS)
            keep_largest(rounded, fitted / steps)
            self.weights[layer.name] = -steps.item() * WEIGHT_LEVELS, steps.item() * WEIGHT_LEVELS
        set_folded_weight(module, weight, (rounded * steps).astype(np.float32).reshape(weight.shape))

    def step_for(self, module: QATModule, before: Array, weights: Array) -> Array:
        """The step of ``weights`` (groups, outputs, inputs) of a layer that has one, float32 (1, 1, 1).

        It keeps the share of its largest weight ``before`` that its range covered.
        """
        step = float(module.weight_observer.get_qparams().scale.numpy())
        step *= float(np.abs(weights).max()) / (float(np.abs(before).max()) or 1.0)
        set_range(module.weight_observer, -step * WEIGHT_LEVELS, step * WEIGHT_LEVELS)
        return np.full((1, 1, 1), step, np.float32)

    def positions_of(self, layer: Layer, conv: Any) -> Any:
        """Some positions of the output of ``layer``, at which its inputs are looked at."""
        images, channels, *size = layer.fake_inputs[0]._tuple_shape
        kernel = int(np.prod(conv.kernel_size))
        most = VALUES // (channels * kernel)
        if not self.refit:
            most = min(most, POSITIONS_PER_INPUT * channels * kernel // conv.groups)
        number = int(np.clip(most, FEWEST, MOST))
        shape = images, conv.out_channels, *output_size(conv, *size)
        return sample_positions(shape, self.positions, number)


def gather_centred(source: Tensor, conv: Any, at: Any) -> Array:
    """What each output of ``conv`` is made of at the positions ``at``: float32 (groups, inputs, positions), without its
    means."""
    found = patches(source.numpy(), conv.kernel_size, conv.stride, conv.padding, at)
    result: Array = found.reshape(conv.groups, -1, found.shape[-1])
    result -= result.mean(axis=2, keepdims=True)
    return result


def round_channels(quantizer: ChannelFakeQuantize, weights: Array, covariance: Values) -> tuple[Values, Values]:
    """``weights`` (groups, outputs, inputs) as integers, each output on the best of some scales, (groups, outputs, 1).

    Small kernels are worth more trials than large ones, in which errors make up for each other anyway.
    """
    groups, outputs, inputs = weights.shape
    trials = 1 if inputs > SMALL_KERNEL else TRIALS
    least = quantizer.least_scales(np.abs(weights).max(axis=2))
    factors = np.geomspace(1, WIDEST, trials)
    scales = quantizer.allowed_scales(least[:, :, None] * factors)[..., None]
    steps = (weights[:, :, None] / scales).reshape(groups, outputs * trials, inputs)
    tried = round_jointly(steps, covariance, quantizer.levels)
    errors = energies(tried - steps, covariance).reshape(groups, outputs, trials) * scales[..., 0] ** 2
    best = errors.argmin(axis=2)[:, :, None, None]
    integers = np.take_along_axis(tried.reshape(groups, outputs, trials, inputs), best, 2)[:, :, 0]
    return integers, np.take_along_axis(scales, best, 2)[:, :, 0]


def round_jointly(steps: Array | Values, covariance: Values, levels: int) -> Values:
    """``steps``, weights (groups, outputs, inputs) in terms of their scales, as integers whose errors cancel."""
    return settle_integers(round_with_compensation(steps, covariance, levels), steps, covariance, levels)


def energies(errors: Values, covariance: Values) -> Values:
    """(groups, outputs): what ``errors`` (groups, outputs, inputs) of the weights make of an output, mean square."""
    found: Values = ((errors @ covariance) * errors).sum(axis=2)
    return found


def keep_largest(rounded: Values, steps: Array) -> None:
    """Keep the largest weight of each grid: it sets the range, and an observer would find another one without it."""
    largest = int(np.abs(steps).argmax())
    rounded.reshape(-1)[largest] = np.clip(np.rint(steps.ravel()[largest]), -WEIGHT_LEVELS, WEIGHT_LEVELS)


def refit_weights(weights: Array, seen: Array, exact: Array) -> Array:
    """``weights`` (groups, outputs, inputs), changed so that with ``seen`` they give what they did with ``exact``.

    As nearly as least squares come, with a penalty on the change.
    """
    from scipy.linalg import solve

    missing = covariances(seen, exact - seen) @ weights.transpose(0, 2, 1)
    penalized = damp_covariance(covariances(seen, seen), RIDGE)
    change = [solve(*sides, assume_a="pos", overwrite_a=True) for sides in zip(penalized, missing, strict=True)]
    result: Array = (weights + np.stack(change).transpose(0, 2, 1)).astype(np.float32)
    return result


def covariances(one: Array, other: Array) -> Values:
    """(groups, inputs, positions), both without means -> (groups, inputs, inputs)."""
    found: Values = (one @ other.transpose(0, 2, 1) / one.shape[2]).astype(np.float64)
    return found


def damp_covariance(covariance: Values, share: float) -> Values:
    """(groups, inputs, inputs) with a share of the mean variance added to each, so that it can be inverted."""
    found = covariance.copy()
    diagonal = np.einsum("gii->gi", found)
    diagonal += share * diagonal.mean(axis=1, keepdims=True) + 1e-12
    return found


def round_with_compensation(weights: Array | Values, covariance: Values, levels: int = WEIGHT_LEVELS) -> Values:
    """``weights`` (groups, outputs, inputs), in steps, rounded to ``levels`` at most; the most varied input first."""
    inputs = weights.shape[2]
    order = np.argsort(-np.einsum("gii->gi", covariance), axis=1, kind="stable")
    upper = factors_of_inverses(covariance[np.arange(len(order))[:, None, None], order[:, :, None], order[:, None]])
    left = np.take_along_axis(weights, order[:, None, :], 2).astype(np.float64)
    for start in range(0, inputs, BLOCK):
        end = min(start + BLOCK, inputs)
        errors = np.empty((*left.shape[:2], end - start))
        compensate_block(left, upper, start, end, float(levels), errors)
        left[:, :, end:] -= errors @ upper[:, start:end, end:]
    result = np.empty_like(left)
    np.put_along_axis(result, order[:, None, :], left, 2)
    return result


def settle_integers(integers: Values, steps: Array | Values, covariance: Values, levels: int) -> Values:
    """``integers`` after single weights moved by a step wherever that makes the error of the output smaller."""
    found = integers.copy()
    move_by_steps(found, (found - steps) @ covariance, covariance, float(levels), SWEEPS)
    return found


def factors_of_inverses(matrices: Values) -> Values:
    """The upper triangular U with U.T @ U the inverse of each of ``matrices`` (groups, inputs, inputs), symmetric and
    positive definite.

    Backwards, a matrix is L @ L.T: then U is L's inverse, backwards again. That is a third of the work of inverting.
    """
    lower = np.linalg.cholesky(matrices[:, ::-1, ::-1])
    return np.ascontiguousarray(np.tril(invert_triangles(lower))[:, ::-1, ::-1])


def invert_triangles(lower: Values) -> Values:
    """The inverses of ``lower`` triangular matrices (groups, inputs, inputs); what is above their diagonals is of no
    account. Many small ones take one call, each of the large ones another that knows their form."""
    from scipy.linalg.lapack import dtrtri

    if lower.shape[1] <= SMALL_KERNEL:
        return np.linalg.inv(lower)
    return np.stack([dtrtri(matrix, lower=1)[0] for matrix in lower])


def set_folded_weight(module: QATModule, old: Array, new: Array) -> None:
    """Change the weights of ``module`` so that, with its batch norm folded in, they are ``new`` instead of ``old``."""
    parameter = module.conv.weight if hasattr(module, "conv") else module.weight
    own = parameter.numpy()
    # Where a weight is 0 the factor of its batch norm is told by another weight of the same output.
    rows = old.reshape(-1, int(np.prod(old.shape[-3:])))
    own_rows = own.reshape(rows.shape)
    largest = np.abs(own_rows).argmax(axis=1)[:, None]
    below = np.take_along_axis(own_rows, largest, 1)
    factor = np.divide(np.take_along_axis(rows, largest, 1), below, out=np.zeros_like(below), where=below != 0)
    changed = np.divide(new.reshape(rows.shape), factor, out=own_rows.copy(), where=factor != 0)
    parameter[...] = Tensor(changed.reshape(own.shape))
