"""From an ONNX model to a draft of a network: constants are folded, every other node becomes a layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from mgq.errors import InputError, printable
from mgq.graph.onnx_import.batch_mixing import (
    OF_CHANNELS,
    lift,
    lift_channels,
    reshape_to_picture,
    settle,
    settle_channels,
)
from mgq.graph.onnx_import.composed_operators import COMPOSED
from mgq.graph.onnx_import.computed_norms import is_computed_norm, read_computed_norm
from mgq.graph.onnx_import.constants import FOLDED, attributes_of, fold
from mgq.graph.onnx_import.draft import NetworkDraft
from mgq.graph.onnx_import.operators import READERS, BatchMixedError, Operator, Scope, UnknownFormError
from mgq.graph.onnx_import.sequences import SEQUENCES, spell_out
from mgq.graph.onnx_import.simplify import drop_probabilities, simplify
from mgq.zoo.blueprint import INPUT

Array = npt.NDArray[Any]
UNTOLD = "An async error"
"""How MegEngine's message begins where it does not say what is wrong."""
MOST_NUMBERS = 1 << 27
"""In what a layer gives for one picture."""


def read_network(
    model: Any,
    constants: Mapping[str, Array],
    input_name: str,
    output: str,
    sample: Array,
    channels_last: bool = False,
    pictures: int = 1,
    takes_pixels: bool = False,
) -> NetworkDraft:
    """The network of ``model``, an ``onnx.ModelProto`` without functions, whose weights are ``constants``.

    ``output``: the tensor that is its answer. ``sample``: float32 (1, C, H, W), what its input ``input_name`` may be,
    with the axes (1, H, W, C) where ``channels_last``; the file takes so many ``pictures`` at once, and
    where ``takes_pixels`` they are uint8. The draft takes (N, C, H, W) and ends in logits: a softmax or
    sigmoid at the end is left out. Raises InputError that names the first node that cannot be imported, and the opset.
    """
    opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    draft = NetworkDraft()
    names = frozenset(name for node in model.graph.node for name in names_read(node)) | {output}
    scope = Scope(draft, opset, dict(constants), {}, pictures=pictures, takes_pixels=takes_pixels, read=names)
    draft.samples[INPUT] = sample
    scope.layers[input_name] = INPUT
    if channels_last:
        scope.layers[input_name] = draft.add("transpose", [INPUT], "", {"axes": [0, 2, 3, 1]})
    for place, node in enumerate(model.graph.node):
        read(node, place, scope)
    if output not in scope.layers:
        raise InputError("gives an answer that does not depend on the picture: give a classifier")
    draft.output = scope.layers[output]
    drop_probabilities(draft)
    end_in_classes(draft)
    simplify(draft)
    return draft


def names_read(node: Any) -> set[str]:
    """What ``node`` reads, also in its branches."""
    branches = [attribute.g for attribute in node.attribute]
    return set(node.input).union(*(names_read(inner) for branch in branches for inner in branch.node))


def read(node: Any, place: int, scope: Scope) -> None:
    """Fold ``node`` where all it reads is known, or else make a layer of it. Raises InputError that names it."""
    what = f"{printable(node.op_type)[:40]} '{printable(node.name or f'number {place + 1}')[:80]}'"
    what += f" (opset {scope.opset})"
    if node.domain not in ("", "ai.onnx"):
        raise InputError(
            f"has a {printable(node.domain)[:40]}.{what}, which is not imported: {instead_of(node.domain)}"
        )
    known = all(name in scope.constants for name in node.input if name)
    try:
        if node.op_type in SEQUENCES:
            read_sequence(node, place, scope)
        elif node.op_type == "Shape" and not known:
            fold_shape(node, scope)
        elif known and node.op_type in FOLDED:
            outputs = fold(node, scope.constants, scope.opset)
            scope.constants.update(zip(node.output, outputs, strict=False))
        elif is_known_picture(node, scope):
            fold_by_layers(node, scope)
        elif node.op_type == "If":
            read_branch(node, scope)
        elif node.op_type not in READERS and node.op_type not in COMPOSED:
            raise InputError(f"has a {what}, which is not imported")
        else:
            before = len(scope.draft.plans)
            read_operator(node, scope)
            refuse_huge(scope, node)
            refuse_infinite(scope.draft, before)
    except InputError:
        raise
    except UnknownFormError as error:
        raise InputError(
            f"has a {what} that {error}" + ("" if ": " in str(error) else ", which is not imported")
        ) from None
    except Exception as error:
        reason = printable(str(error).strip().partition("\n")[0].partition(" failed at ")[0])[:120]
        why = "" if reason.startswith(UNTOLD) else f" ({reason})"
        raise InputError(f"has a {what} that does not fit what it reads{why}: export it again") from None


def instead_of(domain: str) -> str:
    """What may be done about a file with operators of ``domain``."""
    if domain.startswith("com.microsoft"):
        return "ONNX Runtime wrote it for its own use: give the file from before, or optimize it at the level basic"
    return "use ONNX's own operators"


def is_known_picture(node: Any, scope: Scope) -> bool:
    """Whether ``node`` makes of one known picture, as embeddings of places are, what its layers make of any."""
    if not (node.op_type in READERS or node.op_type in COMPOSED):
        return False
    if any(name and name not in scope.constants for name in node.input):
        return False
    value = scope.constants.get(node.input[0]) if node.input else None
    return value is not None and value.ndim == 4 and len(value) == 1 and value.dtype == np.float32


