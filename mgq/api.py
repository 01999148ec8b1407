"""The verbs that measure and train as plain Python calls, with the command line's words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from mgq.data.datasets import subset
from mgq.deprecation import accept_old_keywords
from mgq.engine.classifier import evaluate as evaluation
from mgq.engine.classifier.evaluate import Evaluation
from mgq.engine.classifier.open import find_newest_arch, open_classifier
from mgq.engine.training import training_run
from mgq.engine.training.train_options import TrainOptions
from mgq.engine.training.training_run import TrainResult
from mgq.events import NO_CALLBACKS, Callbacks, OnProgress, ignore_progress
from mgq.quantization.modes import Mode, parse_mode

BUILDER_OPTIONS = ("width", "activation")
PATHS = ("data", "save", "checkpoint", "recipe")


@accept_old_keywords(watcher="callbacks")
def train(callbacks: Callbacks = NO_CALLBACKS, **words: Any) -> TrainResult:
    """Train a float network, as ``mgq train`` does: ``mgq.train(arch="resnet18", data="flowers", epochs=20)``.

    ``words`` are the command's options with underscores: fields of
    :class:`mgq.engine.training.train_options.TrainOptions`, values of :class:`mgq.engine.training.recipe.Recipe`, and
    the builder's ``width`` and ``activation``. Raises InputError for words that cannot be, and what
    :func:`mgq.engine.training.training_run.train` raises.
    """
    return training_run.train(make_train_options(words), callbacks)


@accept_old_keywords(watcher="callbacks")
def qat(callbacks: Callbacks = NO_CALLBACKS, **words: Any) -> TrainResult:
    """Train on with fake quantization, as ``mgq qat`` does; ``words`` as for :func:`train`, and ``observer``,
    ``distill=True``."""
    return training_run.qat(make_train_options(words), callbacks)


def make_train_options(words: Mapping[str, Any]) -> TrainOptions:
    """``words`` sorted into what a request, a builder and a recipe know; names that none knows are the recipe's to
    refuse. None means: not said."""
    given = {name: value for name, value in words.items() if value is not None}
    known = {field.name for field in fields(TrainOptions)} - {"changes", "options"}
    plain: dict[str, Any] = {n: Path(value) if n in PATHS else value for n, value in given.items() if n in known}
    options = {name: value for name, value in given.items() if name in BUILDER_OPTIONS}
    changes = {name: value for name, value in given.items() if name not in known and name not in BUILDER_OPTIONS}
    return TrainOptions(**plain, options=options, changes=changes)


def evaluate(
    data: str | Path | None = None,
    arch: str | None = None,
    checkpoint: str | Path | None = None,
    mode: Mode | str = Mode.QUANTIZED,
    limit: int | None = None,
    jobs: int = 1,
    save: str | Path = "runs",
    on_progress: OnProgress = ignore_progress,
    key: str | None = None,
) -> Evaluation:
    """Measure a network on labelled pictures, as ``mgq eval`` does: top-1 and top-5 in percent, loss in nats.

    ``data`` is a folder of class folders (or one with ``val/``), by default what the run was measured on; ``key``
    chooses one of several networks in ``checkpoint``. Raises
    InputError where there are no weights or pictures, or their classes do not match.
    """
    wanted = mode if isinstance(mode, Mode) else parse_mode(mode)
    if arch is None and checkpoint is None:
        arch = find_newest_arch(Path(save), wanted)
    classifier = open_classifier(arch, Path(checkpoint) if checkpoint else None, wanted, Path(save), key=key)
    root = Path(data) if data is not None else None
    images = evaluation.evaluation_data(root, classifier.recipe, classifier.image_size, on_progress)
    if limit is not None:
        images = subset(images, limit)
    return evaluation.evaluate(classifier, images, jobs=jobs, on_progress=on_progress)
