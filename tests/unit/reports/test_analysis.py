"""``mgq analyze``: which layers it names, that single layers are quantized alone, its page, its errors."""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import cv2
import megengine.functional as F
import megengine.module as M
import numpy as np
import numpy.typing as npt
import pytest
from megengine import Tensor
from megengine.module.qat import QATModule

from mgq.engine.calibration import analysis
from mgq.engine.calibration.analysis import format_decibels, format_points, load_images
from mgq.engine.classifier.open import make_random_classifier
from mgq.engine.classifier.run_lookup import RUN_CHECKPOINT
from mgq.ptq.range_measurement import as_input
from mgq.ptq.sensitivity import Effect, Survey, effect_of, find_analyzed_layers, sensitivity_of
from mgq.quantization.activation_ranges import apply_ranges
from mgq.quantization.modes import Mode, to_mode
from mgq.quantization.qat_layers import find_quantized_layers, fold_bias, fold_weight, observe_weights
from mgq.quantization.targets import ONNX
from mgq.reports.analysis_page import page_of
from mgq.zoo.network_state import state_of
from tests.conftest import (
    CLASSES,
    Mgq,
    Read,
    classifier_of,
    document,
    logits_of,
    same_state,
    smooth_images,
    the_error,
    trio_of,
    write_images,
)
from tests.fakes.analyses import ARCH, analysis_of

SMALL = "shufflenet_v1_x0_5_g3"
LAYER = "layer2.0.conv_bn_relu1"

pytestmark = pytest.mark.usefixtures("no_downloads")


def nearest(values: npt.NDArray[np.float32], scale: float, most: int) -> npt.NDArray[np.float32]:
    """``values`` on a grid of int8, halves away from zero."""
    steps = np.trunc(values / scale + np.copysign(0.5, values))
    result: npt.NDArray[np.float32] = (np.clip(steps, -most, most) * scale).astype(np.float32)
    return result


def surveyed(network: M.Module, images: npt.NDArray[np.uint8], **corrections: tuple[float, ...]) -> Survey:
    layers = find_analyzed_layers(network)
    for layer in layers.values():
        layer.set_fake_quant(False)
    survey = Survey(network, layers, {name.replace("__", "."): value for name, value in corrections.items()})
    list(survey.see(as_input(images)))
    return survey


# ---- single layers ----


def test_a_layer_alone_loses_by_its_own_weights_and_output_and_by_nothing_else() -> None:
    trio, images = trio_of(ARCH), smooth_images(2, seed=3)
    survey = surveyed(deepcopy(trio.qat), images)
    layer = find_quantized_layers(trio.qat)[LAYER]
    weight, bias = fold_weight(layer).numpy(), fold_bias(layer)
    weight = nearest(weight, float(np.abs(weight).max()) / 127, 127)
    scale = max(map(abs, trio.ranges.ranges[LAYER])) / 127.5

    def quantized(module: M.Module, inputs: tuple[Tensor, ...], _: Tensor) -> Tensor:
        conv = module.conv
        output = F.conv2d(inputs[0], Tensor(weight), Tensor(bias.reshape(1, -1, 1, 1)), conv.stride, conv.padding)
        return Tensor(nearest(np.maximum(output.numpy(), 0), scale, 127))

    handle = dict(trio.normal.named_modules())[LAYER].register_forward_hook(quantized)
    try:
        expected = logits_of(trio.normal, images)
    finally:
        handle.remove()
    exact = logits_of(trio.normal, images)
    np.testing.assert_allclose(survey.exact[0], exact, atol=1e-4 * float(np.abs(exact).max()))
    error = survey.alone[LAYER][0] - expected
    assert np.linalg.norm(error) < 0.02 * np.linalg.norm(expected - exact)


def test_all_layers_together_are_the_simulated_network() -> None:
    trio, images = trio_of(ARCH), smooth_images(2, seed=3)
    survey = surveyed(deepcopy(trio.qat), images)
    np.testing.assert_array_equal(survey.whole[0], logits_of(trio.qat, images))


