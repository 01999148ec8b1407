"""What ``mgq qat`` begins with: the float network, calibrated on a few of the pictures to train on."""

from __future__ import annotations

import megengine.module as M
import numpy as np
import numpy.typing as npt

from mgq.data.loader import Loader
from mgq.engine.training.recipe import Recipe
from mgq.events import OnProgress, Progress, log_progress
from mgq.ptq.calibrate import find_best_network
from mgq.ptq.presets import DEFAULT_PRESET, CalibrationConfig
from mgq.quantization.option_names import FAST
from mgq.quantization.targets import get_target
from mgq.zoo.network_state import State, state_of


def calibrate(network: M.Module, examples: Loader, recipe: Recipe, on_progress: OnProgress = log_progress) -> State:
    """The state in mode ``qat`` of the float ``network``, as calibration on the ``examples`` makes it."""
    # On the drawn pictures all is to be done in minutes.
    preset = FAST if recipe.is_synthetic else DEFAULT_PRESET
    config = CalibrationConfig(preset, target=get_target(recipe.target))
    images = read_images(examples, on_progress)
    found, _ = find_best_network(
        network, images, recipe.arch, "", config.make_preset(), config.target, on_progress=on_progress
    )
    return state_of(found.network)


def read_images(examples: Loader, on_progress: OnProgress) -> npt.NDArray[np.uint8]:
    """uint8 (N, 3, H, W), in another order, always the same: the first of them are of all kinds."""
    batches = []
    for number, batch in enumerate(examples.batches(0), 1):
        on_progress(Progress("calibrate", number, len(examples), "batches"))
        batches.append(batch.images)
    images: npt.NDArray[np.uint8] = np.random.default_rng(0).permutation(np.concatenate(batches))
    return images
