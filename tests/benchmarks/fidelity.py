"""How near int8 comes to float, with mgq and with other quantizers: ``python -m tests.benchmarks.fidelity --help``.

The same float network is quantized from the same pictures by mgq (each quality, min-max, without pictures) and by each
peer that is installed. What they make runs in OpenVINO on one thread, in float32 where it is not int8; mgq's own
also in ONNX Runtime and in the simulation. ::

    uv run --with nncf==2.19.0 python -m tests.benchmarks.fidelity -a mobilenet_v2 -c mobilenet_v2-b0353104.pth \\
        --calibration imagenet-sample --every 5 --other flowers/val

All peers are given mgq's own float ONNX file, and the pixels that the network sees of the pictures. ``uv run --with``
serves NNCF and ONNX Runtime. The others want versions of their own: make an environment for each, such as
``uv venv -p 3.10 ppq && uv pip install --python ppq/bin/python ppq==0.6.6 ...`` (a row of a peer that is missing says
what has to be in it), and name it: ``--python ppq=ppq/bin/python``. Each quantization has a process of its own, as long
and as large as the table says; the start of Python and imports are part of it.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tests.benchmarks import peers
from tests.benchmarks.cost import Cost, measured

if TYPE_CHECKING:
    from mgq.data.image_sources import Source
    from mgq.engine.classifier.open import Classifier

Pixels = npt.NDArray[np.uint8]
Logits = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]

UNKNOWN = -1
"""The label of a picture of a class that the network does not know."""
TWO_SIDED_95 = 1.959964
"""How many standard deviations around the mean hold 95 % of a normal distribution."""
NONE = "-"
SETS = ("unseen", "other")
COLUMNS = (
    *("quantizer", "runs in"),
    *(f"{what}, {where}" for where in SETS for what in ("dB", "same % (95 %)", "top-1 %", "as simulated %")),
    *("wall s", "processor s", "peak MB"),
)


class Way(NamedTuple):
    """How mgq quantizes: options of ``mgq calibrate``, and whether it looks at pictures."""

    options: tuple[str, ...]
    looks: bool = True


WAYS = {
    "fast": Way(("--quality", "fast")),
    "balanced": Way(("--quality", "balanced")),
    "best": Way(("--quality", "best")),
    "min-max": Way(("--method", "min-max")),
    # What a run was trained on would be answered by all its modes: one picture is little.
    "data-free": Way(("--data-free", "--limit", "1"), looks=False),
}


@dataclass(frozen=True)
class Images:
    """What the network sees of some pictures, uint8 (N, 3, S, S), and their labels (N,), ``UNKNOWN`` where it knows no
    such class."""

    pixels: Pixels
    labels: Labels

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Likeness:
    """How logits compare with those of float on ``images``.

    ``decibels``: energy of float's logits / energy of the difference, which a few pictures with large logits may make
    alone; ``middle``: that of the picture in the middle. ``same``: share (0..1) of pictures with the same
    answer, and the 95 % interval of it. ``top1``: share of right answers to the ``labelled`` ones, None without any;
    ``as_simulated``: share of the answers that the simulation gives, too, None where there is none.
    """

    images: int
    labelled: int
    decibels: float
    middle: float
    same: float
    interval: tuple[float, float]
    top1: float | None
    as_simulated: float | None = None


@dataclass(frozen=True)
class Row:
    """A line of the table. ``problem`` says why there are no numbers; ``cost`` is None where nothing was quantized."""

    quantizer: str
    engine: str = NONE
    likeness: dict[str, Likeness] = field(default_factory=dict)
    cost: Cost | None = None
    problem: str = ""


# ---- statistics ----


def wilson(right: int, of: int) -> tuple[float, float]:
    """The 95 % interval of a share of which ``right`` in ``of`` tries were seen (Wilson, 1927): two of 0..1.

    Unlike the standard error it is not empty where all or none were right. Raises ValueError without a try.
    """
    if not 0 <= right <= of or of == 0:
        raise ValueError(f"{right} of {of} is no share")
    share, squared = right / of, TWO_SIDED_95**2
    middle = (share + squared / (2 * of)) / (1 + squared / of)
    half = TWO_SIDED_95 * math.sqrt(share * (1 - share) / of + squared / (4 * of**2)) / (1 + squared / of)
    return max(0.0, middle - half), min(1.0, middle + half)


def decibels_of(found: Logits, exact: Logits) -> float:
    """10 log10(energy of ``exact`` / energy of the difference), both (N, C): infinite where they are equal."""
    from mgq.ptq.sensitivity import decibels

    signal, noise = exact.astype(np.float64), found.astype(np.float64) - exact
    return decibels(float(np.square(signal).sum()), float(np.square(noise).sum()))


def likeness_of(found: Logits, exact: Logits, labels: Labels, simulated: Logits | None = None) -> Likeness:
    """How ``found`` compares with ``exact``, both (N, C); ``labels`` (N,), ``simulated`` as ``found``."""
    answers = found.argmax(1)
    same = int((answers == exact.argmax(1)).sum())
    known = labels != UNKNOWN
    return Likeness(
        images=len(found),
        labelled=int(known.sum()),
        decibels=decibels_of(found, exact),
        middle=float(np.median([decibels_of(*pair) for pair in zip(found, exact, strict=True)])),
        same=same / len(found),
        interval=wilson(same, len(found)),
        top1=float((answers[known] == labels[known]).mean()) if known.any() else None,
        as_simulated=float((answers == simulated.argmax(1)).mean()) if simulated is not None else None,
    )


# ---- networks and pictures ----


def opened(arguments: argparse.Namespace) -> Classifier:
    """The float network."""
    from mgq.system.megengine_start import import_megengine

    import_megengine()
    from mgq.engine.classifier.open import open_classifier
    from mgq.quantization.modes import Mode

    return open_classifier(arguments.arch, arguments.checkpoint, mode=Mode.NORMAL, pretrained=arguments.pretrained)


def chosen(arguments: argparse.Namespace) -> dict[str, list[Source]]:
    """The pictures that calibrate, and those of each of ``SETS``."""
    from mgq.data.image_sources import expand
    from mgq.engine.calibration.calibration_run import spread_evenly

    calibration, other = (expand([str(folder)]) for folder in (arguments.calibration, arguments.other))
    if arguments.every:
        unseen = [source for place, source in enumerate(calibration) if place % arguments.every]
        calibration = calibration[:: arguments.every]
    else:
        unseen = expand([str(arguments.unseen)])
    limit = arguments.limit or max(len(unseen), len(other))
    return {
        "calibration": spread_evenly(calibration, arguments.images),
        "unseen": spread_evenly(unseen, limit),
        "other": spread_evenly(other, limit),
    }


def seen_by(classifier: Classifier, sources: Sequence[Source]) -> Images:
    """What ``classifier`` sees of ``sources``; a picture that cannot be read ends it all, so that all have the same."""
    from mgq.data.transforms import to_batch
    from mgq.engine.classifier.predict import read_crops
    from mgq.errors import InputError

    crops, labels = [], []
    places = places_of(classifier.classes)
    for source, crop in read_crops(classifier, sources):
        if isinstance(crop, InputError):
            raise crop
        crops.append(crop)
        labels.append(places.get(Path(str(source.path)).parent.name, UNKNOWN))
    return Images(to_batch(crops), np.array(labels, np.int64))


def places_of(classes: Sequence[str]) -> dict[str, int]:
    """Name of a folder -> index of the class; ImageNet's may be called by their wnids."""
    from mgq.data.imagenet_classes import imagenet_classes

    places = {name: place for place, name in enumerate(classes)}
    wnids = {entry.wnid: places[entry.name] for entry in imagenet_classes() if entry.name in places}
    return {**wnids, **places} if len(wnids) == len(classes) else places


