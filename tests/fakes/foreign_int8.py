"""Imported networks in int8, without the time that a calibration takes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime

from mgq.engine.classifier.dump import dump_classifier
from mgq.engine.classifier.import_wish import ImportWish
from mgq.engine.classifier.onnx_import import import_classifier, leave_out_overhang
from mgq.engine.classifier.open import Classifier, quantize_with_ranges
from mgq.ptq.pipeline import snr_of
from mgq.quantization.modes import Mode
from mgq.quantization.targets import ONNX
from mgq.runtime.registry import load
from tests.fakes.measured_ranges import measure_ranges

Pixels = npt.NDArray[np.uint8]


def int8_of(path: Path, preprocess: str) -> Classifier:
    """The network in ``path`` in int8, its ranges told from made-up pictures."""
    classifier, _ = import_classifier(path, ImportWish(preprocess=preprocess), "")
    images = grey_noise(4, *(classifier.spec.only_size or (32, 32)))
    ranges = measure_ranges(classifier.network, [images], "", "", {}, correct_bias=False, target=ONNX)
    return quantize_with_ranges(classifier, ranges, Mode.QUANTIZED)


def grey_noise(number: int, height: int, width: int) -> Pixels:
    """Grey noise: all channels are the same, so that networks for grey pictures see no colours mixed."""
    noise = np.random.default_rng(3).integers(0, 256, (number, 1, height, width), np.uint8)
    return np.repeat(noise, 3, axis=1)


def color_noise() -> npt.NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (4, 3, 32, 32), np.uint8)


def check_import(path: Path, folder: Path) -> None:
    """What is imported of ``path`` answers as ONNX Runtime does, and its int8 nearly so in both engines."""
    images, options = color_noise(), onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    model = onnx.load(path)
    for node in model.graph.node:
        leave_out_overhang(node)
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    classifier, remarks = import_classifier(path, ImportWish(preprocess="raw"), "")
    assert "float answers as ONNX Runtime's" in remarks[0]
    wanted = session.run(None, {"image": images[:, ::-1].astype(np.float32)})[0]
    found = classifier.logits(images)
    assert float(np.abs(found - wanted).max() / np.abs(wanted).max()) < 1e-4
    file = dump_classifier(int8_of(path, "raw"), folder / "int8.onnx", batch=None).path
    for engine in ("openvino", "onnxruntime"):
        assert snr_of(load(file, engine).run(images).astype(np.float64), found.astype(np.float64)) > 15, engine
