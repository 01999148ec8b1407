"""Presets of post-training quantization: lists of candidates for :mod:`mgq.ptq.pipeline`, fast or thorough."""

from __future__ import annotations

from dataclasses import dataclass, replace

from mgq.errors import no_such
from mgq.ptq.steps import (
    LAYERWISE_IMAGES,
    ClearDeadChannels,
    CorrectBias,
    CorrectExpectedBias,
    CorrectLogits,
    CorrectShifts,
    Equalize,
    ExactScales,
    ExpectedRanges,
    MixChannels,
    RangesFromImages,
    RangesFromLogits,
    RoundWeights,
    Step,
)
from mgq.quantization.option_names import (
    BALANCED,
    BEST,
    BY_GPTQ,
    EASYQUANT,
    FAST,
    LOGITS,
    METHODS,
    QUALITIES,
    ROUNDINGS,
    TO_NEAREST,
)
from mgq.quantization.targets import MEGENGINE, Target

PREVIEWED = 16


@dataclass(frozen=True)
class Preset:
    """``grids``: candidates for equalization and ranges, each a list of steps. ``preview``: a quick finish, with which
    they are compared. ``rewrites`` are tried in the best of them, before its ranges. ``finishes``: what is tried
    instead of the preview on the best, ``touches`` on what is best then.
    """

    grids: tuple[tuple[Step, ...], ...]
    finishes: tuple[Step, ...]
    preview: Step | None
    touches: tuple[Step, ...] = ()
    rewrites: tuple[Step, ...] = ()

    @property
    def trials(self) -> int:
        """How many candidates there are at most."""
        return len(self.grids) + len(self.rewrites) + len(self.finishes) + len(self.touches)


CLEAR, PREVIEW = ClearDeadChannels(), CorrectBias(images=PREVIEWED)
PLAIN = (RangesFromImages(),)
BY_LOGITS = (CLEAR, RangesFromLogits())
DATA_FREE = (CLEAR, Equalize(data_free=True), ExpectedRanges())
EQUALIZED = (CLEAR, Equalize(), RangesFromLogits())
WITH_HEADROOM = (CLEAR, Equalize(), RangesFromLogits(headroom=True))
UP_TO_CEILINGS = (CLEAR, Equalize(to_ceilings=True), RangesFromLogits())

DEFAULT_PRESET = BALANCED
PRESETS: dict[str, Preset] = {
    FAST: Preset((PLAIN, BY_LOGITS, DATA_FREE), (CorrectBias(),), PREVIEW, (CorrectLogits(),)),
    BALANCED: Preset(
        (PLAIN, BY_LOGITS, DATA_FREE, EQUALIZED, WITH_HEADROOM, UP_TO_CEILINGS),
        (RoundWeights(), RoundWeights(refit=True)),
        PREVIEW,
        (CorrectShifts(), CorrectLogits()),
        (MixChannels(),),
    ),
}
PRESETS[BEST] = PRESETS[BALANCED]


def get_preset(name: str) -> Preset:
    """Raises InputError, which lists them, where there is no preset ``name``."""
    if name not in PRESETS:
        raise no_such("quality", name, QUALITIES)
    return PRESETS[name]


def check_rounding(weight_rounding: str) -> str:
    """``weight_rounding`` itself. Raises InputError, which lists them, unless it is one of ``ROUNDINGS``."""
    if weight_rounding not in ROUNDINGS:
        raise no_such("rounding of weights", weight_rounding, ROUNDINGS)
    return weight_rounding


def check_method(method: str | None) -> str | None:
    """``method`` itself. Raises InputError, which lists them, unless it is one of ``METHODS`` or None."""
    if method is not None and method not in METHODS:
        raise no_such("calibration method", method, METHODS)
    return method


