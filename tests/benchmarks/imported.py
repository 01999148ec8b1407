"""What int8 is worth for ONNX classifiers of others: ``python -m tests.benchmarks.imported FILE... --photos FOLDER``.

Each file is imported, compared with ONNX Runtime in float, calibrated on photos, and run in each engine beside a float
file: a row of Markdown for each. Weights made up at random show speed and how near int8 comes to float, not accuracy.
Exports of torchvision's networks are made in an environment of their own::

    uv venv -p 3.10 exports && uv pip install --python exports/bin/python torch torchvision onnx 'numpy<2'
    exports/bin/python -c "import torch, torchvision; torch.onnx.export(torchvision.models.mobilenet_v3_small().eval(),
        torch.zeros(1, 3, 224, 224), 'mobilenet_v3_small.onnx', opset_version=17, dynamo=False)"

Batch norms of random weights should have run over some batches in training state first, or nothing is left of the
signal behind the last layer.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

from mgq.system.megengine_start import import_megengine

HEADER = (
    "| network | imported, s | float differs by | int8 on photos held back, dB | engine | same answer | dB "
    "| float, ms | int8, ms | faster |\n| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
)


def rows_of(path: Path, photos: Path, images: int, quality: str, preprocess: str | None) -> Iterator[str]:
    import time

    from mgq.data.image_sources import expand
    from mgq.engine.calibration.calibration_images import read_some_crops
    from mgq.engine.calibration.calibration_run import calibrate
    from mgq.engine.classifier.deployment import deploy
    from mgq.engine.classifier.import_wish import ImportWish
    from mgq.engine.classifier.onnx_import import compare, draft_network, import_classifier
    from mgq.export.onnx.foreign_file import read_foreign
    from mgq.ptq.presets import CalibrationConfig
    from mgq.quantization.targets import ONNX

    start = time.perf_counter()
    classifier, _ = import_classifier(path, ImportWish(preprocess=preprocess), "")
    seconds = time.perf_counter() - start
    file = read_foreign(path)
    difference = compare(file, draft_network(file)) or 0.0
    sources = expand([str(photos)])
    fitted, others = sources[::2], sources[1::2]
    found = calibrate(classifier, fitted, images, "", CalibrationConfig(quality, target=ONNX))
    snr = found.found.best.snr if found.found is not None else 0.0
    with tempfile.TemporaryDirectory() as folder:
        result = deploy(classifier, found.classifier, Path(folder) / "int8.onnx", read_some_crops(classifier, others))
    head = f"| {path.stem} | {seconds:.1f} | {difference:.0e} | {snr:.1f} "
    for row in result.rows:
        floats, faster = ("", "") if row.float_ms is None else (f"{row.float_ms:.2f}", f"{row.speedup:.2f}")
        yield f"{head}| {row.engine} | {row.same:.0f} % | {row.snr:.1f} | {floats} | {row.int8_ms:.2f} | {faster} |"
        head = "| | | | "


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--quality", default="fast")
    parser.add_argument("--preprocess")
    options = parser.parse_args()
    import_megengine()
    print(HEADER)
    for path in options.files:
        try:
            for row in rows_of(path, options.photos, options.images, options.quality, options.preprocess):
                print(row, flush=True)
        except Exception as error:
            print(f"| {path.stem} | {type(error).__name__}: {error} |", flush=True)


if __name__ == "__main__":
    main()
