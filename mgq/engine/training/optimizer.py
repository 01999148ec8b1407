"""The optimizer of a training: which parameters learn, how fast each does, and which decay."""

from __future__ import annotations

from collections.abc import Mapping

import megengine.module as M
from megengine import Tensor
from megengine.optimizer import SGD

from mgq.engine.training.input_layer import find_input_layer
from mgq.engine.training.recipe import Recipe
from mgq.zoo.registry import spec_of
from mgq.zoo.weight_loading import is_observed


def select_parameters(recipe: Recipe, network: M.Module) -> dict[str, Tensor]:
    """Name -> parameter, of those that the recipe trains."""
    named = dict(network.named_parameters())
    if recipe.freeze_backbone:
        return {name: value for name, value in named.items() if name.startswith(head_of(recipe))}
    return named


def head_of(recipe: Recipe) -> str:
    """What the names of the classifier's parameters begin with."""
    return spec_of(recipe.arch).head.removesuffix("weight")


def sgd(recipe: Recipe, parameters: Mapping[str, Tensor]) -> SGD:
    """Stochastic gradient descent with momentum; weight decay as the recipe extends it, never on trained scales.

    Each group of parameters has its ``lr_factor``, by which the recipe's learning rate is multiplied.
    """
    stem = find_input_layer(parameters)
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for name, parameter in parameters.items():
        decays = not is_observed(name) and (recipe.decay_all or is_matrix(parameter))
        factor = recipe.stem_lr if name == stem else 1.0
        groups.setdefault((recipe.weight_decay if decays else 0.0, factor), []).append(parameter)
    return SGD(
        [
            {"params": group, "weight_decay": decay, "lr": recipe.lr * factor, "lr_factor": factor}
            for (decay, factor), group in groups.items()
        ],
        lr=recipe.lr,
        momentum=recipe.momentum,
    )


def is_matrix(parameter: Tensor) -> bool:
    """Whether it has more than one dimension, axes of length 1 left aside."""
    return sum(int(axis) > 1 for axis in parameter.shape) > 1
