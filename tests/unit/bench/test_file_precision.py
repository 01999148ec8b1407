"""What a deployed file is said to compute with."""

from __future__ import annotations

from pathlib import Path

import pytest

from mgq.bench.file_cases import cat_batch, find_batch, precision_of, read_stretched_size
from mgq.bench.settings import Precision
from mgq.engine.classifier.dump import dump_classifier
from mgq.engine.classifier.open import to_float
from mgq.errors import InputError
from tests.fakes.foreign_int8 import int8_of
from tests.fakes.foreign_models import Model, write


@pytest.mark.parametrize("keep_input", [False, True])
def test_a_float_file_that_takes_pixels_is_not_taken_for_int8(tmp_path: Path, keep_input: bool) -> None:
    int8 = int8_of(write(tmp_path / "model.onnx"), "torch")
    integers = dump_classifier(int8, tmp_path / "int8.onnx", keep_input=keep_input).path
    floats = dump_classifier(to_float(int8), tmp_path / "float.onnx", kind="onnx").path
    assert (precision_of(integers), precision_of(floats)) == (Precision.INT8, Precision.FP32)


def test_a_file_for_pictures_that_are_no_squares_is_fed_such(tmp_path: Path) -> None:
    model = Model(("N", 3, 16, 48))
    path = model.save(tmp_path / "model.onnx", model.classify(model.add("Relu", model.conv("image", 3, 8)), 8))
    int8 = int8_of(path, "torch")
    kept = dump_classifier(int8, tmp_path / "kept.onnx", keep_input=True).path
    for file in (kept, dump_classifier(int8, tmp_path / "int8.onnx").path):
        assert read_stretched_size(file) == (16, 48)
    assert cat_batch(2, 16, (16, 48)).shape == (2, 3, 16, 48)
    assert read_stretched_size(tmp_path / "library.so") is None


def test_files_are_measured_by_the_batch_that_they_take(tmp_path: Path) -> None:
    int8 = int8_of(write(tmp_path / "model.onnx"), "torch")
    three, free = (dump_classifier(int8, tmp_path / f"{batch}.onnx", batch=batch).path for batch in (3, None))
    assert find_batch([three, free], None) == find_batch([three, free], 3) == 3
    assert (find_batch([free], None), find_batch([free], 5)) == (1, 5)
    with pytest.raises(InputError, match=r"3\.onnx takes batches of 3: leave --batch out"):
        find_batch([free, three], 5)
    one = dump_classifier(int8, tmp_path / "1.onnx").path
    with pytest.raises(InputError, match="batches of 1 and 3"):
        find_batch([three, one], None)
