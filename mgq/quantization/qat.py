"""Quantization-aware training: observers and fake quantization of a network, and the phases that switch them."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from enum import Enum
from functools import partial

import megengine.module as M
import numpy as np
from megengine import Tensor
from megengine.distributed import is_distributed
from megengine.module.batchnorm import _BatchNorm
from megengine.module.conv_bn import _ConvBnActivation2d
from megengine.module.qat import QATModule, QuantStub
from megengine.quantization.fake_quant import FakeQuantize
from megengine.quantization.observer import (
    ExponentialMovingAverageObserver,
    MinMaxObserver,
    SyncExponentialMovingAverageObserver,
    SyncMinMaxObserver,
)
from megengine.quantization.quantize import disable_fake_quant, disable_observer, enable_fake_quant, enable_observer

from mgq.errors import InputError, no_such
from mgq.quantization.activations import RELU6
from mgq.quantization.learned_scales import LearnedFakeQuantize, LearnedStepSize, TrainedThreshold
from mgq.quantization.modes import Mode, to_mode
from mgq.quantization.qat_layers import fold_weight, observe_weights
from mgq.quantization.relu6 import QatConvBnRelu6
from mgq.quantization.targets import MEGENGINE, ChannelFakeQuantize, Target, target_of


class Phase(str, Enum):
    """The phases of quantization-aware training, in order; each keeps what the one before it froze.

    ``OBSERVE``: observers, in evaluation state; fake quantization off. ``QUANTIZE``: training with fake quantization
    and observers, or learned scales. ``FREEZE_BATCH_NORM``: batch norms use their running statistics and update them
    no more. ``FREEZE_OBSERVERS``: the ranges of activations stay, too.
    """

    OBSERVE = "observe"
    QUANTIZE = "quantize"
    FREEZE_BATCH_NORM = "freeze batch norm"
    FREEZE_OBSERVERS = "freeze observers"


PHASES = tuple(Phase)


class CurrentRangeObserver(MinMaxObserver):  # type: ignore[misc]
    """The observer of weights: the range of those it saw last.

    MegEngine's MinMaxObserver, whose state it has, only ever widens its range, so that one step with large weights, or
    with a small running variance folded into them, would coarsen the grid for good.
    """

    def forward(self, x_orig: Tensor) -> Tensor:
        if self.enabled:
            x = x_orig.detach()
            self.min_val[...], self.max_val[...] = x.min(), x.max()
        return x_orig


class SwitchableSyncMinMaxObserver(SyncMinMaxObserver):  # type: ignore[misc]
    """MegEngine's min-max observer for several devices, with a switch, which the original lacks."""

    def forward(self, x_orig: Tensor) -> Tensor:
        return super().forward(x_orig) if self.enabled else x_orig


Kind = Callable[..., M.Module]
# Name -> observer of activations on one device and on several, and the learned fake quantization, if there is one.
OBSERVERS: dict[str, tuple[Kind, Kind, type[LearnedFakeQuantize] | None]] = {
    "ema": (ExponentialMovingAverageObserver, SyncExponentialMovingAverageObserver, None),
    "min-max": (MinMaxObserver, SwitchableSyncMinMaxObserver, None),
    "lsq": (ExponentialMovingAverageObserver, SyncExponentialMovingAverageObserver, LearnedStepSize),
    "tqt": (ExponentialMovingAverageObserver, SyncExponentialMovingAverageObserver, TrainedThreshold),
}


