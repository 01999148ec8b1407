"""Which tensor of a foreign ONNX file holds the scores of its classes, and what of the file is needed for it."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mgq.errors import InputError, plural, printable
from mgq.export.onnx.onnx_file import import_package

NAMING = frozenset({"ArgMax", "Hardmax", "TopK", "ZipMap"})
"""Operators that say the class alone, or list scores under names or in their order."""
TELLING = NAMING | {"LogSoftmax", "Sigmoid", "Softmax"}
"""Operators at the end of what are scores, and no features."""
TELLERS = NAMING | {"Cast", "Flatten", "Identity", "LogSoftmax", "Reshape", "Sigmoid", "Softmax", "Squeeze"}
"""Operators that put scores in another form, and leave their order."""
CALLED = ("logit", "prob", "score", "class", "pred", "label", "softmax")
CALLED_OTHERWISE = ("aux", "feat", "embed", "hidden", "pool", "attention")
"""Words in the names of outputs that are scores, and of others."""
MOST_SHOWN = 5
"""Outputs that are named."""


@dataclass(frozen=True)
class Head:
    """The ``outputs`` that are told from one tensor of ``scores``. ``shape``: that of the tensor for any number of
    pictures, None where it is not known. ``is_told``: whether some output says the class, or probabilities."""

    outputs: tuple[str, ...]
    scores: str
    shape: tuple[int, ...] | None
    is_told: bool

    @property
    def width(self) -> int | None:
        """The numbers for a picture, 0 where that is not known; None where they are no row."""
        if self.shape is None:
            return 0
        return self.shape[1] if len(self.shape) > 1 and all(axis == 1 for axis in self.shape[2:]) else None

    @property
    def described(self) -> str:
        """Its outputs' names, and how many numbers it has for a picture."""
        names = ", ".join(repr(printable(name)[:40]) for name in self.outputs)
        sizes = "x".join(str(axis or "any") for axis in (self.shape or ())[1:])
        return f"{names} ({sizes})" if sizes else names


@dataclass(frozen=True)
class Answer:
    """The tensor of ``scores`` of a file; where other heads were left out, ``choice`` is the one taken among them."""

    scores: str
    choice: Head | None = None
    others: tuple[Head, ...] = ()

    def remark(self) -> str | None:
        """What is said of the choice; None where there was none."""
        if self.choice is None:
            return None
        others = ", ".join(head.described for head in self.others[:MOST_SHOWN])
        return f"scores of classes: the output {self.choice.described}, not {others}; --scores NAME takes another"


def find_answer(model: Any, wanted: str | None = None, classes: int | None = None) -> Answer:
    """The scores of classes in ``model``: of the output ``wanted``; else of the only head, or of the one that looks
    like it, of as many ``classes`` where that is known.

    Raises InputError, which names the outputs, where there is none, or no telling which.
    """
    heads = heads_of(model)
    outputs = [name for head in heads for name in head.outputs]
    if wanted is not None:
        if wanted not in outputs:
            told = join_outputs(heads)
            raise InputError(f"has no output '{printable(wanted)[:40]}': --scores takes one of its own, {told}")
        choice = next(head for head in heads if wanted in head.outputs)
    elif len(heads) == 1:
        return Answer(heads[0].scores)
    else:
        choice = choose_head(model.graph, heads, classes)
    others = tuple(head for head in heads if head is not choice)
    return Answer(choice.scores, choice if others else None, others)


def heads_of(model: Any) -> list[Head]:
    """The outputs of ``model``, those together that are told from the same scores."""
    makers = {name: node for node in model.graph.node for name in node.output}
    paths = {value.name: list(walk_back(value.name, makers)) for value in model.graph.output}
    roots: dict[str, list[str]] = {}
    for name, path in paths.items():
        roots.setdefault(path[-1], []).append(name)
    several = {name: scores_on(path, makers) for name, path in paths.items()}
    shapes = shapes_in(model, set(several.values())) if len(roots) > 1 else {}
    heads = []
    for names in roots.values():
        scores = next((several[name] for name in names if several[name] in paths), several[names[0]])
        told = any(makers[step].op_type in TELLING for name in names for step in paths[name] if step in makers)
        heads.append(Head(tuple(names), scores, shapes.get(scores), told))
    return heads


