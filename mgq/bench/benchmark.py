"""The whole benchmark: from settings to a report."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mgq.bench.contest import contest
from mgq.bench.engines import ENGINES, Loader, contestants
from mgq.bench.environment import Machine, this_machine
from mgq.bench.report import Report, rows_from
from mgq.bench.settings import Settings
from mgq.data.pictures import bundled_cat, read_picture
from mgq.data.transforms import eval_crop, to_batch
from mgq.engine.networks import versions
from mgq.events import OnProgress, silent

PICTURE = "the bundled photograph of a cat"
SHIFTED = ", shifted sideways from picture to picture"


def benchmark(
    settings: Settings | None = None,
    on_progress: OnProgress = silent,
    engines: Mapping[str, Loader] = ENGINES,
) -> Report:
    """Measure how fast every network of ``settings`` is in every engine of ``engines``.

    Everything runs in this process, in turns (see :func:`mgq.bench.contest.contest`); files for engines that
    read one go to a temporary folder. An engine that is missing, or gives other answers, costs only its row.
    """
    settings = settings or Settings()
    machine = this_machine()
    with tempfile.TemporaryDirectory(prefix="mgq-bench-") as folder:
        entries = contest(
            contestants(settings, Path(folder), engines),
            cat_batch(settings.batch, settings.image_size),
            settings.rounds,
            settings.seed,
            on_progress=on_progress,
        )
    rows = rows_from(entries, settings.batch)
    picture = PICTURE + (SHIFTED if settings.batch > 1 else "")
    return Report(settings, machine, versions(), picture, rows, notes_on(machine))


def cat_batch(batch: int, image_size: int) -> npt.NDArray[np.uint8]:
    """uint8 (batch, 3, image_size, image_size), BGR: the bundled cat, no two pictures alike."""
    crop = eval_crop(read_picture(bundled_cat()), image_size)
    return to_batch([np.roll(crop, number * image_size // batch, axis=1) for number in range(batch)])


def notes_on(machine: Machine) -> tuple[str, ...]:
    """What should be known of the machine before its numbers are compared with others."""
    if not machine.busy:
        return ()
    return (
        f"the machine was busy at the start (load {machine.load[0]:.2f} on {machine.usable_cores} cores): "
        "compare rows of this run with each other, not with other runs",
    )
