"""Measures which exact rewrites of a network's ONNX file make it faster on this machine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path

from mgq.bench.cases import BenchmarkCase, LoadedWorker, run_cases
from mgq.bench.file_cases import read_stretched_size
from mgq.bench.settings import Precision, Settings
from mgq.bench.statistics import Speedup, measure_speedup
from mgq.bench.suite import start_worker
from mgq.bench.worker_loaders import FileLoader
from mgq.engine.classifier.dump import dump_classifier, source_of
from mgq.engine.classifier.open import Classifier
from mgq.errors import FailureError
from mgq.events import OnProgress, log_progress
from mgq.export.onnx.writer import plain_graph
from mgq.graph.rewrites import REWRITES
from mgq.io.temporary_folders import temporary_folder
from mgq.runtime.registry import choose_backend, get_backend

ROUNDS = 15


@dataclass(frozen=True)
class Form:
    """One way to write a network: names of rewrites, and how many times as fast as without any it is in ``engine``."""

    rewrites: tuple[str, ...]
    engine: str
    speedup: Speedup


def measure_forms(
    classifier: Classifier, batch: int = 1, on_progress: OnProgress = log_progress, rounds: int = ROUNDS
) -> list[Form]:
    """Every combination of rewrites that change the network, beside none, in the fastest installed engine for files.

    The native engine is not asked: its own layout leaves nothing to rewrite. One thread, interleaved rounds. The
    answers must be those of the plain file. Raises FailureError where an engine fails, InputError where none is
    installed.
    """
    settings = Settings(batch=batch, image_size=classifier.image_size, rounds=rounds)
    with temporary_folder() as folder:
        forms = [(), *list_applicable(classifier)]
        cases = []
        for number, rewrites in enumerate(forms):
            path = folder / f"{number}.onnx"
            dump_classifier(classifier, path, batch=batch, rewrites=rewrites)
            engine = choose_backend(path, "openvino" if get_backend("openvino").is_installed else "onnxruntime")
            start = partial(load_form, path, engine.key, settings, engine.package)
            precision = Precision.INT8 if classifier.fake_quantized is not None else Precision.FP32
            cases.append(BenchmarkCase(name_of(rewrites), precision, engine.name, start, answers="all"))
        entries = run_cases(cases, rounds, on_progress=on_progress)
    for entry in entries:
        if entry.problem is not None:
            raise FailureError(f"the form '{entry.case.network}' cannot be measured: {entry.problem}")
        if entry.agreement is None or not entry.agreement.holds:
            raise FailureError(f"the form '{entry.case.network}' gives other answers")
    plain = entries[0].rounds
    return [
        Form(rewrites, entry.case.engine, measure_speedup(entry.rounds, plain))
        for rewrites, entry in zip(forms, entries, strict=True)
    ]


def load_form(path: Path, key: str, settings: Settings, package: str) -> LoadedWorker:
    return LoadedWorker(
        start_worker(path.stem, FileLoader(key, path), 1, settings, package, stretched=read_stretched_size(path)),
        "",
        path.stat().st_size,
    )


def list_applicable(classifier: Classifier) -> Iterator[tuple[str, ...]]:
    """Every combination of the rewrites that change what is written without them."""
    graph = plain_graph(source_of(classifier), classifier.image_size)
    names = [name for name, rewrite in REWRITES.items() if rewrite(graph) is not graph]
    for number in range(1, len(names) + 1):
        yield from combinations(names, number)


def find_fastest(forms: Sequence[Form]) -> Form:
    """The fastest of ``forms``; the plain one, which is first, unless another is faster beyond doubt."""
    sure = [form for form in forms if form.speedup.low is not None and form.speedup.low > 1.0]
    return max(sure, key=lambda form: form.speedup.median, default=forms[0])


def name_of(rewrites: Sequence[str]) -> str:
    return " and ".join(rewrites) or "plain"
