"""Compares the float and the int8 file of one network on this machine, in each backend."""

from __future__ import annotations

import contextlib
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mgq.engine.classifier.dump import Dump, dump_classifier, source_of
from mgq.engine.classifier.engine_file import EngineFileWriter, FloatAnswers
from mgq.engine.classifier.onnx_import import find_float_input
from mgq.engine.classifier.open import Classifier, convert
from mgq.engine.classifier.parity import list_backends
from mgq.errors import MgqError
from mgq.export.onnx.onnx_file import read_onnx
from mgq.export.onnx.pixel_file import write_pixel_file
from mgq.export.onnx.writer import plain_graph
from mgq.graph.engine_forms import FIXED_BATCHES, FORMS, has_own_form
from mgq.io.atomic import atomic_write
from mgq.io.temporary_folders import temporary_folder
from mgq.machine import usable_cores
from mgq.ptq.pipeline import snr_of
from mgq.quantization.modes import Mode
from mgq.runtime.protocol import BatchRuntime, batches_of, run_in_batches
from mgq.runtime.registry import Backend
from mgq.system.processor_share import read_processor_time, share_of_others

ROUNDS, SECONDS = 60, (0.5, 3.0)
"""Turns that each file gets in an engine at least, and the seconds that all of them take, at least and at most."""
WARM_UP = 3
EQUAL_SPEED = 0.97
"""Share of float's speed below which a file counts as slower."""
MOST_LOST = 1.0
"""dB by which the form for an engine may be farther from float than that for any: calibration knows that one alone, and
what it made up for may not happen in others."""
NEAR = 40.0
"""dB from which on nothing is gained by being nearer to float: the noise is a hundredth of the logits."""
WORTHWHILE = 1.1
"""Share of float's speed below which int8 in all layers is compared with int8 in some of them."""

TRIED_SHARES = 0.25, 0.5, 0.625, 0.75, 0.9
"""Shares of the layers with weights that are tried in float32 there."""

Images = npt.NDArray[np.uint8]
Write = Callable[..., object]
"""Writes a network to ``path`` with a ``float_share``: :func:`mgq.engine.classifier.dump.dump_classifier` with its
other arguments, or :meth:`EngineFileWriter.write`."""


def is_slow(speedup: float | None) -> bool:
    return speedup is not None and speedup < EQUAL_SPEED


TIMING = "timing int8 beside float in each engine"
"""What is said of it before the work, which may take a minute."""


@dataclass(frozen=True)
class EngineRow:
    """The fastest int8 file beside float in one engine: milliseconds for a picture, the middle of all turns; what int8
    answers to the pictures, in percent of them as float does, and its logits against float's in dB.

    Float is mgq's file, or the imported one where the engine runs that sooner (``is_own_float``). An engine for int8
    alone has no float. ``path`` is the int8 file, ``float_share`` the part of its convolutions and
    linear layers that stay in float32 there, because the engine runs them sooner so. ``plain_speedup`` is the speed of
    the file for any engine, in terms of float's."""

    engine: str
    version: str
    float_ms: float | None
    int8_ms: float
    same: float
    snr: float
    path: Path
    float_share: float = 0.0
    plain_speedup: float | None = None
    is_own_float: bool = False

    @property
    def speedup(self) -> float | None:
        return None if self.float_ms is None else self.float_ms / self.int8_ms

    @property
    def is_slower(self) -> bool:
        return is_slow(self.speedup)

    @property
    def is_plain_slower(self) -> bool:
        """Whether the file for any engine is slower than float here."""
        return is_slow(self.plain_speedup)

    @property
    def is_hardly_faster(self) -> bool:
        return self.speedup is not None and self.speedup < WORTHWHILE


