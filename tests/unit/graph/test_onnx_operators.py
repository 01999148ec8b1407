"""Operators that are spelled out, compare, choose, or make one number of several: equal in float, and run in int8."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from onnx import numpy_helper

from mgq.engine.classifier.import_wish import ImportWish
from mgq.engine.classifier.onnx_import import import_classifier
from mgq.errors import InputError
from mgq.weights.finite_values import unsound
from mgq.zoo.network_state import state_of
from tests.fakes.foreign_int8 import check_import, color_noise
from tests.fakes.foreign_models import Model

Array = npt.NDArray[Any]
Body = Callable[[Model], str]
RAW = ImportWish(preprocess="raw")


def first(model: Model) -> str:
    """Of numbers from about -3 to 3."""
    scaled = model.add("Mul", "image", model.constant(0.01))
    return model.conv(scaled, 3, 8, pads=[1] * 4, strides=[2, 2])


def positive(model: Model) -> str:
    return model.add("Add", model.add("Relu", first(model)), model.constant(0.5))


def integers(model: Model, *values: int) -> str:
    return model.constant(values, np.int64)


def scores(model: Model) -> str:
    return model.classify(first(model), 8)


# ---- in the middle ----


def logarithms(model: Model) -> str:
    return model.add("Log", positive(model))


def thresholds(model: Model) -> str:
    kept = model.add("ThresholdedRelu", first(model), alpha=0.4)
    soft = model.add("Shrink", kept, lambd=0.1, bias=0.1)
    return model.add("Add", soft, model.add("Shrink", first(model), lambd=0.2, bias=0.05))


def extremes(model: Model) -> str:
    """Of three layers and two constants, one for each channel."""
    source, each = first(model), model.constant(np.linspace(-1, 0, 8).reshape(8, 1, 1))
    highest = model.add("Max", source, model.conv(source, 8, 8, 1), each, model.conv(source, 8, 8, 1))
    return model.add("Min", highest, model.constant(2.0), model.constant(3.0))


def averages(model: Model) -> str:
    source = first(model)
    total = model.add("Sum", source, model.constant(0.3), model.add("GlobalAveragePool", source))
    return model.add("Mean", total, model.conv(source, 8, 8, 1), model.constant(np.ones((1, 8, 1, 1))))


def masks(model: Model) -> str:
    """A leaky ReLU, spelled out; numbers between two; channels that a constant chooses; and guards against NaN."""
    source = first(model)
    above = model.add("Greater", source, model.constant(0.0))
    leaky = model.add("Where", above, source, model.add("Mul", source, model.constant(0.1)))
    inside = model.add(
        "And",
        model.add("GreaterOrEqual", leaky, model.constant(-0.1)),
        model.add("Not", model.add("Less", model.constant(0.9), leaky)),
    )
    middle = model.add("Where", inside, leaky, model.constant(0.2))
    even = model.constant((np.arange(8) % 2 == 0).reshape(8, 1, 1), np.bool_)
    chosen = model.add("Where", even, middle, model.conv(middle, 8, 8, 1))
    return model.add("Where", model.add("IsNaN", chosen), model.constant(0.0), chosen)


def masked_attention(model: Model) -> str:
    """Positions see those before them alone."""
    grid = model.add("Reshape", first(model), integers(model, 0, 8, 256))
    tokens = model.add("Transpose", grid, perm=[0, 2, 1])
    alike = model.add("MatMul", tokens, grid)
    before = model.constant(np.tri(256, dtype=bool), np.bool_)
    hidden = model.add("Where", before, alike, model.constant(-np.inf))
    found = model.add("MatMul", model.add("Softmax", hidden, axis=-1), tokens)
    return model.add("Reshape", model.add("Transpose", found, perm=[0, 2, 1]), integers(model, 0, 8, 16, 16))


def triangles(model: Model) -> str:
    return model.add("Trilu", model.add("Trilu", first(model), upper=0), integers(model, -2), upper=1)


def even_shares(model: Model) -> str:
    """As in a network that was not trained: all of them fill their grid."""
    small = model.conv(model.add("Mul", "image", model.constant(1e-5)), 3, 8, pads=[1] * 4, strides=[2, 2])
    return model.add("Mul", model.add("Softmax", small, axis=3), model.add("Relu", first(model)))


def directions(model: Model) -> str:
    """As PyTorch's ``normalize`` writes them: the shortest vectors are a thousandth of the longest."""
    sizes = np.logspace(-3, 0, 256, dtype=np.float32).reshape(1, 1, 16, 16)
    scaled = model.add("Mul", first(model), model.constant(sizes))
    length = model.add("ReduceL2", scaled, axes=[1], keepdims=1)
    least = model.add("Clip", length, model.constant(1e-12))
    return model.add("Div", scaled, model.add("Expand", least, model.add("Shape", scaled)))


