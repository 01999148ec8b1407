"""timm's weights: its names are read as ours, and what only a name tells is taken from it, or asked for.

The plain forward here is written from timm's names and arguments alone, padding explicit and batch norms unfused.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import megengine.functional as F
import numpy as np
import pytest
from safetensors.numpy import save_file

from mgq.engine.classifier.deployed_files import open_file
from mgq.engine.classifier.dump import dump_classifier
from mgq.engine.classifier.open import classifier_from, make_random_classifier
from mgq.engine.training.train_options import TrainOptions
from mgq.engine.training.trainer import StoppedError
from mgq.engine.training.training_run import train
from mgq.errors import InputError
from mgq.quantization.modes import Mode
from mgq.quantization.targets import ONNX
from mgq.weights.foreign_states import IMAGENET_RGB, with_epsilon
from mgq.weights.preprocessing import Preprocessing
from mgq.zoo.weight_hints import hints_of
from mgq.zoo.weight_loading import Weights, read_weights
from tests.conftest import CLASSES, State, logits_of, one_line_about
from tests.fakes.pytorch_networks import (
    IMAGENET,
    LITE,
    LITES,
    Logits,
    Padding,
    Pixels,
    Plain,
    Shapes,
    as_pth,
    assert_equal_logits,
    bn_names,
    conv_names,
    fed,
    linear_names,
    made_up,
    plain_resnet,
    random_images,
    resnet_names,
    tensorflow_same,
)
from tests.fakes.training_options import small_request, stopping_after
from tests.fakes.weight_files import Forge

HALF = ((127.5,) * 3, (127.5,) * 3)
# kernel, stride, expansion, channels, repeats
MOBILENET = (
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (3, 2, 6, 32, 3),
    (3, 2, 6, 64, 4),
    (3, 1, 6, 96, 3),
    (3, 2, 6, 160, 3),
    (3, 1, 6, 320, 1),
)


def symmetric(size: int, kernel: int, stride: int) -> tuple[int, int]:
    return kernel // 2, kernel // 2


@dataclass(frozen=True)
class Timm:
    """One of timm's networks: its stages, and what no state dict says."""

    stages: tuple[tuple[int, int, int, int, int], ...]
    eps: float = 1e-5
    padding: Padding = symmetric
    normalization: tuple[tuple[float, ...], tuple[float, ...]] = IMAGENET
    stem: int = 32

    def names(self, classes: int = CLASSES) -> Shapes:
        names = conv_names("conv_stem", self.stem, 3, 3) | bn_names("bn1", self.stem)
        inputs = self.stem
        for stage, (kernel, _, expansion, outputs, repeats) in enumerate(self.stages):
            for i in range(repeats):
                block, hidden = f"blocks.{stage}.{i}", inputs * expansion
                names |= conv_names(f"{block}.conv_dw", hidden, 1, kernel)
                if expansion > 1:
                    names |= conv_names(f"{block}.conv_pw", hidden, inputs, 1) | bn_names(f"{block}.bn1", hidden)
                    names |= conv_names(f"{block}.conv_pwl", outputs, hidden, 1)
                    names |= bn_names(f"{block}.bn2", hidden) | bn_names(f"{block}.bn3", outputs)
                else:
                    names |= conv_names(f"{block}.conv_pw", outputs, hidden, 1)
                    names |= bn_names(f"{block}.bn1", hidden) | bn_names(f"{block}.bn2", outputs)
                inputs = outputs
        names |= conv_names("conv_head", 1280, inputs, 1) | bn_names("bn2", 1280)
        return names | linear_names("classifier", classes, 1280)

    def logits(self, state: State, bgr: Pixels) -> Logits:
        net = Plain(state, self.eps)
        x = net.conv(fed(bgr, self.padding(bgr.shape[2], 3, 2), *self.normalization), "conv_stem", 2, (0, 0))
        x = F.relu6(net.bn(x, "bn1"))
        for stage, (kernel, stride, expansion, _, repeats) in enumerate(self.stages):
            for i in range(repeats):
                block, step = f"blocks.{stage}.{i}", stride if i == 0 else 1
                out, numbers, last = x, iter((1, 2, 3)), "conv_pwl" if expansion > 1 else "conv_pw"
                if expansion > 1:
                    out = F.relu6(net.bn(net.conv(out, f"{block}.conv_pw", 1, (0, 0)), f"{block}.bn{next(numbers)}"))
                out = net.conv(out, f"{block}.conv_dw", step, self.padding(out.shape[2], kernel, step))
                out = F.relu6(net.bn(out, f"{block}.bn{next(numbers)}"))
                out = net.bn(net.conv(out, f"{block}.{last}", 1, (0, 0)), f"{block}.bn{next(numbers)}")
                x = x + out if i > 0 else out
        x = F.relu6(net.bn(net.conv(x, "conv_head", 1, (0, 0)), "bn2"))
        result: Logits = net.linear(F.mean(x, (2, 3)), "classifier").numpy()
        return result


