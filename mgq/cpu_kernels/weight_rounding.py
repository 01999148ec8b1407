"""Loops that round weights so that their errors cancel (:mod:`mgq.ptq.gptq`), output by output."""

from __future__ import annotations

from typing import Any

import numpy as np

from mgq.cpu_kernels.numba_loops import make_compiler


@make_compiler()
def compensate_block(left: Any, upper: Any, start: Any, end: Any, levels: Any, errors: Any) -> None:
    """Round the inputs from ``start`` to ``end`` of ``left`` (groups, outputs, inputs), float64, in place, to integers
    up to ``levels``; what each loses is given to the inputs behind it up to ``end``.

    ``upper`` (groups, inputs, inputs) are factors of the inverse covariances. ``errors`` (groups, outputs, end - start)
    becomes what each lost, in terms of its diagonal.
    """
    for group in range(left.shape[0]):
        factor = upper[group]
        for output in range(left.shape[1]):
            row = left[group, output]
            for i in range(start, end):
                value = min(max(np.rint(row[i]), -levels), levels)
                error = (row[i] - value) / factor[i, i]
                for j in range(i + 1, end):
                    row[j] -= error * factor[i, j]
                row[i] = value
                errors[group, output, i - start] = error


@make_compiler()
def move_by_steps(integers: Any, pull: Any, covariance: Any, levels: Any, sweeps: Any) -> None:
    """Move each of ``integers`` (groups, outputs, inputs), float64, in place, by one wherever that makes the error of
    its output smaller, ``sweeps`` times.

    ``pull``: the errors of the integers times the ``covariance`` (groups, inputs, inputs); it follows them.
    """
    for group in range(integers.shape[0]):
        matrix = covariance[group]
        for output in range(integers.shape[1]):
            row, force = integers[group, output], pull[group, output]
            for _ in range(sweeps):
                for i in range(len(row)):
                    if not 2 * abs(force[i]) > matrix[i, i]:
                        continue
                    move = -1.0 if force[i] > 0 else 1.0
                    if abs(row[i] + move) <= levels:
                        row[i] += move
                        for j in range(len(row)):
                            force[j] += move * matrix[i, j]
