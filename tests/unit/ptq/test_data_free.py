"""Int8 without a picture, quality levels, and as much int8 as an accuracy allows."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from mgq.engine.calibration.calibration_run import (
    Calibration,
    calibrate_data_free,
    estimate_seconds,
)
from mgq.engine.calibration.mixed_precision import MixedPrecisionResult, search_float_layers
from mgq.engine.classifier.mode_comparison import Comparison
from mgq.errors import InputError
from mgq.ptq.calibrate import calibrate_network
from mgq.ptq.presets import CalibrationConfig, data_free_steps, get_preset
from mgq.ptq.steps import NO_IMAGES, CorrectBias, RoundWeights
from mgq.quantization.modes import Mode, mode_of, to_mode
from mgq.quantization.option_names import QUALITIES
from mgq.quantization.qat_layers import find_quantized_layers
from mgq.quantization.targets import MEGENGINE, ONNX, Target
from tests.conftest import Mgq, classifier_of, logits_of, one_line_about, slow, smooth_images, the_error
from tests.fakes.places import ROOT
from tests.fakes.uneven_networks import network_of, with_true_statistics

IMAGES = smooth_images(8, seed=4)
SHUFFLE = "shufflenet_v1_x0_5_g3"


class TestDataFree:
    @pytest.mark.parametrize("target", [slow(MEGENGINE), ONNX], ids=lambda target: target.name)
    def test_batch_norms_are_enough_for_int8_that_follows_float(self, target: Target) -> None:
        network = network_of("resnet18")
        with_true_statistics(network)
        found, ranges = calibrate_network(network, NO_IMAGES, "resnet18", "", data_free_steps(target), target)
        assert mode_of(network) is Mode.NORMAL and mode_of(found) is Mode.QAT
        assert ranges.target == target.name and set(ranges.ranges) >= {
            name
            for name in find_quantized_layers(found)
            if name not in ("quant", "dequant") and not name.endswith(".add")
        }
        exact, simulated = logits_of(network, IMAGES).ravel(), logits_of(found, IMAGES).ravel()
        assert np.corrcoef(exact, simulated)[0, 1] > 0.95

    def test_it_becomes_real_int8(self) -> None:
        found = calibrate_data_free(classifier_of("resnet18"))
        assert found.used == 0 and "batch norms" in found.ranges.provenance["pictures"]
        logits_of(to_mode(found.classifier.network, Mode.QUANTIZED), IMAGES)

    @pytest.mark.slow
    def test_the_command_says_so_and_the_checkpoint_works(self, mgq: Mgq, tmp_path: Path) -> None:
        classifier_of(SHUFFLE).write_checkpoint(tmp_path / "own.safetensors")
        said = mgq("calibrate", "-c", tmp_path / "own.safetensors", "-s", tmp_path / "runs")
        assert said.code == 0 and "no pictures" in said.err and "batch norms" in said.out
        made = tmp_path / "runs" / f"{SHUFFLE}.calibration" / "checkpoint.safetensors"
        assert mgq("infer", "-c", made).code == 0

    def test_images_and_no_images_at_once_are_refused(self, mgq: Mgq, tmp_path: Path) -> None:
        assert one_line_about(the_error(mgq("calibrate", tmp_path, "--data-free")), "--data-free", "leave out")


class TestQuality:
    def test_an_unknown_one_is_refused_with_those_there_are(self) -> None:
        with pytest.raises(InputError) as error:
            get_preset("great")
        assert one_line_about(str(error.value), "'great'", *QUALITIES)

    def test_what_is_said_wins_over_the_quality(self) -> None:
        preset = CalibrationConfig(method="ema").make_preset()
        assert all(step.name == "ranges by ema" for steps in preset.grids for step in steps if "ranges" in step.name)
        nearest = CalibrationConfig(weight_rounding="nearest").make_preset()
        assert nearest.finishes == (CorrectBias(),)
        assert all(step.name.startswith("ranges") for steps in nearest.grids for step in steps)
        uncorrected = CalibrationConfig(correct_bias=False).make_preset()
        assert all(isinstance(step, RoundWeights) and not step.correct_bias for step in uncorrected.finishes)
        assert uncorrected.preview is None

    def test_more_takes_longer(self, monkeypatch: pytest.MonkeyPatch) -> None:
        clock = itertools.count()  # a pass takes one tick, however busy the machine is
        monkeypatch.setattr("time.perf_counter", lambda: float(next(clock)))
        own = classifier_of(SHUFFLE)
        assert estimate_seconds(own, 512, "fast") < estimate_seconds(own, 512, "balanced")

    def test_two_processes_take_less(self, monkeypatch: pytest.MonkeyPatch) -> None:
        clock = itertools.count()
        monkeypatch.setattr("time.perf_counter", lambda: float(next(clock)))
        own, seconds = classifier_of(SHUFFLE), []
        for is_shared in (False, True):
            monkeypatch.setattr("mgq.engine.calibration.calibration_run.pays", lambda *_, found=is_shared: found)
            seconds.append(estimate_seconds(own, 512, "balanced"))
        assert seconds[1] < seconds[0]


def mixture_at(drops: list[float], max_drop: float) -> tuple[MixedPrecisionResult, list[int]]:
    """What is found where keeping the first n of the layers loses ``drops[n]`` points, and what was tried."""
    ranking = [f"layer{i}" for i in range(len(drops) - 1)]
    tried: list[int] = []

    def calibrate(kept: tuple[str, ...]) -> Calibration:
        tried.append(len(kept))
        return cast(Calibration, SimpleNamespace(classifier=len(kept)))

    def compare(kept: Any) -> Comparison:
        return cast(Comparison, SimpleNamespace(drop=drops[kept]))

    return search_float_layers(max_drop, ranking, calibrate, compare), tried


class TestMaxDrop:
    @pytest.fixture(autouse=True)
    def without_timing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("mgq.engine.calibration.mixed_precision.measure_slowdown", lambda mixture, _: mixture)

    @pytest.mark.parametrize("least", range(8))
    def test_the_fewest_layers_are_kept(self, least: int) -> None:
        drops = [1.0 if kept < least else 0.2 for kept in range(9)]
        found, _ = mixture_at(drops, 0.5)
        assert found.float_layers == tuple(f"layer{i}" for i in range(least))

    def test_nothing_is_tried_that_need_not_be(self) -> None:
        assert mixture_at([0.1] + [0.0] * 40, 0.5)[1] == [0]
        assert len(mixture_at([1.0] * 20 + [0.0] * 21, 0.5)[1]) <= 12

    def test_where_it_cannot_be_the_least_drop_is_kept(self) -> None:
        found, tried = mixture_at([3.0, 1.5, 2.0, 2.0], 0.5)
        assert found.comparison.drop == 1.5 and 3 in tried

    def test_it_needs_labels(self, mgq: Mgq, tmp_path: Path) -> None:
        classifier_of(SHUFFLE).write_checkpoint(tmp_path / "own.safetensors")
        cat = ROOT / "assets" / "cat.jpg"
        said = mgq("calibrate", cat, "-c", tmp_path / "own.safetensors", "-s", tmp_path / "runs", "--max-drop", "0.5")
        assert one_line_about(the_error(said), "--max-drop", "-d FOLDER")

    @pytest.mark.slow
    def test_the_command_tells_what_it_kept(self, mgq: Mgq, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import cv2

        classes = classifier_of(SHUFFLE).classes
        for name in classes:
            for i, image in enumerate(smooth_images(2, seed=7)):
                path = tmp_path / "data" / "val" / name / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                cv2.imwrite(str(path), image.transpose(1, 2, 0))
        classifier_of(SHUFFLE).write_checkpoint(tmp_path / "own.safetensors")
        words = ("-c", tmp_path / "own.safetensors", "-s", tmp_path / "runs", "-d", tmp_path / "data", "--images", "4")
        said = mgq("calibrate", *words, "--max-drop", "100", "--json", "--quality", "fast")
        assert said.code == 0, said.err
        assert json.loads(said.out)["float_layers"] == []