# ---- running ----


def in_openvino(path: Path, pixels: Pixels) -> Logits:
    """The logits of a file for OpenVINO, ``.onnx`` or ``.xml``, with a batch of 1: float32 (N, classes)."""
    from mgq.export.onnx.onnx_file import import_package
    from mgq.runtime.openvino import settings_for

    core = import_package("openvino").Core()
    network = core.compile_model(core.read_model(str(path)), "CPU", settings_for(1))
    takes_pixels = network.input(0).get_element_type().get_type_name() == "u8"
    fed = [image[None] if takes_pixels else image[None].astype(np.float32) - peers.PIXEL_ZERO for image in pixels]
    return np.concatenate([network([image])[0].copy() for image in fed])


def in_onnxruntime(path: Path, pixels: Pixels) -> Logits:
    from mgq.runtime.onnxruntime import OnnxRuntime
    from mgq.runtime.protocol import run_in_batches

    return run_in_batches(OnnxRuntime(path), pixels)


ENGINES = {"OpenVINO": in_openvino, "ONNX Runtime": in_onnxruntime}


def simulated(checkpoint: Path, pixels: Pixels) -> Logits:
    """What fake quantization in MegEngine answers."""
    from mgq.engine.classifier.open import open_classifier
    from mgq.quantization.modes import Mode

    return in_megengine(open_classifier(None, checkpoint, mode=Mode.QAT), pixels)


