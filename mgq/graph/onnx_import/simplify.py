"""Layers of a draft joined into those that int8 has kernels for: exact but for float32's rounding."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from mgq.graph.onnx_import.draft import (
    NetworkDraft,
    convolution_options,
    convolution_tensors,
)
from mgq.graph.onnx_import.layer_queries import affine, is_affine, layers, source_of, to_channel_values
from mgq.graph.onnx_import.parallel_branches import join_branches
from mgq.zoo.blueprint import ACTIVATIONS, INPUT, LayerPlan

Array = npt.NDArray[Any]
Rule = Callable[[NetworkDraft], bool]


def simplify(draft: NetworkDraft) -> None:
    """Join layers until nothing more can be joined."""
    draft.drop_unread()
    changed = True
    while changed:
        changed = False
        for rule in RULES:
            changed |= apply(draft, rule)


def apply(draft: NetworkDraft, rule: Rule) -> bool:
    """Change what ``rule`` finds until it finds nothing more: whether it found anything."""
    changed = False
    while rule(draft):
        draft.drop_unread()
        changed = True
    return changed


def drop_probabilities(draft: NetworkDraft) -> None:
    """Let the network answer with logits. What stands between its softmax, or sigmoid, and the end is left out with
    it, as is what moves all scores of a picture alike."""
    for rule in (join_sigmoid, join_softmax):
        apply(draft, rule)
    drop_common_shift(draft)
    behind: list[LayerPlan] = []
    last = draft.plan(draft.output)
    while last is not None and (last.kind == "reshape" or keeps_order(draft, last)):
        behind.append(last)
        last = draft.plan(last.inputs[0])
    if (
        last is None
        or last.kind not in ("softmax", "log_softmax", "sigmoid")
        or not draft.is_read_once_or_last(last.name)
    ):
        return
    for plan in behind:
        draft.sources[plan.name] = draft.sources[last.inputs[0]]
    for plan in behind:
        if plan.kind != "reshape":
            draft.skip(plan)
    draft.skip(last)


def keeps_order(draft: NetworkDraft, plan: LayerPlan) -> bool:
    """Whether ``plan`` makes of all probabilities the same, and more of greater ones."""
    scale, shift = affine(draft, plan.name) or (np.zeros(()), np.zeros(()))
    return plan.kind in ("log", "clip") or (scale.size == shift.size == 1 and float(scale.flat[0]) > 0)


def drop_common_shift(draft: NetworkDraft) -> None:
    """Leave out at the end the difference from one number for each picture, such as the logarithm of a sum of powers:
    probabilities stay the same."""
    last = source_of(draft, draft.output, "sub")
    while last is not None:
        scores, shift = last.inputs
        shape = draft.shape(scores)
        if len(shape) != 2 or shape[1] < 2 or draft.shape(shift) != (1, 1):
            return
        draft.output = scores
        draft.drop_unread()
        last = source_of(draft, draft.output, "sub")


def join_hard_sigmoid(draft: NetworkDraft) -> bool:
    """(x + 3) limited to 0 and 6, times 1/6, is a hard sigmoid."""
    for plan in layers(draft, "clip"):
        before = plan.inputs[0]
        if (plan.options["low"], plan.options["high"]) != (0, 6) or not is_affine(draft, before, 1, 3):
            continue
        inner = draft.plan(before)
        assert inner is not None
        name = draft.insert_before(plan, "hard_sigmoid", [inner.inputs[0]], {"alpha": 1 / 6, "beta": 0.5})
        draft.take_over(insert_scale(draft, plan, name, 6.0), plan)
        return True
    return False


def join_sigmoid(draft: NetworkDraft) -> bool:
    """1 / (1 + exp(-x)), as JAX's exporter spells it, is a sigmoid."""
    for plan in layers(draft, "reciprocal"):
        grown = draft.plan(plan.inputs[0])
        inner = source_of(draft, grown.inputs[0], "exp") if grown is not None else None
        turned = draft.plan(inner.inputs[0]) if inner is not None else None
        if grown is None or turned is None or not is_affine(draft, grown.name, 1, 1):
            continue
        if turned.kind == "neg" or is_affine(draft, turned.name, -1, 0):
            draft.take_over(draft.insert_before(plan, "sigmoid", [turned.inputs[0]], {}), plan)
            return True
    return False


