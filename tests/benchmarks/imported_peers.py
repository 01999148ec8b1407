"""An ONNX classifier of others in int8, by mgq and by other quantizers: ``python -m tests.benchmarks.imported_peers``.

All are given the file itself and the same photos: mgq as ``mgq calibrate -c FILE`` is, the others what the file is fed.
Answers to photos that none of them has seen, of the kind that the network knows and of another, are compared with the
file's own in float; then all files have turns in each engine, on one thread::

    uv run --with nncf==2.19.0 python -m tests.benchmarks.imported_peers mobilenet_v3_small.onnx \\
        --calibration flowers/train --unseen flowers/val --other imagenet-sample/val

``torch_exports.py`` beside this file makes such networks. NNCF's file is OpenVINO's own: ONNX Runtime
has no row of it. One folder serves as ``--calibration`` and ``--unseen``: what calibrates is not compared. ``--keep
FOLDER`` keeps all files of a network in FOLDER/NETWORK, which ``kept_files.py`` gives turns again, in a quiet moment.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from tests.benchmarks import peers
from tests.benchmarks.cost import measured
from tests.benchmarks.fidelity import Images, Likeness, last_line, likeness_of, percent, seen_by
from tests.benchmarks.kept_files import (
    FLOAT,
    Contender,
    Fed,
    Speed,
    append_row,
    on_one_core,
    speed_cells,
    speeds_of,
    write_list,
)

if TYPE_CHECKING:
    from mgq.data.image_sources import Source
    from mgq.engine.classifier.open import Classifier
    from mgq.export.onnx.float_input import FloatInput

PEERS = ("nncf", "nncf-mixed", "ort-min-max", "ort-percentile")
SETS = ("unseen", "other")
COLUMNS = (
    *("network", "quantizer", "engine", "top-1 %, unseen", "same %, unseen", "dB, unseen", "middle dB, unseen"),
    *("same %, other", "dB, other", "middle dB, other", "ms", "float / int8"),
)


@dataclass(frozen=True)
class Row:
    network: str
    quantizer: str
    engine: str
    likeness: dict[str, Likeness]
    speed: Speed

    def cells(self) -> tuple[str, ...]:
        """The texts under ``COLUMNS``."""
        unseen, other = (self.likeness.get(name) for name in SETS)
        top1 = "-" if unseen is None else percent(unseen.top1)
        near = (text for found in (unseen, other) for text in nearness_cells(found))
        return (self.network, self.quantizer, self.engine, top1, *near, *speed_cells(self.speed))


def nearness_cells(found: Likeness | None) -> tuple[str, ...]:
    return ("-",) * 3 if found is None else (percent(found.same), f"{found.decibels:.1f}", f"{found.middle:.1f}")


# ---- files ----


def files_of_peers(path: Path, fed: npt.NDArray[np.float32], names: Sequence[str], folder: Path) -> Iterator[Contender]:
    """The float file ``path`` itself and what each of the peers ``names`` makes of it in ``folder``, in each engine.

    Float in ONNX Runtime is the first, and the measure of all: OpenVINO 2025.4.1, where it knows that it gets one
    picture, answers wrongly if an attention has as many heads as tokens.
    """
    both = ("ONNX Runtime", "OpenVINO")
    yield from (Contender(FLOAT, engine, path) for engine in both)
    given = folder / "fed.npy"
    np.save(given, fed)
    for name in names:
        made = folder / f"{name}{peers.PEERS[name].suffix}"
        command = [sys.executable, peers.__file__, name, str(path.absolute()), str(given), str(made)]
        cost, said = measured(command, folder)
        if cost.code:
            complain(name, last_line(said))
            continue
        yield from (Contender(name, engine, made) for engine in (both[1:] if made.suffix == ".xml" else both))
    given.unlink()


def files_of_mgq(
    path: Path, normal: Classifier, int8: Classifier, images: npt.NDArray[np.uint8], folder: Path
) -> Iterator[Contender]:
    """mgq's file for any engine, and that for an engine alone, in each engine that runs it, as ``mgq calibrate -c`` of
    ``path`` writes them; ``images`` calibrated."""
    from mgq.engine.classifier.deployment import deploy

    with on_one_core():
        found = deploy(normal, int8, folder / "mgq.onnx", images, source=path, fit=images)
    for row in found.rows:
        yield Contender("mgq", row.engine, found.path, takes_pixels=True)
        if row.path != found.path:
            part = f", {row.float_share:.0%} of the layers in float" if row.float_share else ""
            yield Contender(f"mgq, own form{part}", row.engine, row.path, takes_pixels=True)


def complain(who: str, what: str) -> None:
    print(f"{who}: {what}", file=sys.stderr, flush=True)


# ---- rows ----


def rows_of(path: Path, options: argparse.Namespace, folder: Path) -> Iterator[Row]:
    """A row for each file that is made in ``folder`` of the classifier ``path``, in each engine that runs it."""
    from mgq.engine.calibration.calibration_run import calibrate
    from mgq.engine.classifier.onnx_import import find_float_input
    from mgq.engine.classifier.open import convert
    from mgq.ptq.presets import CalibrationConfig
    from mgq.quantization.modes import Mode
    from mgq.quantization.targets import ONNX

    classifier = import_file(path, options.unseen)
    kept = find_float_input(classifier)
    fitted, *others = sources_of(options)
    sets = {name: seen_by(classifier, sources) for name, sources in zip(SETS, others, strict=True) if sources}
    pixels = seen_by(classifier, fitted).pixels
    fed = Fed(pixels[:1], kept.to_input(pixels[:1]))
    made = files_of_peers(path, kept.to_input(pixels), options.peers, folder)
    contenders = [own for own in made if outlives(own, fed)]
    calibrated = calibrate(classifier, fitted, options.images, "", CalibrationConfig(options.quality, target=ONNX))
    int8 = convert(calibrated.classifier, Mode.QUANTIZED)
    contenders += files_of_mgq(path, classifier, int8, pixels, folder)
    exact = {name: answers_of(contenders[0], images, kept) for name, images in sets.items()}
    near = {own: found for own in contenders if (found := likeness_to(exact, own, sets, kept)) is not None}
    write_list(folder, list(near), fed)
    speeds = speeds_of(list(near), fed, options.seconds)
    for (own, likeness), speed in zip(near.items(), speeds, strict=True):
        yield Row(path.stem, own.quantizer, own.engine, likeness, speed)


def import_file(path: Path, classes: Path) -> Classifier:
    """The classifier ``path``, with the names of the folders in ``classes`` where it has as many classes."""
    from mgq.engine.classifier.import_wish import NO_WISH, ImportWish
    from mgq.engine.classifier.onnx_import import import_classifier
    from mgq.errors import InputError
    from mgq.io.temporary_folders import temporary_folder

    with temporary_folder() as folder, contextlib.suppress(InputError):
        return import_classifier(path, ImportWish(labels=write_names(classes, folder / "names.txt")), "")[0]
    return import_classifier(path, NO_WISH, "")[0]


def sources_of(options: argparse.Namespace) -> tuple[list[Source], ...]:
    """The photos that calibrate, and those of each of ``SETS``."""
    from mgq.data.image_sources import expand
    from mgq.engine.calibration.calibration_run import spread_evenly

    fitted = spread_evenly(expand([str(options.calibration)]), options.images)
    others = (unused(getattr(options, name), fitted) for name in SETS)
    return fitted, *(spread_evenly(sources, options.limit) for sources in others)


def unused(folder: Path | None, fitted: Sequence[Source]) -> list[Source]:
    """The photos in ``folder`` but those ``fitted``."""
    from mgq.data.image_sources import expand

    return [source for source in expand([str(folder)]) if source not in fitted] if folder is not None else []


def answers_of(own: Contender, images: Images, kept: FloatInput) -> npt.NDArray[np.float32]:
    """What ``own`` answers to ``images``, (N, classes): shares where a file ends in a softmax, but logits by mgq."""
    run, fed = own.load(), images.pixels if own.takes_pixels else kept.to_input(images.pixels)
    return np.concatenate([run(fed[place : place + 1]).reshape(1, -1).copy() for place in range(len(fed))])


def outlives(own: Contender, fed: Fed) -> bool:
    """Whether a process is still there when it has run ``own``: a file may make OpenVINO 2025.4.1 end it."""
    tried = multiprocessing.get_context("spawn").Process(target=answer_once, args=(own, fed))
    tried.start()
    tried.join()
    if tried.exitcode:
        complain(f"{own.quantizer} in {own.engine}", f"ended the process ({tried.exitcode})")
    return not tried.exitcode


def answer_once(own: Contender, fed: Fed) -> None:
    own.load()(fed.to(own))


def likeness_to(
    exact: dict[str, npt.NDArray[np.float32]], own: Contender, sets: dict[str, Images], kept: FloatInput
) -> dict[str, Likeness] | None:
    """How ``own`` compares with ``exact``; None where its engine does not run it."""
    try:
        return {
            name: likeness_of(answers_of(own, images, kept), exact[name], images.labels)
            for name, images in sets.items()
        }
    except Exception as error:  # whatever an engine has against a file of others is a result, too
        complain(f"{own.quantizer} in {own.engine}", last_line(str(error)))
        return None


def write_names(folder: Path, file: Path) -> Path:
    """Write the names of the classes in ``folder`` to ``file``."""
    file.write_text("\n".join(sorted(path.name for path in folder.iterdir() if path.is_dir())))
    return file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--calibration", type=Path, required=True, help="folder of the photos that calibrate")
    parser.add_argument("--unseen", type=Path, required=True, help="other photos, a folder for each class")
    parser.add_argument("--other", type=Path, help="photos of another kind")
    parser.add_argument("--images", type=int, default=100, help="photos that calibrate, evenly spread")
    parser.add_argument("--limit", type=int, default=250, help="photos compared of each kind")
    parser.add_argument("--quality", default="balanced")
    parser.add_argument("--seconds", type=float, default=10, help="for the turns of all")
    parser.add_argument("--peers", nargs="*", choices=list(peers.PEERS), default=PEERS)
    parser.add_argument("--keep", type=Path, help="folder that keeps all files, one for each network")
    parser.add_argument("--rows", type=Path, help="a line of JSON for each file is appended to this one")
    options = parser.parse_args()
    from mgq.bench.tables import markdown_table
    from mgq.system.megengine_start import import_megengine

    import_megengine()
    rows = []
    for path in options.files:
        with folder_for(path, options.keep) as folder:
            for row in rows_of(path, options, folder):
                complain(path.stem, "  ".join(row.cells()[1:]))
                rows.append(row.cells())
                if options.rows is not None:
                    append_row(options.rows, asdict(row))
    print(markdown_table(COLUMNS, rows, left=3))


@contextlib.contextmanager
def folder_for(path: Path, keep: Path | None) -> Iterator[Path]:
    """Where the files that are made of ``path`` lie: in ``keep`` for good, else for a while."""
    from mgq.io.temporary_folders import temporary_folder

    if keep is None:
        with temporary_folder() as folder:
            yield folder
    else:
        folder = keep.absolute() / path.stem
        folder.mkdir(parents=True, exist_ok=True)
        yield folder


if __name__ == "__main__":
    main()
