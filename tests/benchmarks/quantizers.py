"""What other quantizers make of a network of the zoo, as ONNX files for ``mgq bench --against``.

``uv run --with nncf==2.19.0 python -m tests.benchmarks.quantizers resnet18 FOLDER`` writes the float network (random
weights: they serve speed) and of it: ONNX Runtime's static quantization and NNCF's post-training quantization, each of
a file that takes uint8 pixels as mgq's own do, and of one that takes float32. Then it prints the command that compares.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

PICTURES = 16
SIZE = 224


def pixels(seed: int = 0) -> Iterator[npt.NDArray[np.uint8]]:
    """Pictures of random pixels, uint8 (1, 3, 224, 224)."""
    rng = np.random.default_rng(seed)
    for _ in range(PICTURES):
        yield rng.integers(0, 256, (1, 3, SIZE, SIZE), dtype=np.uint8)


def write_float(arch: str, path: Path) -> None:
    from mgq.deploy.onnx import write_onnx
    from mgq.engine.networks import random_classifier
    from mgq.quant.modes import Mode

    network = random_classifier(arch, Mode.NORMAL).network
    write_onnx(network, path, image_size=SIZE, batch=1, provenance={"arch": arch, "weights": "random"})


def write_with_float_input(source: Path, path: Path) -> None:
    """The same network on float32 pixels minus 128: without the DequantizeLinear at its entry."""
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
    onnx.save(model, str(path))


def feeds(path: Path) -> list[dict[str, npt.NDArray[Any]]]:
    """The pictures as ``path`` takes them."""
    entry = onnx.load(str(path)).graph.input[0]
    is_float = entry.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    return [{entry.name: batch.astype(np.float32) - 128 if is_float else batch} for batch in pixels()]


def write_onnxruntime(source: Path, path: Path) -> None:
    """ONNX Runtime's static quantization as its documents advise for x86: QDQ, int8 weights per channel, uint8."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.pictures = iter(feeds(source))

        def get_next(self) -> dict[str, npt.NDArray[Any]] | None:
            return next(self.pictures, None)

    prepared = path.with_suffix(".prepared.onnx")
    quant_pre_process(str(source), str(prepared))
    quantize_static(
        str(prepared),
        str(path),
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    prepared.unlink()


def write_nncf(source: Path, path: Path) -> None:
    """NNCF's post-training quantization with its default settings."""
    import nncf

    quantized = nncf.quantize(onnx.load(str(source)), nncf.Dataset(feeds(source)), subset_size=PICTURES)
    onnx.save(quantized, str(path))


def main(arch: str, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    pixels_in, floats_in = folder / f"{arch}.onnx", folder / f"{arch}.float_input.onnx"
    write_float(arch, pixels_in)
    write_with_float_input(pixels_in, floats_in)
    made = []
    for name, write in (("ort", write_onnxruntime), ("nncf", write_nncf)):
        for kind, source in (("uint8", pixels_in), ("float", floats_in)):
            path = folder / f"{arch}.{name}.{kind}.onnx"
            try:
                write(source, path)
            except Exception as error:
                sys.stdout.write(f"{path.name}: {name} failed: {str(error).splitlines()[0]}\n")
                continue
            made.append(path)
    against = " ".join(f"--against {path}" for path in made)
    sys.stdout.write(f"mgq bench -a {arch} --int8 --threads 1 --rounds 30 {against}\n")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