def in_megengine(classifier: Classifier, pixels: Pixels) -> Logits:
    from mgq.engine.classifier.predict import BATCH

    parts = [classifier.logits(pixels[place : place + BATCH]) for place in range(0, len(pixels), BATCH)]
    return np.concatenate(parts)


@dataclass(frozen=True)
class Task:
    """What is done to one network: its options for mgq, its float file and answers, and all pictures."""

    network: list[str]
    target: str
    float_file: Path
    pixels_file: Path
    calibration: list[str]
    images: dict[str, Images]
    exact: dict[str, Logits]
    folder: Path

    def likeness(self, found: dict[str, Logits], simulation: dict[str, Logits] | None = None) -> dict[str, Likeness]:
        return {
            name: likeness_of(found[name], self.exact[name], own.labels, simulation[name] if simulation else None)
            for name, own in self.images.items()
        }

    def answers(self, run: Any, path: Path) -> dict[str, Logits]:
        """What ``run``, one of the runners above, makes of ``path`` for each of ``SETS``."""
        return {name: run(path, own.pixels) for name, own in self.images.items()}


def of_float(task: Task) -> Row:
    """The float file itself: how far it is from float in MegEngine."""
    return Row("float32", "OpenVINO", task.likeness(task.answers(in_openvino, task.float_file)))


def of_peer(task: Task, name: str, python: str) -> Row:
    path = task.folder / f"{name}{peers.PEERS[name].suffix}"
    command = [python, peers.__file__, name, str(task.float_file), str(task.pixels_file), str(path)]
    cost, said = measured(command, task.folder)  # some leave things where they run
    if cost.code:
        return Row(name, cost=cost, problem=last_line(said))
    try:
        return Row(name, "OpenVINO", task.likeness(task.answers(in_openvino, path)), cost)
    except Exception as error:  # whatever an engine has against a file of theirs is a result, too
        return Row(name, "OpenVINO", cost=cost, problem=last_line(str(error)))


def of_mgq(task: Task, name: str) -> list[Row]:
    """A row for the simulation and one for each of ``ENGINES``."""
    who, way = f"mgq {name}", WAYS[name]
    runs = task.folder / name
    images = ["--images", str(len(task.calibration)), *task.calibration] if way.looks else []
    command = [sys.executable, "-m", "mgq", "calibrate", *task.network, "--target", task.target]
    cost, said = measured([*command, "--save", str(runs), *way.options, *images])
    if cost.code:
        return [Row(who, cost=cost, problem=last_line(said))]
    (checkpoint,) = runs.glob("*/checkpoint.safetensors")
    path = dumped(checkpoint, task.folder / f"{name}.onnx")
    simulation = task.answers(simulated, checkpoint)
    engines = {"OpenVINO": in_openvino, "ONNX Runtime": in_onnxruntime}
    rows = [
        Row(who, engine, task.likeness(task.answers(run, path), simulation), cost) for engine, run in engines.items()
    ]
    return [*rows, Row(who, "simulation", task.likeness(simulation), cost)]


def dumped(checkpoint: Path, path: Path) -> Path:
    from mgq.engine.classifier.dump import dump_classifier
    from mgq.engine.classifier.open import open_classifier
    from mgq.quantization.modes import Mode

    dump_classifier(open_classifier(None, checkpoint, mode=Mode.QUANTIZED), path)
    return path


def last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "it says nothing")


# ---- the table ----


def cells(row: Row) -> tuple[str, ...]:
    """The texts of ``row`` under ``COLUMNS``."""
    shown: list[str] = []
    for name in SETS:
        found = row.likeness.get(name)
        shown += [NONE] * 4 if found is None else likeness_cells(found)
    cost = row.cost
    spent = [NONE] * 3 if cost is None else [f"{cost.seconds:.0f}", f"{cost.processor:.0f}", f"{cost.peak / 1e6:.0f}"]
    return (f"{row.quantizer}: {row.problem}" if row.problem else row.quantizer, row.engine, *shown, *spent)


def likeness_cells(found: Likeness) -> list[str]:
    low, high = found.interval
    same = f"{100 * found.same:.1f} ({100 * low:.1f}-{100 * high:.1f})"
    return [f"{found.decibels:.2f}", same, percent(found.top1), percent(found.as_simulated)]


def percent(share: float | None) -> str:
    return NONE if share is None else f"{100 * share:.1f}"


def count(text: str) -> int:
    """A whole number from 1. Raises ValueError for anything else."""
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


