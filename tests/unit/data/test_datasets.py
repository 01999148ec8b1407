"""What folders of pictures are taken for, and what is said of those that cannot be used."""

from __future__ import annotations

import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from mgq.data import imagenet_archives
from mgq.data.datasets import subset, without_subset
from mgq.data.imagenet_classes import imagenet_classes
from mgq.data.labelled_folders import (
    KEPT,
    ImageFolder,
    calibration_folder,
    evaluation_folder,
    training_folders,
    validation_folder,
)
from mgq.data.synthetic import SyntheticImages
from mgq.errors import InputError
from mgq.events import Progress
from tests.fakes import imagenet_files
from tests.fakes.photo_folders import listed, make

WNIDS = [entry.wnid for entry in imagenet_classes()]
NAMES = tuple(entry.name for entry in imagenet_classes())


def refusal(caught: pytest.ExceptionInfo[InputError]) -> str:
    message = str(caught.value)
    assert message.isprintable()
    return message


# ---- what is found ----


def test_images_are_sorted_by_class_and_name_and_labelled_by_the_rank_of_the_class(tmp_path: Path) -> None:
    make(tmp_path, "train/dog/b.jpg", "train/dog/a.png", "train/Cat/10.jpeg", "train/Cat/9.jpg", "train/ant/x.webp")
    make(tmp_path, "val/ant/v.jpg", "val/Cat/v.jpg", "val/dog/v.jpg")
    train, val = training_folders(tmp_path)
    assert isinstance(train, ImageFolder)
    assert train.classes == val.classes == ("Cat", "ant", "dog")
    assert listed(train) == [
        ("Cat/10.jpeg", 0),
        ("Cat/9.jpg", 0),
        ("ant/x.webp", 1),
        ("dog/a.png", 2),
        ("dog/b.jpg", 2),
    ]
    assert listed(val) == [("Cat/v.jpg", 0), ("ant/v.jpg", 1), ("dog/v.jpg", 2)]
    assert train.counts().tolist() == [2, 1, 2]
    assert train.folder == tmp_path / "train"


def test_hidden_files_other_files_and_files_beside_the_classes_are_left_out(tmp_path: Path) -> None:
    make(tmp_path, "a/1.jpg", "a/.2.jpg", "a/._1.jpg", "a/notes.txt", "a/Thumbs.db", "b/1.JPG", ".git/x.jpg", "x.jpg")
    assert listed(evaluation_folder(tmp_path)) == [("a/1.jpg", 0), ("b/1.JPG", 1)]


def test_images_deeper_in_a_class_belong_to_it(tmp_path: Path) -> None:
    make(tmp_path, "a/z.jpg", "a/day 1/p.jpg", "a/day 1/q/r.jpg", "b/1.jpg")
    assert listed(evaluation_folder(tmp_path)) == [
        ("a/day 1/p.jpg", 0),
        ("a/day 1/q/r.jpg", 0),
        ("a/z.jpg", 0),
        ("b/1.jpg", 1),
    ]


def test_links_that_lead_to_themselves_are_no_classes(tmp_path: Path) -> None:
    make(tmp_path, "a/1.jpg", "b/1.jpg")
    (tmp_path / "round").symlink_to("round")
    assert evaluation_folder(tmp_path).classes == ("a", "b")


def test_a_class_may_be_a_link_and_a_loop_of_links_ends(tmp_path: Path) -> None:
    make(tmp_path, "elsewhere/1.jpg", "set/b/1.jpg")
    (tmp_path / "set" / "a").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set" / "b" / "loop").symlink_to(tmp_path / "set")
    assert listed(evaluation_folder(tmp_path / "set")) == [("a/1.jpg", 0), ("b/1.jpg", 1)]


def test_names_that_are_not_utf8_are_kept_and_can_be_shown(tmp_path: Path) -> None:
    make(tmp_path, "a/1.jpg")
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    os.mkdir(folder)  # noqa: PTH102 - of bytes
    Path(os.fsdecode(folder + b"/\xff.jpg")).touch()
    images = evaluation_folder(tmp_path)
    assert images.image(1).is_file()
    assert os.fsencode(images.image(1)).endswith(b"caf\xe9/\xff.jpg")
    assert all(name.isprintable() for name in images.classes)


