"""All values of a network by name, read and set in a time that is proportional to their number.

They are those of MegEngine's ``state_dict`` and ``load_state_dict``, which go through all values before them again at
each layer: of a network with fake quantization that took half a second.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import megengine.module as M
import numpy as np
import numpy.typing as npt
from megengine import Tensor
from megengine.module.batchnorm import _BatchNorm

State = dict[str, npt.NDArray[Any]]

NORMS = (_BatchNorm, M.GroupNorm, M.LayerNorm, M.InstanceNorm)
"""Their parameters are named as vectors, whatever shape they have."""


@contextlib.contextmanager
def evaluation_state(network: M.Module) -> Iterator[None]:
    """Inside, ``network`` is in evaluation state, so that running it changes none of its values; afterwards each of its
    modules trains that did before."""
    trained = [module for module in network.modules() if module.training]
    network.eval()
    try:
        yield
    finally:
        for module in trained:
            module.train(recursive=False)


def state_of(network: M.Module) -> State:
    """Parameters and buffers under the names and in the shapes of ``network.state_dict()``."""
    state: State = {}
    for name, tensor, module in named_values(network):
        value = tensor.numpy()
        state[name] = value.reshape(-1) if isinstance(module, NORMS) else value
    return state


def set_state(network: M.Module, state: Mapping[str, npt.NDArray[Any]]) -> None:
    """Set all values of ``network`` to those in ``state``, in the types that they have there.

    Raises KeyError where names differ, ValueError where a shape does.
    """
    values = {name: (tensor, module) for name, tensor, module in named_values(network)}
    if differing := sorted(values.keys() ^ state.keys()):
        raise KeyError(f"not in both, the network and the state: {', '.join(differing)}")
    for name, (tensor, module) in values.items():
        value, shape = state[name], tensor._tuple_shape
        fits = value.size == np.prod(shape) if isinstance(module, NORMS) else value.shape == shape
        if not fits:
            raise ValueError(f"{name} should be of shape {shape} and is of {value.shape}")
        value = value.reshape(shape)
        tensor._reset(type(tensor)(value, dtype=value.dtype, device=tensor.device, no_cache=True))


def named_values(module: M.Module, prefix: str = "") -> Iterator[tuple[str, Tensor, M.Module]]:
    """Each parameter and buffer by its name, with the module that it belongs to: a module's own before its children's.

    A layer that two modules have comes under both names, as in MegEngine's own.
    """
    for name, tensor in module.named_tensors(recursive=False):
        yield prefix + name, tensor, module
    for name, child in module.named_children():
        yield from named_values(child, f"{prefix}{name}.")
