"""The recipe of a training run: every number that it depends on, with defaults that fit the data.

ImageNet's are in the families' files in the zoo. A smaller set of pictures gets a recipe that scales with its size, the
drawn pictures one that is done in minutes on two cores.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import tomli
import tomli_w
from msgspec import Meta

from mgq.data import SYNTHETIC as SYNTHETIC
from mgq.errors import InputError, name_in_errors, nearest, no_such, printable
from mgq.io.limited_io import text_of
from mgq.io.records import bounds_of, types_of, value_of
from mgq.quantization.option_names import OBSERVERS, TARGETS
from mgq.weights.checkpoint import check_size
from mgq.zoo.registry import spec_for

SCHEDULES = ("cosine", "linear", "step")
IMAGENET_IMAGES = 300_000
"""From this many pictures on, a set gets the recipe for ImageNet."""
CLASSIFIER_IMAGES = 5_000
COMPRESSIONS = ("none", "fp16")
CHOICES = {"schedule": SCHEDULES, "observer": OBSERVERS, "target": TARGETS, "compress": COMPRESSIONS}
MOST_BYTES = 1 << 16
"""The most bytes of a recipe file; the longest has some 2 KiB."""
DISTILLED = 0.5
"""Share of the loss that is for the float network's answers."""


# What is beyond these is meant by no training, and memory or time would be without bound.
Epochs: TypeAlias = Annotated[int, Meta(ge=1, le=100_000)]
Images: TypeAlias = Annotated[int, Meta(ge=0, le=10**12)]
Drawings: TypeAlias = Annotated[int, Meta(ge=0, le=10**8)]
Share: TypeAlias = Annotated[float, Meta(ge=0, le=1)]
Decay: TypeAlias = Annotated[float, Meta(ge=0, lt=1)]
Amount: TypeAlias = Annotated[float, Meta(ge=0)]


@dataclass(frozen=True)
class Recipe:
    """What a run does. Two runs with equal recipes, pictures and versions end with equal weights.

    ``data`` is a folder with ``train/`` and ``val/``, or ``synthetic``. ``lr`` and ``batch_size`` hold for one
    device; several multiply both. ``stem_lr`` is the factor of the learning rate for the weights that see pixels.
    ``milestones``, ``warmup``, ``freeze_observers`` and ``freeze_batch_norm`` count epochs and may be fractions.
    ``decay_all`` extends ``weight_decay`` to parameters of one dimension (batch norms, biases).

    On several processes ``sync_bn`` has batch norms take their statistics of all processes' pictures together, and
    ``compress`` says how gradients travel between machines: ``none``, or ``fp16`` in half the bytes. ``amp`` trains in
    mixed float16 on GPUs; with ``bf16`` convolutions on a processor multiply bfloat16 numbers, while all else is
    float32.

    ``batch_norm_momentum`` is the share of the running statistics that a step keeps (0: the network's own); with
    ``keep_batch_norm`` batch norms normalize by the statistics that they began with. ``crop_scale`` is the least share
    of a picture's area that a training crop shows. ``ema`` is the decay of the averaged weights that are measured and
    kept (0: none). ``classifier_pictures`` is on how many pictures at most the classifier of a float network is
    solved before the training (0: it begins as it is). ``limit`` takes so many pictures of each set, evenly spread
    (0: all).

    The last block matters in mode ``qat`` alone. ``target`` is what the int8 network is for. With ``calibrate`` the
    training begins with the ranges and biases that calibration finds, and keeps these ranges and the statistics of
    batch norms. ``distill`` is the share of the loss that compares the answers with those of the float network.
    """

    arch: str
    mode: str
    data: str
    classes: Annotated[int, Meta(ge=2, le=100_000)]
    image_size: int
    epochs: Epochs
    batch_size: Annotated[int, Meta(ge=1, le=65_536)]
    lr: Amount
    schedule: str = "cosine"
    milestones: tuple[float, ...] = ()
    gamma: Share = 0.1
    warmup: Amount = 0.0
    momentum: Decay = 0.9
    batch_norm_momentum: Share = 0.0
    keep_batch_norm: bool = False
    stem_lr: Amount = 1.0
    weight_decay: Amount = 1e-4
    decay_all: bool = False
    label_smoothing: Share = 0.1
    crop_scale: Annotated[float, Meta(gt=0, le=1)] = 0.08
    flip: Share = 0.5
    jitter: Share = 0.0
    ema: Decay = 0.0
    freeze_backbone: bool = False
    classifier_pictures: Images = 0
    amp: bool = False
    bf16: bool = False
    sync_bn: bool = False
    compress: str = "none"
    val_every: Epochs = 1
    limit: Images = 0
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)] = 0
    devices: Annotated[int, Meta(ge=1, le=1_024)] = 1
    synthetic_train: Drawings = 0
    synthetic_val: Drawings = 0
    options: Mapping[str, Any] = field(default_factory=dict)

    target: str = "megengine"
    observer: str = "ema"
    observe_batches: Annotated[int, Meta(ge=0, le=10**9)] = 0
    freeze_observers: Amount = 0.0
    freeze_batch_norm: Amount = 0.0
    calibrate: bool = False
    distill: Share = 0.0

    def __post_init__(self) -> None:
        """Raises InputError for a value that cannot be, by its name on the command line."""
        for name, bounds in bounds_of(Recipe).items():
            bounds.refuse_beyond(option(name), getattr(self, name))
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise no_such(name, getattr(self, name), known)
        check_size(self.image_size)

    @property
    def is_synthetic(self) -> bool:
        return self.data == SYNTHETIC

    def to_toml(self) -> str:
        """The recipe as text that :func:`read_changes` reads."""
        return tomli_w.dumps(to_plain(self))


