"""Settings of libraries."""

from __future__ import annotations

from mgq.machine import one_blas_thread


def blas_threads() -> dict[str, int]:
    """The threads of each library that numpy and scipy multiply with."""
    import numpy.linalg  # noqa: F401
    import scipy.linalg  # noqa: F401
    from threadpoolctl import threadpool_info

    return {pool["filepath"]: pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}


def test_numpy_and_scipy_multiply_in_one_thread_inside() -> None:
    from threadpoolctl import threadpool_limits

    blas_threads()  # both are loaded
    with threadpool_limits(3, "blas"):
        before = blas_threads()
        assert list(before.values()).count(3) >= 2
        with one_blas_thread():
            assert set(blas_threads().values()) == {1}
        assert blas_threads() == before
