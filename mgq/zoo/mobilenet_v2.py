"""MobileNetV2 (Sandler et al. 2018, arXiv:1801.04381), with torchvision's names for it.

The public MegEngine example trains it with ReLU, its authors and torchvision with ReLU6: an option here.
"""

from __future__ import annotations

import re
from typing import Any

import megengine.module as M
from megengine import Tensor

from mgq.errors import no_such
from mgq.weights.foreign_states import (
    IMAGENET_RGB,
    NO_HINTS,
    AdaptedState,
    Hints,
    State,
    fold_input,
    is_timm_mobile,
    shape_depthwise,
    without_counters,
    without_timm_names,
)
from mgq.weights.preprocessing import Preprocessing
from mgq.zoo.layers import ConvBnRelu6, global_average, initialize, scale_channels

# expansion, channels, repeats, stride (Table 2 of the paper)
STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
ACTIVATIONS: dict[str, type[M.Module]] = {"relu": M.ConvBnRelu2d, "relu6": ConvBnRelu6}


class InvertedResidual(M.Module):  # type: ignore[misc]
    """1x1 expansion, 3x3 depthwise, linear 1x1 projection; a shortcut where shapes allow it."""

    def __init__(self, in_channels: int, channels: int, stride: int, expansion: int, conv_act: type[M.Module]) -> None:
        super().__init__()
        hidden = in_channels * expansion
        layers = [conv_act(in_channels, hidden, 1, bias=False)] if expansion != 1 else []
        layers.append(conv_act(hidden, hidden, 3, stride, 1, groups=hidden, bias=False))
        layers.append(M.ConvBn2d(hidden, channels, 1, bias=False))
        self.conv = M.Sequential(*layers)
        # Every block has it, used or not: the public example's QAT checkpoints hold its observer.
        self.add = M.Elemwise("ADD")
        self.has_shortcut = stride == 1 and in_channels == channels

    def forward(self, x: Tensor) -> Tensor:
        return self.add(x, self.conv(x)) if self.has_shortcut else self.conv(x)


class MobileNetV2(M.Module):  # type: ignore[misc]
    """``forward``: float32 (N, 3, H, W), BGR minus 128 -> float32 logits (N, classes)."""

    def __init__(self, classes: int, width: float, activation: str) -> None:
        super().__init__()
        conv_act = ACTIVATIONS[activation]
        channels = scale_channels(32 * width)
        last = scale_channels(1280 * max(1.0, width))
        features = [conv_act(3, channels, 3, 2, 1, bias=False)]
        for expansion, stage_channels, repeats, stride in STAGES:
            out = scale_channels(stage_channels * width)
            for i in range(repeats):
                features.append(InvertedResidual(channels, out, stride if i == 0 else 1, expansion, conv_act))
                channels = out
        features.append(conv_act(channels, last, 1, bias=False))
        self.features = M.Sequential(*features)
        self.classifier = M.Sequential(M.Dropout(0.2), M.Linear(last, classes))
        self.classifier.disable_quantize()
        self.quant = M.QuantStub()
        self.dequant = M.DequantStub()
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.dequant(global_average(self.features(self.quant(x)))))


def mobilenet_v2(classes: int = 1000, width: float = 1.0, activation: str = "relu") -> MobileNetV2:
    """MobileNetV2 with a ``width`` multiplier and an ``activation``, ``relu`` or ``relu6``. Raises InputError for
    another activation."""
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise no_such("activation", str(activation), ACTIVATIONS)
    return MobileNetV2(classes, width, activation)


TIMM_LAYERS = {
    "conv_stem": "features.0.conv",
    "bn1": "features.0.bn",
    "conv_head": "features.18.conv",
    "bn2": "features.18.bn",
    "classifier": "classifier.1",
}


