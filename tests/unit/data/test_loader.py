"""Batches: the same for any number of threads, whole in spite of broken pictures, and no threads left over."""

from __future__ import annotations

import gc
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pytest

from mgq.data.augmentation import Draw, EvalTransform, TrainTransform
from mgq.data.labelled_folders import ImageFolder, calibration_folder, evaluation_folder
from mgq.data.loader import NO_LABEL, Batch, Loader
from mgq.data.pixel_decoders import Pixels
from mgq.data.synthetic import SyntheticImages
from mgq.errors import InputError
from mgq.machine import usable_cores
from tests.fakes.places import ROOT

AS_IT_IS = EvalTransform(8, 8)
IMAGES = 46


class Plain:
    """Pictures of one colour that tells their index; some fail, and some take longer than others."""

    name = "plain pictures"
    classes = ("even", "odd")

    def __init__(self, count: int = IMAGES, broken: tuple[int, ...] = (), fault: Exception | None = None) -> None:
        self.count, self.broken, self.fault = count, broken, fault
        self.labels: npt.NDArray[np.int64] | None = np.arange(count) % 2
        self.made: list[int] = []

    def __len__(self) -> int:
        return self.count

    def image(self, index: int) -> Pixels:
        self.made.append(index)
        time.sleep(index * 7 % 5 / 2000)
        if index in self.broken:
            raise self.fault or InputError(f"{index}.jpg is cut short: copy or download it again")
        return np.full((8, 8, 3), (index, 100, 200), np.uint8)


def same(one: list[Batch], other: list[Batch]) -> bool:
    return len(one) == len(other) and all(
        np.array_equal(a.images, b.images)
        and a.labels.tolist() == b.labels.tolist()
        and a.indices.tolist() == b.indices.tolist()
        and a.problems == b.problems
        for a, b in zip(one, other, strict=True)
    )


def indices(batches: list[Batch]) -> list[int]:
    return [index for batch in batches for index in batch.indices.tolist()]


@pytest.fixture(autouse=True)
def _leaves_no_threads() -> Iterator[None]:
    before = threading.active_count()
    yield
    gc.collect()
    until = time.monotonic() + 20
    while threading.active_count() > before and time.monotonic() < until:
        time.sleep(0.01)  # A pool that was forgotten ends by itself, but not at once.
    assert threading.active_count() <= before


@pytest.fixture
def folder(tmp_path: Path) -> ImageFolder:
    """Two classes of 12 pictures of several sizes."""
    rng = np.random.default_rng(3)
    for label in ("a", "b"):
        (tmp_path / label).mkdir()
        for number in range(12):
            image = rng.integers(0, 256, (20 + number, 41 - number, 3), np.uint8)
            cv2.imwrite(str(tmp_path / label / f"{number:02}.jpg"), image)
    return evaluation_folder(tmp_path)


# ---- what a batch is ----


def test_a_batch_has_the_crops_in_planes_with_their_labels(folder: ImageFolder) -> None:
    transform = TrainTransform(16, jitter=0.4)
    with Loader(folder, transform, 5, seed=7, workers=2) as loader:
        batches = list(loader.batches(epoch=3))
    assert [len(batch.images) for batch in batches] == [5, 5, 5, 5, 4]
    for batch in batches:
        assert batch.images.dtype == np.uint8
        assert batch.images.flags.c_contiguous
        assert batch.images.shape[1:] == (3, 16, 16)
        assert batch.labels.dtype == batch.indices.dtype == np.int64
        for image, label, index in zip(*batch[:3], strict=True):
            crop = transform(folder.image(index), Draw(7, 3, int(index)))
            assert (image == crop.transpose(2, 0, 1)).all()
            assert label == index // 12
    assert indices(batches) == list(range(24))


def test_images_without_classes_have_no_label(tmp_path: Path, folder: ImageFolder) -> None:
    with Loader(calibration_folder(tmp_path / "a"), AS_IT_IS, 12, workers=1) as loader:
        (batch,) = loader
    assert batch.labels.dtype == np.int64
    assert batch.labels.tolist() == [NO_LABEL] * 12


def test_synthetic_images_are_loaded_as_they_are() -> None:
    images = SyntheticImages(20)
    with Loader(images, EvalTransform(64, 64), 20, workers=2) as loader:
        (batch,) = loader
    assert all((batch.images[i] == images.image(i).transpose(2, 0, 1)).all() for i in range(20))
    assert batch.labels.tolist() == images.labels.tolist()


@pytest.mark.parametrize(
    ("batch", "drop_last", "sizes"),
    [(20, False, [20, 20, 6]), (20, True, [20, 20]), (23, True, [23, 23]), (100, False, [46]), (46, True, [46])],
)
def test_the_last_batch_may_be_left_out(batch: int, drop_last: bool, sizes: list[int]) -> None:
    with Loader(Plain(), AS_IT_IS, batch, drop_last=drop_last, workers=2) as loader:
        assert len(loader) == len(sizes)
        assert [len(b.images) for b in loader] == sizes


# ---- the same every time ----