def lengths(model: Model) -> str:
    source = first(model)
    along = model.add("LpNormalization", source, axis=1)
    pooled = model.add("LpPool", along, kernel_shape=[3, 3], strides=[1, 1], pads=[1] * 4)
    whole = model.add("GlobalLpPool", source, p=3)
    shares = model.add("LpNormalization", whole, axis=1, p=1)
    return model.add("Add", pooled, model.add("Mul", source, shares))


def sums(model: Model) -> str:
    source = positive(model)
    kinds = ("ReduceMin", "ReduceL1", "ReduceSumSquare", "ReduceLogSum", "ReduceLogSumExp")
    return model.add("Add", source, model.add("Sum", *(model.add(kind, source, axes=[1]) for kind in kinds)))


def powers(model: Model) -> str:
    """By one number for each channel, of a constant, and of a layer."""
    source = positive(model)
    each = model.add("Pow", source, model.constant(np.linspace(0.5, 2, 8).reshape(8, 1, 1)))
    grown = model.add("Pow", model.constant(2.0), first(model))
    return model.add("Add", model.add("Pow", each, model.add("Sigmoid", first(model))), grown)


def rows(model: Model) -> str:
    """Windows of one axis, what stands around it, and what is cut off."""
    line = model.add("Reshape", first(model), integers(model, 0, 8, 256))
    wide = model.add("Pad", line, integers(model, 0, 0, 2, 0, 0, 2))
    pooled = model.add("MaxPool", wide, kernel_shape=[3], strides=[1], pads=[0, 1], outputs=2)
    mean = model.add("AveragePool", pooled, kernel_shape=[3], strides=[2], pads=[0, 1])
    cut = model.add("Pad", mean, integers(model, 0, 0, -1, 0, 0, 0))
    return model.add("Unsqueeze", cut, integers(model, 3))


def products(model: Model) -> str:
    """By weights from the left, by one matrix for each channel, and by a vector."""
    left = model.add("MatMul", model.weights(16, 16), first(model))
    each = model.add("MatMul", left, model.weights(8, 16, 16))
    return model.add("Unsqueeze", model.add("MatMul", each, model.weights(16)), integers(model, 3))


def waves(model: Model) -> str:
    source = first(model)
    waves = model.add("Add", model.add("Sin", source), model.add("Cos", model.add("Atan", source)))
    return model.add("Mul", model.add("Sign", source), waves)


def steps(model: Model) -> str:
    """Halves are rounded to the even number beside them."""
    halves = model.add(
        "Mul", model.add("Floor", model.add("Mul", first(model), model.constant(4.0))), model.constant(0.5)
    )
    return model.add("Add", model.add("Round", halves), model.add("Ceil", halves))


def truths(model: Model) -> str:
    source = model.add("Clip", first(model), model.constant(-0.5), model.constant(0.5))
    shrunk = model.add("Shrink", source, lambd=0.2)
    return model.add("Where", model.add("Cast", shrunk, to=9), source, model.conv(source, 8, 8, 1))


def running_sums(model: Model) -> str:
    down = model.add("CumSum", first(model), integers(model, 2))
    return model.add("CumSum", model.add("Mul", down, model.constant(0.1)), integers(model, -1), exclusive=1, reverse=1)


def neighbouring_channels(model: Model) -> str:
    """As PyTorch spells out the norm over neighbouring channels: an average over the first of three axes."""
    source = first(model)
    apart = model.add("Reshape", model.add("Mul", source, source), integers(model, 0, 1, 8, 16, 16))
    around = model.add("Pad", apart, integers(model, 0, 0, 2, 0, 0, 0, 0, 2, 0, 0))
    mean = model.add("AveragePool", around, kernel_shape=[5, 1, 1], strides=[1, 1, 1])
    return model.add("Mul", source, model.add("Reshape", mean, integers(model, 0, 8, 16, 16)))


