"""Forms of ONNX files that exporters make now and then: pixels as input, several pictures at once, windows with gaps,
Einsum, pixels that are chosen or blended. Each is imported, equal in float, and runs in int8."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
import pytest
from onnx import TensorProto

from mgq.engine.classifier.dump import dump_classifier
from mgq.engine.classifier.import_wish import NO_WISH, ImportWish
from mgq.engine.classifier.onnx_import import import_classifier
from mgq.engine.classifier.open import Classifier
from mgq.errors import InputError
from mgq.export.onnx.float_input import FloatInput, float_input_in
from mgq.ptq.pipeline import snr_of
from mgq.runtime.registry import load
from tests.fakes.foreign_int8 import int8_of
from tests.fakes.foreign_models import Model, plain

Array = npt.NDArray[Any]
PIXELS = {"kind": TensorProto.UINT8}
RAW = ImportWish(preprocess="raw")
MEAN, STD = np.array([123.7, 116.3, 103.5]), np.array([58.4, 57.1, 57.4])
ENGINES = ("openvino", "onnxruntime")


def photos(number: int = 4, seed: int = 0) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (number, 3, 32, 32), np.uint8)


def answers_of(path: Path, fed: Array, at_once: int = 1) -> Array:
    """In ONNX Runtime as it is: some of its rewrites break what they change."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    (name,) = (entry.name for entry in session.get_inputs())
    parts = [fed[place : place + at_once] for place in range(0, len(fed), at_once)]
    return np.concatenate([session.run(None, {name: part})[0] for part in parts])


def difference(found: Array, wanted: Array) -> float:
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


def check_int8(path: Path, folder: Path, images: npt.NDArray[np.uint8], least: float = 15.0) -> Classifier:
    """Int8 of the file ``path`` is near to float in both engines."""
    int8 = int8_of(path, "raw")
    wanted = import_classifier(path, RAW, "")[0].logits(images).astype(np.float64)
    file = dump_classifier(int8, folder / "int8.onnx", batch=None).path
    for engine in ENGINES:
        assert snr_of(load(file, engine).run(images).astype(np.float64), wanted) > least, engine
    return int8


# ---- pixels as input ----


def divide(model: Model, source: str, axes: tuple[int, ...]) -> str:
    """As a preprocessing layer does it: mean and deviation of each channel."""
    shape = [-1 if axis == 1 else 1 for axis in axes]
    mean, std = (model.constant(part.reshape(shape)) for part in (MEAN, STD))
    return model.add("Div", model.add("Sub", model.add("Cast", source, to=TensorProto.FLOAT), mean), std)


def stem(model: Model, source: str) -> str:
    return model.add("Relu", model.conv(source, 3, 8, pads=[1] * 4, strides=[2, 2]))


def first_channels(model: Model) -> str:
    return stem(model, divide(model, "image", (0, 1, 0, 0)))


def last_channels(model: Model) -> str:
    model.shape = ("N", 32, 32, 3)
    return stem(model, model.add("Transpose", divide(model, "image", (0, 0, 0, 1)), perm=[0, 3, 1, 2]))


def moved_pixels(model: Model) -> str:
    """Pixels are moved as integers, and go through wider ones."""
    model.shape = (1, 32, 32, 3)
    wide = model.add("Cast", model.add("Transpose", "image", perm=[0, 3, 1, 2]), to=TensorProto.INT32)
    return stem(model, divide(model, wide, (0, 1, 0, 0)))


def norm_first(model: Model) -> str:
    """A batch norm is the preprocessing."""
    parts = (1 / STD * 50, np.zeros(3), MEAN, np.full(3, 2500.0))
    source = model.add("Cast", "image", to=TensorProto.FLOAT)
    return stem(model, model.add("BatchNormalization", source, *(model.constant(part) for part in parts), epsilon=1e-3))


PIXEL_FILES: dict[str, Callable[[Model], str]] = {
    "channels first": first_channels,
    "channels last": last_channels,
    "moved": moved_pixels,
    "norm": norm_first,
}


@pytest.fixture(params=PIXEL_FILES)
def pixel_file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    model = Model()
    return model.save(tmp_path / "model.onnx", model.classify(PIXEL_FILES[request.param](model), 8), **PIXELS)


def as_the_file(path: Path, images: npt.NDArray[np.uint8]) -> Array:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    rgb = images[:, ::-1]
    return np.ascontiguousarray(rgb.transpose(0, 2, 3, 1) if session.get_inputs()[0].shape[3] == 3 else rgb)


