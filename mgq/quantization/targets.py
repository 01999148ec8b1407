"""The table of targets: what the int8 network runs on, and so what fake quantization must imitate."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import megengine.functional as F
import megengine.module as M
import megengine.module.qat as Q
import numpy as np
import numpy.typing as npt
from megengine import Tensor
from megengine.core._imperative_rt.core2 import apply
from megengine.core.ops.builtin import FakeQuant
from megengine.core.tensor.dtype import QuantDtypeMeta
from megengine.module.qat import QATModule
from megengine.quantization import FakeQuantize, QConfig
from megengine.quantization.observer import (
    ExponentialMovingAverageObserver,
    MinMaxObserver,
)
from megengine.quantization.utils import QParams, QuantMode, create_qparams

from mgq.errors import no_such
from mgq.quantization import option_names
from mgq.quantization.floors import floored_dtype
from mgq.quantization.half_to_even import EvenFakeQuantize

UNSIGNED = QuantDtypeMeta("quint8_behind_relu", "", "int8", -255, 255)
"""uint8 0..255 with zero point 0, for tensors that are never negative. MegEngine's observers and fake quantization only
support symmetric grids of signed integers, so they see a grid with a mirrored half."""
SKEWED = QuantDtypeMeta("quint8_skewed", "", "int8", -224, 224)
"""uint8 with zero point 31, for tensors with small negative values, in networks that an earlier version imported: today
they have floors (:mod:`mgq.quantization.floors`)."""
MOST_BELOW = 0.5
"""How far below 0 such values are at most."""
WEIGHT_LEVELS = 127
SAFE_LEVELS = 64
"""Without VNNI x86 processors add two products of uint8 and int8 in 16 bits: 2 x 255 x 64 is the most that fits."""
SMALLEST_SCALE = 2.0**-12
"""Of a channel's weights, in terms of the layer's largest: no step needs to be finer."""
SMALLEST_LARGEST = 1e-30
FINEST = 1e-8
"""The smallest scale of activations, where MegEngine's observers stop at 1e-5: networks that were initialized and not
trained have whole layers of which no value is above 1e-5."""
DIGITS = 4
"""Binary ones, of a scale of weights: with 20 more for the sum it fits into float32's 24."""
FEWEST_PARTS, PARTS, LARGEST_ODD = 64, 4095, 8191
"""Numbers without ties are one part of up to ``LARGEST_ODD``, or at least ``FEWEST_PARTS`` parts of ``PARTS``. A larger
one would bring values so near to a tie that float32 does not know on which side they are."""
EVEN = 1e-6
"""So far above an integer a number still is that integer."""
ROUNDED_AWAY = 0.49
"""Part of a step by which the largest weight may exceed the last one."""
ON_GRID = 2e-3
"""Part of a step by which float32 may put a rounded weight off its grid."""


@dataclass(frozen=True)
class Target:
    """One row of the table of targets: types and granularity of the int8 network.

    ``per_channel``: weights have a scale for each output. ``unsigned``: outputs of a ReLU have 256 levels instead of
    128. ``int8_head``: the classifier is quantized, too, and the pooled features that it reads. ``levels``: the largest
    integer of a weight.
    """

    name: str
    weights: str
    activations: str
    qconfig: QConfig
    per_channel: bool
    unsigned: bool
    int8_head: bool
    levels: int = WEIGHT_LEVELS

    def prepare(self, network: M.Module) -> None:
        """Choose which layers of a float ``network`` are quantized."""
        if self.int8_head:
            network.disable_quantize(False)

    @property
    def replacements(self) -> dict[Any, Any]:
        """Type of a float layer -> the ``qat`` one, where it is not MegEngine's."""
        return {M.DequantStub: QuantizedFeatures} if self.int8_head else {}

    def equip(self, module: QATModule) -> None:
        """Give a layer of a ``qat`` network new observers and fake quantization, without ranges."""
        module.set_qconfig(self.qconfig)
        if isinstance(module, Q.Linear):
            module.act_observer = module.act_fake_quant = None  # logits are float
        elif self.unsigned and is_never_negative(module):
            put_on_grid(module, self.qconfig, UNSIGNED)
        elif self.unsigned and getattr(module, "floor", None) is not None:
            put_on_grid(module, self.qconfig, floored_dtype(module.floor))
        elif self.unsigned and -MOST_BELOW <= getattr(module, "lowest", -np.inf) < 0:
            put_on_grid(module, self.qconfig, SKEWED)


def put_on_grid(module: QATModule, qconfig: QConfig, dtype: QuantDtypeMeta) -> None:
    """Quantize the output of the layer ``module`` to ``dtype``."""
    module.act_observer = qconfig.act_observer(dtype=dtype)
    module.act_fake_quant = qconfig.act_fake_quant(dtype=dtype)


