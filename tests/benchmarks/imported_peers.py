"""An ONNX classifier of others in int8, by mgq and by other quantizers: ``python -m tests.benchmarks.imported_peers``.

All are given the file itself and the same photos: mgq as ``mgq calibrate -c FILE`` is, the others what the file is fed.
Answers to photos that none of them has seen, of the kind that the network knows and of another, are compared with the
file's own in float; then all files have turns in each engine, on one thread::

    uv run --with nncf==2.19.0 python -m tests.benchmarks.imported_peers mobilenet_v3_small.onnx \\
        --calibration flowers/train --unseen flowers/val --other imagenet-sample/val

``torch_exports.py`` beside this file makes such networks. NNCF's file is OpenVINO's own: ONNX Runtime
has no row of it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tests.benchmarks import peers
from tests.benchmarks.cost import measured
from tests.benchmarks.fidelity import Images, Likeness, last_line, likeness_of, percent, seen_by

if TYPE_CHECKING:
    from mgq.engine.classifier.open import Classifier
    from mgq.export.onnx.float_input import FloatInput

Run = Callable[[Any], npt.NDArray[np.float32]]
PEERS = ("nncf", "nncf-mixed", "ort-min-max", "ort-percentile")
SETS = ("unseen", "other")
COLUMNS = (
    *("network", "quantizer", "engine", "top-1 %, unseen", "same %, unseen", "dB, unseen", "middle dB, unseen"),
    *("same %, other", "dB, other", "middle dB, other", "ms", "float / int8"),
)
WARM_UP = 5


@dataclass(frozen=True)
class Contender:
    """A file in an engine: ``run`` takes what ``feed`` makes of pixels (1, 3, H, W)."""

    quantizer: str
    engine: str
    run: Run
    feed: Callable[[npt.NDArray[np.uint8]], Any]

    def answers(self, images: Images) -> npt.NDArray[np.float32]:
        return np.concatenate([self.run(self.feed(image[None])).copy() for image in images.pixels])


def in_openvino(path: Path) -> Run:
    from mgq.export.onnx.onnx_file import import_package
    from mgq.runtime.openvino import settings_for

    core = import_package("openvino").Core()
    request = core.compile_model(core.read_model(str(path)), "CPU", settings_for(1)).create_infer_request()
    return lambda fed: request.infer({0: fed}, share_inputs=True, share_outputs=False)[0]


def in_onnxruntime(path: Path) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda fed: session.run(None, {name: fed})[0]


ENGINES = {"OpenVINO": in_openvino, "ONNX Runtime": in_onnxruntime}


def contenders_of_peers(
    path: Path, fed: npt.NDArray[np.float32], kept: FloatInput, names: Sequence[str], folder: Path
) -> Any:
    """The float file ``path`` itself and what each of the peers ``names`` makes of it in ``folder``, in each engine."""
    yield from (Contender("float", engine, load(path), kept.to_input) for engine, load in ENGINES.items())
    np.save(folder / "fed.npy", fed)
    for name in names:
        made = folder / f"{path.stem}.{name}{peers.PEERS[name].suffix}"
        command = [sys.executable, peers.__file__, name, str(path.absolute()), str(folder / "fed.npy"), str(made)]
        cost, said = measured(command, folder)
        if cost.code:
            print(f"{name}: {last_line(said)}", file=sys.stderr, flush=True)
            continue
        engines = {"OpenVINO": in_openvino} if made.suffix == ".xml" else ENGINES
        yield from (Contender(name, engine, load(made), kept.to_input) for engine, load in engines.items())


def contenders_of_mgq(
    normal: Classifier, int8: Classifier, images: npt.NDArray[np.uint8], folder: Path
) -> Iterator[Contender]:
    """mgq's file for any engine, and that for an engine alone, in each engine that runs it; ``images`` calibrated."""
    from mgq.engine.classifier.deployment import write_candidates
    from mgq.engine.classifier.parity import list_backends

    _, plain, *forms = write_candidates(normal, int8, folder, images, fit=images)
    for engine in list_backends(plain):
        own = [path for path in forms if path.stem.endswith(f".{engine.key}")]
        for path in (plain, *own):
            name = "mgq, own form" if path in own else "mgq"
            yield Contender(name, engine.name, engine.load(path, 1).run, lambda image: image)


