"""What the tests of networks share: MegEngine without its noise, made-up weights and pictures, networks built once."""

from __future__ import annotations

import json
import os
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

# Each of the processes that share the tests has one core, and threads that wait for work by spinning take it from
# others. OpenBLAS reads the first when numpy is loaded, MegEngine the second when the first tensor is made.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MGB_WORKER_MAX_SPIN", "1")

import cv2
import numpy as np
import numpy.typing as npt
import pytest

from mgq.system.megengine_start import import_megengine
from mgq.zoo.network_state import set_state, state_of

import_megengine()

import megengine.module as M  # noqa: E402
from megengine import Tensor  # noqa: E402

from mgq.cli.main import run  # noqa: E402
from mgq.engine.classifier import deployment  # noqa: E402
from mgq.engine.classifier.open import Classifier  # noqa: E402
from mgq.quantization.activation_ranges import ActivationRanges, apply_ranges  # noqa: E402
from mgq.quantization.modes import Mode, to_mode  # noqa: E402
from mgq.zoo import shufflenet_v1  # noqa: E402
from mgq.zoo.layers import without_initialization  # noqa: E402
from mgq.zoo.registry import create_model, spec_of, specs  # noqa: E402
from mgq.zoo.weight_loading import fingerprint  # noqa: E402
from tests.fakes.measured_ranges import measure_ranges  # noqa: E402
from tests.fakes.without_gpus import ONE_UNIT_A_STAGE  # noqa: E402

State = dict[str, npt.NDArray[Any]]
Shapes = Mapping[str, tuple[int, ...]]

CLASSES = 10
SIZE = 64
FAMILIES = ("resnet18", "mobilenet_v2", "shufflenet_v1_x0_5_g3", "efficientnet_lite0")


def slow(*values: object) -> Any:
    """A case of a parametrized test that is left out unless it is asked for."""
    return pytest.param(*values, marks=pytest.mark.slow)


EACH_FAMILY = (slow("resnet18"), "mobilenet_v2", "shufflenet_v1_x0_5_g3", slow("efficientnet_lite0"))
"""All families; quick tests see the two with grouped and depthwise convolutions, shuffles and sums."""


def random_state(shapes: Shapes, seed: int = 0) -> State:
    """Weights that keep a deep network's activations in bounds, told by the last part of their names.

    Running variances are positive and no two channels are alike. A name has the same value in every network.
    """
    return {name: random_value(name, shape, seed) for name, shape in shapes.items()}


def random_value(name: str, shape: tuple[int, ...], seed: int) -> npt.NDArray[Any]:
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    kind = name.rsplit(".", 1)[-1]
    if kind == "num_batches_tracked":
        return np.array(7, np.int64)
    if kind == "running_var":
        value = rng.uniform(0.5, 1.5, shape)
    elif kind == "weight" and max(shape) == np.prod(shape):
        value = rng.uniform(0.7, 1.3, shape)  # of a batch norm
    elif kind == "weight":
        fan_in = np.prod(shape[1:] if len(shape) < 5 else shape[2:])
        value = rng.normal(0, np.sqrt(2 / fan_in), shape)
    else:
        value = rng.normal(0, 0.2, shape)
    return value.astype(np.float32)


def blank(arch: str, classes: int = CLASSES, **options: Any) -> M.Module:
    """A new network whose weights do not matter, in evaluation state."""
    with without_initialization():
        network = create_model(arch, classes, **options)
    network.eval()
    return network


def filled(network: M.Module, seed: int = 0) -> M.Module:
    """``network`` (mode ``normal``) itself, with the weights of ``random_state``; its stem made to fit pixels."""
    state = random_state({name: value.shape for name, value in network.named_tensors()}, seed)
    stem = next(name for name, value in state.items() if value.ndim == 4 and value.shape[1] == 3)
    state[stem] /= 64
    set_state(network, state)
    return network