def test_a_file_that_takes_pixels_is_fed_pixels(pixel_file: Path, tmp_path: Path) -> None:
    classifier, remarks = import_classifier(pixel_file, NO_WISH, "")
    assert "float answers as ONNX Runtime's" in remarks[0]
    assert remarks[1] == "input as uint8 pixels (RGB); the file has mean and deviation inside"
    images = photos()
    # The mean around the picture is rounded to whole levels.
    wanted = answers_of(pixel_file, as_the_file(pixel_file, images))
    assert snr_of(classifier.logits(images).astype(np.float64), wanted.astype(np.float64)) > 50
    convolutions = [plan for plan in classifier.network.blueprint.layers if plan.kind == "conv"]
    assert len(convolutions) == 1, "mean and deviation are part of the first convolution"
    check_int8(pixel_file, tmp_path, images)


def test_an_int8_file_may_take_the_pixels_that_the_file_took(pixel_file: Path, tmp_path: Path) -> None:
    int8, images = int8_of(pixel_file, "raw"), photos()
    plain = dump_classifier(int8, tmp_path / "plain.onnx", batch=None).path
    kept = dump_classifier(int8, tmp_path / "kept.onnx", keep_input=True)
    assert "uint8 'image'" in kept.takes and "mean" not in kept.takes
    fed = as_the_file(pixel_file, images)
    session = onnxruntime.InferenceSession(str(kept.path), providers=["CPUExecutionProvider"])
    answers = np.concatenate([session.run(None, {"image": one[None]})[0] for one in fed])
    for engine in ENGINES:
        wanted = load(plain, engine).run(images)
        assert (np.concatenate([load(kept.path, engine).run(image[None]) for image in images]) == wanted).all()
        if engine == "onnxruntime":
            assert (answers == wanted).all()


@pytest.mark.parametrize("words", [{"preprocess": "tf"}, {"mean": (0.5,)}, {"std": (0.5,)}])
def test_preprocessing_of_a_file_that_has_it_inside_is_refused(tmp_path: Path, words: dict[str, Any]) -> None:
    model = Model()
    path = model.save(tmp_path / "model.onnx", model.classify(first_channels(model), 8), **PIXELS)
    with pytest.raises(InputError, match="takes uint8 pixels and has mean and deviation inside: leave --preprocess"):
        import_classifier(path, ImportWish(**words), "")
    rgb, bgr = (import_classifier(path, ImportWish(order=order), "")[0].logits(photos()) for order in ("rgb", "bgr"))
    assert difference(bgr, rgb) > 0.01


def test_blended_pixels_that_are_integers_are_refused(tmp_path: Path) -> None:
    model = Model()
    smaller = model.add("Resize", "image", "", model.constant([1, 1, 0.75, 0.75]), mode="linear")
    answer = model.classify(stem(model, divide(model, smaller, (0, 1, 0, 0))), 8)
    path = model.save(tmp_path / "model.onnx", answer, **PIXELS)
    with pytest.raises(
        InputError, match=r"Resize 'n0' \(opset 17\) that blends integers.*: cast pixels to float32 first"
    ):
        import_classifier(path, ImportWish(), "")


def test_numbers_of_a_float_file_are_not_turned_into_integers(tmp_path: Path) -> None:
    model = Model()
    whole = model.add("Cast", model.add("Cast", "image", to=TensorProto.INT32), to=TensorProto.FLOAT)
    path = model.save(tmp_path / "model.onnx", model.classify(stem(model, whole), 8))
    with pytest.raises(InputError, match="turns layers into integers"):
        import_classifier(path, NO_WISH, "")


def test_an_own_files_pixels_are_no_kept_input() -> None:
    kept = FloatInput("image", (None, 3, 32, 32), False, "rgb", (0.0,) * 3, (1.0,) * 3, "logits", "uint8")
    assert float_input_in({"input": kept.to_json()}) == kept
    assert float_input_in({"input": {"name": "pixels", "type": "uint8", "shape": [1, 3, 32, 32]}}) is None
    assert float_input_in({"input": {**kept.to_json(), "type": "int64"}}) is None


# ---- several pictures at once ----


