"""From a name, a checkpoint and a mode to a network that is ready to run, with what is known of it."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import megengine as mge
import megengine.module as M
import numpy as np
import numpy.typing as npt
from megengine import Tensor

from mgq.data.imagenet_classes import imagenet_classes
from mgq.data.transforms import eval_crop, eval_resize
from mgq.engine.classifier.metrics import refuse_not_finite
from mgq.engine.classifier.runtime_module import int8_of
from mgq.errors import InputError
from mgq.events import OnProgress, ignore_progress
from mgq.machine import package_version
from mgq.ptq.calibrate import calibrate_network
from mgq.ptq.quantize import quantize
from mgq.ptq.range_measurement import as_input
from mgq.quantization.activation_ranges import ActivationRanges, read_packaged_ranges, refuse_incomplete
from mgq.quantization.float_layers import keep_in_float, list_float_layers
from mgq.quantization.modes import Mode, to_mode
from mgq.quantization.option_names import TO_NEAREST
from mgq.quantization.targets import MEGENGINE, Target, get_target, target_of
from mgq.weights.checkpoint import CheckpointInfo, check_size, write_checkpoint
from mgq.weights.preprocessing import COMMON_PREPROCESSING, Preprocessing
from mgq.zoo.layers import without_initialization
from mgq.zoo.pretrained import version_in
from mgq.zoo.registry import ModelSpec, spec_of, specs
from mgq.zoo.weight_loading import (
    Weights,
    fetch_published_weights,
    fingerprint,
    float_part,
    is_cached,
    load_state,
    read_packaged_weights,
    read_weights,
)

DEFAULT_ARCH = "efficientnet_lite0"
RUN_CHECKPOINT = "checkpoint.safetensors"
# The runs that can serve a mode, by the last part of their folder's name.
RUNS_FOR = {
    Mode.NORMAL: ("normal",),
    Mode.QAT: ("qat", "calibration"),
    Mode.QUANTIZED: ("qat", "calibration"),
}


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
        return target_of(self.fake_quantized) if self.fake_quantized is not None else MEGENGINE

    @property
    def stretched_to(self) -> tuple[int, int] | None:
        """Height and width that pictures are resized to as they are, where they are no squares."""
        size = self.spec.only_size
        return size if size is not None and size[0] != size[1] else None

    def logits(self, batch: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """uint8 (N, 3, H, W), BGR -> float32 (N, classes). Raises FailureError where they are not finite."""
        result: npt.NDArray[np.float32] = self.network(Tensor(as_input(batch))).numpy()
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
        source = self.network if self.mode is not Mode.QUANTIZED else self.fake_quantized
        assert source is not None
        write_checkpoint(path, source.state_dict(), self.info())


@cache
def versions() -> dict[str, str]:
    """What the numbers depend on: versions of mgq, MegEngine, numpy and Python."""
    packages = {name: package_version(name) or "unknown" for name in ("mgq", "megengine", "numpy")}
    return {**packages, "python": ".".join(map(str, sys.version_info[:3]))}


def open_classifier(
    arch: str | None = None,
    checkpoint: Path | None = None,
    mode: Mode = Mode.QUANTIZED,
    save: Path = Path("runs"),
    pretrained: bool | str = False,
    ranges: ActivationRanges | None = None,
    options: Mapping[str, Any] | None = None,
    image_size: int | None = None,
    on_progress: OnProgress = ignore_progress,
    target: str | None = None,
    key: str | None = None,
) -> Classifier:
    """The network that these words mean, ready to run.

    Weights come from ``checkpoint``, where ``key`` chooses one of several networks; else the newest run of ``arch``
    under ``save``; else the zoo's pretrained ones (``pretrained`` goes straight to them, and allows a download; a name
    such as ``v1`` asks for that version of them). A float state needs ``ranges``, or those that mgq has for exactly
    these weights, to become ``qat`` or ``quantized``. ``target`` has to be what they were quantized for; MegEngine by
    default where that is open. Raises InputError where there are no weights, where they do not fit, or where ranges are
    missing.
    """
    spec = spec_of(arch) if arch is not None else None
    weights = find_weights(spec, checkpoint, mode, save, pretrained, on_progress, key)
    for name, value in (options or {}).items():
        if name not in spec_of(weights.arch).options:
            raise InputError(f"{weights.arch} has no option '{name}'; leave it out")
        has = {**spec_of(weights.arch).options, **weights.options}[name]
        if has != value:
            raise InputError(f"{weights.origin} has {name} {has}, not {value}; leave the option out")
    return classifier_from(weights, mode, ranges, target, image_size)


def find_weights(
    spec: ModelSpec | None,
    checkpoint: Path | None,
    mode: Mode,
    save: Path,
    pretrained: bool | str,
    on_progress: OnProgress,
    key: str | None = None,
) -> Weights:
    if checkpoint is not None:
        return read_weights(checkpoint, spec, key=key)
    spec = spec or spec_of(DEFAULT_ARCH)
    run = None if pretrained else find_newest_run(spec, mode, save)
    if run is not None:
        return read_weights(run, spec)
    version = version_in(pretrained)
    packaged = None if version else read_packaged_weights(spec)
    if packaged is not None:
        return packaged
    if pretrained or is_cached(spec, mode.value):
        return fetch_published_weights(spec, mode.value, on_progress, version)
    raise InputError(f"no weights for {spec.name} at hand: {list_ways_to_weights(spec)}")


def list_ways_to_weights(spec: ModelSpec) -> str:
    ways = ["pass --checkpoint FILE"]
    if spec.packaged:
        ways.append(spec.packaged.mend())
    if spec.checkpoints:
        ways.append("--pretrained downloads the published ones")
    at_hand = [s.name for s in specs().values() if s.packaged and s.packaged.path()]
    ways.append(f"or use -a {at_hand[0]}, whose weights are there" if at_hand else "see `mgq models`")
    return ", ".join(ways)


def find_newest_run(spec: ModelSpec, mode: Mode, save: Path) -> Path | None:
    """The checkpoint of the newest run of ``spec`` under ``save`` that can serve ``mode``; None without one."""
    found = [save / f"{spec.name}.{kind}" / RUN_CHECKPOINT for kind in RUNS_FOR[mode]]
    return find_newest(path for path in found if path.is_file())


def find_newest(files: Iterable[Path]) -> Path | None:
    """The one that was written last; None of none."""
    return max(files, key=lambda path: path.stat().st_mtime, default=None)


def find_newest_arch(save: Path, mode: Mode) -> str | None:
    """The architecture of the newest run under ``save`` that can serve ``mode``; None without one."""
    found = [
        path
        for kind in RUNS_FOR[mode]
        for path in save.glob(f"*.{kind}/{RUN_CHECKPOINT}")
        if path.parent.name.removesuffix(f".{kind}") in specs()
    ]
    newest = find_newest(found)
    return None if newest is None else newest.parent.name.rpartition(".")[0]


def classifier_from(
    weights: Weights,
    mode: Mode,
    ranges: ActivationRanges | None = None,
    target: str | None = None,
    image_size: int | None = None,
) -> Classifier:
    """``weights`` as a network in ``mode``; other words as for :func:`open_classifier`.

    Raises InputError where the activation ranges for int8 are missing, or are for another ``target``.
    """
    spec = spec_of(weights.arch)
    if image_size and spec.only_size:
        raise InputError(f"{spec.name} takes pictures of one size alone: leave --image-size out")
    size = check_size(image_size) if image_size else weights.info.image_size if weights.info else spec.image_size
    classifier = Classifier(
        network=weights.network,
        fake_quantized=None,
        spec=spec,
        mode=Mode.NORMAL,
        classes=weights.info.classes if weights.info else class_names(weights.classes),
        image_size=size,
        origin=weights.origin,
        options=weights.options,
        recipe=weights.info.recipe if weights.info else {},
        preprocessing=weights.preprocessing or spec.preprocessing,
    )
    if mode is Mode.NORMAL:
        return classifier
    if weights.mode == "qat" and ranges is None:
        its = get_target(weights.info.target if weights.info else MEGENGINE.name)
        refuse_other_target(its.name, target, weights.origin)
        network = to_mode(weights.network, Mode.QAT, its, in_place=True)
        keep_in_float(network, weights.info.float_layers if weights.info else ())
        load_state(network, weights.state, weights.origin)
        return convert(replace(classifier, network=network, fake_quantized=network), mode)
    return quantize_with_ranges(classifier, find_ranges(weights, ranges, target), mode)


def convert(classifier: Classifier, mode: Mode) -> Classifier:
    """``classifier``, whose network is fake-quantized, in mode ``qat`` or ``quantized``."""
    assert classifier.fake_quantized is not None
    if mode is Mode.QAT:
        return replace(classifier, network=classifier.fake_quantized, mode=mode)
    return replace(classifier, network=int8_of(classifier.fake_quantized, classifier.image_size), mode=mode)


def refuse_other_target(has: str, wanted: str | None, origin: str) -> None:
    """Raises InputError where ``wanted`` is no target, or another one than what ``origin`` was quantized for."""
    if wanted is not None and get_target(wanted).name != has:
        raise InputError(
            f"{origin} was quantized for the target {has}, not {wanted}: leave --target out, "
            f"or quantize float weights with it by `mgq calibrate` or `mgq qat`"
        )


def find_ranges(weights: Weights, ranges: ActivationRanges | None, target: str | None = None) -> ActivationRanges:
    """``ranges`` if they were measured with ``weights``, or those that mgq has for them. Raises InputError."""
    wanted = fingerprint(weights.state)
    if ranges is not None:
        refuse_other_target(ranges.target, target, "the network of these ranges")
    ranges = ranges or read_packaged_ranges(weights.arch, wanted, get_target(target or MEGENGINE.name).name)
    if ranges is None:
        option = f" --target {target}" if target else ""
        chosen = "-c FILE" if spec_of(weights.arch).is_described else f"-a {weights.arch}"
        raise InputError(
            f"{weights.origin} holds float weights without activation ranges; "
            f"run `mgq calibrate PICTURES {chosen}{option}` with them first (float32 runs with -m normal)"
        )
    if ranges.weights != wanted:
        raise InputError(f"the ranges were measured with other weights than {weights.origin}; calibrate again")
    return ranges


def quantize_with_ranges(classifier: Classifier, ranges: ActivationRanges, mode: Mode) -> Classifier:
    """``classifier`` (mode ``normal``) carried to ``qat`` or ``quantized`` with ``ranges``; its network is used up."""
    fake_quantized = quantize(classifier.network, ranges=ranges, mode=Mode.QAT, in_place=True)
    refuse_incomplete(fake_quantized, ranges)
    return convert(replace(classifier, fake_quantized=fake_quantized), mode)


def to_float(classifier: Classifier) -> Classifier:
    """The float network with the weights that ``classifier``, an int8 or simulated one, was made from."""
    assert classifier.fake_quantized is not None
    spec = classifier.spec
    with without_initialization():
        network = spec.build(len(classifier.classes), **classifier.options)
    load_state(network, float_part(classifier.fake_quantized.state_dict()), classifier.origin)
    network.eval()
    return replace(classifier, network=network, fake_quantized=None, mode=Mode.NORMAL)


def make_random_classifier(
    arch: str,
    mode: Mode,
    options: Mapping[str, Any] | None = None,
    image_size: int = 224,
    seed: int = 0,
    target: Target = MEGENGINE,
) -> Classifier:
    """A network with random weights, calibrated on random pixels: for measuring speed, never for answers.

    It is the same one for the same ``seed``, whatever the mode and the target.
    """
    mge.random.seed(seed)
    spec = spec_of(arch)
    options = options or {}
    network = spec.build(**options)
    network.eval()
    origin = "random weights (speed only)"
    names = class_names(1000)
    how = spec.preprocessing
    classifier = Classifier(network, None, spec, Mode.NORMAL, names, image_size, origin, options, preprocessing=how)
    if mode is Mode.NORMAL:
        return classifier
    pixels = np.random.default_rng(seed).integers(0, 256, (1, 3, image_size, image_size), dtype=np.uint8)
    _, ranges = calibrate_network(
        network, [pixels], arch, "", {}, "min-max", correct_bias=False, weight_rounding=TO_NEAREST, target=target
    )
    return quantize_with_ranges(classifier, ranges, mode)


def class_names(number: int) -> tuple[str, ...]:
    """ImageNet's names for 1,000 classes, numbers for any other count: the state alone tells no more."""
    if number == 1000:
        return tuple(entry.name for entry in imagenet_classes())
    return tuple(f"class {i}" for i in range(number))