@pytest.mark.parametrize("batch", [1, 7, 40])
def test_the_number_of_threads_makes_no_difference(batch: int) -> None:
    found = []
    for workers in (0, 1, 2, 5):
        with Loader(Plain(broken=(3, 4, 30)), AS_IT_IS, batch, shuffle=True, workers=workers, max_bad=0.1) as loader:
            found.append(list(loader.batches(2)))
    assert all(same(found[0], other) for other in found[1:])


def test_epochs_and_seeds_shuffle_differently_and_repeatably() -> None:
    with Loader(Plain(), AS_IT_IS, 10, shuffle=True, seed=1, workers=2) as loader:
        first, second, again = (indices(list(loader.batches(epoch))) for epoch in (0, 1, 0))
    with Loader(Plain(), AS_IT_IS, 10, shuffle=True, seed=2, workers=2) as loader:
        other = indices(list(loader.batches(0)))
    assert first == again
    assert len({tuple(order) for order in (first, second, other, range(IMAGES))}) == 4
    assert all(sorted(order) == list(range(IMAGES)) for order in (first, second, other))


@pytest.mark.parametrize("start", [0, 1, 4, 5])
def test_an_epoch_can_be_taken_up_at_any_batch(start: int) -> None:
    with Loader(Plain(), AS_IT_IS, 10, shuffle=True, seed=1, workers=2) as loader:
        whole = list(loader.batches(4))
    data = Plain()
    with Loader(data, AS_IT_IS, 10, shuffle=True, seed=1, workers=2) as loader:
        assert same(list(loader.batches(4, start)), whole[start:])
    assert len(data.made) == max(0, IMAGES - 10 * start)


def test_augmented_crops_differ_from_epoch_to_epoch(folder: ImageFolder) -> None:
    with Loader(folder, TrainTransform(16), 24, workers=2) as loader:
        first, second, again = (next(loader.batches(epoch)).images for epoch in (0, 1, 0))
    assert (first == again).all()
    assert (first != second).any(axis=(1, 2, 3)).all()


# ---- ahead, but not too far ----


def test_only_about_two_batches_are_made_ahead() -> None:
    data = Plain(400)
    with Loader(data, AS_IT_IS, 20, workers=2) as loader:
        batches = iter(loader)
        for taken in (1, 2, 3):
            next(batches)
            time.sleep(0.2)  # Time enough to run on, were there nothing to stop them.
            assert taken * 20 <= len(data.made) <= (taken + 2) * 20


def test_small_batches_are_made_further_ahead_so_that_all_threads_have_work() -> None:
    at_once = threading.Barrier(3, timeout=20)

    class Together(Plain):
        def image(self, index: int) -> Pixels:
            if index < 3:
                at_once.wait()  # Returns only when three threads are here.
            return super().image(index)

    with Loader(Together(), AS_IT_IS, 1, workers=3) as loader:
        assert indices(list(loader)) == list(range(IMAGES))


# ---- broken pictures ----


@pytest.mark.parametrize("workers", [0, 3])
def test_a_broken_image_is_replaced_by_the_next_and_named_once(workers: int) -> None:
    with Loader(Plain(broken=(7, 8, 45)), AS_IT_IS, 10, workers=workers, max_bad=0.1) as loader:
        batches = [list(loader.batches(epoch)) for epoch in (0, 1)]
        problems = loader.problems
    expected = [9 if i in (7, 8) else i for i in range(45)] + [0]
    assert indices(batches[0]) == indices(batches[1]) == expected
    for batch in (*batches[0], *batches[1]):
        assert batch.images[:, 0, 0, 0].tolist() == batch.indices.tolist()
        assert (batch.labels == batch.indices % 2).all()
    told = [[problem[:2].strip(".") for problem in batch.problems] for epoch in batches for batch in epoch]
    assert told == [["7", "8"], [], [], [], ["45"], [], [], [], [], []]
    assert list(problems) == [7, 8, 45]
    assert problems[7] == "7.jpg is cut short: copy or download it again"


def test_a_broken_image_stands_for_itself_in_the_random_numbers(folder: ImageFolder) -> None:
    """Two of the same picture in a batch are two different crops."""
    folder.image(3).write_bytes(b"")
    with Loader(folder, TrainTransform(16), 24, workers=2, max_bad=0.1) as loader:
        (batch,) = loader
    assert batch.indices.tolist() == [0, 1, 2, 4, *range(4, 24)]
    assert (batch.images[3] != batch.images[4]).any()


@pytest.mark.parametrize("workers", [0, 3])
def test_a_broken_image_can_be_left_out(workers: int) -> None:
    data = Plain(broken=(7, 8, 20, 21, 22, 23, 24))
    with Loader(data, AS_IT_IS, 5, workers=workers, broken="drop", max_bad=0.5) as loader:
        batches = list(loader)
        assert len(loader.problems) == 7
    assert indices(batches) == [i for i in range(IMAGES) if i not in data.broken]
    assert [len(batch.images) for batch in batches] == [5, 3, 5, 5, 5, 5, 5, 5, 1]
    for batch in batches:
        assert batch.images[:, 0, 0, 0].tolist() == batch.indices.tolist()
        assert (batch.labels == batch.indices % 2).all()