def choose_head(graph: Any, heads: list[Head], classes: int | None) -> Head:
    """The one of ``heads`` that looks like scores of classes: a row of numbers, of as many ``classes`` where these are
    named, which says probabilities, is told from the others, is called so, or else is the deepest of its width, as
    Inception has earlier ones."""
    found = [head for head in heads if head.width is not None]
    if not found:
        raise InputError(
            f"has {plural(len(heads), 'output')} ({join_outputs(heads)}), none with one number for each class: give a "
            "classifier of pictures"
        )
    reads = {head.scores: tensors_behind(graph, head.scores) for head in heads}
    rules: list[Callable[[Head], bool]] = [
        lambda head: classes is not None and head.width == classes,
        lambda head: head.is_told,
        lambda head: not any(head.scores in reads[other.scores] for other in found if other is not head),
        lambda head: any(word in name.lower() for name in head.outputs for word in CALLED),
        lambda head: not any(word in name.lower() for name in head.outputs for word in CALLED_OTHERWISE),
    ]
    for rule in rules:
        if len(found) > 1:
            found = [head for head in found if rule(head)] or found
    if len(found) > 1 and found[0].width and len({head.width for head in found}) == 1:  # as Inception's earlier heads
        depths = [len(reads[head.scores]) for head in found]
        found = [head for head, depth in zip(found, depths, strict=True) if depth == max(depths)]
    if len(found) > 1:
        first = printable(found[0].outputs[0])
        raise InputError(
            f"has {plural(len(heads), 'output')}, {join_outputs(heads)}: say which has a score for each class, such as "
            f"--scores {shlex.quote(first)}"
        )
    return found[0]


def join_outputs(heads: Sequence[Head]) -> str:
    """``heads`` in words, the first of them."""
    more = f" and {len(heads) - MOST_SHOWN} more" if len(heads) > MOST_SHOWN else ""
    return ", ".join(head.described for head in heads[:MOST_SHOWN]) + more


def tensors_behind(graph: Any, name: str) -> set[str]:
    """All tensors that ``name`` is computed from."""
    found: set[str] = set()
    needed = {name}
    for node in reversed(graph.node):
        if needed & set(node.output):
            read = names_read(node)
            needed |= read
            found |= read
    return found


def shapes_in(model: Any, names: Collection[str]) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors ``names`` as far as ``model`` says them, or they follow; 0 for an open axis."""
    found = said_shapes(model, names)
    if all(name in found and all(found[name][1:]) for name in names):
        return found
    try:
        return found | said_shapes(import_package("onnx").shape_inference.infer_shapes(model), names)
    except Exception:  # of what cannot be inferred nothing more is known
        return found


def said_shapes(model: Any, names: Collection[str]) -> dict[str, tuple[int, ...]]:
    known = {value.name: value for value in (*model.graph.value_info, *model.graph.output)}
    kinds = {name: known[name].type.tensor_type for name in names if name in known}
    return {
        name: tuple(max(int(axis.dim_value), 0) for axis in kind.shape.dim)
        for name, kind in kinds.items()
        if kind.HasField("shape")
    }


def walk_back(name: str, makers: Mapping[str, Any]) -> Iterator[str]:
    """``name``, and what it is told from, one after the other."""
    seen: set[str] = set()
    while name not in seen:
        yield name
        seen.add(name)
        if name in makers and makers[name].op_type in TELLERS:
            name = makers[name].input[0]


def scores_on(path: list[str], makers: Mapping[str, Any]) -> str:
    """The first tensor on ``path``, from an output backwards, that has a number for each class."""
    naming = [place for place, name in enumerate(path[:-1]) if makers[name].op_type in NAMING]
    return path[naming[-1] + 1] if naming else path[0]


def leave_out_unread(graph: Any, output: str) -> set[str]:
    """Take out of ``graph`` the nodes that do nothing for ``output``; the names of the tensors that are read."""
    needed = {output}
    for place in range(len(graph.node) - 1, -1, -1):
        if needed & set(graph.node[place].output):
            needed |= names_read(graph.node[place])
        else:
            del graph.node[place]
    return needed


def names_read(node: Any) -> set[str]:
    """What ``node`` reads, also in the graphs inside of it."""
    graphs = [graph for attribute in node.attribute for graph in (attribute.g, *attribute.graphs)]
    inner = [names_read(one) for graph in graphs for one in graph.node]
    return set(node.input).union(*inner, *({value.name for value in graph.output} for graph in graphs))
