"""How much time post-training quantization may take: presets, lists of candidates for :mod:`mgq.ptq.pipeline`."""

from __future__ import annotations

from dataclasses import dataclass, replace

from mgq.errors import no_such
from mgq.ptq.steps import (
    ClearDeadChannels,
    CorrectBias,
    Equalize,
    ExactScales,
    ExpectedRanges,
    RangesByLogits,
    RangesBySeen,
    RoundWeights,
    Step,
)
from mgq.quantization.option_names import BALANCED, BEST, FAST, LOGITS, QUALITIES
from mgq.quantization.targets import MEGENGINE, Target

PREVIEWED = 16


@dataclass(frozen=True)
class Preset:
    """``grids``: candidates for equalization and ranges, each a list of steps. ``finishes``: what is tried on the best
    of them. ``preview``: what stands for the finish while grids are compared."""

    grids: tuple[tuple[Step, ...], ...]
    finishes: tuple[Step, ...]
    preview: Step | None


CLEAR, PREVIEW = ClearDeadChannels(), CorrectBias(images=PREVIEWED, of_logits=False)
PLAIN = (RangesBySeen(),)
BY_LOGITS = (CLEAR, RangesByLogits())
DATA_FREE = (CLEAR, Equalize(data_free=True), ExpectedRanges())
EQUALIZED = (CLEAR, Equalize(), RangesByLogits())
UP_TO_CEILINGS = (CLEAR, Equalize(to_ceilings=True), RangesByLogits())

DEFAULT_PRESET = BALANCED
PRESETS: dict[str, Preset] = {
    FAST: Preset((PLAIN, BY_LOGITS, DATA_FREE), (CorrectBias(),), PREVIEW),
    BALANCED: Preset(
        (PLAIN, BY_LOGITS, DATA_FREE, EQUALIZED, UP_TO_CEILINGS),
        (CorrectBias(), RoundWeights(), RoundWeights(refit=True)),
        PREVIEW,
    ),
}
PRESETS[BEST] = PRESETS[BALANCED]


def get_preset(quality: str) -> Preset:
    """Raises InputError, which lists them, where there is no ``quality``."""
    if quality not in PRESETS:
        raise no_such("quality", quality, QUALITIES)
    return PRESETS[quality]


def adapt_preset(
    preset: Preset, method: str | None, correct_bias: bool, compensate: bool, target: Target = MEGENGINE
) -> Preset:
    """``preset`` where no more is asked for: ranges by one ``method``, nearest rounding, biases as they are.

    For a ``target`` that engines other than MegEngine run, every candidate has exact scales, and weights, of which each
    output has a scale of its own, are not fitted: they leave little to be made up for.
    """
    if method is not None:
        ranges = RangesByLogits() if method == LOGITS else RangesBySeen(method)
        grids = (*(steps for steps in preset.grids if steps != DATA_FREE and steps != PLAIN),)
        swapped = (tuple(ranges if isinstance(step, RangesByLogits) else step for step in steps) for steps in grids)
        preset = replace(preset, grids=tuple(dict.fromkeys(swapped)))
    if not compensate:
        plain = [steps for steps in preset.grids if not any(isinstance(step, Equalize) for step in steps)]
        kept = (tuple(step for step in steps if step != CLEAR) for steps in plain)
        preset = replace(preset, grids=tuple(dict.fromkeys(kept)), finishes=(CorrectBias(),))
    if target is not MEGENGINE:
        grids = tuple((*steps, ExactScales()) for steps in preset.grids)
        finishes = (step for step in preset.finishes if not (isinstance(step, RoundWeights) and step.refit))
        preset = replace(preset, grids=grids, finishes=tuple(finishes))
    if not correct_bias:
        rounding = [replace(step, correct_bias=False) for step in preset.finishes if isinstance(step, RoundWeights)]
        preset = Preset(preset.grids, tuple(rounding), None)
    return preset