def option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def to_plain(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain data, as JSON and TOML have it."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(recipe).items()}


def read_changes(path: Path) -> dict[str, Any]:
    """What a recipe file says, checked by name and type. Raises InputError that names the key."""
    name = printable(path)
    try:
        body = tomli.loads(text_of(path, MOST_BYTES))
    except OSError as error:
        raise InputError(f"cannot read the recipe {name}: {error.strerror}; check the path") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name} is not a TOML file: {printable(error)[:200]}; see recipe.toml of any run") from None
    return check_changes(body, name)


def check_changes(body: Mapping[str, Any], name: str) -> dict[str, Any]:
    """``body`` with values of the types that a recipe has. Raises InputError for another key or type."""
    changes: dict[str, Any] = {}
    for key, value in body.items():
        if key not in types_of(Recipe):
            near = nearest(key, types_of(Recipe))
            hint = f"did you mean {near}?" if near else "recipe.toml of any run has them all"
            raise InputError(f"{name} has an unknown key '{printable(key)[:80]}'; {hint}")
        try:
            changes[key] = value_of(Recipe, key, value)
        except ValueError:
            wanted = KINDS.get(types_of(Recipe)[key], "a list of numbers" if key == "milestones" else "a table")
            raise InputError(f"{name} has {key} = {printable(value)[:80]!r}: give {wanted}") from None
    return changes


KINDS = {float: "a number", int: "a whole number", bool: "true or false", str: "a text"}


def restore_recipe(body: Mapping[str, Any], name: str) -> Recipe:
    """The recipe that a checkpoint or a run kept. Raises InputError where it is damaged or of another version."""
    try:
        changes = check_changes(body, name)
        with name_in_errors(name):
            return Recipe(**changes)
    except TypeError:
        raise InputError(f"{name} holds no whole recipe; it was written by another version of mgq") from None


# ---- defaults ----


class Start(str, Enum):
    """What a run starts from."""

    RANDOM = "random"
    TRAINED = "trained"
    NEW_CLASSIFIER = "trained but for the classifier"


@dataclass(frozen=True)
class Task:
    """What a recipe is wanted for: ``images`` are those to train on.

    ``stem_lr`` is what the weights to begin with want; ``keep_batch_norm``: whether their training kept batch norms.
    """

    arch: str
    mode: str
    data: str
    classes: int
    images: int
    image_size: int
    start: Start = Start.RANDOM
    stem_lr: float = 1.0
    keep_batch_norm: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)


def make_recipe(task: Task, changes: Mapping[str, Any]) -> Recipe:
    """The default recipe for ``task`` with ``changes``: other epochs or batches shift what depends on them.

    With another batch size the learning rate changes in proportion, unless it is given too (arXiv:1706.02677).
    Raises InputError for values that cannot be.
    """
    changes = dict(changes)
    if "limit" in changes and changes["limit"] > 0:
        task = replace(task, images=min(task.images, changes["limit"]))
    default = default_recipe(task, changes.get("epochs"))
    if "batch_size" in changes and "lr" not in changes:
        changes["lr"] = default.lr * changes["batch_size"] / default.batch_size
    return replace(default, **changes)


def default_recipe(task: Task, epochs: int | None = None) -> Recipe:
    if task.data == SYNTHETIC:
        return synthetic_recipe(task, epochs)
    if task.images >= IMAGENET_IMAGES:
        return example_recipe(task, epochs)
    return small_recipe(task, epochs)