def test_the_network_is_left_as_it_was() -> None:
    trio, images = trio_of(ARCH), smooth_images(1)
    network = deepcopy(trio.qat)
    layers = find_analyzed_layers(network)
    layers[LAYER].act_fake_quant.disable()  # as somebody else may have left it
    before, state, switches = logits_of(network, images), state_of(network), switches_of(layers)
    sensitivity_of(network, images, corrections={LAYER: (0.3,) * fold_bias(layers[LAYER]).size})
    assert switches_of(layers) == switches and not switches[LAYER][0]
    assert same_state(state, state_of(network))
    np.testing.assert_array_equal(before, logits_of(network, images))


def switches_of(layers: dict[str, QATModule]) -> dict[str, list[bool]]:
    parts = ("act_fake_quant", "weight_fake_quant", "act_observer", "weight_observer")
    found = {name: [getattr(layer, part) for part in parts] for name, layer in layers.items()}
    return {name: [part.enabled for part in parts if part is not None] for name, parts in found.items()}


def test_float_goes_without_bias_corrections() -> None:
    trio, images = trio_of(ARCH), smooth_images(2)
    outputs = fold_bias(find_quantized_layers(trio.qat)[LAYER]).size
    corrections = {LAYER: tuple(np.linspace(-1, 1, outputs).tolist())}
    network = to_mode(trio.normal, Mode.QAT)
    apply_ranges(network, replace(trio.ranges, bias_corrections=corrections))
    network.eval()
    survey = surveyed(network, images, **{LAYER.replace(".", "__"): corrections[LAYER]})
    exact = logits_of(trio.normal, images)
    np.testing.assert_allclose(survey.exact[0], exact, atol=1e-4 * float(np.abs(exact).max()))
    assert not np.allclose(survey.whole[0], logits_of(trio.qat, images), atol=1e-2)


def test_a_layer_with_a_huge_channel_is_named_worst_and_so_is_the_channel() -> None:
    network = deepcopy(trio_of(ARCH).qat)
    layer = find_quantized_layers(network)[LAYER]
    weight = layer.conv.weight.numpy().copy()
    weight[5] *= 100
    layer.conv.weight[...] = Tensor(weight)
    observe_weights(network)
    found = sensitivity_of(network, smooth_images(2))
    (worst,) = found.worst(1)
    assert not found.rounded_before
    assert worst.name == LAYER and worst.weights is not None and worst.activations is not None
    assert worst.weights.find_dominant_channels(1) == [5] and worst.weights.median_share < 0.05
    assert worst.activations.find_dominant_channels()[0] == 5 and worst.activations.clipped > 0
    others = [layer.weights for layer in found.layers if layer.weights is not None and layer.name != LAYER]
    assert all(values.median_share > 0.2 for values in others)


def test_weights_on_the_grid_lose_nothing_and_it_is_said() -> None:
    network = deepcopy(trio_of(ARCH).qat)
    for layer in find_analyzed_layers(network).values():
        if layer.weight_observer is not None:
            exact = fold_weight(layer).numpy()
            fake = nearest(exact, float(np.abs(exact).max()) / 127, 127)
            gain = np.where(exact != 0, fake / np.where(exact != 0, exact, 1), 1)
            layer.conv.weight[...] = Tensor(layer.conv.weight.numpy() * gain)
    observe_weights(network)
    found = sensitivity_of(network, smooth_images(1))
    assert found.rounded_before
    assert "grid already" in " ".join(analysis_of(found).remarks)