def make_parser(program: str, description: str | None) -> argparse.ArgumentParser:
    """The options that choose a network and pictures, of the benchmark ``program``."""
    parser = argparse.ArgumentParser(prog=f"python -m tests.benchmarks.{program}", description=description)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("-a", "--arch", help="as for mgq calibrate")
    parser.add_argument("-c", "--checkpoint", type=Path, help="as for mgq calibrate")
    parser.add_argument("--pretrained", action="store_true", help="as for mgq calibrate")
    parser.add_argument("--target", default="onnx", help="what mgq quantizes for: onnx or onnx-avx2")
    parser.add_argument("--calibration", type=Path, required=True, help="folder of the pictures that calibrate")
    parser.add_argument("--unseen", type=Path, help="folder of other pictures of the same kind")
    parser.add_argument("--every", type=count, help="every so many-th of --calibration calibrates, the rest is unseen")
    parser.add_argument("--other", type=Path, required=True, help="folder of pictures of another kind")
    parser.add_argument("--images", type=count, default=100, help="pictures that calibrate, at most, evenly spread")
    parser.add_argument("--limit", type=count, help="compare on so many pictures of either kind, evenly spread")
    return parser


def parse(parser: argparse.ArgumentParser, words: Sequence[str] | None) -> argparse.Namespace:
    """The options in ``words``; ends the program where they do not say which pictures are unseen."""
    found = parser.parse_args(words)
    if (found.every is None) == (found.unseen is None):
        parser.error("give either --unseen FOLDER or --every N")
    return found


def parsed(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = make_parser("fidelity", __doc__)
    for option, names in (("--mgq", list(WAYS)), ("--peers", list(peers.PEERS))):
        told = f"all by default, any of: {', '.join(names)}"
        parser.add_argument(option, nargs="*", choices=names, default=names, metavar="NAME", help=told)
    parser.add_argument("--python", action="append", default=[], metavar="PEER=FILE", help="the Python that has a peer")
    parser.add_argument("--json", type=Path, help="write all numbers to this file, too")
    found = parse(parser, words)
    pairs = [pair.partition("=") for pair in found.python]
    found.python = {name: str(Path(file).absolute()) for name, _, file in pairs}
    return found


def options_of(arguments: argparse.Namespace) -> list[str]:
    """The network's own options, for ``mgq calibrate``."""
    named = {"-a": arguments.arch, "-c": arguments.checkpoint}
    options = [text for option, value in named.items() if value is not None for text in (option, str(value))]
    return [*options, *(["--pretrained"] if arguments.pretrained else [])]


def task_of(arguments: argparse.Namespace, folder: Path) -> Task:
    from mgq.engine.classifier.dump import dump_classifier

    classifier = opened(arguments)
    sources = chosen(arguments)
    seen = {name: seen_by(classifier, found) for name, found in sources.items()}
    float_file, pixels_file = folder / "float.onnx", folder / "calibration.npy"
    dump_classifier(classifier, float_file, kind="onnx")
    np.save(pixels_file, seen["calibration"].pixels)
    return Task(
        network=options_of(arguments),
        target=arguments.target,
        float_file=float_file,
        pixels_file=pixels_file,
        calibration=[str(source.path) for source in sources["calibration"]],
        images={name: seen[name] for name in SETS},
        exact={name: in_megengine(classifier, seen[name].pixels) for name in SETS},
        folder=folder,
    )


def rows_of(task: Task, arguments: argparse.Namespace) -> Iterator[Row]:
    yield of_float(task)
    for name in arguments.mgq:
        yield from of_mgq(task, name)
    for name in arguments.peers:
        yield of_peer(task, name, arguments.python.get(name, sys.executable))


def main(arguments: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(prefix="mgq-") as folder:
        task = task_of(arguments, Path(folder))
        rows = []
        for row in rows_of(task, arguments):
            print("  ".join(cells(row)), file=sys.stderr, flush=True)
            rows.append(row)
    from mgq.bench.tables import markdown_table

    counts = ", ".join(told_of(name, own) for name, own in task.images.items())
    print(f"{' '.join(task.network)}: {len(task.calibration)} pictures calibrate; compared on {counts}\n")
    print(markdown_table(COLUMNS, [cells(row) for row in rows], left=2))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([as_data(row) for row in rows], indent=1) + "\n")


def told_of(name: str, images: Images) -> str:
    """How many there are, and on how many of them top-1 is measured."""
    return f"{len(images)} {name} ({int((images.labels != UNKNOWN).sum())} of classes that the network knows)"


def as_data(row: Row) -> dict[str, Any]:
    return {**asdict(row), "cost": row.cost._asdict() if row.cost is not None else None}


if __name__ == "__main__":
    from mgq.errors import MgqError

    try:
        main(parsed())
    except MgqError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