def fold_by_layers(node: Any, scope: Scope) -> None:
    """What the layers of ``node`` make of the constant that it reads is known, too."""
    apart, source = NetworkDraft(), node.input[0]
    apart.samples[INPUT] = scope.constants[source]
    others = {name: value for name, value in scope.constants.items() if name in node.input[1:]}
    inner = Scope(apart, scope.opset, others, {source: INPUT}, read=scope.read)
    make_layers(node, inner)
    scope.constants.update((name, apart.samples[layer]) for name, layer in inner.layers.items() if name != source)


def read_operator(node: Any, scope: Scope) -> None:
    """Make layers of ``node``: as it stands, or with the axis of pictures in front where it takes the first for
    another."""
    operator = Operator(node, scope, attributes_of(node))
    if is_computed_norm(operator):
        read_computed_norm(operator)
        return
    if not scope.without_batch & set(node.input):
        try:
            make_layers(node, scope)
        except BatchMixedError:
            pass
        else:
            return
    if node.op_type in OF_CHANNELS and len(scope.file_shape(node.input[0])) > 2:
        make_layers(lift_channels(node, scope), scope)
        settle_channels(node, scope.file_shape(node.input[0])[0], scope)
        return
    if reshape_to_picture(node, scope):
        return
    lifted = lift(node, scope)
    make_layers(lifted, scope)
    settle(lifted, scope)


def make_layers(node: Any, scope: Scope) -> None:
    reader = READERS.get(node.op_type) or COMPOSED[node.op_type]
    reader(Operator(node, scope, attributes_of(node)))


def read_sequence(node: Any, place: int, scope: Scope) -> None:
    """The nodes that ``node`` stands for. The tensors between them are not the file's own."""
    known, sources, output = len(scope.draft.plans), scope.draft.sources, node.output[0]
    for inner in spell_out(node, scope):
        read(inner, place, scope)
    sources.update((plan.name, "") for plan in scope.draft.plans[known:] if sources[plan.name] != output)
    layer = scope.layers.get(output)
    if layer is not None and not sources.get(layer) and output not in scope.without_batch:
        sources[layer] = output


def read_branch(node: Any, scope: Scope) -> None:
    """An If whose condition is known: the nodes of the branch that is taken. Their tensors are not the file's own."""
    import onnx

    condition = scope.constant(node.input[0])
    wanted = "then_branch" if condition.all() else "else_branch"
    branch = next(attribute.g for attribute in node.attribute if attribute.name == wanted)
    scope.constants.update((tensor.name, onnx.numpy_helper.to_array(tensor)) for tensor in branch.initializer)
    known = len(scope.draft.plans)
    for place, inner in enumerate(branch.node):
        read(inner, place, scope)
    scope.draft.sources.update((plan.name, "") for plan in scope.draft.plans[known:])
    for outer, value in zip(node.output, branch.output, strict=True):
        if value.name in scope.constants:
            scope.constants[outer] = scope.constants[value.name]
        else:
            scope.layers[outer] = scope.layers[value.name]
            if scope.layers[outer] in (plan.name for plan in scope.draft.plans[known:]):
                scope.draft.sources[scope.layers[outer]] = outer


def fold_shape(node: Any, scope: Scope) -> None:
    """The shape of what a layer gives is known: the batch is of one picture."""
    shape = scope.file_shape(node.input[0])
    given = {attribute.name: attribute.i for attribute in node.attribute}
    part = shape[given.get("start", 0) : given.get("end", len(shape))]
    scope.constants[node.output[0]] = np.array(part, np.int64)


def refuse_huge(scope: Scope, node: Any) -> None:
    for name in node.output:
        layer = scope.layers.get(name)
        if layer is not None and math.prod(scope.draft.shape(layer)) > MOST_NUMBERS:
            raise UnknownFormError("makes more numbers than a classifier needs")


def refuse_infinite(draft: NetworkDraft, before: int) -> None:
    """Raise UnknownFormError where a layer behind those ``before`` has constants that are not finite."""
    for plan in draft.plans[before:]:
        if not all(np.isfinite(value).all() for value in draft.tensors[plan.name].values()):
            raise UnknownFormError("computes with an infinite value: export it again")


def end_in_classes(draft: NetworkDraft) -> None:
    """Let the answer be (1, classes); one number is the score of the second of two classes, and 0 that of the first.

    Raises InputError for other answers.
    """
    shape, source = draft.shape(draft.output), draft.sources[draft.output]
    if len(shape) != 2 and sum(axis > 1 for axis in shape[1:]) <= 1:
        draft.output = draft.add("reshape", [draft.output], source, {"shape": [math.prod(shape[1:])]})
        shape = draft.shape(draft.output)
    if shape == (1, 1):
        draft.has_one_score = True
        tensors = {"weight": np.array([[0.0], [1.0]]), "bias": np.zeros(2)}
        draft.output = draft.add("linear", [draft.output], source, {"inputs": 1, "outputs": 2}, tensors)
        shape = draft.shape(draft.output)
    if len(shape) != 2:
        told = "x".join(map(str, shape))
        raise InputError(f"answers with {told} numbers, not with one for each class: give a classifier of pictures")
