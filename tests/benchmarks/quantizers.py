"""What other quantizers make of a network of the zoo, as ONNX files for ``mgq bench --against``.

``uv run --with nncf==2.19.0 python -m tests.benchmarks.quantizers resnet18 FOLDER`` writes the float network (random
weights: they serve speed) and of it: ONNX Runtime's static quantization and NNCF's post-training quantization, each of
a file that takes uint8 pixels as mgq's own do, and of one that takes float32. Then it prints the command that compares.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx

from tests.benchmarks.peers import feeds, write_onnxruntime, written_with_float_input

IMAGES = 16
SIZE = 224


def pixels(seed: int = 0) -> npt.NDArray[np.uint8]:
    """Pictures of random pixels, uint8 (16, 3, 224, 224)."""
    return np.random.default_rng(seed).integers(0, 256, (IMAGES, 3, SIZE, SIZE), dtype=np.uint8)


def write_ort(source: Path, path: Path) -> None:
    write_onnxruntime(source, pixels(), path)


def write_float(arch: str, path: Path) -> None:
    from mgq.engine.classifier.open import make_random_classifier
    from mgq.export.onnx.writer import write_onnx
    from mgq.quantization.modes import Mode

    network = make_random_classifier(arch, Mode.NORMAL).network
    write_onnx(network, path, image_size=SIZE, batch=1, provenance={"arch": arch, "weights": "random"})


def write_nncf(source: Path, path: Path) -> None:
    """NNCF's post-training quantization with its default settings."""
    import nncf

    inputs = feeds(source, pixels())
    quantized = nncf.quantize(onnx.load(str(source)), nncf.Dataset(inputs), subset_size=IMAGES)
    onnx.save(quantized, str(path))


def main(arch: str, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    pixels_in = folder / f"{arch}.onnx"
    write_float(arch, pixels_in)
    floats_in = written_with_float_input(pixels_in, pixels_in)
    made = []
    for name, write in (("ort", write_ort), ("nncf", write_nncf)):
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