def join_softmax(draft: NetworkDraft) -> bool:
    """exp(x) divided by the sum of these along an axis is a softmax, whatever was taken from x along it."""
    for plan in layers(draft, "div"):
        powers, total = source_of(draft, plan.inputs[0], "exp"), draft.plan(plan.inputs[1])
        mean = source_of(draft, total.inputs[0], "mean") if total is not None else None
        if powers is None or total is None or mean is None or mean.inputs[0] != powers.name:
            continue
        axes = list(mean.options["axes"])
        if len(axes) != 1 or not is_affine(draft, total.name, draft.shape(powers.name)[axes[0]], 0):
            continue
        source, inner = powers.inputs[0], source_of(draft, powers.inputs[0], "sub")
        if inner is not None and draft.shape(inner.inputs[1]) == draft.shape(mean.name):
            source = inner.inputs[0]
        draft.take_over(draft.insert_before(plan, "softmax", [source], {"axis": axes[0]}), plan)
        return True
    return False


def insert_scale(draft: NetworkDraft, plan: LayerPlan, name: str, scale: float | Array) -> str:
    """A layer in front of ``plan`` that gives ``scale``, one number, times what ``name`` gives: its name."""
    tensors = {"scale": np.asarray(scale), "shift": np.zeros(())}
    return draft.insert_before(plan, "affine", [name], {"constants": {"scale": [], "shift": []}}, tensors)


def move_scale_behind_product(draft: NetworkDraft) -> bool:
    """x * (6 y) is 6 (x * y): the scale goes behind, where it meets the one that undoes it."""
    for plan in layers(draft, "mul"):
        for place, name in enumerate(plan.inputs):
            found = affine(draft, name)
            if found is None or any(part.size != 1 for part in found) or found[1].any() or not draft.is_read_once(name):
                continue
            if float(found[0].ravel()[0]) == 1.0:
                continue
            inner = draft.plan(name)
            assert inner is not None
            inputs = [inner.inputs[0] if i == place else other for i, other in enumerate(plan.inputs)]
            product = draft.insert_before(plan, "mul", inputs, dict(plan.options))
            draft.take_over(insert_scale(draft, plan, product, found[0].reshape(())), plan)
            return True
    return False


def join_swish(draft: NetworkDraft) -> bool:
    """x * sigmoid(x), x * hard_sigmoid(x) and x * (1 + erf(x / sqrt 2)) are activations."""
    for plan in layers(draft, "mul"):
        for one, other in (plan.inputs, plan.inputs[::-1]):
            kind, factor = swish_kind(draft, one, other)
            if not kind:
                continue
            name = draft.insert_before(plan, kind, [one], {})
            if factor != 1:
                name = insert_scale(draft, plan, name, factor)
            draft.take_over(name, plan)
            return True
    return False


def swish_kind(draft: NetworkDraft, one: str, gate: str) -> tuple[str, float]:
    """What ``one`` * ``gate`` is as an activation of ``one``, and how many times that."""
    plan = draft.plan(gate)
    if plan is None:
        return "", 1
    if plan.kind == "sigmoid" and plan.inputs == (one,):
        return "silu", 1
    is_hard = plan.kind == "hard_sigmoid" and plan.inputs == (one,)
    if is_hard and math.isclose(plan.options["alpha"], 1 / 6, rel_tol=1e-4) and plan.options["beta"] == 0.5:
        return "hard_swish", 1
    if is_affine(draft, gate, 1, 1):
        inner = source_of(draft, plan.inputs[0], "erf")
        scaled = draft.plan(inner.inputs[0]) if inner is not None else None
        if scaled is not None and scaled.inputs == (one,) and is_affine(draft, scaled.name, math.sqrt(0.5), 0):
            return "gelu", 2
    return "", 1


