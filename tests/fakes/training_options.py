"""Trainings of a few steps, and callbacks that stop one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mgq.engine.training.train_options import TrainOptions
from mgq.events import Callbacks

ARCH = "shufflenet_v1_x0_5_g3"
SMALL = {"image_size": 32, "batch_size": 8, "synthetic_train": 40, "synthetic_val": 20, "epochs": 2}


def small_request(save: Path, arch: str = ARCH, **changes: Any) -> TrainOptions:
    return TrainOptions(arch=arch, save=save, changes={**SMALL, **changes}, workers=1)


def stopping_after(number: int) -> Callbacks:
    """Asks to stop when it was asked that often."""
    asked = iter(range(10**9))
    return Callbacks(should_stop=lambda: next(asked) + 1 >= number)
