"""The weights that a training begins with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from mgq.data.datasets import Dataset
from mgq.engine.classifier.labelled_sets import adopt_names
from mgq.engine.classifier.open import find_newest_arch, find_newest_run, list_ways_to_weights
from mgq.engine.training.recipe import SYNTHETIC
from mgq.engine.training.train_options import TrainOptions
from mgq.engine.training.training_sets import Sets, read_sets
from mgq.errors import InputError, plural, printable
from mgq.events import Callbacks
from mgq.quantization.modes import Mode
from mgq.weights.foreign_states import State
from mgq.weights.preprocessing import Preprocessing
from mgq.zoo.pretrained import version_in
from mgq.zoo.registry import ModelSpec, spec_of
from mgq.zoo.weight_loading import (
    Weights,
    fetch_published_weights,
    float_part,
    is_cached,
    read_packaged_weights,
    read_weights,
)

DEFAULT_ARCH = "resnet18"


@dataclass(frozen=True)
class InitialWeights:
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


def make_initial_weights(
    spec: ModelSpec, given: Weights | None, sets: Sets, train_options: TrainOptions, callbacks: Callbacks
) -> InitialWeights:
    """What training begins with. Raises InputError where a checkpoint's classes are not those of the pictures."""
    if train_options.from_scratch and (given is not None or train_options.pretrained):
        raise InputError("--from-scratch begins with random weights: leave out --checkpoint and --pretrained")
    from_zoo = given is None
    weights = given
    if weights is None and not train_options.from_scratch:
        weights = zoo_weights(spec, train_options.pretrained, callbacks)
    if weights is None:
        callbacks.on_message(f"{spec.name}: random weights, trained from scratch")
        return InitialWeights(None, "random weights", train_options.options)
    for name, value in train_options.options.items():
        has = {**spec.options, **weights.options}.get(name)
        if has != value:
            raise InputError(f"{weights.origin} has {name} {has}, not {value}; leave the option out")
    state = float_part(weights.state)
    size, how = weights.info.image_size if weights.info else None, weights.preprocessing
    fits = has_classes_of(weights, sets.train)
    if fits and not train_options.new_head:
        callbacks.on_message(f"{spec.name}: begins with {weights.origin}")
        kept = keeps_batch_norm(weights)
        return InitialWeights(state, weights.origin, weights.options, None, size, kept, how)
    if not (from_zoo or train_options.new_head):
        raise InputError(
            f"{weights.origin} answers {classes_in_words(weights)} and {sets.train.name} has "
            f"{len(sets.train.classes)}; pass --new-head to begin with a new classifier"
        )
    callbacks.on_message(f"{spec.name}: begins with {weights.origin}, and a new classifier for these classes")
    head = spec.head.removesuffix("weight")
    body = {name: value for name, value in state.items() if not name.startswith(head)}
    return InitialWeights(body, weights.origin, weights.options, image_size=size, preprocessing=how)


def has_classes_of(weights: Weights, dataset: Dataset) -> bool:
    """Whether the classifier's outputs are the classes of ``dataset`` in order, as far as their names are known."""
    if weights.info is not None:
        return adopt_names(weights.info.classes, dataset) == dataset.classes
    return weights.classes == len(dataset.classes)


def classes_in_words(weights: Weights) -> str:
    if weights.info is None or not weights.info.classes:
        return plural(weights.classes, "class")
    shown = ", ".join(printable(name) for name in weights.info.classes[:3])
    more = f" and {weights.classes - 3} more" if weights.classes > 3 else ""
    return f"{plural(weights.classes, 'class')} ({shown}{more})"


def resolve_network(train_options: TrainOptions, changes: dict[str, Any]) -> tuple[ModelSpec, Weights | None]:
    """The architecture, and the weights of ``--checkpoint``; taken out of ``changes``."""
    in_recipe = changes.pop("arch", None)
    arch = train_options.arch or in_recipe
    if train_options.options:
        changes.pop("options", None)
    if train_options.checkpoint is None:
        return spec_of(arch or DEFAULT_ARCH), None
    spec = spec_of(arch) if arch else None
    weights = read_weights(train_options.checkpoint, spec, key=train_options.key, new_head=train_options.new_head)
    return spec_of(weights.arch), weights


def resolve_float_weights(
    train_options: TrainOptions, changes: dict[str, Any], callbacks: Callbacks
) -> tuple[ModelSpec, Weights | None]:
    """What quantization-aware training begins with; no weights where none fit."""
    if train_options.checkpoint is None and train_options.arch is None and "arch" not in changes:
        train_options = replace(train_options, arch=find_newest_arch(train_options.save, Mode.NORMAL))
    spec, given = resolve_network(train_options, changes)
    if given is not None:
        return spec, given
    if train_options.pretrained:
        return spec, zoo_weights(spec, train_options.pretrained, callbacks)
    run = find_newest_run(spec, Mode.NORMAL, train_options.save)
    if run is not None:
        return spec, read_weights(run, spec)
    data = train_options.data or changes.get("data")
    if data is None or str(data) == SYNTHETIC:
        return spec, None
    found = read_packaged_weights(spec)
    if found is None:
        return spec, None
    sets = read_sets(str(data), None, changes, Callbacks(callbacks.on_progress))
    return spec, found if found.classes == len(sets.train.classes) else None


def zoo_weights(spec: ModelSpec, fetch: bool | str, callbacks: Callbacks) -> Weights | None:
    """The zoo's pretrained weights: those that are installed or were fetched before, or with ``fetch`` any.

    A name, such as ``v1``, asks for that version of them.
    """
    version = version_in(fetch)
    found = None if version else read_packaged_weights(spec)
    if found is not None:
        return found
    if fetch and not version and not spec.checkpoints:
        raise InputError(f"there are no pretrained weights of {spec.name}: {list_ways_to_weights(spec)}")
    if fetch or is_cached(spec, "normal"):
        return fetch_published_weights(spec, "normal", callbacks.on_progress, version)
    return None
