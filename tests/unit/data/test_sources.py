"""What arguments on the command line stand for."""

from __future__ import annotations

import inspect
import io
import os
import sys
import tracemalloc
from pathlib import Path

import cv2
import numpy as np
import pytest

from mgq.data.image_sources import IMAGE_SUFFIXES, Source, expand, leave_out_absent, refuse_hopeless
from mgq.data.labelled_folders import calibration_folder
from mgq.errors import InputError

PNG = cv2.imencode(".png", np.full((2, 3, 3), 7, np.uint8))[1].tobytes()


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def make(*names: str) -> None:
    for name in names:
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(PNG)


def names(*arguments: str) -> list[str]:
    """The names that the arguments stand for, each of which must be readable."""
    sources = expand(arguments)
    for source in sources:
        assert source.read().shape == (2, 3, 3)
    return [source.name for source in sources]


def problem(source: Source) -> str:
    with pytest.raises(InputError) as caught:
        source.read()
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_what_is_not_there_is_told_and_left_out() -> None:
    make("a.jpg")
    Path("text.jpg").write_text("no picture, but there")
    told: list[str] = []
    there = leave_out_absent(expand(["a.jpg", "typo.jpg", "no*.png", "text.jpg"]), told.append)
    assert [source.name for source in there] == ["a.jpg", "text.jpg"]
    assert told == ["typo.jpg does not exist: check the path", "no*.png matches no picture: check the pattern"]


def test_only_what_is_hopeless_as_a_whole_is_refused_beforehand() -> None:
    make("a.jpg")
    refuse_hopeless(expand(["a.jpg", "typo.jpg"]))
    with pytest.raises(InputError, match=r"typo.jpg does not exist: .* 2 in all"):
        refuse_hopeless(expand(["typo.jpg", "no*.png"]))


# ---- files ----


def test_files_keep_the_order_they_are_named_in() -> None:
    make("b.jpg", "a.jpg", "c.jpg")
    assert names("b.jpg", "c.jpg", "a.jpg") == ["b.jpg", "c.jpg", "a.jpg"]


def test_a_named_file_is_tried_whatever_its_suffix() -> None:
    make("picture.dat", "none", ".hidden")
    assert names("picture.dat", "none", ".hidden") == ["picture.dat", "none", ".hidden"]


def test_a_missing_file_among_others_fails_alone_and_only_when_read() -> None:
    make("a.jpg", "b.jpg")
    first, missing, last = expand(["a.jpg", "gone.jpg", "b.jpg"])
    assert first.read().shape == last.read().shape == (2, 3, 3)
    assert problem(missing) == "gone.jpg does not exist: check the path"


def test_a_file_that_vanishes_after_it_was_found_fails_alone() -> None:
    make("a.png", "b.png", "c.png")
    sources = expand(["."])
    Path("b.png").unlink()
    with pytest.raises(InputError, match=r"b\.png does not exist"):
        sources[1].read()
    assert sources[0].read().shape == sources[2].read().shape == (2, 3, 3)


def test_a_file_named_twice_or_in_two_spellings_is_kept_once() -> None:
    make("in/a.jpg", "b.jpg")
    spellings = ["in/a.jpg", "./in/a.jpg", "in/../in/a.jpg", str(Path("in/a.jpg").absolute()), "in", "in/*"]
    assert names(*spellings, "b.jpg", "b.jpg") == ["in/a.jpg", "b.jpg"]


def test_two_links_to_one_image_are_two() -> None:
    make("a.jpg")
    Path("b.jpg").symlink_to("a.jpg")
    assert names("a.jpg", "b.jpg") == ["a.jpg", "b.jpg"]


def test_two_missing_files_are_both_told() -> None:
    assert [problem(source)[:5] for source in expand(["x.jpg", "y.jpg", "x.jpg"])] == ["x.jpg", "y.jpg"]


@pytest.mark.parametrize("name", ["two\nlines.jpg", "esc\x1b[2J.jpg", "кошка 猫.jpg", "-dash.jpg", " .jpg", "%s{}.jpg"])
def test_strange_names_are_read_and_shown_in_one_printable_line(name: str) -> None:
    make(name)
    (source,) = expand([name])
    assert source.read().shape == (2, 3, 3)
    assert source.path == Path(name)
    assert source.name.isprintable()


def test_a_name_that_is_not_utf8_is_read_and_can_be_printed() -> None:
    raw = b"caf\xe9.jpg"
    Path(os.fsdecode(raw)).write_bytes(PNG)
    for arguments in ([os.fsdecode(raw)], ["."], ["*.jpg"]):
        (source,) = expand(arguments)
        assert source.read().shape == (2, 3, 3)
        assert source.name.encode() == rb"caf\udce9.jpg"


