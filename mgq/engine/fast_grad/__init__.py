"""Training on a CPU that does not wait for MegEngine's reference kernels. See :func:`fast_gradients`."""

import os

# MegEngine's threads wait for work by spinning, which takes a core from the kernels here. Read when the first tensor is
# made.
os.environ.setdefault("MGB_WORKER_MAX_SPIN", "1")

from mgq.engine.fast_grad.switch import (
    disable_fast_gradients,
    enable_fast_gradients,
    fast_gradients,
    fast_gradients_enabled,
)

__all__ = ["disable_fast_gradients", "enable_fast_gradients", "fast_gradients", "fast_gradients_enabled"]
