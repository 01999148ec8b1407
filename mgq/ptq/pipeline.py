"""Runs post-training quantization: tries steps, and keeps those that help on images held back from them.

A preset is a list of candidates, each a list of steps. No step is applied because a list says so: candidates for the
grids (equalization and ranges) are compared first, then, in the best of them, mixed channels, ways to round the
weights, and last touches. What wins is what gives the logits nearest to float's on the images held back. Few images,
or few logits, leave much of that to chance: the less sure their verdict, the more weighs what is known beforehand.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any, TypeAlias, TypeVar

import megengine.module as M
import numpy as np
import numpy.typing as npt

from mgq.errors import FailureError, plural
from mgq.events import OnProgress, Progress, log_progress
from mgq.ptq.logit_gradients import value_ranges
from mgq.ptq.presets import Preset, place_of_ranges, with_rewrite
from mgq.ptq.second_process import open_second_process
from mgq.ptq.steps import (
    BATCH_NORMS,
    LAYERWISE_IMAGES,
    ClearDeadChannels,
    Draft,
    Equalize,
    ExpectedRanges,
    Images,
    RangesFromLogits,
    RoundWeights,
    Step,
    logits_of,
    split_float,
)
from mgq.ptq.stray_images import FAR, find_usual
from mgq.quantization.batch_norm_folding import fold_batch_norms
from mgq.system.side_process import SideProcess, begin, share_out

HELD_SHARE, FEWEST_HELD, MOST_HELD = 5, 8, 32
"""One image in this many is held back; the least and the most that are."""
FEWEST = 2 * FEWEST_HELD
"""Of fewer images none are held back: candidates are judged on those that they were fitted to."""
EQUAL = 0.05
"""dB by which a candidate with more steps has to be better."""
WITHOUT_IMAGES = 1.5
"""dB by which ranges that were chosen without images have to be better. A MobileNetV2 trained on 500 images had 24.8 dB
with them on images held back, against 23.9, and 15.8 on those that it was not trained on: they had clipped these."""
BY_LOGITS_GAIN, HEADROOM_GAIN, ROUNDING_GAIN = 0.5, 1.0, 1.0
"""dB that ranges by the logits, headroom, and weights rounded together are expected to gain on images that nobody has
seen, beforehand. Images held back hardly show what headroom is for: one of a hundred makes half of the noise by
clipping."""
DOUBT = 0.7
"""dB: what is expected beforehand weighs as much as images held back whose verdict has this standard error. Five logits
of 20 images leave 1 to 2 dB to chance, a thousand logits 0.3."""
MOST_DOUBT = 1.0
"""Beyond this standard error what is expected gains no more weight: with 1.4 it outvoted 2 dB on 8 images of a small
ShuffleNet, and was wrong by 0.7 dB on others."""
NO_NOISE = 200.0
ALIKE = 1e-6
"""Of the largest number: differences up to this are of rounding."""
LARGEST = 1e12
"""The largest number that a layer with weights may give. Trained ones give thousands."""

Steps: TypeAlias = tuple[Step, ...]
Kind = TypeVar("Kind", bound=np.generic)


@dataclass(frozen=True)
class Trial:
    """The result of a list of steps on the images held back: signal to noise ratio of the logits against float's, in
    dB."""

    steps: tuple[str, ...]
    snr: float


@dataclass(frozen=True)
class Candidate:
    """``grid`` and ``finish``: the steps that made it. ``base``: what ``grid`` gave. ``noise``, float64 (N,): squared
    difference of the logits from float's, of each image held back."""

    draft: Draft
    trial: Trial
    base: Draft
    noise: npt.NDArray[np.float64]
    grid: tuple[Step, ...] = ()
    finish: tuple[Step, ...] = ()

    @property
    def handicap(self) -> float:
        """dB by which it has to be better than others, however sure that is."""
        return WITHOUT_IMAGES if self.base.method == BATCH_NORMS else 0.0

    @property
    def expected(self) -> float:
        """dB that its steps are expected to gain beforehand."""
        return sum(gain_of(step) for step in (*self.grid, *self.finish))

    def lead(self, other: Candidate) -> float:
        """dB by which it is thought to be better than ``other`` on images that nobody has seen."""
        seen = self.trial.snr - self.handicap - (other.trial.snr - other.handicap)
        doubt = min(doubt_between(self.noise, other.noise), MOST_DOUBT)
        return seen + (self.expected - other.expected) * (doubt / DOUBT) ** 2


