"""Einsum where it is a permutation or a product of matrices: transpositions, reshapes and a product of matrices."""

from __future__ import annotations

import math
import string
from collections.abc import Sequence

from mgq.graph.onnx_import.operators import BatchMixedError, Operator, UnknownFormError, add_linear_over_last_axis

REST = "..."


def read_einsum(op: Operator) -> None:
    ranks = [
        op.scope.constant(name).ndim if op.scope.is_constant(name) else len(op.scope.shape(name)) for name in op.inputs
    ]
    terms, output = split_equation(str(op.read_attribute("equation", "")), ranks)
    if any(len(set(term)) != len(term) for term in (*terms, output)):
        raise UnknownFormError("takes the diagonal of a tensor")
    if len(terms) == 1:
        if set(terms[0]) != set(output):
            raise UnknownFormError("sums along axes")
        refuse_mixed_batch(terms, output)
        op.give(move_axes(op, op.layer(), terms[0], output))
    elif len(terms) == 2 and any(op.scope.is_constant(name) for name in op.inputs):
        place = 1 if op.scope.is_constant(op.inputs[0]) else 0
        multiply_by_weights(op, place, terms[place], terms[1 - place], output)
    elif len(terms) == 2:
        multiply_layers(op, terms[0], terms[1], output)
    else:
        raise UnknownFormError("multiplies more than two tensors")


def split_equation(equation: str, ranks: Sequence[int]) -> tuple[list[str], str]:
    """A letter for each axis of each input, of so many axes as ``ranks`` says, and of the output."""
    left, arrow, output = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if len(terms) != len(ranks):
        raise UnknownFormError("has another number of inputs than its equation")
    if not arrow:
        single = {letter for letter in left if letter.isalpha() and left.count(letter) == 1}
        output = (REST if REST in left else "") + "".join(sorted(single))
    more = [rank - len(term.replace(REST, "")) for term, rank in zip(terms, ranks, strict=True)]
    unused = [letter for letter in string.ascii_letters if letter not in equation]
    most = max([extra for term, extra in zip(terms, more, strict=True) if REST in term], default=0)
    letters = "".join(unused[:most])
    whole = [term.replace(REST, letters[most - extra :]) for term, extra in zip(terms, more, strict=True)]
    if [len(term) for term in whole] != list(ranks):
        raise UnknownFormError("has other axes than its equation")
    return whole, output.replace(REST, letters)


def refuse_mixed_batch(terms: Sequence[str], output: str) -> None:
    """Raises BatchMixedError where the first axis of ``terms`` and ``output`` is not one and the same."""
    if len({term[:1] for term in (*terms, output)}) != 1:
        raise BatchMixedError


def move_axes(op: Operator, layer: str, before: str, after: str) -> str:
    """A layer that gives what ``layer`` does, with its axes, which ``before`` names, in the order of ``after``."""
    if before == after:
        return layer
    return op.add("transpose", layer, axes=[before.index(letter) for letter in after])


def reshape_to(op: Operator, layer: str, sizes: Sequence[int]) -> str:
    """``layer`` with axes of ``sizes`` behind that of the pictures."""
    if op.scope.draft.shape(layer)[1:] == tuple(sizes):
        return layer
    return op.add("reshape", layer, shape=list(sizes))


def multiply_layers(op: Operator, one: str, other: str, output: str) -> None:
    """The product of two layers: one of matrices for each picture and each place on the axes that all three share."""
    refuse_mixed_batch((one, other), output)
    size = dict(zip(one + other, op.shape(0) + op.shape(1), strict=True))
    if any(size[letter] != extent for letter, extent in zip(one, op.shape(0), strict=True)):
        raise UnknownFormError("repeats an axis of length 1")
    shared = "".join(letter for letter in one if letter in other and letter in output)
    summed = "".join(letter for letter in one if letter in other and letter not in output)
    rows = "".join(letter for letter in one if letter not in other)
    columns = "".join(letter for letter in other if letter not in one)
    if set(shared + rows + columns) != set(output):
        raise UnknownFormError("sums along an axis of one tensor alone")

    def count(letters: str) -> int:
        return math.prod(size[letter] for letter in letters)

    places = count(shared[1:])
    left = reshape_to(op, move_axes(op, op.layer(0), one, shared + rows + summed), [places, count(rows), count(summed)])
    right = move_axes(op, op.layer(1), other, shared + summed + columns)
    right = reshape_to(op, right, [places, count(summed), count(columns)])
    product = op.add("matmul", left, right)
    whole = reshape_to(op, product, [size[letter] for letter in shared[1:] + rows + columns])
    op.give(move_axes(op, whole, shared + rows + columns, output))


def multiply_by_weights(op: Operator, place: int, layer: str, weights: str, output: str) -> None:
    """The layer at ``place`` times weights, as a linear layer over the axes that the output does not have."""
    summed = "".join(letter for letter in layer if letter not in output)
    kept = "".join(letter for letter in layer if letter in output)
    columns = "".join(letter for letter in output if letter not in layer)
    if set(weights) != set(summed + columns) or not summed:
        raise UnknownFormError("multiplies by weights that differ along an axis of the tensor")
    refuse_mixed_batch((layer,), output)
    size = dict(zip(layer, op.shape(place), strict=True))
    value = op.scope.constant(op.inputs[1 - place]).transpose([weights.index(letter) for letter in columns + summed])
    size |= dict(zip(columns, value.shape, strict=False))
    source = move_axes(op, op.layer(place), layer, kept + summed)
    inputs = math.prod(size[letter] for letter in summed)
    source = reshape_to(op, source, [math.prod(size[letter] for letter in kept[1:]), inputs])
    done = add_linear_over_last_axis(op, source, value.reshape(-1, inputs))
    whole = reshape_to(op, done, [size[letter] for letter in kept[1:] + columns])
    op.give(move_axes(op, whole, kept + columns, output))
