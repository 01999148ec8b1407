"""Training on a CPU that does not wait for MegEngine's reference kernels. See :func:`fast_gradients`."""

from mgq.cpu_kernels.switch import fast_gradients, fast_gradients_enabled

__all__ = ["fast_gradients", "fast_gradients_enabled"]
