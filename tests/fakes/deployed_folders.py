"""A folder as it lies on a machine where networks are deployed: an int8 network as files, and labelled pictures."""

from __future__ import annotations

from pathlib import Path

from mgq.data.decoding import bundled_cat
from mgq.data.image_sources import expand
from mgq.engine.calibration import calibration_run
from mgq.engine.classifier.classifier import Classifier
from mgq.engine.classifier.dump import dump_classifier
from mgq.engine.classifier.open import convert
from mgq.ptq.presets import CalibrationConfig
from mgq.quantization.option_names import Mode
from mgq.quantization.targets import ONNX
from tests.conftest import classifier_of, write_images

ARCH = "shufflenet_v1_x0_5_g3"


def calibrate_on_cat() -> Classifier:
    """An int8 network of ``ARCH``, quickly."""
    config = CalibrationConfig(target=ONNX, weight_rounding="nearest")
    found = calibration_run.calibrate(classifier_of(ARCH), expand([str(bundled_cat())]), 1, config=config)
    return convert(found.classifier, Mode.QUANTIZED)


def fill_deployed_folder(folder: Path, classifier: Classifier) -> Path:
    """``folder`` with ``net.onnx``, where there is a linker ``net.so``, and eight labelled pictures in ``val``."""
    dump_classifier(classifier, folder / "net.onnx", batch=None)
    dump_classifier(classifier, folder / "net.so")
    (folder / "val").mkdir()
    for number in range(2):
        write_images(folder / "val" / f"kind {number}", 4)
    return folder
