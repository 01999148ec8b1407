"""Registers networks of the user's own, written in Python, after checking them."""

from __future__ import annotations

import inspect
import re
import runpy
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mgq.errors import InputError, nearest, printable
from mgq.machine import load_megengine
from mgq.zoo.registry import ModelSpec, specs

if TYPE_CHECKING:
    import megengine.module as M

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,79}")
SHOWN = 5
"""Functions of a file that are named at most."""
TRIED, COMMON_SIZE = 3, 224
"""Classes of the network that is built as a check, and a second size of images that it has to take."""


def register(name: str, builder: Callable[..., M.Module], image_size: int = 224) -> ModelSpec:
    """Register the network that ``builder(classes=N)`` returns as the architecture ``name``, in this process, for every
    verb.

    It takes float32 (N, 3, H, W), BGR pixels minus 128, and returns float32 logits (N, classes). Int8 begins at its
    ``QuantStub``. ``image_size``: pixels on a side, a multiple of 32. It is built once and run on zeros. Raises
    InputError for a name that is taken or is no valid folder name, and for a network that does not meet this contract.
    """
    known = specs().get(name)
    if not isinstance(name, str) or not NAME.fullmatch(name) or name.endswith("."):
        raise InputError(f"'{printable(name)[:80]}' is no name for a network: use letters, digits, '_', '-' and '.'")
    if known is not None and not known.is_own:
        raise InputError(f"{name} is the name of a network of mgq's own: choose another")
    if not isinstance(image_size, int) or image_size < 32 or image_size % 32:
        raise InputError(f"an image size of {image_size!r} will not do: give a multiple of 32")
    load_megengine()
    network = build_network(name, builder)
    refuse_other_answers(name, network, image_size)
    parameters = sum(int(np.prod(value.shape)) for value in network.parameters())
    spec = ModelSpec(name, builder, head_of(network), "", parameters, 0, image_size=image_size)
    specs()[name] = spec
    return spec


def has_own_networks() -> bool:
    """Whether a network of the user's own is registered. Another process knows it only if it runs what did that."""
    return any(spec.is_own for spec in specs().values())


def build_network(name: str, builder: Callable[..., M.Module]) -> M.Module:
    """A network of a few classes. Raises InputError where ``builder`` fails or gives something else."""
    import megengine.module as M

    if isinstance(builder, M.Module):
        raise InputError(f"{name} is a network: give the function that builds it of the number of classes")
    if not callable(builder):
        raise InputError(f"{name} is no function: give one that takes the number of classes and returns a network")
    refuse_other_arguments(name, builder)
    try:
        network = builder(classes=TRIED)
    except (Exception, SystemExit) as error:
        raise InputError(f"{name}(classes={TRIED}) fails: {to_one_line(error)}") from error
    if not isinstance(network, M.Module):
        raise InputError(f"{name} gives a {type(network).__name__}: let it return a megengine.module.Module")
    if not any(isinstance(module, M.QuantStub) for module in network.modules()):
        raise InputError(f"{name} has no QuantStub: pass its input through one, where int8 begins")
    return network


def refuse_other_arguments(name: str, builder: Callable[..., Any]) -> None:
    """Raises InputError where ``builder`` cannot be called with ``classes=N``."""
    try:
        inspect.signature(builder).bind(classes=TRIED)
    except TypeError as error:
        raise InputError(
            f"{name}(classes={TRIED}) cannot be called ({to_one_line(error)}): let its argument be called classes, and "
            "all others have defaults"
        ) from None
    except ValueError:  # a function in C that does not say what it takes
        return


def refuse_other_answers(name: str, network: M.Module, image_size: int) -> None:
    """Raises InputError where ``network`` does not answer pictures of several sizes with one finite number for each
    class, or cannot be traced, as calibration and every file need it."""
    network.eval()
    for size in dict.fromkeys((image_size, COMMON_SIZE)):
        found = answer_of(name, network, size)
        if found.shape != (1, TRIED):
            said = "x".join(map(str, found.shape))
            raise InputError(
                f"{name}(classes={TRIED}) answers one picture with {said} numbers, not with 1x{TRIED} logits"
            )
        if not np.isfinite(found).all():
            raise InputError(f"{name} answers with NaN or infinite numbers: initialize its weights")


def answer_of(name: str, network: M.Module, size: int) -> npt.NDArray[Any]:
    """What ``network`` answers to black, traced. Raises InputError where it fails."""
    from megengine import Tensor
    from megengine.traced_module import trace_module

    picture = Tensor(np.zeros((1, 3, size, size), np.float32))
    try:
        answer = network(picture)
        found = answer.numpy() if isinstance(answer, Tensor) else None
    except (Exception, SystemExit) as error:
        raise InputError(f"{name} cannot run a picture of 1x3x{size}x{size}: {to_one_line(error)}") from error
    if found is None:
        raise InputError(f"{name} answers a picture with a {type(answer).__name__}: let it give the logits alone")
    try:
        trace_module(network, picture)
    except (Exception, SystemExit) as error:
        raise InputError(
            f"{name} cannot be traced ({to_one_line(error)}): let nothing in it depend on numbers, and take "
            "mgq.zoo.layers.global_average for the mean of a picture"
        ) from error
    return np.asarray(found)


def head_of(network: M.Module) -> str:
    """The name of the weight whose first axis counts the classes; empty where there is no such linear layer."""
    import megengine.module as M

    heads = [
        f"{name}.weight"
        for name, module in network.named_modules()
        if isinstance(module, M.Linear) and module.out_features == TRIED
    ]
    return heads[-1] if heads else ""


def register_from_file(said: str) -> ModelSpec:
    """Run the Python file that ``said``, ``file.py:function``, names, and register its function by its own name.

    Modules beside it may be imported, as in a script that Python runs.

    Raises InputError where the file cannot be run or has no such function, and as :func:`register` does. A number
    ``IMAGE_SIZE`` in the file is the size of its pictures.
    """
    place, _, function = said.rpartition(":") if not said.endswith(".py") else (said, "", "")
    path = Path(place)
    if not path.is_file():
        raise InputError(f"there is no file {printable(place)[:200]}: check the path")
    if not function:
        shown = printable(place)[:200]
        raise InputError(f"-a {shown} lacks the function that builds the network: give {shown}:FUNCTION")
    folder = str(path.parent.resolve())
    if folder not in sys.path:
        sys.path.append(folder)  # behind all others, so that no name of theirs is taken for another
    try:
        found: dict[str, Any] = runpy.run_path(str(path), run_name=path.stem)
    except (Exception, SystemExit) as error:
        raise InputError(f"{printable(place)[:200]} fails: {to_one_line(error)}") from error
    if function not in found:
        known = [name for name, value in found.items() if callable(value) and not name.startswith("_")]
        near = nearest(function, known)
        mend = f"did you mean {near}?" if near else f"give one of {', '.join(known[:SHOWN])}" if known else "write one"
        raise InputError(f"{printable(place)[:200]} has no function {printable(function)[:80]}: {mend}")
    size = found.get("IMAGE_SIZE", 224)
    spec = replace(register(function, found[function], size if isinstance(size, int) else 224), place=said)
    specs()[spec.name] = spec
    return spec


def to_one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {printable(str(error).strip().partition(chr(10))[0])[:200]}"
