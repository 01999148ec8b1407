"""Kept files of quantizers: found again where their folder is moved, timed in turns beside float in the same engine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.benchmarks.kept_files import FLOAT, Contender, Fed, Picture, Run, read_list, speed_of, take_turns, write_list


def test_a_folder_of_files_can_be_moved(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "kept", tmp_path / "source.onnx"
    folder.mkdir()
    contenders = [Contender(FLOAT, "OpenVINO", elsewhere), Contender("mgq", "native", folder / "mgq.onnx", True)]
    fed = Fed(np.full((1, 3, 2, 2), 200, np.uint8), np.full((1, 2, 2, 3), 0.5, np.float32))
    write_list(folder, contenders, fed)
    moved = folder.rename(tmp_path / "moved")
    found, picture = read_list(moved)
    assert [own.path for own in found] == [elsewhere, moved / "mgq.onnx"]
    assert [(own.quantizer, own.engine, own.takes_pixels) for own in found] == [
        (own.quantizer, own.engine, own.takes_pixels) for own in contenders
    ]
    assert [picture.to(own).dtype for own in found] == [np.float32, np.uint8]
    np.testing.assert_array_equal(picture.floats, fed.floats)


def test_a_ratio_is_the_middle_of_those_of_each_turn() -> None:
    assert speed_of([2.0, 1.0, 10.0], [4.0, 3.0, 10.0]).faster == pytest.approx(2)
    assert speed_of([2.0, 1.0, 10.0], None).faster is None


def test_all_have_as_many_turns_with_their_own_pictures() -> None:
    def keep(seen: list[float]) -> Run:
        def run(fed: Picture) -> Picture:
            seen.append(float(fed[0]))
            return fed

        return run

    seen: list[list[float]] = [[], []]
    pictures = [np.full(1, place, np.float32) for place in range(2)]
    taken = take_turns([keep(own) for own in seen], pictures, 0.01)
    assert len(taken[0]) == len(taken[1]) > 0
    assert [set(own) for own in seen] == [{0.0}, {1.0}]
