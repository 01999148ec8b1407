"""The verbs that measure and train as plain Python calls, with the command line's words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mgq.bench.settings import ROUNDS, Load, Precision, make_settings
from mgq.data.datasets import subset
from mgq.deprecation import accept_old_keywords
from mgq.engine.calibration.calibrate_options import CalibrateOptions
from mgq.engine.classifier import evaluate as evaluation
from mgq.engine.classifier.evaluation_result import Evaluation
from mgq.engine.classifier.labelled_sets import evaluation_data
from mgq.engine.classifier.network_choice import choose_network
from mgq.engine.classifier.network_options import RUNS, NetworkOptions, Usage
from mgq.engine.classifier.run_lookup import find_newest_arch
from mgq.errors import no_such
from mgq.events import NO_CALLBACKS, Callbacks, OnProgress, log_progress
from mgq.machine import load_megengine
from mgq.quantization.option_names import Mode, parse_mode

if TYPE_CHECKING:
    from mgq.bench.benchmark_report import Report as BenchmarkReport
    from mgq.engine.calibration.calibration_job import CalibrationResult
    from mgq.engine.training.train_options import TrainOptions
    from mgq.engine.training.training_run import TrainResult

BUILDER_OPTIONS = ("width", "activation")
PATHS = ("data", "save", "checkpoint", "recipe", "ranges_file")


def calibrate(callbacks: Callbacks = NO_CALLBACKS, **words: Any) -> CalibrationResult:
    """Make a float network ready for int8 without training, as ``mgq calibrate`` does.

    ``words``: keyword arguments, the fields of :class:`mgq.engine.calibration.calibrate_options.CalibrateOptions`:
    ``mgq.calibrate(files=["photos"], arch="resnet18", target="onnx")``. Writes ``<save>/<arch>.calibration``; the
    result names its ``checkpoint`` and, where there are labelled images, the accuracy of float and int8. Raises
    InputError for unknown and invalid arguments, and as :func:`mgq.engine.calibration.calibration_job.run_calibration`
    does.
    """
    load_megengine()
    from mgq.engine.calibration.calibration_job import run_calibration

    known = {field.name for field in fields(CalibrateOptions)}
    unknown = next((name for name in words if name not in known), None)
    if unknown is not None:
        raise no_such("option of calibrate", unknown, sorted(known))
    return run_calibration(CalibrateOptions(**with_paths(words)), callbacks)


def benchmark(
    networks: Sequence[str] = (),
    precisions: Sequence[str] = (),
    threads: Sequence[int | str] = (),
    rounds: int = ROUNDS,
    batch: int = 1,
    image_size: int = 224,
    load: str = Load.LATENCY.value,
    against: Sequence[str | Path] = (),
    on_progress: OnProgress = log_progress,
) -> BenchmarkReport:
    """Measure how many images a second each network takes in every backend, as ``mgq bench`` does.

    ``networks``: names of the zoo, by default those of the public example; ``precisions``: ``fp32``, ``int8`` or both;
    ``threads``: numbers or ``all``; ``against``: other ONNX files. Raises InputError as
    :func:`mgq.bench.settings.make_settings` does.
    """
    from mgq.bench.benchmark import benchmark as run_benchmark

    wrong = next((name for name in precisions if name not in [known.value for known in Precision]), None)
    if wrong is not None:
        raise no_such("precision", wrong, [known.value for known in Precision])
    settings = make_settings(
        networks=networks,
        precisions=[Precision(name) for name in precisions],
        threads=[str(number) for number in threads],
        rounds=rounds,
        batch=batch,
        image_size=image_size,
        load=load,
        against=[Path(path) for path in against],
    )
    return run_benchmark(settings, on_progress)


@accept_old_keywords(watcher="callbacks")
def train(callbacks: Callbacks = NO_CALLBACKS, **words: Any) -> TrainResult:
    """Train a float network, as ``mgq train`` does: ``mgq.train(arch="resnet18", data="flowers", epochs=20)``.

    ``words``: keyword arguments, which are the command's options with underscores: fields of
    :class:`mgq.engine.training.train_options.TrainOptions`, values of :class:`mgq.engine.training.recipe.Recipe`, and
    the builder's ``width`` and ``activation``. Raises InputError for unknown and invalid arguments, and as
    :func:`mgq.engine.training.training_run.train` does.
    """
    load_megengine()
    from mgq.engine.training import training_run

    return training_run.train(make_train_options(words), callbacks)


@accept_old_keywords(watcher="callbacks")
def qat(callbacks: Callbacks = NO_CALLBACKS, **words: Any) -> TrainResult:
    """Train for int8 with fake quantization, as ``mgq qat`` does; ``words`` as for :func:`train`, and ``observer`` and
    ``distill``."""
    load_megengine()
    from mgq.engine.training import training_run

    return training_run.qat(make_train_options(words), callbacks)


def make_train_options(words: Mapping[str, Any]) -> TrainOptions:
    """``words`` sorted into what a request, a builder and a recipe know; names that none knows are the recipe's to
    refuse. None means: not said."""
    from mgq.engine.training.train_options import TrainOptions

    given = {name: value for name, value in words.items() if value is not None}
    known = {field.name for field in fields(TrainOptions)} - {"changes", "options"}
    plain = with_paths({name: value for name, value in given.items() if name in known})
    options = {name: value for name, value in given.items() if name in BUILDER_OPTIONS}
    changes = {name: value for name, value in given.items() if name not in known and name not in BUILDER_OPTIONS}
    return TrainOptions(**plain, options=options, changes=changes)


def with_paths(words: Mapping[str, Any]) -> dict[str, Any]:
    """``words`` with a Path for each that names a file or folder."""
    return {name: Path(value) if name in PATHS and value is not None else value for name, value in words.items()}


def evaluate(
    data: str | Path | None = None,
    arch: str | None = None,
    checkpoint: str | Path | None = None,
    mode: Mode | str | None = None,
    limit: int | None = None,
    jobs: int = 1,
    save: str | Path = RUNS,
    on_progress: OnProgress = log_progress,
    key: str | None = None,
    engine: str | None = None,
) -> Evaluation:
    """Measure a network on labelled pictures, as ``mgq eval`` does: top-1 and top-5 in percent, loss in nats.

    ``data`` is a folder of class folders (or one with ``val/``), by default what the run was measured on; ``key``
    chooses one of several networks in ``checkpoint``, which may be a deployed file, run in ``engine``. ``mode`` is
    int8, or what a deployed file is in, unless it is given. Raises InputError where there are no weights or pictures,
    or their classes do not match.
    """
    wanted = parse_mode(mode) if mode is not None else None
    if arch is None and checkpoint is None:
        arch = find_newest_arch(Path(save), wanted or Mode.QUANTIZED)
    options = NetworkOptions(arch, Path(checkpoint) if checkpoint else None, key, Path(save), engine=engine)
    classifier = choose_network(options, wanted, Usage(kept=True))
    root = Path(data) if data is not None else None
    images = evaluation_data(root, classifier.recipe, classifier.image_size, on_progress)
    if limit is not None:
        images = subset(images, limit)
    return evaluation.evaluate(classifier, images, jobs=jobs, on_progress=on_progress)