def drop_expansion(draft: NetworkDraft) -> bool:
    """What is as large as the other operand without being repeated needs no repeating."""
    for plan in layers(draft, "add", "sub", "mul", "div"):
        for place, name in enumerate(plan.inputs):
            inner = source_of(draft, name, "expand")
            other = draft.shape(plan.inputs[1 - place])
            if inner is None or np.broadcast_shapes(draft.shape(inner.inputs[0]), other) != draft.shape(plan.name):
                continue
            inputs = [inner.inputs[0] if i == place else old for i, old in enumerate(plan.inputs)]
            if plan.kind in ("add", "mul") and place == 0:  # what is broadcast comes second
                inputs.reverse()
            draft.replace(plan, plan.with_inputs(inputs))
            return True
    return False


def join_layer_norm(draft: NetworkDraft) -> bool:
    """What is centred, divided by its deviation along the last axis, is a layer norm."""
    for plan in layers(draft, "div"):
        epsilon = deviation_of(draft, *plan.inputs)
        centred = source_of(draft, plan.inputs[0], "sub")
        if epsilon is None or centred is None or not is_mean(draft, centred.inputs[1], centred.inputs[0]):
            continue
        size = draft.shape(plan.name)[-1]
        tensors = {"scale": np.ones(size), "shift": np.zeros(size)}
        shapes = {name: [size] for name in tensors}
        options = {"eps": epsilon, "constants": shapes}
        draft.take_over(draft.insert_before(plan, "layer_norm", [centred.inputs[0]], options, tensors), plan)
        return True
    return False


def deviation_of(draft: NetworkDraft, centred: str, name: str) -> float | None:
    """What is added to the variance of ``centred`` along the last axis, the root of which is ``name``; None where that
    is something else."""
    root = source_of(draft, name, "sqrt")
    variance = source_of(draft, root.inputs[0], "affine") if root is not None else None
    mean = draft.plan(variance.inputs[0]) if variance is not None else None
    if variance is None or mean is None or not is_mean(draft, mean.name, mean.inputs[0]):
        return None
    squares = draft.plan(mean.inputs[0])
    if squares is None or set(squares.inputs) != {centred}:
        return None
    is_square = squares.kind == "mul" or (squares.kind == "pow" and squares.options["power"] == 2)
    scale, shift = affine(draft, variance.name) or (np.zeros(()), np.zeros(()))
    return float(shift.ravel()[0]) if is_square and shift.size == 1 and (scale == 1).all() else None


def is_mean(draft: NetworkDraft, name: str, source: str) -> bool:
    """Whether ``name`` is the mean of ``source`` along the last axis."""
    plan = source_of(draft, name, "mean")
    last = len(draft.shape(source)) - 1
    return plan is not None and plan.inputs == (source,) and list(plan.options["axes"]) == [last]


def join_affine_into_layer_norm(draft: NetworkDraft) -> bool:
    """A scale and shift along the last axis behind a layer norm are its own."""
    for plan in layers(draft, "affine"):
        before = source_of(draft, plan.inputs[0], "layer_norm")
        if before is None or not draft.is_read_once(before.name):
            continue
        scale, shift = affine(draft, plan.name) or (np.ones(()), np.zeros(()))
        size = draft.shape(plan.name)[-1]
        if any(part.size not in (1, size) or part.shape[-1:] not in ((), (1,), (size,)) for part in (scale, shift)):
            continue
        own = draft.tensors_of(before.name)
        tensors = {
            "scale": own["scale"] * scale.ravel(),
            "shift": own.get("shift", np.zeros(size)) * scale.ravel() + shift.ravel(),
        }
        draft.set_tensors(before.name, tensors)
        draft.absorb(before, plan, before.with_options(constants={name: [size] for name in tensors}))
        return True
    return False