@dataclass(frozen=True)
class Deployment:
    """The int8 file for any engine, both sizes in bytes, the number of images compared, and a row for each engine;
    ``batch``, how many images were timed at once; ``others``, the part of the processor, 0 to 1, that other programs
    had meanwhile."""

    path: Path
    float_bytes: int
    int8_bytes: int
    images: int
    threads: int
    rows: tuple[EngineRow, ...]
    batch: int = 1
    others: float = 0.0

    @property
    def slower(self) -> tuple[str, ...]:
        """The engines in which int8 is slower than float."""
        return tuple(row.engine for row in self.rows if row.is_slower)

    @property
    def fastest_by_own(self) -> tuple[str, ...]:
        """The engines that run the imported file itself sooner than mgq's float file."""
        return tuple(row.engine for row in self.rows if row.is_own_float)

    @property
    def own_files_only(self) -> tuple[str, ...]:
        """The engines in which the file for any engine is slower than float, and their own is not."""
        rows = (row for row in self.rows if row.path != self.path and row.is_plain_slower)
        return tuple(row.engine for row in rows if not row.is_slower)

    @property
    def is_worthless(self) -> bool:
        """Whether int8 is slower than float in every engine here."""
        return bool(self.rows) and len(self.slower) == len(self.rows)

    @property
    def files(self) -> dict[Path, list[str]]:
        """The int8 files, that for any engine first -> the engines for which they are the fastest."""
        found: dict[Path, list[str]] = {self.path: []}
        for row in self.rows:
            found.setdefault(row.path, []).append(row.engine)
        return found

    def to_json(self) -> dict[str, Any]:
        rows = [{**vars(row), "path": str(row.path), "speedup": row.speedup} for row in self.rows]
        return {**vars(self), "path": str(self.path), "rows": rows}


@dataclass(frozen=True)
class FloatFile:
    """What int8 is compared with: the file ``path`` of ``size`` bytes, and its logits ``exact`` (N, classes) for
    ``images``, uint8 (N, 3, H, W); ``own``, the file that the network was imported from, for pixels."""

    path: Path
    size: int
    exact: npt.NDArray[np.float64]
    images: Images
    own: Path | None = None

    def load(self, engine: Backend) -> list[BatchRuntime]:
        """The float files that ``engine`` runs, mgq's first."""
        if not engine.reads(self.path):
            return []
        found: list[BatchRuntime] = [engine.load(self.path, usable_cores())]
        if self.own is not None:
            with contextlib.suppress(MgqError):  # it serves as a measure alone
                own = engine.load(self.own, usable_cores())
                own.run(self.images[:1])
                found.append(own)
        return found


@contextlib.contextmanager
def float_file_of(
    normal: Classifier, images: Images, source: Path | None = None, batch: int | None = 1
) -> Iterator[FloatFile]:
    """A float file of ``normal`` for ``batch`` pictures for a while, and the ``source`` that it was imported from.

    Raises as the dump does.
    """
    with temporary_folder() as folder:
        yield write_float_file(normal, images, source, folder, batch)


def write_float_file(
    normal: Classifier, images: Images, source: Path | None, folder: Path, batch: int | None = 1
) -> FloatFile:
    """As :func:`float_file_of`, in ``folder``, to be kept."""
    name = normal.spec.name
    dumped = dump_classifier(normal, folder / f"{name}.float.onnx", batch=batch)
    own = write_own_file(normal, images, source, folder / f"{name}.imported.onnx")
    return FloatFile(dumped.path, dumped.size, normal_logits(normal, images), images, own)


def write_own_file(normal: Classifier, images: Images, source: Path | None, path: Path) -> Path | None:
    """Write the file ``source``, which ``normal`` was imported from, to ``path`` for pixels as ``images`` are; None
    without one, and where it cannot be given such: it serves as a measure alone."""
    if source is None:
        return None
    try:
        return write_pixel_file(source, find_float_input(normal), (images.shape[2], images.shape[3]), path)
    except MgqError:
        return None


def deploy(
    normal: Classifier,
    int8: Classifier,
    path: Path,
    images: Images,
    keep_input: bool = False,
    source: Path | None = None,
    fit: Images | None = None,
) -> Deployment:
    """Write the int8 network to the ``.onnx`` file ``path``, and measure it beside a float file of ``normal``.

    Where an engine runs another form of it sooner, that lies in a file beside it, whose name has the engine's in it.
    ``images``: uint8 (N, 3, H, W), as the networks see them, by which files are compared; ``fit``: the same, by which
    the logits of such a form are corrected. ``keep_input`` is as for the dump. Float is the faster of that file and of
    ``source``, which ``normal`` was imported from. The float file, and that of an engine in ``FIXED_BATCHES``, takes a
    picture at a time; that at ``path`` takes any number. Raises as the dump does.
    """
    with float_file_of(normal, images, source) as beside:
        return deploy_beside(beside, int8, path, keep_input, find_float_answers(normal, fit))