def test_a_split_may_be_named_itself(tmp_path: Path) -> None:
    make(tmp_path, "val/a/1.jpg", "val/b/1.jpg", "train/a/2.jpg", "train/b/2.jpg")
    assert listed(evaluation_folder(tmp_path / "train")) == [("a/2.jpg", 0), ("b/2.jpg", 1)]
    assert listed(evaluation_folder(tmp_path)) == [("a/1.jpg", 0), ("b/1.jpg", 1)]


def test_a_dataset_cannot_be_changed(tmp_path: Path) -> None:
    images = evaluation_folder(make(tmp_path, "a/1.jpg", "b/1.jpg"))
    assert images.labels is not None
    with pytest.raises(AttributeError):
        images.classes = ()  # type: ignore[misc]
    with pytest.raises(ValueError, match="read-only"):
        images.labels[0] = 1


@pytest.mark.parametrize("index", [-1, 2])
def test_an_image_beyond_the_last_is_an_index_error(tmp_path: Path, index: int) -> None:
    images = evaluation_folder(make(tmp_path, "a/1.jpg", "b/1.jpg"))
    with pytest.raises(IndexError):
        images.image(index)


def test_an_image_takes_less_than_a_hundred_bytes(tmp_path: Path) -> None:
    for wnid in WNIDS[:4]:
        make(tmp_path, *(f"{wnid}/{wnid}_{i}.JPEG" for i in range(500)))
    tracemalloc.start()
    images = evaluation_folder(tmp_path)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # Apart from the class names, which are the same for any number of pictures.
    assert held < 100 * len(images) + 100_000
    assert len(images) == 2000


def test_progress_counts_the_classes(tmp_path: Path) -> None:
    events: list[Progress] = []
    evaluation_folder(make(tmp_path, "a/1.jpg", "b/1.jpg", "c/1.jpg"), events.append)
    assert [(event.done, event.total, event.unit) for event in events] == [(i, 3, "classes") for i in (1, 2, 3)]


# ---- ImageNet ----


def test_wnids_get_their_rank_among_all_1000_classes(tmp_path: Path) -> None:
    make(tmp_path, *(f"{WNIDS[rank]}/x.JPEG" for rank in (4, 998, 6)))
    images = evaluation_folder(tmp_path)
    assert images.classes == NAMES
    assert listed(images) == [(f"{WNIDS[rank]}/x.JPEG", rank) for rank in (4, 6, 998)]
    assert images.counts().shape == (1000,)
    assert np.flatnonzero(images.counts()).tolist() == [4, 6, 998]


def test_wnids_among_other_names_are_names(tmp_path: Path) -> None:
    make(tmp_path, f"{WNIDS[7]}/1.jpg", "b/1.jpg")
    assert evaluation_folder(tmp_path).classes == ("b", WNIDS[7])


def test_imagenets_val_may_lack_classes_that_train_has(tmp_path: Path) -> None:
    make(tmp_path, *(f"train/{wnid}/1.JPEG" for wnid in WNIDS[:5]), *(f"val/{wnid}/1.JPEG" for wnid in WNIDS[1:3]))
    train, val = training_folders(tmp_path)
    assert [label for _, label in listed(train)] == [0, 1, 2, 3, 4]
    assert [label for _, label in listed(val)] == [1, 2]


def test_imagenets_val_may_not_have_classes_that_train_lacks(tmp_path: Path) -> None:
    make(tmp_path, *(f"train/{wnid}/1.JPEG" for wnid in WNIDS[:5]), *(f"val/{wnid}/1.JPEG" for wnid in WNIDS[4:6]))
    with pytest.raises(InputError, match=WNIDS[5]):
        training_folders(tmp_path)


def test_original_archives_are_unpacked_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wnids = sorted({imagenet_files.BY_ID[number] for number in imagenet_files.TRUTH})
    imagenet_files.tar(tmp_path / imagenet_archives.TRAIN_ARCHIVE, imagenet_files.train_members(wnids))
    imagenet_files.tar(tmp_path / imagenet_archives.VAL_ARCHIVE, imagenet_files.val_members())
    imagenet_files.devkit(tmp_path / imagenet_archives.DEVKIT)
    monkeypatch.setattr(imagenet_archives, "MD5", imagenet_files.sums(tmp_path))
    val = evaluation_folder(tmp_path)
    expected = sorted(WNIDS.index(imagenet_files.BY_ID[number]) for number in imagenet_files.TRUTH)
    assert [label for _, label in listed(val)] == expected
    assert not (tmp_path / "train").exists()
    train, _ = training_folders(tmp_path)
    assert [label for _, label in listed(train)] == sorted(4 * [WNIDS.index(wnid) for wnid in wnids])