def reshaped(model: Model) -> str:
    """As a static export writes reshapes, and a constant for each picture."""
    first = model.conv("image", 3, 8, pads=[1] * 4, strides=[4, 4])
    flat = model.add("Reshape", first, model.constant([4, 8, 64], np.int64))
    moved = model.add("Transpose", flat, perm=[0, 2, 1])
    same = np.repeat(model.random.standard_normal((1, 1, 8)), 4, 0)
    joined = model.add("Concat", model.constant(same), moved, axis=1)
    mean = model.add("ReduceMean", model.add("Softmax", joined, axis=2), axes=[1], keepdims=0)
    return model.add("Reshape", mean, model.constant([4, -1, 1, 1], np.int64))


def windows(model: Model) -> str:
    """Attention in windows of a picture, which lie along the axis of the pictures."""
    first = model.conv("image", 3, 8, pads=[1] * 4, strides=[4, 4])
    parts = model.add("Reshape", first, model.constant([4, 8, 2, 4, 2, 4], np.int64))
    moved = model.add("Transpose", parts, perm=[0, 2, 4, 3, 5, 1])
    tokens = model.add("Reshape", moved, model.constant([16, 16, 8], np.int64))
    scores = model.add("MatMul", tokens, model.add("Transpose", tokens, perm=[0, 2, 1]))
    mixed = model.add("MatMul", model.add("Softmax", scores, axis=-1), tokens)
    back = model.add("Reshape", mixed, model.constant([4, 2, 2, 4, 4, 8], np.int64))
    pixels = model.add("Transpose", back, perm=[0, 5, 1, 3, 2, 4])
    return model.add("Reshape", pixels, model.constant([4, 8, 8, 8], np.int64))


@pytest.mark.parametrize("body", [stem, reshaped, windows])
def test_a_file_of_several_pictures_at_once_is_imported_for_any_number(
    tmp_path: Path, body: Callable[..., str]
) -> None:
    model = Model((4, 3, 32, 32))
    source = body(model, "image") if body is stem else body(model)
    path = model.save(tmp_path / "model.onnx", model.classify(source, 8))
    classifier, remarks = import_classifier(path, RAW, "")
    assert remarks[2] == "it takes 4 pictures at once, and is imported for any number: its answers are the same"
    images = photos(8)
    wanted = answers_of(path, images[:, ::-1].astype(np.float32), at_once=4)
    assert difference(classifier.logits(images), wanted) < 1e-4
    assert difference(classifier.logits(images[:3]), wanted[:3]) < 1e-4
    int8 = check_int8(path, tmp_path, images)
    kept = dump_classifier(int8, tmp_path / "kept.onnx", keep_input=True)
    assert answers_of(kept.path, images[:, ::-1].astype(np.float32), at_once=4).shape == wanted.shape


def test_pictures_that_change_each_others_answers_are_refused(tmp_path: Path) -> None:
    model = Model((4, 3, 32, 32))
    mixed = model.add("Softmax", model.conv("image", 3, 8, pads=[1] * 4), axis=0)
    path = model.save(tmp_path / "model.onnx", model.classify(mixed, 8))
    with pytest.raises(InputError, match="takes 4 pictures at once: export it for one, or for any number"):
        import_classifier(path, RAW, "")


# ---- windows with gaps ----


@pytest.mark.parametrize(
    "how",
    [
        {"kernel_shape": [3, 3], "dilations": [2, 2]},
        {"kernel_shape": [2, 3], "dilations": [3, 1], "strides": [2, 1], "pads": [1, 0, 1, 1]},
        {"kernel_shape": [3, 3], "dilations": [2, 3], "strides": [3, 3], "pads": [1, 1, 1, 1], "ceil_mode": 1},
        {"kernel_shape": [8, 8], "dilations": [2, 2]},
    ],
)
def test_max_pooling_with_gaps_is_imported(tmp_path: Path, how: dict[str, Any]) -> None:
    model = Model()
    pooled = model.add("MaxPool", model.conv("image", 3, 8, strides=[2, 2], pads=[1] * 4), **how)
    path = model.save(tmp_path / "model.onnx", model.classify(model.add("Relu", model.conv(pooled, 8, 8, 1)), 8))
    images = photos()
    found = import_classifier(path, RAW, "")[0].logits(images)
    assert difference(found, answers_of(path, images[:, ::-1].astype(np.float32))) < 1e-4
    int8 = check_int8(path, tmp_path, images)
    with pytest.raises(InputError, match=r"with dilation|hangs over its border"):
        dump_classifier(int8, tmp_path / "net.so")


