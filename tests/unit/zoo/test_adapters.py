"""Foreign weights: plain forwards written from the PyTorch names alone give the logits that our networks give.

The references take RGB pixels, normalize them as the foreign network was fed, pad every convolution explicitly and
compute batch norms unfused. Padding the pixels with 128 before they are normalized is what zero padding of our input
stands for; with it the two must agree to rounding.
"""

from __future__ import annotations

from pathlib import Path

import megengine.functional as F
import numpy as np
import numpy.typing as npt
import pytest
from megengine import Tensor
from safetensors.numpy import save_file

from mgq.data.decoding import bundled_cat, read_image
from mgq.data.transforms import eval_crop, to_batch
from mgq.errors import InputError
from mgq.weights.foreign_states import InputNormalization, fold_input
from mgq.weights.state_file import read_state
from mgq.zoo.registry import spec_of
from mgq.zoo.weight_loading import Weights, read_weights
from tests.conftest import CLASSES, State, logits_of, one_line_about, smooth_images, trio_of
from tests.fakes.pytorch_networks import (
    LITE,
    LITES,
    Logits,
    Padding,
    Pixels,
    Plain,
    Shapes,
    assert_equal_logits,
    bn_names,
    conv_names,
    fed,
    linear_names,
    made_up,
    mobilenet_names,
    plain_mobilenet,
    plain_resnet,
    random_images,
    resnet_names,
    tensorflow_same,
)


def lite_blocks(number: int) -> list[tuple[int, int, int, int, int]]:
    """Kernel, stride, expansion, input and output channels of every block of EfficientNet-Lite ``number``."""
    blocks = []
    inputs = 32
    for (kernel, stride, expansion), outputs, repeats in zip(LITE, *LITES[number], strict=True):
        for i in range(repeats):
            blocks.append((kernel, stride if i == 0 else 1, expansion, inputs, outputs))
            inputs = outputs
    return blocks


def lite_names(number: int, classes: int) -> Shapes:
    names = conv_names("_conv_stem", 32, 3, 3) | bn_names("_bn0", 32)
    blocks = lite_blocks(number)
    for i, (kernel, _, expansion, inputs, outputs) in enumerate(blocks):
        block, hidden = f"_blocks.{i}", inputs * expansion
        if expansion > 1:
            names |= conv_names(f"{block}._expand_conv", hidden, inputs, 1) | bn_names(f"{block}._bn0", hidden)
        names |= conv_names(f"{block}._depthwise_conv", hidden, 1, kernel) | bn_names(f"{block}._bn1", hidden)
        names |= conv_names(f"{block}._project_conv", outputs, hidden, 1) | bn_names(f"{block}._bn2", outputs)
    names |= conv_names("_conv_head", 1280, blocks[-1][-1], 1) | bn_names("_bn1", 1280)
    return names | linear_names("_fc", classes, 1280)


# Plain forwards.


def plain_lite(state: State, bgr: Pixels, number: int, same: Padding = tensorflow_same) -> Logits:
    net = Plain(state, 1e-3)
    x = net.conv(fed(bgr, same(bgr.shape[2], 3, 2), (127.0,) * 3, (128.0,) * 3), "_conv_stem", 2, (0, 0))
    x = F.relu6(net.bn(x, "_bn0"))
    for i, (kernel, stride, expansion, inputs, outputs) in enumerate(lite_blocks(number)):
        block, out = f"_blocks.{i}", x
        if expansion > 1:
            out = F.relu6(net.bn(net.conv(out, f"{block}._expand_conv", 1, (0, 0)), f"{block}._bn0"))
        padding = same(out.shape[2], kernel, stride)
        out = F.relu6(net.bn(net.conv(out, f"{block}._depthwise_conv", stride, padding), f"{block}._bn1"))
        out = net.bn(net.conv(out, f"{block}._project_conv", 1, (0, 0)), f"{block}._bn2")
        x = x + out if stride == 1 and inputs == outputs else out
    x = F.relu6(net.bn(net.conv(x, "_conv_head", 1, (0, 0)), "_bn1"))
    result: Logits = net.linear(F.mean(x, (2, 3)), "_fc").numpy()
    return result