def join_affines(draft: NetworkDraft) -> bool:
    """Two affine layers in a row are one; one that changes nothing is none."""
    for plan in layers(draft, "affine"):
        scale, shift = affine(draft, plan.name) or (np.ones(()), np.zeros(()))
        if np.allclose(scale, 1, rtol=1e-6, atol=0) and not shift.any():
            source = plan.inputs[0]
            if source in draft.sources and draft.is_read_once(source):
                draft.sources[source] = draft.sources[plan.name]
            draft.skip(plan)
            return True
        inner = affine(draft, plan.inputs[0])
        if inner is None or not draft.is_read_once(plan.inputs[0]):
            continue
        before = draft.plan(plan.inputs[0])
        assert before is not None
        tensors = {"scale": inner[0] * scale, "shift": inner[1] * scale + shift}
        shapes = {name: list(value.shape) for name, value in tensors.items()}
        draft.set_tensors(before.name, tensors)
        draft.norms.pop(before.name, None)
        draft.absorb(before, plan, before.with_options(constants=shapes))
        return True
    return False


def join_affine_into_weights(draft: NetworkDraft) -> bool:
    """A scale and shift of each output go into the convolution or the linear layer before."""
    for plan in layers(draft, "affine"):
        before = draft.plan(plan.inputs[0])
        if before is None or not draft.is_read_once(before.name) or before.kind not in ("conv", "linear"):
            continue
        shape = draft.shape(before.name)
        scale, shift = (to_channel_values(v, shape[1], len(shape) - 1) for v in affine(draft, plan.name) or ())
        if scale is None or shift is None or before.options.get("activation"):
            continue
        changed = before
        if before.kind == "linear":
            tensors = draft.tensors_of(before.name)
            weight, bias = tensors["weight"] * scale[:, None], tensors["bias"] * scale + shift
            draft.set_tensors(before.name, {"weight": weight, "bias": bias})
        else:
            changed = join_norm(draft, before, plan, scale, shift)
        draft.absorb(before, plan, changed)
        return True
    return False


def join_norm(draft: NetworkDraft, conv: LayerPlan, plan: LayerPlan, scale: Array, shift: Array) -> LayerPlan:
    """``scale`` and ``shift`` in the batch norm of ``conv``: as the file's own, where it has none yet."""
    tensors = draft.tensors_of(conv.name)
    shape = tensors["bn.bias"].shape
    own = draft.norms.get(plan.name)
    if own is not None and not conv.options["normalized"]:
        parts, epsilon = own
        # A bias of the convolution moves the mean that the norm takes away.
        moved = {**parts, "running_mean": parts["running_mean"] - tensors["bn.bias"].ravel()}
        draft.set_tensors(
            conv.name, {**tensors, **{f"bn.{name}": value.reshape(shape) for name, value in moved.items()}}
        )
        return conv.with_options(normalized=True, eps=epsilon)
    tensors["bn.weight"] = tensors["bn.weight"] * scale.reshape(shape)
    tensors["bn.bias"] = tensors["bn.bias"] * scale.reshape(shape) + shift.reshape(shape)
    draft.set_tensors(conv.name, tensors)
    return conv


def join_linears(draft: NetworkDraft) -> bool:
    """Two linear layers in a row are one."""
    for plan in layers(draft, "linear"):
        before = source_of(draft, plan.inputs[0], "linear")
        if before is None or not draft.is_read_once(before.name):
            continue
        first, second = (
            {name: value.astype(np.float64) for name, value in draft.tensors_of(layer.name).items()}
            for layer in (before, plan)
        )
        bias = second["weight"] @ first["bias"] + second["bias"]
        draft.set_tensors(before.name, {"weight": second["weight"] @ first["weight"], "bias": bias})
        draft.absorb(before, plan, before.with_options(outputs=plan.options["outputs"]))
        return True
    return False


