"""Measures ranges: puts an estimator behind each layer of a network while images run through it."""

from __future__ import annotations

from collections.abc import Iterable

import megengine.module as M
import numpy as np
import numpy.typing as npt
from megengine import Tensor
from megengine.module.qat import QuantStub
from megengine.quantization.observer import Observer as MegEngineObserver
from megengine.quantization.utils import QParams

from mgq.errors import FailureError
from mgq.ptq.observers import Observer
from mgq.quantization.qat_layers import Range, find_quantized_layers, quant_levels
from mgq.zoo.overflow import describe_not_finite, is_finite


class RangeObserver(MegEngineObserver):  # type: ignore[misc]
    """Passes the outputs of ``layer`` to a range estimator. Raises FailureError for values that are not finite."""

    def __init__(self, observer: MegEngineObserver, range_observer: Observer, layer: str = "") -> None:
        super().__init__(observer.dtype)
        self.range_observer = range_observer
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        if not is_finite(x):
            raise FailureError(describe_not_finite(self.layer))
        self.range_observer.update(x.numpy())
        return x

    def get_qparams(self) -> QParams | None:
        return None


def estimate_ranges(
    watched: M.Module, batches: Iterable[npt.NDArray[np.uint8]], kind: type[Observer]
) -> dict[str, Range]:
    range_observers = with_observers(watched, kind)
    for batch in batches:
        watched(Tensor(as_input(batch)))
    return {name: range_observer.range() for name, range_observer in range_observers.items() if range_observer.has_seen}


def with_observers(watched: M.Module, kind: type[Observer]) -> dict[str, Observer]:
    """Put an estimator behind each layer of a ``qat`` network but its input, whose scale is fixed; by their names."""
    layers = {name: layer for name, layer in find_quantized_layers(watched).items() if not isinstance(layer, QuantStub)}
    range_observers = {name: kind(quant_levels(layer)) for name, layer in layers.items()}
    for name, layer in layers.items():
        layer.act_observer = RangeObserver(layer.act_observer, range_observers[name], name)
    return range_observers


def as_input(batch: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Pixels as networks take them: float32, minus 128."""
    return batch.astype(np.float32) - 128
