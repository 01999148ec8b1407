"""The benchmark of quantizers: statistics right by hand, rows that say what is missing, costs of one command alone."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.benchmarks import peers
from tests.benchmarks.cost import measured
from tests.benchmarks.fidelity import (
    UNKNOWN,
    decibels_of,
    in_onnxruntime,
    in_openvino,
    likeness_of,
    parsed,
    places_of,
    wilson,
)


def float32(*rows: list[float]) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return np.array(rows, np.float32)


def test_an_interval_of_a_share_is_that_of_wilson() -> None:
    # Newcombe 1998, table I, method 3.
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert wilson(0, 20) == pytest.approx((0, 0.1611), abs=5e-5)
    assert wilson(1, 29) == pytest.approx((0.0061, 0.1718), abs=5e-5)


def test_an_interval_is_not_empty_where_all_were_alike_and_mirrors() -> None:
    low, high = wilson(20, 20)
    assert high == 1 and low == pytest.approx(1 - wilson(0, 20)[1])


@pytest.mark.parametrize(("right", "of"), [(0, 0), (3, 2), (-1, 2)])
def test_there_is_no_interval_of_what_is_no_share(right: int, of: int) -> None:
    with pytest.raises(ValueError, match="no share"):
        wilson(right, of)


def test_decibels_compare_the_energy_of_logits_with_that_of_their_error() -> None:
    exact = float32([3, 4], [0, 0])
    assert decibels_of(float32([3.5, 4], [0, 0]), exact) == pytest.approx(20)
    assert decibels_of(float32([0, 0], [0, 0]), exact) == 0
    assert decibels_of(exact, exact) == math.inf


def test_the_picture_in_the_middle_is_not_drowned_by_one_with_large_logits() -> None:
    exact = float32([1000, 0], [10, 0], [1, 0])
    likeness = likeness_of(float32([900, 0], [9.9, 0], [0.99, 0]), exact, np.full(3, UNKNOWN))
    assert likeness.decibels == pytest.approx(20, abs=0.1)
    assert likeness.middle == pytest.approx(40, abs=0.1)


def test_answers_are_compared_with_float_with_labels_and_with_the_simulation() -> None:
    exact = float32([2, 1, 0], [2, 1, 0], [0, 0, 5], [1, 3, 0])
    found = float32([1, 2, 0], [2, 1, 0], [0, 0, 5], [1, 3, 0])
    likeness = likeness_of(found, exact, np.array([1, 0, 0, UNKNOWN]), exact)
    assert (likeness.images, likeness.labelled, likeness.same, likeness.as_simulated) == (4, 3, 0.75, 0.75)
    assert likeness.top1 == pytest.approx(2 / 3) and likeness.interval == wilson(3, 4)
    unknown = likeness_of(found, exact, np.full(4, UNKNOWN))
    assert unknown.top1 is None and unknown.as_simulated is None


def test_folders_are_known_by_class_and_those_of_imagenet_by_wnid() -> None:
    from mgq.data.imagenet_classes import imagenet_classes

    names = [entry.name for entry in imagenet_classes()]
    assert places_of(names)["n01443537"] == places_of(names)["goldfish"] == 1
    assert places_of(["roses", "daisy"]) == {"roses": 0, "daisy": 1}


def test_a_command_costs_what_it_needs_itself_and_not_what_this_process_holds() -> None:
    ballast = np.ones(400_000_000, np.uint8)
    cost, said = measured([sys.executable, "-c", "print('done'); raise SystemExit(3)"])
    assert (cost.code, said.strip()) == (3, "done")
    assert cost.processor > 0 and 1e6 < cost.peak < ballast.nbytes / 2


def test_a_peer_that_is_missing_says_how_it_is_got(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(peers.PEERS, "other", peers.Peer(peers.write_ppq, "no_such_package", "pip install it"))
    with pytest.raises(SystemExit, match="no_such_package is not installed: pip install it"):
        peers.main("other", "float.onnx", "pixels.npy", str(tmp_path / "file.onnx"))


def test_images_of_the_same_kind_come_from_one_folder_or_two() -> None:
    words = ["-a", "resnet18", "--calibration", "a", "--other", "b"]
    assert parsed([*words, "--every", "5"]).unseen is None
    assert parsed([*words, "--unseen", "c"]).every is None
    for wrong in (words, [*words, "--every", "5", "--unseen", "c"], [*words, "--every", "0"]):
        with pytest.raises(SystemExit):
            parsed(wrong)


def test_files_that_take_pixels_and_floats_are_asked_the_same(tmp_path: Path) -> None:
    from mgq.engine.classifier.open import make_random_classifier
    from mgq.export.onnx.writer import write_onnx
    from mgq.quantization.modes import Mode

    path = tmp_path / "float.onnx"
    write_onnx(make_random_classifier("resnet18", Mode.NORMAL).network, path, image_size=32, batch=1, provenance={})
    pixels = np.random.default_rng(0).integers(0, 256, (3, 3, 32, 32), dtype=np.uint8)
    answers = in_openvino(path, pixels)
    assert decibels_of(in_openvino(peers.written_with_float_input(path, path), pixels), answers) > 80
    assert decibels_of(in_onnxruntime(path, pixels), answers) > 80
    assert answers.shape == (3, 1000)


@pytest.mark.parametrize(("number", "part"), [(100, 10), (7, 7), (13, 1), (99, 9)])
def test_onnx_runtime_is_given_parts_of_one_size(number: int, part: int) -> None:
    assert peers.largest_part(number) == part
