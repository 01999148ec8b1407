"""torchvision's and timm's networks trained on photos, as ONNX: ``python tests/benchmarks/torch_exports.py --help``.

It needs torch, torchvision, onnx and Pillow, and nothing of mgq: an environment of its own holds them::

    uv venv -p 3.11 exports && uv pip install --python exports/bin/python torch torchvision onnx pillow
    exports/bin/python tests/benchmarks/torch_exports.py mobilenet_v3_small --photos flowers --seconds 240

``timm/NAME`` is a network of timm's, which has to be installed, too.

Weights begin at random, and minutes of one core make modest accuracy: enough to have activations of a trained network,
and right answers to lose.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LARGER = 256 / 224
"""The shorter side of a photo, in terms of what is cut out of it: as mgq prepares photos, too."""


def read_photos(folder: Path, side: int) -> tuple[Any, Any]:
    """The photos of ``folder``, one folder for each class: uint8 (N, 3, S, S) of the middle, and labels (N,)."""
    import numpy as np
    import torch
    from PIL import Image

    pixels, labels = [], []
    for label, place in enumerate(sorted(path for path in folder.iterdir() if path.is_dir())):
        for path in sorted(place.iterdir()):
            photo = Image.open(path).convert("RGB")
            scale = side / min(photo.size)
            photo = photo.resize([max(side, round(axis * scale)) for axis in photo.size], Image.Resampling.BILINEAR)
            left, top = ((axis - side) // 2 for axis in photo.size)
            pixels.append(np.asarray(photo.crop((left, top, left + side, top + side))).transpose(2, 0, 1))
            labels.append(label)
    return torch.from_numpy(np.stack(pixels)), torch.tensor(labels)


def normalized(pixels: Any) -> Any:
    """What torchvision's networks are fed."""
    import torch

    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    return (pixels.float() / 255 - mean) / std


def varied(pixels: Any, size: int) -> Any:
    """A random part of each of ``pixels`` (N, 3, S, S), of one size in a batch, some of them flipped."""
    import torch

    side = pixels.shape[-1]
    part = random.randint(round(side * 0.6), side)
    crops = []
    for photo in pixels:
        top, left = random.randint(0, side - part), random.randint(0, side - part)
        crop = photo[:, top : top + part, left : left + part]
        crops.append(crop.flip(2) if random.random() < 0.5 else crop)
    return torch.nn.functional.interpolate(normalized(torch.stack(crops)), (size, size), mode="bilinear")


def build(name: str, classes: int, size: int) -> Any:
    """A network with random weights, for pictures of ``size`` where it has tables that depend on it."""
    library, _, own = name.rpartition("/")
    if library != "timm":
        import torchvision

        return getattr(torchvision.models, own)(num_classes=classes)
    import timm

    try:
        return timm.create_model(own, num_classes=classes, img_size=size, exportable=True)
    except TypeError:  # a network that takes pictures of any size
        return timm.create_model(own, num_classes=classes, exportable=True)


def train(network: Any, photos: Any, labels: Any, size: int, seconds: float, rate: float, batch: int = 32) -> int:
    """Train for about ``seconds`` of processor time, the rate from 0 to ``rate`` and back; returns the steps."""
    import torch

    optimizer = torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=0.05)
    start, steps = time.process_time(), 0
    network.train()
    while (spent := (time.process_time() - start) / seconds) < 1:
        for group in optimizer.param_groups:
            group["lr"] = rate * min(spent / 0.15, 1.0) * (1 - spent)
        chosen = torch.randperm(len(photos))[:batch]
        answers = network(varied(photos[chosen], size).contiguous(memory_format=torch.channels_last))
        answers = answers if torch.is_tensor(answers) else answers.logits
        loss = torch.nn.functional.cross_entropy(answers, labels[chosen], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        steps += 1
    return steps


def top1(network: Any, photos: Any, labels: Any, size: int) -> float:
    """The share of right answers to the middle of each photo."""
    import torch

    edge = (photos.shape[-1] - size) // 2
    middle = photos[:, :, edge : edge + size, edge : edge + size]
    network.eval()
    with torch.no_grad():
        answers = torch.cat([network(normalized(part)).argmax(1) for part in middle.split(50)])
    return float((answers == labels).float().mean())


def export(network: Any, path: Path, size: int, opset: int) -> None:
    import torch

    network.eval()
    picture = torch.zeros(1, 3, size, size)
    names: dict[str, Any] = {"input_names": ["input"], "output_names": ["logits"]}
    axes = {"input": {0: "batch"}, "logits": {0: "batch"}}
    torch.onnx.export(network, picture, str(path), opset_version=opset, dynamo=False, dynamic_axes=axes, **names)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="as torchvision.models calls it, or timm/NAME")
    parser.add_argument("--photos", type=Path, required=True, help="a folder with train/CLASS and val/CLASS")
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--seconds", type=float, default=240)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--opset", type=int, default=17)
    options = parser.parse_args(words)
    import torch

    torch.manual_seed(0)
    random.seed(0)
    larger = round(options.size * LARGER)
    photos, labels = read_photos(options.photos / "train", larger)
    network = build(options.name, int(labels.max()) + 1, options.size).to(memory_format=torch.channels_last)
    steps = train(network, photos, labels, options.size, options.seconds, options.rate)
    right = top1(network, *read_photos(options.photos / "val", larger), options.size)
    path = Path(f"{Path(options.name).name}.onnx")
    export(network, path, options.size, options.opset)
    sys.stdout.write(f"{path}: {steps} steps, top-1 {100 * right:.1f} % on {options.photos / 'val'}\n")


if __name__ == "__main__":
    main()