# ---- Einsum ----


def attend(model: Model, equations: tuple[str, str]) -> str:
    """Attention of 2 heads over 64 positions: (N, 2, 64, 4)."""
    first = model.add("Reshape", model.conv("image", 3, 8, pads=[1] * 4, strides=[4, 4]), shape_of(model, 1, 2, 4, 64))
    heads = model.add("Transpose", first, perm=[0, 1, 3, 2])
    scores = model.add("Einsum", heads, heads, equation=equations[0])
    mixed = model.add("Einsum", model.add("Softmax", scores, axis=-1), heads, equation=equations[1])
    return model.add("Reshape", model.add("Transpose", mixed, perm=[0, 1, 3, 2]), shape_of(model, 1, 8, 8, 8))


def shape_of(model: Model, *sizes: int) -> str:
    return model.constant([0, *sizes[1:]], np.int64)


@pytest.mark.parametrize(
    "equations",
    [
        ("n h i d, n h j d -> n h i j", "n h i j, n h j d -> n h i d"),
        ("...id,...jd->...ij", "...ij,...jd->...id"),
        ("...id,...jd", "...ij,...jd->...id"),
    ],
)
def test_attention_as_einsum_is_imported(tmp_path: Path, equations: tuple[str, str]) -> None:
    model = Model()
    path = model.save(tmp_path / "model.onnx", model.classify(attend(model, equations), 8))
    check_equal(path, tmp_path)


def check_equal(path: Path, folder: Path) -> None:
    images = photos()
    classifier, remarks = import_classifier(path, RAW, "")
    assert "float answers as ONNX Runtime's" in remarks[0]
    wanted = np.concatenate([answers_of(path, image[None, ::-1].astype(np.float32)) for image in images])
    assert difference(classifier.logits(images), wanted) < 1e-4
    check_int8(path, folder, images)


def outer(model: Model) -> str:
    """A product without a sum, in another order of axes, and a permutation."""
    first = model.add("Relu", model.conv("image", 3, 8, pads=[1] * 4, strides=[4, 4]))
    rows = model.add("ReduceMean", first, axes=[3], keepdims=0)
    columns = model.add("ReduceMean", first, axes=[2], keepdims=0)
    product = model.add("Einsum", rows, columns, equation="nch,ncw->nwch")
    return model.add("Einsum", product, equation="nwch->nchw")


def weigh(model: Model) -> str:
    """By weights of two axes each, as a key of several heads; the weights come first once."""
    first = model.add("Relu", model.conv("image", 3, 8, pads=[1] * 4, strides=[4, 4]))
    heads = model.add("Einsum", first, model.weights(8, 2, 3), equation="nchw,cdk->ndkhw")
    return model.add("Einsum", model.weights(2, 3, 8), heads, equation="dkc,ndkhw->nchw")


def weigh_each(model: Model) -> str:
    """By weights of each head, by a row that pictures share, and by weights of the sums along axes; the scores of what
    is known, too."""
    first = model.add("Relu", model.conv("image", 3, 8, pads=[1] * 4, strides=[4, 4]))
    heads = model.add("Reshape", first, model.constant([0, 2, 4, 64], np.int64))
    one = model.add("Einsum", model.weights(1, 2, 4), heads, equation="nhd,nhdi->nhi")
    each = model.add("Einsum", heads, model.weights(2, 4, 5), equation="nhdi,hdk->nhik")
    found = model.add("Einsum", each, model.add("Sigmoid", one), equation="nhik,nhi->nhk")
    known = model.add("Einsum", model.weights(2), model.weights(5), equation="h,k->hk")
    whole = model.add("Einsum", model.add("Add", found, known), model.weights(8, 2, 3), equation="nhk,chj->nc")
    sums = model.add("Einsum", first, equation="nchw->nc")
    wide = model.add("Reshape", model.add("Add", whole, sums), model.constant([0, 8, 1, 1], np.int64))
    return model.add("Mul", first, model.add("Sigmoid", model.conv(wide, 8, 8, 1)))


