"""ONNX classifiers with several outputs: which of them has the scores of classes, by what it looks like or by name."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
import pytest
from onnx import TensorProto, helper

from mgq.engine.classifier.import_wish import ImportWish
from mgq.engine.classifier.onnx_import import find_int8_of, import_checkpoint, import_classifier, refuse_other_import
from mgq.engine.classifier.open import Classifier
from mgq.errors import InputError
from tests.conftest import Mgq, the_error
from tests.fakes.foreign_models import CLASSES, Model, plain

Array = npt.NDArray[Any]
RAW = ImportWish(preprocess="raw")


def photos(number: int = 4) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (number, 3, 32, 32), np.uint8)


def classifier_in(path: Path, wish: ImportWish = RAW) -> Classifier:
    return import_classifier(path, wish, "")[0]


def difference(found: Array, wanted: Array) -> float:
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


def with_heads(path: Path, *heads: tuple[str, int], probabilities: str = "") -> Path:
    """A file with an output of so many numbers for each of ``heads``, of one linear layer each; features first."""
    model = Model()
    features = model.add("Flatten", model.add("GlobalAveragePool", plain(model)))
    proto, outputs = model.proto(features), {}
    for name, numbers in heads:
        outputs[name] = model.add("Gemm", features, model.weights(numbers, 8), transB=1)
    del proto.graph.output[:]
    for name, numbers in (("features", 8), *heads):
        source = outputs.get(name, features)
        operator = "Softmax" if name == probabilities else "Identity"
        model.nodes.append(helper.make_node(operator, [source], [name]))
        proto.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", numbers]))
    del proto.graph.node[:], proto.graph.initializer[:]
    proto.graph.node.extend(model.nodes)
    proto.graph.initializer.extend(model.constants)
    path.write_bytes(proto.SerializeToString())
    return path


def answer_named(path: Path, name: str, images: Array) -> Array:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found: Array = session.run([name], {"image": images.astype(np.float32)})[0]
    return found


@pytest.mark.parametrize(
    ("heads", "labels", "probabilities", "taken"),
    [
        ((("second", 6),), 0, "", "second"),  # features are what it is told from
        ((("first", 5), ("second", 6)), 6, "", "second"),  # as many as there are names
        ((("first", 5), ("second", 6)), 0, "second", "second"),
        ((("first", 5), ("class_scores", 6)), 0, "", "class_scores"),
        ((("embedding", 5), ("second", 6)), 0, "", "second"),
    ],
)
def test_of_several_outputs_that_of_classes_is_taken_and_said(
    tmp_path: Path, heads: tuple[tuple[str, int], ...], labels: int, probabilities: str, taken: str
) -> None:
    path, images = with_heads(tmp_path / "model.onnx", *heads, probabilities=probabilities), photos()
    names = tmp_path / "names.txt"
    names.write_text("\n".join(f"kind {i}" for i in range(labels)))
    classifier, remarks = import_classifier(path, replace(RAW, labels=names if labels else None), "")
    found, wanted = classifier.logits(images), answer_named(path, taken, images[:, ::-1])
    if taken == probabilities:
        found = np.exp(found) / np.exp(found).sum(axis=1, keepdims=True)
    assert difference(found, wanted) < 1e-4
    (said,) = (remark for remark in remarks if "--scores NAME" in remark)
    assert said.startswith(f"scores of classes: the output '{taken}' (6), not") and "'features' (8)" in said


def test_the_deepest_of_heads_of_one_width_is_taken(tmp_path: Path) -> None:
    """Inception has heads on its way."""
    model = Model()
    first = plain(model)
    early, late = model.classify(first, 8), model.classify(model.conv(first, 8, 8), 8)
    proto = model.proto(early)
    proto.graph.output.append(helper.make_tensor_value_info(late, TensorProto.FLOAT, ["N", CLASSES]))
    path, images = tmp_path / "model.onnx", photos()
    path.write_bytes(proto.SerializeToString())
    wanted = answer_named(path, late, images[:, ::-1])
    assert difference(classifier_in(path).logits(images), wanted) < 1e-4


def test_the_output_of_several_is_chosen_by_its_name(tmp_path: Path, mgq: Mgq) -> None:
    path, images = with_heads(tmp_path / "model.onnx", ("age", 5), ("kind", 6)), photos()
    assert "'features' (8), 'age' (5), 'kind' (6): say which has a score for each class, such as --scores age" in (
        the_error(mgq("calibrate", "-c", path, "--data-free"))
    )
    assert "has no output 'sort'" in the_error(mgq("infer", "-c", path, "-m", "normal", "--scores", "sort"))
    for name in ("age", "kind", "features"):
        found = classifier_in(path, replace(RAW, scores=name)).logits(images)
        assert difference(found, answer_named(path, name, images[:, ::-1])) < 1e-4


def test_int8_of_another_output_is_not_taken(tmp_path: Path) -> None:
    path, run = with_heads(tmp_path / "model.onnx", ("age", 6), ("kind", 6)), tmp_path / "model.calibration"
    imported = import_checkpoint(path, tmp_path, replace(RAW, scores="age"))
    run.mkdir()
    shutil.copy(imported, run / "checkpoint.safetensors")
    assert find_int8_of(imported, tmp_path) == run / "checkpoint.safetensors"
    assert find_int8_of(import_checkpoint(path, tmp_path, replace(RAW, scores="kind")), tmp_path) is None
    with pytest.raises(InputError, match=r"output age, .*output kind"):
        refuse_other_import(run / "checkpoint.safetensors", classifier_in(path, replace(RAW, scores="kind")).options)


def test_scores_are_taken_where_the_outputs_are_the_highest_ones(tmp_path: Path) -> None:
    model = Model()
    output, images = model.classify(plain(model), 8), photos()
    wanted = classifier_in(model.save(tmp_path / "alone.onnx", output)).logits(images)
    highest = model.add("TopK", output, model.constant([3], np.int64), outputs=2)
    path = model.save(tmp_path / "model.onnx", highest)
    assert np.allclose(classifier_in(path).logits(images), wanted, atol=1e-5)
