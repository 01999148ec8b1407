"""Range estimators put behind the layers of a network while pictures run through it."""

from __future__ import annotations

from collections.abc import Iterable

import megengine.module as M
import numpy as np
import numpy.typing as npt
from megengine import Tensor
from megengine.module.qat import QuantStub
from megengine.quantization.observer import Observer
from megengine.quantization.utils import QParams

from mgq.errors import FailureError
from mgq.ptq.logit_gradients import not_finite
from mgq.ptq.observers import Range, RangeEstimator
from mgq.quantization.activation_ranges import half_of, quantized_layers
from mgq.zoo.overflow import is_finite


class EstimatingObserver(Observer):  # type: ignore[misc]
    """Shows what passes behind ``layer`` to a range estimator. Raises FailureError for what is not finite."""

    def __init__(self, observer: Observer, estimator: RangeEstimator, layer: str = "") -> None:
        super().__init__(observer.dtype)
        self.estimator = estimator
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        if not is_finite(x):
            raise FailureError(not_finite(self.layer))
        self.estimator.update(x.numpy())
        return x

    def get_qparams(self) -> QParams | None:
        return None


def estimated_ranges(
    watched: M.Module, batches: Iterable[npt.NDArray[np.uint8]], kind: type[RangeEstimator]
) -> dict[str, Range]:
    estimators = with_estimators(watched, kind)
    for batch in batches:
        watched(Tensor(as_input(batch)))
    return {name: estimator.range() for name, estimator in estimators.items() if estimator.has_seen}


def with_estimators(watched: M.Module, kind: type[RangeEstimator]) -> dict[str, RangeEstimator]:
    """Put an estimator behind each layer of a ``qat`` network but its input, whose scale is fixed; by their names."""
    layers = {name: layer for name, layer in quantized_layers(watched).items() if not isinstance(layer, QuantStub)}
    estimators = {name: kind(half_of(layer)) for name, layer in layers.items()}
    for name, layer in layers.items():
        layer.act_observer = EstimatingObserver(layer.act_observer, estimators[name], name)
    return estimators


def as_input(batch: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Pixels as networks take them: float32, minus 128."""
    return batch.astype(np.float32) - 128