def test_a_name_too_long_for_a_file_is_a_problem_of_its_own() -> None:
    (source,) = expand(["x" * 5000])
    assert "File name too long" in problem(source)


def test_an_empty_argument_is_a_problem_of_its_own() -> None:
    (source,) = expand([""])
    assert "an empty name" in problem(source)


def test_a_pipe_is_read_to_its_end() -> None:
    reader, writer = os.pipe()
    os.write(writer, PNG)
    os.close(writer)
    try:
        assert names(f"/dev/fd/{reader}") == [f"/dev/fd/{reader}"]
    finally:
        os.close(reader)


# ---- folders ----


def test_a_folder_stands_for_the_images_below_it_by_name() -> None:
    make("in/b/2.jpg", "in/b/1.JPEG", "in/a.png", "in/c.webp", "in/notes.txt", "in/b/deep/er/x.tiff")
    assert names("in") == ["in/a.png", "in/b/1.JPEG", "in/b/2.jpg", "in/b/deep/er/x.tiff", "in/c.webp"]
    assert names("in/") == names("in")


def test_every_known_suffix_is_found_in_either_case() -> None:
    make(*(f"in/x{suffix}" for suffix in IMAGE_SUFFIXES), *(f"in/y{s.upper()}" for s in IMAGE_SUFFIXES))
    assert len(names("in")) == 2 * len(IMAGE_SUFFIXES)


def test_hidden_files_and_folders_are_left_out_unless_named() -> None:
    make("in/.secret.jpg", "in/._a.jpg", "in/.trash/b.jpg", "in/a.jpg")
    assert names("in") == ["in/a.jpg"]
    assert names("in/.trash") == ["in/.trash/b.jpg"]


def test_the_current_folder_needs_no_prefix() -> None:
    make("a.jpg", "in/b.jpg")
    assert names(".") == ["a.jpg", "in/b.jpg"]


def test_an_image_behind_a_link_to_itself_is_told_of(tmp_path: Path) -> None:
    (tmp_path / "round").symlink_to("round")
    (source,) = expand([str(tmp_path / "round" / "cat.jpg")])
    with pytest.raises(InputError, match=r"round/cat\.jpg"):
        source.read()


def test_linked_folders_are_followed_and_loops_end() -> None:
    make("real/a.jpg", "in/b.jpg")
    Path("in/away").symlink_to(Path("real").absolute())
    Path("in/back").symlink_to(Path("in").absolute())
    Path("in/back2").symlink_to("..")
    Path("in/self").symlink_to("self")
    assert names("in") == ["in/away/a.jpg", "in/b.jpg"]


def test_a_broken_link_in_a_folder_is_told() -> None:
    make("in/a.jpg")
    Path("in/b.jpg").symlink_to("gone")
    good, broken = expand(["in"])
    assert good.name == "in/a.jpg"
    assert problem(broken) == "in/b.jpg does not exist: check the path"


def test_a_pipe_in_a_folder_is_not_waited_for() -> None:
    make("in/a.jpg")
    os.mkfifo("in/b.jpg")
    assert names("in") == ["in/a.jpg"]


def test_folders_deeper_than_the_stack_are_searched() -> None:
    make("/".join(["d"] * 300) + "/a.jpg")
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack()) + 200)
    try:
        assert len(expand(["d"])) == 1
        assert len(expand(["**/a.jpg"])) == 1
    finally:
        sys.setrecursionlimit(limit)


def test_a_folder_without_images_is_told_and_the_others_are_answered() -> None:
    make("a.jpg", "in/notes.txt")
    empty, image = expand(["in", "a.jpg"])
    assert problem(empty) == "in has no pictures in it, but 1 .txt: name another folder"
    assert image.read().shape == (2, 3, 3)


def test_a_folder_does_not_count_itself_among_the_empty_ones() -> None:
    Path("in/below").mkdir(parents=True)
    around, below = expand(["in", "in/below"])
    assert problem(around) == "in has no pictures in it, but 1 empty folder: name another folder"
    assert problem(below) == "in/below has no pictures in it: name another folder"
    with pytest.raises(InputError, match=r"^in/below has no pictures in it: name another folder$"):
        calibration_folder(Path("in/below"))


def test_a_folder_that_cannot_be_searched_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    make("in/a.jpg", "in/locked/b.jpg", "in/z.jpg")
    listed = os.scandir

    def denying(path: Path) -> object:
        if path.name == "locked":  # Root, who may run the tests, is denied nothing.
            raise PermissionError(13, "Permission denied")
        return listed(path)

    monkeypatch.setattr(os, "scandir", denying)
    first, locked, last = expand(["in"])
    assert (first.name, last.name) == ("in/a.jpg", "in/z.jpg")
    assert problem(locked) == "in/locked cannot be searched (Permission denied): check its permissions"


