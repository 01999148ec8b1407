"""What processes need that train together as if on GPUs. Imports nothing that makes tensors before they know theirs."""

from __future__ import annotations

from typing import Any

import megengine as mge
import megengine.distributed as dist
from megengine.quantization import observer

from mgq.zoo import shufflenet_v1

ONE_UNIT_A_STAGE = (1, 1, 1)
"""What tests that are not about the layers make of ShuffleNetV1."""


def without_gpus() -> None:
    """In a process of a part: a real group, but on the processor and without NCCL."""
    begin = dist.init_process_group

    def init_process_group(*arguments: Any, **words: Any) -> None:
        begin(*arguments, **{**words, "backend": "auto"})
        mge.set_default_device("cpux")

    dist.init_process_group = init_process_group
    dist.bcast_list_ = lambda tensors: None
    dist.make_allreduce_cb = lambda how: lambda parameter, gradient: gradient
    shufflenet_v1.REPEATS = ONE_UNIT_A_STAGE
    for name in ("all_reduce_min", "all_reduce_max"):
        setattr(observer, name, lambda tensor, group: tensor)
