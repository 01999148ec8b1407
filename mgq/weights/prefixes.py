"""Removes the prefixes and counters that wrappers add to a network's weights."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import numpy as np
import numpy.typing as npt

from mgq.errors import InputError, plural, printable
from mgq.weights.foreign_states import IMAGENET_RGB, State

Judge = Callable[[State], bool]

_DEEPEST = 12
_FEWEST = 20
"""No network of the zoo has fewer tensors, so smaller states are not considered."""
_SHOWN = 3
_UNSAID = "num_batches_tracked"
_COUNTED = {
    *("total_ops", "total_params"),  # the profiler thop leaves them in every layer
    *("decay", "n_averaged", "num_updates", "updates", "step", "steps", "initted"),  # who averages weights
}
"""Names of single numbers that no layer computes with."""
_HEADS = ("fc", "classifier", "classifier.0", "classifier.1", "_fc")
"""What classifiers are called at the end of networks of the zoo, in all layouts."""


@dataclass(frozen=True)
class Part:
    """The tensors of one network under its own names, and in words what was taken off and left out to get there."""

    state: State
    said: tuple[str, ...] = ()


def network_part(state: State, holds: Judge, ends: Judge, fits: Judge) -> Part:
    """The network in ``state``: without counters and without the longest prefix of all names that makes it one.

    ``holds``: whether a state has the names of a network of the zoo; ``ends``: whether it has its classifier, too;
    ``fits``: whether it is one, no tensor missing and none too many. Where names have no common prefix that helps, the
    only part that fits is taken, or the only linear layer is taken for the classifier, whatever it is called. A state
    without a network is returned unchanged: strict loading reports what is wrong. Raises InputError where several parts
    fit, or where what is left out would change the answers.
    """
    weights = {name: value for name, value in state.items() if not is_counter(name, value)}
    counters = [name for name in state if name not in weights and not name.endswith(_UNSAID)]
    for prefix in common_prefixes(weights):
        found = drop_prefix(prefix, weights)
        if holds(found):
            said = (*strip_prefix(prefix), *describe_left_out(counters))
            renamed = None if ends(found) else with_known_head(found, fits)
            return Part(found, said) if renamed is None else Part(renamed.state, (*said, *renamed.said))
    parts = {prefix: found for prefix, found in sorted(groups(weights).items()) if holds(found) and fits(found)}
    if len(parts) > 1:
        names = " and ".join(f"'{printable(prefix)[:-1][:80]}'" for prefix in parts)
        first = printable(next(iter(parts)))[:-1][:80]
        raise InputError(f"has {plural(len(parts), 'network')}, {names}: choose one, such as --key {first}")
    for prefix, found in parts.items():
        rest = {name: value for name, value in weights.items() if not name.startswith(prefix)}
        refuse_other_normalization(rest)
        return Part(found, (*strip_prefix(prefix), *describe_left_out([*rest, *counters])))
    renamed = with_known_head(weights, fits)
    return Part(weights) if renamed is None else Part(renamed.state, (*renamed.said, *describe_left_out(counters)))


def with_known_head(state: State, fits: Judge) -> Part | None:
    """``state`` with its only linear layer called as the classifier of a network that fits then; None without one.

    The other names may share a prefix that the classifier's lack.
    """
    linear = [
        name.removesuffix(".weight") for name, value in state.items() if name.endswith("weight") and value.ndim == 2
    ]
    if len(linear) != 1:
        return None
    (head,) = linear
    own = {part: state[name] for part in ("weight", "bias") if (name := f"{head}.{part}") in state}
    body = {name: value for name, value in state.items() if name.rpartition(".")[0] != head}
    for prefix in common_prefixes(body):
        for known in _HEADS:
            found = {**drop_prefix(prefix, body), **{f"{known}.{part}": value for part, value in own.items()}}
            if fits(found):
                return Part(found, (*strip_prefix(prefix), f"the head '{printable(head)[:80]}' as '{known}'"))
    return None


def is_counter(name: str, value: npt.NDArray[Any]) -> bool:
    """Whether ``value`` counts or looks something up: weights and statistics are no whole numbers."""
    return value.dtype.kind in "iub" or (value.size == 1 and name.rpartition(".")[2] in _COUNTED)


def common_prefixes(names: Iterable[str]) -> Iterator[str]:
    """The dotted prefixes that all ``names`` share, the longest first; '' is the last."""
    parts = [name.split(".")[:-1] for name in names] or [[]]
    pairs = zip(min(parts), max(parts), strict=False)  # what these share all do
    shared = [first for first, _ in takewhile(lambda pair: pair[0] == pair[1], pairs)]
    for end in range(len(shared), -1, -1):
        yield "".join(f"{part}." for part in shared[:end])


def drop_prefix(prefix: str, state: State) -> State:
    return {name[len(prefix) :]: value for name, value in state.items()}


def groups(state: State) -> dict[str, State]:
    """The parts of ``state`` whose names begin alike, by prefix, without it."""
    found: dict[str, State] = defaultdict(dict)
    for name, value in state.items():
        parts = name.split(".")
        for end in range(1, min(len(parts), _DEEPEST)):
            prefix = ".".join(parts[:end]) + "."
            found[prefix][name[len(prefix) :]] = value
    return {prefix: part for prefix, part in found.items() if len(part) >= _FEWEST}


def strip_prefix(prefix: str) -> tuple[str, ...]:
    return (f"without the prefix '{printable(prefix)[:80]}'",) if prefix else ()


def describe_left_out(names: list[str]) -> tuple[str, ...]:
    """A phrase about tensors that are not the network's."""
    if not names:
        return ()
    shown = ", ".join(printable(name)[:80] for name in names[:_SHOWN])
    return (f"leaving out {shown}" + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""),)


def refuse_other_normalization(rest: State) -> None:
    """Raises InputError where ``rest`` says that pictures were normalized by other statistics than ImageNet's."""
    for name, value in rest.items():
        last = name.rpartition(".")[2]
        if value.size != 3 or not ("mean" in last or "std" in last):
            continue
        expected = np.array(IMAGENET_RGB.mean if "mean" in last else IMAGENET_RGB.std)
        if not any(np.allclose(value.ravel(), expected / scale, atol=0.01 / scale * 255) for scale in (1, 255)):
            values = ", ".join(f"{number:g}" for number in value.ravel().tolist())
            raise InputError(
                f"normalizes pictures by its own {printable(name)[:80]} ({values}), not by ImageNet's: fold that into "
                "the first convolution, or train with ImageNet's"
            )
