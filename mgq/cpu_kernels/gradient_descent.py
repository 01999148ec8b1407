"""Stochastic gradient descent in one pass over each parameter, to the bit as MegEngine's."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
from megengine import Tensor
from megengine.optimizer import SGD

from mgq.cpu_kernels.elementwise import step_parameter
from mgq.cpu_kernels.tensor_exchange import Array, give, values

STATE = "momentum_buffer"
"""What MegEngine calls a velocity in an optimizer's state."""


class Velocity:
    """How a parameter moves, in an optimizer's state: an array that steps change in place.

    Tensors cannot be written to, and a new one for every step costs two copies. Nothing but the optimizer computes with
    velocities; for those who keep or restore them this does what a tensor does.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.array: Array = np.array(tensor.numpy(), np.float32, order="C")
        self.device = tensor.device

    def numpy(self) -> Array:
        return self.array.copy()

    def __array__(self, dtype: Any = None) -> Array:
        return self.array.astype(dtype or np.float32)

    def __setitem__(self, place: Any, value: Any) -> None:
        self.array[place] = value.numpy() if isinstance(value, Tensor) else value

    def tensor(self) -> Tensor:
        return Tensor(self.array, device=self.device, no_cache=True)


# Optimizers that have made fast steps, and may have velocities.
_optimizers: weakref.WeakSet[SGD] = weakref.WeakSet()


def fast_updates(stock: Callable[..., Any], on_cpu: Callable[..., bool]) -> Callable[..., Any]:
    """``SGD._updates``, fast where all tensors are ``on_cpu``. It takes gradients that are arrays, too."""

    def updates(self: SGD, param_group: dict[str, Any]) -> None:
        trained = [parameter for parameter in param_group["params"] if parameter.grad is not None]
        if self.nesterov or not param_group["momentum"] or not trained or not on_cpu(*trained):
            restore_tensors(self)
            for parameter in trained:
                if isinstance(parameter.grad, np.ndarray):
                    parameter.grad = Tensor(parameter.grad, device=parameter.device)
            stock(self, param_group)
            return
        numbers = (param_group[name] for name in ("lr", "momentum", "weight_decay"))
        update(trained, [velocity_of(self, parameter) for parameter in trained], *map(np.float32, numbers))

    return updates


def velocity_of(optimizer: SGD, parameter: Tensor) -> Array:
    """The array that moves ``parameter``; the optimizer's state holds it from now on."""
    state = optimizer._state[parameter]
    if not isinstance(state[STATE], Velocity):
        state[STATE] = Velocity(state[STATE])
        _optimizers.add(optimizer)
    array: Array = state[STATE].array
    return array


def give_back_velocities() -> None:
    """Let the states of all optimizers hold tensors again."""
    for optimizer in list(_optimizers):
        restore_tensors(optimizer)


def restore_tensors(optimizer: SGD) -> None:
    for state in optimizer._state.values():
        if isinstance(state.get(STATE), Velocity):
            state[STATE] = state[STATE].tensor()


def update(
    parameters: list[Tensor], velocities: list[Array], rate: np.float32, momentum: np.float32, decay: np.float32
) -> None:
    device, number = parameters[0].device, len(parameters)
    arrays = values(*parameters, *(parameter.grad for parameter in parameters))
    for parameter, speed, value, gradient in zip(parameters, velocities, arrays, arrays[number:], strict=False):
        moved = step_parameter(value, speed, gradient, rate, momentum, decay)
        shape = parameter._tuple_shape  # of a single number the array is (1,)
        give(parameter, Tensor(moved.reshape(shape), device=device, no_cache=True))