def join_pad(draft: NetworkDraft) -> bool:
    """Zeros around a picture go into the convolution behind, where they are the same on both sides."""
    for plan in layers(draft, "conv"):
        pad = source_of(draft, plan.inputs[0], "pad")
        if pad is None or pad.options["value"] or not draft.is_read_once(pad.name) or "channels" in pad.options:
            continue
        top, left, bottom, right = pad.options["pads"]
        if (top, left) != (bottom, right):
            continue
        own = plan.options["padding"]
        draft.replace(plan, plan.with_options(padding=[own[0] + top, own[1] + left]).with_inputs(pad.inputs))
        draft.remove(pad)
        return True
    return False


def join_activation(draft: NetworkDraft) -> bool:
    """ReLU, and ReLU6, belong to the convolution or the sum before."""
    for plan in layers(draft, "relu", "clip"):
        before = draft.plan(plan.inputs[0])
        is_relu = plan.kind == "relu"
        if before is None or not draft.is_read_once(before.name):
            continue
        if not is_relu and (plan.options["low"], plan.options["high"]) != (0, 6):
            continue
        if before.kind == "conv" and not before.options["activation"]:
            draft.absorb(before, plan, before.with_options(activation="relu" if is_relu else "relu6"))
            return True
        if before.kind == "add" and is_relu and not before.options.get("relu"):
            draft.absorb(before, plan, before.with_options(relu=True))
            return True
    return False


def make_convolution_of_linear(draft: NetworkDraft) -> bool:
    """Linear layers in the middle are convolutions of one position: so they have grids and activations."""
    for plan in layers(draft, "linear"):
        if plan.name == draft.output:
            continue
        tensors = draft.tensors_of(plan.name)
        weight = tensors["weight"][:, :, None, None]
        shape = [plan.options["inputs"], 1, 1]
        flat = draft.insert_before(plan, "reshape", list(plan.inputs), {"shape": shape})
        conv = draft.insert_before(
            plan, "conv", [flat], convolution_options(weight, 1), convolution_tensors(weight, tensors["bias"], 1)
        )
        back = draft.insert_before(plan, "reshape", [conv], {"shape": [plan.options["outputs"]]})
        draft.take_over(back, plan)
        return True
    return False


def join_reshapes(draft: NetworkDraft) -> bool:
    """Two in a row are one, and one that changes nothing is none."""
    for plan in layers(draft, "reshape"):
        before = draft.plan(plan.inputs[0])
        if draft.shape(plan.inputs[0]) == draft.shape(plan.name) and plan.inputs[0] != INPUT:
            if draft.is_read_once(plan.inputs[0]):
                draft.sources[plan.inputs[0]] = draft.sources[plan.name]
            draft.skip(plan)
            return True
        if before is not None and before.kind == "reshape":
            draft.replace(plan, plan.with_inputs(before.inputs))
            return True
    return False


def join_transposes(draft: NetworkDraft) -> bool:
    """Two in a row are one, and one that changes nothing is none."""
    for plan in layers(draft, "transpose"):
        axes, before = plan.options["axes"], draft.plan(plan.inputs[0])
        if axes == list(range(len(axes))):
            draft.skip(plan)
            return True
        if before is not None and before.kind == "transpose":
            order = [before.options["axes"][axis] for axis in axes]
            draft.replace(plan, plan.with_options(axes=order).with_inputs(before.inputs))
            return True
    return False


def move_before_transpose(draft: NetworkDraft) -> bool:
    """What is done to each number, and to each channel, behind a transposition goes before it, to the convolution."""
    for plan in layers(draft, "affine", *ACTIVATIONS):
        before = source_of(draft, plan.inputs[0], "transpose")
        inner = draft.plan(before.inputs[0]) if before is not None else None
        if before is None or inner is None or inner.kind != "conv":
            continue
        if not draft.is_read_once(before.name) or not draft.is_read_once(inner.name) or before.options["axes"][0] != 0:
            continue
        places = np.argsort([axis - 1 for axis in before.options["axes"][1:]])
        tensors = {name: transpose(value, places) for name, value in draft.tensors_of(plan.name).items()}
        options = {name: value for name, value in plan.options.items() if name != "constants"}
        moved = draft.insert_before(before, plan.kind, [inner.name], options, tensors)
        draft.absorb(before, plan, before.with_inputs([moved]))
        return True
    return False


