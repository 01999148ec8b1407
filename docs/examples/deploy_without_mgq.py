"""Writes an int8 ONNX file, then runs it with ONNX Runtime, OpenCV and numpy alone.

The second half, from `load` on, is all that a program needs on the machine where the file is deployed.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime

import mgq
from mgq.data.decoding import bundled_cat


def load(path: Path) -> tuple[onnxruntime.InferenceSession, dict[str, Any]]:
    """A session of ONNX Runtime, and what mgq wrote into the metadata of the file."""
    metadata = {entry.key: entry.value for entry in onnx.load(str(path)).metadata_props}
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]), json.loads(metadata["mgq"])


def crop(image: npt.NDArray[np.uint8], about: dict[str, Any]) -> npt.NDArray[np.uint8]:
    """The centre of ``image``, uint8 (H, W, 3), BGR, as the network was trained to see it: (S, S, 3)."""
    size, how = about["image_size"], about["preprocessing"]
    factor = round(size * how["resize"]) / min(image.shape[:2])
    flag = cv2.INTER_CUBIC if how["interpolation"] == "bicubic" else cv2.INTER_LINEAR
    height, width = (round(side * factor) for side in image.shape[:2])
    resized = cv2.resize(image, (width, height), interpolation=flag)
    top, left = (height - size) // 2, (width - size) // 2
    return np.asarray(resized[top : top + size, left : left + size], np.uint8)


def classify(path: Path, image: Path) -> tuple[str, float]:
    """The most probable class of ``image`` and its probability."""
    session, about = load(path)
    pixels = cv2.imread(str(image))
    assert pixels is not None, f"cannot read {image}"
    # uint8, BGR, no normalization: the file takes pixels as they are.
    batch = np.ascontiguousarray(crop(np.asarray(pixels, np.uint8), about).transpose(2, 0, 1)[None])
    (logits,) = session.run(None, {session.get_inputs()[0].name: batch})
    probabilities = np.exp(logits[0] - logits[0].max())
    probabilities /= probabilities.sum()
    best = int(probabilities.argmax())
    return about["classes"][best], float(probabilities[best])


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = mgq.dump(Path(folder) / "efficientnet_lite0.onnx", arch="efficientnet_lite0")
        name, probability = classify(path, bundled_cat())
        print(f"{path.name}: {path.stat().st_size / 1e6:.1f} MB")
        print(f"{bundled_cat().name}: {name}, {probability:.1%}")


if __name__ == "__main__":
    main()