def find_float_answers(normal: Classifier, fit: Images | None) -> FloatAnswers | None:
    return None if fit is None else FloatAnswers(fit, normal_logits(normal, fit))


def deploy_beside(
    beside: FloatFile, int8: Classifier, path: Path, keep_input: bool = False, wanted: FloatAnswers | None = None
) -> Deployment:
    """As :func:`deploy`, with the float files that are there; ``wanted``, what forms are corrected by."""
    int8 = convert(int8, Mode.QUANTIZED)
    dumped = dump_classifier(int8, path, batch=None, keep_input=keep_input)
    writers = [
        EngineFileWriter(int8, engine, keep_input, None if keep_input else FIXED_BATCHES.get(engine.key), wanted)
        for engine in list_backends(path)
    ]
    begin = read_processor_time()
    rows = tuple(measure_forms(beside, path, writer) for writer in writers)
    others = share_of_others(begin)
    drop_slower_forms(path, rows)
    return Deployment(path, beside.size, dumped.size, len(beside.images), usable_cores(), rows, others=others)


def measure_file(
    normal: Classifier, dumped: Dump, images: Images, write: Write, form: str, source: Path | None = None
) -> Deployment:
    """An int8 file that is there already beside a float one of ``normal``, or beside ``source``, which that was
    imported from, where an engine runs it sooner.

    ``write`` made it in the ``form`` for an engine. Where int8 in all layers is hardly faster there, it is written
    again with the layers in float that this engine runs sooner so. Raises as the dump does.
    """
    engines = sorted(list_backends(dumped.path), key=lambda engine: engine.key != form)
    batch = read_onnx(dumped.path).shape[0]
    with float_file_of(normal, images, source, batch) as beside:
        begin = read_processor_time()
        rows = tuple(measure_or_mend(beside, engine, dumped.path, write, form) for engine in engines)
        others, size = share_of_others(begin), dumped.path.stat().st_size
        return Deployment(dumped.path, beside.size, size, len(images), usable_cores(), rows, batch or 1, others)


def measure_or_mend(beside: FloatFile, engine: Backend, path: Path, write: Write, form: str) -> EngineRow:
    row = engine_row(engine, beside, [path])
    return try_float_layers(beside, row, engine, path, write) if engine.key == form else row


def measure_forms(beside: FloatFile, path: Path, writer: EngineFileWriter) -> EngineRow:
    """The fastest of the forms of an int8 network in the engine of ``writer``, which lies at ``path`` or beside it."""
    engine = writer.engine
    if engine.key not in FORMS:
        return engine_row(engine, beside, [path])
    row = engine_row(engine, beside, [path, *write_engine_form(writer, name_form(path, engine.key))])
    return try_float_layers(beside, row, engine, name_form(path, engine.key), writer.write)


def try_float_layers(beside: FloatFile, row: EngineRow, engine: Backend, path: Path, write: Write) -> EngineRow:
    """``row``, or where int8 is hardly faster than float in it, that of the file with the layers in float with which
    ``engine`` is the fastest: it lies at ``path`` then.
    """
    if not row.is_hardly_faster:
        return row
    best = row
    with temporary_folder() as folder:
        for number, share in enumerate(TRIED_SHARES):
            file = folder / f"{number}.onnx"
            write(path=file, float_share=share)
            # Two at once and no more: there is no memory for many large ones.
            found = engine_row(engine, beside, [best.path, file])
            if found.path == file and found.snr >= min(row.snr, NEAR):
                best = replace(found, float_share=share)
        if best.float_share:
            with atomic_write(path) as temporary:
                shutil.copyfile(best.path, temporary)
    if not best.float_share:
        return row
    found = engine_row(engine, beside, [path])
    return replace(found, float_share=best.float_share, plain_speedup=row.plain_speedup)


