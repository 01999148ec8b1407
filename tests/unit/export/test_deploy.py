"""Files to deploy: the same bits as the network in memory, in every engine; damaged ones refused, not loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import mgq
from mgq.data.decoding import bundled_cat, read_image
from mgq.data.transforms import to_batch
from mgq.engine.classifier.dump import dump_classifier
from mgq.engine.classifier.import_wish import NO_WISH
from mgq.engine.classifier.onnx_import import import_classifier
from mgq.engine.classifier.open import Classifier, make_random_classifier
from mgq.errors import FailureError, InputError
from mgq.export.megengine import writer
from mgq.export.megengine.megengine_file import read_megengine_file
from mgq.quantization.batch_norm_folding import fold_batch_norms
from mgq.quantization.modes import Mode
from mgq.runtime.megengine import EagerRuntime, TracedRuntime
from mgq.runtime.megengine_lite import LiteRuntime
from mgq.zoo.network_state import state_of
from tests.conftest import EACH_FAMILY
from tests.fakes.foreign_models import write

SIZE = 64


@cache
def made(arch: str, mode: Mode) -> Classifier:
    return make_random_classifier(arch, mode, image_size=SIZE)


def cats(classifier: Classifier, number: int = 1) -> npt.NDArray[np.uint8]:
    crop = classifier.crop(read_image(bundled_cat()))
    return to_batch([np.roll(crop, 5 * shift, axis=1) for shift in range(number)])


@pytest.mark.parametrize("mode", [Mode.NORMAL, Mode.QUANTIZED])
@pytest.mark.parametrize("arch", EACH_FAMILY)
def test_a_file_answers_as_the_network_in_memory(tmp_path: Path, arch: str, mode: Mode) -> None:
    classifier = made(arch, mode)
    path = tmp_path / "net.megengine"
    report = dump_classifier(classifier, path)
    assert report.size == path.stat().st_size
    images = cats(classifier)
    expected = EagerRuntime(classifier.network).run(images)
    traced, lite = TracedRuntime(classifier.network).run(images), LiteRuntime(path).run(images)
    scale = np.abs(expected).max()
    # The float classifier's last bits depend on how memory happens to be aligned.
    for found in (traced, lite):
        assert np.abs(found - expected).max() <= 1e-4 * scale
        assert found.argmax() == expected.argmax()


@pytest.mark.parametrize("input_type", ["uint8", "int8", "float32"])
@pytest.mark.parametrize("batch", [1, 3])
def test_every_input_type_and_batch_gives_the_same(tmp_path: Path, input_type: str, batch: int) -> None:
    classifier = made("mobilenet_v2", Mode.QUANTIZED)
    path = tmp_path / "net.megengine"
    dump_classifier(classifier, path, input_type, batch)
    runtime = LiteRuntime(path)
    assert runtime.shape == (batch, 3, SIZE, SIZE) and runtime.input_type == input_type
    images = cats(classifier, batch)
    np.testing.assert_allclose(runtime.run(images), classifier.logits(images), rtol=1e-4, atol=1e-3)


def test_the_file_says_what_it_is_in_plain_data(tmp_path: Path) -> None:
    classifier = made("mobilenet_v2", Mode.QUANTIZED)
    path = tmp_path / "net.megengine"
    dump_classifier(classifier, path)
    about = read_megengine_file(path).about
    assert about["arch"] == "mobilenet_v2" and about["mode"] == "quantized"
    assert about["input"] == {"name": "data", "type": "uint8", "shape": [1, 3, SIZE, SIZE], "order": "BGR"}
    assert about["classes"][0] == "tench" and "random" in about["origin"]
    assert {"mgq", "megengine"} <= set(about["versions"])
    assert b"cpickle" not in path.read_bytes() and json.dumps(about)


def test_an_int8_file_is_a_quarter_of_the_float_one(tmp_path: Path) -> None:
    sizes = {
        mode: dump_classifier(made("resnet18", mode), tmp_path / f"{mode.value}.megengine").size
        for mode in (Mode.NORMAL, Mode.QUANTIZED)
    }
    assert sizes[Mode.QUANTIZED] < 0.3 * sizes[Mode.NORMAL]


def test_an_imported_network_is_no_file_of_megengine(tmp_path: Path) -> None:
    classifier, _ = import_classifier(write(tmp_path / "net.onnx"), NO_WISH, "")
    with pytest.raises(InputError, match="not for imported ones: pass --format onnx"):
        dump_classifier(classifier, tmp_path / "net.megengine")


def test_a_fake_quantized_network_is_no_file_of_megengine(tmp_path: Path) -> None:
    """MegEngine's file of one answers something else altogether."""
    with pytest.raises(InputError, match="float or int8, not fake-quantized: pass -m quantized"):
        dump_classifier(made("mobilenet_v2", Mode.QAT), tmp_path / "net.megengine")
    assert not list(tmp_path.iterdir())