def test_the_classifier_and_its_features_count_where_they_are_int8_and_channels_have_ranges_of_their_own() -> None:
    network = make_random_classifier(SMALL, Mode.QAT, image_size=64, target=ONNX).network
    found = sensitivity_of(network, smooth_images(1))
    kinds = {layer.kind: layer for layer in found.layers}
    assert kinds["linear"].activations is None and kinds["linear"].carried_snr is None
    assert kinds["features"].weights is None and kinds["features"].activations is not None
    assert all(not layer.weights.find_dominant_channels() for layer in found.layers if layer.weights is not None)


def test_effects_are_what_their_names_say() -> None:
    exact = np.eye(4, dtype=np.float32)
    changed = exact.copy()
    changed[0] = (0, 1, 0, 0)
    found = effect_of(exact, changed, np.array([0, 1, 2, 0]))
    assert found.logit_snr == pytest.approx(10 * math.log10(4 / 2))
    assert found.same == 75 and found.top1_change == -25
    assert found.top1_error == pytest.approx(100 * np.std([-1, 0, 0, 0], ddof=1) / 2)
    same = effect_of(exact, exact, np.arange(4))
    assert same.logit_snr == math.inf and format_decibels(same.logit_snr) == "exact" and format_points(same) == "+0.0"
    assert format_points(effect_of(exact, changed, None)) == "-"
    assert format_points(Effect(20, 75, -25.0, 25.0)) == "-25.0 ±25.0"


# ---- pictures ----


def test_without_images_it_is_the_cat_and_it_says_so() -> None:
    found = load_images(classifier_of(SMALL, Mode.QAT), [], None, 3)
    assert found.images.shape == (3, 3, 64, 64) and found.labels is None
    assert "cat" in found.name and "-d FOLDER" in found.remark


def test_without_images_a_run_is_analyzed_on_what_it_was_measured_on() -> None:
    names = ("glow", "dots", "checkerboard", "stripes", "cross", "star", "triangle", "square", "ring", "disc")
    recipe = {"data": "synthetic", "synthetic_val": 20, "seed": 1, "image_size": 64}
    found = load_images(replace(classifier_of(SMALL, Mode.QAT), classes=names, recipe=recipe), [], None, 6)
    assert found.name == "synthetic pictures" and found.labels is not None and len(found.labels) == 6


def test_broken_images_are_left_out_with_their_labels(made: Path) -> None:
    found = load_images(classifier_of(SMALL, Mode.QAT), [], made / "broken", 32)
    assert found.labels is not None and found.labels.tolist() == [1]
    assert len(found.images) == 1 and len(found.problems) == 1 and "broken/" in found.problems[0]


# ---- the page ----


def test_the_page_is_complete_in_itself_and_names_every_layer() -> None:
    found = sensitivity_of(trio_of(ARCH).qat, smooth_images(2), np.array([1, 2]))
    page = page_of(analysis_of(found, '<script>alert("$x")</script>', corrected=True))
    read = Read(page)
    assert read.open == []
    assert "http:" not in page and "https:" not in page and "url(" not in page and "@import" not in page
    assert not read.tags & {"script", "link", "img", "iframe", "object", "use", "image"}
    assert not read.attributes & {"src", "srcset", "data", "xlink:href", "onload"}
    assert '<script>alert("$x")</script>' in "".join(read.words)
    assert len(found.layers) > 20 and all(read.words.count(layer.name) >= 2 for layer in found.layers)
    assert "nan" not in page and "inf" not in page.replace("information", "")
    assert "without the bias corrections" in page