def test_broken_files_of_a_folder_are_told_by_name(folder: ImageFolder) -> None:
    path = folder.image(5)
    path.write_bytes(path.read_bytes()[:-50])
    folder.image(17).unlink()
    with Loader(folder, TrainTransform(16), 24, workers=2, max_bad=0.1) as loader:
        (batch,) = loader
    assert [("a/05.jpg is cut short" in p, "b/05.jpg does not exist" in p) for p in batch.problems] == [
        (True, False),
        (False, True),
    ]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("broken", ["replace", "drop"])
def test_more_than_the_allowed_share_stops_the_run_in_one_line(workers: int, broken: Any) -> None:
    data = Plain(200, broken=(20, 40, 60))
    with Loader(data, AS_IT_IS, 10, workers=workers, broken=broken, max_bad=0.01) as loader:
        batches = iter(loader)
        whole = [next(batches) for _ in range(6 if broken == "replace" else 5)]
        with pytest.raises(InputError, match="3 of 200 pictures of plain pictures cannot be read") as caught:
            whole.extend(batches)
    assert len(whole) == 6
    message = str(caught.value)
    assert message.isprintable()
    assert all(f"{number}.jpg" in message for number in data.broken)


def test_the_allowed_share_itself_does_not_stop_the_run() -> None:
    with Loader(Plain(200, broken=(20, 40)), AS_IT_IS, 10, workers=2, max_bad=0.01) as loader:
        for epoch in range(2):
            assert len(indices(list(loader.batches(epoch)))) == 200


def test_no_broken_image_is_allowed_where_the_share_is_zero() -> None:
    with Loader(Plain(broken=(1,)), AS_IT_IS, 10, workers=2, max_bad=0) as loader, pytest.raises(InputError):
        list(loader)


@pytest.mark.parametrize("broken", ["replace", "drop"])
def test_a_set_without_one_good_image_ends(broken: Any) -> None:
    data = Plain(9, broken=tuple(range(9)))
    with (
        Loader(data, AS_IT_IS, 4, workers=2, broken=broken, max_bad=1) as loader,
        pytest.raises(InputError, match="9 of 9"),
    ):
        list(loader)


# ---- ends ----


@pytest.mark.parametrize("workers", [0, 2])
def test_another_error_is_raised_in_its_place(workers: int) -> None:
    taken = []
    with (
        Loader(Plain(broken=(25,), fault=ZeroDivisionError("here")), AS_IT_IS, 10, workers=workers) as loader,
        pytest.raises(ZeroDivisionError, match="here"),
    ):
        for batch in loader:
            taken += batch.indices.tolist()
    assert taken == list(range(20))


def test_an_epoch_that_is_left_early_stops_the_work() -> None:
    data = Plain(2000)
    with Loader(data, AS_IT_IS, 50, workers=2) as loader:
        for _ in loader:
            break
    assert len(data.made) <= 200


def test_a_loader_that_is_forgotten_leaves_no_threads() -> None:
    loader = Loader(Plain(), AS_IT_IS, 10, workers=2)
    next(iter(loader))


def test_a_closed_loader_can_be_closed_and_used_again() -> None:
    loader = Loader(Plain(), AS_IT_IS, 10, workers=2)
    first = list(loader)
    loader.close()
    loader.close()
    assert same(list(loader), first)
    loader.close()


def test_an_interrupt_from_the_keyboard_ends_the_program_at_once() -> None:
    script = """
from mgq.data.augmentation import EvalTransform
from mgq.data.loader import Loader
from mgq.data.synthetic import SyntheticImages
with Loader(SyntheticImages(10**6), EvalTransform(64), 32, workers=2) as loader:
    for number, batch in enumerate(loader):
        if number == 1:
            print("running", flush=True)
"""
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "running\n"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert errors.rstrip().endswith("KeyboardInterrupt")
    assert process.returncode != 0


# ---- values that cannot be ----


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: Loader(Plain(0), AS_IT_IS, 1), "plain pictures has no pictures"),
        (lambda: Loader(Plain(), AS_IT_IS, 0), "a batch of 0"),
        (lambda: Loader(Plain(), AS_IT_IS, 50, drop_last=True), "46 pictures, too few for a batch of 50"),
        (lambda: Loader(Plain(), AS_IT_IS, 1, workers=-1), "-1 workers"),
        (lambda: Loader(Plain(), AS_IT_IS, 1, max_bad=2), "share of 2"),
        (lambda: Loader(Plain(), AS_IT_IS, 10).batches(0, 6), "batch 6 is not in an epoch of 5"),
        (lambda: Loader(Plain(), AS_IT_IS, 10).batches(0, -1), "batch -1"),
    ],
)
def test_values_that_cannot_be_are_refused(make: Callable[[], object], expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        make()


def test_one_thread_a_core_is_the_default() -> None:
    assert Loader(Plain(), AS_IT_IS, 1).workers == usable_cores() >= 1
