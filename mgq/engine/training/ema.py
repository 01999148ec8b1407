"""Weights averaged over a training, which often answer better than the last ones (arXiv:1803.05407)."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import megengine.module as M
import numpy as np
import numpy.typing as npt

from mgq.zoo.network_state import set_state
from mgq.zoo.weight_loading import is_observed

State = dict[str, npt.NDArray[Any]]


class ModelEma:
    """Exponential moving average of every parameter and batch-norm statistic; observers are taken as they are.

    ``decay`` is reached gradually: step t averages with min(decay, (1 + t) / (10 + t)), so that the random start is
    soon forgotten.
    """

    def __init__(self, network: M.Module, decay: float) -> None:
        self.decay = decay
        self.steps = 0
        self.values: State = {name: tensor.numpy().copy() for name, tensor in network.named_tensors()}

    def update(self, network: M.Module) -> None:
        """Take in the weights of ``network`` after a step."""
        self.steps += 1
        share = np.float32(1 - min(self.decay, (1 + self.steps) / (10 + self.steps)))
        for name, tensor in network.named_tensors():
            value, average = tensor.numpy(), self.values[name]
            if is_observed(name) or average.dtype != np.float32:
                self.values[name] = value.copy()
            else:
                average += share * (value - average)

    def make_averaged_copy(self, network: M.Module) -> M.Module:
        """A copy of ``network`` with the averaged weights."""
        result = deepcopy(network)
        set_state(result, self.values)
        return result

    def load(self, values: Mapping[str, npt.NDArray[Any]], steps: int) -> None:
        """Go on from an average that was kept."""
        self.values = {name: np.array(values[name]) for name in self.values}
        self.steps = steps
