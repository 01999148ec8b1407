"""Other quantizers, each behind one function: ``python tests/benchmarks/peers.py PEER FLOAT PIXELS FILE``.

FLOAT is mgq's float ONNX file, batch 1; PIXELS an ``.npy`` file of uint8 (N, 3, S, S), what the network sees of the
pictures that calibrate, or any other float file and the float32 (N, ...) that it is fed; FILE what is to be written.
Beside the peer this needs numpy and onnx alone, so that a peer can live in an environment of its own, whatever versions
it asks for.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[np.uint8]
Feed = dict[str, npt.NDArray[Any]]
Write = Callable[[Path, Pixels, Path], None]

PIXEL_ZERO = 128
"""What is taken from pixels before a network sees them."""
AT_ONCE = 10
"""ONNX Runtime keeps what all layers answer to so many pictures: to all at once that is many gigabytes."""


@dataclass(frozen=True)
class Peer:
    """A quantizer: ``write`` takes the float file, the pixels and the file to write, which ends in ``suffix``.

    ``package`` is what it imports, ``mend`` how that is got.
    """

    write: Write
    package: str
    mend: str
    suffix: str = ".onnx"


def with_float_input(source: Path) -> Any:
    """The network of ``source`` on float32 pixels minus 128, as an ONNX model: without the DequantizeLinear at its
    entry."""
    import onnx

    model = onnx.load(str(source))
    entry = model.graph.input[0]
    first = next(node for node in model.graph.node if entry.name in node.input)
    assert first.op_type == "DequantizeLinear"
    for node in model.graph.node:
        node.input[:] = [entry.name if name == first.output[0] else name for name in node.input]
    model.graph.node.remove(first)
    entry.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    unused = {name for name in first.input if not any(name in node.input for node in model.graph.node)}
    for constant in [constant for constant in model.graph.initializer if constant.name in unused]:
        model.graph.initializer.remove(constant)
    onnx.checker.check_model(model, full_check=True)
    return model


def written_with_float_input(source: Path, beside: Path) -> Path:
    """The same as a file beside another."""
    import onnx

    path = beside.with_suffix(".float_input.onnx")
    onnx.save(with_float_input(source), str(path))
    return path


def feeds(path: Path, pixels: Pixels) -> list[Feed]:
    """``pixels`` one by one as the file ``path`` takes them: as they are, or minus 128 in float32; float32 as it is."""
    import onnx

    entry = onnx.load(str(path)).graph.input[0]
    is_float = entry.type.tensor_type.elem_type == onnx.TensorProto.FLOAT and pixels.dtype == np.uint8
    return [{entry.name: image[None].astype(np.float32) - PIXEL_ZERO if is_float else image[None]} for image in pixels]


def write_nncf(source: Path, pixels: Pixels, path: Path, mixed: bool = False, exact: bool = False) -> None:
    """NNCF's post-training quantization of the OpenVINO model.

    ``exact`` corrects biases by what the network says, layer by layer, and not by a fast estimate. ``mixed`` lets
    activations have a zero point.
    """
    import nncf
    import openvino

    inputs = [list(feed.values()) for feed in feeds(source, pixels)]
    quantized = nncf.quantize(
        openvino.convert_model(str(source)),  # a model that was only read has shapes to compute: it hides its biases
        nncf.Dataset(inputs),
        preset=nncf.QuantizationPreset.MIXED if mixed else nncf.QuantizationPreset.PERFORMANCE,
        target_device=nncf.TargetDevice.CPU,
        subset_size=len(inputs),
        fast_bias_correction=not exact,
    )
    openvino.save_model(quantized, str(path), compress_to_fp16=False)


class Reader:
    """The calibration pictures as ONNX Runtime reads them, all or some at a time."""

    def __init__(self, images: list[Feed]) -> None:
        self.images = images
        self.set_range(0, len(images))

    def __len__(self) -> int:
        return len(self.images)

    def set_range(self, start_index: int, end_index: int) -> None:
        self.left: Iterator[Feed] = iter(self.images[start_index:end_index])

    def get_next(self) -> Feed | None:
        return next(self.left, None)


def write_onnxruntime(source: Path, pixels: Pixels, path: Path, method: str = "MinMax") -> None:
    """ONNX Runtime's static quantization as its documents advise for x86: pre-processed, QDQ, int8 weights per channel,
    uint8. ``method`` is MinMax, Entropy or Percentile."""
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared = path.with_suffix(".prepared.onnx")
    quant_pre_process(str(source), str(prepared))
    quantize_static(
        str(prepared),
        str(path),
        Reader(feeds(source, pixels)),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        calibrate_method=CalibrationMethod[method],
        extra_options={"CalibStridedMinMax": largest_part(len(pixels))},
    )
    prepared.unlink()


def largest_part(number: int) -> int:
    """The largest number up to ``AT_ONCE`` that divides ``number``: ONNX Runtime takes parts of one size only."""
    return max(size for size in range(1, AT_ONCE + 1) if number % size == 0)


class Loader:
    """The calibration pictures as Intel Neural Compressor reads them, each with a label that is never looked at."""

    def __init__(self, images: list[Feed]) -> None:
        self.images = images
        self.batch_size = 1

    def __iter__(self) -> Iterator[tuple[npt.NDArray[Any], int]]:
        return ((next(iter(feed.values())), 0) for feed in self.images)


def write_neural_compressor(source: Path, pixels: Pixels, path: Path) -> None:
    """Intel Neural Compressor 2, the last with ONNX files, static quantization with its default settings."""
    from neural_compressor import PostTrainingQuantConfig, quantization

    entry = written_with_float_input(source, path)
    settings = PostTrainingQuantConfig(
        approach="static", quant_format="QDQ", calibration_sampling_size=len(pixels), domain="auto"
    )
    quantized = quantization.fit(str(entry), settings, calib_dataloader=Loader(feeds(entry, pixels)))
    if quantized is None:
        raise RuntimeError("Intel Neural Compressor found nothing that it would quantize")
    quantized.save(str(path))
    give_back_zero_point(path, PIXEL_ZERO)


def give_back_zero_point(path: Path, zero_point: int) -> None:
    """Of the input of the file ``path``: Intel Neural Compressor takes a scale of exactly 1 for a tensor without
    values, and sets 0 where pixels minus 128 need ``zero_point``."""
    import onnx

    model = onnx.load(str(path))
    first = next(node for node in model.graph.node if model.graph.input[0].name in node.input)
    constants = {constant.name: constant for constant in model.graph.initializer}
    _, scale, zero = first.input
    if onnx.numpy_helper.to_array(constants[scale]) == 1:
        constants[zero].CopyFrom(onnx.numpy_helper.from_array(np.array(zero_point, np.uint8), zero))
        onnx.save(model, str(path))


def write_aimet(source: Path, pixels: Pixels, path: Path, method: str = "min_max") -> None:
    """AIMET's quantization simulation with its default configuration, as QDQ. ``method``: how ranges are set."""
    import onnx
    from aimet_onnx.quantsim import QuantizationSimModel

    entry = written_with_float_input(source, path)
    simulation = QuantizationSimModel(
        onnx.load(str(entry)), param_type="int8", activation_type="int8", quant_scheme=method, config_file="default"
    )
    simulation.compute_encodings(feeds(entry, pixels))
    onnx.save(simulation.to_onnx_qdq(prequantize_constants=True), str(path))