Attempt: TypeAlias = Candidate | FailureError
"""What a list of steps gave, or why it does not apply to the network."""


def gain_of(step: Step) -> float:
    """dB that ``step`` is expected to gain, beside the ways to do without it."""
    if isinstance(step, RangesFromLogits):
        return BY_LOGITS_GAIN + HEADROOM_GAIN * step.headroom
    return ROUNDING_GAIN if isinstance(step, RoundWeights) and not step.refit else 0.0


def doubt_between(noise: npt.NDArray[np.float64], other: npt.NDArray[np.float64]) -> float:
    """Standard error, in dB, of the ratio of two noises, (N,) each, of the same images; 0 where it cannot be told."""
    sums = noise.sum(), other.sum()
    if len(noise) < 2 or not np.isfinite(sums).all() or min(sums) <= 0:
        return 0.0
    difference = noise / noise.mean() - other / other.mean()
    return float(10 / np.log(10) * difference.std(ddof=1) / np.sqrt(len(noise)))


@dataclass(frozen=True)
class SearchResult:
    """The best draft, what was tried in order, and on how many images it was judged; whether those were held back."""

    draft: Draft
    best: Trial
    trials: tuple[Trial, ...]
    judged_on: int
    held_back: bool
    is_constant: bool = False
    """Whether float answered with the same logits to all of these images, which differ."""
    strays: int = 0
    """How many images were left out (:mod:`mgq.ptq.stray_images`)."""

    @property
    def network(self) -> M.Module:
        """The network in mode ``qat``, ready to be used."""
        assert self.draft.watched is not None
        return self.draft.watched

    def to_json(self) -> dict[str, Any]:
        """The steps that were kept, and what every candidate gave on the images that it was judged on."""
        tried = [{"steps": list(trial.steps), "snr": round(trial.snr, 2)} for trial in self.trials]
        return {
            "steps": list(self.best.steps),
            "tried": tried,
            "judged_on": self.judged_on,
            "held_back": self.held_back,
        }

    def remarks(self) -> list[str]:
        """What else is to be said, a line each: the summary first."""
        same = (
            f"float gives the same logits for all of {plural(self.judged_on, 'image')}: they do not depend on the "
            "picture, so that dB say nothing; check the weights, and --preprocess of an imported file"
        )
        far = (
            f"{plural(self.strays, 'image')} left out: float's logits for them are more than {FAR:.0f} times as large "
            "as for the middle one, and ranges for them would leave few levels for the others; train it for longer"
        )
        return [self.summary(), *([same] if self.is_constant else []), *([far] if self.strays else [])]

    def summary(self) -> str:
        """What was done and what was left out, in one line."""
        kept = {kind_of(step) for step in self.best.steps}
        others = dict.fromkeys(step for trial in self.trials for step in trial.steps if kind_of(step) not in kept)
        images = "image" if self.judged_on == 1 else "images"
        kind = f"{images} held back" if self.held_back else f"{images} that it was fitted to, too few to hold some back"
        left = f"; left out, as it did not help: {', '.join(others)}" if others else ""
        done = ", ".join(self.best.steps) or "nearest integers, ranges as they are"
        most = max(trial.snr for trial in self.trials)
        chance = f" (others up to {most:.1f}, thought to be chance)" if most > self.best.snr + EQUAL else ""
        return f"{done}: logits {self.best.snr:.1f} dB on {self.judged_on} {kind}{chance}{left}"


def kind_of(step: str) -> str:
    """The name of a step without the number of images that it took: tried with few and with all, it is one step."""
    return re.sub(r" on \d+ images?$", "", step)