def prepare_qat(
    network: M.Module, observer: str = "ema", target: Target = MEGENGINE, in_place: bool = False
) -> M.Module:
    """``network`` (mode ``normal`` or ``qat``) in mode ``qat``, with that kind of ``observer`` for its scales.

    ``ema``: moving average of each batch's smallest and largest activation, range of the current weights; ``min-max``:
    smallest and largest activation since the start; ``lsq``, ``tqt``: trained scales for weights and activations
    (:mod:`mgq.quantization.learned_scales`). Ranges that the network has already are kept. The input's scale is exactly
    1 and the classifier stays in float. What comes next is :func:`set_phase`. Raises InputError for another
    ``observer``.
    """
    if observer not in OBSERVERS:
        raise no_such("observer", observer, OBSERVERS)
    training = network.training
    network = to_mode(network, Mode.QAT, target, in_place)
    alone, among_others, learned = OBSERVERS[observer]
    if learned is not None and target_of(network) is not MEGENGINE:
        name = target_of(network).name
        raise InputError(f"observer '{observer}' trains one scale a layer; for the target {name} choose ema or min-max")
    kind = among_others if is_distributed() else alone
    if any(type(quantizer) is not learned for quantizer in find_learned_quantizers(network)):
        network = plain_qat(network, in_place=True)
    for module in qat_modules(network):
        module.set_fake_quant(True)
        if has_fixed_scale(module):
            continue
        if module.act_observer is not None:
            module.act_observer = with_range_of(module.act_observer, partial(kind, dtype=module.act_observer.dtype))
        if isinstance(module.weight_fake_quant, ChannelFakeQuantize):
            module.weight_fake_quant.fix_scales(None)  # they follow the weights, which are trained
        if module.weight_observer is not None:
            kind_of_weights = partial(CurrentRangeObserver, dtype=module.weight_observer.dtype)
            module.weight_observer = with_range_of(module.weight_observer, kind_of_weights)
        if learned is not None:
            give_learned_scales(module, learned)
    network.train(training)
    return network


def set_phase(network: M.Module, phase: Phase) -> None:
    """Put a prepared network into ``phase``, from whatever training or evaluation state it is in.

    Afterwards ``network.training`` is False for ``OBSERVE`` and True otherwise; parts of a network in training state
    that were put into evaluation state stay there. ``train()`` and ``eval()`` undo parts of a phase, so call this
    before each epoch, after the validation of the one before. It may be called again and again: scales are taken from
    observers once.

    A step changes the weights after their ranges were observed: call
    :func:`mgq.quantization.qat_layers.observe_weights` before a validation or a checkpoint. What training does
    next stays the same to the bit.
    """
    if phase is Phase.OBSERVE:
        observe(network)
        return
    start_fake_quantization(network)
    if PHASES.index(phase) >= PHASES.index(Phase.FREEZE_BATCH_NORM):
        freeze_batch_norm(network)
    if phase is Phase.FREEZE_OBSERVERS:
        freeze_observers(network)


def observe(network: M.Module) -> None:
    """Evaluation state with observers: a forward pass notes ranges of the float network, and changes nothing else."""
    network.eval()
    disable_fake_quant(network)
    enable_observer(network)


def start_fake_quantization(network: M.Module) -> None:
    """Training state with fake quantization. Learned scales that were not set yet take the ranges observed so far.

    With learned scales the observers are off from here on. Raises ValueError where they have observed nothing.
    """
    if not network.training:
        network.train()
    enable_fake_quant(network)
    enable_observer(network)
    for module in qat_modules(network):
        if isinstance(module.act_fake_quant, LearnedFakeQuantize):
            module.act_fake_quant.initialize(module.act_observer)
            module.act_observer.disable()
        if isinstance(module.weight_fake_quant, LearnedFakeQuantize):
            if not module.weight_fake_quant.initialized.numpy():
                observe_weights(module)
                module.weight_fake_quant.initialize(module.weight_observer, gain_of_batch_norm(module))
            module.weight_observer.disable()
    activations = [q for q in find_learned_quantizers(network) if q.per_image]
    if activations and not any(quantizer.initialized.numpy() for quantizer in activations):
        raise ValueError("learned scales start from observed ranges: observe some batches first")


def freeze_batch_norm(network: M.Module) -> None:
    """Normalize by the running statistics and update them no more; scale and shift are trained on.

    As in Krishnamoorthi 2018 (arXiv:1806.08342, section 3.2.2). A fake-quantized convolution then folds its batch norm
    and rounds its bias as in evaluation state, so training sees exactly what int8 will compute.
    """
    for module in network.modules():
        if isinstance(module, _BatchNorm | _ConvBnActivation2d):
            module.training = False


