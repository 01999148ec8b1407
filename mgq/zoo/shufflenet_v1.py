"""ShuffleNetV1 (Zhang et al. 2017, arXiv:1707.01083) as the public MegEngine example has it.

At stride 2 it adds a projected shortcut where the paper concatenates an averaged one, and it shuffles after the
depthwise convolution.
"""

from __future__ import annotations

import megengine.functional as F
import megengine.module as M
from megengine import Tensor

from mgq.zoo.layers import global_average, initialize, keep_grid_of

REPEATS = (4, 8, 4)
# stem, then the three stages, for each width and number of groups
CHANNELS: dict[tuple[str, int], tuple[int, int, int, int]] = {
    ("0.5", 3): (12, 120, 240, 480),
    ("1.0", 3): (24, 240, 480, 960),
    ("1.5", 3): (24, 360, 720, 1440),
    ("2.0", 3): (48, 480, 960, 1920),
    ("0.5", 8): (16, 192, 384, 768),
    ("1.0", 8): (24, 384, 768, 1536),
    ("1.5", 8): (24, 576, 1152, 2304),
    ("2.0", 8): (48, 768, 1536, 3072),
}

RESIDUAL_GAIN = 0.25
"""Where residual branches begin. At 1, what 16 units add up to made the loss jump to 19 in the first epochs; training
from 0, where branches are silent, is the rule of Goyal et al. 2017 (arXiv:1706.02677) for ResNets."""


class ShuffleUnit(M.Module):  # type: ignore[misc]
    """Grouped 1x1, 3x3 depthwise, channel shuffle, grouped 1x1; added to the shortcut, then ReLU."""

    def __init__(self, in_channels: int, channels: int, stride: int, groups: int, first: bool) -> None:
        super().__init__()
        middle = channels // 4
        self.groups = groups
        self.branch_main_1 = M.Sequential(
            # The first unit's input has too few channels to be split into groups.
            M.ConvBnRelu2d(in_channels, middle, 1, groups=1 if first else groups, bias=False),
            M.ConvBn2d(middle, middle, 3, stride, 1, groups=middle, bias=False),
        )
        self.branch_main_2 = M.Sequential(M.ConvBn2d(middle, channels, 1, groups=groups, bias=False))
        self.add = M.Elemwise("FUSE_ADD_RELU")
        self.has_projection = stride == 2
        if self.has_projection:
            self.branch_proj = M.ConvBn2d(in_channels, channels, 1, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        main = self.branch_main_2(channel_shuffle(self.branch_main_1(x), self.groups))
        if self.has_projection:
            return self.add(self.branch_proj(x), main)
        return self.add(main, x)


def channel_shuffle(x: Tensor, groups: int) -> Tensor:
    """Channels seen as a (C / groups, groups) table, transposed; so every group gets some of every other."""
    batch, channels, height, width = x._tuple_shape
    table = F.reshape(x, (batch, channels // groups, groups, height, width))
    shuffled = F.reshape(F.transpose(table, (0, 2, 1, 3, 4)), (batch, channels, height, width))
    return keep_grid_of(x, shuffled)


class ShuffleNetV1(M.Module):  # type: ignore[misc]
    """``forward``: float32 (N, 3, H, W), BGR minus 128 -> float32 logits (N, classes)."""

    def __init__(self, width: str, groups: int, classes: int) -> None:
        super().__init__()
        stem, *stages = CHANNELS[width, groups]
        self.first_conv = M.Sequential(M.ConvBnRelu2d(3, stem, 3, 2, 1, bias=False))
        self.maxpool = M.MaxPool2d(3, 2, 1)
        units: list[M.Module] = []
        channels = stem
        for out, repeats in zip(stages, REPEATS, strict=True):
            for i in range(repeats):
                units.append(ShuffleUnit(channels, out, 2 if i == 0 else 1, groups, first=not units))
                channels = out
        self.features = M.Sequential(*units)
        self.quant = M.QuantStub()
        self.dequant = M.DequantStub()
        self.classifier = M.Sequential(M.Linear(channels, classes, bias=False))
        self.classifier.disable_quantize()
        initialize(self)
        for unit in units:
            M.init.fill_(unit.branch_main_2[0].bn.weight, RESIDUAL_GAIN)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first_conv(self.quant(x))
        x = self.features(keep_grid_of(x, self.maxpool(x)))
        return self.classifier(self.dequant(global_average(x)))


def shufflenet_v1(width: str, groups: int, classes: int = 1000) -> ShuffleNetV1:
    return ShuffleNetV1(width, groups, classes)
