"""Networks by their PyTorch names: shapes of their weights, and plain forwards written from those names alone."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import megengine.functional as F
import numpy as np
import numpy.typing as npt
from megengine import Tensor

from tests.conftest import State, random_state, smooth_images
from tests.fakes.weight_files import Forge

Pixels = npt.NDArray[np.uint8]
Logits = npt.NDArray[np.float32]
Shapes = dict[str, tuple[int, ...]]
Padding = Callable[[int, int, int], tuple[int, int]]
IMAGENET = ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))


def conv_names(name: str, outputs: int, inputs: int, kernel: int) -> Shapes:
    return {f"{name}.weight": (outputs, inputs, kernel, kernel)}


def bn_names(name: str, channels: int) -> Shapes:
    parts = ("weight", "bias", "running_mean", "running_var")
    return {**{f"{name}.{part}": (channels,) for part in parts}, f"{name}.num_batches_tracked": ()}


def linear_names(name: str, outputs: int, inputs: int) -> Shapes:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


RESNETS = {18: (False, (2, 2, 2, 2)), 34: (False, (3, 4, 6, 3)), 50: (True, (3, 4, 6, 3))}


def resnet_names(depth: int, classes: int) -> Shapes:
    """torchvision's names; the stride of a bottleneck is at its 3x3 convolution."""
    bottleneck, repeats = RESNETS[depth]
    names = conv_names("conv1", 64, 3, 7) | bn_names("bn1", 64)
    inputs = 64
    for stage, number in enumerate(repeats):
        middle = 64 * 2**stage
        outputs = middle * 4 if bottleneck else middle
        for i in range(number):
            block = f"layer{stage + 1}.{i}"
            kernels = (1, 3, 1) if bottleneck else (3, 3)
            widths = (middle, middle, outputs) if bottleneck else (middle, outputs)
            befores = (inputs, *widths[:-1])
            for j, (kernel, width, before) in enumerate(zip(kernels, widths, befores, strict=True), start=1):
                names |= conv_names(f"{block}.conv{j}", width, before, kernel) | bn_names(f"{block}.bn{j}", width)
            if i == 0 and (stage > 0 or bottleneck):
                names |= conv_names(f"{block}.downsample.0", outputs, inputs, 1)
                names |= bn_names(f"{block}.downsample.1", outputs)
            inputs = outputs
    return names | linear_names("fc", classes, inputs)


# expansion, channels, repeats, stride: table 2 of arXiv:1801.04381
MOBILENET = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


def mobilenet_names(width: float, classes: int) -> Shapes:
    """torchvision's names, for the widths 1.0 and 0.5."""

    def wide(channels: int) -> int:
        # Half of the table's widths are multiples of 8 but for that of 24.
        return {12: 16}.get(int(channels * width), int(channels * width))

    names = conv_names("features.0.0", wide(32), 3, 3) | bn_names("features.0.1", wide(32))
    inputs, index = wide(32), itertools.count(1)
    for expansion, channels, repeats, _ in MOBILENET:
        for _ in range(repeats):
            block, hidden, place = f"features.{next(index)}.conv", inputs * expansion, 0
            if expansion > 1:
                names |= conv_names(f"{block}.0.0", hidden, inputs, 1) | bn_names(f"{block}.0.1", hidden)
                place = 1
            names |= conv_names(f"{block}.{place}.0", hidden, 1, 3) | bn_names(f"{block}.{place}.1", hidden)
            names |= conv_names(f"{block}.{place + 1}", wide(channels), hidden, 1)
            names |= bn_names(f"{block}.{place + 2}", wide(channels))
            inputs = wide(channels)
    last = 1280
    names |= conv_names("features.18.0", last, inputs, 1) | bn_names("features.18.1", last)
    return names | linear_names("classifier.1", classes, last)


# Kernel, stride and expansion of the seven stages, for the whole family.
LITE = ((3, 1, 1), (3, 2, 6), (5, 2, 6), (3, 2, 6), (5, 1, 6), (5, 2, 6), (3, 1, 6))
# Output channels and repeats of the seven stages.
LITES = {
    0: ((16, 24, 40, 80, 112, 192, 320), (1, 2, 2, 3, 3, 4, 1)),
    1: ((16, 24, 40, 80, 112, 192, 320), (1, 3, 3, 4, 4, 5, 1)),
    2: ((16, 24, 48, 88, 120, 208, 352), (1, 3, 3, 4, 4, 5, 1)),
}


def made_up(names: Shapes) -> State:
    """Random weights whose running statistics are all different and whose variances are positive."""
    state = random_state(names)
    variances = [value for name, value in state.items() if name.endswith("running_var")]
    assert all((value > 0).all() and np.ptp(value) > 0 for value in variances)
    return state