# ---- folders without train and val ----


def test_a_folder_of_classes_alone_is_split_and_no_image_is_on_both_sides(tmp_path: Path) -> None:
    make(tmp_path, *(f"{kind}/{i}.jpg" for kind in ("cat", "dog", "fox") for i in range(200)))
    train, val = training_folders(tmp_path)
    assert sorted(listed(train) + listed(val)) == sorted(listed(evaluation_folder(tmp_path)))
    assert not set(listed(train)) & set(listed(val))
    assert train.classes == val.classes == ("cat", "dog", "fox")
    assert val.labels is not None
    shares = np.bincount(val.labels) / 200
    assert (abs(shares - 1 / KEPT) < 0.1).all()
    assert "kept to measure on" in val.name and str(tmp_path) in val.name and train.name == str(tmp_path)
    assert listed(validation_folder(tmp_path)) == listed(val)


def test_an_image_stays_on_its_side_when_others_come_or_the_folder_moves(tmp_path: Path) -> None:
    make(tmp_path / "one", *(f"{kind}/{i}.jpg" for kind in "ab" for i in range(50)))
    make(tmp_path / "two", *(f"{kind}/{i}.jpg" for kind in "ab" for i in range(80)))
    (before, measured), (after, _) = (training_folders(tmp_path / name) for name in ("one", "two"))
    assert set(listed(before)) <= set(listed(after)) and not set(listed(measured)) & set(listed(after))


def test_of_two_images_one_is_on_each_side(tmp_path: Path) -> None:
    make(tmp_path, *(f"{kind}/{kind}{i}.jpg" for kind in "abcdefgh" for i in range(2)))
    train, val = training_folders(tmp_path)
    assert [label for _, label in listed(train)] == [label for _, label in listed(val)] == list(range(8))


def test_an_image_alone_in_its_class_is_named(tmp_path: Path) -> None:
    make(tmp_path, "a/1.jpg", "a/2.jpg", "b/lonely.jpg")
    with pytest.raises(InputError, match=r"lonely\.jpg is alone in its class") as caught:
        training_folders(tmp_path)
    refusal(caught)


def test_what_a_choice_leaves_out_is_all_the_rest(tmp_path: Path) -> None:
    whole = evaluation_folder(make(tmp_path, *(f"{kind}/{i}.jpg" for kind in "ab" for i in range(5))))
    assert sorted(listed(subset(whole, 3)) + listed(without_subset(whole, 3))) == listed(whole)
    drawn = SyntheticImages(20, size=32, split="val")
    assert without_subset(drawn, 15).labels.tolist() == drawn.labels[15:].tolist()  # type: ignore[union-attr]


# ---- pictures to calibrate with ----


def test_calibration_takes_the_training_images_else_the_others(tmp_path: Path) -> None:
    make(tmp_path, "val/a/1.jpg", "val/b/1.jpg")
    assert calibration_folder(tmp_path).folder == tmp_path / "val"
    make(tmp_path, "train/a/2.jpg", "train/b/2.jpg")
    assert listed(calibration_folder(tmp_path)) == [("a/2.jpg", 0), ("b/2.jpg", 1)]
    assert listed(calibration_folder(tmp_path / "val")) == [("a/1.jpg", 0), ("b/1.jpg", 1)]


@pytest.mark.parametrize("names", [("1.jpg", "2.jpg"), ("a/1.jpg", "a/2.jpg"), ("1.jpg", "a/1.jpg", "b/1.jpg")])
def test_calibration_needs_no_classes(tmp_path: Path, names: tuple[str, ...]) -> None:
    images = calibration_folder(make(tmp_path, *names))
    assert images.labels is None
    assert images.classes == ()
    assert [str(images.image(i).relative_to(tmp_path)) for i in range(len(images))] == list(names)
    assert images.counts().tolist() == []


