"""Exact rewrites of exported graphs: the file answers to the bit as without them, and only where they apply."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from mgq.bench import tune
from mgq.bench.statistics import Speedup
from mgq.bench.tune import Form, find_fastest, list_applicable, measure_forms
from mgq.engine.classifier.open import make_random_classifier
from mgq.export.onnx.writer import model_of, write_onnx
from mgq.graph.layer_graph import Convolution, GlobalAverage, Graph, QuantParams, Transpose, macs_of
from mgq.graph.network_reader import graph_of
from mgq.graph.rewrites import (
    REWRITES,
    merge_narrow_groups,
    stem_on_half_the_grid,
    to_blocks,
    to_dense,
    without_shuffles,
)
from mgq.quantization.activations import IDENTITY
from mgq.quantization.modes import Mode
from mgq.quantization.targets import MEGENGINE, ONNX, Target
from mgq.runtime.registry import BACKENDS
from tests.conftest import slow

SIZE = 64
SHUFFLENET = "shufflenet_v1_x0_5_g3"
OTHERS = [engine for engine in BACKENDS if engine.suffix == ".onnx" and engine.shows_layers]
PIXELS = np.random.default_rng(3).integers(0, 256, (2, 3, SIZE, SIZE), dtype=np.uint8)


def graph(arch: str, target: Target = ONNX, mode: Mode = Mode.QAT) -> Graph:
    return graph_of(make_random_classifier(arch, mode, image_size=SIZE, target=target).network, SIZE)


def convolutions(found: Graph) -> list[Any]:
    return [node for node in found.nodes if isinstance(node, Convolution)]


@pytest.mark.parametrize("target", [ONNX, MEGENGINE], ids=lambda target: target.name)
@pytest.mark.parametrize(
    ("arch", "rewrites"),
    [
        slow(SHUFFLENET, ("shuffles",)),
        slow(SHUFFLENET, ("stem",)),
        slow("resnet18", ("stem",)),
        slow("efficientnet_lite0", ("stem",)),
        (SHUFFLENET, ("shuffles", "stem")),
    ],
)
def test_int8_answers_are_the_same_to_the_bit(
    arch: str, rewrites: tuple[str, ...], target: Target, tmp_path: Path
) -> None:
    network = make_random_classifier(arch, Mode.QAT, image_size=SIZE, target=target).network
    logits = {}
    for name, used in (("plain", ()), ("rewritten", rewrites)):
        path = tmp_path / f"{name}.onnx"
        write_onnx(network, path, image_size=SIZE, batch=2, provenance={}, rewrites=used)
        for engine in OTHERS:
            logits[name, engine.name] = engine.load(path, 1).run(PIXELS)
    for engine in OTHERS:
        assert logits["plain", engine.name].std() > 0
        assert np.array_equal(logits["plain", engine.name], logits["rewritten", engine.name]), engine.name


def test_no_shuffle_is_left_and_the_products_that_count_are_the_same() -> None:
    before = graph(SHUFFLENET)
    after = without_shuffles(before)
    assert sum(isinstance(node, Transpose) for node in before.nodes) == 16
    assert not any(isinstance(node, Transpose) for node in after.nodes)
    nonzero = [sum(int(np.count_nonzero(one.integers)) for one in convolutions(found)) for found in (before, after)]
    assert nonzero[0] == nonzero[1]
    assert macs_of(after) > macs_of(before)


def test_only_shuffles_that_cost_little_are_folded_where_that_is_asked_for() -> None:
    before = graph(SHUFFLENET)
    left = [
        sum(isinstance(node, Transpose) for node in without_shuffles(before, most).nodes) for most in (0, 100, math.inf)
    ]
    assert left[0] == 15  # the first one is behind a dense convolution, which costs nothing
    assert left[0] > left[1] > left[2] == 0


def test_the_stem_runs_on_half_the_side() -> None:
    after = stem_on_half_the_grid(graph("resnet18"))
    stem = after.nodes[3]
    assert isinstance(stem, Convolution)
    assert stem.weight.shape == (64, 12, 4, 4) and stem.stride == (1, 1)
    assert (stem.padding, stem.padding_end) == ((2, 2), (1, 1))


@pytest.mark.parametrize(("arch", "name"), [("resnet18", "shuffles"), ("mobilenet_v2", "shuffles")])
def test_what_does_not_apply_leaves_the_graph_alone(arch: str, name: str) -> None:
    before = graph(arch)
    assert REWRITES[name](before) is before


def test_a_float_network_keeps_its_stem() -> None:
    before = graph("resnet18", mode=Mode.NORMAL)
    assert stem_on_half_the_grid(before) is before


def convolved(pixels: npt.NDArray[np.int64], weight: npt.NDArray[np.int64], stride: int) -> npt.NDArray[np.int64]:
    """(C, H, W) with weights (O, C, K, K), no padding."""
    size = weight.shape[2]
    places = range(0, pixels.shape[1] - size + 1, stride)
    found = [[np.tensordot(weight, pixels[:, y : y + size, x : x + size], 3) for x in places] for y in places]
    return np.array(found).transpose(2, 0, 1)


@pytest.mark.parametrize(("size", "padding"), [(7, 3), (3, 1), (5, 1)])
def test_weights_in_blocks_see_the_same_pixels(size: int, padding: int) -> None:
    rng = np.random.default_rng(size)
    pixels, weight = rng.integers(-9, 9, (3, 16, 16)), rng.integers(-9, 9, (4, 3, size, size))
    first, last = -padding // 2, (size - 1 - padding) // 2
    blocks = pixels.reshape(3, 8, 2, 8, 2).transpose(2, 4, 0, 1, 3).reshape(12, 8, 8)
    ends = (-first, last)
    found = convolved(np.pad(blocks, ((0, 0), ends, ends)), to_blocks(weight, padding, first, last), 1)
    below = padding + size  # more than enough, cut off again
    wanted = convolved(np.pad(pixels, ((0, 0), (padding, below), (padding, below))), weight, 2)
    assert np.array_equal(found, wanted[:, : found.shape[1], : found.shape[2]])


def grouped(groups: int, width: int, integers: bool = True) -> Graph:
    """Pixels, a grouped convolution of 3x3 on what a first one makes of them, and means of its channels."""
    random, channels = np.random.default_rng(0), groups * width
    nodes: list[Any] = []
    for source, output, shape, its in (
        ("pixels", "conv_1", (channels, 3, 1, 1), 1),
        ("conv_1", "conv_2", (channels, width, 3, 3), groups),
    ):
        weight = random.integers(-127, 128, shape).astype(np.int8)
        given, scales = (weight, np.full(channels, 1e-3, np.float32)) if integers else (None, None)
        bias = np.zeros(channels, np.float32)
        float_weight = weight.astype(np.float32) * 1e-3
        padding = (shape[2] // 2,) * 2
        nodes.append(Convolution((source,), output, float_weight, bias, given, scales, (1, 1), padding, its, IDENTITY))
    nodes.append(GlobalAverage(("conv_2",), "mean"))
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("conv_1", "conv_2"), (1, channels, 8, 8))
    shapes |= {"pixels": (1, 3, 8, 8), "mean": (1, channels)}
    grids = {"pixels": QuantParams(1.0), "conv_1": QuantParams(0.5), "conv_2": QuantParams(0.5)} if integers else {}
    return Graph(tuple(nodes), "pixels", "mean", grids, shapes)


@pytest.mark.parametrize(
    ("groups", "width", "left"), [(8, 4, 2), (6, 8, 3), (4, 2, 1), (9, 8, 3), (5, 12, 5), (2, 16, 2)]
)
def test_narrow_groups_become_wider_ones_with_the_same_answers(
    tmp_path: Path, groups: int, width: int, left: int
) -> None:
    before = grouped(groups, width)
    after = merge_narrow_groups(before)
    assert [node.groups for node in convolutions(after)] == [1, left]
    for engine in OTHERS:
        answers = []
        for found in (before, after):
            (tmp_path / "net.onnx").write_bytes(model_of(found, 8, 2, {}).SerializeToString())
            answers.append(engine.load(tmp_path / "net.onnx", 1).run(PIXELS[:, :, :8, :8]))
        assert answers[0].std() > 0
        assert np.array_equal(answers[0], answers[1])


@pytest.mark.parametrize("found", [grouped(8, 1), grouped(8, 4, integers=False)], ids=["depthwise", "float"])
def test_depthwise_convolutions_and_those_in_float_keep_their_groups(found: Graph) -> None:
    assert merge_narrow_groups(found) is found


def test_a_dense_convolution_is_the_grouped_one_with_zeros() -> None:
    weight = np.arange(1, 13).reshape(4, 3, 1, 1)
    found = to_dense(weight, 2)[:, :, 0, 0]
    assert found.tolist() == [
        [1, 2, 3, 0, 0, 0],
        [4, 5, 6, 0, 0, 0],
        [0, 0, 0, 7, 8, 9],
        [0, 0, 0, 10, 11, 12],
    ]


@pytest.mark.slow
def test_the_forms_that_apply_are_measured_beside_the_plain_one(monkeypatch: pytest.MonkeyPatch) -> None:
    classifier = make_random_classifier(SHUFFLENET, Mode.QAT, image_size=SIZE, target=ONNX)
    assert list(list_applicable(classifier)) == [("shuffles",), ("stem",), ("shuffles", "stem")]
    monkeypatch.setattr(tune, "list_applicable", lambda _: [("shuffles",)])
    plain, other = measure_forms(classifier, rounds=2)
    assert plain.rewrites == () and plain.speedup.median == 1.0
    assert other.rewrites == ("shuffles",) and other.speedup.median > 0


@pytest.mark.parametrize(
    ("speedups", "kept"),
    [
        ([(1.2, 1.1), (1.3, 1.2)], ("b",)),
        ([(1.2, 1.1), (1.3, 0.9)], ("a",)),
        ([(0.8, 0.7), (1.3, 0.99)], ()),
        ([], ()),
    ],
)
def test_only_what_is_faster_beyond_doubt_is_kept(speedups: list[tuple[float, float]], kept: tuple[str, ...]) -> None:
    forms = [Form((), "E", Speedup(1.0, 1.0, 1.0))]
    forms += [Form((name,), "E", Speedup(*found, 2.0)) for name, found in zip("ab", speedups, strict=False)]
    assert find_fastest(forms).rewrites == kept
