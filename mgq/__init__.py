"""mgq takes an image classifier from float32 weights to an int8 network that runs at the speed of the machine.

The verbs of the command line as Python calls::

    network = mgq.create_model("resnet18", classes=10)     # random weights, mode normal
    mgq.load_weights(network, "resnet18.pkl")              # strictly, by name and shape
    int8 = mgq.quantize(network, pictures)                 # calibrated on uint8 (N, 3, H, W)
    answers = mgq.infer(["cat.jpg"])                       # pretrained, int8
    mgq.dump("cat.megengine", arch="efficientnet_lite0")   # a file for MegEngine and MegEngine Lite
    mgq.train(arch="resnet18", data="flowers", epochs=20)  # a run under runs/
    mgq.qat(arch="resnet18")                               # on from it, for int8
    mgq.evaluate("flowers", arch="resnet18").top1          # percent
    mgq.calibrate(files=["photos"], arch="resnet18")       # a checkpoint for int8, without training
    mgq.benchmark(["resnet18"], ["int8"]).rows             # speed in every backend
    mgq.report("resnet18.qat").page                       # one HTML page about a run
    mgq.analyze("flowers").found.worst(3)                  # the layers that int8 disturbs most

Importing mgq imports no MegEngine and changes nothing in the environment. ``infer``, ``evaluate`` and ``report``
need no MegEngine for deployed files; the first of the other calls imports it. What a call has to say besides its
result goes to its callbacks or, where there are none, to the logger ``mgq``.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
from typing import TYPE_CHECKING, Any

from mgq.errors import FailureError, InputError, MgqError
from mgq.machine import WITHOUT_MEGENGINE, quiet_import

if TYPE_CHECKING:
    from mgq.api import benchmark as benchmark
    from mgq.api import calibrate as calibrate
    from mgq.api import evaluate as evaluate
    from mgq.api import qat as qat
    from mgq.api import train as train
    from mgq.engine.calibration.analysis import analyze as analyze
    from mgq.engine.classifier.dump import dump as dump
    from mgq.engine.classifier.predict import infer as infer
    from mgq.ptq.quantize import quantize as quantize
    from mgq.reports.report import report as report
    from mgq.zoo.own_networks import register as register
    from mgq.zoo.registry import create_model as create_model
    from mgq.zoo.weight_loading import load_weights as load_weights

__version__ = "0.1.0"

logging.getLogger("mgq").addHandler(logging.NullHandler())

WHERE = {
    "create_model": "mgq.zoo.registry",
    "load_weights": "mgq.zoo.weight_loading",
    "quantize": "mgq.ptq.quantize",
    "infer": "mgq.engine.classifier.predict",
    "dump": "mgq.engine.classifier.dump",
    "benchmark": "mgq.api",
    "calibrate": "mgq.api",
    "train": "mgq.api",
    "qat": "mgq.api",
    "evaluate": "mgq.api",
    "analyze": "mgq.engine.calibration.analysis",
    "report": "mgq.reports.report",
    "register": "mgq.zoo.own_networks",
}

IMPORTS_MEGENGINE = frozenset({"load_weights", "quantize", "dump", "analyze"})
"""Those whose modules need it to be imported."""

__all__ = [
    "FailureError",
    "InputError",
    "MgqError",
    "analyze",
    "benchmark",
    "calibrate",
    "create_model",
    "dump",
    "evaluate",
    "infer",
    "load_weights",
    "qat",
    "quantize",
    "register",
    "report",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in WHERE:
        try:
            with quiet_import() if name in IMPORTS_MEGENGINE else contextlib.nullcontext():
                return getattr(importlib.import_module(WHERE[name]), name)
        except ModuleNotFoundError as error:
            if error.name is not None and error.name.partition(".")[0] == "megengine":
                raise InputError(WITHOUT_MEGENGINE) from error
            raise
    raise AttributeError(f"module 'mgq' has no attribute '{name}'")
