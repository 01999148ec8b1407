"""Files of other programs that are given pixels: they answer as the networks that are imported from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto

from mgq.engine.classifier.import_wish import ImportWish
from mgq.engine.classifier.onnx_import import find_float_input, import_classifier
from mgq.errors import InputError
from mgq.export.onnx.pixel_file import write_pixel_file
from mgq.runtime.protocol import run_in_batches
from mgq.runtime.registry import load
from tests.fakes.foreign_models import Model, plain, write

IMAGES = np.random.default_rng(0).integers(0, 256, (3, 3, 32, 32), dtype=np.uint8)


def write_form(path: Path, form: str) -> Path:
    """A classifier that takes float (N, C, H, W) or (N, H, W, C), one channel, or pixels; opset 7 or newer."""
    shapes: dict[str, tuple[Any, ...]] = {"last": ("N", 32, 32, 3), "grey": ("N", 1, 32, 32)}
    model = Model(shapes.get(form, ("N", 3, 32, 32)), opset=7 if form == "old" else 17)
    if form == "last":
        source = model.add("Transpose", "image", perm=[0, 3, 1, 2])
    else:
        source = model.add("Cast", "image", to=TensorProto.FLOAT) if form == "pixels" else "image"
    channels = 1 if form == "grey" else 3
    output = model.classify(model.add("Relu", model.conv(source, channels, 8)), 8)
    return model.save(path, output, kind=TensorProto.UINT8 if form == "pixels" else TensorProto.FLOAT)


@pytest.mark.parametrize("form", ["first", "old", "last", "grey", "pixels"])
@pytest.mark.parametrize("order", ["rgb", "bgr"])
def test_pixels_give_what_the_imported_network_does(tmp_path: Path, form: str, order: str) -> None:
    path = write_form(tmp_path / "net.onnx", form)
    wish = ImportWish(order=order) if form == "pixels" else ImportWish(preprocess="torch", order=order)
    classifier, _ = import_classifier(path, wish, "")
    own = write_pixel_file(path, find_float_input(classifier), (32, 32), tmp_path / "own.onnx")
    wanted = classifier.logits(IMAGES)
    for engine in ("onnxruntime", "openvino"):
        found = run_in_batches(load(own, engine), IMAGES)
        np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-3 * np.abs(wanted).max(), err_msg=engine)


def test_a_file_for_several_pictures_at_once_is_no_measure_for_one(tmp_path: Path) -> None:
    model = Model((4, 3, 32, 32))
    path = model.save(tmp_path / "four.onnx", model.classify(plain(model), 8))
    entry = find_float_input(import_classifier(path, ImportWish(preprocess="torch"), "")[0])
    with pytest.raises(InputError, match="does not take one picture"):
        write_pixel_file(path, entry, (32, 32), tmp_path / "own.onnx")
    assert not (tmp_path / "own.onnx").exists()


def test_another_file_in_its_place_is_refused(tmp_path: Path) -> None:
    entry = find_float_input(import_classifier(write(tmp_path / "a.onnx"), ImportWish(preprocess="torch"), "")[0])
    model = Model()
    model.add("Identity", "image")
    (tmp_path / "b.onnx").write_bytes(write(tmp_path / "c.onnx").read_bytes().replace(b"image", b"other"))
    with pytest.raises(InputError, match="does not take one picture as 'image'"):
        write_pixel_file(tmp_path / "b.onnx", entry, (32, 32), tmp_path / "own.onnx")