# ---- what cannot be used ----


@pytest.mark.parametrize(("there", "missing"), [("train", "val"), ("val", "train")])
def test_a_missing_split_is_named(tmp_path: Path, there: str, missing: str) -> None:
    make(tmp_path, f"{there}/a/1.jpg", f"{there}/b/1.jpg")
    with pytest.raises(InputError, match=f"no folder {missing}/"):
        training_folders(tmp_path)


@pytest.mark.parametrize("use", [training_folders, evaluation_folder, calibration_folder])
def test_a_folder_that_is_none_is_named(tmp_path: Path, use: object) -> None:
    assert callable(use)
    with pytest.raises(InputError, match="nowhere does not exist"):
        use(tmp_path / "nowhere")
    make(tmp_path, "file")
    with pytest.raises(InputError, match="file is not a folder"):
        use(tmp_path / "file")


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ((), "no class folders"),
        (("a/1.jpg", "b/notes.txt", "c/1.jpg"), "no pictures in b:"),
        (("a/notes.txt", "b/notes.txt"), "no pictures in its class folders"),
        (("1.jpg",), "no class folders: put them in <class>/"),
    ],
)
def test_folders_to_measure_on_need_classes_with_images(tmp_path: Path, names: tuple[str, ...], expected: str) -> None:
    with pytest.raises(InputError, match=expected) as caught:
        evaluation_folder(make(tmp_path, *names))
    assert tmp_path.name in refusal(caught)


def test_many_empty_classes_are_told_in_one_short_line(tmp_path: Path) -> None:
    make(tmp_path, "a/1.jpg", *(f"empty{i}/x.txt" for i in range(50)))
    with pytest.raises(InputError, match="empty0, empty1, empty10 and 47 more"):
        evaluation_folder(tmp_path)


def test_classes_that_only_one_split_has_are_named(tmp_path: Path) -> None:
    make(tmp_path, "train/cat/1.jpg", "train/dog/1.jpg", "val/cat/1.jpg", "val/dogs/1.jpg")
    with pytest.raises(InputError, match="has dog in train/ and not in val/") as caught:
        training_folders(tmp_path)
    refusal(caught)
    make(tmp_path, "train/dogs/1.jpg", "val/dog/1.jpg", "val/fox\n/1.jpg")
    with pytest.raises(InputError, match=r"has fox\\n in val/ and not in train/") as caught:
        training_folders(tmp_path)
    refusal(caught)


def test_a_folder_without_any_image_cannot_calibrate(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no pictures in it"):
        calibration_folder(make(tmp_path, "a/notes.txt", "b.txt"))


def test_a_folder_that_may_not_be_searched_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, "a/1.jpg", "b/1.jpg")
    scandir = os.scandir

    def guarded(path: Path) -> object:
        if Path(path).name == "b":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    with pytest.raises(InputError, match=r"b cannot be searched \(Permission denied\)"):
        evaluation_folder(tmp_path)


def test_a_subset_is_evenly_spread_and_keeps_labels_and_classes(tmp_path: Path) -> None:
    whole = evaluation_folder(make(tmp_path, *(f"{kind}/{i}.jpg" for kind in "abc" for i in range(4))))
    part = subset(whole, 5)
    assert [str(part.image(i)) for i in range(5)] == [str(whole.image(i)) for i in (0, 2, 4, 7, 9)]
    assert part.labels is not None and part.labels.tolist() == [0, 0, 1, 1, 2]
    assert (len(part), part.name, part.classes) == (5, whole.name, whole.classes)
    for index in (-1, 5):
        with pytest.raises(IndexError):
            part.image(index)


def test_a_subset_of_more_than_there_is_is_all_of_it_and_none_is_refused(tmp_path: Path) -> None:
    whole = evaluation_folder(make(tmp_path, "a/1.jpg", "b/1.jpg"))
    assert len(subset(whole, 3)) == 2
    with pytest.raises(InputError, match="limit of 0 pictures"):
        subset(whole, 0)


def test_a_subset_of_unlabelled_images_has_no_labels(tmp_path: Path) -> None:
    part = subset(calibration_folder(make(tmp_path, "1.jpg", "2.jpg", "3.jpg")), 2)
    assert part.labels is None and len(part) == 2