def imagenet_recipe(mode: str, epochs: int | None = None) -> dict[str, Any]:
    """The public example's (MegEngine/Models, official/quantization). Families without one of their own take it, too:
    the example trains ShuffleNetV1 by it, and has no EfficientNet-Lite."""
    shared = {"schedule": "linear", "weight_decay": 4e-5, "jitter": 0.4}
    if mode == "qat":
        return {**shared, "epochs": epochs or 30, "batch_size": 32, "lr": 0.0015625}
    return {**shared, "epochs": epochs or 240, "batch_size": 128, "lr": 0.0625}


def from_pytorch(state: State, hints: Hints = NO_HINTS) -> AdaptedState | None:
    """torchvision's or timm's names of MobileNetV2 as ours; None where ``state`` has others."""
    return from_torchvision(state, hints) or from_timm(state, hints)


def from_timm(state: State, hints: Hints) -> AdaptedState | None:
    """timm's ``mobilenetv2_*`` (``blocks.1.0.conv_pwl.weight``, ReLU6, RGB normalized) as ours."""
    if not is_timm_mobile(state, kernel=3):
        return None
    ours = without_timm_names(state, TIMM_LAYERS, lambda number: f"features.{number + 1}.conv")
    how = hints.preprocessing or Preprocessing(interpolation="bicubic")
    return adapt_state(ours, hints.layout("timm"), hints, how)


def adapt_state(ours: State, layout: str, hints: Hints, how: Preprocessing | None) -> AdaptedState:
    """``ours``, PyTorch weights under our names, with the input folded in; the width multiplier is read off them."""
    folded = fold_input(ours, "features.0", hints.normalization or IMAGENET_RGB)
    return AdaptedState(folded, layout, {"activation": "relu6", "width": width_of(ours)}, how)


def from_torchvision(state: State, hints: Hints = NO_HINTS) -> AdaptedState | None:
    """torchvision's MobileNetV2 names (``features.1.conv.0.0.weight``, ReLU6, RGB normalized) as ours.

    Returns None where ``state`` has other names.
    """
    if "features.0.0.weight" not in state or "features.1.conv.0.0.weight" not in state:
        return None
    ours: State = {}
    for name, value in without_counters(state).items():
        new = rename_parameter(name)
        is_depthwise = value.ndim == 4 and value.shape[1] == 1 and value.shape[2] > 1
        ours[new] = shape_depthwise(value) if is_depthwise else value
    return adapt_state(ours, hints.layout("torchvision"), hints, hints.preprocessing)


def rename_parameter(name: str) -> str:
    # Stem, head and the activated convolutions are (conv, bn, relu) triples: index 0 and 1.
    name = re.sub(r"^(features\.\d+|features\.\d+\.conv\.\d+)\.0\.", r"\1.conv.", name)
    name = re.sub(r"^(features\.\d+|features\.\d+\.conv\.\d+)\.1\.(?!conv)", r"\1.bn.", name)
    # The linear projection stands as two entries of the block's own sequence.
    match = re.match(r"^(features\.(\d+)\.conv)\.(\d+)\.(weight|bias|running_mean|running_var)$", name)
    if match:
        projection = 1 if match[2] == "1" else 2
        kind = "conv" if int(match[3]) == projection else "bn"
        name = f"{match[1]}.{projection}.{kind}.{match[4]}"
    return name


def options_of(state: State) -> dict[str, float]:
    """The builder's options that the shapes of ``state`` (under our names) tell: the width multiplier."""
    return {"width": width_of(state)}


def width_of(state: State) -> float:
    """The width multiplier whose last stage and stem have the channels of ``state``."""
    names = ("features.0.conv.weight", "features.18.conv.weight")
    if not all(name in state and state[name].ndim == 4 for name in names):
        return 1.0
    stem, last = (state[name].shape for name in names)
    for hundredths in range(10, 401, 5):
        width = hundredths / 100
        if scale_channels(32 * width) == stem[0] and scale_channels(320 * width) == last[1]:
            return width
    return 1.0