def lite(number: int, **how: Any) -> Timm:
    shapes = zip(LITE, *LITES[number], strict=True)
    return Timm(tuple((*layer, channels, repeats) for layer, channels, repeats in shapes), **how)


def tf_lite(number: int) -> Timm:
    return lite(number, eps=1e-3, padding=tensorflow_same, normalization=HALF)


HALF_AS_WIDE = tuple((*stage[:3], {24: 16}.get(stage[3], stage[3] // 2), stage[4]) for stage in MOBILENET)
NETWORKS: Mapping[str, tuple[Timm, str, dict[str, Any]]] = {
    "mobilenetv2_100": (Timm(MOBILENET), "mobilenet_v2", {"activation": "relu6", "width": 1.0}),
    "mobilenetv2_050.lamb_in1k": (
        Timm(HALF_AS_WIDE, stem=16),
        "mobilenet_v2",
        {"activation": "relu6", "width": 0.5},
    ),
    "efficientnet_lite0": (lite(0), "efficientnet_lite0", {}),
    "efficientnet_lite1": (lite(1), "efficientnet_lite1", {}),
    "tf_efficientnet_lite0.in1k": (tf_lite(0), "efficientnet_lite0", {}),
    "tf_efficientnet_lite2": (tf_lite(2), "efficientnet_lite2", {}),
}
STATES: dict[str, State] = {}


def state_of(name: str) -> State:
    """Random weights with timm's names, with some variances as small as trained networks have them."""
    if name not in STATES:
        state = made_up(NETWORKS[name][0].names())
        for norm in [key for key in state if key.endswith("running_var")][::3]:
            small = np.linspace(1e-5, 2e-3, state[norm].size, dtype=np.float32)
            weight = norm.replace("running_var", "weight")
            state[weight] = state[weight] * np.sqrt(small / state[norm])
            state[norm] = small
        STATES[name] = state
    return STATES[name]


def as_safetensors(state: State, path: Path) -> Path:
    save_file({name: np.ascontiguousarray(value) for name, value in state.items()}, str(path))
    return path


def trained(path: Path, state: State, **beside: object) -> Path:
    """A checkpoint as timm's ``train.py`` leaves it: the weights, and what is known of them ``beside``."""
    forge = Forge()
    tensors = {name: forge.tensor(np.ascontiguousarray(value)) for name, value in state.items()}
    path.write_bytes(forge.zip({"epoch": 9, **beside, "state_dict": tensors}))
    return path


Write = Callable[[State, Path], Path]


def in_hub(folder: Path, config: object = None) -> Path:
    """An EfficientNet-Lite0 in a folder as a hub has it, its ``config.json`` beside it where there is one."""
    folder.mkdir(parents=True)
    if config is not None:
        (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return as_safetensors(state_of("efficientnet_lite0"), folder / "model.safetensors")


class TestLogits:
    @pytest.mark.parametrize("suffix", ["pth", "safetensors"])
    @pytest.mark.parametrize("name", NETWORKS)
    def test_timm_s_weights_give_timm_s_logits(self, name: str, suffix: str, tmp_path: Path) -> None:
        network, arch, options = NETWORKS[name]
        write: Write = as_pth if suffix == "pth" else as_safetensors
        weights = read_weights(write(state_of(name), tmp_path / f"{name}.{suffix}"))
        assert (weights.arch, dict(weights.options), weights.classes) == (arch, options, CLASSES)
        assert f"timm names, read as {name.removesuffix('.in1k')} by the file's name" in weights.origin
        images = random_images(64)
        assert_equal_logits(logits_of(weights.network, images), network.logits(state_of(name), images))

    def test_the_two_readings_of_the_same_names_differ(self, tmp_path: Path) -> None:
        state, images = state_of("efficientnet_lite0"), random_images(64)
        found = [
            logits_of(read_weights(as_safetensors(state, tmp_path / f"{name}.safetensors")).network, images)
            for name in ("efficientnet_lite0", "tf_efficientnet_lite0")
        ]
        assert np.abs(found[0] - found[1]).max() > 0.1 * np.abs(found[0]).max()

    @pytest.mark.parametrize(
        ("name", "normalization"), [("resnet18.a1_in1k", IMAGENET), ("resnet34.ra4_e3600_r224_in1k", HALF)]
    )
    def test_resnet_is_normalized_as_its_recipe_was(
        self, name: str, normalization: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("tests.fakes.pytorch_networks.IMAGENET", normalization)
        depth = int(name[6:8])
        state, images = made_up(resnet_names(depth, CLASSES)), random_images(64)
        weights = read_weights(as_safetensors(state, tmp_path / f"{name}.safetensors"))
        assert f"torchvision names, read as {name}" in weights.origin
        assert_equal_logits(logits_of(weights.network, images), plain_resnet(state, images, depth))


class TestReading:
    @pytest.mark.parametrize("file", ["weights.safetensors", "lite0.safetensors", "model.safetensors"])
    def test_names_that_two_networks_share_are_never_guessed_at(self, file: str, tmp_path: Path) -> None:
        path = as_safetensors(state_of("efficientnet_lite0"), tmp_path / file)
        with pytest.raises(InputError) as caught:
            read_weights(path)
        assert one_line_about(str(caught.value), file, "tf_efficientnet_lite*", " efficientnet_lite*", "config.json")

    @pytest.mark.parametrize(
        ("folder", "name"),
        [
            ("tf_efficientnet_lite0.in1k", "tf_efficientnet_lite0"),
            ("models--timm--tf_efficientnet_lite0.in1k/snapshots/0f1e", "tf_efficientnet_lite0"),
            ("timm/efficientnet_lite0.ra_in1k", "efficientnet_lite0"),
        ],
    )
    def test_a_hub_s_file_is_told_by_its_folder(self, folder: str, name: str, tmp_path: Path) -> None:
        weights = read_weights(in_hub(tmp_path / folder))
        assert f"read as {name} by the folder's name" in weights.origin

    def test_a_hub_s_file_is_told_by_the_config_beside_it(self, tmp_path: Path) -> None:
        how = {"mean": [0.5] * 3, "std": [0.25] * 3, "crop_pct": 0.8, "interpolation": "bilinear"}
        path = in_hub(tmp_path / "mine", {"architecture": "tf_efficientnet_lite0", "pretrained_cfg": how})
        weights = read_weights(path)
        assert "read as tf_efficientnet_lite0 by config.json" in weights.origin
        assert weights.preprocessing == Preprocessing(1.25, "bilinear")
        network = lite(0, eps=1e-3, padding=tensorflow_same, normalization=((127.5,) * 3, (63.75,) * 3))
        images = random_images(64)
        ours = logits_of(weights.network, images)
        assert_equal_logits(ours, network.logits(state_of("efficientnet_lite0"), images))

    @pytest.mark.parametrize(
        "config", ['{"architectures": ["Other"]}', '{"architecture": 5}', '{"architecture": null}']
    )
    def test_a_config_of_others_says_nothing(self, config: object, tmp_path: Path) -> None:
        weights = read_weights(in_hub(tmp_path / "efficientnet_lite0", config))
        assert "by the folder's name" in weights.origin

    @pytest.mark.parametrize(
        "config",
        [
            "{",
            "[]",
            "[" * 100_000,
            " " * 100_000,
            {"architecture": "efficientnet_lite0", "pretrained_cfg": {"mean": [0.5] * 3, "std": [0.0] * 3}},
            {"architecture": "efficientnet_lite0", "pretrained_cfg": {"mean": [1e400] * 3, "std": [1.0] * 3}},
            {"architecture": "efficientnet_lite0", "pretrained_cfg": {"mean": [0.5], "std": [0.5]}},
            {"architecture": "efficientnet_lite0", "pretrained_cfg": {"crop_pct": 0}},
            {"architecture": "efficientnet_lite0", "pretrained_cfg": {"crop_pct": 0.01}},
        ],
    )
    def test_a_config_that_cannot_be_is_refused_by_name(self, config: object, tmp_path: Path) -> None:
        with pytest.raises(InputError) as caught:
            read_weights(in_hub(tmp_path / "odd", config))
        assert one_line_about(str(caught.value), "config.json")

    @pytest.mark.parametrize(
        ("arch", "name"),
        [
            ("tf_efficientnet_lite0", "tf_efficientnet_lite0"),
            ("hf-hub:timm/tf_efficientnet_lite0.in1k", "tf_efficientnet_lite0"),
            ("efficientnet_lite0", "efficientnet_lite0"),
            ("efficientnet_lite0.ra_in1k", "efficientnet_lite0"),
        ],
    )
    def test_a_checkpoint_is_told_by_the_arch_that_it_keeps(self, arch: str, name: str, tmp_path: Path) -> None:
        state, images = state_of("efficientnet_lite0"), random_images(64)
        weights = read_weights(trained(tmp_path / "model_best.pth.tar", state, arch=arch))
        assert f"timm names, read as {name} by the arch in the file" in weights.origin
        network = tf_lite(0) if name.startswith("tf_") else lite(0)
        assert_equal_logits(logits_of(weights.network, images), network.logits(state, images))

    def test_the_arch_in_a_file_goes_before_the_file_s_name(self, tmp_path: Path) -> None:
        path = tmp_path / "efficientnet_lite0.pth"
        weights = read_weights(trained(path, state_of("efficientnet_lite0"), arch="tf_efficientnet_lite0"))
        assert "read as tf_efficientnet_lite0 by the arch in the file" in weights.origin

    @pytest.mark.parametrize("arch", ["efficientnet", "", 5, None])
    def test_an_arch_that_tells_nothing_leaves_it_to_the_file_s_name(self, arch: object, tmp_path: Path) -> None:
        state = state_of("efficientnet_lite0")
        weights = read_weights(trained(tmp_path / "tf_efficientnet_lite0.pth", state, arch=arch))
        assert "read as tf_efficientnet_lite0 by the file's name" in weights.origin
        with pytest.raises(InputError) as caught:
            read_weights(trained(tmp_path / "last.pth.tar", state, arch=arch))
        assert one_line_about(str(caught.value), "last.pth.tar", "tf_efficientnet_lite*", " efficientnet_lite*")

    def test_an_arch_of_a_thousand_letters_is_said_in_short(self, tmp_path: Path) -> None:
        state = state_of("mobilenetv2_100")
        weights = read_weights(trained(tmp_path / "last.pth.tar", state, arch="mobilenetv2_100." + "a" * 4000))
        assert "read as mobilenetv2_100.aaa" in weights.origin and len(weights.origin) < len(str(tmp_path)) + 300

    @pytest.mark.parametrize("prefix", ["module.", "_orig_mod.module.", "model."])
    def test_a_wrapper_s_prefix_hides_neither_names_nor_hints(self, prefix: str, tmp_path: Path) -> None:
        state, images = state_of("efficientnet_lite0"), random_images(64)
        wrapped = {prefix + name: value for name, value in state.items()}
        weights = read_weights(as_pth(wrapped, tmp_path / "tf_efficientnet_lite0.pth"))
        assert f"without the prefix '{prefix}', timm names, read as tf_efficientnet_lite0" in weights.origin
        assert_equal_logits(logits_of(weights.network, images), tf_lite(0).logits(state, images))

    def test_of_a_network_and_its_average_the_chosen_one_is_told_by_the_arch(self, tmp_path: Path) -> None:
        state, forge = state_of("efficientnet_lite0"), Forge()
        average = {**state, "classifier.bias": state["classifier.bias"] + 1}
        both = {
            key: {name: forge.tensor(np.ascontiguousarray(value)) for name, value in of.items()}
            for key, of in (("state_dict", state), ("state_dict_ema", average))
        }
        path = tmp_path / "last.pth.tar"
        path.write_bytes(forge.zip({"arch": "tf_efficientnet_lite0", **both}))
        for key, expected, other in (("state_dict", state, "state_dict_ema"), (None, average, "state_dict")):
            weights = read_weights(path, key=key)
            assert f"not '{other}', timm names, read as tf_efficientnet_lite0" in weights.origin
            assert np.array_equal(weights.state["classifier.1.bias"], expected["classifier.bias"])

    def test_the_recipe_s_crop_is_told_by_the_arch(self, tmp_path: Path) -> None:
        state = made_up(resnet_names(18, CLASSES))
        weights = read_weights(trained(tmp_path / "last.pth.tar", state, arch="resnet18.a1_in1k"))
        assert weights.preprocessing == Preprocessing(1 / 0.95, "bicubic")

    def test_an_arch_of_no_known_recipe_says_nothing(self, tmp_path: Path) -> None:
        weights = read_weights(trained(tmp_path / "model_best.pth.tar", made_up(resnet_names(18, 10)), arch="resnet18"))
        assert "torchvision names)" in weights.origin and weights.preprocessing is None

    @pytest.mark.parametrize("file", ["resnet18.pth", "resnet18-f37072fd.pth", "my_resnet18.best.pth", "weights.pth"])
    def test_a_name_of_no_known_recipe_says_nothing(self, file: str, tmp_path: Path) -> None:
        (tmp_path / file).write_bytes(b"")
        assert hints_of(tmp_path / file).model == ""

    @pytest.mark.parametrize("name", ["mobilenetv2_110d", "mobilenetv2_120d"])
    def test_a_deeper_mobilenet_of_timm_s_is_refused_by_what_it_has_more(self, name: str, tmp_path: Path) -> None:
        deeper = tuple((*stage[:4], stage[4] + (stage[4] > 1)) for stage in MOBILENET)
        state = {key: np.ones(shape, np.float32) for key, shape in Timm(deeper).names().items()}
        with pytest.raises(InputError) as caught:
            read_weights(as_safetensors(state, tmp_path / f"{name}.safetensors"))
        assert one_line_about(str(caught.value), name, "does not fit mobilenet_v2")


class TestPreprocessing:
    @pytest.mark.parametrize(
        ("name", "shorter", "interpolation"),
        [
            ("resnet18.a1_in1k", 236, "bicubic"),
            ("resnet50.tv2_in1k", 232, "bilinear"),
            ("resnet50.tv_in1k", 256, "bilinear"),
            ("mobilenetv2_100.ra_in1k", 256, "bicubic"),
            ("tf_efficientnet_lite1.in1k", 254, "bicubic"),
        ],
    )
    def test_a_recipe_s_name_tells_the_crop(self, name: str, shorter: int, interpolation: str) -> None:
        how = hints_of(Path(f"{name}.safetensors")).preprocessing
        assert how is not None
        assert (how.shorter_side(224), how.interpolation) == (shorter, interpolation)

    def test_it_goes_from_the_file_into_the_classifier_and_its_checkpoint(self, tmp_path: Path) -> None:
        classifier = classifier_from(self.weights(tmp_path), Mode.NORMAL)
        image = np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8)
        expected = Preprocessing(1 / 0.95, "bicubic")
        assert classifier.preprocessing == expected
        path = tmp_path / "c.safetensors"
        classifier.write_checkpoint(path)
        again = classifier_from(read_weights(path), Mode.NORMAL)
        assert again.preprocessing == expected
        assert np.array_equal(again.crop(image), classifier.crop(image))

    @pytest.mark.slow
    def test_it_goes_into_a_deployed_file(self, tmp_path: Path) -> None:
        expected = Preprocessing(1 / 0.95, "bicubic")
        classifier = make_random_classifier("shufflenet_v1_x0_5_g3", Mode.QUANTIZED, image_size=32, target=ONNX)
        dump_classifier(replace(classifier, preprocessing=expected), tmp_path / "net.onnx", batch=None)
        assert open_file(tmp_path / "net.onnx").preprocessing == expected

    @pytest.mark.slow
    @pytest.mark.usefixtures("short_shufflenet_here")
    def test_it_goes_into_a_run_that_begins_with_these_weights(self, tmp_path: Path) -> None:
        expected = Preprocessing(1 / 0.95, "bicubic")
        start = make_random_classifier("shufflenet_v1_x0_5_g3", Mode.NORMAL, image_size=32)
        names = tuple(map(str, range(len(start.classes))))
        replace(start, preprocessing=expected, classes=names).write_checkpoint(tmp_path / "start.safetensors")
        request = small_request(tmp_path)
        with pytest.raises(StoppedError):
            train(replace(request, checkpoint=tmp_path / "start.safetensors", new_head=True), stopping_after(1))
        done = train(TrainOptions(arch=request.arch, save=tmp_path, resume=True, workers=1))
        assert read_weights(done.checkpoint).preprocessing == expected

    def weights(self, folder: Path) -> Weights:
        state = made_up(resnet_names(18, CLASSES))
        return read_weights(as_safetensors(state, folder / "resnet18.a1_in1k.safetensors"))


class TestEpsilon:
    @pytest.mark.parametrize(("theirs", "ours"), [(1e-5, 1e-3), (1e-3, 1e-5)])
    def test_another_epsilon_computes_the_same(self, theirs: float, ours: float) -> None:
        variance = np.array([0.0, 1e-6, 1e-4, 1e-3, 1.0, 100.0], np.float32)
        state = {"n.weight": np.arange(1, 7, dtype=np.float32), "n.running_var": variance}
        changed = with_epsilon(state, "n", theirs, ours)
        assert (changed["n.running_var"] >= 0).all()
        scales = [s["n.weight"] / np.sqrt(s["n.running_var"] + eps) for s, eps in ((state, theirs), (changed, ours))]
        np.testing.assert_allclose(scales[1], scales[0], rtol=1e-5)

    def test_imagenet_s_statistics_are_those_of_the_tests(self) -> None:
        assert all(map(math.isclose, (*IMAGENET_RGB.mean, *IMAGENET_RGB.std), (*IMAGENET[0], *IMAGENET[1])))
