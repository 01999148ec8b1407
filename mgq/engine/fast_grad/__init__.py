"""Training on a CPU that does not wait for MegEngine's reference kernels. See :func:`fast_gradients`."""

from mgq.engine.fast_grad.switch import (
    disable_fast_gradients,
    enable_fast_gradients,
    fast_gradients,
    fast_gradients_enabled,
)

__all__ = ["disable_fast_gradients", "enable_fast_gradients", "fast_gradients", "fast_gradients_enabled"]
