"""Defines ``Classifier``: a network that is ready to run, with its metadata. Importing this imports no MegEngine."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mgq.data.imagenet_classes import imagenet_classes
from mgq.data.transforms import eval_crop, eval_resize
from mgq.engine.classifier.metrics import refuse_not_finite
from mgq.machine import package_version
from mgq.quantization.option_names import Mode
from mgq.runtime.protocol import BatchRuntime, run_in_batches
from mgq.weights.checkpoint import CheckpointInfo, write_checkpoint
from mgq.weights.preprocessing import COMMON_PREPROCESSING, Preprocessing
from mgq.zoo.registry import ModelSpec

if TYPE_CHECKING:
    import megengine.module as M

    from mgq.quantization.targets import Target


@dataclass(frozen=True)
class Classifier:
    """A network in evaluation state, and what is known of it.

    ``fake_quantized`` is the ``qat`` network that a ``quantized`` one was made from; it holds the scales that a
    checkpoint needs. ``origin`` says where the weights come from, for the user; ``recipe`` is that of the run that
    trained them, as plain data, empty where there was none. ``file`` is the deployed file that the network comes from,
    and the engine's name; ``made_from`` the classifier that an engine runs a temporary file of, and that engine's name.
    """

    network: M.Module
    fake_quantized: M.Module | None
    spec: ModelSpec
    mode: Mode
    classes: tuple[str, ...]
    image_size: int
    origin: str
    options: Mapping[str, Any]
    recipe: Mapping[str, Any] = field(default_factory=dict)
    file: tuple[Path, str] | None = None
    made_from: tuple[Classifier, str] | None = None
    preprocessing: Preprocessing = COMMON_PREPROCESSING

    @property
    def target(self) -> Target:
        """What an int8 network, or a simulated one, is for; MegEngine for a float one."""
        from mgq.quantization.targets import MEGENGINE, target_of

        return target_of(self.fake_quantized) if self.fake_quantized is not None else MEGENGINE

    @property
    def stretched_to(self) -> tuple[int, int] | None:
        """Height and width that images are resized to without a crop, for networks whose input is no square."""
        size = self.spec.only_size
        return size if size is not None and size[0] != size[1] else None

    def logits(self, batch: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """uint8 (N, 3, H, W), BGR -> float32 (N, classes). Raises FailureError where they are not finite."""
        runtime: BatchRuntime | None = getattr(self.network, "runtime", None)
        result = run_megengine(self.network, batch) if runtime is None else run_in_batches(runtime, batch)
        refuse_not_finite(result)
        return result

    def crop(self, image: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """The part of a picture, uint8 (H, W, 3), that the network sees: (image_size, image_size, 3).

        A network whose pictures are no squares sees the whole of it, resized.
        """
        how = self.preprocessing
        if self.stretched_to is not None:
            return eval_resize(image, self.stretched_to)
        return eval_crop(image, self.image_size, how.shorter_side(self.image_size), how.interpolation)

    def info(self) -> CheckpointInfo:
        from mgq.quantization.float_layers import list_float_layers

        return CheckpointInfo(
            arch=self.spec.name,
            mode=self.mode.value,
            classes=self.classes,
            image_size=self.image_size,
            origin=self.origin,
            options=dict(self.options),
            target=self.target.name,
            recipe=dict(self.recipe),
            versions=versions(),
            float_layers=list_float_layers(self.fake_quantized) if self.fake_quantized is not None else (),
            preprocessing=self.preprocessing,
        )

    def write_checkpoint(self, path: Path) -> None:
        """Write the state that this network can be rebuilt from, to the bit, and what is known of it."""
        from mgq.zoo.network_state import state_of  # MegEngine's values: a file runs without it

        source = self.network if self.mode is not Mode.QUANTIZED else self.fake_quantized
        assert source is not None
        write_checkpoint(path, state_of(source), self.info())


@cache
def versions() -> dict[str, str]:
    """The versions of mgq, numpy and Python, and of MegEngine where it is installed."""
    packages = {name: version for name in ("mgq", "megengine", "numpy") if (version := package_version(name))}
    return {**packages, "python": ".".join(map(str, sys.version_info[:3]))}


def run_megengine(network: M.Module, batch: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """uint8 (N, 3, H, W), BGR -> float32 (N, classes)."""
    from megengine import Tensor

    from mgq.ptq.range_measurement import as_input

    result: npt.NDArray[np.float32] = network(Tensor(as_input(batch))).numpy()
    return result


def class_names(number: int) -> tuple[str, ...]:
    """ImageNet's names for 1,000 classes, numbers for any other count: the state alone tells no more."""
    if number == 1000:
        return tuple(entry.name for entry in imagenet_classes())
    return tuple(f"class {i}" for i in range(number))