def transpose(value: Array, places: Array) -> Array:
    """``value``, which is broadcast to as many axes as there are ``places``, with its axes in their order."""
    if value.size == 1:
        return value
    return value.reshape((1,) * (len(places) - value.ndim) + value.shape).transpose(places)


def move_activation_before_reshape(draft: NetworkDraft) -> bool:
    """An activation behind a reshape goes before it, to the convolution that it belongs to."""
    for plan in layers(draft, "relu", "clip"):
        before = source_of(draft, plan.inputs[0], "reshape")
        inner = draft.plan(before.inputs[0]) if before is not None else None
        if before is None or inner is None or inner.kind != "conv" or not draft.is_read_once(before.name):
            continue
        if not draft.is_read_once(inner.name):
            continue
        moved = draft.insert_before(before, plan.kind, [inner.name], dict(plan.options))
        draft.absorb(before, plan, before.with_inputs([moved]))
        return True
    return False


def move_affine_before_reshape(draft: NetworkDraft) -> bool:
    """A scale and shift along the last axis, behind a reshape that leaves this axis as it is, go before it."""
    for plan in layers(draft, "affine"):
        before = source_of(draft, plan.inputs[0], "reshape")
        if before is None or not draft.is_read_once(before.name) or before.inputs[0] == INPUT:
            continue
        size = draft.shape(plan.name)[-1]
        parts = affine(draft, plan.name) or ()
        if draft.shape(before.inputs[0])[-1] != size or any(
            part.size > 1 and part.shape[-1] != part.size for part in parts
        ):
            continue
        tensors = {
            name: value.ravel() if value.size > 1 else value.reshape(())
            for name, value in draft.tensors_of(plan.name).items()
        }
        shapes = {name: list(value.shape) for name, value in tensors.items()}
        moved = draft.insert_before(before, "affine", list(before.inputs), {"constants": shapes}, tensors)
        draft.absorb(before, plan, before.with_inputs([moved]))
        return True
    return False


def make_convolution_of_affine(draft: NetworkDraft) -> bool:
    """A scale and shift of each channel of a picture is a depthwise convolution of single positions."""
    for plan in layers(draft, "affine"):
        shape = draft.shape(plan.name)
        if len(shape) != 4:
            continue
        scale, shift = (to_channel_values(v, shape[1], 3) for v in affine(draft, plan.name) or ())
        readers = draft.readers(plan.name)
        if scale is None or shift is None or not any(r.kind in ("relu", "conv", "clip") for r in readers):
            continue
        channels = shape[1]
        weight = np.ones((channels, 1, 1, 1))
        tensors = convolution_tensors(weight, None, channels)
        conv = draft.insert_before(plan, "conv", list(plan.inputs), convolution_options(weight, channels), tensors)
        draft.absorb(draft.find_layer(conv), plan, join_norm(draft, draft.find_layer(conv), plan, scale, shift))
        return True
    return False


def mark_gates(draft: NetworkDraft) -> bool:
    """A product with numbers from 0 to 1 is not below what it scales."""
    for plan in layers(draft, "mul"):
        gate = draft.plan(plan.inputs[1])
        if gate is not None and gate.kind in ("sigmoid", "hard_sigmoid") and "gate" not in plan.options:
            draft.replace(plan, plan.with_options(gate=True))
            return True
    return False


RULES: tuple[Rule, ...] = (
    join_hard_sigmoid,
    join_sigmoid,
    join_softmax,
    join_swish,
    move_scale_behind_product,
    drop_expansion,
    join_layer_norm,
    join_affine_into_layer_norm,
    join_affines,
    join_affine_into_weights,
    join_reshapes,
    join_branches,
    join_linears,
    join_pad,
    join_activation,
    make_convolution_of_linear,
    join_transposes,
    move_before_transpose,
    move_activation_before_reshape,
    move_affine_before_reshape,
    make_convolution_of_affine,
    mark_gates,
)
"""Each changes one thing and says so, or finds nothing to change."""
