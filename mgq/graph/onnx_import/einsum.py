"""Einsum where it is a permutation, a sum or a product of matrices: transpositions, reshapes and a layer."""

from __future__ import annotations

import math
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mgq.graph.onnx_import.operators import (
    BatchMixedError,
    Operator,
    UnknownFormError,
    add_affine,
    add_linear_over_last_axis,
)

REST = "..."


def read_einsum(op: Operator) -> None:
    ranks = [
        op.scope.constant(name).ndim if op.scope.is_constant(name) else len(op.scope.shape(name)) for name in op.inputs
    ]
    terms, output = split_equation(str(op.read_attribute("equation", "")), ranks)
    if any(len(set(term)) != len(term) for term in (*terms, output)):
        raise UnknownFormError("takes the diagonal of a tensor")
    if len(terms) == 1:
        refuse_mixed_batch(terms, output)
        op.settle(move_axes(op, *sum_others(op, op.layer(), terms[0], output), output))
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


def sum_others(op: Operator, layer: str, axes: str, wanted: str) -> tuple[str, str]:
    """A layer that gives what ``layer`` does, summed along those of its ``axes`` that are not ``wanted``; and its
    axes."""
    places = [place for place, letter in enumerate(axes) if letter not in wanted]
    if not places:
        return layer, axes
    shape = op.scope.draft.shape(layer)
    total = add_affine(op, op.add("mean", layer, axes=places), math.prod(shape[place] for place in places))
    kept = [place for place in range(len(axes)) if place not in places]
    return reshape_to(op, total, [shape[place] for place in kept[1:]]), "".join(axes[place] for place in kept)


def reshape_to(op: Operator, layer: str, sizes: Sequence[int]) -> str:
    """``layer`` with axes of ``sizes`` behind that of the pictures."""
    if op.scope.draft.shape(layer)[1:] == tuple(sizes):
        return layer
    return op.add("reshape", layer, shape=list(sizes))


@dataclass(frozen=True)
class Product:
    """One of matrices for each picture and each place on the axes that ``left``, ``right`` and the output share: of
    ``rows`` by what is ``summed``, and of this by ``columns``; ``size`` is that of each axis."""

    left: str
    right: str
    output: str
    size: Mapping[str, int]

    def list_axes(self, in_left: bool, in_right: bool, in_output: bool) -> str:
        """Those behind that of the pictures, in the order of ``left``, then of ``right``."""
        wanted, letters = (in_left, in_right, in_output), dict.fromkeys(self.left + self.right)
        terms = (self.left, self.right, self.output)
        return "".join(
            letter
            for letter in letters
            if letter != self.output[0] and tuple(letter in term for term in terms) == wanted
        )

    @property
    def shared(self) -> str:
        return self.list_axes(True, True, True)

    @property
    def summed(self) -> str:
        return self.list_axes(True, True, False)

    @property
    def rows(self) -> str:
        return self.list_axes(True, False, True)

    @property
    def columns(self) -> str:
        return self.list_axes(False, True, True)

    def sizes(self, letters: str) -> list[int]:
        return [self.size[letter] for letter in letters]

    def count(self, letters: str) -> int:
        return math.prod(self.sizes(letters))


def multiply_layers(op: Operator, one: str, other: str, output: str) -> None:
    refuse_mixed_batch((one, other), output)
    size = dict(zip(one + other, op.shape(0) + op.shape(1), strict=True))
    if any(size[letter] != extent for letter, extent in zip(one, op.shape(0), strict=True)):
        raise UnknownFormError("repeats an axis of length 1")
    left, one = sum_others(op, op.layer(0), one, other + output)
    right, other = sum_others(op, op.layer(1), other, one + output)
    product, batch = Product(one, other, output, size), output[0]
    places, summed = product.count(product.shared), product.count(product.summed)
    left = move_axes(op, left, one, batch + product.shared + product.rows + product.summed)
    right = move_axes(op, right, other, batch + product.shared + product.summed + product.columns)
    left = reshape_to(op, left, [places, product.count(product.rows), summed])
    right = reshape_to(op, right, [places, summed, product.count(product.columns)])
    finish(op, op.add("matmul", left, right), product)


def multiply_by_weights(op: Operator, place: int, layer: str, weights: str, output: str) -> None:
    """The layer at ``place`` times weights: a linear layer, or a product for each place on the axes that they share."""
    refuse_mixed_batch((layer,), output)
    value = op.scope.constant(op.inputs[1 - place])
    size = dict(zip(weights + layer, value.shape + op.shape(place), strict=True))
    if weights[0] == layer[0] and len(value) == 1:
        value, weights = value[0], weights[1:]
    if layer[0] in weights or any(size[letter] != extent for letter, extent in zip(weights, value.shape, strict=True)):
        raise UnknownFormError("multiplies by weights that differ along an axis of the tensor")
    alone = tuple(axis for axis, letter in enumerate(weights) if letter not in layer + output)
    value, weights = value.sum(alone), "".join(letter for letter in weights if letter in layer + output)
    source, layer = sum_others(op, op.layer(place), layer, weights + output)
    product = Product(layer, weights, output, size)
    source = move_axes(op, source, layer, output[0] + product.shared + product.rows + product.summed)
    places, rows, summed = (product.count(part) for part in (product.shared, product.rows, product.summed))
    value = value.transpose([weights.index(letter) for letter in product.shared + product.summed + product.columns])
    value = value.reshape(places, summed, -1)
    if product.shared:
        source = reshape_to(op, source, [places, rows, summed])
        done = op.scope.draft.add("matmul", [source], "", {}, {"weight": value})
    else:
        done = add_linear_over_last_axis(op, reshape_to(op, source, [rows, summed]), value[0].T)
    finish(op, done, product)


def finish(op: Operator, done: str, product: Product) -> None:
    """The output is what ``done`` gives, the ``product`` in its own order of axes."""
    axes = product.shared + product.rows + product.columns
    whole = reshape_to(op, done, product.sizes(axes))
    op.give(move_axes(op, whole, product.output[0] + axes, product.output))