def write_candidates(
    normal: Classifier,
    int8: Classifier,
    folder: Path,
    images: Images,
    source: Path | None = None,
    fit: Images | None = None,
) -> list[Path]:
    """A float file in ``folder``, the ``source`` that it was imported from, the int8 file for any engine, and those
    that are faster in an engine that is installed: :func:`deploy` says how they are found. ``images`` and ``fit`` are
    as there. Raises as the dump does.
    """
    beside = write_float_file(normal, images, source, folder)
    wanted = find_float_answers(normal, fit)
    files = deploy_beside(beside, int8, folder / f"{normal.spec.name}.int8.onnx", wanted=wanted).files
    return [beside.path, *([beside.own] if beside.own else []), *files]


def write_engine_form(writer: EngineFileWriter, beside: Path) -> list[Path]:
    """The network in the form for an engine, in the file ``beside``; none where it needs no other for any number of
    pictures."""
    int8 = writer.int8
    graph = plain_graph(source_of(int8), int8.image_size)
    if writer.batch is None and not has_own_form(graph, writer.engine.key):
        beside.unlink(missing_ok=True)  # of another network that lay here
        return []
    return [writer.write(beside)]


def name_form(path: Path, engine: str) -> Path:
    """The file beside ``path`` for one engine alone."""
    return path.with_name(f"{path.stem}.{engine}{path.suffix}")


def drop_slower_forms(path: Path, rows: Sequence[EngineRow]) -> None:
    """Delete the files beside ``path`` that are the fastest in no engine."""
    kept = {row.path for row in rows}
    for engine in FORMS:
        beside = name_form(path, engine)
        if beside not in kept:
            beside.unlink(missing_ok=True)


def normal_logits(normal: Classifier, images: Images) -> npt.NDArray[np.float64]:
    return np.concatenate([normal.logits(images[i : i + 1]) for i in range(len(images))]).astype(np.float64)


def engine_row(engine: Backend, beside: FloatFile, integers: Sequence[Path]) -> EngineRow:
    """The fastest of the files ``integers``, that for any engine first, in ``engine`` beside float, or alone where it
    does not run that.

    Those that are farther from float than the first, and than ``NEAR``, by more than ``MOST_LOST`` are not taken.
    """
    candidates = [engine.load(path, usable_cores()) for path in integers]
    taken = milliseconds([*candidates, *beside.load(engine)], beside.images[:1])
    floats = taken[len(candidates) :]
    float_ms = min(floats, default=None)
    answers = [run_in_batches(runtime, beside.images).astype(np.float64) for runtime in candidates]
    nearness = [snr_of(found, beside.exact) for found in answers]
    least = min(nearness[0], NEAR) - MOST_LOST
    place = min((place for place in range(len(candidates)) if nearness[place] >= least), key=taken.__getitem__)
    same = float((beside.exact.argmax(1) == answers[place].argmax(1)).mean() * 100)
    return EngineRow(
        engine=candidates[place].name,
        version=candidates[place].version,
        float_ms=float_ms,
        int8_ms=taken[place],
        same=same,
        snr=nearness[place],
        path=integers[place],
        plain_speedup=None if float_ms is None else float_ms / taken[0],
        is_own_float=len(floats) > 1 and floats[1] < floats[0],
    )


def milliseconds(runtimes: Sequence[BatchRuntime], image: Images) -> list[float]:
    """The median time of each of ``runtimes`` for an image, in milliseconds; they run in turns, each the number of
    images that it takes."""
    batches = [batches_of(runtime.batch or 1, image)[0] for runtime in runtimes]
    for runtime, batch in zip(runtimes, batches, strict=True):
        for _ in range(WARM_UP):
            runtime.run(batch)
    taken: list[list[float]] = [[] for _ in runtimes]
    begin, (least, most) = time.perf_counter(), SECONDS
    while True:
        for runtime, batch, turns in zip(runtimes, batches, taken, strict=True):
            start = time.perf_counter()
            runtime.run(batch)
            turns.append((time.perf_counter() - start) * 1e3 / len(batch))
        seconds = time.perf_counter() - begin
        if seconds > most or (seconds > least and len(taken[0]) >= ROUNDS):
            return [statistics.median(turns) for turns in taken]
