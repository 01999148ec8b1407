"""Names of modes, targets, presets and methods, as options take them. Importing this imports nothing heavy."""

from __future__ import annotations

from enum import Enum

from mgq.errors import no_such


class Mode(str, Enum):
    """``normal``: float32. ``qat``: float32 with fake quantization. ``quantized``: int8, inference only."""

    NORMAL = "normal"
    QAT = "qat"
    QUANTIZED = "quantized"


TARGETS = MEGENGINE, ONNX, ONNX_AVX2 = ("megengine", "onnx", "onnx-avx2")
"""The targets, which :mod:`mgq.quantization.targets` describes."""
ENGINE_FORMS = ANY_ENGINE, FOR_OPENVINO, FOR_ONNXRUNTIME = ("any", "openvino", "onnxruntime")
"""The engines that an ONNX file may be written for, see :mod:`mgq.graph.engine_forms`."""
METHODS = MIN_MAX, EMA, HISTOGRAM, MSE, EASYQUANT, LOGITS = (
    "min-max",
    "ema",
    "histogram",
    "mse",
    "easyquant",
    "logits",
)
"""How calibration chooses ranges."""
ROUNDINGS = BY_GPTQ, TO_NEAREST = ("gptq", "nearest")
"""How weights are rounded: by GPTQ (:mod:`mgq.ptq.gptq`), or each to the nearest integer."""
QUALITIES = FAST, BALANCED, BEST = ("fast", "balanced", "best")
"""Presets of post-training quantization. ``best`` is another name of ``balanced`` now."""
OBSERVERS = ("ema", "min-max", "lsq", "tqt")
"""Sources of the scales in quantization-aware training."""


def parse_mode(text: str) -> Mode:
    """The mode called ``text``. Raises InputError that lists the three."""
    try:
        return Mode(text)
    except ValueError:
        raise no_such("mode", text, [mode.value for mode in Mode]) from None
