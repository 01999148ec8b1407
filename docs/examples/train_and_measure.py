"""Trains a small network on drawn images, and measures it in float32 and int8.

One short epoch on few images: it shows the calls, not what the network can learn.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import mgq
from mgq.events import Callbacks, Progress


def show(progress: Progress) -> None:
    """Prints every progress report on one line."""
    print(f"{progress.what}: {progress.done} of {progress.total} {progress.unit} {progress.detail}".rstrip())


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        runs = Path(folder)
        result = mgq.train(
            Callbacks(on_progress=show),
            arch="mobilenet_v2",
            width=0.25,
            image_size=32,
            epochs=1,
            synthetic_train=64,
            synthetic_val=32,
            save=runs,
        )
        print("files of the run:", ", ".join(sorted(path.name for path in result.checkpoint.parent.iterdir())))
        found = result.comparison
        for name, measured in (("float32", found.normal), ("int8", found.quantized)):
            print(f"{name}: top-1 {measured.top1:.1f} % ± {measured.top1_error:.1f}, {measured.images} images")
        print(f"size: float32 {found.normal_bytes / 1e6:.2f} MB, int8 {found.quantized_bytes / 1e6:.2f} MB")
        print(f"int8 gives the float answer on {found.same_as_float:.1f} %")


if __name__ == "__main__":
    main()