def base(task: Task, **values: Any) -> Recipe:
    return Recipe(
        arch=task.arch,
        mode=task.mode,
        data=task.data,
        classes=task.classes,
        image_size=task.image_size,
        options=dict(task.options),
        stem_lr=task.stem_lr,
        **values,
    )


def example_recipe(task: Task, epochs: int | None) -> Recipe:
    """The recipe for ImageNet that lives with the network's family."""
    values = spec_for(task.arch, task.options).imagenet_recipe(task.mode, epochs)
    if task.mode == "qat":
        values |= {"distill": DISTILLED, **qat_phases(values["epochs"], task.images, values["batch_size"])}
    return base(task, **values)


EMA = 0.98
"""Averages over some 50 steps."""
# The gradient of weights under a batch norm that does not renormalize grows with the square of its gain: up to 75 in
# EfficientNet-Lite0, which at 0.003 forgot what it knew.
KEPT_BATCH_NORM = {"keep_batch_norm": True, "lr": 0.0005, "ema": EMA}


def small_recipe(task: Task, epochs: int | None) -> Recipe:
    """The recipe for some hundred to some ten thousand images.

    The fewer there are, the more often each is seen: about 7,500 crops for trained weights, 50,000 for random
    ones; 10,000 for quantization-aware training, which begins with calibration, or 4,000 of weights that kept their
    batch norms.
    """
    batch = batch_for(task.images)
    if task.mode == "qat":
        epochs = epochs or repeats(task.images, crops=4_000 if task.keep_batch_norm else 10_000, least=2, most=8)
        values = {"calibrate": True, "ema": EMA, "crop_scale": 0.35}
        if task.keep_batch_norm:
            # Labels would teach it more than float knows, and less: what is wanted are float's own answers.
            values |= {"keep_batch_norm": True, "lr": 0.0002, "distill": 1.0}
        else:
            values |= {"lr": 0.005, "distill": DISTILLED}
    elif task.start is not Start.RANDOM:
        epochs = epochs or repeats(task.images, crops=7_500, least=3, most=30)
        values = {"lr": 0.01, "warmup": min(1.0, epochs / 10), "crop_scale": 0.35, "jitter": 0.2}
        if task.start is Start.NEW_CLASSIFIER:
            values["classifier_pictures"] = CLASSIFIER_IMAGES
        if task.start is Start.NEW_CLASSIFIER or task.keep_batch_norm:
            values |= KEPT_BATCH_NORM
    else:
        epochs = epochs or repeats(task.images, crops=50_000, least=30, most=100)
        values = {"lr": 0.02, "warmup": min(3.0, epochs / 10), "crop_scale": 0.25, "jitter": 0.2}
        values["weight_decay"] = 5e-4
    values["lr"] = values["lr"] * batch / 32
    # An epoch has so few steps that slower statistics (EfficientNet's 0.99) would stay behind the weights.
    return base(task, epochs=epochs, batch_size=batch, batch_norm_momentum=0.9, **values)


def synthetic_recipe(task: Task, epochs: int | None) -> Recipe:
    """The recipe for the drawn images: minutes on two cores."""
    counts = {"synthetic_train": 4_000, "synthetic_val": 500}
    if task.mode == "qat":
        epochs = epochs or 1
        phases = {**qat_phases(epochs, counts["synthetic_train"], 32), "observe_batches": 8}
        values = {"lr": 0.002, "batch_size": 32, **phases}
    else:
        epochs = epochs or 3
        values = {"lr": 0.02, "batch_size": 32, "warmup": min(0.5, epochs / 10)}
    return base(task, epochs=epochs, crop_scale=1.0, **values, **counts)


def qat_phases(epochs: int, images: int, batch: int) -> dict[str, Any]:
    """Ranges are watched on some batches before fake quantization starts; batch norms keep their statistics for the
    last half, and activations their ranges for the last third."""
    return {
        "observe_batches": max(1, min(32, images // batch)),
        "freeze_batch_norm": epochs / 2,
        "freeze_observers": epochs * 2 / 3,
    }


def batch_for(images: int) -> int:
    """32, but so few that an epoch has at least four batches where there are hardly any pictures."""
    return max(1, min(32, images // 4))


def repeats(images: int, crops: int, least: int, most: int) -> int:
    """Epochs in which about ``crops`` crops are seen."""
    return max(least, min(most, round(crops / max(1, images))))
