"""Reads what describes a file of PyTorch weights besides its tensors: its ``arch``, name, folder and config.json.

Normalization, padding and crop are not in a state dict. In timm's files they follow from the model's name with its
training's tag (``resnet18.a1_in1k``), which its ``train.py`` keeps in the file as ``arch``, or from the ``config.json``
that lies beside every ``model.safetensors`` of a hub.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mgq.errors import InputError, printable
from mgq.io.limited_io import object_in, text_of
from mgq.weights.foreign_states import HALF_RGB, NO_HINTS, Hints, InputNormalization
from mgq.weights.preprocessing import COMMON_PREPROCESSING, Preprocessing
from mgq.zoo.registry import identify_checkpoint

HUB_NAMES = frozenset({"model.safetensors", "pytorch_model.bin"})
"""What a hub calls the weights of every model: the name says nothing, the folder does."""
CONFIG, MOST_CONFIG_BYTES = "config.json", 1 << 16
LONGEST_NAME = 80
NEAREST_FOLDERS = 3  # models--timm--NAME/snapshots/REVISION/model.safetensors
MODEL = re.compile(
    r"(?:tf_)?efficientnet[_-]lite\d|mobilenetv2_\d{3}d?(?:\.[a-z0-9_]+)?|resnet(?:18|34|50)\.[a-z0-9]+(?:_[a-z0-9]+)*"
)
BICUBIC_95 = Preprocessing(1 / 0.95, "bicubic")
BICUBIC = Preprocessing(interpolation="bicubic")
RECIPES: Mapping[str, Preprocessing] = {
    **dict.fromkeys(("a1", "a2", "a3", "b1k", "b2k", "c1", "c2", "d"), BICUBIC_95),
    **dict.fromkeys(("ra", "ram", "am", "gluon", "bt", "lamb"), BICUBIC),
    "a1h": Preprocessing(1.0, "bicubic"),
    "ra4": Preprocessing(1 / 0.9, "bicubic"),
    "tv": COMMON_PREPROCESSING,
    "tv2": Preprocessing(1 / 0.965),
    "fb": COMMON_PREPROCESSING,
}
"""How timm crops for a recipe of its own, by the first word of the tag; at 224 pixels where it names several sizes."""
LITE_CROPS: Mapping[str, float] = {"0": 0.875, "1": 0.882, "2": 0.89}
"""timm's share of a resized picture that ``tf_efficientnet_lite`` with this number sees."""


def hints_of(path: Path, arch: str | None = None) -> Hints:
    """What is known of the weights in ``path``, which itself calls its architecture ``arch``.

    The file's content takes precedence over its name; the hints are empty where neither is known.
    """
    published = identify_checkpoint(path)
    if published is not None:
        model = f"{published.publisher}'s {published.version}"
        return Hints(model, "by its SHA-256", preprocessing=published.preprocessing)
    kept = read_hints(arch, "by the arch in the file") if arch is not None else NO_HINTS
    if kept.model:
        return kept
    if path.name not in HUB_NAMES:
        return read_hints(path.name, "by the file's name")
    found = from_config(path.with_name(CONFIG))
    if found is not None:
        return found
    parents = list(path.absolute().parents)[:NEAREST_FOLDERS]
    return next(
        (hints for folder in parents if (hints := read_hints(folder.name, "by the folder's name")).model), NO_HINTS
    )


def read_hints(text: str, told_by: str) -> Hints:
    """What the name of a model in ``text`` tells; nothing where there is none."""
    match = MODEL.search(text.lower())
    if match is None:
        return NO_HINTS
    model = match[0][:LONGEST_NAME].replace("-lite", "_lite").removesuffix(".safetensors").removesuffix(".pth")
    recipe = model.partition(".")[2].partition("_")[0]
    if model.startswith("resnet") and recipe not in RECIPES:
        return NO_HINTS  # as in resnet18.pth
    normalization = HALF_RGB if recipe == "ra4" else None
    return Hints(model, told_by, normalization, crop_of(model, recipe))


def crop_of(model: str, recipe: str) -> Preprocessing | None:
    if model.startswith("tf_"):
        share = LITE_CROPS.get(model[-1], LITE_CROPS["0"])
        return Preprocessing(1 / share, "bicubic")
    return RECIPES.get(recipe)


def from_config(path: Path) -> Hints | None:
    """What timm's ``config.json`` at ``path`` tells; None where it is no such file or says nothing of a model.

    Raises InputError where it cannot be read or tells what cannot be.
    """
    if not path.is_file():
        return None
    try:
        body = object_in(text_of(path, MOST_CONFIG_BYTES))
        model, how = body["architecture"], body.get("pretrained_cfg") or {}
        if not isinstance(model, str):
            return None
        return Hints(printable(model)[:LONGEST_NAME], f"by {CONFIG}", normalization_in(how), preprocessing_of(how))
    except (KeyError, TypeError, AttributeError):
        return None  # of another library
    except ValueError:
        raise InputError(
            f"{printable(path)} tells no normalization or crop that can be: correct it or take it away"
        ) from None


def normalization_in(how: Mapping[str, Any]) -> InputNormalization | None:
    if "mean" not in how or "std" not in how:
        return None
    mean, std = (tuple(255 * float(value) for value in how[name]) for name in ("mean", "std"))
    if len(mean) != 3 or len(std) != 3 or not all(map(math.isfinite, (*mean, *std))) or min(std) <= 0:
        raise ValueError("no mean and standard deviation of RGB")
    return InputNormalization((mean[0], mean[1], mean[2]), (std[0], std[1], std[2]))


def preprocessing_of(how: Mapping[str, Any]) -> Preprocessing | None:
    if "crop_pct" not in how:
        return None
    share = float(how["crop_pct"])
    if not 0 < share <= 1:
        raise ValueError("no share of a picture")
    return Preprocessing(1 / share, "bilinear" if how.get("interpolation") == "bilinear" else "bicubic")