# ---- the command ----


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Labelled pictures, a float and a fake-quantized checkpoint of a small network."""
    root = tmp_path_factory.mktemp("made")
    for folder in ("set", "broken"):
        for i in range(2):
            place = root / folder / f"kind {i}"
            place.mkdir(parents=True)
            cv2.imwrite(str(place / "a.png"), smooth_images(1, 72, 90, seed=i)[0].transpose(1, 2, 0))
    (root / "broken" / "kind 0" / "a.png").write_text("no picture")
    for mode in (Mode.NORMAL, Mode.QAT):
        classifier_of(SMALL, mode).write_checkpoint(root / f"{mode.value}.safetensors")
    return root


def test_a_table_of_the_worst_layers_and_a_page(mgq: Mgq, made: Path, tmp_path: Path) -> None:
    said = mgq("analyze", "-c", made / "qat.safetensors", "-d", made / "set", "--worst", "3")
    assert said.code == 0, said.err
    page = tmp_path / f"{SMALL}.analysis.html"
    assert page.is_file() and page.name in said.out
    for part in (SMALL, "2 of ", "qat.safetensors", "same answers", "top-1", "channel", "± one standard error"):
        assert part in " ".join(said.out.split()), part
    assert all(len(line) <= 80 for line in said.out.splitlines() if not line.startswith(("weights:", "pictures:")))
    starts = tuple(name[:11] for name in find_quantized_layers(trio_of(SMALL).qat))  # long ones are folded
    assert sum(line.startswith(starts) for line in said.out.splitlines()) == 3


def test_json_is_one_document_with_all_layers(mgq: Mgq, made: Path, tmp_path: Path) -> None:
    folder = write_images(tmp_path / "plain", 2)
    said = mgq("analyze", "-c", made / "qat.safetensors", "-d", folder, "--images", "1", "--json", "--html", "p.html")
    body = document(said.out)
    assert (body["arch"], body["pictures"], body["labelled"], body["page"]) == (SMALL, 1, False, "p.html")
    assert body["float_top1"] is None and body["all_layers"]["top1_change"] is None
    assert "accuracy was not measured" in body["remarks"][0] and body["remarks"][0] in said.err
    assert len(body["layers"]) == len(find_analyzed_layers(trio_of(SMALL).qat))
    assert body["layers"][0]["weights"]["snr"] > 0 and (tmp_path / "p.html").is_file()


def test_float_weights_without_ranges_are_sent_to_calibration(mgq: Mgq, made: Path) -> None:
    line = the_error(mgq("analyze", "-c", made / "normal.safetensors", "-d", made / "set", "--target", "onnx"))
    assert "normal.safetensors" in line and f"mgq calibrate PICTURES -a {SMALL} --target onnx" in line


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--images", "0"], "--images 0"),
        (["--worst", "0"], "--worst 0"),
        (["-d", "no-such-folder"], "no-such-folder"),
        (["no-such-file.jpg"], "no-such-file.jpg"),
        (["a.jpg", "-d", "folder"], "-d"),
        (["--html", "."], "folder"),
        (["--target", "tpu"], "tpu"),
    ],
)
def test_wrong_use_is_one_line_that_names_it(mgq: Mgq, made: Path, arguments: list[str], named: str) -> None:
    assert named in the_error(mgq("analyze", "-c", made / "qat.safetensors", *arguments))


class ToldError(Exception):
    """A message, at which the work ends."""


def stop_at(line: str) -> None:
    raise ToldError(line)


def test_it_is_said_that_another_network_has_the_newest_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "mine.calibration" / RUN_CHECKPOINT
    run.parent.mkdir()
    run.touch()
    opened = classifier_of(SMALL, Mode.QAT), dict[str, tuple[float, ...]]()
    monkeypatch.setattr(analysis, "open_with_corrections", lambda *_: opened)
    with pytest.raises(ToldError, match=r"not used: .*mine\.calibration is the newest run"):
        analysis.analyze(save=tmp_path, on_message=stop_at)


def test_a_deployed_file_has_nothing_to_compare_with(mgq: Mgq) -> None:
    assert "give the checkpoint" in the_error(mgq("analyze", "-c", "network.megengine"))


def test_there_is_a_python_call(made: Path) -> None:
    import mgq

    found = mgq.analyze(made / "set", checkpoint=made / "qat.safetensors", images=1)
    assert found.found.images == 1 and found.found.float_top1 is not None
    assert len(found.classifier.classes) == CLASSES and found.found.worst(3)[0] == found.found.worst()[0]