def plain_shufflenet(state: State, bgr: Pixels) -> Logits:
    """The public example's ShuffleNetV1 with 3 groups, by its own names; it takes pixels minus 128."""
    net = Plain(state, 1e-5)

    def conv_bn(x: Tensor, name: str, stride: int, padding: int = 0) -> Tensor:
        weight = state[f"{name}.conv.weight"]
        groups = weight.shape[0] if weight.ndim == 5 else 1
        padded = F.nn.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
        return net.bn(F.conv2d(padded, Tensor(weight), stride=stride, groups=groups), f"{name}.bn")

    x = F.relu(conv_bn(Tensor(bgr.astype(np.float32) - 128), "first_conv.0", 2, 1))
    x = F.max_pool2d(F.nn.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1))), 3, 2)
    for i in range(16):
        unit, stride = f"features.{i}", 2 if i in (0, 4, 12) else 1
        main = F.relu(conv_bn(x, f"{unit}.branch_main_1.0", 1))
        main = conv_bn(main, f"{unit}.branch_main_1.1", stride, 1).numpy()
        # The first third of the next convolution's channels are 0, 3, 6, ... of this one's, the second 1, 4, 7, ...
        shuffled = np.concatenate([main[:, first::3] for first in range(3)], axis=1)
        main = conv_bn(Tensor(shuffled), f"{unit}.branch_main_2.0", 1)
        x = F.relu(main + (conv_bn(x, f"{unit}.branch_proj", 2) if stride == 2 else x))
    result: Logits = F.matmul(F.mean(x, (2, 3)), Tensor(state["classifier.0.weight"].T.copy())).numpy()
    return result


# The comparisons.


def read_back(state: State, path: Path) -> Weights:
    """``state`` as a safetensors file that others wrote, read without being told what it is."""
    save_file({name: np.ascontiguousarray(value) for name, value in state.items()}, str(path))
    return read_weights(path)


class TestResNet:
    # The number of entries is that of torchvision's own state_dict.
    @pytest.mark.parametrize(("depth", "entries"), [(18, 122), (50, 320)])
    def test_torchvision_s_weights_give_torchvision_s_logits(self, depth: int, entries: int, tmp_path: Path) -> None:
        state = made_up(resnet_names(depth, CLASSES))
        assert len(state) == entries
        weights = read_back(state, tmp_path / "resnet.safetensors")
        assert (weights.arch, weights.classes, weights.mode) == (f"resnet{depth}", CLASSES, "normal")
        assert "torchvision names" in weights.origin
        images = random_images(64)
        assert_equal_logits(logits_of(weights.network, images), plain_resnet(state, images, depth))

    def test_resnet34_is_told_from_resnet18(self, tmp_path: Path) -> None:
        names = resnet_names(34, CLASSES)
        assert len(names) == 218
        state = {name: np.zeros(shape, np.float32) for name, shape in names.items()}
        assert read_back(state, tmp_path / "resnet.safetensors").arch == "resnet34"


class TestMobileNetV2:
    @pytest.mark.parametrize("width", [1.0, 0.5])
    def test_torchvision_s_weights_give_torchvision_s_logits(self, width: float, tmp_path: Path) -> None:
        state = made_up(mobilenet_names(width, CLASSES))
        assert len(state) == 314
        weights = read_back(state, tmp_path / "mobilenet.safetensors")
        assert weights.arch == "mobilenet_v2"
        assert dict(weights.options) == {"activation": "relu6", "width": width}
        images = random_images(64)
        assert_equal_logits(logits_of(weights.network, images), plain_mobilenet(state, images))


class TestShuffleNetV1:
    def test_the_example_s_weights_give_the_plain_logits(self) -> None:
        trio = trio_of("shufflenet_v1_x0_5_g3")
        images = random_images(64)
        assert_equal_logits(logits_of(trio.normal, images), plain_shufflenet(trio.normal_state, images))