def windowed(model: Model) -> str:
    """The first axis is that of windows, not of pictures."""
    model.shape = (1, 3, 32, 32)
    first = model.add("Relu", model.conv("image", 3, 8, pads=[1] * 4, strides=[4, 4]))
    tokens = model.add("Reshape", first, model.constant([2, 4, 64], np.int64))
    scores = model.add("Softmax", model.add("Einsum", tokens, tokens, equation="bci,bcj->bij"), axis=-1)
    mixed = model.add("Einsum", scores, tokens, equation="bij,bcj->bci")
    return model.add("Reshape", mixed, model.constant([1, 8, 8, 8], np.int64))


def looked_up(model: Model) -> str:
    """Other places for each row, of a picture and of windows; and windows whose axes are told apart before they are one
    picture again, more of them than MegEngine has axes."""
    model.shape = (1, 3, 32, 32)
    first = model.add("Relu", model.conv("image", 3, 8, pads=[1] * 4, strides=[4, 4]))
    columns = model.constant((np.arange(512).reshape(1, 8, 8, 8) * 5) % 8, np.int64)
    mixed = model.add("GatherElements", first, columns, axis=3)
    tokens = model.add("Reshape", mixed, model.constant([2, 4, 64], np.int64))
    rows = model.constant(np.arange(512).reshape(2, 4, 64) % 4 - 4, np.int64)
    windows = model.add("GatherElements", tokens, rows, axis=1)
    apart = model.add("Reshape", windows, model.constant([1, 2, 2, 2, 4, 4, 4], np.int64))
    return model.add("Reshape", apart, model.constant([1, 8, 8, 8], np.int64))


@pytest.mark.parametrize("body", [outer, weigh, weigh_each, windowed, looked_up])
def test_other_products_and_places_are_imported(tmp_path: Path, body: Callable[[Model], str]) -> None:
    model = Model()
    path = model.save(tmp_path / "model.onnx", model.classify(body(model), 8))
    check_equal(path, tmp_path)


@pytest.mark.parametrize(
    ("equation", "why"),
    [
        ("nchh->nch", "takes the diagonal of a tensor"),
        ("nchw->nch", ""),
        ("nchw,nchw->nc", ""),
        ("nchw,nckw->nch", ""),
        ("nchw,nchw,nchw->nchw", "multiplies more than two tensors"),
    ],
)
def test_other_equations_are_refused_or_equal(tmp_path: Path, equation: str, why: str) -> None:
    model = Model()
    first = model.conv("image", 3, 8, pads=[1] * 4)
    result = model.add("Einsum", *[first] * (equation.count(",") + 1), equation=equation)
    rank = len(equation.split("->")[1])
    shape = model.constant([0, 8, -1] if rank > 2 else [0, 8, 1], np.int64)
    whole = model.add("Reshape", result, shape)
    path = model.save(tmp_path / "model.onnx", model.classify(model.add("Unsqueeze", whole, axis_of(model)), 8))
    if not why:
        check_equal(path, tmp_path)
        return
    with pytest.raises(InputError, match=rf"Einsum 'n1' \(opset 17\) that {why}, which is not imported"):
        import_classifier(path, RAW, "")


def axis_of(model: Model) -> str:
    return model.constant([3], np.int64)


# ---- pixels chosen or blended ----


def resize(model: Model, sizes: list[int], scales: list[float], **how: Any) -> str:
    first = model.add("Relu", model.conv("image", 3, 8, pads=[1] * 4, strides=[2, 3]))
    empty = model.constant(np.zeros(0, np.float32))
    given = [model.constant(scales, np.float32)] if scales else [empty, model.constant(sizes, np.int64)]
    made = model.add("Resize", first, empty if model.opset < 13 else "", *given, **how)
    return model.add("Relu", model.conv(made, 8, 8, 1))


COORDINATES = ["half_pixel", "pytorch_half_pixel", "asymmetric", "align_corners", "half_pixel_symmetric"]


@pytest.mark.parametrize("mode", ["nearest", "linear", "cubic"])
@pytest.mark.parametrize("where", COORDINATES)
def test_resizing_is_imported(tmp_path: Path, mode: str, where: str) -> None:
    given: list[tuple[list[int], list[float]]] = [([], [1, 1, 2, 1.5]), ([1, 8, 7, 23], [])]
    for number, scales in enumerate(given):
        model = Model(("N", 3, 32, 32) if scales[1] else (1, 3, 32, 32), opset=19)
        how: dict[str, Any] = {"mode": mode, "coordinate_transformation_mode": where}
        path = tmp_path / f"{number}.onnx"
        model.save(path, model.classify(resize(model, *scales, **how), 8))
        check_equal(path, tmp_path)


