"""Chooses one of several networks in a file of weights."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mgq.errors import printable
from mgq.weights.torch_files import UnreadableError

IsTensor = Callable[[object], bool]

_USUAL = ("state_dict", "model", "model_state_dict", "net")
"""Usual keys of a single network; messages do not mention them."""
_PREFERENCES = (
    ("state_dict_ema", {"state_dict"}),  # timm
    ("model_ema", {*_USUAL}),  # torchvision's reference scripts, timm: beside "model"
    ("params_ema", {"params"}),  # BasicSR
    ("ema", {*_USUAL}),  # ultralytics, RT-DETR: beside "model"
    ("state_dict", {"ema_state_dict"}),  # mmengine, which swaps them: the averages are in state_dict
    ("state_dict", {"current_model_state"}),  # Lightning's WeightAveraging, as well
)
"""The network that each program itself infers with, and the other ones in its files."""
_DEEPEST = 4
_SHOWN = 8


@dataclass(frozen=True)
class Choice:
    """A network in a file: its tensors by name, the ``key`` they were found under, and the keys of the ``others``."""

    state: Mapping[Any, Any]
    key: str
    others: tuple[str, ...] = ()

    @property
    def said(self) -> str:
        """Which network it is, in words; '' where the file has only one, under a usual key."""
        if not self.others and self.key in ("", *_USUAL):
            return ""
        others = " and ".join(f"'{printable(name)[:80]}'" for name in self.others[:_SHOWN])
        return f"network '{printable(self.key)[:80]}'" + (f", not {others}" if others else "")


def parse_key(text: str) -> str | None:
    """The key of the network that ``text``, as :attr:`Choice.said` has it behind a format, is about; None without."""
    found = re.match(r"[a-z ]+, network '([^']*)'", text)
    return found[1] if found else None


def as_mapping(root: object, is_tensor: IsTensor) -> object:
    """A list of names with tensors, as pairs, as the mapping that it stands for; a list of others by their numbers."""
    if type(root) not in (list, tuple):
        return root
    assert isinstance(root, list | tuple)
    if root and all(type(pair) in (list, tuple) and len(pair) == 2 and type(pair[0]) is str for pair in root):
        return dict(root)
    numbered = {str(number): value for number, value in enumerate(root) if type(value) is dict}
    return numbered if networks_in(numbered, is_tensor) else root


def choose_state(root: Mapping[Any, Any], key: str | None, is_tensor: IsTensor) -> Choice:
    """The network called ``key``; without one the only network, or the one that the file's program prefers.

    Raises UnreadableError where there is no such network, or several and none is preferred.
    """
    networks = networks_in(root, is_tensor)
    if key is not None:
        return find_named(root, key, networks, is_tensor)
    if not networks:
        return Choice(root, "")
    taken = next(iter(networks)) if len(networks) == 1 else find_preferred(networks)
    if taken is None:
        names = " and ".join(repr(name[:80]) for name in list(networks)[:_SHOWN])
        first = printable(next(iter(networks)))[:80]
        raise UnreadableError(f"has more than one set of tensors, under {names}: choose one, such as --key {first}")
    return Choice(networks[taken], taken, tuple(name for name in networks if name != taken))


def find_preferred(networks: Iterable[str]) -> str | None:
    """The one of ``networks``, by their keys, that the program which wrote them takes for answers; None if unknown."""
    keys = {name.partition(".")[0]: name for name in networks}
    for first, others in _PREFERENCES:
        if first in keys and keys.keys() - {first} <= others:
            return keys[first]
    return None


def networks_in(root: Mapping[Any, Any], is_tensor: IsTensor) -> dict[str, Mapping[Any, Any]]:
    """The mappings in ``root`` that look like state dicts, by their dotted keys. Each is looked into once."""
    found: dict[str, Mapping[Any, Any]] = {}
    seen = {id(root)}
    waiting: list[tuple[str, int, Mapping[Any, Any]]] = [("", 1, root)]
    for path, depth, value in waiting:
        for name, inner in value.items():
            if type(name) is not str or type(inner) is not dict:
                continue
            if is_network(name, inner, is_tensor):
                found[path + name] = inner
            elif depth < _DEEPEST and id(inner) not in seen:
                seen.add(id(inner))
                waiting.append((f"{path}{name}.", depth + 1, inner))
    return found


def is_network(name: str, value: Mapping[Any, Any], is_tensor: IsTensor) -> bool:
    """Whether ``value``, under ``name``, has tensors, and weights by their names: an optimizer's state has none."""
    names = [inner for inner, leaf in value.items() if is_tensor(leaf)]
    return bool(names) and (name in _USUAL or any(type(inner) is str and inner.endswith("weight") for inner in names))


def find_named(
    root: Mapping[Any, Any], key: str, networks: Mapping[str, Mapping[Any, Any]], is_tensor: IsTensor
) -> Choice:
    """The network called ``key``, which is dotted where it lies deeper, or begins the names of tensors."""
    found = find_under(root, key.strip("."), is_tensor)
    inside = networks_in(found, is_tensor) if found is not None else {}
    if found is not None and any(map(is_tensor, found.values())):
        return Choice(found, key, tuple(name for name in networks if networks[name] is not found))
    if len(inside) == 1:
        ((name, state),) = inside.items()
        return Choice(state, f"{key}.{name}", tuple(other for other in networks if networks[other] is not state))
    there = describe_networks(root, inside or networks, is_tensor)
    raise UnreadableError(f"has no network '{printable(key)[:80]}': {there}")


def find_under(value: Mapping[Any, Any], key: str, is_tensor: IsTensor) -> Mapping[Any, Any] | None:
    """What lies under the dotted ``key`` in ``value``; else the tensors whose names begin with it. None without any."""
    parts = key.split(".")
    for end in range(len(parts), 0, -1):
        inner = value.get(".".join(parts[:end]))
        if type(inner) is dict:
            rest = ".".join(parts[end:])
            return find_under(inner, rest, is_tensor) if rest else inner
    begun = {
        name[len(key) + 1 :]: leaf for name, leaf in value.items() if type(name) is str and name.startswith(f"{key}.")
    }
    return begun if any(map(is_tensor, begun.values())) else None


def describe_networks(root: Mapping[Any, Any], networks: Iterable[str], is_tensor: IsTensor) -> str:
    """The names that ``--key`` could have, in words."""
    names = list(networks)
    if not names:
        begins = (name.partition(".")[0] for name, leaf in root.items() if type(name) is str and is_tensor(leaf))
        names = list(dict.fromkeys(begins))
        if not names:
            return "it has no named tensors"
    listed = ", ".join(f"'{printable(name)[:80]}'" for name in names[:_SHOWN])
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"it has {listed}{more}"