def averages_beside_zeros(model: Model) -> str:
    """What stands around counts: ONNX Runtime 1.20 leaves it out when it rewrites this."""
    wide = model.add("Pad", first(model), integers(model, 0, 0, 2, 2, 0, 0, 2, 2))
    return model.add("AveragePool", wide, kernel_shape=[5, 5], strides=[1, 1])


def windows_that_hang_over(model: Model) -> str:
    """Also over the whole picture, as the heads of EfficientNet do in transformers."""
    count: dict[str, Any] = {"ceil_mode": 1, "count_include_pad": 1}
    part = model.add("AveragePool", first(model), kernel_shape=[5, 5], strides=[3, 3], **count)
    highest = model.add("MaxPool", part, kernel_shape=[40, 2], strides=[40, 2], ceil_mode=1)
    whole = model.add("AveragePool", first(model), kernel_shape=[640, 640], strides=[640, 640], **count)
    return model.add("Add", highest, whole)


def volumes(model: Model) -> str:
    """Convolved and pooled along two of three axes."""
    apart = model.add("Reshape", first(model), integers(model, 0, 2, 16, 16, 4))
    kernels, shift = model.weights(3, 2, 3, 3, 1), model.weights(3)
    convolved = model.add("Conv", apart, kernels, shift, kernel_shape=[3, 3, 1], pads=[1, 0, 0, 1, 1, 0])
    pooled = model.add("MaxPool", convolved, kernel_shape=[1, 2, 3], strides=[1, 2, 1], pads=[0, 1, 1, 0, 0, 1])
    return model.add("Reshape", pooled, integers(model, 0, 8, 12, 16))


def norm_of_tokens(model: Model) -> str:
    """As TensorFlow normalizes layers: by a batch norm whose channels are tokens."""
    apart = model.add("Reshape", first(model), integers(model, 1, -1, 16, 1))
    mean = model.add("ReduceMean", apart, axes=[0, 2, 3])
    less = model.add("Sub", apart, mean)
    spread = model.add("Div", model.add("ReduceSumSquare", less, axes=[0, 2, 3], keepdims=0), model.constant(16.0))
    centre = model.add("Squeeze", mean, integers(model, 0, 2, 3))
    tokens = model.add("Gather", model.add("Shape", apart), integers(model, 1))
    ones = model.add("ConstantOfShape", tokens, value=numpy_helper.from_array(np.ones(1, np.float32)))
    zeros = model.add("ConstantOfShape", tokens)
    normal = model.add("BatchNormalization", apart, ones, zeros, centre, spread, epsilon=1e-3)
    return model.add("Mul", model.add("Reshape", normal, integers(model, -1, 8, 16, 16)), model.weights(16))


def transposed_convolutions(model: Model) -> str:
    """In groups, with gaps and uneven sides, larger than they reach, and of a size that is named."""
    kernels, shift = model.weights(8, 4, 3, 2), model.weights(8)
    sides: dict[str, Any] = {"pads": [1, 0, 2, 1], "output_padding": [1, 0]}
    how: dict[str, Any] = {"group": 2, "strides": [2, 3], "dilations": [2, 1], **sides}
    apart = model.add("ConvTranspose", first(model), kernels, shift, **how)
    same = model.add("ConvTranspose", apart, model.weights(8, 8, 3, 3), auto_pad="SAME_UPPER", strides=[1, 2])
    small = model.add("AveragePool", same, kernel_shape=[3, 6], strides=[3, 6])
    return model.add("ConvTranspose", small, model.weights(8, 8, 1, 1), strides=[2, 2], output_shape=[20, 29])


