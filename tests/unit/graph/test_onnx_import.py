"""ONNX classifiers of other programs: imported, equal in float, int8 that engines run, one line for what cannot be."""

from __future__ import annotations

import importlib.util
import itertools
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

import mgq.engine.classifier.onnx_import as onnx_import
import mgq.graph.onnx_import.operators as operators
from mgq.cli.main import verbs
from mgq.data.transforms import to_batch
from mgq.engine.classifier.evaluate import evaluation_loader
from mgq.engine.classifier.import_wish import ImportWish
from mgq.engine.classifier.labelled_sets import evaluation_data
from mgq.engine.classifier.onnx_import import (
    find_float_input,
    find_int8_of,
    import_checkpoint,
    import_classifier,
    refuse_other_import,
    source_in,
)
from mgq.engine.classifier.open import Classifier, classifier_from, convert
from mgq.errors import FailureError, InputError
from mgq.ptq.calibrate import find_best_network
from mgq.ptq.equalization import equalize_channels
from mgq.ptq.presets import CalibrationConfig
from mgq.quantization.modes import Mode
from mgq.quantization.targets import ONNX
from mgq.zoo.input_contract import CONTRACTS
from mgq.zoo.weight_loading import read_weights
from tests.conftest import Mgq, slow, the_error
from tests.fakes.foreign_models import BODIES, CLASSES, Model, plain, write

RAW = ImportWish(preprocess="raw")
LIGHT = sorted((Path(onnx.__file__).parent / "backend/test/data/light").glob("*.onnx"))


def classifier_in(path: Path, wish: ImportWish = RAW) -> Classifier:
    return import_classifier(path, wish, "")[0]


def pixels(number: int = 4, height: int = 32, width: int = 32, seed: int = 0) -> npt.NDArray[np.uint8]:
    """Smooth made-up images, uint8 (N, 3, H, W)."""
    random = np.random.default_rng(seed)
    noise = random.integers(0, 256, (number, height, width, 3), np.uint8)
    crops = [np.asarray(cv2.GaussianBlur(image, (0, 0), 2), np.uint8) for image in noise]
    return np.clip((to_batch(crops).astype(np.float32) - 128) * 5 + 128, 0, 255).astype(np.uint8)


