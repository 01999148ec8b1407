"""What each step of post-training quantization does: ``python -m tests.benchmarks.steps --help``.

The steps of ``balanced`` one by one: in order, each on top of those before it, and alone, on top of plain min-max
ranges. Every result is compared with float on pictures that calibration did not see, in the simulation, in OpenVINO
and in ONNX Runtime, each on one thread. ::

    python -m tests.benchmarks.steps -a mobilenet_v2 -c mobilenet_v2-b0353104.pth \\
        --calibration imagenet-sample --every 5 --other flowers/val --limit 80

Nothing is held back here and nothing chosen: a step that harms is shown as it is.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from tests.benchmarks.fidelity import (
    ENGINES,
    SETS,
    Images,
    Logits,
    chosen,
    decibels_of,
    in_megengine,
    make_parser,
    opened,
    parse,
    seen_by,
)

if TYPE_CHECKING:
    from mgq.engine.classifier.open import Classifier
    from mgq.ptq.steps import Draft, Step

SIMULATION = "simulation"
COLUMNS = (
    "steps",
    *(f"{where}, {what}" for where in (SIMULATION, *ENGINES) for what in SETS),
    "same %, unseen / other",
)


class Recipe(NamedTuple):
    """``steps`` under the ``title`` of their row."""

    title: str
    steps: tuple[Step, ...]


def recipes() -> list[Recipe]:
    """Those of one step alone, then those in order; a step that a network cannot take has no row."""
    from mgq.ptq import steps as s

    plain, logits, exact = s.RangesFromImages(), s.RangesFromLogits(), s.ExactScales()
    clear, equal, ceilings, mix = s.ClearDeadChannels(), s.Equalize(), s.Equalize(to_ceilings=True), s.MixChannels()
    bias, rounding, shifts, touch = s.CorrectBias(), s.RoundWeights(), s.CorrectShifts(), s.CorrectLogits()
    alone = [
        Recipe("min-max", (plain,)),
        Recipe("alone: ranges by the logits", (logits,)),
        Recipe("alone: ranges by batch norms", (s.ExpectedRanges(),)),
        Recipe("alone: equalized", (clear, equal, plain)),
        Recipe("alone: equalized by batch norms", (clear, s.Equalize(data_free=True), plain)),
        Recipe("alone: equalized up to the ceilings", (clear, ceilings, plain)),
        Recipe("alone: channels mixed", (clear, mix, plain)),
        Recipe("alone: exact scales", (plain, exact)),
        Recipe("alone: biases corrected", (plain, bias)),
        Recipe("alone: weights rounded together", (plain, rounding)),
    ]
    in_order = [Recipe("in order: ranges by the logits", (clear, logits))]
    for name, way in (("equalized", equal), ("equalized up to the ceilings", ceilings)):
        grid: tuple[Step, ...] = (clear, way, logits, exact)
        mixed: tuple[Step, ...] = (clear, way, mix, logits, exact)
        in_order += [
            Recipe(f"in order: {name}", grid[:-1]),
            Recipe(f"in order: {name}, exact", grid),
            Recipe(f"in order: {name}, exact, rounded", (*grid, rounding)),
            Recipe(f"in order: {name}, exact, rounded, shifts corrected", (*grid, rounding, shifts)),
            Recipe(
                f"in order: {name}, exact, rounded, shifts corrected, logits centred", (*grid, rounding, shifts, touch)
            ),
            Recipe(f"in order: {name}, mixed", mixed[:-1]),
            Recipe(f"in order: {name}, mixed, exact, rounded", (*mixed, rounding)),
            Recipe(f"in order: {name}, mixed, exact, rounded, shifts corrected", (*mixed, rounding, shifts)),
        ]
    return [*alone, *in_order]


class Comparison(NamedTuple):
    """Pictures by ``SETS``, and float's logits for them."""

    images: Mapping[str, Images]
    exact: Mapping[str, Logits]

    def answers_of(self, draft: Draft, image_size: int) -> dict[tuple[str, str], Logits]:
        """Logits by where they were counted and for which pictures."""
        from mgq.export.onnx.writer import write_onnx
        from mgq.ptq.steps import logits_of

        watched = draft.watched
        assert watched is not None
        found: dict[tuple[str, str], Logits] = {
            (SIMULATION, name): logits_of(watched, own.pixels).astype(np.float32) for name, own in self.images.items()
        }
        with tempfile.TemporaryDirectory(prefix="mgq-") as folder:
            path = Path(folder) / "int8.onnx"
            write_onnx(watched, path, image_size=image_size, batch=1, provenance={})
            for engine, run in ENGINES.items():
                found |= {(engine, name): run(path, own.pixels) for name, own in self.images.items()}
        return found

    def cells(self, answers: Mapping[tuple[str, str], Logits]) -> list[str]:
        decibels = [f"{decibels_of(found, self.exact[name]):.1f}" for (_, name), found in answers.items()]
        alike = [answers[SIMULATION, name].argmax(1) == self.exact[name].argmax(1) for name in SETS]
        return [*decibels, " / ".join(f"{100 * float(np.mean(each)):.1f}" for each in alike)]


def rows_of(classifier: Classifier, fitted: Images, compared: Comparison, target: str) -> Iterator[list[str]]:
    from mgq.cpu_kernels.simulation import fast_simulation
    from mgq.errors import FailureError
    from mgq.graph.network_reader import keep_traces
    from mgq.ptq.pipeline import apply_steps
    from mgq.ptq.steps import Draft
    from mgq.quantization.targets import get_target

    reached: dict[tuple[Step, ...], Draft] = {(): Draft(classifier.network, fitted.pixels, get_target(target))}
    with fast_simulation(), keep_traces():
        for title, steps in recipes():
            try:
                draft = apply_steps(steps, reached)
            except FailureError as error:
                print(f"{title}: {error}", file=sys.stderr, flush=True)
                continue
            yield [title, *compared.cells(compared.answers_of(draft, classifier.image_size))]


def main(arguments: argparse.Namespace) -> None:
    from mgq.bench.tables import markdown_table

    classifier = opened(arguments)
    seen = {name: seen_by(classifier, found) for name, found in chosen(arguments).items()}
    fitted = seen.pop("calibration")
    exact = {name: in_megengine(classifier, own.pixels) for name, own in seen.items()}
    rows = []
    for row in rows_of(classifier, fitted, Comparison(seen, exact), arguments.target):
        print("  ".join(row), file=sys.stderr, flush=True)
        rows.append(row)
    counts = ", ".join(f"{len(own)} {name}" for name, own in seen.items())
    print(f"{classifier.spec.name}: {len(fitted)} pictures calibrate; dB of the logits on {counts}\n")
    print(markdown_table(COLUMNS, rows, left=1))


if __name__ == "__main__":
    from mgq.errors import MgqError

    try:
        main(parse(make_parser("steps", __doc__), None))
    except MgqError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
