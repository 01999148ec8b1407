"""What the int8 network will run on, and so what fake quantization must imitate."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from megengine import Tensor
from megengine.quantization import FakeQuantize, QConfig
from megengine.quantization.observer import (
    ExponentialMovingAverageObserver,
    MinMaxObserver,
)
from megengine.quantization.utils import QParams, QuantMode, create_qparams


@dataclass(frozen=True)
class Target:
    """One row of the table of targets: types and granularity of what runs in the end."""

    name: str
    weights: str
    activations: str
    qconfig: QConfig


MEGENGINE = Target(
    name="megengine",
    weights="int8 in -127..127, symmetric, one scale a layer",
    activations="int8 in -128..127, symmetric, one scale a layer",
    qconfig=QConfig(
        weight_observer=partial(MinMaxObserver, dtype="qint8_narrow"),
        act_observer=partial(ExponentialMovingAverageObserver, dtype="qint8"),
        weight_fake_quant=partial(FakeQuantize, dtype="qint8_narrow"),
        act_fake_quant=partial(FakeQuantize, dtype="qint8"),
    ),
)


class UnitScaleObserver(ExponentialMovingAverageObserver):  # type: ignore[misc]
    """The observer of the network's input: whatever it sees, the scale is exactly 1.

    So a pixel minus 128 is its own int8 value. It has the state of the observer that it stands for, because the
    public example's checkpoints hold one.
    """

    def forward(self, x_orig: Tensor) -> Tensor:
        return x_orig

    def get_qparams(self) -> QParams:
        return create_qparams(QuantMode.SYMMERTIC, self.dtype, scale=Tensor(1.0))