class Plain:
    """One operation after the other, by the names of a PyTorch state."""

    def __init__(self, state: State, eps: float) -> None:
        self.state = state
        self.eps = eps

    def conv(self, x: Tensor, name: str, stride: int, padding: tuple[int, int]) -> Tensor:
        """``padding`` is that before and that behind, the same for both axes; one input channel is depthwise."""
        weight = self.state[f"{name}.weight"]
        groups = 1
        if weight.shape[1] == 1:
            groups, weight = weight.shape[0], weight[:, None]
        padded = F.nn.pad(x, ((0, 0), (0, 0), padding, padding))
        return F.conv2d(padded, Tensor(weight), stride=stride, groups=groups)

    def bn(self, x: Tensor, name: str) -> Tensor:
        weight, bias, mean, variance = (
            Tensor(self.state[f"{name}.{part}"].reshape(1, -1, 1, 1))
            for part in ("weight", "bias", "running_mean", "running_var")
        )
        return (x - mean) / F.sqrt(variance + self.eps) * weight + bias

    def linear(self, x: Tensor, name: str) -> Tensor:
        return F.matmul(x, Tensor(self.state[f"{name}.weight"].T.copy())) + Tensor(self.state[f"{name}.bias"])


def fed(bgr: Pixels, padding: tuple[int, int], mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """The normalized RGB picture, padded with pixels of 128."""
    pixels = np.pad(bgr[:, ::-1], ((0, 0), (0, 0), padding, padding), constant_values=128).astype(np.float64)
    normal = (pixels - np.reshape(mean, (1, 3, 1, 1))) / np.reshape(std, (1, 3, 1, 1))
    return Tensor(normal.astype(np.float32))


def plain_resnet(state: State, bgr: Pixels, depth: int) -> Logits:
    net = Plain(state, 1e-5)
    bottleneck, repeats = RESNETS[depth]
    x = F.relu(net.bn(net.conv(fed(bgr, (3, 3), *IMAGENET), "conv1", 2, (0, 0)), "bn1"))
    x = F.max_pool2d(F.nn.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1))), 3, 2)  # 0 is as good as none behind a ReLU
    for stage, number in enumerate(repeats):
        for i in range(number):
            block, stride = f"layer{stage + 1}.{i}", 2 if stage > 0 and i == 0 else 1
            # kernel and stride of each convolution
            layers = ((1, 1), (3, stride), (1, 1)) if bottleneck else ((3, stride), (3, 1))
            main = x
            for j, (kernel, step) in enumerate(layers, start=1):
                padded = net.conv(main, f"{block}.conv{j}", step, (kernel // 2, kernel // 2))
                main = net.bn(padded, f"{block}.bn{j}")
                main = F.relu(main) if j < len(layers) else main
            if f"{block}.downsample.0.weight" in state:
                x = net.bn(net.conv(x, f"{block}.downsample.0", stride, (0, 0)), f"{block}.downsample.1")
            x = F.relu(main + x)
    result: Logits = net.linear(F.mean(x, (2, 3)), "fc").numpy()
    return result


def plain_mobilenet(state: State, bgr: Pixels) -> Logits:
    net = Plain(state, 1e-5)
    x = net.conv(fed(bgr, (1, 1), *IMAGENET), "features.0.0", 2, (0, 0))
    x = F.relu6(net.bn(x, "features.0.1"))
    index = itertools.count(1)
    for expansion, _, repeats, stride in MOBILENET:
        for i in range(repeats):
            block, place, out = f"features.{next(index)}.conv", 0, x
            if expansion > 1:
                out = F.relu6(net.bn(net.conv(out, f"{block}.0.0", 1, (0, 0)), f"{block}.0.1"))
                place = 1
            out = net.conv(out, f"{block}.{place}.0", stride if i == 0 else 1, (1, 1))
            out = F.relu6(net.bn(out, f"{block}.{place}.1"))
            out = net.bn(net.conv(out, f"{block}.{place + 1}", 1, (0, 0)), f"{block}.{place + 2}")
            x = x + out if i > 0 else out
    x = F.relu6(net.bn(net.conv(x, "features.18.0", 1, (0, 0)), "features.18.1"))
    result: Logits = net.linear(F.mean(x, (2, 3)), "classifier.1").numpy()
    return result


def tensorflow_same(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """Padding before and behind so that ceil(size / stride) values come out; the odd one goes behind."""
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


def assert_equal_logits(ours: Logits, plain: Logits) -> None:
    assert ours.shape == plain.shape
    assert np.ptp(plain, axis=1).min() > 0.1  # they say something
    assert np.abs(ours - plain).max() <= 1e-4 * np.abs(plain).max()


def random_images(size: int, number: int = 2) -> Pixels:
    """Half smooth, half noise: the borders and the channel order matter."""
    noise = np.random.default_rng(1).integers(0, 256, (number - number // 2, 3, size, size), np.uint8)
    return np.concatenate([smooth_images(number // 2, size, size), noise])


def as_pth(state: State, path: Path) -> Path:
    forge = Forge()
    path.write_bytes(forge.zip({name: forge.tensor(np.ascontiguousarray(value)) for name, value in state.items()}))
    return path