@pytest.mark.parametrize("rounding", ["round_prefer_floor", "round_prefer_ceil", "floor", "ceil"])
def test_the_pixel_is_chosen_as_the_file_says(tmp_path: Path, rounding: str) -> None:
    model = Model()
    how: dict[str, Any] = {"nearest_mode": rounding, "coordinate_transformation_mode": "half_pixel"}
    path = model.save(tmp_path / "model.onnx", model.classify(resize(model, [], [1, 1, 2, 2], **how), 8))
    check_equal(path, tmp_path)


@pytest.mark.parametrize("how", [{"cubic_coeff_a": -0.5, "exclude_outside": 1}, {"antialias": 1}])
def test_cubic_blending_is_as_sharp_as_the_file_says(tmp_path: Path, how: dict[str, Any]) -> None:
    model = Model(opset=18)
    path = tmp_path / "model.onnx"
    model.save(path, model.classify(resize(model, [], [1, 1, 1.5, 2], mode="cubic", **how), 8))
    check_equal(path, tmp_path)


@pytest.mark.parametrize("mode", ["nearest", "linear"])
def test_upsample_of_old_opsets_is_imported(tmp_path: Path, mode: str) -> None:
    model = Model(opset=9)
    first = model.add("Relu", model.conv("image", 3, 8, pads=[1] * 4, strides=[2, 2]))
    larger = model.add("Upsample", first, model.constant([1, 1, 2, 3], np.float32), mode=mode)
    path = model.save(tmp_path / "model.onnx", model.classify(model.add("Relu", model.conv(larger, 8, 8)), 8))
    check_equal(path, tmp_path)


# ---- windows of a picture, and what MegEngine does otherwise ----


def in_windows(model: Model, how: Callable[[Model, str], str]) -> str:
    """``how`` is done to each of 4 windows of 4x4 positions and 8 channels, which lie along the first axis."""
    model.shape = (1, 3, 32, 32)
    first = model.add("Relu", model.conv("image", 3, 8, pads=[1] * 4, strides=[4, 4]))
    parts = model.add("Reshape", first, model.constant([1, 8, 2, 4, 2, 4], np.int64))
    moved = model.add("Transpose", parts, perm=[0, 2, 4, 1, 3, 5])
    done = how(model, model.add("Reshape", moved, model.constant([4, 8, 4, 4], np.int64)))
    return model.add("Reshape", done, model.constant([1, 8, -1, 4], np.int64))


def linear_and_norm(model: Model, windows: str) -> str:
    """Batch norm of features, over positions of all windows at once."""
    tokens = model.add(
        "Reshape", model.add("Transpose", windows, perm=[0, 2, 3, 1]), model.constant([4, 16, 8], np.int64)
    )
    features = model.add("MatMul", tokens, model.weights(8, 8))
    return model.norm(model.add("Reshape", features, model.constant([64, 8], np.int64)), 8)


def pool(model: Model, windows: str) -> str:
    pooled = model.add("MaxPool", windows, kernel_shape=[2, 2], strides=[2, 2])
    more = model.add("AveragePool", windows, kernel_shape=[2, 2], strides=[2, 2])
    return model.add("Add", model.add("Add", pooled, more), model.add("GlobalAveragePool", windows))


IN_WINDOWS: dict[str, Callable[[Model, str], str]] = {
    "pointwise": lambda model, windows: model.norm(model.conv(windows, 8, 8, 1), 8),
    "padded": lambda model, windows: model.conv(windows, 8, 8, pads=[1] * 4),
    "depthwise": lambda model, windows: model.conv(windows, 8, 8, group=8, pads=[1] * 4, strides=[2, 2]),
    "pools": pool,
    "features": linear_and_norm,
}


@pytest.mark.parametrize("how", IN_WINDOWS)
def test_windows_of_a_picture_are_convolved_and_pooled_apart(tmp_path: Path, how: str) -> None:
    model = Model()
    body = in_windows(model, IN_WINDOWS[how])
    check_equal(model.save(tmp_path / "model.onnx", model.classify(body, 8)), tmp_path)


def test_a_norm_of_features_goes_into_the_linear_layer_before_it(tmp_path: Path) -> None:
    model = Model()
    body = in_windows(model, linear_and_norm)
    path = model.save(tmp_path / "model.onnx", model.classify(body, 8))
    kinds = [plan.kind for plan in import_classifier(path, RAW, "")[0].network.blueprint.layers]
    assert "affine" not in kinds and kinds.count("conv") == 2


