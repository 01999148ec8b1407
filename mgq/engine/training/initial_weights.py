"""The weights that a training begins with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from mgq.data.datasets import Dataset
from mgq.engine.classifier.open import newest_arch, newest_run, ways_to_weights
from mgq.engine.training.recipe import SYNTHETIC
from mgq.engine.training.train_options import Request
from mgq.engine.training.training_sets import Sets, read_sets
from mgq.errors import InputError, printable
from mgq.events import Watcher
from mgq.quantization.modes import Mode
from mgq.weights.foreign_states import State
from mgq.weights.preprocessing import Preprocessing
from mgq.zoo.pretrained import version_in
from mgq.zoo.registry import ModelSpec, spec_of
from mgq.zoo.weight_loading import (
    Weights,
    float_part,
    is_cached,
    packaged_weights,
    published_weights,
    read_weights,
)

DEFAULT_ARCH = "resnet18"


@dataclass(frozen=True)
class Beginning:
    """The weights that a run begins with: none for random ones.

    ``origin`` says where they come from, ``keeps_batch_norm`` whether they were trained with the statistics that batch
    norms had before.
    """

    state: State | None
    origin: str
    options: Mapping[str, Any]
    classes: tuple[str, ...] | None = None
    image_size: int | None = None
    keeps_batch_norm: bool = False
    preprocessing: Preprocessing | None = None


def keeps_batch_norm(weights: Weights) -> bool:
    return bool(weights.info and weights.info.recipe.get("keep_batch_norm"))


def beginning_of(spec: ModelSpec, given: Weights | None, sets: Sets, request: Request, watcher: Watcher) -> Beginning:
    """What training begins with. Raises InputError where a checkpoint's classes are not those of the pictures."""
    if request.from_scratch and (given is not None or request.pretrained):
        raise InputError("--from-scratch begins with random weights: leave out --checkpoint and --pretrained")
    from_zoo = given is None
    weights = given
    if weights is None and not request.from_scratch:
        weights = zoo_weights(spec, request.pretrained, watcher)
    if weights is None:
        watcher.on_remark(f"{spec.name}: random weights, trained from scratch")
        return Beginning(None, "random weights", request.options)
    for name, value in request.options.items():
        has = {**spec.options, **weights.options}.get(name)
        if has != value:
            raise InputError(f"{weights.origin} has {name} {has}, not {value}; leave the option out")
    state = float_part(weights.state)
    size, how = weights.info.image_size if weights.info else None, weights.preprocessing
    fits = has_classes_of(weights, sets.train)
    if fits and not request.new_head:
        watcher.on_remark(f"{spec.name}: begins with {weights.origin}")
        kept = keeps_batch_norm(weights)
        return Beginning(state, weights.origin, weights.options, None, size, kept, how)
    if not (from_zoo or request.new_head):
        raise InputError(
            f"{weights.origin} answers {classes_in_words(weights)} and {sets.train.name} has "
            f"{len(sets.train.classes)}; pass --new-head to begin with a new classifier"
        )
    watcher.on_remark(f"{spec.name}: begins with {weights.origin}, and a new classifier for these classes")
    head = spec.head.removesuffix("weight")
    body = {name: value for name, value in state.items() if not name.startswith(head)}
    return Beginning(body, weights.origin, weights.options, image_size=size, preprocessing=how)


def has_classes_of(weights: Weights, dataset: Dataset) -> bool:
    """Whether the classifier's outputs are the classes of ``dataset`` in order, as far as their names are known."""
    if weights.info is not None:
        return weights.info.classes == dataset.classes
    return weights.classes == len(dataset.classes)


def classes_in_words(weights: Weights) -> str:
    if weights.info is None or not weights.info.classes:
        return f"{weights.classes} classes"
    shown = ", ".join(printable(name) for name in weights.info.classes[:3])
    more = f" and {weights.classes - 3} more" if weights.classes > 3 else ""
    return f"{weights.classes} classes ({shown}{more})"


def wanted_network(request: Request, changes: dict[str, Any]) -> tuple[ModelSpec, Weights | None]:
    """The architecture, and the weights of ``--checkpoint``; taken out of ``changes``."""
    in_recipe = changes.pop("arch", None)
    arch = request.arch or in_recipe
    if request.options:
        changes.pop("options", None)
    if request.checkpoint is None:
        return spec_of(arch or DEFAULT_ARCH), None
    weights = read_weights(request.checkpoint, spec_of(arch) if arch else None, key=request.key)
    return spec_of(weights.arch), weights


def float_weights(request: Request, changes: dict[str, Any], watcher: Watcher) -> tuple[ModelSpec, Weights | None]:
    """What quantization-aware training begins with; no weights where none fit."""
    if request.checkpoint is None and request.arch is None and "arch" not in changes:
        request = replace(request, arch=newest_arch(request.save, Mode.NORMAL))
    spec, given = wanted_network(request, changes)
    if given is not None:
        return spec, given
    if request.pretrained:
        return spec, zoo_weights(spec, request.pretrained, watcher)
    run = newest_run(spec, Mode.NORMAL, request.save)
    if run is not None:
        return spec, read_weights(run, spec)
    data = request.data or changes.get("data")
    if data is None or str(data) == SYNTHETIC:
        return spec, None
    found = packaged_weights(spec)
    if found is None:
        return spec, None
    sets = read_sets(str(data), None, changes, Watcher(watcher.on_progress))
    return spec, found if found.classes == len(sets.train.classes) else None


def zoo_weights(spec: ModelSpec, fetch: bool | str, watcher: Watcher) -> Weights | None:
    """The zoo's pretrained weights: those that are installed or were fetched before, or with ``fetch`` any.

    A name, such as ``v1``, asks for that version of them.
    """
    version = version_in(fetch)
    found = None if version else packaged_weights(spec)
    if found is not None:
        return found
    if fetch and not version and not spec.checkpoints:
        raise InputError(f"there are no pretrained weights of {spec.name}: {ways_to_weights(spec)}")
    if fetch or is_cached(spec, "normal"):
        return published_weights(spec, "normal", watcher.on_progress, version)
    return None