def milliseconds(contenders: Sequence[Contender], image: npt.NDArray[np.uint8], seconds: float) -> list[list[float]]:
    """What a picture takes in each of ``contenders``, which have their turns for so many seconds."""
    fed = [contender.feed(image) for contender in contenders]
    for contender, own in zip(contenders, fed, strict=True):
        for _ in range(WARM_UP):
            contender.run(own)
    taken: list[list[float]] = [[] for _ in contenders]
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for contender, own, turns in zip(contenders, fed, taken, strict=True):
            start = time.perf_counter()
            contender.run(own)
            turns.append((time.perf_counter() - start) * 1e3)
    return taken


def rows_of(path: Path, options: argparse.Namespace) -> Iterator[tuple[str, ...]]:
    from mgq.data.image_sources import expand
    from mgq.engine.calibration.calibration_run import calibrate, spread_evenly
    from mgq.engine.classifier.import_wish import ImportWish
    from mgq.engine.classifier.onnx_import import find_float_input, import_classifier
    from mgq.engine.classifier.open import convert
    from mgq.io.temporary_folders import temporary_folder
    from mgq.ptq.presets import CalibrationConfig
    from mgq.quantization.modes import Mode
    from mgq.quantization.targets import ONNX

    with temporary_folder() as folder:
        wish = ImportWish(labels=write_names(options.unseen, folder / "names.txt"))
        classifier, _ = import_classifier(path, wish, "")
    kept = find_float_input(classifier)
    fitted = spread_evenly(expand([str(options.calibration)]), options.images)
    sets = {
        name: seen_by(classifier, spread_evenly(expand([str(getattr(options, name))]), options.limit)) for name in SETS
    }
    found = calibrate(classifier, fitted, options.images, "", CalibrationConfig(options.quality, target=ONNX))
    pixels = seen_by(classifier, fitted).pixels
    with temporary_folder() as folder:
        int8 = convert(found.classifier, Mode.QUANTIZED)
        contenders = [*contenders_of_peers(path, kept.to_input(pixels), kept, options.peers, folder)]
        contenders += contenders_of_mgq(classifier, int8, pixels, folder)
        exact = {name: contenders[0].answers(images) for name, images in sets.items()}
        likeness = [
            {name: likeness_of(own.answers(images), exact[name], images.labels) for name, images in sets.items()}
            for own in contenders
        ]
        taken = milliseconds(contenders, sets["unseen"].pixels[:1], options.seconds)
    floats = {own.engine: turns for own, turns in zip(contenders, taken, strict=True) if own.quantizer == "float"}
    for own, found_likeness, turns in zip(contenders, likeness, taken, strict=True):
        yield cells(path.stem, own, found_likeness, turns, floats.get(own.engine))


def write_names(folder: Path, file: Path) -> Path:
    """Write the names of the classes in ``folder`` to ``file``."""
    file.write_text("\n".join(sorted(path.name for path in folder.iterdir() if path.is_dir())))
    return file


def cells(
    network: str, own: Contender, likeness: dict[str, Likeness], turns: list[float], floats: list[float] | None
) -> tuple[str, ...]:
    unseen, other = (likeness[name] for name in SETS)
    faster = ""
    if floats is not None:
        ratio = statistics.median(first / second for first, second in zip(floats, turns, strict=True))
        faster = f"{ratio:.2f}"
    return (
        *(network, own.quantizer, own.engine, percent(unseen.top1)),
        *(text for found in (unseen, other) for text in nearness_cells(found)),
        *(f"{statistics.median(turns):.2f}", faster),
    )


def nearness_cells(found: Likeness) -> tuple[str, ...]:
    return percent(found.same), f"{found.decibels:.1f}", f"{found.middle:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--calibration", type=Path, required=True, help="folder of the photos that calibrate")
    parser.add_argument("--unseen", type=Path, required=True, help="other photos, a folder for each class")
    parser.add_argument("--other", type=Path, required=True, help="photos of another kind")
    parser.add_argument("--images", type=int, default=100, help="photos that calibrate, evenly spread")
    parser.add_argument("--limit", type=int, default=250, help="photos compared of each kind")
    parser.add_argument("--quality", default="balanced")
    parser.add_argument("--seconds", type=float, default=10, help="for the turns of all")
    parser.add_argument("--peers", nargs="*", choices=list(peers.PEERS), default=PEERS)
    options = parser.parse_args()
    from mgq.bench.tables import markdown_table
    from mgq.system.megengine_start import import_megengine

    import_megengine()
    rows = []
    for path in options.files:
        for row in rows_of(path, options):
            print("  ".join(row), file=sys.stderr, flush=True)
            rows.append(row)
    print(markdown_table(COLUMNS, rows, left=3))


if __name__ == "__main__":
    main()