def put_together(model: Model) -> str:
    """Parts of a picture side by side, and others that overlap, with gaps, and reach beyond it."""
    model.opset = 18
    small = model.add("Relu", model.conv("image", 3, 32, 3, strides=[2, 2], pads=[1] * 4))
    size, block = model.constant([32, 32], np.int64), model.constant([2, 2], np.int64)
    row = model.constant([0, 32, 256], np.int64)
    beside = model.add("Col2Im", model.add("Reshape", small, row), size, block, strides=[2, 2])
    block = model.constant([2, 3], np.int64)
    parts = model.add("Relu", model.conv(beside, 8, 48, 2, strides=[2, 2]))
    row = model.constant([0, 48, 256], np.int64)
    how: dict[str, Any] = {"strides": [2, 1], "dilations": [2, 1], "pads": [0, 0, 1, 0]}
    size = model.constant([33, 18], np.int64)
    return model.add("Col2Im", model.add("Reshape", parts, row), size, block, **how)


def tokens_beside_one(model: Model) -> str:
    """Constant tokens between one that is no constant and the others, as DINOv2 with registers has them."""
    tokens = model.add("Reshape", model.conv("image", 3, 8, 8, strides=[8, 8]), model.constant([0, 8, 16], np.int64))
    ends = [model.constant([end], np.int64) for end in (0, 1, 16)]
    axis = model.constant([2], np.int64)
    alone, others = (model.add("Slice", tokens, *ends[i : i + 2], axis) for i in range(2))
    batch = model.add("Gather", model.add("Shape", "image"), model.constant([0], np.int64))
    shape = model.add("Concat", batch, model.constant([8, 4], np.int64), axis=0)
    four = model.add("Expand", model.weights(1, 8, 4), shape)
    joined = model.add("Concat", alone, four, others, axis=2)
    return model.add("Reshape", joined, model.constant([0, 8, 4, 5], np.int64))


def picked_places(model: Model) -> str:
    """Places along two axes in front of pictures and channels, some counted from behind."""
    tokens = model.add("Transpose", first(model), perm=[2, 3, 0, 1])
    places = model.constant([[[0, 1], [3, -2]], [[15, 15], [3, 14]], [[-1, 0], [7, 7]]], np.int64)
    return model.add("Transpose", model.add("GatherND", tokens, places), perm=[2, 3, 0, 1])


def pairs_of_channels(model: Model) -> str:
    """Half of the products of 128 channels with each other, as pooling of the second order has them."""
    rows = model.add("Reshape", model.conv(first(model), 8, 128, 4, strides=[4, 4]), integers(model, 0, 128, 16))
    square = model.add("MatMul", rows, model.add("Transpose", rows, perm=[0, 2, 1]))
    flat = model.add("Reshape", square, integers(model, 0, 16384))
    places = np.flatnonzero(np.triu(np.ones((128, 128)))).tolist()
    half = model.add("Gather", flat, integers(model, *places), axis=1)
    return model.add("Reshape", half, integers(model, 0, 8, 8, 129))


def cast_as_others(model: Model) -> str:
    """Constants and layers in the kinds of others, as PyTorch's exporter has them in functions."""
    source = first(model)
    shift = model.add("CastLike", integers(model, 1), source)
    likewise = model.add("CastLike", model.add("Add", source, shift), model.constant(2.0))
    truth = model.add("CastLike", model.add("Relu", likewise), model.constant(True, np.bool_))
    return model.add("CastLike", model.add("Where", truth, likewise, source), source)


def joined_before_activation(model: Model) -> str:
    """As between the cells of NASNet; parts of parts; and such as are not on a grid."""
    one, other = (model.conv(first(model), 8, 8, 1) for _ in range(2))
    total = model.add("Add", one, other)
    joined = model.add("Relu", model.add("Concat", model.add("Concat", one, other, axis=1), total, axis=1))
    smooth = [model.add("Elu", model.conv(joined, 24, 8, 1)) for _ in range(2)]
    parts = [*smooth, model.add("Add", *smooth)]
    scaled = model.add("Mul", model.add("Concat", *parts, axis=1), model.constant(0.5))
    curved = [model.add("Erf", model.conv(scaled, 24, 4, 1)) for _ in range(2)]
    return model.add("Relu", model.add("Concat", *curved, axis=1))


