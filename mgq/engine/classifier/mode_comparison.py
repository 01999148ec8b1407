"""Compares the three modes of a network: what int8 costs in accuracy, and saves in size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import megengine.module as M
import numpy as np

from mgq.data.datasets import Dataset
from mgq.engine.classifier.evaluate import batch_for, evaluate
from mgq.engine.classifier.evaluation_result import Evaluation, agreement
from mgq.engine.classifier.open import Classifier, convert
from mgq.engine.classifier.runtime_module import RuntimeModule
from mgq.events import Callbacks, OnProgress, Progress
from mgq.quantization.modes import Mode


@dataclass(frozen=True)
class Comparison:
    """What the modes answered to the same pictures, and the bytes of their weights."""

    normal: Evaluation
    qat: Evaluation
    quantized: Evaluation
    normal_bytes: int
    quantized_bytes: int

    @property
    def images(self) -> int:
        return self.normal.images

    @property
    def drop(self) -> float:
        """Points of top-1 that real int8 loses against float; negative where it gains."""
        return self.normal.top1 - self.quantized.top1

    @property
    def same_as_float(self) -> float:
        """Percent of the pictures that int8 answers as float does."""
        return agreement(self.normal, self.quantized)

    @property
    def same_as_simulated(self) -> float:
        """Percent of the pictures that int8 answers as fake quantization does."""
        return agreement(self.qat, self.quantized)

    def to_json(self) -> dict[str, Any]:
        """Plain data: percent, bytes, nats."""
        modes: Mapping[str, Evaluation] = {"normal": self.normal, "qat": self.qat, "quantized": self.quantized}
        return {
            "images": self.images,
            **{name: {"top1": found.top1, "top5": found.top5, "loss": found.loss} for name, found in modes.items()},
            "top1_error": self.normal.top1_error,
            "drop": self.drop,
            "same_as_float": self.same_as_float,
            "same_as_simulated": self.same_as_simulated,
            "normal_bytes": self.normal_bytes,
            "quantized_bytes": self.quantized_bytes,
        }


def compare_modes(
    normal: Classifier,
    simulated: Classifier,
    images: Dataset,
    callbacks: Callbacks,
    known: Evaluation | None = None,
    *,
    batch_size: int | None = None,
    workers: int | None = None,
    max_bad: float = 0.01,
) -> Comparison:
    """The float network, the fake-quantized one, and the int8 network made of that, on the labelled ``images``.

    ``known`` is what float answered to them, where that was measured before. The other options, and what it raises, are
    those of :func:`mgq.engine.classifier.evaluate.evaluate`.
    """
    int8 = convert(simulated, Mode.QUANTIZED)
    found = {"float": known} if known is not None else {}
    for what, classifier in (("float", normal), ("fake-quantized", simulated), ("int8", int8)):
        if what in found:
            continue
        found[what] = evaluate(
            classifier,
            images,
            batch_size=batch_size or batch_for(normal.image_size),
            workers=workers,
            max_bad=max_bad,
            on_progress=name_progress(what, callbacks.on_progress),
        )
    return Comparison(
        found["float"],
        found["fake-quantized"],
        found["int8"],
        bytes_of(normal.network),
        bytes_of(int8.network),
    )


def name_progress(what: str, on_progress: OnProgress) -> OnProgress:
    """``on_progress`` with the label ``evaluate WHAT``."""

    def listener(event: Progress) -> None:
        on_progress(event._replace(what=f"evaluate {what}"))

    return listener


def bytes_of(network: M.Module) -> int:
    """Bytes of all parameters and statistics; for int8, of weights in int8 and biases in int32, or of the file."""
    if isinstance(network, RuntimeModule):
        return network.size
    return sum(int(np.prod(tensor.shape, initial=1)) * np.dtype(tensor.dtype).itemsize for tensor in network.tensors())
