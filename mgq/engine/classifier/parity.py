"""Compares backends with MegEngine on images, by logits and layer by layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import megengine.module as M
import numpy as np
import numpy.typing as npt
from megengine import Tensor
from megengine.module.qat import QATModule

from mgq.data.decoding import bundled_cat, read_image
from mgq.data.transforms import to_batch
from mgq.engine.classifier.open import Classifier
from mgq.engine.classifier.predict import BATCH
from mgq.export.onnx.onnx_file import import_package
from mgq.graph.network_reader import find_quant_params
from mgq.io.temporary_folders import temporary_folder
from mgq.ptq.range_measurement import as_input
from mgq.quantization.modes import Mode
from mgq.quantization.qat_layers import find_quantized_layers
from mgq.quantization.targets import MEGENGINE
from mgq.runtime.protocol import batches_of, run_in_batches
from mgq.runtime.registry import BACKENDS, Backend
from mgq.zoo.layers import forward_hooks

Images = npt.NDArray[np.uint8]
Logits = npt.NDArray[np.float32]

PARTS = (1.0, 0.8, 0.65, 0.5)
STEPS = 127.5
"""The largest logit in terms of one output step: what int8 logits would have."""


@dataclass(frozen=True)
class Parity:
    """How an engine answers beside MegEngine: percent of equal answers; differences of logits in output steps.

    One output step is the largest logit of all pictures / 127.5, or 1 / 127.5 where all logits are 0.
    """

    engine: str
    version: str
    images: int
    same: float
    largest: float
    mean: float


@dataclass(frozen=True)
class LayerParity:
    """How an engine's integers behind a layer differ from MegEngine's where both are given the same.

    ``largest`` in steps of the layer's grid, ``share`` of the values that differ at all, ``values`` in number.
    """

    layer: str
    largest: int
    share: float
    values: int


def make_views(classifier: Classifier) -> Images:
    """The bundled cat whole and in parts, each also mirrored: uint8 (8, 3, S, S), as the network sees them."""
    cat = read_image(bundled_cat())
    height, width = cat.shape[:2]
    found = []
    for part in PARTS:
        top, left = (round(side * (1 - part) / 2) for side in (height, width))
        crop = classifier.crop(cat[top : height - top, left : width - left])
        found += [crop, crop[:, ::-1]]
    return to_batch(found)


def compute_reference(classifier: Classifier, images: Images) -> Logits:
    """MegEngine's logits for the same target: of its int8 network, or of the simulation of what others run."""
    runs_here = classifier.mode is Mode.NORMAL or classifier.target is MEGENGINE
    network = classifier.network if runs_here else classifier.fake_quantized
    assert network is not None
    batches = [images[i : i + BATCH] for i in range(0, len(images), BATCH)]
    return np.concatenate([network(Tensor(as_input(batch))).numpy() for batch in batches])


def measure_parity(path: Path, images: Images, wanted: Logits) -> Iterator[Parity]:
    """Run ``path`` in every installed engine that reads it, and compare with ``wanted``, MegEngine's logits.

    ``images``: uint8 (N, 3, H, W), given in batches that the file takes. Raises as the engines do.
    """
    for engine in list_backends(path):
        runtime = engine.load(path, 1)
        found = run_in_batches(runtime, images)
        step = (float(np.abs(wanted).max()) or 1.0) / STEPS
        differences = np.abs(found - wanted) / step
        same = 100 * float((found.argmax(1) == wanted.argmax(1)).mean())
        yield Parity(
            runtime.name, runtime.version, len(images), same, float(differences.max()), float(differences.mean())
        )


def list_backends(path: Path) -> list[Backend]:
    """The installed engines that run ``path``."""
    reading = [engine for engine in BACKENDS if engine.suffix == path.suffix.lower() and engine.is_installed]
    return [engine for engine in reading if engine.reads(path)]


def measure_layer_parity(engine: Backend, path: Path, network: M.Module, images: Images) -> list[LayerParity]:
    """Every quantized layer of ``network``, mode ``qat``, beside the one that ``engine`` runs of ``path``, in order.

    Each layer of MegEngine's is given the integers that the engine's layers before made, so that differences do not
    add up. The engine has to show what lies between its layers, and so may fuse less than otherwise.
    """
    shown = read_layers(engine, path, list(find_quantized_layers(network)), images)
    found: list[LayerParity] = []
    names = {id(layer): name for name, layer in find_quantized_layers(network).items()}

    def hook(module: QATModule, _: object, output: Tensor) -> Tensor | None:
        name = names[id(module)]
        if name not in shown:
            return None
        grid = find_quant_params(module)
        own = shown[name][:, : output._tuple_shape[1]]  # what is widened for an engine has more channels
        integers = own.astype(np.int32) - grid.zero_point
        steps = np.abs(integers.reshape(output._tuple_shape) - np.rint(output.numpy() / grid.scale)).astype(np.int32)
        found.append(LayerParity(name, int(steps.max()), float((steps > 0).mean()), steps.size))
        exact = Tensor((integers * np.float32(grid.scale)).astype(np.float32).reshape(output._tuple_shape))
        exact.qparams.update(output.qparams)
        return exact

    with forward_hooks((layer, hook) for layer in find_quantized_layers(network).values()):
        network(Tensor(as_input(images))).numpy()
    return found


def read_layers(engine: Backend, path: Path, layers: list[str], images: Images) -> dict[str, npt.NDArray[np.uint8]]:
    """The integers behind each of ``layers`` that the file has, by name."""
    onnx = import_package("onnx")
    model = onnx.load(str(path))
    made = {output for node in model.graph.node for output in node.output}
    tensors = {
        layer: next(name for name in (f"{layer}/clipped", f"{layer}/q") if name in made)
        for layer in layers
        if f"{layer}/q" in made
    }
    known = {value.name: value for value in onnx.shape_inference.infer_shapes(model).graph.value_info}
    model.graph.output.extend(known[name] for name in tensors.values())
    with temporary_folder() as folder:
        temporary = folder / path.name
        temporary.write_bytes(model.SerializeToString())
        runtime = engine.load(temporary, 1)
        results = [runtime.outputs(batch) for batch in batches_of(runtime.batch or 1, images)]
    return {
        layer: np.concatenate([result[name] for result in results])[: len(images)] for layer, name in tensors.items()
    }