class LastScales:
    """What is no part of a module's state."""

    scales: Tensor | None = None


class ChannelFakeQuantize(FakeQuantize):  # type: ignore[misc]
    """Rounding of weights to int8 and back in float32, each output on a grid of its own, ``levels`` steps from zero.

    Weights are (O, ...), or (groups, O / groups, ...) in a grouped convolution. ``scales``, float32 (O,), are part of
    the state once they are fixed; until then they follow the largest weight of each output. ``unit`` is the scale of
    the layer's output in terms of its input's, where scales were chosen so that no rounding meets a tie
    (:mod:`mgq.ptq.exact_scales`).
    """

    def __init__(self, dtype: str, levels: int = WEIGHT_LEVELS) -> None:
        super().__init__(dtype)
        self.levels: int = levels
        self.unit: float | None = None
        self.scales: Tensor | None = None
        self.last = LastScales()

    def fix_scales(self, scales: npt.NDArray[Any] | None) -> None:
        """Fix the ``scales`` of the outputs, (O,); with None they follow the weights again."""
        self.scales = None if scales is None else Tensor(np.asarray(scales, np.float32))
        self.unit = None if scales is None else self.unit

    def least_scales(self, largest: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        """The least scales with which weights of at most ``largest`` are ``levels`` steps."""
        return least_limits(largest) / (self.levels + ROUNDED_AWAY)

    def allowed_scales(self, scales: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """The least scales not below ``scales`` that may be fixed."""
        return scales if self.unit is None else avoid_ties(scales / self.unit) * self.unit

    def fake_quant_forward(self, inp: Tensor, qparams: QParams | None = None) -> Tensor:
        scales = self.scales_of(inp)
        return apply(FakeQuant(qmin=self.qmin, qmax=self.qmax), inp, scales, F.zeros_like(scales))[0]

    def scales_of(self, weight: Tensor) -> Tensor:
        """Compute the scales of ``weight``, with as many axes, and keep them for ``get_qparams``."""
        if self.scales is None:
            scales = channel_scales(weight, self.levels)
        else:
            axes = axes_of_outputs(weight.ndim)
            scales = self.scales.reshape(*weight._tuple_shape[:axes], *(1,) * (weight.ndim - axes))
        # In the shape of the layer's bias, whose integers count in these and the input's scale.
        self.last.scales = scales.reshape(-1) if weight.ndim == 2 else scales.reshape(1, -1, 1, 1)
        return scales

    def get_qparams(self) -> QParams:
        return create_qparams(QuantMode.SYMMERTIC, self.dtype, scale=self.last.scales)


def axes_of_outputs(axes: int) -> int:
    """How many of the ``axes`` of weights count outputs: (groups, O / groups, ...) in a grouped convolution."""
    return 2 if axes == 5 else 1


def least_limits(largest: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """``largest``, that of the weights of each output, but not so small that its steps were too fine to matter."""
    most = float(largest.max())
    least = max(most * SMALLEST_SCALE, SMALLEST_LARGEST)
    # Where all weights are 0 there is but the bias, which needs no finer steps than those of other outputs. Steps too
    # fine would keep it from int32.
    found: npt.NDArray[np.float64] = np.where(largest > 0, np.maximum(largest, least), most if most > 0 else 1.0)
    return found


def avoid_ties(ratios: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The least numbers not below ``ratios``, above 0, an integer of which is never a half: odd denominators.

    They are 1/n up to 1/64, and above it multiples of 1/4095; none is below 1/8191.
    """
    odd = np.clip(np.floor(1 / ratios), 1, LARGEST_ODD).astype(np.int64)
    odd -= odd % 2 == 0
    return np.where(ratios <= 1 / FEWEST_PARTS, 1 / odd, np.ceil(ratios * PARTS - EVEN) / PARTS)


def channel_scales(weight: Tensor, levels: int = WEIGHT_LEVELS) -> Tensor:
    """The scale of each output of ``weight``, of as many axes: its largest weight is at most ``levels`` steps.

    A scale has ``DIGITS`` binary digits, so that products with it are exact, and is the least of these that serves.
    Weights that are steps of the next one already keep that: rounding may have made the largest of them smaller.
    """
    values = weight.numpy()
    kernels = tuple(range(axes_of_outputs(values.ndim), values.ndim))
    largest = np.abs(values).max(axis=kernels, keepdims=True)
    scales = round_up(least_limits(largest) / (levels + ROUNDED_AWAY))
    wider = round_up(scales * np.float64(1 + 2.0**-DIGITS))
    steps = values / wider
    is_wider = (np.abs(steps - np.rint(steps)) < ON_GRID).all(axis=kernels, keepdims=True) & (largest > 0)
    return Tensor(np.where(is_wider, wider, scales).astype(np.float32), device=weight.device)


def round_up(values: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """``values``, above 0, rounded up to ``DIGITS`` binary digits."""
    mantissas, exponents = np.frexp(np.asarray(values, np.float64))
    rounded: npt.NDArray[np.float64] = np.ldexp(np.ceil(mantissas * 2**DIGITS), exponents - DIGITS)
    return rounded


def levels_of(module: M.Module) -> int:
    """How many steps a weight of the layer ``module`` of a ``qat`` network is at most."""
    return int(getattr(module.weight_fake_quant, "levels", WEIGHT_LEVELS))


class QuantizedFeatures(Q.DequantStub):  # type: ignore[misc]
    """The exit of the integer layers in front of an int8 classifier: pooled features on a grid of their own."""

    with_act = True

    def forward(self, inp: Tensor) -> Tensor:
        return self.apply_quant_activation(inp)


MEGENGINE = Target(
    name=option_names.MEGENGINE,
    weights="int8 in -127..127, symmetric, one scale a layer",
    activations="int8 in -128..127, symmetric, one scale a layer",
    qconfig=QConfig(
        weight_observer=partial(MinMaxObserver, dtype="qint8_narrow"),
        act_observer=partial(ExponentialMovingAverageObserver, dtype="qint8"),
        weight_fake_quant=partial(FakeQuantize, dtype="qint8_narrow"),
        act_fake_quant=partial(FakeQuantize, dtype="qint8"),
    ),
    per_channel=False,
    unsigned=False,
    int8_head=False,
)
ONNX = Target(
    name=option_names.ONNX,
    weights="int8 in -127..127, symmetric, one scale an output channel",
    activations="uint8 in 0..255 behind a ReLU, int8 in -128..127 elsewhere, one scale a layer",
    qconfig=QConfig(
        weight_observer=MEGENGINE.qconfig.weight_observer,
        act_observer=partial(ExponentialMovingAverageObserver, dtype="qint8", eps=FINEST),
        weight_fake_quant=partial(ChannelFakeQuantize, dtype="qint8_narrow"),
        act_fake_quant=partial(EvenFakeQuantize, dtype="qint8"),
    ),
    per_channel=True,
    unsigned=True,
    int8_head=True,
)
ONNX_AVX2 = replace(
    ONNX,
    name=option_names.ONNX_AVX2,
    weights=f"int8 in -{SAFE_LEVELS}..{SAFE_LEVELS}, symmetric, one scale an output channel: sums cannot saturate",
    qconfig=ONNX.qconfig._replace(
        weight_fake_quant=partial(ChannelFakeQuantize, dtype="qint8_narrow", levels=SAFE_LEVELS)
    ),
    levels=SAFE_LEVELS,
)
TARGETS = {target.name: target for target in (MEGENGINE, ONNX, ONNX_AVX2)}


def get_target(name: str) -> Target:
    """Raises InputError, which lists them, where there is no target ``name``."""
    if name not in TARGETS:
        raise no_such("target", name, TARGETS)
    return TARGETS[name]


def target_of(network: M.Module) -> Target:
    """The target that a ``qat`` network simulates."""
    levels = next((module.levels for module in network.modules() if isinstance(module, ChannelFakeQuantize)), None)
    if levels is None:
        return MEGENGINE
    return next(target for target in TARGETS.values() if target.per_channel and target.levels == levels)


def is_never_negative(module: M.Module) -> bool:
    """Whether the layer ``module`` of a ``qat`` network ends in a ReLU, or another activation without negative
    values."""
    if isinstance(module, Q.Elemwise):
        return str(module.method).upper().endswith("FUSE_ADD_RELU")
    if isinstance(module, Q.ConvBnRelu2d | Q.ConvRelu2d | QuantizedFeatures):
        return True
    return bool(getattr(module, "lowest", -np.inf) >= 0)


class UnitScaleObserver(ExponentialMovingAverageObserver):  # type: ignore[misc]
    """The observer of the network's input: whatever it sees, the scale is exactly 1.

    So a pixel minus 128 is its own int8 value. It has the state of the observer that it stands for, because the
    public example's checkpoints hold one.
    """

    def forward(self, x_orig: Tensor) -> Tensor:
        return x_orig

    def get_qparams(self) -> QParams:
        return create_qparams(QuantMode.SYMMERTIC, self.dtype, scale=Tensor(1.0))
