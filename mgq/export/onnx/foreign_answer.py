"""Which tensor of a foreign ONNX file holds the scores of its classes, and what of the file is needed for it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mgq.errors import InputError, plural, printable

NAMING = frozenset({"ArgMax", "ZipMap"})
"""Operators that say the class alone, or list scores under names."""
TELLERS = NAMING | {"Cast", "Flatten", "Identity", "LogSoftmax", "Reshape", "Sigmoid", "Softmax", "Squeeze"}
"""Operators that put scores in another form, and leave their order."""


def answer_of(graph: Any) -> str:
    """The name of the scores of classes: of the only output, or of the one that the others are told from.

    Raises InputError where outputs are not told from the same scores.
    """
    makers = {name: node for node in graph.node for name in node.output}
    paths = {value.name: list(walk_back(value.name, makers)) for value in graph.output}
    if len({path[-1] for path in paths.values()}) > 1:
        told = ", ".join(repr(printable(name)[:40]) for name in list(paths)[:5])
        raise InputError(
            f"has {plural(len(paths), 'output')} ({told}): a classifier has one; export it without the others"
        )
    scores = [scores_on(path, makers) for path in paths.values()]
    return next((name for name in scores if name in paths), scores[0])


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
