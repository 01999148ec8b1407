"""Lists names that programs leave beside the weights in a checkpoint: they are skipped, never imported or called.

A value made of such a name is one :class:`InertObject`, whatever its arguments and state. A mapping stays a mapping,
because weights may be in it. The list is closed: :mod:`mgq.weights.unpickler` refuses a name that is not in it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class InertObject:
    """A value that a file holds and that nobody needs. ``name`` is what the file calls it, or its class."""

    name: str

    def __str__(self) -> str:
        return self.name


def _names(module: str, names: str) -> set[str]:
    return {f"{module}.{name}" for name in names.split()}


_BUILTINS = "bool int float complex str bytearray list tuple dict set frozenset range xrange slice object"
_PATHS = "PurePath PurePosixPath PureWindowsPath Path PosixPath WindowsPath"
_NUMPY_TYPES = (
    "bool_ bool int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 float32 float64 longdouble complex64 "
    "complex128 str_ bytes_ datetime64 timedelta64 generic number integer floating"
)
_TORCH_TYPES = (
    "float16 float32 float64 bfloat16 half float double int8 int16 int32 int64 uint8 short int long bool complex64 "
    "complex128 float8_e4m3fn float8_e5m2 device"
)
_ENUMS = {
    "http.HTTPStatus",
    "uuid.SafeUUID",
    "inspect._ParameterKind",
    "PIL.Image.Resampling",
    "torchvision.transforms.functional.InterpolationMode",
    "torchvision.transforms.autoaugment.AutoAugmentPolicy",
    "transformers.trainer_utils.IntervalStrategy",
    "transformers.trainer_utils.SchedulerType",
    "transformers.trainer_utils.HubStrategy",
    "transformers.training_args.OptimizerNames",
}
_VALUES = (
    {f"{module}.{name}" for module in ("builtins", "__builtin__") for name in _BUILTINS.split()}
    | {f"{module}.{name}" for module in ("pathlib", "pathlib._local") for name in _PATHS.split()}
    | _names("argparse", "Namespace")
    | _names("types", "SimpleNamespace")
    | _names("collections", "Counter deque")
    | _names("copy_reg", "_reconstructor")
    | _names("copyreg", "_reconstructor")
    | _names("datetime", "datetime date time timedelta timezone")
    | _names("zoneinfo", "ZoneInfo")
    | _names("decimal", "Decimal")
    | _names("fractions", "Fraction")
    | _names("uuid", "UUID")
    | _names("time", "struct_time")
    | _names("typing", "Any Optional Union List Dict Tuple")
    | _names("numpy", _NUMPY_TYPES)
    | _names("numpy.random._pickle", "__randomstate_ctor __generator_ctor __bit_generator_ctor")
    | _names("numpy.random._mt19937", "MT19937")
    | _names("numpy.random._pcg64", "PCG64")
    | _names("numpy.random.bit_generator", "SeedSequence __pyx_unpickle_SeedSequence")
    | _names("pandas._libs.tslibs.timestamps", "_unpickle_timestamp Timestamp")
    | _names("torch", _TORCH_TYPES)
    | _names("torch.serialization", "_get_layout")
    | _names("torch.version", "TorchVersion")
    | _names("torch.torch_version", "TorchVersion")
    | _names("mmengine.logging.history_buffer", "HistoryBuffer")
    | _ENUMS
)
_FAMILIES = (
    "torch.optim.",
    "torch.amp.grad_scaler.",
    "torch.cuda.amp.grad_scaler.",
    "omegaconf.",
    "lightning.pytorch.callbacks.",
    "lightning.pytorch.utilities.enums.",
    "lightning.fabric.utilities.enums.",
    "lightning_fabric.utilities.enums.",
    "pytorch_lightning.callbacks.",
    "pytorch_lightning.utilities.enums.",
)
"""Modules of which every name stands for state of a training: optimizers, loss scaling, configuration, callbacks."""
_OWN_SCRIPT = "__main__."
"""What the script that wrote the file has defined itself, such as its enums and settings."""
_MAPPINGS = {
    "collections.defaultdict",
    "lightning.fabric.utilities.data.AttributeDict",
    "lightning.pytorch.utilities.parsing.AttributeDict",
    "lightning_fabric.utilities.data.AttributeDict",
    "pytorch_lightning.utilities.parsing.AttributeDict",
    "easydict.EasyDict",
    "addict.addict.Dict",
    "munch.Munch",
    "box.box.Box",
    "yacs.config.CfgNode",
    "fvcore.common.config.CfgNode",
    "detectron2.config.config.CfgNode",
    "mmcv.utils.config.ConfigDict",
    "mmengine.config.config.ConfigDict",
}


OF_INERT = (
    _names("builtins", "getattr")
    | _names("__builtin__", "getattr")
    | _names("_operator", "or_ getitem")
    | _names("operator", "or_ getitem")
)
"""Functions by which enums, flags and types are written. They are read past where their first argument is inert."""


def is_inert(module: str, name: str) -> bool:
    """Whether ``name`` of ``module`` is one that is read past. It has no dots: what is inside a class is not."""
    full = f"{module}.{name}"
    return "." not in name and (full in _VALUES or full.startswith((*_FAMILIES, _OWN_SCRIPT)))


def is_mapping(module: str, name: str) -> bool:
    """Whether ``name`` of ``module`` is a mapping, which may hold weights."""
    return f"{module}.{name}" in _MAPPINGS
