"""Where int8 throughout is hardly faster than float, some layers of an engine's file stay in float."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mgq.cli.dump import describe_parity
from mgq.engine.classifier import deployment, parity
from mgq.engine.classifier.deployment import Deployment, deploy, write_candidates
from mgq.engine.classifier.dump import dump_classifier
from mgq.engine.classifier.import_wish import ImportWish
from mgq.engine.classifier.onnx_import import import_classifier
from mgq.engine.classifier.open import Classifier, quantize_with_ranges
from mgq.engine.classifier.parity import STEPS, compute_reference, make_views
from mgq.export.onnx.pixel_file import write_pixel_file
from mgq.quantization.modes import Mode
from mgq.quantization.targets import ONNX
from mgq.runtime.protocol import run_in_batches
from mgq.runtime.registry import load
from mgq.zoo.network_state import state_of
from mgq.zoo.weight_loading import fingerprint
from tests.conftest import Mgq
from tests.fakes.foreign_int8 import int8_of
from tests.fakes.foreign_models import write
from tests.fakes.measured_ranges import measure_ranges

FLOAT_MS = 1.0
FACTS = re.compile(r"ONNX Runtime \S+: same answer.*at most")
"""What a dump says of the answers in an engine."""


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Classifier, Classifier, Any]:
    path = write(tmp_path_factory.mktemp("float") / "small.onnx", "swishes")
    images = np.random.default_rng(0).integers(0, 256, (8, 3, 32, 32), dtype=np.uint8)
    normal, copy = (import_classifier(path, ImportWish(preprocess="torch"), "")[0] for _ in range(2))
    ranges = measure_ranges(normal.network, [images], "", "", {}, correct_bias=False, target=ONNX)
    return normal, quantize_with_ranges(copy, ranges, Mode.QUANTIZED), images


def timed_by(int8_ms: Callable[[float], float]) -> Callable[[Sequence[Any], Any], list[float]]:
    """Milliseconds of files, by the share of their layers in float; float itself takes ``FLOAT_MS``."""

    def milliseconds(runtimes: Sequence[Any], _: Any) -> list[float]:
        return [
            FLOAT_MS if runtime.about["mode"] == "normal" else int8_ms(runtime.about.get("float_share", 0.0))
            for runtime in runtimes
        ]

    return milliseconds


@pytest.fixture
def deploy_at(
    networks: tuple[Classifier, Classifier, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Callable[[float], float]], Deployment]:
    def run(int8_ms: Callable[[float], float]) -> Deployment:
        monkeypatch.setattr(deployment, "milliseconds", timed_by(int8_ms))
        return deploy(*networks[:2], tmp_path / "small.int8.onnx", networks[2])

    return run


def test_the_share_of_layers_in_float_that_is_fastest_is_that_of_the_file(tmp_path: Path, deploy_at: Any) -> None:
    found = deploy_at(lambda share: {0.0: 1.2, 0.5: 0.8}.get(share, 1.1))
    for row in found.rows:
        key = {"OpenVINO": "openvino", "ONNX Runtime": "onnxruntime"}.get(row.engine)
        if key is None:
            continue  # it runs int8 alone
        assert row.float_share == 0.5 and row.speedup == pytest.approx(1.25)
        assert row.path == tmp_path / f"small.int8.{key}.onnx"
        assert load(row.path, key).about["float_share"] == 0.5
        assert row.plain_speedup == pytest.approx(1 / 1.2)
    assert not found.slower and found.own_files_only == ("OpenVINO", "ONNX Runtime")


def test_int8_that_is_fast_is_not_tried_in_float(deploy_at: Any) -> None:
    shares: list[float] = []

    def time_of(share: float) -> float:
        shares.append(share)
        return 0.5

    assert not any(row.float_share for row in deploy_at(time_of).rows)
    assert set(shares) == {0.0}


def test_a_form_that_is_farther_from_float_is_not_taken_however_fast(
    deploy_at: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(runtime: Any, images: Any) -> Any:
        found = run_in_batches(runtime, images)
        return found * 0.5 if runtime.about.get("engine") else found

    monkeypatch.setattr(deployment, "run_in_batches", spoil)
    found = deploy_at(lambda share: 1.2 - share)
    assert all(row.path == found.path and row.snr > 10 for row in found.rows)


@pytest.mark.parametrize(("noise", "is_taken"), [(0.005, True), (0.05, False)], ids=["46 dB", "26 dB"])
def test_a_form_that_is_near_enough_to_float_need_not_be_nearer(
    networks: tuple[Classifier, Classifier, Any],
    deploy_at: Any,
    monkeypatch: pytest.MonkeyPatch,
    noise: float,
    is_taken: bool,
) -> None:
    exact = deployment.normal_logits(networks[0], networks[2])

    def answer(runtime: Any, _: Any) -> Any:
        return exact * (1 + (noise if runtime.about.get("float_share") else 0.001))

    monkeypatch.setattr(deployment, "run_in_batches", answer)
    found = deploy_at(lambda share: {0.0: 1.2, 0.5: 0.8}.get(share, 1.1))
    assert any(row.float_share == 0.5 for row in found.rows) == is_taken


def test_where_no_share_is_faster_the_file_is_as_it_was(tmp_path: Path, deploy_at: Any) -> None:
    found = deploy_at(lambda share: 1.2 + share)
    assert not any(row.float_share for row in found.rows)
    assert {row.path for row in found.rows} <= set(tmp_path.iterdir())
    assert found.is_worthless


@pytest.mark.parametrize(("own_ms", "float_ms"), [(0.4, 0.4), (2.0, FLOAT_MS)])
def test_float_is_the_faster_of_its_files(
    networks: tuple[Classifier, Classifier, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    own_ms: float,
    float_ms: float,
) -> None:
    """mgq's, or the one that the network was imported from."""

    def milliseconds(runtimes: Sequence[Any], _: Any) -> list[float]:
        modes = [runtime.about.get("mode") if runtime.about else None for runtime in runtimes]
        return [{None: own_ms, "normal": FLOAT_MS}.get(mode, 0.7) for mode in modes]

    monkeypatch.setattr(deployment, "milliseconds", milliseconds)
    source = write(tmp_path / "small.onnx", "swishes")
    found = deploy(*networks[:2], tmp_path / "small.int8.onnx", networks[2], source=source)
    rows = [row for row in found.rows if row.float_ms is not None]
    assert {row.engine for row in rows} >= {"OpenVINO", "ONNX Runtime"}
    assert {(row.float_ms, row.is_own_float) for row in rows} == {(float_ms, own_ms < FLOAT_MS)}
    rows = [row for row in deploy(*networks[:2], tmp_path / "b.onnx", networks[2]).rows if row.float_ms is not None]
    assert {(row.float_ms, row.is_own_float) for row in rows} == {(FLOAT_MS, False)}


