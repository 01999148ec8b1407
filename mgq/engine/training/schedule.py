"""Learning rates as functions of the epoch."""

from __future__ import annotations

import math

from mgq.engine.training.recipe import Recipe


def learning_rate(recipe: Recipe, epoch: float) -> float:
    """The learning rate at ``epoch``, which counts from 0 and may be a fraction, up to ``recipe.epochs``.

    ``step``: times ``gamma`` at each milestone. ``linear``: straight down to 0. ``cosine``: half a cosine down to 0
    (arXiv:1608.03983). During the first ``warmup`` epochs it rises from 0. Several devices multiply it
    (arXiv:1706.02677).
    """
    lr = recipe.lr * recipe.devices
    if epoch < recipe.warmup:
        return lr * epoch / recipe.warmup
    if recipe.schedule == "step":
        return lr * recipe.gamma ** sum(epoch >= milestone for milestone in recipe.milestones)
    left = 1 - (epoch - recipe.warmup) / max(recipe.epochs - recipe.warmup, 1e-9)
    share = max(0.0, min(1.0, left))
    return lr * (share if recipe.schedule == "linear" else (1 - math.cos(math.pi * share)) / 2)