@pytest.mark.parametrize("repeats", [[1, 1, 2, 3], [1, 2, 1, 1], [1, 1, 1, 1]])
def test_tiles_are_imported(tmp_path: Path, repeats: list[int]) -> None:
    model = Model()
    first = model.add("Relu", model.conv("image", 3, 8, pads=[1] * 4, strides=[4, 4]))
    tiled = model.add("Tile", first, model.constant(repeats, np.int64))
    body = model.add("Relu", model.conv(tiled, 8 * repeats[1], 8, pads=[1] * 4))
    check_equal(model.save(tmp_path / "model.onnx", model.classify(body, 8)), tmp_path)


def test_a_mean_is_repeated_for_each_window(tmp_path: Path) -> None:
    def add_mean(model: Model, windows: str) -> str:
        mean = model.add("ReduceMean", windows, axes=[0], keepdims=1)
        return model.add("Add", windows, model.add("Tile", mean, model.constant([4, 1, 1, 1], np.int64)))

    model = Model()
    body = in_windows(model, add_mean)
    check_equal(model.save(tmp_path / "model.onnx", model.classify(body, 8)), tmp_path)


@pytest.mark.parametrize("far", [-300.0, 300.0])
def test_a_softmax_of_numbers_far_from_zero_is_as_the_files(tmp_path: Path, far: float) -> None:
    """MegEngine's own is not a number where all are below -88."""
    model = Model()
    first = model.conv("image", 3, 8, pads=[1] * 4, strides=[4, 4])
    shares = model.add("Softmax", model.add("Add", model.norm(first, 8), model.constant(far)), axis=1)
    check_equal(model.save(tmp_path / "model.onnx", model.classify(model.add("Mul", first, shares), 8)), tmp_path)


def places_by_one_hot(model: Model) -> str:
    """As timm's gcvit repeats what it asks of each window: by a table of ones that is known."""
    depth, values = model.constant(8, np.int64), model.constant([0, 1])
    ones = model.add("OneHot", model.constant([3, 1, 0, 2, 5, 4, 7, 6], np.int64), depth, values)
    channels = model.add("Reshape", ones, model.constant([8, 8, 1, 1], np.int64))
    return model.add("Conv", model.conv("image", 3, 8), channels)


def resized_places(model: Model) -> str:
    """As vision transformers fit their embeddings of places to another size of pictures."""
    scales = model.constant([1, 1, 1.5, 1.5])
    places = model.add("Resize", model.weights(1, 8, 20, 20), "", scales, mode="cubic")
    return model.add("Add", model.conv("image", 3, 8), places)


@pytest.mark.parametrize("body", [places_by_one_hot, resized_places])
def test_what_is_made_of_constants_alone_is_known(tmp_path: Path, body: Callable[[Model], str]) -> None:
    model = Model()
    path = model.save(tmp_path / "model.onnx", model.classify(body(model), 8))
    assert "float answers as ONNX Runtime's" in import_classifier(path, RAW, "")[1][0]


def test_answers_are_those_of_the_file_and_not_of_a_rewrite_that_changes_them(tmp_path: Path) -> None:
    """ONNX Runtime 1.20 takes zeros around a picture for none where a max pool is behind them: timm's ResNetV2."""
    model = Model()
    below = model.add("Sub", model.conv("image", 3, 8), model.constant(9))
    around = model.add("Pad", below, model.constant([0, 0, 1, 1, 0, 0, 1, 1], np.int64))
    pooled = model.add("MaxPool", around, kernel_shape=[3, 3], strides=[2, 2])
    path, images = model.save(tmp_path / "model.onnx", model.classify(pooled, 8)), photos()
    found = import_classifier(path, ImportWish(preprocess="tf"), "")[0].logits(images)
    fed = (images[:, ::-1] / 127.5 - 1).astype(np.float32)
    assert difference(found, answers_of(path, fed)) < 1e-4