def answers_of(path: Path, fed: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return np.concatenate([session.run(None, {name: one[None]})[0] for one in fed])


def difference(found: npt.NDArray[Any], wanted: npt.NDArray[Any]) -> float:
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


@pytest.mark.parametrize("opset", [7, 22])
def test_the_oldest_and_the_newest_opset_are_imported(tmp_path: Path, opset: int) -> None:
    path = write(tmp_path / "model.onnx", "plain", opset)
    classifier, remarks = import_classifier(path, RAW, "")
    assert f"layers of opset {opset}, float answers as ONNX Runtime's" in remarks[0]
    assert classifier.logits(pixels()).shape == (4, CLASSES)


@pytest.mark.parametrize(
    ("rewritten", "as_it_is", "accepted"),
    [(2e-4, -2e-4, True), (2e-4, 2e-4, False), (2e-4, 3e-4, False), (5e-3, -5e-3, False), (5e-3, 0.0, True)],
)
def test_answers_need_not_be_nearer_than_onnx_runtimes_own(
    tmp_path: Path, rewritten: float, as_it_is: float, accepted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Deep networks make rounding errors grow: what ONNX Runtime rewrites then differs from the file as it is."""
    stock = onnx_import.reference

    def reference(*arguments: Any, **options: Any) -> dict[str, npt.NDArray[np.float32]]:
        off = as_it_is if options else rewritten
        exact = stock(*arguments, **options)
        return {name: values + np.float32(off * np.abs(values).max()) for name, values in exact.items()}

    monkeypatch.setattr(onnx_import, "reference", reference)
    path = write(tmp_path / "model.onnx")
    if accepted:
        assert import_classifier(path, RAW, "")
    else:
        with pytest.raises(FailureError, match="off from ONNX Runtime's") as refused:
            import_classifier(path, RAW, "")
        assert ("magnifies rounding" in str(refused.value)) == (abs(rewritten - as_it_is) > 1e-3)


@pytest.mark.parametrize("opset", [11, 17])
@pytest.mark.parametrize("body", BODIES)
def test_an_imported_network_answers_as_the_file_does(tmp_path: Path, body: str, opset: int) -> None:
    if body == "squeeze_and_excite" and opset < 14:
        pytest.skip("HardSwish came with opset 14")
    path = write(tmp_path / "model.onnx", body, opset)
    images = pixels()
    found = classifier_in(path).logits(images)
    # raw: RGB pixels as they are, which is what the file is fed here.
    wanted = answers_of(path, images[:, ::-1].astype(np.float32))
    assert difference(found, wanted) < 1e-4


@pytest.mark.parametrize("body", BODIES)
def test_int8_of_an_imported_network_answers_nearly_as_float(tmp_path: Path, body: str) -> None:
    classifier = classifier_in(write(tmp_path / "model.onnx", body))
    images = pixels(24)
    preset = CalibrationConfig("fast", target=ONNX).make_preset()
    found, _ = find_best_network(classifier.network, images, "model", "", preset, ONNX)
    assert found.best.snr > 15
    qat = classifier_with(classifier, found.network)
    int8 = convert(qat, Mode.QUANTIZED).logits(images)
    assert difference(int8, qat.logits(images)) < 0.1


def classifier_with(classifier: Classifier, network: Any) -> Classifier:
    from dataclasses import replace

    return replace(classifier, network=network, fake_quantized=network, mode=Mode.QAT)


@pytest.mark.parametrize("body", BODIES)
def test_equalization_leaves_the_answers_of_an_imported_network(tmp_path: Path, body: str) -> None:
    classifier = classifier_in(write(tmp_path / "model.onnx", body))
    images = pixels(8)
    network, factors = equalize_channels(classifier.network, images, ONNX)
    found = classifier_with(classifier, network).logits(images)
    assert difference(found, classifier.logits(images)) < 1e-4
    assert factors


def test_activations_that_are_spelled_out_become_one_layer(tmp_path: Path) -> None:
    classifier = classifier_in(write(tmp_path / "model.onnx", "old_swishes"))
    kinds = [plan.kind for plan in classifier.network.blueprint.layers]
    assert {"silu", "hard_swish", "gelu"} <= set(kinds)
    assert not {"affine", "erf", "sigmoid", "mul"} & set(kinds)


@pytest.mark.parametrize("pads", [[1, 1], [2, 0]])
def test_a_convolution_along_one_axis_is_imported(tmp_path: Path, pads: list[int]) -> None:
    """A gate of neighbouring channels, as ECA networks have it."""
    model = Model()
    stem = model.add("Relu", model.conv("image", 3, 8, pads=[1] * 4))
    mean = model.add("Reshape", model.add("GlobalAveragePool", stem), model.constant([0, 1, 8], np.int64))
    near = model.add("Conv", mean, model.weights(1, 1, 3), pads=pads)
    gate = model.add("Reshape", model.add("Sigmoid", near), model.constant([0, 8, 1, 1], np.int64))
    path = model.save(tmp_path / "model.onnx", model.classify(model.add("Mul", stem, gate), 8))
    assert "float answers as ONNX Runtime's" in import_classifier(path, RAW, "")[1][0]


def test_part_of_the_channels_is_averaged_for_several_images_at_once(tmp_path: Path) -> None:
    """MegEngine's pooling takes no view of a part of a batch."""
    model = Model()
    sides = [model.constant(v, np.int64) for v in ([2], [10], [1])]
    part = model.add("Slice", model.conv("image", 3, 12), *sides)
    path = model.save(tmp_path / "model.onnx", model.classify(part, 8))
    images = pixels(3)
    wanted = answers_of(path, images[:, ::-1].astype(np.float32))
    assert difference(classifier_in(path).logits(images), wanted) < 1e-4


def test_a_branch_whose_condition_is_known_is_taken(tmp_path: Path) -> None:
    """As PyTorch writes ``squeeze`` where it does not know the axes."""
    model = Model()
    mean = model.add("GlobalAveragePool", model.conv("image", 3, 8))
    axes = numpy_helper.from_array(np.array([0, 8], np.int64), "axes")
    flat = helper.make_graph(
        [helper.make_node("Reshape", [mean, "axes"], ["flat"])],
        "then",
        [],
        [helper.make_tensor_value_info("flat", TensorProto.FLOAT, None)],
        [axes],
    )
    whole = helper.make_graph(
        [helper.make_node("Identity", [mean], ["same"])],
        "else",
        [],
        [helper.make_tensor_value_info("same", TensorProto.FLOAT, None)],
    )
    is_one = model.add(
        "Equal", model.add("Gather", model.add("Shape", mean), model.constant(3, np.int64)), model.constant(1, np.int64)
    )
    features = model.add("If", is_one, then_branch=flat, else_branch=whole)
    output = model.add("Gemm", features, model.weights(CLASSES, 8), transB=1)
    assert (
        "float answers as ONNX Runtime's" in import_classifier(model.save(tmp_path / "m.onnx", output), RAW, "")[1][0]
    )


@pytest.mark.parametrize(("opset", "form"), [(15, {"outputs": 3, "training_mode": 1}), (12, {"outputs": 5})])
def test_weights_that_are_computed_by_a_norm_are_known(opset: int, form: dict[str, int], tmp_path: Path) -> None:
    """As timm standardizes them: by a batch norm of the weights."""
    model = Model(opset=opset)
    ones, zeros = (model.constant(np.full(8, value)) for value in (1, 0))
    weight = model.add("Reshape", model.weights(8, 3, 3, 3), model.constant([1, 8, 27], np.int64))
    normal = model.add("BatchNormalization", weight, ones, zeros, zeros, ones, **form)
    weight = model.add("Reshape", normal, model.constant([8, 3, 3, 3], np.int64))
    path = model.save(tmp_path / "model.onnx", model.classify(model.add("Conv", "image", weight), 8))
    assert "float answers as ONNX Runtime's" in import_classifier(path, RAW, "")[1][0]


def test_int8_of_a_file_is_that_of_the_same_import(tmp_path: Path) -> None:
    path, run = write(tmp_path / "model.onnx"), tmp_path / "model.calibration" / "checkpoint.safetensors"
    imported = import_checkpoint(path, tmp_path, RAW)
    assert find_int8_of(imported, tmp_path) is None
    run.parent.mkdir()
    shutil.copy(imported, run)
    assert find_int8_of(imported, tmp_path) == run
    assert find_int8_of(import_checkpoint(path, tmp_path, ImportWish(preprocess="tf")), tmp_path) is None


def test_a_softmax_at_the_end_is_left_out(tmp_path: Path) -> None:
    with_softmax, without = (write(tmp_path / f"{s}.onnx", softmax=s) for s in (True, False))
    images = pixels()
    assert np.allclose(classifier_in(with_softmax).logits(images), classifier_in(without).logits(images), atol=1e-5)


def with_one_more_output(model: Model, output: str, operator: str, name: str, **attributes: Any) -> Any:
    proto = model.proto(output)
    proto.graph.node.append(helper.make_node(operator, [output], [name], **attributes))
    kind = TensorProto.INT64 if operator == "ArgMax" else TensorProto.FLOAT
    proto.graph.output.insert(0, helper.make_tensor_value_info(name, kind, [None] * 2))
    return proto


@pytest.mark.parametrize("operator", ["Softmax", "ArgMax", "ZipMap"])
def test_what_other_outputs_are_told_from_is_the_answer(tmp_path: Path, operator: str) -> None:
    model = Model()
    output = model.classify(plain(model), 8)
    images, path = pixels(), model.save(tmp_path / "alone.onnx", output)
    is_map = operator == "ZipMap"
    attributes = {"domain": "ai.onnx.ml", "classlabels_int64s": list(range(CLASSES))} if is_map else {"axis": 1}
    proto = with_one_more_output(model, output, operator, "other", **attributes)
    several = tmp_path / "several.onnx"
    several.write_bytes(proto.SerializeToString())
    wanted = classifier_in(path).logits(images)
    assert (classifier_in(several).logits(images) == wanted).all()
    del proto.graph.output[1]
    several.write_bytes(proto.SerializeToString())
    assert np.allclose(classifier_in(several).logits(images), wanted, atol=1e-5)


def test_what_does_nothing_for_the_answer_is_not_imported(tmp_path: Path) -> None:
    model = Model()
    proto = model.proto(model.classify(plain(model), 8))
    proto.graph.node.append(helper.make_node("Hardmax", [proto.graph.node[3].output[0]], ["unread"]))
    proto.graph.initializer.append(numpy_helper.from_array(np.zeros(3, np.float16), "unread too"))
    proto.graph.input.append(helper.make_tensor_value_info("unread too", TensorProto.FLOAT16, [3]))  # as old files do
    path = tmp_path / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    assert "float answers as ONNX Runtime's" in import_classifier(path, RAW, "")[1][0]


def with_metadata(path: Path, **metadata: str) -> Path:
    proto = onnx.load(str(path))
    for key, value in metadata.items():
        proto.metadata_props.add(key=key, value=value)
    path.write_bytes(proto.SerializeToString())
    return path


@pytest.mark.parametrize(
    ("key", "write_names"),
    [
        ("names", lambda names: str(dict(enumerate(names)))),  # Ultralytics
        ("character", "\n".join),  # tools of Paddle's
        ("labels", json.dumps),
        ("id2label", lambda names: json.dumps({str(i): name for i, name in enumerate(names)})),
    ],
)
def test_names_of_classes_in_the_file_are_taken(
    tmp_path: Path, key: str, write_names: Callable[[list[str]], str]
) -> None:
    names = [f"kind {i}" for i in range(CLASSES)]
    path = with_metadata(write(tmp_path / "model.onnx"), **{key: write_names(names)})
    classifier, remarks = import_classifier(path, RAW, "")
    assert list(classifier.classes) == names
    assert f"those that the file has as '{key}' (kind 0, kind 1" in remarks[-1]
    labels = tmp_path / "labels.txt"
    labels.write_text("\n".join(f"own {i}" for i in range(CLASSES)))
    assert import_classifier(path, replace(RAW, labels=labels), "")[0].classes[0] == "own 0"


@pytest.mark.parametrize("said", ["", "3", "a\nb", "['a']", "{0: 'a'", "[" * 9999, "[[]]", "{'a': 1}", "x\n" * CLASSES])
def test_other_metadata_names_no_classes(tmp_path: Path, said: str) -> None:
    path = with_metadata(write(tmp_path / "model.onnx"), names=said)
    assert import_classifier(path, RAW, "")[0].classes[0] == "class 0"


def test_classifiers_of_ultralytics_are_fed_pixels_from_0_to_1(tmp_path: Path) -> None:
    path, images = with_metadata(write(tmp_path / "model.onnx"), author="Ultralytics"), pixels()
    classifier, remarks = import_classifier(path, ImportWish(), "")
    wanted = answers_of(path, (images[:, ::-1] / 255).astype(np.float32))
    assert difference(classifier.logits(images), wanted) < 1e-4
    assert remarks[1] == "input as Ultralytics (RGB, mean 0, 0, 0, std 255, 255, 255)"
    assert "raw (RGB" in import_classifier(path, RAW, "")[1][1]


def test_inputs_that_nothing_reads_are_left_out(tmp_path: Path) -> None:
    """Keras' EfficientNet has two such ones, which no node reads since they were folded."""
    model = Model()
    proto = model.proto(model.classify(plain(model), 8))
    proto.graph.input.insert(0, helper.make_tensor_value_info("folded", TensorProto.FLOAT, [1, 1, 1, 3]))
    path = tmp_path / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    assert "float answers as ONNX Runtime's" in import_classifier(path, RAW, "")[1][0]


@pytest.mark.parametrize("ends", ["float32", "halves"])
@pytest.mark.parametrize("kind", [TensorProto.FLOAT16, TensorProto.BFLOAT16])
def test_half_floats_are_taken_in_float32(tmp_path: Path, kind: int, ends: str) -> None:
    model, images = Model(), pixels()
    scale = model.add("Constant", value=numpy_helper.from_array(np.array(1.001, np.float32)))
    body = model.add("Mul", model.add("Cast", plain(model), to=TensorProto.FLOAT), scale)
    path, halved = model.save(tmp_path / "model.onnx", model.classify(body, 8)), tmp_path / "half.onnx"
    rounded, proto = onnx.load(str(path)), onnx.load(str(path))
    for one, inside in ((rounded, TensorProto.FLOAT), (proto, kind)):
        store_in_halves(one, kind, inside)
    rounded_path = tmp_path / "rounded.onnx"
    rounded_path.write_bytes(rounded.SerializeToString())
    if ends == "float32":
        cast_at_the_ends(proto, kind)
    else:
        for value in (*proto.graph.input, *proto.graph.output):
            value.type.tensor_type.elem_type = kind
    halved.write_bytes(proto.SerializeToString())
    classifier, remarks = import_classifier(halved, RAW, "")
    name = {TensorProto.FLOAT16: "float16", TensorProto.BFLOAT16: "bfloat16"}[kind]
    assert remarks[-1] == f"its numbers are {name}; they are taken, and compared, in float32"
    assert (classifier.logits(images) == classifier_in(rounded_path).logits(images)).all()


def store_in_halves(proto: Any, kind: int, inside: int) -> None:
    """Round all constants of ``proto`` to ``kind``, and say that it computes in the type ``inside``."""
    attributes = [attribute for node in proto.graph.node for attribute in node.attribute]
    for tensor in (*proto.graph.initializer, *(one.t for one in attributes if one.name == "value")):
        values = numpy_helper.to_array(tensor)
        half = helper.make_tensor(tensor.name, kind, values.shape, values.ravel())
        as_read = numpy_helper.to_array(half).astype(np.float32)
        tensor.CopyFrom(half if inside == kind else numpy_helper.from_array(as_read, tensor.name))
    for attribute in attributes:
        if attribute.name == "to":
            attribute.i = inside


def cast_at_the_ends(proto: Any, kind: int) -> None:
    """What is read and given is float32, as converters leave it."""
    source, answer = proto.graph.input[0].name, proto.graph.output[0].name
    for node in proto.graph.node:
        node.input[:] = ["halves" if name == source else name for name in node.input]
        node.output[:] = ["wide" if name == answer else name for name in node.output]
    proto.graph.node.insert(0, helper.make_node("Cast", [source], ["halves"], to=kind))
    proto.graph.node.append(helper.make_node("Cast", ["wide"], [answer], to=TensorProto.FLOAT))


@pytest.mark.parametrize("name", ["", "same", "two\nlines"])
def test_nodes_may_have_no_name_or_one_that_is_taken(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / "model.onnx")
    proto = onnx.load(str(path))
    for node in proto.graph.node:
        node.name = name
    path.write_bytes(proto.SerializeToString())
    assert "float answers as ONNX Runtime's" in import_classifier(path, RAW, "")[1][0]


@pytest.mark.parametrize("ending", ["score", "sigmoid", "squeezed"])
def test_one_number_is_the_score_of_the_second_of_two_classes(tmp_path: Path, ending: str) -> None:
    model = Model()
    mean = model.add("Flatten", model.add("GlobalAveragePool", model.conv("image", 3, 8)))
    score = model.add("Gemm", mean, model.weights(1, 8), model.constant([0.3]), transB=1)
    output = score if ending == "score" else model.add("Sigmoid", score)
    if ending == "squeezed":
        output = model.add("Squeeze", output, model.constant([1], np.int64))
    path, images = model.save(tmp_path / "model.onnx", output, rank=1 + (ending != "squeezed")), pixels()
    classifier = classifier_in(path)
    logits = classifier.logits(images)
    wanted = answers_of(path, images[:, ::-1].astype(np.float32)).ravel()
    found = logits[:, 1] - logits[:, 0]
    assert difference(found if ending == "score" else 1 / (1 + np.exp(-found)), wanted) < 1e-4
    assert len(classifier.classes) == 2
    assert [plan.kind for plan in classifier.network.blueprint.layers][-1] == "linear"
    assert sum(plan.kind == "conv" for plan in classifier.network.blueprint.layers) == 1


@pytest.mark.parametrize("axes", [[1], [1, 2], [2], [2, 3]])
def test_axes_of_one_beside_the_classes_are_left_out(tmp_path: Path, axes: list[int]) -> None:
    """As of networks with channels last that end in a convolution, or in one token."""
    model = Model()
    scores = model.classify(model.conv("image", 3, 8), 8)
    output = model.add("Unsqueeze", scores, model.constant(axes, np.int64))
    path, images = model.save(tmp_path / "model.onnx", output, rank=2 + len(axes)), pixels()
    wanted = answers_of(path, images[:, ::-1].astype(np.float32))
    found = classifier_in(path).logits(images)
    assert difference(found, wanted.reshape(found.shape)) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("path", LIGHT, ids=lambda path: path.stem)
def test_the_classifiers_in_the_package_of_onnx_are_imported(path: Path) -> None:
    classifier = classifier_in(path)  # which compares it with ONNX Runtime
    assert len(classifier.classes) == 1000


# ---- the input ----


def test_the_preprocessing_is_folded_into_the_first_layer(tmp_path: Path) -> None:
    model = Model()
    path = model.save(tmp_path / "model.onnx", model.classify(model.add("Relu", model.conv("image", 3, 8)), 8))
    images = pixels()
    rgb = images[:, ::-1].astype(np.float32)
    mean, std = (np.array(v).reshape(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    fed = {
        "torch": (rgb / 255 - mean) / std,
        "tf": rgb / 127.5 - 1,
        "caffe": images - np.array([103.939, 116.779, 123.68]).reshape(1, 3, 1, 1),
        "raw": rgb,
    }
    for name, batch in fed.items():
        found = classifier_in(path, ImportWish(preprocess=name)).logits(images)
        assert difference(found, answers_of(path, batch.astype(np.float32))) < 1e-4, name
    own = ImportWish(mean=(0.5,), std=(0.25,), order="bgr")
    wanted = answers_of(path, ((images / 255 - 0.5) / 0.25).astype(np.float32))
    assert difference(classifier_in(path, own).logits(images), wanted) < 1e-4


@pytest.mark.parametrize("preprocess", ["torch", "caffe", "raw", "tf"])
@pytest.mark.parametrize("padding", ["around", "behind", "by a Pad", "by both"])
def test_what_stands_around_a_image_is_the_colour_that_zero_was(tmp_path: Path, preprocess: str, padding: str) -> None:
    """All pixels are of that colour, so that a network cannot tell where the image ends."""
    model = Model()
    sides = {"around": [1, 1, 1, 1], "behind": [0, 0, 1, 1], "by a Pad": [0] * 4, "by both": [1, 1, 1, 1]}[padding]
    source = "image"
    if "Pad" in padding or "both" in padding:
        pads = model.constant([0, 0, 1, 0, 0, 0, 2, 1], np.int64)
        source = model.add("Pad", source, pads, model.constant(np.zeros(())))
    path = model.save(
        tmp_path / "model.onnx", model.classify(model.add("Relu", model.conv(source, 3, 8, pads=sides)), 8)
    )
    contract = CONTRACTS[preprocess]
    order = slice(None, None, -1) if contract.order == "rgb" else slice(None)
    colour = np.rint(np.array(contract.mean))[order].astype(np.uint8)
    images = np.broadcast_to(colour[:, None, None], (1, 3, 32, 32))
    fed = (images[:, order] - np.reshape(contract.mean, (1, 3, 1, 1))) / np.reshape(contract.std, (1, 3, 1, 1))
    wanted = answers_of(path, fed.astype(np.float32))
    found = classifier_in(path, ImportWish(preprocess=preprocess)).logits(images)
    # At most half a level is left, in terms of the deviation; with 128 around the image it was up to 24.
    assert np.abs(found - wanted).max() < 1 / min(contract.std)


def test_what_stands_around_a_image_is_black_where_zero_was(tmp_path: Path) -> None:
    path = write(tmp_path / "model.onnx")
    black = np.zeros((1, 3, 32, 32), np.uint8)
    # Zeros of float and pixels of 0 differ by float32's rounding of a large shift.
    assert difference(classifier_in(path).logits(black), answers_of(path, black.astype(np.float32))) < 1e-3


def test_grey_networks_see_the_grey_of_a_image(tmp_path: Path) -> None:
    model = Model(("N", 1, 32, 32))
    path = model.save(tmp_path / "model.onnx", model.classify(model.add("Relu", model.conv("image", 1, 8)), 8))
    grey = np.repeat(pixels(2)[:, :1], 3, axis=1)
    wanted = answers_of(path, grey[:, :1].astype(np.float32))
    assert difference(classifier_in(path).logits(grey), wanted) < 1e-4
    classifier, remarks = import_classifier(path, ImportWish(), "")
    assert remarks[1].startswith("input as torch (grey, mean 114.5, std 57.63)") and "(grey, " in classifier.origin


def test_channels_may_come_last(tmp_path: Path) -> None:
    model = Model(("N", 32, 32, 3))
    first = model.add("Transpose", "image", perm=[0, 3, 1, 2])
    path = model.save(tmp_path / "model.onnx", model.classify(model.add("Relu", model.conv(first, 3, 8)), 8))
    classifier = classifier_in(path)
    images = pixels()
    wanted = answers_of(path, np.ascontiguousarray(images[:, ::-1].transpose(0, 2, 3, 1), np.float32))
    assert difference(classifier.logits(images), wanted) < 1e-4
    assert not any(plan.kind == "transpose" for plan in classifier.network.blueprint.layers)


def test_axes_of_minus_one_are_open(tmp_path: Path) -> None:
    model = Model((-1, 3, -1, -1))  # as Paddle's exporter says it
    path = model.save(tmp_path / "model.onnx", model.classify(model.add("Relu", model.conv("image", 3, 8)), 8))
    with pytest.raises(InputError, match="--size 224"):
        classifier_in(path)
    classifier, _ = import_classifier(path, ImportWish(preprocess="raw", size=(16, 48)), "")
    assert classifier.logits(pixels(2, 16, 48)).shape == (2, CLASSES)
    assert find_float_input(classifier).shape == (None, 3, 16, 48)


def test_the_text_direction_classifier_of_rapidocr_is_imported() -> None:
    package = importlib.util.find_spec("rapidocr_onnxruntime")
    if package is None or package.origin is None:
        pytest.skip("the wheel of rapidocr_onnxruntime, which holds the file, is not installed")
    path = Path(package.origin).parent / "models" / "ch_ppocr_mobile_v2.0_cls_infer.onnx"
    classifier, remarks = import_classifier(path, ImportWish(preprocess="tf", order="bgr", size=(48, 192)), "")
    assert "float answers as ONNX Runtime's" in remarks[0]
    assert len(classifier.classes) == 2


def test_images_that_are_no_squares_are_resized_whole(tmp_path: Path) -> None:
    model = Model(("N", 3, 16, 48))
    path = model.save(tmp_path / "model.onnx", model.classify(model.add("Relu", model.conv("image", 3, 8)), 8))
    classifier = classifier_in(path)
    crop = classifier.crop(np.zeros((100, 200, 3), np.uint8))
    assert crop.shape == (16, 48, 3)
    assert classifier.logits(to_batch([crop])).shape == (1, CLASSES)


def test_images_that_are_no_squares_are_measured_whole(tmp_path: Path, mgq: Mgq) -> None:
    model = Model(("N", 3, 16, 48))
    path = model.save(tmp_path / "model.onnx", model.classify(model.add("Relu", model.conv("image", 3, 8)), 8))
    images = pixels(4, 16, 48)
    for part, kind in itertools.product(("train", "val"), range(CLASSES)):
        file = tmp_path / "photos" / part / f"kind{kind}" / "0.png"
        file.parent.mkdir(parents=True)
        cv2.imwrite(str(file), images[kind % 4].transpose(1, 2, 0))
    classifier = classifier_in(path)
    named = replace(classifier, classes=tuple(f"kind{kind}" for kind in range(CLASSES)))
    (batch,) = evaluation_loader(named, evaluation_data(tmp_path / "photos", {}, 16), CLASSES)
    assert (batch.images == images[np.arange(CLASSES) % 4]).all()
    said = mgq("calibrate", "-c", path, "-d", tmp_path / "photos", "--preprocess", "raw", "--quality", "fast")
    assert said.code == 0, said
    trained = mgq("qat", "-c", path, "-d", tmp_path / "photos", "--preprocess", "raw", "--epochs", "1")
    assert "trainings square ones" in the_error(trained)


# ---- names of classes ----


def test_class_names_come_from_a_file(tmp_path: Path) -> None:
    path = write(tmp_path / "model.onnx")
    names = [f"kind {i}" for i in range(CLASSES)]
    (tmp_path / "names.txt").write_text("\n".join(names))
    (tmp_path / "names.json").write_text(json.dumps({str(i): name for i, name in enumerate(names)}))
    (tmp_path / "notepad.txt").write_text("\n".join(names), encoding="utf-8-sig")
    for file in ("names.txt", "names.json", "notepad.txt"):
        assert classifier_in(path, ImportWish(labels=tmp_path / file)).classes == tuple(names)
    (tmp_path / "names.txt").write_text("only\ntwo")
    with pytest.raises(InputError, match="2 names for a network of 10 classes: give one for each"):
        classifier_in(path, ImportWish(labels=tmp_path / "names.txt"))
    (tmp_path / "names.txt").write_text("\n".join([*names[:-2], "crane", "crane"]))
    with pytest.raises(InputError, match="gives the name 'crane' to 2 classes: tell them apart, as in 'crane 1'"):
        classifier_in(path, ImportWish(labels=tmp_path / "names.txt"))


@pytest.mark.parametrize("said", ["nan,1,1", "inf", "1,,2", "a"])
def test_a_mean_of_no_numbers_is_refused(tmp_path: Path, mgq: Mgq, said: str) -> None:
    path = write(tmp_path / "model.onnx")
    refused = the_error(mgq("calibrate", "-c", path, "--data-free", "--mean", said, "--std", "1"))
    assert f"--mean '{said}' are no numbers" in refused


def test_the_background_comes_first_of_1001_classes(tmp_path: Path) -> None:
    model = Model()
    flat = model.add("Flatten", model.add("GlobalAveragePool", model.conv("image", 3, 8)))
    output = model.add("Gemm", flat, model.weights(1001, 8), model.constant(np.zeros(1001)), transB=1)
    classes = classifier_in(model.save(tmp_path / "model.onnx", output)).classes
    assert len(classes) == 1001
    assert classes[:2] == ("background", "tench")


# ---- kept ----


def test_a_checkpoint_of_an_imported_network_builds_it_again(tmp_path: Path) -> None:
    path = write(tmp_path / "model.onnx", "squeeze_and_excite")
    told: list[str] = []
    kept = import_checkpoint(path, tmp_path / "runs", RAW, told.append)
    images = pixels()
    again = classifier_from(read_weights(kept), Mode.NORMAL)
    assert (again.logits(images) == classifier_in(path).logits(images)).all()
    assert again.spec.name == "model"
    assert import_checkpoint(path, tmp_path / "runs", on_message=told.append) == kept
    assert told[-1].startswith("imported before")


def import_by_an_earlier_version(path: Path, runs: Path, monkeypatch: pytest.MonkeyPatch, **wish: Any) -> Path:
    with monkeypatch.context() as patch:
        patch.setattr(onnx_import, "VERSION", 1)
        return import_checkpoint(path, runs, ImportWish(**wish))


def test_an_import_of_an_earlier_version_is_made_again_with_its_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, told = write(tmp_path / "model.onnx", "squeeze_and_excite"), list[str]()
    labels = tmp_path / "names.txt"
    labels.write_text("\n".join(f"kind {i}" for i in range(CLASSES)))
    wish = {"preprocess": "tf", "order": "bgr", "labels": labels}
    kept = import_by_an_earlier_version(path, tmp_path / "runs", monkeypatch, **wish)
    (kept.parent / "notes.txt").write_text("mine")
    before = source_in(kept)
    assert import_checkpoint(path, tmp_path / "runs", on_message=told.append) == kept
    assert told[0].startswith("imported again: ") and "was made by an earlier version of mgq" in told[0]
    assert source_in(kept) == {**before, "importer": onnx_import.VERSION}
    assert classifier_from(read_weights(kept), Mode.NORMAL).classes[0] == "kind 0"
    assert (kept.parent / "notes.txt").read_text() == "mine"
    import_checkpoint(path, tmp_path / "runs", on_message=told.append)
    assert told[-1].startswith("imported before")


def test_an_import_of_an_earlier_version_stays_where_it_cannot_be_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, told = write(tmp_path / "model.onnx"), list[str]()
    labels = tmp_path / "names.txt"
    labels.write_text("\n".join(f"kind {i}" for i in range(CLASSES)))
    kept = import_by_an_earlier_version(path, tmp_path / "runs", monkeypatch, preprocess="tf", labels=labels)
    content = kept.read_bytes()
    labels.unlink()
    assert import_checkpoint(path, tmp_path / "runs", on_message=told.append) == kept
    assert kept.read_bytes() == content
    assert any("stays as an earlier version of mgq imported it: " in line and "names.txt" in line for line in told)
    assert told[-1].startswith("imported before")


def test_a_file_called_as_a_network_of_the_zoo_does_not_take_its_place(tmp_path: Path) -> None:
    assert classifier_in(write(tmp_path / "resnet18.onnx")).spec.name == "resnet18-onnx"


# ---- what is refused ----


def quantized(model: Model) -> Any:
    zero = model.constant(128, np.uint8)
    steps = model.add("QuantizeLinear", "image", model.constant(0.1), zero)
    back = model.add("DequantizeLinear", steps, model.constant(0.1), zero)
    return model.proto(model.classify(model.conv(back, 3, 8), 8))


def two_inputs(model: Model) -> Any:
    proto = model.proto(model.classify(model.conv(model.add("Add", "image", "other"), 3, 8), 8))
    proto.graph.input.append(helper.make_tensor_value_info("other", TensorProto.FLOAT, [1, 3, 32, 32]))
    return proto


def fused_by_a_tool(model: Model) -> Any:
    proto = model.proto(model.classify(model.conv("image", 3, 8), 8))
    proto.graph.node[0].op_type, proto.graph.node[0].domain = "FusedConv", "com.microsoft"
    return proto


def open_height(model: Model) -> Any:
    model.shape = ("N", 3, None, None)
    return model.proto(model.classify(model.conv("image", 3, 8), 8))


def open_height_alone(model: Model) -> Any:
    """``--size`` of another width than the file's."""
    model.shape = ("N", 3, None, 64)
    return model.proto(model.classify(model.conv("image", 3, 8), 8))


def detector(model: Model) -> Any:
    boxes = model.add("Reshape", model.conv("image", 3, 84), model.constant([0, 84, -1], np.int64))
    return model.proto(model.add("Transpose", boxes, perm=[0, 2, 1]), rank=3)


def two_outputs(model: Model) -> Any:
    first = model.conv("image", 3, 8)
    proto = model.proto(model.classify(first, 8))
    other = model.add("Gemm", model.add("Flatten", first), model.weights(3, 7200), transB=1)
    proto.graph.node.extend(model.nodes[-2:])
    proto.graph.initializer.append(model.constants[-1])
    proto.graph.output.append(helper.make_tensor_value_info(other, TensorProto.FLOAT, [None] * 2))
    return proto


def two_maps(model: Model) -> Any:
    """A detector's, at two scales."""
    first = model.conv("image", 3, 8)
    proto = model.proto(first, rank=4)
    proto.graph.output.append(
        helper.make_tensor_value_info(model.conv(first, 8, 8, strides=[2, 2]), TensorProto.FLOAT, [None] * 4)
    )
    proto.graph.node.append(model.nodes[-1])
    proto.graph.initializer.extend(model.constants[-2:])
    return proto


def untranslated(model: Model) -> Any:
    proto = model.proto(model.classify(model.conv("image", 3, 8), 8))
    proto.graph.node[0].op_type = "StatefulPartitionedCall"
    proto.graph.input.append(helper.make_tensor_value_info(proto.graph.node[0].input[1], TensorProto.FLOAT, [8] * 4))
    return proto


def recurrent(model: Model) -> Any:
    row = model.add("Transpose", model.conv(model.conv("image", 3, 8), 8, 8, 30), perm=[2, 0, 1, 3])
    row = model.add("Squeeze", row, model.constant([3], np.int64))
    parts = model.weights(1, 30, 8), model.weights(1, 30, 10)
    last = model.add("GRU", row, *parts, hidden_size=10)
    return model.proto(model.add("Flatten", last))


def many_at_once(model: Model) -> Any:
    """Each of the four pictures has an offset of its own."""
    model.shape = (4, 3, 32, 32)
    apart = model.add("Add", model.conv("image", 3, 8), model.weights(4, 8, 1, 1))
    return model.proto(model.classify(apart, 8))


def feature_map(model: Model) -> Any:
    return model.proto(model.conv("image", 3, 8), rank=4)


def token_model(model: Model) -> Any:
    model.shape = ("N", 128)
    return model.proto(model.add("MatMul", "image", model.weights(128, 10)))


def unknown_operator(model: Model) -> Any:
    first = model.conv("image", 3, 8)
    return model.proto(model.classify(model.add("Hardmax", first), 8))


def old_opset(model: Model) -> Any:
    proto = model.proto(model.classify(model.conv("image", 3, 8), 8))
    proto.opset_import[0].version = 6
    return proto


def keep_elsewhere(model: Model, place: str) -> Any:
    proto = model.proto(model.classify(model.conv("image", 3, 8), 8))
    tensor = proto.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=place)
    return proto


def outside(model: Model) -> Any:
    return keep_elsewhere(model, "../secret.bin")


def impossible_place(model: Model) -> Any:
    return keep_elsewhere(model, "model\0.bin")


def none_at_once(model: Model) -> Any:
    proto = model.proto(model.classify(model.conv("image", 3, 8), 8))
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 0
    return proto


def negative_variance(model: Model) -> Any:
    each = [model.constant(np.full(8, value)) for value in (1.0, 0.0, 0.0, -0.5)]
    return model.proto(model.classify(model.add("BatchNormalization", model.conv("image", 3, 8), *each), 8))


def not_numbers(model: Model) -> Any:
    weight = model.constant(np.full((8, 3, 3, 3), np.nan))
    return model.proto(model.classify(model.add("Conv", "image", weight), 8))


def infinite_weights(model: Model) -> Any:
    weight = np.zeros((8, 3, 3, 3))
    weight[0] = -np.inf
    return model.proto(model.classify(model.add("Conv", "image", model.constant(weight)), 8))


def overflowing(model: Model) -> Any:
    """Finite weights, with which answers are not."""
    first = model.conv("image", 3, 8)
    large = model.constant(np.full((8, 8, 1, 1), 3e38))
    return model.proto(model.classify(model.add("Conv", model.add("Conv", first, large), large), 8))


def out_of_order(model: Model) -> Any:
    proto = model.proto(model.classify(model.conv("image", 3, 8), 8))
    nodes = list(proto.graph.node)[::-1]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    return proto


def training_dropout(model: Model) -> Any:
    first = model.add("Dropout", model.conv("image", 3, 8), model.constant(0.5), model.constant(True, np.bool_))
    return model.proto(model.classify(first, 8))


def training_norm(model: Model) -> Any:
    each = [model.constant(np.ones(8)) for _ in range(4)]
    first = model.add("BatchNormalization", model.conv("image", 3, 8), *each, outputs=3, training_mode=1)
    return model.proto(model.classify(first, 8))


def without_shape(model: Model) -> Any:
    proto = model.proto(model.classify(model.conv("image", 3, 8), 8))
    proto.graph.input[0].type.tensor_type.ClearField("shape")
    return proto


def in_double(model: Model) -> Any:
    single = model.add("Cast", "image", to=TensorProto.FLOAT)
    return model.proto(model.classify(model.conv(single, 3, 8), 8), kind=TensorProto.DOUBLE)


def in_integers(model: Model) -> Any:
    single = model.add("Cast", "image", to=TensorProto.FLOAT)
    return model.proto(model.classify(model.conv(single, 3, 8), 8), kind=TensorProto.INT32)


REFUSED: dict[str, tuple[Callable[[Model], Any], str]] = {
    "quantized": (quantized, "quantized already"),
    "two inputs": (two_inputs, "has 2 inputs ('image', 'other')"),
    "untranslated": (untranslated, "has a StatefulPartitionedCall 'n0', which is no operator of ONNX"),
    "recurrent": (recurrent, "has a GRU 'n4' (opset 18), which is not imported"),
    "two maps": (two_maps, "none with one number for each class"),
    "other operators": (fused_by_a_tool, "give the file from before, or optimize it at the level basic"),
    "open height": (open_height, "--size"),
    "detector": (detector, "1x900x84"),
    "two outputs": (two_outputs, "has 2 outputs"),
    "four at once": (many_at_once, "takes 4 pictures at once"),
    "feature map": (feature_map, "1x8x30x30"),
    "tokens": (token_model, "not pictures"),
    "no shape": (without_shape, "does not say the shape of its input"),
    "float64": (in_double, "takes pictures as float64: export it for float32 or uint8 ones"),
    "int32": (in_integers, "takes pictures as int32"),
    "operator": (unknown_operator, "Hardmax 'n1' (opset 18)"),
    "opset": (old_opset, "opset 6"),
    "order": (out_of_order, "reads 't2_0', which no node before it makes"),
    "dropout": (training_dropout, "Dropout 'n1' (opset 18) that drops at random: export it in evaluation state"),
    "batch norm": (training_norm, "normalizes by the batch: export it in evaluation state"),
    "outside": (outside, "outside of its folder"),
    "impossible place": (impossible_place, "says nonsense of where"),
    "none at once": (none_at_once, "takes 0 pictures at once"),
    "negative variance": (negative_variance, "has a negative variance (-0.5)"),
    "infinite": (infinite_weights, "has a Conv 'n0' (opset 18) that computes with an infinite value: export it again"),
    "nan": (not_numbers, "NaN"),
    "overflow": (overflowing, "answers with numbers that are not finite"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_no_float_classifier_is_refused_in_one_line(tmp_path: Path, mgq: Mgq, what: str) -> None:
    make, said = REFUSED[what]
    path = tmp_path / "model.onnx"
    path.write_bytes(make(Model(opset=18)).SerializeToString())
    runs = tmp_path / "runs"
    assert said in the_error(mgq("calibrate", "-c", path, "--data-free", "-s", runs))
    assert not runs.exists()


def test_a_size_that_the_file_does_not_take_is_refused(tmp_path: Path, mgq: Mgq) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(open_height_alone(Model()).SerializeToString())
    assert "takes anyx64 pixels, not 32x32" in the_error(mgq("calibrate", "-c", path, "--data-free", "--size", "32"))


def test_a_file_that_is_cut_off_is_refused(tmp_path: Path, mgq: Mgq) -> None:
    path = write(tmp_path / "model.onnx")
    path.write_bytes(path.read_bytes()[:-700])
    assert "cut off" in the_error(mgq("calibrate", "-c", path, "--data-free"))


def test_a_file_of_more_than_2_gb_is_not_read(tmp_path: Path, mgq: Mgq) -> None:
    path = tmp_path / "model.onnx"
    with path.open("wb") as file:
        file.truncate(1 << 31)
    assert "larger than 2 GB" in the_error(mgq("calibrate", "-c", path, "--data-free"))


def test_data_in_a_file_of_its_folder_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "model.onnx")
    images = pixels()
    wanted = classifier_in(path).logits(images)
    options = {"save_as_external_data": True, "location": "model.data", "size_threshold": 0}
    onnx.save_model(onnx.load(str(path)), str(path), **options)
    assert (tmp_path / "model.data").is_file()
    assert (classifier_in(path).logits(images) == wanted).all()
    (tmp_path / "model.data").write_bytes(b"short")
    with pytest.raises(InputError, match="too short"):
        classifier_in(path)


def test_a_layer_that_answers_otherwise_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "model.onnx", "rare")
    monkeypatch.setitem(operators.READERS, "Tanh", operators.READERS["Sigmoid"])
    tanh = next(node for node in onnx.load(str(path)).graph.node if node.op_type == "Tanh")
    with pytest.raises(FailureError, match=f"its tensor '{tanh.output[0]}'"):
        classifier_in(path)


# ---- the command line ----


def test_calibrate_makes_an_int8_file_of_an_onnx_file(tmp_path: Path, mgq: Mgq) -> None:
    path = write(tmp_path / "model.onnx", "squeeze_and_excite")
    photos = tmp_path / "photos"
    photos.mkdir()
    for i, image in enumerate(pixels(12, 40, 40)):
        cv2.imwrite(str(photos / f"{i}.png"), image.transpose(1, 2, 0))
    shown = mgq("calibrate", photos, "-c", path, "--quality", "fast", "--preprocess", "raw")
    assert shown.code == 0, shown
    int8 = tmp_path / "runs" / "model.calibration" / "model.int8.onnx"
    assert f"int8 file: {int8.relative_to(tmp_path)}" in shown.out or "not done" in shown.err
    assert "input as raw" in shown.err
    session = onnxruntime.InferenceSession(str(int8), providers=["CPUExecutionProvider"])
    images = pixels(8, seed=3)
    found = session.run(None, {session.get_inputs()[0].name: images})[0]
    assert difference(found, answers_of(path, images[:, ::-1].astype(np.float32))) < 0.3
    told = mgq("infer", photos / "0.png", "-c", path, "-m", "normal")
    assert told.code == 0, told
    assert "imported before" in told.err


def test_a_float_dump_of_an_imported_network_is_onnx(tmp_path: Path, mgq: Mgq) -> None:
    path = write(tmp_path / "model.onnx")
    said = mgq("dump", "-c", path, "-m", "normal", "--check", "none")
    assert said.code == 0, said
    assert (tmp_path / "model.normal.onnx").is_file()


@pytest.mark.slow
def test_an_imported_network_is_trained_for_int8(tmp_path: Path, mgq: Mgq) -> None:
    path = write(tmp_path / "model.onnx", "squeeze_and_excite")
    for part in ("train", "val"):
        for number, image in enumerate(pixels(2 * CLASSES, 40, 40)):
            file = tmp_path / "data" / part / f"kind{number % CLASSES}" / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(file), image.transpose(1, 2, 0))
    said = mgq("qat", "-c", path, "-d", tmp_path / "data", "--epochs", "1")
    assert said.code == 0, said
    assert "trained with quantization" in said.out


TAKERS = ("calibrate", "qat", "eval", "analyze", "dump", "bench", "report", "infer")
"""The verbs that take an ONNX file of another program."""


@pytest.mark.parametrize("verb", TAKERS)
def test_each_verb_that_takes_a_foreign_file_takes_words_on_it(verb: str) -> None:
    flags = {flag for parameter in verbs()[verb].params for flag in (*parameter.opts, *parameter.secondary_opts)}
    assert {"--preprocess", "--mean", "--std", "--rgb", "--bgr", "--size", "--labels", "--scores"} <= flags


@pytest.mark.parametrize("verb", TAKERS)
def test_words_for_foreign_files_are_refused_for_others(mgq: Mgq, verb: str) -> None:
    assert "for ONNX files of others" in the_error(mgq(verb, "--preprocess", "tf"))


@pytest.mark.parametrize("verb", [slow(verb) if verb == "qat" else verb for verb in TAKERS])
def test_each_verb_imports_a_file_as_it_is_told_now(tmp_path: Path, mgq: Mgq, verb: str) -> None:
    path, runs = write(tmp_path / "model.onnx"), tmp_path / "runs"
    known = import_checkpoint(path, runs, ImportWish(preprocess="tf"))
    options = ["-m", "normal"] if verb in ("infer", "eval", "dump") else []
    said = mgq(verb, "-c", path, "-s", runs, "--preprocess", "caffe", *options)  # most want more, but import it first
    assert "input as caffe" in said.err, said
    assert source_in(known)["wish"]["preprocess"] == "caffe"


def test_infer_answers_as_the_file_was_fed(tmp_path: Path, mgq: Mgq) -> None:
    path, photo = write(tmp_path / "model.onnx"), tmp_path / "photo.png"
    image = pixels(1)
    cv2.imwrite(str(photo), image[0].transpose(1, 2, 0))
    (tmp_path / "names.txt").write_text("\n".join(f"kind{i}" for i in range(CLASSES)))
    wanted = answers_of(path, (image.astype(np.float32) - 100) / 50)[0]
    words = ["--mean", "100", "--std", "50", "--bgr", "--labels", "names.txt"]
    said = mgq("infer", photo, "-c", path, "-m", "normal", "--json", *words)
    found = json.loads(said.out)[0] if said.out.startswith("[") else json.loads(said.out)
    assert f"kind{int(wanted.argmax())}" in json.dumps(found), said


def test_bench_measures_no_int8_of_another_import(tmp_path: Path) -> None:
    path, runs = write(tmp_path / "model.onnx"), tmp_path / "runs"
    int8 = import_checkpoint(path, runs, ImportWish(preprocess="tf"))
    with pytest.raises(InputError, match=r"fed as tf .*fed as raw"):
        refuse_other_import(int8, classifier_in(path).options)
