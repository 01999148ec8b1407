"""Compares an imported file with ONNX Runtime in float, and its int8 file with float in each engine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime

from mgq.engine.classifier.dump import dump_classifier
from mgq.engine.classifier.import_wish import ImportWish
from mgq.engine.classifier.onnx_import import import_classifier, leave_out_overhang
from mgq.ptq.pipeline import snr_of
from mgq.runtime.registry import load
from tests.fakes.foreign_int8 import int8_of
from tests.fakes.foreign_models import Model

RAW = ImportWish(preprocess="raw")


def photos() -> npt.NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (4, 3, 32, 32), np.uint8)


def integers(model: Model, *values: int) -> str:
    return model.constant(values, np.int64)


def check(path: Path, folder: Path) -> None:
    images, options = photos(), onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    model = onnx.load(path)
    for node in model.graph.node:
        leave_out_overhang(node)
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    classifier, remarks = import_classifier(path, RAW, "")
    assert "float answers as ONNX Runtime's" in remarks[0]
    wanted = session.run(None, {"image": images[:, ::-1].astype(np.float32)})[0]
    found = classifier.logits(images)
    assert float(np.abs(found - wanted).max() / np.abs(wanted).max()) < 1e-4
    file = dump_classifier(int8_of(path, "raw"), folder / "int8.onnx", batch=None).path
    for engine in ("openvino", "onnxruntime"):
        assert snr_of(load(file, engine).run(images).astype(np.float64), found.astype(np.float64)) > 15, engine
