"""Pictures per second of the loader, beside a loader in the style of torchvision on the same pictures and cores.

    python -m tests.benchmarks.loader [FOLDER]

FOLDER holds pictures, or is a set with train/ and val/. Without it, JPEGs of 500x375 are drawn. The reference
decodes, crops and normalises with Pillow and NumPy in worker processes, which hand over through shared memory.
It cuts the very same boxes. Its rounds take turns with the loader's, so that both meet the same other load.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from multiprocessing.queues import SimpleQueue
from multiprocessing.sharedctypes import RawArray
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
import psutil  # type: ignore[import-untyped]
from PIL import Image

from mgq.data.augmentation import Draw, EvalTransform, Stream, TrainTransform, Transform, generator
from mgq.data.labelled_folders import ImageFolder, calibration_folder
from mgq.data.loader import Loader
from mgq.data.synthetic import SyntheticImages
from mgq.machine import usable_cores

_MEAN = np.array((0.485, 0.456, 0.406), np.float32).reshape(3, 1, 1)
_DEVIATION = np.array((0.229, 0.224, 0.225), np.float32).reshape(3, 1, 1)
_SLOTS_PER_WORKER = 2  # Batches asked for ahead, as in PyTorch's DataLoader.

Tensor = npt.NDArray[np.float32]


def pillow_train(path: Path, transform: TrainTransform, draw: Draw) -> Tensor:
    with Image.open(path) as file:
        image = file.convert("RGB")
    chance = generator(draw.seed, Stream.CROP, draw.epoch, draw.number).random(64).tolist()
    box = transform.box(image.width, image.height, chance)
    corners = (box.x, box.y, box.x + box.width, box.y + box.height)
    crop = image.resize((transform.size, transform.size), Image.Resampling.BILINEAR, box=corners)
    if chance[-1] < transform.flip:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return normalised(crop)


def pillow_eval(path: Path, transform: EvalTransform, draw: Draw) -> Tensor:
    with Image.open(path) as file:
        image = file.convert("RGB")
    factor = round(transform.size / 224 * 256) / min(image.size)
    image = image.resize((round(image.width * factor), round(image.height * factor)), Image.Resampling.BILINEAR)
    left, top = (image.width - transform.size) // 2, (image.height - transform.size) // 2
    return normalised(image.crop((left, top, left + transform.size, top + transform.size)))


def normalised(crop: Image.Image) -> Tensor:
    tensor = np.ascontiguousarray(np.asarray(crop).transpose(2, 0, 1)).astype(np.float32)
    tensor /= 255
    tensor -= _MEAN
    tensor /= _DEVIATION
    return tensor


class PillowLoader:
    """Worker processes, each of which makes whole batches in a slot of shared memory."""

    def __init__(self, images: ImageFolder, transform: TrainTransform | EvalTransform, batch: int, workers: int):
        self.images, self.transform, self.batch = images, transform, batch
        self.shape = (batch, 3, transform.size, transform.size)
        context = multiprocessing.get_context("fork")
        self.slots = [RawArray("f", int(np.prod(self.shape))) for _ in range(workers * _SLOTS_PER_WORKER + 1)]
        self.tasks: SimpleQueue[tuple[int, int, int] | None] = context.SimpleQueue()
        self.done: SimpleQueue[tuple[int, int]] = context.SimpleQueue()
        self.processes = [context.Process(target=self._work, daemon=True) for _ in range(workers)]
        for process in self.processes:
            process.start()

    def __enter__(self) -> PillowLoader:
        return self

    def __exit__(self, *_: object) -> None:
        for _process in self.processes:
            self.tasks.put(None)
        for process in self.processes:
            process.join()

    def batches(self, epoch: int) -> Iterator[Tensor]:
        total = -(-len(self.images) // self.batch)
        free, ready = deque(range(len(self.slots))), dict[int, int]()
        asked = 0
        for number in range(total):
            while free and asked < total:
                self.tasks.put((epoch, asked, free.popleft()))
                asked += 1
            while number not in ready:
                made, slot = self.done.get()
                ready[made] = slot
            slot = ready.pop(number)
            yield self._array(slot)[: len(self.images) - number * self.batch]
            free.append(slot)

    def _array(self, slot: int) -> Tensor:
        return np.frombuffer(self.slots[slot], np.float32).reshape(self.shape)

    def _work(self) -> None:
        while (task := self.tasks.get()) is not None:
            epoch, number, slot = task
            first = number * self.batch
            for row, index in enumerate(range(first, min(first + self.batch, len(self.images)))):
                path, draw = self.images.image(index), Draw(0, epoch, index)
                self._array(slot)[row] = (
                    pillow_train(path, self.transform, draw)
                    if isinstance(self.transform, TrainTransform)
                    else pillow_eval(path, self.transform, draw)
                )
            self.done.put((number, slot))


def drawn_photos(folder: Path, count: int) -> None:
    """JPEGs of 500x375 pixels, of quality 90, in ``folder``."""
    images = SyntheticImages(count, seed=0, size=500)
    for index in range(count):
        cv2.imwrite(str(folder / f"{index:05}.jpg"), images.image(index)[:375], [cv2.IMWRITE_JPEG_QUALITY, 90])


def some(images: ImageFolder, most: int) -> ImageFolder:
    """``images`` thinned out evenly to at most ``most``."""
    chosen = [i * len(images) // most for i in range(most)] if len(images) > most else range(len(images))
    paths = [str(images.image(i).relative_to(images.folder)).encode() for i in chosen]
    return ImageFolder(images.folder, (), None, b"".join(paths), np.cumsum([len(path) for path in paths]))


class Pace(NamedTuple):
    """Pictures per second in each round, and the processor time that a picture took, in microseconds."""

    rates: list[float]
    cpu_us: float


def compare(
    images: ImageFolder,
    ours: Transform,
    theirs: TrainTransform | EvalTransform,
    batch: int,
    workers: int,
    rounds: int,
) -> tuple[Pace, Pace]:
    """The pace of the loader and of the reference."""
    with ExitStack() as stack:
        reference = stack.enter_context(PillowLoader(images, theirs, batch, workers))  # Forks, so before threads.
        loader = stack.enter_context(Loader(images, ours, batch, workers=workers))
        helpers = [psutil.Process(process.pid) for process in reference.processes]
        both: tuple[Callable[[int], Iterator[object]], ...] = (loader.batches, reference.batches)
        rates: tuple[list[float], list[float]] = ([], [])
        cpu = [0.0, 0.0]
        for epoch in range(rounds + 1):
            for which, batches in enumerate(both):
                cpu_before, start = processor_seconds(helpers), time.perf_counter()
                for _ in batches(epoch):
                    pass
                if epoch:  # The first round reads the files into memory.
                    rates[which].append(len(images) / (time.perf_counter() - start))
                    cpu[which] += processor_seconds(helpers) - cpu_before
        return Pace(rates[0], cpu[0] / rounds / len(images) * 1e6), Pace(rates[1], cpu[1] / rounds / len(images) * 1e6)


def processor_seconds(helpers: Sequence[psutil.Process]) -> float:
    """What this process and ``helpers`` have used so far."""
    theirs: float = sum(times.user + times.system for times in (helper.cpu_times() for helper in helpers))
    return time.process_time() + theirs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--pictures", type=int, default=400, help="how many to use at most")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, nargs="+", default=sorted({1, usable_cores()}))
    options = parser.parse_args()
    cv2.setNumThreads(1)  # So that a worker is one thread.
    with tempfile.TemporaryDirectory() as drawn:
        if options.folder is None:
            drawn_photos(Path(drawn), options.images)
        images = some(calibration_folder(options.folder or Path(drawn)), options.images)
        print(f"{len(images)} pictures, crops of {options.size}, medians of {options.rounds} rounds, pictures/s")
        print("CPU is processor time per picture in microseconds, which other work on the machine disturbs less")
        print(
            f"{'transform':<16}{'workers':>8}{'loader':>8}{'Pillow':>8}{'ratio':>8}{'(lowest, highest)':>20}"
            f"{'loader CPU':>12}{'Pillow CPU':>12}{'ratio':>8}"
        )
        train, evaluation = TrainTransform(options.size), EvalTransform(options.size)
        cases: tuple[tuple[str, Transform, TrainTransform | EvalTransform], ...] = (
            ("train", train, train),
            ("train, jitter*", TrainTransform(options.size, jitter=0.4), train),
            ("evaluation", evaluation, evaluation),
        )
        for name, ours, theirs in cases:
            for workers in options.workers:
                fast, slow = compare(images, ours, theirs, options.batch, workers, options.rounds)
                ratios = sorted(a / b for a, b in zip(fast.rates, slow.rates, strict=True))
                print(
                    f"{name:<16}{workers:>8}{statistics.median(fast.rates):>8.0f}{statistics.median(slow.rates):>8.0f}"
                    f"{statistics.median(ratios):>8.2f}{f'({ratios[0]:.2f}, {ratios[-1]:.2f})':>20}"
                    f"{fast.cpu_us:>12.0f}{slow.cpu_us:>12.0f}{slow.cpu_us / fast.cpu_us:>8.2f}"
                )
        print("* the reference does not jitter")


if __name__ == "__main__":
    main()
