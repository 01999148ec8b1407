"""What folders of pictures are taken for: splits or classes, as other programs name and leave them."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mgq.data.augmentation import EvalTransform
from mgq.data.datasets import Dataset
from mgq.data.folder_layout import role_of
from mgq.data.folder_scan import IMAGE_SUFFIXES, Tally, entries_in
from mgq.data.image_sources import expand
from mgq.data.labelled_folders import calibration_folder, evaluation_folder, is_unsplit, training_folders
from mgq.data.loader import Loader
from mgq.errors import InputError
from tests.conftest import one_line_about
from tests.fakes.photo_folders import listed, make

AS_IT_IS = EvalTransform(8, 8)

CLASSES = ("cat", "dog")


def filled(root: Path, *folders: str, classes: tuple[str, ...] = CLASSES, number: int = 2) -> Path:
    """Empty files in class folders of each of ``folders``, named after where they lie."""
    for folder in folders:
        mark = f"of-{folder.replace('/', '-')}-"
        make(root, *(f"{folder}/{kind}/{mark}{i}.jpg" for kind in classes for i in range(number)))
    return root


def where(images: Dataset, root: Path) -> set[str]:
    """The folders below ``root`` that hold the class folders of ``images``."""
    paths = (images.image(i) for i in range(len(images)))
    return {str(path.parent.parent.relative_to(root)) for path in paths if isinstance(path, Path)}


def refused(use: Callable[[Path], Any], root: Path) -> str:
    with pytest.raises(InputError) as caught:
        use(root)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- splits by any usual name ----


@pytest.mark.parametrize(
    ("train", "val"),
    [
        ("training", "validation"),
        ("Train", "Val"),
        ("TRAIN", "VAL"),
        ("train", "valid"),
        ("train", "validation"),
        ("Training", "dev"),
        ("train", "test"),
        ("training_set", "test_set"),
        ("train-images", "val-images"),
        ("train2017", "val2017"),
        ("trainset", "testset"),
    ],
)
def test_splits_are_never_classes_by_whatever_name(tmp_path: Path, train: str, val: str) -> None:
    filled(tmp_path, train, val)
    remarks: list[str] = []
    learned, measured = training_folders(tmp_path, on_message=remarks.append)
    assert learned.classes == measured.classes == CLASSES
    assert (where(learned, tmp_path), where(measured, tmp_path)) == ({train}, {val})
    assert where(evaluation_folder(tmp_path), tmp_path) == {val}
    assert where(calibration_folder(tmp_path), tmp_path) == {train}
    assert not is_unsplit(tmp_path)
    assert one_line_about(
        "".join(remarks), f"{train}/ is trained on (4 pictures)", f"{val}/ is measured on (4 pictures"
    )


@pytest.mark.parametrize("name", ["bullet_train", "invalid", "trainer", "contest", "devil", "vale", "cats", "train 1"])
def test_other_names_are_no_splits(name: str) -> None:
    assert role_of(name) is None


def test_test_alone_is_measured_on_and_stays_aside_where_there_is_val(tmp_path: Path) -> None:
    filled(tmp_path, "test")
    remarks: list[str] = []
    assert where(evaluation_folder(tmp_path, on_message=remarks.append), tmp_path) == {"test"}
    assert one_line_about("".join(remarks), "test/ is measured on (4 pictures, for there is no val/)")
    assert where(calibration_folder(tmp_path), tmp_path) == {"test"}
    assert one_line_about(refused(training_folders, tmp_path), "no folder train/", "make it", str(tmp_path / "test"))
    filled(tmp_path, "train", "val")
    remarks.clear()
    learned, measured = training_folders(tmp_path, on_message=remarks.append)
    assert (where(learned, tmp_path), where(measured, tmp_path)) == ({"train"}, {"val"})
    assert one_line_about("".join(remarks), "test/ is not looked at")


@pytest.mark.parametrize("use", [training_folders, evaluation_folder, calibration_folder])
@pytest.mark.parametrize(
    ("folders", "parts"),
    [
        (("train", "val", "valid"), ("two ways", "val/", "valid/", "remove one")),
        (("train", "Train", "val"), ("two ways", "Train/", "train/", "remove one")),
        (("train", "test", "testing"), ("two ways", "test/", "testing/")),
        ((".", "train"), ("two ways", "train/", "cat/, dog/", "move", "rename")),
        (("train", "val", "more"), ("two ways", "train/, val/", "more/")),
        (("fold1", "fold2"), ("two ways", "the classes fold1, fold2", "the classes cat, dog", "train/ and val/")),
        (("seg_train", "seg_test"), ("two ways", "seg_test, seg_train", "cat, dog")),
        (("train/train", "train/val"), ("two ways", "train/, val/ in it", "name the folder")),
    ],
)
def test_what_can_be_read_in_two_ways_is_refused_with_both(
    tmp_path: Path, use: Callable[[Path], Any], folders: tuple[str, ...], parts: tuple[str, ...]
) -> None:
    filled(tmp_path, *folders)
    assert one_line_about(refused(use, tmp_path), *parts)


def test_an_empty_split_is_no_second_reading(tmp_path: Path) -> None:
    filled(tmp_path, "train", "valid")
    (tmp_path / "val").mkdir()
    make(tmp_path, "annotations/notes.txt", "labels/a.xml")
    learned, measured = training_folders(tmp_path)
    assert (where(learned, tmp_path), where(measured, tmp_path)) == ({"train"}, {"valid"})


def test_classes_with_folders_of_their_own_are_classes(tmp_path: Path) -> None:
    make(tmp_path, "cat/day 1/1.jpg", "cat/day 2/2.jpg", "dog/day 1/3.jpg", "dog/4.jpg", "fox/day 1/5.jpg")
    assert evaluation_folder(tmp_path).classes == ("cat", "dog", "fox")


# ---- wrappers ----


@pytest.mark.parametrize("wrapper", ["dataset", "dataset/dataset", "a/b/c"])
def test_a_folder_of_one_folder_stands_for_what_is_in_it(tmp_path: Path, wrapper: str) -> None:
    root = filled(tmp_path / "whole", f"{wrapper}/train", f"{wrapper}/val")
    make(root, "__MACOSX/._x", f"{wrapper}/__MACOSX/train/cat/._1.jpg", "readme.txt")
    learned, measured = training_folders(root)
    assert (where(learned, root), where(measured, root)) == ({f"{wrapper}/train"}, {f"{wrapper}/val"})
    plain = filled(tmp_path / "plain", wrapper, number=4)
    assert is_unsplit(plain)
    assert evaluation_folder(plain).classes == CLASSES
    learned, measured = training_folders(plain)
    assert where(learned, plain) == where(measured, plain) == {wrapper}


def test_a_split_in_a_folder_of_its_own_name_is_one_split(tmp_path: Path) -> None:
    filled(tmp_path, "training_set/training_set", "test_set/test_set")
    learned, measured = training_folders(tmp_path)
    assert where(learned, tmp_path) == {"training_set/training_set"}
    assert where(measured, tmp_path) == {"test_set/test_set"}
    assert where(evaluation_folder(tmp_path / "training_set"), tmp_path) == {"training_set/training_set"}


def test_a_split_may_have_its_classes_in_a_folder_of_images(tmp_path: Path) -> None:
    filled(tmp_path, "train/images", "val/images")
    learned, measured = training_folders(tmp_path)
    assert (where(learned, tmp_path), where(measured, tmp_path)) == ({"train/images"}, {"val/images"})


def test_a_wrapper_that_leads_in_a_circle_ends(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "in").symlink_to(tmp_path)
    assert "class folder" in refused(evaluation_folder, tmp_path)


# ---- what other programs leave ----


def test_what_other_programs_leave_is_passed_over_and_counted_in_one_line(tmp_path: Path) -> None:
    filled(tmp_path, ".", number=3)
    make(tmp_path, "__MACOSX/cat/._a.jpg", ".DS_Store", ".git/x.jpg", ".ipynb_checkpoints/cat.jpg", "thumbnails/1.jpg")
    make(tmp_path, "cat/Thumbs.db", "cat/desktop.ini", "cat/@eaDir/1.jpg", "cat/.thumbnails/1.jpg", "cat/._1.jpg")
    make(tmp_path, "dog/1.jpg~", "dog/1.jpg_original", "dog/2.jpg.part", "dog/.hidden.jpg")
    (tmp_path / "nothing").mkdir()
    (tmp_path / "less" / "deep").mkdir(parents=True)
    for use in (training_folders, evaluation_folder, calibration_folder):
        remarks: list[str] = []
        use(tmp_path, on_message=remarks.append)
        (line,) = (line for line in remarks if "passed over" in line)
        assert "\n" not in line and "1 empty folder nothing/" in line and "1 empty folder less/" in line
        found = evaluation_folder(tmp_path)
        assert found.classes == CLASSES and len(found) == 6
    tally = Tally()
    entries_in(tmp_path, tally)
    entries_in(tmp_path / "cat", tally)
    assert {"__MACOSX", ".DS_Store", ".git", ".ipynb_checkpoints", "thumbnails", "Thumbs.db"} <= set(tally.passed)
    assert {"desktop.ini", "@eaDir", ".thumbnails", "._*"} <= set(tally.passed)
    assert not tally.left_out


def test_files_that_are_not_read_are_counted_and_named_with_the_reason(tmp_path: Path) -> None:
    filled(tmp_path, ".", number=3)
    make(tmp_path, "cat/1.heic", "cat/2.HEIC", "cat/3.nef", "dog/a.txt", "dog/b.mp4")
    remarks: list[str] = []
    evaluation_folder(tmp_path, on_message=remarks.append)
    parts = ("5 files", "2 .heic (HEIF is not read: save as JPEG)", "1 .nef (camera raw", "1 .txt", "1 .mp4 (video")
    assert one_line_about("".join(remarks), *parts)
    said: list[str] = []
    assert len(expand([str(tmp_path)], said.append)) == 6
    assert said == remarks


def test_images_outside_the_class_folders_are_counted(tmp_path: Path) -> None:
    filled(tmp_path, "train", "val")
    make(tmp_path, "loose.jpg", "val/more.jpg")
    remarks: list[str] = []
    training_folders(tmp_path, on_message=remarks.append)
    assert one_line_about(remarks[-1], "left out 2 files: 2 outside the class folders")


def test_no_images_says_what_there_is_instead(tmp_path: Path) -> None:
    make(tmp_path, "cat/1.heic", "cat/2.heic", "dog/notes.txt")
    for use in (training_folders, evaluation_folder, calibration_folder, lambda root: expand([str(root)])[0].read()):
        assert one_line_about(refused(use, tmp_path), "has no pictures", "2 .heic (HEIF", "1 .txt")
    make(tmp_path, "cat/1.jpg")
    assert one_line_about(refused(evaluation_folder, tmp_path), "no pictures in dog", "remove the folder", "1 .txt")


def test_a_folder_with_nothing_in_it_is_no_class_but_one_with_files_is(tmp_path: Path) -> None:
    filled(tmp_path, ".", number=3)
    (tmp_path / "fox").mkdir()
    assert evaluation_folder(tmp_path).classes == CLASSES
    make(tmp_path, "fox/a.json")
    assert "no pictures in fox" in refused(evaluation_folder, tmp_path)


# ---- pictures by content ----


def encoded(kind: str, seed: int = 0) -> bytes:
    stream = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), np.uint8)
    Image.fromarray(pixels.repeat(16, 0).repeat(16, 1)).save(stream, kind)
    return stream.getvalue()


@pytest.mark.parametrize("suffix", ["", ".img", ".jpg_large", ".bin", ".php"])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "AVIF", "JPEG2000", "PPM", "BMP", "GIF", "TIFF"])
def test_an_image_is_known_by_content_where_its_suffix_says_nothing(tmp_path: Path, suffix: str, kind: str) -> None:
    for name in CLASSES:
        (tmp_path / name).mkdir()
        (tmp_path / name / f"1{suffix}").write_bytes(encoded(kind))
        (tmp_path / name / "2.jpg").write_bytes(encoded(kind))  # a suffix that is wrong
    (tmp_path / "cat" / "notes").write_text("P6 is the mark of a PPM, and BM that of a bitmap")
    found = evaluation_folder(tmp_path)
    assert len(found) == 4
    assert len(expand([str(tmp_path)])) == 4
    with Loader(found, AS_IT_IS, 4, workers=1, max_bad=0) as loader:
        assert len(next(iter(loader)).images) == 4


@pytest.mark.parametrize("suffix", [".ppm", ".pgm", ".jp2", ".j2k", ".avif", ".tga", ".pcx", ".sgi", ".qoi", ".mpo"])
def test_kinds_that_are_read_are_found_by_their_suffix(tmp_path: Path, suffix: str) -> None:
    assert suffix in IMAGE_SUFFIXES
    make(tmp_path, f"cat/1{suffix}", f"dog/1{suffix.upper()}")
    assert [path for path, _ in listed(evaluation_folder(tmp_path))] == [f"cat/1{suffix}", f"dog/1{suffix.upper()}"]


# ---- one class, one picture ----


def test_one_class_is_enough_to_measure_on_and_too_few_to_train_on(tmp_path: Path) -> None:
    make(tmp_path, "one/cat/1.jpg", "split/val/cat/1.jpg", "split/train/cat/1.jpg")
    for root in (tmp_path / "one", tmp_path / "split"):
        assert evaluation_folder(root).classes == ("cat",)
        assert one_line_about(refused(training_folders, root), "1 class folder and a classifier needs 2")
    assert calibration_folder(tmp_path / "one").labels is None
