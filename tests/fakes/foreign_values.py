"""Values that other programs' checkpoints hold beside weights."""

from __future__ import annotations

from tests.fakes.weight_files import (
    ORDERED,
    Call,
    Name,
    Raw,
    code,
)


def value(name: str, *args: object, state: object = None, new: bool = False) -> Call:
    """What a pickle has for an object: its class is called with ``args``, or made and given a ``state``."""
    module, _, last = name.rpartition(".")
    return Call(Name(module, last), args, state, new)


NAMESPACE = value("argparse.Namespace", new=True, state={"lr": 0.1, "path": value("pathlib.PosixPath", "a", "b")})
COLOR = value("__main__.Color", "red")
DTYPE = Call(Name("numpy", "dtype"), ("f8", False, True), (3, "<", None, None, None, -1, -1, 0))
TEXTS = Call(Name("numpy", "dtype"), ("U3", False, True), (3, "<", None, None, None, 12, 4, 8))
BESIDE: dict[str, object] = {
    "argparse.Namespace": NAMESPACE,
    "types.SimpleNamespace": value("types.SimpleNamespace", new=False, state={"a": 1}),
    "numpy scalar": value("numpy._core.multiarray.scalar", DTYPE, bytes(8)),
    "numpy text": value("numpy.core.multiarray.scalar", TEXTS, "abc".encode("utf-32-le")),
    "numpy type": Name("numpy", "float32"),
    "path": value("pathlib.PurePosixPath", "data"),
    "path of Python 3.13": value("pathlib._local.PosixPath", "data"),
    "path of Windows": value("pathlib.WindowsPath", "c:\\", "x"),
    "enum by its value": COLOR,
    "enum by its name": value("builtins.getattr", Name("__main__", "Color"), "RED"),
    "enum of the standard library": value("http.HTTPStatus", 200),
    "flags": value("_operator.or_", COLOR, COLOR),
    "settings of the script": value("__main__.Settings", new=True, state={"lr": 0.1, "color": COLOR}),
    "OrderedDict": Call(ORDERED, ()),
    "defaultdict": Raw(
        code(value("collections.defaultdict", Name("__builtin__", "list"))) + code("a") + code([1]) + b"s"
    ),
    "Counter": value("collections.Counter", {"a": 2}),
    "deque": Raw(code(value("collections.deque", (), 3)) + code(1) + b"a"),
    "set": value("__builtin__.set", [1, 2]),
    "set of protocol 4": Raw(b"\x8f(" + code(1) + code("a") + b"\x90"),
    "frozenset of protocol 4": Raw(b"(" + code(1) + b"\x91"),
    "datetime": value("datetime.datetime", b"\x07\xe8\x01\x01\x00\x00\x00\x00\x00\x00"),
    "datetime with a zone": value(
        "datetime.datetime", b"x" * 10, value("datetime.timezone", value("datetime.timedelta", 0))
    ),
    "uuid": value("uuid.UUID", new=True, state={"int": 5}),
    "decimal": value("decimal.Decimal", "1.5"),
    "complex": value("__builtin__.complex", 1.0, 2.0),
    "range": value("__builtin__.xrange", 0, 3, 1),
    "bytearray": value("__builtin__.bytearray", "abc", "latin-1"),
    "torch.device": value("torch.device", "cuda", 0),
    "torch.dtype": Name("torch", "float16"),
    "an optimizer": value("torch.optim.sgd.SGD", new=True, state={"defaults": {"lr": 0.1}}),
    "loss scaling": value("torch.amp.grad_scaler.GradScaler", new=True, state={"_scale": None}),
    "Lightning's hyper-parameters": Raw(
        code(value("lightning.fabric.utilities.data.AttributeDict", new=True)) + b"(" + code("e") + code(COLOR) + b"u"
    ),
    "Lightning's callbacks": Raw(
        b"}"
        + code(Name("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint"))
        + code({"best": 1.0})
        + b"s"
    ),
    "OmegaConf": value("omegaconf.dictconfig.DictConfig", new=True, state={"_metadata": None}),
    "odd keys": {"a": 1},
    "keys of old optimizers": Raw(b"}" + code(140_184_892_112_000) + code({"m": 1}) + b"s"),
    "keys that are no texts": Raw(b"}(" + code(None) + code(1) + code((1, 2)) + code(2) + code(0.5) + code(3) + b"u"),
    "torchvision's InterpolationMode": value("torchvision.transforms.functional.InterpolationMode", "bilinear"),
}
