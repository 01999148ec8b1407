"""Lists of tensors, as scripted and early ``dynamo_export`` files have them: imported where the lists are known."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mgq.engine.classifier.import_wish import ImportWish
from mgq.engine.classifier.onnx_import import import_classifier
from mgq.errors import InputError
from tests.fakes.foreign_int8 import check_import
from tests.fakes.foreign_models import Model

Body = Callable[[Model, str], str]


def halves(model: Model, source: str) -> str:
    """Channels in two parts, which change places."""
    parts = model.add("SplitToSequence", source, model.constant(4, np.int64), axis=1)
    first, last = (model.add("SequenceAt", parts, model.constant(place, np.int64)) for place in (0, -1))
    return model.add("Concat", last, first, axis=1)


def uneven(model: Model, source: str) -> str:
    parts = model.add("SplitToSequence", source, model.constant([5, 3], np.int64), axis=1)
    return model.add("ConcatFromSequence", parts, axis=1)


def single(model: Model, source: str) -> str:
    """Channels apart without their axis, and stacked again."""
    parts = model.add("SplitToSequence", source, axis=1, keepdims=0)
    return model.add("ConcatFromSequence", parts, axis=1, new_axis=1)


def grown(model: Model, source: str) -> str:
    """A list that begins empty, as of DenseNet's features."""
    known = model.add("SequenceInsert", model.add("SequenceEmpty"), source)
    known = model.add("SequenceInsert", known, model.add("Relu", source), model.constant(0, np.int64))
    known = model.add("SequenceInsert", known, model.add("Neg", source))
    number = model.add("Cast", model.add("SequenceLength", known), to=1)
    known = model.add("SequenceErase", known, model.constant(1, np.int64))
    joined = model.conv(model.add("ConcatFromSequence", known, axis=1), 16, 8, 1)
    return model.add("Mul", joined, number)


def constructed(model: Model, source: str) -> str:
    both = model.add("SequenceConstruct", source, model.add("Relu", source))
    return model.conv(model.add("ConcatFromSequence", both, axis=-3), 16, 8, 1)


@pytest.mark.parametrize("body", [halves, uneven, single, grown, constructed])
@pytest.mark.parametrize("opset", [11, 17])
def test_lists_of_tensors_are_imported(tmp_path: Path, body: Body, opset: int) -> None:
    model = Model(opset=opset)
    scaled = model.add("Mul", "image", model.constant(0.01))
    listed = body(model, model.conv(scaled, 3, 8, pads=[1] * 4, strides=[2, 2]))
    check_import(model.save(tmp_path / "model.onnx", model.classify(model.conv(listed, 8, 8, 1), 8)), tmp_path)


def test_scores_in_a_list_are_the_answer(tmp_path: Path) -> None:
    model = Model()
    scores = model.classify(model.conv("image", 3, 8), 8)
    both = model.add("SequenceConstruct", model.add("Neg", scores), scores)
    path = model.save(tmp_path / "model.onnx", model.add("SequenceAt", both, model.constant(1, np.int64)))
    assert "float answers as ONNX Runtime's" in import_classifier(path, ImportWish(preprocess="raw"), "")[1][0]


def test_what_a_list_does_not_have_is_told(tmp_path: Path) -> None:
    model = Model()
    parts = model.add("SplitToSequence", model.conv("image", 3, 8), model.constant(4, np.int64), axis=1)
    other = model.add("SequenceAt", parts, model.constant(2, np.int64))
    path = model.save(tmp_path / "model.onnx", model.classify(other, 4))
    with pytest.raises(InputError, match=r"SequenceAt 'n\d' \(opset 17\) that takes a tensor that its list"):
        import_classifier(path, ImportWish(preprocess="raw"), "")