class TestEfficientNetLite:
    def test_the_names_here_are_those_of_the_published_package(self) -> None:
        packaged = spec_of("efficientnet_lite0").packaged
        path = packaged.path() if packaged else None
        assert path is not None
        found = read_state(path).tensors
        assert {name: value.shape for name, value in found.items()} == lite_names(0, 1000)

    @pytest.mark.parametrize(("number", "size"), [(0, 64), (0, 224), (2, 96)])
    def test_made_up_weights_give_the_plain_logits(self, number: int, size: int, tmp_path: Path) -> None:
        state = made_up(lite_names(number, CLASSES))
        weights = read_back(state, tmp_path / "lite.safetensors")
        assert (weights.arch, weights.classes) == (f"efficientnet_lite{number}", CLASSES)
        images = random_images(size)
        assert_equal_logits(logits_of(weights.network, images), plain_lite(state, images, number))

    def test_symmetric_padding_would_give_others(self, tmp_path: Path) -> None:
        state = made_up(lite_names(0, CLASSES))
        images = random_images(64)
        ours = logits_of(read_back(state, tmp_path / "lite.safetensors").network, images)
        symmetric = plain_lite(state, images, 0, same=lambda size, kernel, stride: (kernel // 2, kernel // 2))
        assert np.abs(ours - symmetric).max() > 0.1 * np.abs(ours).max()

    def test_the_published_weights_give_the_plain_logits_on_a_photo(self) -> None:
        spec = spec_of("efficientnet_lite0")
        path = spec.packaged.path() if spec.packaged else None
        assert path is not None
        photo = to_batch([eval_crop(read_image(bundled_cat()), 224)])
        ours = logits_of(read_weights(path, spec).network, photo)
        assert_equal_logits(ours, plain_lite(read_state(path).tensors, photo, 0))

    def test_lite1_is_told_from_its_siblings(self, tmp_path: Path) -> None:
        state = {name: np.zeros(shape, np.float32) for name, shape in lite_names(1, CLASSES).items()}
        assert read_back(state, tmp_path / "lite.safetensors").arch == "efficientnet_lite1"


class TestFoldedInput:
    def test_the_stem_takes_pixels_minus_128(self) -> None:
        names = conv_names("stem.conv", 4, 3, 1) | bn_names("stem.bn", 4)
        state = made_up(names)
        expects = InputNormalization((10.0, 90.0, 200.0), (20.0, 50.0, 100.0))
        bgr = smooth_images(1, 8, 8)
        normal = (bgr[:, ::-1] - np.reshape(expects.mean, (1, 3, 1, 1))) / np.reshape(expects.std, (1, 3, 1, 1))

        def ran(state: State, x: npt.NDArray[np.float64]) -> Logits:
            net = Plain(state, 1e-5)
            result: Logits = net.bn(net.conv(Tensor(x.astype(np.float32)), "stem.conv", 1, (0, 0)), "stem.bn").numpy()
            return result

        folded = fold_input(state, "stem", expects)
        np.testing.assert_allclose(ran(folded, bgr - 128.0), ran(state, normal), rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("channels", [1, 4])
    @pytest.mark.parametrize("arch", ["resnet18", "efficientnet_lite0"])
    def test_weights_for_other_than_three_channels_are_refused_by_name(
        self, arch: str, channels: int, tmp_path: Path
    ) -> None:
        names = resnet_names(18, CLASSES) if arch == "resnet18" else lite_names(0, CLASSES)
        stem = "conv1.weight" if arch == "resnet18" else "_conv_stem.weight"
        state = {name: np.ones(shape, np.float32) for name, shape in names.items()}
        state[stem] = np.ones((names[stem][0], channels, *names[stem][2:]), np.float32)
        with pytest.raises(InputError) as caught:
            read_back(state, tmp_path / "grey.safetensors")
        assert one_line_about(str(caught.value), "grey.safetensors", "conv.weight (", f", {channels}, ")

    def test_names_that_only_begin_as_a_layout_does_are_refused_in_one_line(self, tmp_path: Path) -> None:
        state = {name: np.ones(shape, np.float32) for name, shape in lite_names(0, CLASSES).items()}
        state["_blocks.x._depthwise_conv.weight"] = np.ones((8, 1, 3, 3), np.float32)
        with pytest.raises(InputError) as caught:
            read_back(state, tmp_path / "odd.safetensors")
        assert one_line_about(str(caught.value), "odd.safetensors")

    def test_what_it_was_given_stays_as_it_was(self) -> None:
        state = made_up(conv_names("stem.conv", 4, 3, 1) | bn_names("stem.bn", 4))
        before = {name: value.copy() for name, value in state.items()}
        fold_input(state, "stem", InputNormalization((1.0,) * 3, (2.0,) * 3))
        assert all(np.array_equal(state[name], before[name]) for name in before)