def repeated_twice(model: Model) -> str:
    """Two tensors that are repeated along the same axis, as in TensorFlow's layer norm that was not trained."""
    source = first(model)
    middle = model.add("ReduceMean", source, axes=[1], keepdims=1)
    spread = model.add("ReduceL2", source, axes=[1], keepdims=1)
    scale = model.add("Mul", model.add("Reciprocal", spread), model.constant(np.ones((1, 8, 1, 1))))
    return model.add("Sub", model.add("Mul", source, scale), model.add("Mul", middle, scale))


BODIES: tuple[Body, ...] = (
    *(logarithms, thresholds, extremes, averages, masks, masked_attention, triangles, lengths, sums, powers, rows),
    *(
        products,
        waves,
        steps,
        truths,
        running_sums,
        neighbouring_channels,
        averages_beside_zeros,
        windows_that_hang_over,
        directions,
        even_shares,
    ),
    *(volumes, norm_of_tokens, transposed_convolutions, put_together, tokens_beside_one),
    *(picked_places, pairs_of_channels, cast_as_others, joined_before_activation, repeated_twice),
)


@pytest.mark.parametrize("body", BODIES)
def test_what_compares_chooses_and_sums_is_imported(tmp_path: Path, body: Body) -> None:
    model = Model()
    inner = model.add("Relu", model.conv(body(model), 8, 8, 1))
    check_import(model.save(tmp_path / "model.onnx", model.classify(inner, 8)), tmp_path)


def test_tables_that_are_expanded_to_what_they_are_already_are_no_larger_by_that(tmp_path: Path) -> None:
    """As those of places between 14 x 14 patches and as many others, in ConViT."""
    model = Model()
    table = model.add("Expand", model.constant(np.full((196, 196), 0.5)), integers(model, 1, 196, 196))
    shift = model.add("ReduceMean", table, axes=[0, 1, 2], keepdims=0)
    path = model.save(tmp_path / "model.onnx", model.classify(model.add("Add", first(model), shift), 8))
    assert "float answers as ONNX Runtime's" in import_classifier(path, RAW, "")[1][0]


@pytest.mark.parametrize("is_spelled_out", [False, True])
def test_what_a_mask_leaves_out_is_taken_away_by_finite_numbers(tmp_path: Path, is_spelled_out: bool) -> None:
    """So that the checkpoint of the import may be read again."""
    model = Model()
    grid = model.add("Reshape", first(model), integers(model, 0, 8, 256))
    tokens = model.add("Transpose", grid, perm=[0, 2, 1])
    seen = np.tri(256, dtype=bool)
    mask = model.constant(np.where(seen, 0, -np.inf))
    if is_spelled_out:
        mask = model.add("Where", model.constant(seen, np.bool_), model.constant(0.0), model.constant(-np.inf))
    alike = model.add("Add", model.add("MatMul", tokens, grid), mask)
    found = model.add("MatMul", model.add("Softmax", alike, axis=-1), tokens)
    whole = model.add("Reshape", model.add("Transpose", found, perm=[0, 2, 1]), integers(model, 0, 8, 16, 16))
    path = model.save(tmp_path / "model.onnx", model.classify(model.add("Relu", model.conv(whole, 8, 8, 1)), 8))
    network = import_classifier(path, RAW, "")[0].network
    assert unsound(state_of(network)) is None
    check_import(path, tmp_path)


@pytest.mark.parametrize("mode", ["linear", "cubic"])
@pytest.mark.parametrize("outside", [0, 1])
def test_a_picture_that_becomes_smaller_without_jags_is_imported(tmp_path: Path, mode: str, outside: int) -> None:
    model = Model(opset=18)
    sizes = integers(model, 1, 8, 7, 20)
    small = model.add("Resize", first(model), "", "", sizes, mode=mode, antialias=1, exclude_outside=outside)
    path = model.save(tmp_path / "model.onnx", model.classify(model.conv(small, 8, 8, 1), 8))
    assert "float answers as ONNX Runtime's" in import_classifier(path, RAW, "")[1][0]


def test_a_picture_is_resized_as_far_as_its_shape_allows(tmp_path: Path) -> None:
    for policy in ("not_larger", "not_smaller"):
        model = Model(opset=18)
        how: dict[str, Any] = {"mode": "linear", "axes": [2, 3], "keep_aspect_ratio_policy": policy}
        small = model.add("Resize", first(model), "", "", integers(model, 20, 23), **how)
        path = model.save(tmp_path / "model.onnx", model.classify(model.conv(small, 8, 8, 1), 8))
        assert "float answers as ONNX Runtime's" in import_classifier(path, RAW, "")[1][0]


