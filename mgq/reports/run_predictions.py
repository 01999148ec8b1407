"""Measures a run's networks on labelled images, and finds the answers that int8 changed."""

from __future__ import annotations

from dataclasses import dataclass, replace

from mgq.data.datasets import Dataset
from mgq.engine.classifier.evaluate import batch_for, evaluate
from mgq.engine.classifier.labelled_sets import match_classes
from mgq.engine.classifier.mode_comparison import bytes_of, compare_modes, name_progress
from mgq.engine.classifier.open import Classifier, classifier_from, convert
from mgq.events import Callbacks, OnProgress
from mgq.quantization.modes import Mode
from mgq.reports.finished_run import Run
from mgq.reports.measurements import (
    FLOAT,
    INT8,
    SIMULATED,
    Change,
    Measurements,
    crops_at,
    find_changes,
    name_of,
    score_of,
    thumbnail_of,
)
from mgq.zoo.weight_loading import Weights


@dataclass(frozen=True)
class Networks:
    """The networks of a run by the names of :mod:`mgq.reports.measurements`; float or the others may be missing."""

    by_name: dict[str, Classifier]

    @property
    def any(self) -> Classifier:
        return next(iter(self.by_name.values()))

    def bytes_of(self, name: str) -> int:
        return bytes_of(self.by_name[name].network)


def networks_of(run: Run, normal: Weights | None) -> Networks:
    """``normal`` is the float network that the run began with, if there is one."""
    found: dict[str, Classifier] = {}
    if normal is not None:
        found[FLOAT] = classifier_from(normal, Mode.NORMAL)
        # Its input is what the run was for, also where the float weights were made for another size.
        found[FLOAT] = replace(found[FLOAT], image_size=run.info.image_size, classes=run.info.classes)
    if run.is_int8:
        found[SIMULATED] = classifier_from(run.weights, Mode.QAT)
        found[INT8] = convert(found[SIMULATED], Mode.QUANTIZED)
    return Networks(found)


def measure_networks(
    networks: Networks, dataset: Dataset, left_out: str, most: int, on_progress: OnProgress
) -> Measurements:
    """All ``networks`` on the labelled ``dataset``, and ``most`` of those whose answer changed, to be shown."""
    dataset = match_classes(dataset, networks.any.classes)
    by_name = networks.by_name
    batch = batch_for(networks.any.image_size)
    if by_name.keys() >= {FLOAT, SIMULATED}:
        three = compare_modes(by_name[FLOAT], by_name[SIMULATED], dataset, Callbacks(on_progress), batch_size=batch)
        found = {FLOAT: three.normal, SIMULATED: three.qat, INT8: three.quantized}
    else:
        found = {
            name: evaluate(classifier, dataset, batch_size=batch, on_progress=name_progress(name, on_progress))
            for name, classifier in by_name.items()
        }
    result = Measurements(dataset, found, left_out, {})
    chosen = choose_changes(result.groups, most)
    answers = {index: (before, after) for index, _, before, after in find_changes(*result.pair)} if result.pair else {}
    changes = {
        verdict: [change_of(by_name[FLOAT], by_name[INT8], result, index, *answers[index]) for index in group]
        for verdict, group in chosen.items()
    }
    return replace(result, changes=changes)


def choose_changes(groups: dict[str, list[int]], most: int) -> dict[str, list[int]]:
    """``most`` of all in ``groups``, one from each in turn, so that small groups are shown whole."""
    sizes = dict.fromkeys(groups, 0)
    while sum(sizes.values()) < most:
        wanting = [name for name, group in groups.items() if sizes[name] < len(group)]
        if not wanting:
            break
        for name in wanting[: most - sum(sizes.values())]:
            sizes[name] += 1
    return {name: group[: sizes[name]] for name, group in groups.items()}


def change_of(normal: Classifier, int8: Classifier, found: Measurements, index: int, before: int, after: int) -> Change:
    [crop] = crops_at(normal, found.dataset, [index])
    assert found.dataset.labels is not None
    guesses = [score_of(one, crop, answer) for one, answer in ((normal, before), (int8, after))]
    truth = found.last.classes[int(found.dataset.labels[index])]
    return Change(name_of(found.dataset, index), truth, guesses[0], guesses[1], *thumbnail_of(crop))
