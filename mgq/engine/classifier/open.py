"""Opens a classifier from an architecture's name, a checkpoint and a mode."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import megengine as mge
import numpy as np

from mgq.engine.classifier.classifier import Classifier as Classifier
from mgq.engine.classifier.classifier import class_names as class_names
from mgq.engine.classifier.classifier import versions as versions
from mgq.engine.classifier.network_options import RUNS
from mgq.engine.classifier.run_lookup import DEFAULT_ARCH as DEFAULT_ARCH
from mgq.engine.classifier.run_lookup import RUN_CHECKPOINT as RUN_CHECKPOINT
from mgq.engine.classifier.run_lookup import describe_unused, find_unused_float_run
from mgq.engine.classifier.run_lookup import find_newest as find_newest
from mgq.engine.classifier.run_lookup import find_newest_arch as find_newest_arch
from mgq.engine.classifier.run_lookup import find_newest_run as find_newest_run
from mgq.engine.classifier.runtime_module import int8_of
from mgq.errors import InputError
from mgq.events import OnProgress, log_progress
from mgq.ptq.calibrate import calibrate_network
from mgq.ptq.presets import PLAIN
from mgq.ptq.quantize import quantize
from mgq.quantization.activation_ranges import ActivationRanges, read_packaged_ranges, refuse_incomplete
from mgq.quantization.float_layers import keep_in_float
from mgq.quantization.modes import Mode, to_mode
from mgq.quantization.targets import MEGENGINE, Target, get_target
from mgq.weights.checkpoint import check_size
from mgq.zoo.layers import without_initialization
from mgq.zoo.network_state import state_of
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


def open_classifier(
    arch: str | None = None,
    checkpoint: Path | None = None,
    mode: Mode = Mode.QUANTIZED,
    save: Path = RUNS,
    pretrained: bool | str = False,
    ranges: ActivationRanges | None = None,
    options: Mapping[str, Any] | None = None,
    image_size: int | None = None,
    on_progress: OnProgress = log_progress,
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
    """The weights that :func:`open_classifier` takes, in its order. Raises InputError, which lists the ways to some,
    where there are none."""
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
    unused = find_unused_float_run(spec, mode, save)
    if unused is not None:
        raise InputError(f"{describe_unused(unused, spec)}; `mgq infer -m normal` runs it as it is")
    raise InputError(f"no weights for {spec.name} found: {list_ways_to_weights(spec)}")


def list_ways_to_weights(spec: ModelSpec) -> str:
    """What a user can do to have weights for ``spec``, in words."""
    ways = ["pass --checkpoint FILE"]
    if spec.packaged:
        ways.append(spec.packaged.mend())
    if spec.checkpoints:
        ways.append("--pretrained downloads the published ones")
    at_hand = [s.name for s in specs().values() if s.packaged and s.packaged.path()]
    ways.append(f"or use -a {at_hand[0]}, whose weights are there" if at_hand else "see `mgq models`")
    return ", ".join(ways)


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
            f"{origin} was quantized for the target {has}, not {wanted}: quantize float weights for it by "
            f"`mgq calibrate --target {wanted}` or `mgq qat --target {wanted}`, or leave --target out if it was given"
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
    load_state(network, float_part(state_of(classifier.fake_quantized)), classifier.origin)
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
    _, ranges = calibrate_network(network, pixels, arch, "", PLAIN, target)
    return quantize_with_ranges(classifier, ranges, mode)