def write_ppq(source: Path, pixels: Pixels, path: Path) -> None:
    """PPQ for ONNX Runtime's QDQ files, with its default settings, on the CPU."""
    import torch
    from ppq import TargetPlatform
    from ppq.api import export_ppq_graph, quantize_onnx_model

    entry = written_with_float_input(source, path)
    images = [torch.from_numpy(next(iter(feed.values()))) for feed in feeds(entry, pixels)]
    graph = quantize_onnx_model(
        onnx_import_file=str(entry),
        calib_dataloader=images,
        calib_steps=len(images),
        input_shape=list(images[0].shape),
        platform=TargetPlatform.ONNXRUNTIME,
        device="cpu",
    )
    export_ppq_graph(graph, platform=TargetPlatform.ONNXRUNTIME, graph_save_to=str(path))


NNCF = partial(Peer, package="nncf", mend="uv run --with nncf==2.19.0", suffix=".xml")
ONNX_RUNTIME = partial(Peer, package="onnxruntime", mend="uv run --with onnxruntime==1.20.1")
INTEL = "an environment with neural-compressor==2.6 onnx==1.16.2 onnxruntime==1.20.1 'numpy<2' 'setuptools<81'"
QUALCOMM = "an environment with aimet-onnx==2.42.0"
PPQ = "an environment with ppq==0.6.6 onnx==1.14.1 protobuf==3.20.3 'numpy<2' 'setuptools<81'"

PEERS = {
    "nncf": NNCF(write_nncf),
    "nncf-exact": NNCF(partial(write_nncf, exact=True)),
    "nncf-mixed": NNCF(partial(write_nncf, mixed=True)),
    "nncf-mixed-exact": NNCF(partial(write_nncf, mixed=True, exact=True)),
    "ort-min-max": ONNX_RUNTIME(write_onnxruntime),
    "ort-entropy": ONNX_RUNTIME(partial(write_onnxruntime, method="Entropy")),
    "ort-percentile": ONNX_RUNTIME(partial(write_onnxruntime, method="Percentile")),
    "neural-compressor": Peer(write_neural_compressor, "neural_compressor", INTEL),
    "aimet": Peer(write_aimet, "aimet_onnx", QUALCOMM),
    "ppq": Peer(write_ppq, "ppq", PPQ),
}


def main(name: str, source: str, pixels: str, path: str) -> None:
    peer = PEERS[name]
    if find_spec(peer.package) is None:
        sys.exit(f"{peer.package} is not installed: {peer.mend}")
    peer.write(Path(source), np.load(pixels), Path(path))


if __name__ == "__main__":
    main(*sys.argv[1:])
