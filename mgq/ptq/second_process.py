"""A second process for calibration: it tries candidates on another core, and gives the same bits."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import megengine.module as M
import numpy as np
import numpy.typing as npt

from mgq.cpu_kernels.simulation import fast_simulation
from mgq.graph.network_reader import keep_traces
from mgq.machine import usable_cores
from mgq.ptq.tensor_samples import keep_samples
from mgq.system.environment import free_memory
from mgq.system.megengine_start import prepare_long_process
from mgq.system.side_process import SideProcess
from mgq.zoo.layers import quick_walks

WORTH_S = 0.3
"""How long the float answers to the images held back take at least where a second process is worth its start."""
MEMORY = 250
"""Free memory that two processes want, in terms of the images that layers are visited with, in float32. Together they
took 153 times that for MobileNetV2 at 224 pixels and 195 times for EfficientNet-Lite1 at 240."""
KNOWN = ("megengine.", "mgq.")
"""Modules whose layers every process knows."""

_for_good = contextlib.ExitStack()
_open: list[SideProcess] = []


def simulate_fast() -> None:
    """What the second process does first: from here on it simulates as the first one does."""
    _for_good.enter_context(fast_simulation())
    _for_good.enter_context(quick_walks())
    _for_good.enter_context(keep_traces())
    _for_good.enter_context(keep_samples())


def pays(network: M.Module, values: int, seconds: float) -> bool:
    """Whether a calibration of ``network`` uses a second process.

    Not where one core or too little memory is free for the ``values`` of the images that layers are visited with, where
    the work is too small, of which the ``seconds`` for images held back tell, and not for a network that another
    process would not know: one of the user's own code.
    """
    is_worth_it = seconds >= WORTH_S and usable_cores() >= 2 and free_memory() >= MEMORY * 4 * values
    return is_worth_it and is_known_elsewhere(network)


@contextlib.contextmanager
def open_second_process(
    network: M.Module, images: npt.NDArray[np.uint8], seconds: float
) -> Iterator[SideProcess | None]:
    """A second process for a calibration of ``network`` with ``images``, uint8 (N, 3, H, W). None where it does not
    :func:`pay <pays>`. One is open at a time."""
    if not pays(network, images.size, seconds):
        yield None
        return
    side = SideProcess("the second process of the calibration", prepare_long_process)
    try:
        side.begin(simulate_fast)
        _open.append(side)
        yield side
    finally:
        _open.clear()
        side.close()


def find_idle_process() -> SideProcess | None:
    """The second process of the calibration that runs, where it has one, and that has nothing to do."""
    return next((side for side in _open if side.is_idle), None)


def is_known_elsewhere(network: M.Module) -> bool:
    """Whether another process knows the code of all layers of ``network``."""
    return all(type(part).__module__.startswith(KNOWN) for part in network.modules())