def split(images: npt.NDArray[Kind]) -> tuple[npt.NDArray[Kind], npt.NDArray[Kind]]:
    """Images to fit to, and those held back: every fifth; with too few of them, all for both."""
    if len(images) < FEWEST:
        return images, images
    number = max(FEWEST_HELD, len(images) // HELD_SHARE)
    held = np.zeros(len(images), bool)
    held[np.linspace(0, len(images) - 1, number).round().astype(int)] = True
    return images[~held], images[held][:: -(-number // MOST_HELD)]


def snr_of(logits: npt.NDArray[np.float64], exact: npt.NDArray[np.float64]) -> float:
    """Energy of the ``exact`` logits / energy of the difference, in dB: at most 200, also where nothing differs."""
    return decibels_of(noise_of(logits, exact), exact)


def noise_of(logits: npt.NDArray[np.float64], exact: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """(N,): the squared difference of the ``logits`` (N, classes) of each image from the ``exact`` ones."""
    found: npt.NDArray[np.float64] = np.square(logits - exact).sum(axis=1)
    return found


def decibels_of(noises: npt.NDArray[np.float64], exact: npt.NDArray[np.float64]) -> float:
    """The same as :func:`snr_of`, of the noise of each image."""
    noise, signal = float(noises.sum()), float(np.square(exact).sum())
    if not np.isfinite(noise):
        return -NO_NOISE
    if noise == 0:
        return NO_NOISE
    return float(np.clip(10 * np.log10(max(signal, 1e-300) / noise), -NO_NOISE, NO_NOISE))


def find_best(
    network: M.Module,
    images: Images,
    preset: Preset,
    draft_of: Callable[[Images], Draft],
    on_progress: OnProgress = log_progress,
) -> SearchResult:
    """Try the candidates of ``preset`` on ``network`` (mode ``normal``) with ``images``, and return the best.

    ``images``: uint8 (N, 3, H, W). ``draft_of`` gives a fresh draft that is fitted to some images. A second core tries
    some of the candidates where there is one: the bits are the same. Raises FailureError where the answers of
    ``network`` are not finite, and the first candidate's error where no candidate for the grids applies to it.
    """
    fit, held = split(images)
    folded = fold_batch_norms(network)
    seconds = time_answer(folded, held[:1]) * len(held)
    with open_second_process(network, fit[:LAYERWISE_IMAGES], seconds) as side:
        refuse_huge_layers(folded, held[:1])  # meanwhile that process starts
        exact = finite_logits_of(folded, held)
        start = start_with(draft_of(fit), preset)
        usual = leave_out_strays(images, start.find_logits(), exact)
        if usual is not images:
            fit, held = split(usual)
            exact, start = finite_logits_of(folded, held), start_with(draft_of(fit), preset)
        contest = Contest(preset, Judge(held, exact), start, on_progress, side)
        best = contest.find_best()
    trials = tuple(each.trial for each in contest.tried)
    is_constant = are_all_alike(exact) and not are_all_alike(held)
    strays = len(images) - len(usual)
    return SearchResult(best.draft, best.trial, trials, len(held), held is not usual, is_constant, strays)


def time_answer(network: M.Module, images: Images) -> float:
    """Seconds that ``network`` takes for ``images``, once it has seen them."""
    logits_of(network, images)
    began = time.perf_counter()
    logits_of(network, images)
    return time.perf_counter() - began


def start_with(draft: Draft, preset: Preset) -> Draft:
    """``draft`` with what the steps of ``preset`` need to know first, measured by both processes before one is busy."""
    return draft.see_images() if needs_gradients(preset.grids) else draft


def leave_out_strays(images: Images, fit: npt.NDArray[np.float64], held: npt.NDArray[np.float64]) -> Images:
    """``images`` without strays (:mod:`mgq.ptq.stray_images`), the same object where there are none. ``fit`` and
    ``held`` are the logits of both parts into which they are :func:`split`."""
    order = np.append(*split(np.arange(len(images))))[: len(images)]
    strays = order[~find_usual(np.concatenate([fit, held])[: len(images)])]
    return np.delete(images, strays, axis=0) if strays.size else images


def are_all_alike(rows: npt.NDArray[Any]) -> bool:
    """Whether ``rows`` (N, ...) are the same N times, but for rounding."""
    spread = float(np.ptp(rows, axis=0).max())
    return spread <= ALIKE * max(float(np.abs(rows).max()), 1e-30)


def refuse_huge_layers(network: M.Module, images: Images) -> None:
    """Raises FailureError that names the first layer with weights that gives numbers whose squares float32 cannot add
    up: finite ones, that a layer behind may make small again."""
    layers = [name for name, module in network.named_modules() if name and hasattr(module, "weight")]
    for name, (low, high) in value_ranges(network, layers, split_float(images)).items():
        largest = max(-float(low.min()), float(high.max()))
        if largest > LARGEST:
            raise FailureError(
                f"the layer {name} gives numbers up to {largest:.0e}, more than calibration can reckon with: "
                "take other weights"
            )


def finite_logits_of(network: M.Module, images: Images) -> npt.NDArray[np.float64]:
    """Logits of ``network``, in float. Raises FailureError, which names the layer, where they are not finite."""
    logits = logits_of(network, images)
    if not np.isfinite(logits).all():
        leaves = [name for name, module in network.named_modules() if name and not any(module.children())]
        value_ranges(network, leaves, split_float(images))
        raise FailureError("the network's answers are not finite for these pictures: take other weights")
    return logits


@dataclass(frozen=True)
class Judge:
    """Judges drafts on ``held``, images held back, by the ``exact`` logits of float for them."""

    held: Images
    exact: npt.NDArray[np.float64]

    def judge(self, grid: Steps, finish: Steps, draft: Draft, base: Draft) -> Candidate:
        """``draft``, made by the steps of ``grid``, which gave ``base``, and ``finish``."""
        assert draft.watched is not None
        noise = noise_of(logits_of(draft.watched, self.held), self.exact)
        trial = Trial(tuple(step.name for step in (*grid, *finish)), decibels_of(noise, self.exact))
        return Candidate(draft, trial, base, noise, grid, finish)

    def try_grids(self, family: Family) -> list[Attempt]:
        """What each grid of ``family`` gives, or why it does not apply to this network."""
        found: list[Attempt] = []
        reached = dict(family.reached)
        for grid in family.grids:
            try:
                base = apply_steps(grid, reached)
            except FailureError as error:  # it cannot be followed, has no ceilings, or nothing to be mixed
                found.append(error)
                continue
            found.append(self.judge(grid, family.finish, apply_steps(family.finish, {(): base}), base))
        return found

    def try_finishes(self, grid: Steps, base: Draft, finishes: Steps) -> list[Candidate]:
        """Each of ``finishes`` on ``base``, which ``grid`` gave."""
        return [self.judge(grid, (step,), step.apply(base), base) for step in finishes]


@dataclass(frozen=True)
class Family:
    """``grids`` that begin alike, each to be tried with ``finish``. ``reached``: drafts by the steps that gave them."""

    grids: tuple[Steps, ...]
    finish: Steps
    reached: Mapping[Steps, Draft]


def is_data_free(grid: Steps) -> bool:
    """Whether ``grid`` needs no images."""
    return any(isinstance(step, ExpectedRanges) for step in grid)


def needs_gradients(grids: Iterable[Steps]) -> bool:
    """Whether some step goes by the reactions of the logits, or finds them out for those behind it."""
    kinds = ClearDeadChannels | Equalize | RangesFromLogits
    return any(isinstance(step, kinds) for grid in grids if not is_data_free(grid) for step in grid)


@dataclass(frozen=True)
class Rewrite:
    """``grid``, in which a step comes before its ranges, and the ``rest`` of it after that step. ``reached``: drafts by
    the steps after it. ``tried``: what it gave by the finish."""

    grid: Steps
    rest: Steps
    reached: dict[Steps, Draft]
    tried: dict[Steps, Attempt] = field(default_factory=dict)

    def try_with(self, finish: Steps, judge: Judge) -> Attempt:
        """What it gives with ``finish``, or why its ranges do not apply to the network."""
        if finish not in self.tried:
            try:
                draft = apply_steps((*self.rest, *finish), self.reached)
                self.tried[finish] = judge.judge(self.grid, finish, draft, self.reached[self.rest])
            except FailureError as error:
                self.tried[finish] = error
        return self.tried[finish]


@dataclass
class Contest:
    """Candidates of ``preset`` that begin with ``start``, judged by ``judge``, some of them in the ``side`` process.

    ``skipped``: how many of the preset's candidates do not apply to this network.
    """

    preset: Preset
    judge: Judge
    start: Draft
    on_progress: OnProgress
    side: SideProcess | None
    skipped: int = 0
    tried: list[Candidate] = field(default_factory=list)
    done: int = 0

    def find_best(self) -> Candidate:
        """Try them all. Raises the first error where no candidate for the grids applies to the network."""
        best = choose_best(self.try_families(self.make_families()))
        rewrites = self.rewrite(best)
        finishing = begin(self.side, self.judge.try_finishes, best.grid, best.base.forget(), self.preset.finishes)
        if self.side is not None:  # meanwhile what is likely: that the first finish is the best
            for each in rewrites:
                each.try_with(self.preset.finishes[:1], self.judge)
        best = choose_best([best, *self.add([replace(each, base=best.base) for each in finishing.result()])])
        for each in rewrites:
            best = choose_best([best, *self.add([each.try_with(best.finish, self.judge)])])
        return self.try_touches(best)

    def try_touches(self, best: Candidate) -> Candidate:
        """The better of ``best`` and what last touches make of it."""
        for step in self.preset.touches:
            draft = step.apply(best.draft)
            [touched] = self.add([self.judge.judge(best.grid, (*best.finish, step), draft, draft)])
            best = choose_best([best, touched])
        return best

    def make_families(self) -> list[Family]:
        """The preset's grids; those together that have the same steps before their ranges."""
        reached: dict[Steps, Draft] = {(): self.start}
        for grid in self.preset.grids:
            if isinstance(grid[0], ClearDeadChannels) and grid[:1] not in reached:
                with contextlib.suppress(FailureError):  # each grid will raise it again
                    reached[grid[:1]] = grid[0].apply(self.start)
        finish = (self.preset.preview,) if self.preset.preview else ()
        together = groupby(self.preset.grids, lambda grid: grid[: place_of_ranges(grid)])
        return [Family(tuple(grids), finish, reached) for _, grids in together]

    def try_families(self, families: Sequence[Family]) -> list[Candidate]:
        """What all grids gave, in order. Raises the first error where none applies, and where a layer gives numbers
        that are not finite."""
        if needs_gradients(self.preset.grids):
            _ = self.start.reactions  # by both processes, before one of them is busy
        order = sorted(families, key=lambda family: sum(map(len, family.grids)), reverse=True)
        attempts = share_out(self.side, order, self.judge.try_grids, self.count)
        of = dict(zip((each.grids for each in order), attempts, strict=True))
        found = [attempt for each in families for attempt in of[each.grids]]
        self.tried += [attempt for attempt in found if isinstance(attempt, Candidate)]
        if not self.tried:
            raise next(attempt for attempt in found if isinstance(attempt, FailureError))
        return list(self.tried)

    def rewrite(self, best: Candidate) -> list[Rewrite]:
        """The preset's rewrites in the grid of ``best``: those that apply."""
        found = []
        for step in self.preset.rewrites:
            grid = with_rewrite(best.grid, step)
            with contextlib.suppress(FailureError):  # nothing can be mixed
                if grid is not None:
                    found.append(Rewrite(grid, grid[grid.index(step) + 1 :], {(): step.apply(best.base)}))
        self.skipped += len(self.preset.rewrites) - len(found)
        return found

    def add(self, attempts: Sequence[Attempt]) -> list[Candidate]:
        """Note what was tried; those of the ``attempts`` that are candidates."""
        found = [each for each in attempts if isinstance(each, Candidate)]
        self.tried += found
        self.count(attempts)
        return found

    def count(self, attempts: Sequence[Attempt]) -> None:
        """Tell how many candidates were tried, and note how many cannot be."""
        new = sum(isinstance(each, Candidate) for each in attempts)
        self.skipped += len(attempts) - new
        if new:
            self.done += new
            self.on_progress(Progress("calibrate: candidates", self.done, self.preset.trials - self.skipped, "tried"))


def choose_best(candidates: Sequence[Candidate]) -> Candidate:
    """The first, unless a later one is better by enough."""
    best = candidates[0]
    for candidate in candidates[1:]:
        if candidate.lead(best) > EQUAL:
            best = candidate
    return best


def apply_steps(steps: Sequence[Step], reached: dict[tuple[Step, ...], Draft]) -> Draft:
    """Apply ``steps``, beginning with the longest prefix in ``reached``; record every result there."""
    done: tuple[Step, ...] = ()
    for step in steps:
        further = (*done, step)
        if further not in reached:
            reached[further] = step.apply(reached[done])
        done = further
    return reached[done]
