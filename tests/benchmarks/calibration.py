"""What calibration costs and gives: ``python -m tests.benchmarks.calibration FOLDER``, FOLDER/<wnid>/*.

EfficientNet-Lite0, ImageNet weights, 224x224. First the time of a batch of 10 with MegEngine's HistogramObserver and
with each of our estimators, in turns; then, for each method, calibration on every fifth
picture, and top-1 of the real int8 network on the others and how often it says what float says.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt

from mgq.system.megengine_start import import_megengine

import_megengine()

import megengine.module as M  # noqa: E402
from megengine import Tensor  # noqa: E402
from megengine.quantization import calibration_qconfig  # noqa: E402
from megengine.quantization.quantize import disable_fake_quant, enable_observer, reset_qconfig  # noqa: E402

from mgq.data.image_sources import expand  # noqa: E402
from mgq.data.imagenet_classes import imagenet_classes  # noqa: E402
from mgq.data.transforms import to_batch  # noqa: E402
from mgq.engine.classifier.open import Classifier, open_classifier  # noqa: E402
from mgq.engine.classifier.predict import read_crops  # noqa: E402
from mgq.ptq.observers import RANGE_OBSERVERS  # noqa: E402
from mgq.ptq.quantize import quantize  # noqa: E402
from mgq.ptq.range_measurement import as_input, with_observers  # noqa: E402
from mgq.quantization.modes import Mode, fix_input_scale, to_mode  # noqa: E402
from mgq.quantization.option_names import METHODS  # noqa: E402
from mgq.quantization.qat_layers import find_quantized_layers  # noqa: E402
from tests.fakes.measured_ranges import measure_ranges  # noqa: E402

BATCH = 10
ROUNDS = 5
STOCK = "MegEngine's HistogramObserver"


def opened() -> Classifier:
    return open_classifier("efficientnet_lite0", mode=Mode.NORMAL, pretrained=True)


def images_of(folder: str) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    rank = {entry.wnid: index for index, entry in enumerate(imagenet_classes())}
    found = list(read_crops(opened(), expand([folder])))
    crops = [crop for _, crop in found if isinstance(crop, np.ndarray)]
    labels = [rank[Path(str(source.path)).parent.name] for source, crop in found if isinstance(crop, np.ndarray)]
    return to_batch(crops), np.array(labels)


def observed_networks() -> dict[str, M.Module]:
    """Name -> the network in float, watched in that way."""
    float_network = to_mode(opened().network, Mode.QAT)
    float_network.eval()
    disable_fake_quant(float_network)
    stock = to_mode(opened().network, Mode.QAT)
    reset_qconfig(stock, calibration_qconfig)
    fix_input_scale(stock)
    stock.eval()
    enable_observer(stock)
    networks = {"network alone": float_network, STOCK: stock}
    for name, kind in RANGE_OBSERVERS.items():
        network = to_mode(opened().network, Mode.QAT)
        network.eval()
        disable_fake_quant(network)
        with_observers(network, kind)
        networks[name] = network
    return networks


class Clock:
    """Processor time that this thread spends in some calls; waiting for the network is not in it."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def timing(*arguments: Any) -> Any:
            start = time.thread_time()
            result = call(*arguments)
            self.seconds += time.thread_time() - start
            return result

        return timing


def speed(batch: npt.NDArray[np.float32]) -> None:
    networks = observed_networks()
    clocks = {name: Clock() for name in networks}
    for name, network in networks.items():
        for layer in find_quantized_layers(network).values():
            observer = layer.act_observer
            observer.forward = clocks[name].timed(observer.forward)
            observer.get_qparams = clocks[name].timed(observer.get_qparams)
    whole: dict[str, list[float]] = {name: [] for name in networks}
    watching: dict[str, list[float]] = {name: [] for name in networks}
    for turn in range(ROUNDS + 1):
        for name, network in networks.items():
            clocks[name].seconds, start = 0.0, time.perf_counter()
            network(Tensor(batch)).numpy()
            if turn:  # the first is a warm-up
                whole[name].append(time.perf_counter() - start)
                watching[name].append(clocks[name].seconds)
    print(f"a batch of {BATCH}, medians of {ROUNDS} turns; x: times faster than {STOCK}")
    for name in networks:
        times = [(median(seconds[name]), median(seconds[STOCK])) for seconds in (watching, whole)]
        (own, stock), (total, stock_total) = times
        print(
            f"{name:30s} observers {1000 * own:5.0f} ms of processor ({stock / own:6.1f} x), "
            f"with the network {1000 * total:5.0f} ms of wall clock ({stock_total / total:5.1f} x)",
            flush=True,
        )


def accuracy(images: npt.NDArray[np.uint8], labels: npt.NDArray[np.int64]) -> None:
    seen = np.arange(len(labels)) % 5 == 0
    others, truth = images[~seen], labels[~seen]
    network = opened().network
    exact = answers(network, others)
    print(f"float32: top-1 {share(exact == truth)} on {len(truth)} pictures", flush=True)
    for method in METHODS:
        start = time.perf_counter()
        batches = [images[seen][i : i + BATCH] for i in range(0, int(seen.sum()), BATCH)]
        ranges = measure_ranges(network, batches, "efficientnet_lite0", "", {}, method)
        spent = time.perf_counter() - start
        real = answers(quantize(network, ranges=ranges), others)
        print(
            f"{method:10s} {spent:5.1f} s for {seen.sum()} pictures, int8 top-1 {share(real == truth)}, "
            f"as float {share(real == exact)}",
            flush=True,
        )


def answers(network: M.Module, images: npt.NDArray[np.uint8]) -> npt.NDArray[Any]:
    parts = [network(Tensor(as_input(images[i : i + BATCH]))).numpy() for i in range(0, len(images), BATCH)]
    return np.asarray(np.concatenate(parts).argmax(1))


def share(right: npt.NDArray[np.bool_]) -> str:
    part = float(right.mean())
    return f"{part:.1%} (standard error {math.sqrt(part * (1 - part) / len(right)):.1%})"


def main(folder: str) -> None:
    images, labels = images_of(folder)
    speed(as_input(images[:BATCH]))
    accuracy(images, labels)


if __name__ == "__main__":
    main(sys.argv[1])