def freeze_observers(network: M.Module) -> None:
    """Keep the ranges of activations. Those of the weights go on following the weights, which are still trained."""
    for module in qat_modules(network):
        if module.act_observer is not None:
            module.act_observer.disable()


def find_learned_quantizers(network: M.Module) -> list[LearnedFakeQuantize]:
    """Those of ``lsq`` and ``tqt``, in the network's order; none for other observers."""
    return [module for module in network.modules() if isinstance(module, LearnedFakeQuantize)]


def plain_qat(network: M.Module, in_place: bool = False) -> M.Module:
    """A copy of ``network``, or with ``in_place`` itself, as :func:`to_mode` makes one, with the very same scales.

    In evaluation state. It gives the same int8 network to the bit, and its state is what a checkpoint of mode ``qat``
    holds, whichever observer the network was trained with.
    """
    network = network if in_place else deepcopy(network)
    target = target_of(network)
    for module in qat_modules(network):
        if has_fixed_scale(module):
            continue
        if module.act_observer is not None:
            dtype = module.act_observer.dtype
            observer = with_range_of(module.act_observer, partial(target.qconfig.act_observer, dtype=dtype))
            module.act_observer = with_scale_of(module.act_fake_quant, observer)
            module.act_fake_quant = target.qconfig.act_fake_quant(dtype=dtype)
        if module.weight_observer is not None:
            observer = with_range_of(module.weight_observer, target.qconfig.weight_observer)
            module.weight_observer = with_scale_of(module.weight_fake_quant, observer)
            if not isinstance(module.weight_fake_quant, ChannelFakeQuantize):
                module.weight_fake_quant = target.qconfig.weight_fake_quant()
    network.eval()
    disable_observer(network)
    return network


def qat_modules(network: M.Module) -> list[QATModule]:
    return [module for module in network.modules() if isinstance(module, QATModule)]


def has_fixed_scale(module: QATModule) -> bool:
    """Whether ``module`` is the input, whose scale is 1."""
    return isinstance(module, QuantStub)


def give_learned_scales(module: QATModule, kind: type[LearnedFakeQuantize]) -> None:
    if module.act_fake_quant is not None and type(module.act_fake_quant) is not kind:
        ceiling = RELU6.high if isinstance(module, QatConvBnRelu6) else None
        module.act_fake_quant = kind(module.act_fake_quant.dtype, ceiling)
    if module.weight_fake_quant is not None and type(module.weight_fake_quant) is not kind:
        module.weight_fake_quant = kind(module.weight_fake_quant.dtype, per_image=False)


def gain_of_batch_norm(module: QATModule) -> float:
    """How many times larger the weights of ``module`` are with its batch norm folded in."""
    weight = module.conv.weight if hasattr(module, "bn") else module.weight
    largest = float(np.abs(weight.numpy()).max())
    return float(np.abs(fold_weight(module).numpy()).max()) / largest if largest else 1.0


def with_range_of(old: MinMaxObserver, kind: Kind) -> MinMaxObserver:
    """A new observer of that ``kind`` with the state of ``old``."""
    observer = kind()
    observer.scale_limit = old.scale_limit
    observer.min_val[...], observer.max_val[...] = old.min_val, old.max_val
    if isinstance(observer, ExponentialMovingAverageObserver):
        has_seen = old.min_val.numpy() <= old.max_val.numpy()
        momentum = getattr(old, "momentum", observer.momentum)
        observer.momentum[...] = momentum
        observer.runtime_momentum[...] = getattr(old, "runtime_momentum", momentum if has_seen else Tensor(0.0))
    return observer


def with_scale_of(fake_quant: FakeQuantize | LearnedFakeQuantize, observer: MinMaxObserver) -> MinMaxObserver:
    """``observer`` itself, with the learned scale of ``fake_quant`` where there is one."""
    if isinstance(fake_quant, LearnedFakeQuantize) and fake_quant.initialized.numpy():
        limit = fake_quant.limit()
        lowest = -limit if observer.min_val.numpy() < 0 else np.float32(0)
        observer.min_val[...], observer.max_val[...] = Tensor(lowest), Tensor(limit)
    return observer