def test_a_softmax_of_old_opsets_goes_over_all_axes_behind(tmp_path: Path) -> None:
    model = Model(opset=11)
    source = first(model)
    gate = model.add("Mul", model.add("Softmax", source, axis=2), model.constant(256.0))
    path = model.save(tmp_path / "model.onnx", model.classify(model.add("Mul", source, gate), 8))
    assert "float answers as ONNX Runtime's" in import_classifier(path, RAW, "")[1][0]


@pytest.mark.parametrize("places", [{"mode": "wrap"}, {"mode": "edge"}, {"mode": "reflect"}])
def test_rows_and_channels_are_repeated_around(tmp_path: Path, places: dict[str, Any]) -> None:
    model = Model(opset=19)
    wide = model.add("Pad", first(model), integers(model, 0, 1, 2, 1, 0, 2, 1, 0), **places)
    path = model.save(tmp_path / "model.onnx", model.classify(wide, 11))
    assert "float answers as ONNX Runtime's" in import_classifier(path, RAW, "")[1][0]


# ---- at the end ----


def log_of_softmax(model: Model, source: str) -> str:
    shifted = model.add("Add", model.add("Softmax", source, axis=1), model.constant(1e-7))
    return model.add("Log", model.add("Clip", shifted, model.constant(1e-7)))


def less_the_sum(model: Model, source: str) -> str:
    """As a log-softmax is spelled out, with the highest number taken away first."""
    less = model.add("Sub", source, model.add("ReduceMax", source, axes=[1]))
    total = model.add("ReduceSum", model.add("Exp", less), integers(model, 1))
    return model.add("Sub", less, model.add("Log", total))


def less_the_sum_in_one(model: Model, source: str) -> str:
    return model.add("Sub", source, model.add("ReduceLogSumExp", source, axes=[1]))


def shares(model: Model, source: str) -> str:
    """As a softmax is spelled out, in percent."""
    grown = model.add("Exp", model.add("Sub", source, model.add("ReduceMax", source, axes=[1])))
    share = model.add("Div", grown, model.add("ReduceSum", grown, integers(model, 1)))
    return model.add("Mul", share, model.constant(100.0))


def log_of_sigmoid(model: Model, source: str) -> str:
    return model.add("Log", model.add("Sigmoid", source))


@pytest.mark.parametrize(
    "end", [log_of_softmax, less_the_sum, less_the_sum_in_one, shares, log_of_sigmoid, lambda m, s: m.add("Hardmax", s)]
)
def test_probabilities_in_any_form_are_left_out_at_the_end(tmp_path: Path, end: Callable[[Model, str], str]) -> None:
    model = Model()
    path = model.save(tmp_path / "model.onnx", end(model, scores(model)))
    plain = Model()
    wanted = plain.save(tmp_path / "plain.onnx", scores(plain))
    images = color_noise()
    found, logits = (import_classifier(file, RAW, "")[0] for file in (path, wanted))
    assert len(found.network.blueprint.layers) == len(logits.network.blueprint.layers)
    assert np.abs(found.logits(images) - logits.logits(images)).max() < 1e-5


# ---- refused ----


def test_an_operator_that_is_not_imported_is_named(tmp_path: Path) -> None:
    model = Model()
    path = model.save(tmp_path / "model.onnx", model.classify(model.add("Tan", first(model)), 8))
    with pytest.raises(InputError, match=r"has a Tan 'n2' \(opset 17\), which is not imported"):
        import_classifier(path, RAW, "")
    model = Model()
    places = model.add("MaxPool", first(model), kernel_shape=[2, 2], outputs=2)
    wide = model.add("Cast", places.replace("_0", "_1"), to=1)
    path = model.save(tmp_path / "model.onnx", model.classify(model.add("Add", places, wide), 8))
    with pytest.raises(InputError, match=r"has a MaxPool 'n2' \(opset 17\) that tells places, too"):
        import_classifier(path, RAW, "")
