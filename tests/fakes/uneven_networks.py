"""Networks of the zoo whose channels differ in size by a factor of ten."""

from __future__ import annotations

import megengine
import megengine.module as M
import numpy as np
from megengine import Tensor

from mgq.zoo.registry import spec_of
from tests.conftest import logits_of, smooth_images

IMAGES = smooth_images(8)


def network_of(arch: str, **options: object) -> M.Module:
    """Random weights, no two channels of a layer alike: some are ten times as large as others."""
    megengine.random.seed(3)
    network = spec_of(arch).build(10, **options)
    rng = np.random.default_rng(0)
    for module in network.modules():
        if isinstance(module, M.BatchNorm2d):
            shape = module.weight.numpy().shape
            module.weight[...] = Tensor(np.exp(rng.normal(-0.5, 0.6, shape)).astype(np.float32))
            module.bias[...] = Tensor(rng.normal(0, 0.5, shape).astype(np.float32))
    network.eval()
    return network


def with_true_statistics(network: M.Module) -> None:
    """Let batch norms know what they see, as after a training."""
    for module in network.modules():
        if isinstance(module, M.BatchNorm2d):
            module.momentum = 0.0
            module.training = True
    logits_of(network, IMAGES)
    network.eval()
