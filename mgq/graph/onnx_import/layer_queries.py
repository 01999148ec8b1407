"""Questions about the layers of a draft that rules ask."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from mgq.graph.onnx_import.draft import NetworkDraft
from mgq.zoo.blueprint import LayerPlan

Array = npt.NDArray[Any]


def layers(draft: NetworkDraft, *kinds: str) -> Iterator[LayerPlan]:
    """Those of ``kinds``, as they are by now."""
    for plan in list(draft.plans):
        if plan.kind in kinds and draft.plan(plan.name) is plan:
            yield plan


def affine(draft: NetworkDraft, name: str) -> tuple[Array, Array] | None:
    """Scale and shift of the layer ``name``; None where it is no such layer."""
    plan = draft.plan(name)
    if plan is None or plan.kind != "affine":
        return None
    tensors = draft.tensors_of(name)
    return tensors["scale"].astype(np.float64), tensors["shift"].astype(np.float64)


def is_affine(draft: NetworkDraft, name: str, scale: float, shift: float) -> bool:
    found = affine(draft, name)
    return found is not None and all(
        part.size == 1 and math.isclose(float(part.ravel()[0]), value, rel_tol=1e-4, abs_tol=1e-6)
        for part, value in zip(found, (scale, shift), strict=True)
    )


def source_of(draft: NetworkDraft, name: str, kind: str) -> LayerPlan | None:
    """The layer ``name`` where it is of ``kind``."""
    plan = draft.plan(name)
    return plan if plan is not None and plan.kind == kind else None


def to_channel_values(values: Array, channels: int, axes: int) -> Array | None:
    """``values``, which are broadcast to (channels, ...) of so many ``axes``, as (channels,); None where they differ
    within a channel."""
    if values.size == 1:
        return np.full(channels, float(values.ravel()[0]))
    shape = (1,) * (axes - values.ndim) + values.shape
    return values.ravel() if shape == (channels, *(1,) * (axes - 1)) else None