def test_a_length_is_repeated_for_each_number_of_a_window(tmp_path: Path) -> None:
    """As PyTorch normalizes what the attention of Swin v2 compares; windows lie along the axis of pictures."""
    model = Model()
    features = model.conv("image", 3, 8, pads=[1] * 4, strides=[2, 2])
    apart = model.add("Reshape", features, model.constant([-1, 8, 4, 4, 4, 4], np.int64))
    turned = model.add("Transpose", apart, perm=[0, 2, 4, 3, 5, 1])
    windows = model.add("Reshape", turned, model.constant([-1, 16, 8], np.int64))
    length = model.add("ReduceL2", windows, axes=[-1], keepdims=1)
    length = model.add("Expand", length, model.add("Shape", windows))
    normal = model.add("Div", windows, length)
    back = model.add("Reshape", normal, model.constant([-1, 256, 8], np.int64))
    mean = model.add("ReduceMean", back, axes=[1], keepdims=0)
    path = model.save(tmp_path / "model.onnx", model.add("MatMul", mean, model.weights(8, 10)))
    assert "float answers as ONNX Runtime's" in import_classifier(path, RAW, "")[1][0]


@pytest.mark.parametrize("operator", ["GlobalAveragePool", "GlobalMaxPool"])
def test_pools_over_one_axis_are_imported(tmp_path: Path, operator: str) -> None:
    """As Swin of transformers ends."""
    model = Model()
    tokens = model.add("Reshape", model.conv("image", 3, 8), model.constant([0, 8, -1], np.int64))
    pooled = model.add("Flatten", model.add(operator, tokens))
    path = model.save(tmp_path / "model.onnx", model.add("MatMul", pooled, model.weights(8, 10)))
    assert "float answers as ONNX Runtime's" in import_classifier(path, RAW, "")[1][0]


def test_one_matrix_is_multiplied_by_several(tmp_path: Path) -> None:
    """Keys that all heads share, as in MobileNetV5, and positions, as in lambda networks."""
    model, images = Model(), photos()
    grid = model.add("Reshape", plain(model), model.constant([0, 2, 4, 64], np.int64))
    first, second = (
        model.add("Slice", grid, *(model.constant(v, np.int64) for v in ([i], [i + 1], [1]))) for i in (0, 1)
    )
    several = model.add("MatMul", grid, model.add("Transpose", first, perm=[0, 1, 3, 2]))
    again = model.add("MatMul", model.add("Softmax", several, axis=-1), second)
    other = model.add("MatMul", model.add("Softmax", model.add("MatMul", second, model.weights(64, 4)), axis=-1), again)
    rows = model.add("Reshape", model.add("Add", again, other), model.constant([0, 8, 8, 8], np.int64))
    path = model.save(tmp_path / "model.onnx", model.classify(rows, 8))
    found = import_classifier(path, RAW, "")[0].logits(images)
    assert difference(found, answers_of(path, images[:, ::-1].astype(np.float32))) < 1e-4


def test_a_layer_made_larger_by_a_constant_and_a_spelled_sigmoid_are_imported(tmp_path: Path) -> None:
    """As JAX's exporter writes norms and swishes."""
    model = Model(opset=13)
    first = plain(model)
    grown = model.add("Exp", model.add("Neg", first))
    swish = model.add("Mul", first, model.add("Reciprocal", model.add("Add", model.constant(1.0), grown)))
    mean = model.add("ReduceMean", swish, axes=[1])
    larger = model.add("Mul", mean, model.constant(np.linspace(1, 2, 8).reshape(8, 1, 1)))
    path, images = model.save(tmp_path / "model.onnx", model.classify(model.add("Add", larger, swish), 8)), photos()
    classifier, _ = import_classifier(path, RAW, "")
    assert difference(classifier.logits(images), answers_of(path, images[:, ::-1].astype(np.float32))) < 1e-4
    kinds = {plan.kind for plan in classifier.network.blueprint.layers}
    assert "silu" in kinds and not {"exp", "reciprocal", "neg"} & kinds


def test_another_size_than_a_file_was_written_for_is_thought_of(tmp_path: Path) -> None:
    model = Model(("N", 3, "height", "width"))
    shape = model.constant([-1, 8, 256], np.int64)
    moved = model.add("Reshape", stem(model, "image"), shape)
    path = model.save(tmp_path / "model.onnx", model.add("ReduceMean", moved, axes=[2], keepdims=0))
    assert import_classifier(path, ImportWish(size=(32, 32)), "")[0].spec.image_size == 32
    with pytest.raises(InputError) as caught:
        import_classifier(path, ImportWish(size=(36, 36)), "")
    said = str(caught.value)
    assert said.endswith("; was it written for another --size than 36x36?")
    assert "/home" not in said