def test_the_files_of_a_benchmark_are_written_once(
    networks: tuple[Classifier, Classifier, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The float and the imported file were written a second time, to be compared with."""
    written: list[str] = []
    dump, write_own = dump_classifier, write_pixel_file

    def count_dump(classifier: Classifier, path: Path, *arguments: Any, **words: Any) -> Any:
        written.append(path.name)
        return dump(classifier, path, *arguments, **words)

    def count_own(source: Path, *arguments: Any) -> Any:
        written.append(source.name)
        return write_own(source, *arguments)

    monkeypatch.setattr(deployment, "dump_classifier", count_dump)
    monkeypatch.setattr(deployment, "write_pixel_file", count_own)
    monkeypatch.setattr(deployment, "milliseconds", lambda runtimes, _: [0.1] * len(runtimes))
    found = write_candidates(*networks[:2], tmp_path, networks[2], write(tmp_path / "small.onnx", "swishes"))
    name = networks[0].spec.name
    assert [path.name for path in found[:3]] == [f"{name}.{kind}.onnx" for kind in ("float", "imported", "int8")]
    assert written.count("small.onnx") == 1
    assert sum("float" in file for file in written) == 1


def test_dump_measures_the_imported_file_too(
    networks: tuple[Classifier, Classifier, Any], tmp_path: Path, mgq: Mgq, monkeypatch: pytest.MonkeyPatch
) -> None:
    def milliseconds(runtimes: Sequence[Any], _: Any) -> list[float]:
        return [0.7 if runtime.about else 0.4 for runtime in runtimes]

    monkeypatch.setattr(deployment, "milliseconds", milliseconds)
    source, network = write(tmp_path / "small.onnx", "swishes"), networks[0].network
    weights = fingerprint(state_of(network))
    ranges = measure_ranges(network, [networks[2]], networks[0].spec.name, weights, {}, correct_bias=False, target=ONNX)
    (tmp_path / "ranges.json").write_text(ranges.to_json())
    said = mgq("dump", "-c", source, "--ranges", tmp_path / "ranges.json", "-o", "own.onnx")
    assert said.code == 0, said
    assert "float is the imported file itself" in said.err and "run the imported file there" in said.err


def test_the_file_for_openvino_takes_a_picture_at_a_time(
    networks: tuple[Classifier, Classifier, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[list[int | None]] = []

    def milliseconds(runtimes: Sequence[Any], _: Any) -> list[float]:
        batches.append([runtime.batch for runtime in runtimes])
        return [0.5 if runtime.about.get("engine") == "openvino" else FLOAT_MS for runtime in runtimes]

    monkeypatch.setattr(deployment, "milliseconds", milliseconds)
    path = tmp_path / "small.int8.onnx"
    found = {row.engine: row.path for row in deploy(*networks[:2], path, networks[2]).rows}
    assert load(found["OpenVINO"], "openvino").batch == 1
    assert load(path, "openvino").batch is None
    assert [None, 1, 1] in batches  # the file for any engine, that for this one, and float


def test_a_network_that_needs_no_other_form_has_a_file_of_fixed_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "plain.onnx", "plain")
    normal, int8 = import_classifier(source, ImportWish(preprocess="torch"), "")[0], int8_of(source, "torch")
    monkeypatch.setattr(deployment, "milliseconds", lambda runtimes, _: [2.0 - (r.batch or 0) for r in runtimes])
    images = np.random.default_rng(0).integers(0, 256, (4, 3, 32, 32), dtype=np.uint8)
    found = {row.engine: row.path.name for row in deploy(normal, int8, tmp_path / "plain.int8.onnx", images).rows}
    assert found["OpenVINO"] == "plain.int8.openvino.onnx"


def test_files_of_several_pictures_are_timed_by_the_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[int] = []
    ticks = iter(range(10**6))
    monkeypatch.setattr(deployment, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    runtimes = [SimpleNamespace(batch=batch, run=lambda given: runs.append(len(given))) for batch in (None, 1, 4)]
    each = deployment.milliseconds(runtimes, np.zeros((1, 3, 8, 8), np.uint8))
    assert each == [1e3, 1e3, 250.0]
    assert runs.count(4) * 2 == runs.count(1)


def test_an_imported_network_is_dumped_for_several_pictures_at_a_time(
    networks: tuple[Classifier, Classifier, Any], mgq: Mgq
) -> None:
    networks[1].write_checkpoint(Path("int8.safetensors"))
    said = mgq("dump", "-c", "int8.safetensors", "--batch", "3", "-o", "three.onnx")
    assert said.code == 0, said
    assert "3 pictures at a time" in said.out and load(Path("three.onnx"), "openvino").batch == 3


def test_what_a_dump_says_is_of_the_file_that_it_leaves(
    networks: tuple[Classifier, Classifier, Any], mgq: Mgq, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With half of the layers in float the file is larger and nearer: as where it is so from the start."""
    networks[1].write_checkpoint(Path("int8.safetensors"))
    words = ("dump", "-c", "int8.safetensors", "--for", "onnxruntime")
    monkeypatch.setattr(deployment, "milliseconds", timed_by(lambda share: 0.5))
    fast = mgq(*words, "-o", "fast.onnx")
    monkeypatch.setattr(deployment, "milliseconds", timed_by(lambda share: {0.0: 1.2, 0.5: 0.8}.get(share, 1.1)))
    slow = mgq(*words, "-o", "slow.onnx", "--check", "layers")
    assert (fast.code, slow.code) == (0, 0), slow.err
    assert "50% of the layers in float" in slow.err
    assert "a file for one engine rounds less than MegEngine's int8" in " ".join(slow.err.split())
    found = [FACTS.search(said.out) for said in (fast, slow)]
    assert found[0] and found[1] and found[0].group() != found[1].group()
    step = 127.5 / np.abs(networks[1].logits(make_views(networks[1]))).max()
    simulated = compute_reference(networks[1], make_views(networks[1]))
    answers = load(Path("slow.onnx"), "onnxruntime")
    left = np.abs(run_in_batches(answers, make_views(networks[1])) - simulated).mean() * step
    assert f"by {left:.2f} steps" in slow.out
    assert "timing int8 beside float in each engine" in slow.err


@pytest.mark.parametrize(("answer", "steps"), [(0.0, 0.0), (1.0, STEPS)])
def test_logits_that_are_all_zero_have_steps_of_1(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, answer: float, steps: float
) -> None:
    """As those of a head whose weights are zero."""
    runtime = SimpleNamespace(name="engine", version="1")
    monkeypatch.setattr(parity, "list_backends", lambda path: [SimpleNamespace(load=lambda *_: runtime)])
    monkeypatch.setattr(parity, "run_in_batches", lambda *_: np.full((2, 5), answer, np.float32))
    images = np.zeros((2, 3, 8, 8), np.uint8)
    (found,) = parity.measure_parity(tmp_path / "net.onnx", images, np.zeros((2, 5), np.float32))
    assert (found.same, found.mean, found.largest) == pytest.approx((100.0, steps, steps))


def test_a_file_without_integers_has_no_layers_to_compare() -> None:
    assert "no integers" in describe_parity([])
