"""Training steps in PyTorch for ``mgq bench --train --against torch``: a program of its own, in any Python that has it.

It reads one line of JSON, {arch, mode, batch, image_size, classes, threads}, and answers with {version}, or with
{problem}; after that each line read is a number of steps, and each line written {times, processor}: nanoseconds of
every step, and of the processor in all of them. It knows nothing of mgq, and imports PyTorch and the standard library.

The networks are those of mgq's zoo, with channels last, and the step is the same: label-smoothed cross entropy, SGD
with momentum and weight decay.
"""

from __future__ import annotations

import json
import re
import sys
import time
from typing import Any

import torch
from torch import nn
from torch.nn import functional

EXPANSION_6 = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
RESNETS = {"resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3)}
SHUFFLENETS = {
    ("0_5", 3): (12, 120, 240, 480),
    ("1_0", 3): (24, 240, 480, 960),
    ("1_5", 3): (24, 360, 720, 1440),
    ("2_0", 3): (48, 480, 960, 1920),
}


def conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, relu: bool = True) -> Any:
    layers = [
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
    ]
    return nn.Sequential(*layers, *([nn.ReLU(inplace=True)] if relu else []))


class BasicBlock(nn.Module):  # type: ignore[misc]
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first, self.second = conv(inputs, outputs, 3, stride), conv(outputs, outputs, 3, relu=False)
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else conv(inputs, outputs, 1, stride, relu=False)

    def forward(self, x: Any) -> Any:
        return functional.relu(self.second(self.first(x)) + self.shortcut(x))


class InvertedResidual(nn.Module):  # type: ignore[misc]
    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        layers = [conv(inputs, hidden, 1)] if expansion != 1 else []
        layers += [conv(hidden, hidden, 3, stride, hidden), conv(hidden, outputs, 1, relu=False)]
        self.layers = nn.Sequential(*layers)
        self.has_shortcut = stride == 1 and inputs == outputs

    def forward(self, x: Any) -> Any:
        return x + self.layers(x) if self.has_shortcut else self.layers(x)


class ShuffleUnit(nn.Module):  # type: ignore[misc]
    def __init__(self, inputs: int, outputs: int, stride: int, groups: int, first: bool) -> None:
        super().__init__()
        middle = outputs // 4
        self.groups = groups
        expand = conv(inputs, middle, 1, groups=1 if first else groups)
        self.before = nn.Sequential(expand, conv(middle, middle, 3, stride, middle, relu=False))
        self.after = conv(middle, outputs, 1, groups=groups, relu=False)
        self.shortcut = conv(inputs, outputs, 1, 2, relu=False) if stride == 2 else nn.Identity()

    def forward(self, x: Any) -> Any:
        y = self.before(x)
        batch, channels, height, width = y.shape
        table = y.view(batch, channels // self.groups, self.groups, height, width)
        y = table.transpose(1, 2).reshape(batch, channels, height, width)
        return functional.relu(self.after(y.contiguous(memory_format=torch.channels_last)) + self.shortcut(x))


class Classifier(nn.Module):  # type: ignore[misc]
    def __init__(self, layers: list[Any], width: int, classes: int, dropout: float = 0.0, bias: bool = True) -> None:
        super().__init__()
        self.features = nn.Sequential(*layers)
        self.head = nn.Sequential(nn.Dropout(dropout), nn.Linear(width, classes, bias=bias))

    def forward(self, x: Any) -> Any:
        return self.head(self.features(x).mean((2, 3)))


def network_of(arch: str, classes: int) -> Any:
    """The network in PyTorch; None for an architecture without a PyTorch form here."""
    shuffle = re.fullmatch(r"shufflenet_v1_x(\d_\d)_g(\d)", arch)
    if arch in RESNETS:
        layers, width = [conv(3, 64, 7, 2), nn.MaxPool2d(3, 2, 1)], 64
        for stage, repeats in enumerate(RESNETS[arch]):
            for i in range(repeats):
                layers.append(BasicBlock(width, 64 << stage, 2 if stage and i == 0 else 1))
                width = 64 << stage
        return Classifier(layers, width, classes)
    if arch == "mobilenet_v2":
        layers, width = [conv(3, 32, 3, 2)], 32
        for expansion, outputs, repeats, stride in EXPANSION_6:
            for i in range(repeats):
                layers.append(InvertedResidual(width, outputs, stride if i == 0 else 1, expansion))
                width = outputs
        return Classifier([*layers, conv(width, 1280, 1)], 1280, classes, dropout=0.2)
    if shuffle and (shuffle[1], int(shuffle[2])) in SHUFFLENETS:
        width, *stages = SHUFFLENETS[shuffle[1], int(shuffle[2])]
        layers = [conv(3, width, 3, 2), nn.MaxPool2d(3, 2, 1)]
        for stage, (outputs, repeats) in enumerate(zip(stages, (4, 8, 4))):  # noqa: B905 (any Python)
            for i in range(repeats):
                unit = ShuffleUnit(width, outputs, 2 if i == 0 else 1, int(shuffle[2]), stage == 0 and i == 0)
                layers.append(unit)
                width = outputs
        return Classifier(layers, width, classes, bias=False)
    return None


def prepared(network: Any, mode: str, images: Any) -> Any:
    """``network`` in training, for mode ``qat`` fake-quantized by PyTorch's FX."""
    network = network.to(memory_format=torch.channels_last).train()
    if mode == "normal":
        return network
    from torch.ao.quantization import get_default_qat_qconfig_mapping
    from torch.ao.quantization.quantize_fx import prepare_qat_fx

    return prepare_qat_fx(network, get_default_qat_qconfig_mapping("x86"), (images,)).train()


def tell(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


def main() -> None:
    order = json.loads(sys.stdin.readline())
    torch.set_num_threads(order["threads"])
    torch.manual_seed(0)
    network = network_of(order["arch"], order["classes"])
    if network is None:
        tell({"problem": "there is no PyTorch form of it here"})
        return
    size = order["image_size"]
    images = torch.randint(-128, 128, (order["batch"], 3, size, size)).float()
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, order["classes"], (order["batch"],))
    try:
        network = prepared(network, order["mode"], images)
    except (ImportError, AttributeError) as error:
        tell({"problem": f"this PyTorch has no FX quantization: {error}"})
        return
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-4, momentum=0.9, weight_decay=1e-4)

    def step() -> None:
        loss = functional.cross_entropy(network(images), labels, label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()

    tell({"version": torch.__version__})
    for line in sys.stdin:
        times = []
        processor = time.process_time_ns()
        for _ in range(int(line)):
            start = time.perf_counter_ns()
            step()
            times.append(time.perf_counter_ns() - start)
        tell({"times": times, "processor": time.process_time_ns() - processor})


if __name__ == "__main__":
    main()
