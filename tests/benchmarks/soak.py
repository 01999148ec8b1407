"""Does memory stay flat? ``python -m tests.benchmarks.soak --inferences 10000 --steps 2000 --pictures 10000``

Thousands of inferences in one process in each engine, thousands of steps of quantization-aware training, and
``mgq infer`` over a folder of thousands of small drawn pictures, one in a hundred of them broken. Networks have random
weights: this is about memory alone. Exits with 1 where memory grows.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import psutil  # type: ignore[import-untyped]

from mgq.data.synthetic import SyntheticImages
from mgq.events import Callbacks, Progress
from mgq.system.megengine_start import import_megengine

ARCH = "shufflenet_v1_x0_5_g3"
SIZE = 64
TRAINED_SIZE, TRAINED_BATCH = 32, 8
SHARES = (0.1, 0.25, 0.5, 0.75, 1.0)
WARM = 0.25
"""By then all caches are filled: growth is counted from there."""
MOST_GROWTH = 0.05
"""Of the memory when warm: less is noise of the allocator."""
BROKEN = (b"", b"no picture", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR")
BROKEN_EVERY = 100
FEWER = 10
"""The folder is compared with one that has so many times fewer pictures."""


@dataclass
class Samples:
    """The resident memory of a process, in MB, as its work goes on: done -> MB."""

    what: str
    total: int
    taken: dict[int, float] = field(default_factory=dict)

    def take(self, done: int, process: psutil.Process | None = None) -> None:
        if done % max(1, self.total // 100) == 0 or done == self.total:
            self.taken[done] = (process or psutil.Process()).memory_info().rss / 1e6

    def at(self, share: float) -> float:
        return self.taken[min(self.taken, key=lambda done: abs(done - share * self.total))]

    @property
    def growth(self) -> float:
        """MB a thousand, from when it is warm: the slope of a straight line through the samples."""
        late = {done: mb for done, mb in self.taken.items() if done >= WARM * self.total}
        return 1000 * float(np.polyfit(list(late), list(late.values()), 1)[0]) if len(late) > 1 else 0.0

    @property
    def is_flat(self) -> bool:
        return self.at(1.0) - self.at(WARM) < MOST_GROWTH * self.at(WARM)

    def line(self) -> str:
        cells = "  ".join(f"{self.at(share):6.0f}" for share in SHARES)
        return f"{self.what:34s} {self.total:6d}  {cells}  {self.growth:+7.2f}  {'flat' if self.is_flat else 'GROWS'}"


def inferences(number: int, what: str, run: Callable[[], object]) -> Samples:
    samples = Samples(what, number)
    for done in range(1, number + 1):
        run()
        samples.take(done)
    return samples


def in_engines(number: int, folder: Path) -> list[Samples]:
    """MegEngine as ``mgq infer`` runs it, and every engine that reads a dumped file."""
    from megengine import Tensor

    from mgq.engine.classifier.dump import dump_classifier
    from mgq.engine.classifier.open import make_random_classifier
    from mgq.export.onnx.writer import write_onnx
    from mgq.ptq.range_measurement import as_input
    from mgq.quantization.modes import Mode
    from mgq.quantization.targets import ONNX
    from mgq.runtime.registry import load

    pixels = np.random.default_rng(0).integers(0, 256, (1, 3, SIZE, SIZE), dtype=np.uint8)
    classifier = make_random_classifier(ARCH, Mode.QUANTIZED, image_size=SIZE)
    found = [inferences(number, "MegEngine, int8", lambda: classifier.network(Tensor(as_input(pixels))).numpy())]
    dumped = folder / "network.megengine"
    dump_classifier(classifier, dumped)
    lite = load(dumped, "lite")
    found.append(inferences(number, "MegEngine Lite, int8", lambda: lite.run(pixels)))
    simulated = make_random_classifier(ARCH, Mode.QAT, image_size=SIZE, target=ONNX)
    file = folder / "network.onnx"
    write_onnx(simulated.network, file, image_size=SIZE, batch=1, provenance={})
    for key, name in (("onnxruntime", "ONNX Runtime, int8"), ("openvino", "OpenVINO, int8")):
        runtime = load(file, key)
        found.append(inferences(number, name, lambda runtime=runtime: runtime.run(pixels)))  # type: ignore[misc]
    return found


def in_training(number: int, folder: Path) -> Samples:
    """Steps of ``mgq qat`` from a float network that was trained for one short epoch."""
    import mgq

    images = 50 * TRAINED_BATCH
    words: dict[str, Any] = {
        "arch": ARCH,
        "save": folder,
        "image_size": TRAINED_SIZE,
        "batch_size": TRAINED_BATCH,
        "synthetic_train": images,
        "synthetic_val": 100,
    }
    mgq.train(**words, epochs=1)
    samples = Samples("mgq qat, steps", number)
    steps = 0

    def told(event: Progress) -> None:
        nonlocal steps
        if event.what.startswith("epoch"):
            steps += 1
            samples.take(steps)

    mgq.qat(Callbacks(told), **words, epochs=-(-number // 50), report_every=1)
    return samples


def over_folder(number: int, folder: Path) -> tuple[int, float]:
    """What ``mgq infer`` says of ``number`` pictures: how many are broken, and its most memory in MB."""
    with (folder / "answers.json").open("wb") as out, (folder / "errors.txt").open("wb") as err:
        command = [sys.executable, "-m", "mgq", "infer", "--json", "-c", str(folder / "network.safetensors")]
        process = subprocess.Popen([*command, str(folder / str(number))], stdout=out, stderr=err)
        watched, most = psutil.Process(process.pid), 0.0
        while process.poll() is None:
            try:
                most = max(most, watched.memory_info().rss / 1e6)
            except psutil.Error:
                break
            time.sleep(0.1)
        process.wait()
    document = json.loads((folder / "answers.json").read_text())
    assert len(document["answers"]) == number, "it did not answer all pictures"
    assert process.returncode == (2 if document["failed"] else 0), f"exit code {process.returncode}"
    named = {answer["picture"] for answer in document["answers"] if "error" in answer}
    assert len(named) == document["failed"], "a broken picture was named twice"
    return document["failed"], most


def draw(number: int, folder: Path) -> int:
    """Make ``number`` pictures; how many of them are broken."""
    folder.mkdir()
    drawn = SyntheticImages(200, size=SIZE, split="val")
    encoded = [cv2.imencode(".jpg", drawn.image(i))[1].tobytes() for i in range(len(drawn))]
    broken = 0
    for i in range(number):
        is_broken = i % BROKEN_EVERY == BROKEN_EVERY // 2
        content = BROKEN[broken % len(BROKEN)] if is_broken else encoded[i % len(encoded)]
        broken += is_broken
        (folder / f"{i:06d}.jpg").write_bytes(content)
    return broken


def in_a_folder(number: int, folder: Path) -> bool:
    """Prints what ``mgq infer`` took for many pictures and for few; whether it was the same."""
    from mgq.engine.classifier.open import make_random_classifier
    from mgq.quantization.modes import Mode

    make_random_classifier(ARCH, Mode.QAT, image_size=SIZE).write_checkpoint(folder / "network.safetensors")
    peaks = []
    for count in (number // FEWER, number):
        broken = draw(count, folder / str(count))
        failed, most = over_folder(count, folder)
        assert failed == broken, f"{failed} pictures were refused and {broken} are broken"
        print(f"mgq infer, {count} pictures, {broken} broken, each named once: {most:.0f} MB at most", flush=True)
        peaks.append(most)
    flat = peaks[1] - peaks[0] < MOST_GROWTH * peaks[0]
    print(f"more pictures: {peaks[1] - peaks[0]:+.0f} MB, {'flat' if flat else 'GROWS'}")
    return flat


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("inferences", 10_000), ("steps", 2_000), ("pictures", 10_000)):
        parser.add_argument(f"--{name}", type=int, default=default)
    wanted = parser.parse_args()
    import_megengine()
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mgq-soak-") as name:
        folder = Path(name)
        shares = "  ".join(f"{f'{share:.0%}':>6s}" for share in SHARES)
        print(f"resident memory, MB, at{'':13s}number  {shares}  MB/1000", flush=True)
        found = in_engines(wanted.inferences, folder)
        print("\n".join(samples.line() for samples in found), flush=True)
        trained = in_training(wanted.steps, folder / "runs")
        print(trained.line(), flush=True)
        flat = in_a_folder(wanted.images, folder)
    print(
        f"flat: less than {MOST_GROWTH:.0%} more at the end than at {WARM:.0%} of the way; {ARCH}, random weights, "
        f"{SIZE} pixels ({TRAINED_SIZE} in training); {(time.monotonic() - start) / 60:.0f} minutes"
    )
    sys.exit(0 if flat and trained.is_flat and all(samples.is_flat for samples in found) else 1)


if __name__ == "__main__":
    main()