def test_a_file_that_answers_otherwise_is_not_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "net.megengine"
    path.write_bytes(b"older")
    for name in ("run_in_lite", "run_in_megengine"):
        monkeypatch.setattr(writer, name, off_by_one_bit(getattr(writer, name)))
    with pytest.raises(FailureError, match="differs from the network in memory"):
        dump_classifier(made("mobilenet_v2", Mode.QUANTIZED), path)
    assert path.read_bytes() == b"older" and list(tmp_path.iterdir()) == [path]


def off_by_one_bit(run: Callable[..., npt.NDArray[np.float32]]) -> Callable[..., npt.NDArray[np.float32]]:
    return lambda *arguments: np.nextafter(run(*arguments), np.float32(np.inf))


@pytest.mark.parametrize("mode", [Mode.NORMAL, Mode.QUANTIZED])
def test_where_lite_rounds_otherwise_megengine_itself_has_to_give_the_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: Mode
) -> None:
    monkeypatch.setattr(writer, "run_in_lite", off_by_one_bit(writer.run_in_lite))
    assert (
        "loaded again in MegEngine, it"
        in dump_classifier(made("mobilenet_v2", mode), tmp_path / "net.megengine").checked
    )


def test_a_file_that_lite_answers_wrongly_is_refused_whatever_megengine_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    true_answer = writer.run_in_lite
    monkeypatch.setattr(writer, "run_in_lite", lambda *arguments: true_answer(*arguments) * np.float32(1.001))
    with pytest.raises(FailureError):
        dump_classifier(made("mobilenet_v2", Mode.NORMAL), tmp_path / "net.megengine")


def test_damaged_files_never_reach_the_native_loader(tmp_path: Path) -> None:
    path = tmp_path / "net.megengine"
    dump_classifier(made("shufflenet_v1_x0_5_g3", Mode.QUANTIZED), path)
    whole = path.read_bytes()
    damaged = tmp_path / "damaged.megengine"
    cut = [whole[: len(whole) * i // 20] for i in range(20)]
    flipped = [whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :] for at in range(0, len(whole), len(whole) // 20)]
    for data in [*cut, *flipped, b"mgqfile1", whole + b"more", bytes(100) + b"mgqfile1"]:
        damaged.write_bytes(data)
        with pytest.raises(InputError, match=r"damaged\.megengine") as caught:
            LiteRuntime(damaged)
        assert "\n" not in str(caught.value)


def test_wrong_use_of_a_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "net.megengine"
    dump_classifier(made("shufflenet_v1_x0_5_g3", Mode.QUANTIZED), path)
    with pytest.raises(InputError, match="shape"):
        LiteRuntime(path).run(np.zeros((1, 3, 32, 32), np.uint8))
    with pytest.raises(InputError, match="threads"):
        LiteRuntime(path, threads=1000)
    with pytest.raises(InputError, match=r"none\.megengine"):
        LiteRuntime(tmp_path / "none.megengine")
    with pytest.raises(FailureError, match="one thread"):
        EagerRuntime(made("mobilenet_v2", Mode.NORMAL).network, threads=2)


@pytest.mark.parametrize("arch", EACH_FAMILY)
def test_folding_batch_norms_changes_rounding_alone(arch: str) -> None:
    classifier = made(arch, Mode.NORMAL)
    before = classifier.logits(cats(classifier))
    network = fold_batch_norms(classifier.network)
    after = EagerRuntime(network).run(cats(classifier))
    assert np.abs(after - before).max() <= 1e-4 * np.abs(before).max()
    assert not any("running_mean" in name for name in state_of(network))


def test_dump_from_python(tmp_path: Path) -> None:
    path = mgq.dump(tmp_path / "cat.megengine", arch="efficientnet_lite0", pretrained=True)
    runtime = LiteRuntime(path)
    image = to_batch([make_random_classifier("efficientnet_lite0", Mode.NORMAL).crop(read_image(bundled_cat()))])
    best = runtime.about["classes"][int(runtime.run(image).argmax())]
    assert best in {"tabby cat", "tiger cat", "Egyptian cat"}


def test_a_dump_that_is_interrupted_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mgq.engine.classifier.dump.dump_megengine", interrupt)
    with pytest.raises(KeyboardInterrupt):
        dump_classifier(
            make_random_classifier("shufflenet_v1_x0_5_g3", Mode.NORMAL), tmp_path / "new" / "folder" / "x.megengine"
        )
    assert list(tmp_path.iterdir()) == []
