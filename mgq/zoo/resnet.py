"""ResNet (He et al. 2015, arXiv:1512.03385) with fused conv + batch norm + ReLU, and torchvision's names for it."""

from __future__ import annotations

import re
from typing import Any

import megengine.module as M
from megengine import Tensor

from mgq.weights.foreign_states import IMAGENET_RGB, NO_HINTS, AdaptedState, Hints, State, fold_input, without_counters
from mgq.zoo.layers import global_average, initialize, keep_grid_of


class BasicBlock(M.Module):  # type: ignore[misc]
    """Two 3x3 convolutions and a shortcut."""

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv_bn_relu1 = M.ConvBnRelu2d(in_channels, channels, 3, stride, 1, bias=False)
        self.conv_bn2 = M.ConvBn2d(channels, channels, 3, 1, 1, bias=False)
        self.downsample = shortcut(in_channels, channels, stride)
        self.add = M.Elemwise("FUSE_ADD_RELU")

    def forward(self, x: Tensor) -> Tensor:
        return self.add(self.conv_bn2(self.conv_bn_relu1(x)), self.downsample(x))


class Bottleneck(M.Module):  # type: ignore[misc]
    """1x1, 3x3 (which carries the stride) and 1x1 convolutions and a shortcut."""

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        out_channels = channels * self.expansion
        self.conv_bn_relu1 = M.ConvBnRelu2d(in_channels, channels, 1, bias=False)
        self.conv_bn_relu2 = M.ConvBnRelu2d(channels, channels, 3, stride, 1, bias=False)
        self.conv_bn3 = M.ConvBn2d(channels, out_channels, 1, bias=False)
        self.downsample = shortcut(in_channels, out_channels, stride)
        self.add = M.Elemwise("FUSE_ADD_RELU")

    def forward(self, x: Tensor) -> Tensor:
        main = self.conv_bn3(self.conv_bn_relu2(self.conv_bn_relu1(x)))
        return self.add(main, self.downsample(x))


def shortcut(in_channels: int, out_channels: int, stride: int) -> M.Module:
    if in_channels == out_channels and stride == 1:
        return M.Identity()
    return M.ConvBn2d(in_channels, out_channels, 1, stride, bias=False)


class ResNet(M.Module):  # type: ignore[misc]
    """``forward``: float32 (N, 3, H, W), BGR minus 128 -> float32 logits (N, classes)."""

    def __init__(
        self, block: type[BasicBlock] | type[Bottleneck], repeats: tuple[int, ...], classes: int = 1000
    ) -> None:
        super().__init__()
        self.quant = M.QuantStub()
        self.dequant = M.DequantStub()
        self.conv_bn_relu1 = M.ConvBnRelu2d(3, 64, 7, 2, 3, bias=False)
        self.maxpool = M.MaxPool2d(3, 2, 1)
        width = 64
        for stage, repeat in enumerate(repeats):
            channels = 64 << stage
            blocks = []
            for i in range(repeat):
                blocks.append(block(width, channels, stride=2 if stage > 0 and i == 0 else 1))
                width = channels * block.expansion
            setattr(self, f"layer{stage + 1}", M.Sequential(*blocks))
        self.fc = M.Linear(width, classes)
        self.fc.disable_quantize()
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_bn_relu1(self.quant(x))
        x = keep_grid_of(x, self.maxpool(x))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.dequant(global_average(x)))


def resnet18(classes: int = 1000) -> ResNet:
    return ResNet(BasicBlock, (2, 2, 2, 2), classes)


def resnet34(classes: int = 1000) -> ResNet:
    return ResNet(BasicBlock, (3, 4, 6, 3), classes)


def resnet50(classes: int = 1000) -> ResNet:
    return ResNet(Bottleneck, (3, 4, 6, 3), classes)


def imagenet_recipe(mode: str, epochs: int | None = None) -> dict[str, Any]:
    """The public example's (MegEngine/Models, official/quantization); ``epochs`` shift its milestones."""
    shared = {"batch_size": 32, "schedule": "step", "weight_decay": 1e-4, "decay_all": True}
    if mode == "qat":
        epochs = epochs or 12
        return {**shared, "epochs": epochs, "lr": 0.000125, "milestones": (epochs / 2,)}
    epochs = epochs or 90
    milestones = tuple(epochs * share for share in (1 / 3, 2 / 3, 8 / 9))
    return {**shared, "epochs": epochs, "lr": 0.0125, "milestones": milestones}


def from_torchvision(state: State, hints: Hints = NO_HINTS) -> AdaptedState | None:
    """torchvision's ResNet names (``layer1.0.conv1.weight``, RGB normalized by ImageNet's statistics) as ours.

    timm's are the same; ``hints`` may tell of another normalization. Returns None where ``state`` has other names.
    """
    if "conv1.weight" not in state or "layer1.0.bn1.weight" not in state:
        return None
    last = 3 if "layer1.0.conv3.weight" in state else 2
    ours = {rename_parameter(name, last): value for name, value in without_counters(state).items()}
    expects = hints.normalization or IMAGENET_RGB
    layout = hints.layout("torchvision")
    return AdaptedState(fold_input(ours, "conv_bn_relu1", expects), layout, preprocessing=hints.preprocessing)


def rename_parameter(name: str, last: int) -> str:
    name = name.replace("downsample.0.", "downsample.conv.").replace("downsample.1.", "downsample.bn.")

    def fuse(match: re.Match[str]) -> str:
        prefix, kind, number = match[1], match[2], int(match[3])
        relu = "" if prefix and number == last else "_relu"
        return f"{prefix}conv_bn{relu}{number}.{kind}."

    return re.sub(r"^((?:layer\d+\.\d+\.)?)(conv|bn)(\d)\.", fuse, name)