def test_many_images_are_listed_unopened_in_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("in").mkdir()
    for number in range(2000):
        Path(f"in/{number:05}.jpg").touch()
    tracemalloc.start()
    sources = expand(["in"])
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert len(sources) == 2000
    assert held < 2000 * 1500
    assert "is empty" in problem(sources[0])


# ---- patterns ----


def test_a_pattern_stands_for_what_it_matches_by_name() -> None:
    make("in/b.jpg", "in/a.jpg", "in/c.png", "in/.d.jpg")
    assert names("in/*.jpg") == ["in/a.jpg", "in/b.jpg"]
    assert names("in/[bc].*") == ["in/b.jpg", "in/c.png"]
    assert names("i?/a.jpg") == ["in/a.jpg"]
    assert names("in/.*") == ["in/.d.jpg"]
    assert names(f"{Path.cwd()}/in/*.png") == [f"{Path.cwd()}/in/c.png"]
    assert names("in/../in/*.png") == ["in/../in/c.png"]


def test_two_stars_stand_for_any_folders() -> None:
    make("in/a.jpg", "in/z/f.jpg", "in/x/b.jpg", "in/x/y/c.jpg", "in/x/y/d.png", "in/.h/e.jpg")
    assert names("in/**/*.jpg") == ["in/a.jpg", "in/x/b.jpg", "in/x/y/c.jpg", "in/z/f.jpg"]
    assert names("in/**/y/*") == ["in/x/y/c.jpg", "in/x/y/d.png"]
    assert names("**/c.jpg") == ["in/x/y/c.jpg"]
    assert names("in/**") == names("in")


def test_a_pattern_may_match_folders() -> None:
    make("in/one/a.jpg", "in/one/notes.txt", "in/two/b.jpg", "in/three/notes.txt")
    assert names("in/*") == ["in/one/a.jpg", "in/two/b.jpg"]
    assert names("in/*/") == names("in/*")


def test_a_pattern_tries_a_matching_file_whatever_its_suffix() -> None:
    make("in/a.dat", "in/b.dat")
    assert names("in/*.dat") == ["in/a.dat", "in/b.dat"]


def test_loops_of_links_under_two_stars_end() -> None:
    make("in/a.jpg")
    Path("in/one").symlink_to(".")
    Path("in/two").symlink_to("..")
    assert names("in/**/*.jpg") == ["in/a.jpg"]


def test_a_file_whose_name_looks_like_a_pattern_is_taken_for_itself() -> None:
    make("img[1].jpg", "img1.jpg", "what?.jpg", "whatx.jpg", "**.jpg")
    assert names("img[1].jpg") == ["img[1].jpg"]
    assert names("what?.jpg") == ["what?.jpg"]
    assert names("**.jpg") == ["**.jpg"]
    Path("img[1].jpg").unlink()
    assert names("img[1].jpg") == ["img1.jpg"]


def test_a_folder_whose_name_looks_like_a_pattern_is_taken_for_itself() -> None:
    make("set[1]/a.jpg", "set1/b.jpg")
    assert names("set[1]") == ["set[1]/a.jpg"]


def test_a_pattern_that_matches_nothing_is_told() -> None:
    make("in/a.jpg")
    for pattern in ("in/*.png", "gone/*.jpg", "in/a.jpg/*", "**/z.jpg", "[", "in/x[1].jpg"):
        (source,) = expand([pattern])
        assert problem(source) == f"{pattern} matches no picture: check the pattern"


# ---- standard input ----


class Stdin(io.TextIOWrapper):
    def __init__(self, data: bytes, terminal: bool = False) -> None:
        self.held = io.BytesIO(data)
        super().__init__(self.held)
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


def test_a_dash_is_one_image_on_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", Stdin(PNG))
    assert names("-", "-") == ["standard input"]


def test_a_file_called_dash_can_still_be_named() -> None:
    make("-")
    (source,) = expand(["./-"])
    assert source.path == Path("-")
    assert source.read().shape == (2, 3, 3)


def test_standard_input_without_an_image_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for data, text in (
        (b"", "standard input is empty: send a picture to it"),
        (b"hello", "standard input is not a picture"),
    ):
        monkeypatch.setattr(sys, "stdin", Stdin(data))
        assert problem(expand(["-"])[0]).startswith(text)


def test_standard_input_is_read_no_further_than_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    stdin = Stdin(PNG + bytes(1000))
    monkeypatch.setattr(sys, "stdin", stdin)
    monkeypatch.setattr("mgq.data.image_sources.MAX_BYTES", len(PNG))
    expand(["-"])[0].read()
    assert stdin.held.tell() == len(PNG) + 1


def test_a_terminal_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", Stdin(b"", terminal=True))
    assert "is a terminal" in problem(expand(["-"])[0])