@dataclass(frozen=True)
class CalibrationConfig:
    """How a float network is calibrated.

    ``preset`` names one of :data:`PRESETS`: candidates that are tried, of which the one is kept whose logits are
    nearest to float's on images held back. ``method`` fixes how ranges are chosen. ``correct_bias=False`` and
    ``weight_rounding="nearest"`` leave steps out. The weights of the layers ``float_layers`` stay float32.
    """

    preset: str = DEFAULT_PRESET
    method: str | None = None
    correct_bias: bool = True
    weight_rounding: str = BY_GPTQ
    target: Target = MEGENGINE
    float_layers: tuple[str, ...] = ()

    def make_preset(self) -> Preset:
        """The preset to try, adapted to these options. Raises InputError for an unknown preset, method or rounding."""
        return adapt_preset(get_preset(self.preset), self)

    def as_flags(self) -> str:
        """The options of ``mgq calibrate`` that mean the same, each with a space before it."""
        flags = f" --method {self.method}" if self.method else f" --quality {self.preset}"
        flags += "" if self.correct_bias else " --no-bias-correction"
        return flags + ("" if self.weight_rounding == BY_GPTQ else " --nearest")


DEFAULT_CONFIG = CalibrationConfig()


def place_of_ranges(steps: tuple[Step, ...]) -> int:
    """How many of ``steps`` come before their ranges: all, where they have none."""
    places = (
        i for i, step in enumerate(steps) if isinstance(step, RangesFromLogits | RangesFromImages | ExpectedRanges)
    )
    return next(places, len(steps))


def with_rewrite(steps: tuple[Step, ...], rewrite: Step) -> tuple[Step, ...] | None:
    """``steps`` with ``rewrite`` before their ranges; None where no image gives these."""
    place = place_of_ranges(steps)
    if not steps[place:] or isinstance(steps[place], ExpectedRanges):
        return None
    return (*steps[:place], rewrite, *steps[place:])


def with_exact_scales(steps: tuple[Step, ...], target: Target) -> tuple[Step, ...]:
    """``steps`` with exact scales behind them, for a target that engines other than MegEngine run."""
    return steps if target is MEGENGINE else (*steps, ExactScales())


def data_free_steps(target: Target) -> tuple[Step, ...]:
    """What is done without images."""
    return (*with_exact_scales(DATA_FREE, target), CorrectExpectedBias())


def count_images_used(method: str | None, images: int) -> int:
    """How many of ``images`` pictures a calibration by ``method``, or by a preset, looks at."""
    return min(images, LAYERWISE_IMAGES) if method == EASYQUANT else images


def adapt_preset(preset: Preset, config: CalibrationConfig) -> Preset:
    """``preset``, reduced to what ``config`` asks for: ranges by one ``method``, nearest rounding, uncorrected biases.

    For a target that engines other than MegEngine run, every candidate has exact scales, and weights, of which each
    output has a scale of its own, are not fitted, because little error is left to correct.
    """
    method, target = check_method(config.method), config.target
    if method is not None:
        ranges = RangesFromLogits() if method == LOGITS else RangesFromImages(method)
        grids = (*(steps for steps in preset.grids if steps != DATA_FREE and steps != PLAIN),)
        swapped = (tuple(ranges if isinstance(step, RangesFromLogits) else step for step in steps) for steps in grids)
        preset = replace(preset, grids=tuple(dict.fromkeys(swapped)))
    if check_rounding(config.weight_rounding) == TO_NEAREST:
        plain = [steps for steps in preset.grids if not any(isinstance(step, Equalize) for step in steps)]
        kept = (tuple(step for step in steps if step != CLEAR) for steps in plain)
        preset = replace(preset, grids=tuple(dict.fromkeys(kept)), finishes=(CorrectBias(),), rewrites=())
    preset = replace(preset, grids=tuple(with_exact_scales(steps, target) for steps in preset.grids))
    if target is not MEGENGINE:
        finishes = (step for step in preset.finishes if not (isinstance(step, RoundWeights) and step.refit))
        preset = replace(preset, finishes=tuple(finishes))
    if not config.correct_bias:
        rounding = [replace(step, correct_bias=False) for step in preset.finishes if isinstance(step, RoundWeights)]
        preset = Preset(preset.grids, tuple(rounding), None, rewrites=preset.rewrites)
    return preset
