"""What every engine that runs a deployed network looks like from outside."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt


class Runtime(Protocol):
    """One engine with one network loaded, ready to run.

    ``run`` takes a batch of pictures, uint8 of shape (N, 3, H, W), channels in BGR order, and returns
    float32 logits of shape (N, classes). It returns only when the result is in memory, so it can be timed.
    """

    name: str
    version: str
    threads: int

    def run(self, batch: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]: ...