def same_state(state: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether names and values are equal, but for axes of length 1."""
    return set(state) == set(other) and all(np.array_equal(np.squeeze(other[n]), np.squeeze(state[n])) for n in state)


def smooth_images(number: int, height: int = SIZE, width: int = SIZE, seed: int = 0) -> npt.NDArray[np.uint8]:
    """uint8 (number, 3, height, width): a few soft blobs of colour that use the whole range, as photos do."""
    rng = np.random.default_rng(seed)
    planes = rng.uniform(-64, 320, (number, 3, 6, 6)).astype(np.float32)
    smooth = [[cv2.resize(plane, (width, height), interpolation=cv2.INTER_CUBIC) for plane in p] for p in planes]
    return np.clip(np.rint(smooth), 0, 255).astype(np.uint8)


def logits_of(network: M.Module, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """uint8 (N, 3, H, W), BGR -> float32 (N, classes)."""
    result: npt.NDArray[np.float32] = network(Tensor(images.astype(np.float32) - 128)).numpy()
    return result


def one_line_about(message: str, *parts: str) -> bool:
    """Whether ``message`` is one line that names all ``parts``; for ``assert``, which shows it otherwise."""
    return "\n" not in message and bool(message) and all(part in message for part in parts)


@dataclass(frozen=True)
class Trio:
    """A network with made-up weights in its three modes, calibrated on smooth pictures. Not to be changed."""

    arch: str
    normal: M.Module
    qat: M.Module
    quantized: M.Module
    ranges: ActivationRanges
    normal_state: State
    qat_state: State


def trio_of(arch: str) -> Trio:
    return _trio_of(arch, shufflenet_v1.REPEATS)


@cache
def _trio_of(arch: str, repeats: tuple[int, ...]) -> Trio:
    """``repeats`` tells a short ShuffleNetV1 from a whole one."""
    normal = filled(blank(arch))
    state = dict(state_of(normal))
    made_up = {"pictures": "made up"}
    ranges = measure_ranges(normal, [smooth_images(4)], arch, fingerprint(state), made_up, correct_bias=False)
    qat = to_mode(normal, Mode.QAT)
    apply_ranges(qat, ranges)
    return Trio(arch, normal, qat, to_mode(qat, Mode.QUANTIZED), ranges, state, dict(state_of(qat)))


def classifier_of(arch: str, mode: Mode = Mode.NORMAL, options: Mapping[str, Any] | None = None) -> Classifier:
    """The networks of ``trio_of(arch)``, or with ``options`` a new float one, as a classifier of 64x64 pictures."""
    names = tuple(f"kind {i}" for i in range(CLASSES))
    if options:
        network = filled(blank(arch, **options))
        return Classifier(network, None, spec_of(arch), mode, names, SIZE, "made-up weights", options)
    trio = trio_of(arch)
    network = {Mode.NORMAL: trio.normal, Mode.QAT: trio.qat, Mode.QUANTIZED: trio.quantized}[mode]
    fake = None if mode is Mode.NORMAL else trio.qat
    return Classifier(network, fake, spec_of(arch), mode, names, SIZE, "made-up weights", {})


@pytest.fixture(scope="module")
def short_shufflenet() -> Iterator[None]:
    """ShuffleNetV1 with one unit a stage, in this process: a third of the layers, for tests that are not about them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shufflenet_v1, "REPEATS", ONE_UNIT_A_STAGE)
        yield


@pytest.fixture
def short_shufflenet_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """As ``short_shufflenet``, for one test alone."""
    monkeypatch.setattr(shufflenet_v1, "REPEATS", ONE_UNIT_A_STAGE)


@pytest.fixture(scope="session", params=EACH_FAMILY)
def trio(request: pytest.FixtureRequest) -> Trio:
    """Each family's smallest network in its three modes."""
    return trio_of(request.param)


def write_images(folder: Path, number: int) -> Path:
    """``folder``, made, with that many smooth PNG files, ``00.png``, ``01.png`` and so on."""
    folder.mkdir()
    for i, image in enumerate(smooth_images(number, 80, 96)):
        cv2.imwrite(str(folder / f"{i:02}.png"), image.transpose(1, 2, 0))
    return folder


@pytest.fixture
def no_downloads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """An empty cache folder and no network: only what a test makes itself is there."""

    def refused(*_: object, **__: object) -> Path:
        raise AssertionError("a test asked for a download")

    monkeypatch.setattr("mgq.zoo.weight_loading.download", refused)
    monkeypatch.setattr("mgq.zoo.weight_loading.find_cached", lambda *_: None)
    yield


# ---- pages ----


class Read(HTMLParser):
    """Remembers what a page is made of, and whether all that opens is closed."""

    VOID = frozenset({"meta", "br", "rect", "line", "path", "polyline", "img"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.words: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes.update(name for name, _ in attrs)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes.update(name for name, _ in attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def document(text: str) -> dict[str, Any]:
    """The one JSON document that ``text`` is, without numbers that JSON does not have."""

    def refused(name: str) -> float:
        raise AssertionError(f"{name} is not JSON")

    body: dict[str, Any] = json.loads(text, parse_constant=refused)
    return body


def words_on(page: Path) -> str:
    """What a reader of the HTML ``page`` reads, in one line."""
    return " ".join("".join(Read(page.read_text()).words).split())


# ---- the command line ----


@dataclass
class Said:
    """What one run of the command left behind."""

    code: int
    out: str
    err: str


Mgq = Callable[..., Said]


@pytest.fixture(scope="session")
def kept_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What all commands may find again that an earlier one has written: the built-in network, verdicts on files."""
    return tmp_path_factory.mktemp("kept")


@pytest.fixture
def cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory, kept_files: Path) -> Path:
    """A cache without downloads, outside of the folder that commands run in."""
    folder = tmp_path_factory.mktemp("cache")
    for name in ("networks", "checked"):
        (kept_files / name).mkdir(mode=0o700, exist_ok=True)
        (folder / name).symlink_to(kept_files / name)
    monkeypatch.setenv("MGQ_CACHE", str(folder))
    return folder


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """What a test registers, an imported file included, is unknown to the next."""
    known = dict(specs())
    yield
    specs().clear()
    specs().update(known)


@pytest.fixture
def mgq(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path, cache_folder: Path) -> Mgq:
    """Runs ``mgq ARGUMENTS`` in this process, in an empty folder.

    ``calibrate`` measures an imported network in every engine, several forms of it; no test is about those times.
    """
    monkeypatch.setattr(deployment, "SECONDS", (0.05, 3.0))
    monkeypatch.setattr(deployment, "ROUNDS", 10)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")

    def command(*arguments: str | Path) -> Said:
        monkeypatch.setattr(sys, "argv", ["mgq", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            run()
        captured = capfd.readouterr()
        return Said(int(end.value.code or 0), captured.out, captured.err)

    return command


def the_error(said: Said) -> str:
    """The one line of an error of exit code 2."""
    assert said.code == 2, said
    assert "Traceback" not in said.err
    lines = [line for line in said.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, said.err
    return lines[0]
