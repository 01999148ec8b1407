"""``--keep-input``: an int8 file that is fed what the imported file was fed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest

from mgq.engine.classifier.deployed_files import open_file
from mgq.engine.classifier.dump import dump_classifier
from mgq.engine.classifier.onnx_import import find_float_input
from mgq.engine.classifier.open import make_random_classifier
from mgq.errors import InputError
from mgq.export.onnx.onnx_file import METADATA, read_onnx
from mgq.quantization.modes import Mode
from mgq.runtime.registry import can_run_native, load
from tests.conftest import Mgq, the_error
from tests.fakes.foreign_int8 import grey_noise, int8_of
from tests.fakes.foreign_models import Model, write

Pixels = npt.NDArray[np.uint8]
Fed = npt.NDArray[np.float32]
MEAN, STD = (np.array(v).reshape(1, 3, 1, 1) * 255 for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


def last(model: Model) -> str:
    return model.add("Transpose", "image", perm=[0, 3, 1, 2])


def as_torch(images: Pixels) -> Fed:
    return np.asarray((images[:, ::-1] - MEAN) / STD, np.float32)


def as_caffe(images: Pixels) -> Fed:
    return np.asarray(images - np.array([103.939, 116.779, 123.68]).reshape(1, 3, 1, 1), np.float32)


def as_tf_last(images: Pixels) -> Fed:
    return np.ascontiguousarray((images[:, ::-1] / 127.5 - 1).transpose(0, 2, 3, 1), np.float32)


def as_grey(images: Pixels) -> Fed:
    return (images[:, :1] / 127.5 - 1).astype(np.float32)


Layout = tuple[tuple[Any, ...], Callable[[Model], str], str, Callable[[Pixels], Fed]]
LAYOUTS: dict[str, Layout] = {
    "channels first": (("N", 3, 32, 32), lambda model: "image", "torch", as_torch),
    "one picture, bgr": ((1, 3, 32, 32), lambda model: "image", "caffe", as_caffe),
    "channels last": (("N", 32, 48, 3), last, "tf", as_tf_last),
    "grey": ((1, 1, 32, 32), lambda model: "image", "tf", as_grey),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_file_that_keeps_its_input_answers_as_the_one_that_takes_grey_noise(tmp_path: Path, layout: str) -> None:
    shape, entry, preprocess, fed = LAYOUTS[layout]
    model = Model(shape)
    channels = shape[3] if layout == "channels last" else shape[1]
    source = model.add("Relu", model.conv(entry(model), channels, 8, strides=[2, 2]))
    path = model.save(tmp_path / "model.onnx", model.classify(source, 8))
    int8 = int8_of(path, preprocess)
    plain = dump_classifier(int8, tmp_path / "plain.onnx", batch=None).path
    kept = dump_classifier(int8, tmp_path / "kept.onnx", keep_input=True)
    assert "'image'" in kept.takes
    session = onnxruntime.InferenceSession(str(kept.path), providers=["CPUExecutionProvider"])
    (has,), (wanted,) = session.get_inputs(), onnx.load(str(path)).graph.input
    assert (has.name, has.type) == (wanted.name, "tensor(float)")
    assert has.shape == list(shape)
    assert session.get_outputs()[0].name == onnx.load(str(path)).graph.output[0].name
    images = grey_noise(3, *(int8.spec.only_size or (32, 32)))
    one_by_one = [session.run(None, {"image": fed(image[None])})[0] for image in images]
    for engine in ("onnxruntime", "openvino"):
        answers = load(plain, engine).run(images)
        assert (np.concatenate([load(kept.path, engine).run(image[None]) for image in images]) == answers).all()
        if engine == "onnxruntime":
            assert (np.concatenate(one_by_one) == answers).all()
    assert open_file(kept.path).logits(images).shape == (3, len(int8.classes))


def test_names_of_the_file_may_be_those_of_tensors_in_between(tmp_path: Path) -> None:
    path = write(tmp_path / "model.onnx")
    proto = onnx.load(str(path))
    int8 = int8_of(path, "torch")
    other = dump_classifier(int8, tmp_path / "plain.onnx").path
    taken = onnx.load(str(other)).graph.node[3].output[0]
    for node in proto.graph.node:
        node.input[:] = [taken if name == "image" else name for name in node.input]
    proto.graph.input[0].name = taken
    onnx.save(proto, str(path))
    kept = dump_classifier(int8_of(path, "torch"), tmp_path / "kept.onnx", keep_input=True).path
    image = grey_noise(1, 32, 32)
    assert (load(kept, "onnxruntime").run(image) == load(other, "onnxruntime").run(image)).all()


def test_what_a_file_says_of_its_input_has_to_be_true(tmp_path: Path) -> None:
    path = write(tmp_path / "model.onnx")
    kept = dump_classifier(int8_of(path, "torch"), tmp_path / "kept.onnx", keep_input=True).path
    for wrong in ({"std": [0, 1, 1]}, {"mean": [1e999, 0, 0]}, {"shape": [1, 3, 8, 8]}, {"order": "gbr"}):
        about = read_onnx(kept).about
        proto = onnx.load(str(kept))
        proto.metadata_props[0].value = str({**about, "input": {**about["input"], **wrong}}).replace("'", '"')
        assert proto.metadata_props[0].key == METADATA
        onnx.save(proto, str(tmp_path / "wrong.onnx"))
        found = read_onnx(tmp_path / "wrong.onnx")
        assert found.kept_input is None or found.shape == (None, 3, 32, 32)


def test_native_engine_leaves_kept_inputs_to_others(tmp_path: Path) -> None:
    path = write(tmp_path / "model.onnx")
    int8 = int8_of(path, "torch")
    assert not can_run_native(dump_classifier(int8, tmp_path / "kept.onnx", keep_input=True).path)
    with pytest.raises(InputError, match="--keep-input is for ONNX"):
        dump_classifier(int8, tmp_path / "model.so", keep_input=True)


def test_calibrate_keeps_the_input_and_other_verbs_run_the_file(tmp_path: Path, mgq: Mgq) -> None:
    path = write(tmp_path / "model.onnx")
    photos = tmp_path / "photos"
    photos.mkdir()
    for number, image in enumerate(grey_noise(6, 40, 40)):
        cv2.imwrite(str(photos / f"{number}.png"), image.transpose(1, 2, 0))
    said = mgq("calibrate", photos, "-c", path, "--quality", "fast", "--keep-input")
    assert said.code == 0, said
    int8 = tmp_path / "runs" / "model.calibration" / "model.int8.onnx"
    assert onnx.load(str(int8)).graph.input[0].name == "image"
    asked = mgq("infer", photos / "0.png", "-c", int8)
    assert asked.code == 0, asked


def test_keep_input_is_refused_where_there_is_none(tmp_path: Path, mgq: Mgq) -> None:
    path = write(tmp_path / "model.onnx")
    said = mgq("dump", "-c", path, "-m", "normal", "--keep-input", "--check", "none")
    assert "is the one that was imported" in the_error(said)
    assert not (tmp_path / "model.normal.onnx").exists()
    with pytest.raises(InputError, match="imported ONNX files"):
        find_float_input(make_random_classifier("resnet18", Mode.NORMAL))
