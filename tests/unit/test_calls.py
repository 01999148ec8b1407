"""Training and measuring as Python calls, in the command line's words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import mgq
from mgq.api import make_train_options
from mgq.errors import InputError
from mgq.export.megengine.megengine_file import read_megengine_file
from tests.conftest import one_line_about

pytestmark = pytest.mark.usefixtures("short_shufflenet")
ARCH = "shufflenet_v1_x0_5_g3"


def test_words_go_to_the_request_the_builder_or_the_recipe() -> None:
    request = make_train_options(
        {"arch": "mobilenet_v2", "data": "flowers", "width": 0.5, "epochs": 3, "lr": None, "resume": True}
    )
    assert request.arch == "mobilenet_v2" and request.data == Path("flowers") and request.resume
    assert request.options == {"width": 0.5} and request.changes == {"epochs": 3}


def test_a_run_can_be_trained_and_measured_from_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    small: dict[str, Any] = {"image_size": 32, "batch_size": 8, "synthetic_train": 16, "synthetic_val": 10, "epochs": 1}
    trained = mgq.train(arch=ARCH, **small)
    assert trained.checkpoint == Path("runs") / f"{ARCH}.normal" / "checkpoint.safetensors"
    quantized = mgq.qat(arch=ARCH, **small)
    assert quantized.comparison.images == 10
    found = mgq.evaluate(mode="quantized")
    assert found.top1 == quantized.comparison.quantized.top1
    assert mgq.evaluate(mode="normal", limit=4).images == 4


@pytest.mark.slow
def test_calibrating_and_dumping_take_the_newest_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    mgq.train(arch=ARCH, image_size=32, batch_size=8, synthetic_train=16, synthetic_val=10, epochs=1)
    found = mgq.calibrate(images=4, preset="fast")
    assert found.calibration.classifier.spec.name == ARCH and found.calibration.used == 4
    assert found.checkpoint == Path("runs") / f"{ARCH}.calibration" / "checkpoint.safetensors"
    assert found.comparison is not None and found.comparison.images == 10
    assert found.to_json()["checkpoint"] == str(found.checkpoint)
    path = mgq.dump("network.megengine")
    assert read_megengine_file(path).about["arch"] == ARCH


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"imges": 3}, ("'imges'", "images")),
        ({"data_free": True, "files": ["cat.jpg"]}, ("--data-free", "leave out FILES")),
        ({"data_free": True, "max_drop": 1.0}, ("--max-drop", "leave out --data-free")),
    ],
)
def test_words_of_calibrate_that_cannot_be_are_refused(words: dict[str, Any], said: tuple[str, ...]) -> None:
    with pytest.raises(InputError) as error:
        mgq.calibrate(**words)
    assert one_line_about(str(error.value), *said)


def test_a_benchmark_names_what_there_is_no_precision_of() -> None:
    with pytest.raises(InputError) as error:
        mgq.benchmark(precisions=["int4"])
    assert one_line_about(str(error.value), "'int4'", "int8", "fp32")


def test_a_word_that_nothing_knows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="learning_rate"):
        mgq.train(save=tmp_path, learning_rate=1)
