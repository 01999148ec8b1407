"""Identifies files of other programs that hold no state dict, and says how to export one."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import PurePath

_TAKEN = "`mgq calibrate -c model.onnx -d PHOTOS` takes it"
_FED = f"{_TAKEN}, with --preprocess as Keras fed it"
TORCHSCRIPT = (
    "is a TorchScript archive, which is a program: write its weights with "
    'torch.save(torch.jit.load("FILE", "cpu").state_dict(), "weights.pth"), or export ONNX'
)
EXPORTED = (
    "is a program that torch.export or torch.package wrote: write the weights of the network it was made of with "
    'torch.save(model.state_dict(), "weights.pth")'
)
NUMPY = "is an archive of numpy arrays: write them with safetensors.numpy.save_file(dict(numpy.load(FILE)), PATH)"
KERAS = f"is a Keras model: as ONNX (python -m tf2onnx.convert --keras FILE --output model.onnx) {_FED}"
HDF5 = KERAS.replace("a Keras model", "an HDF5 file, as Keras writes them")
TFLITE = f"is a TensorFlow Lite file: as ONNX (python -m tf2onnx.convert --tflite FILE --output model.onnx) {_FED}"
TENSORFLOW = "is TensorFlow's: as ONNX (python -m tf2onnx.convert --saved-model FOLDER --output model.onnx) " + _FED
ONNX = "is an ONNX file: let its name end in .onnx"
SAVED_MODEL = "saved_model.pb"
WHOLE_MODEL = (
    "save the state dict where the model was written, torch.save(model.state_dict(), 'weights.pth'), or "
    "an ONNX file, torch.onnx.export(model, x, 'model.onnx')"
)
WHOLE_YOLO = f"it is ultralytics': as ONNX (yolo export model=FILE format=onnx) {_TAKEN}"
PADDLE = (
    "is Paddle's: as ONNX (paddle2onnx --model_dir FOLDER --model_filename FILE.pdmodel --params_filename "
    f"FILE.pdiparams --save_file model.onnx) {_TAKEN}"
)
_ENDINGS = {
    **dict.fromkeys((".pb", ".index", ".meta"), TENSORFLOW),
    ".keras": KERAS,
    ".tflite": TFLITE,
    **dict.fromkeys((".pdparams", ".pdmodel", ".pdiparams"), PADDLE),
}
_PROGRAMS = {
    "Caffe": (".caffemodel", ".prototxt"),
    "Core ML": (".mlmodel", ".mlpackage"),
    "TensorRT": (".engine", ".plan", ".trt"),
    "OpenVINO": (".xml",),
    "ncnn": (".param",),
    "MNN": (".mnn",),
}
"""Programs whose files nothing turns into ONNX, and the endings of these."""


def identify_file(data: bytes) -> str | None:
    """What a file is by its first bytes, where it is no weights file that is read: the rest of a sentence."""
    if data.startswith(b"\x89HDF\r\n\x1a\n"):
        return HDF5
    if data[4:8] == b"TFL3":
        return TFLITE
    if data.startswith(b"\x93NUMPY"):
        return "is one numpy array, without a name: give a state dict"
    if data[:1] == b"\x08" and any(mark in data[:64] for mark in (b"pytorch", b"onnx", b"tf2onnx", b"mgq")):
        return ONNX
    return None


def identify_archive(names: Collection[str]) -> str | None:
    """What a zip archive of the entries ``names`` is, where it is no weights file: the rest of a sentence."""
    inner = {name.partition("/")[2] for name in names}
    if "constants.pkl" in inner or any(name.startswith("code/") for name in inner):
        return TORCHSCRIPT
    if ".data/extern_modules" in inner or any(name.endswith("exported_program.json") for name in names):
        return EXPORTED
    if any(name.startswith("models/") and name.endswith(".json") for name in inner):
        return EXPORTED
    if "model.weights.h5" in names:
        return KERAS
    if names and all(name.endswith(".npy") for name in names):
        return NUMPY
    return None


def identify_name(name: str) -> str | None:
    """What a file that could not be read may be by its ``name``."""
    if ".data-0" in name:
        return TENSORFLOW
    ending = PurePath(name.lower()).suffix
    program = next((program for program, endings in _PROGRAMS.items() if ending in endings), None)
    if program is None:
        return _ENDINGS.get(ending)
    return f"is a file of {program}, which is not read: write the network as ONNX where it was trained; {_TAKEN}"


def identify_model(pickle: bytes) -> str | None:
    """How to export what ``pickle`` holds, where it asks for the classes of a network."""
    if b"ultralytics" in pickle:
        return WHOLE_YOLO
    return WHOLE_MODEL if b"torch.nn." in pickle else None
