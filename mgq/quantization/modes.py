"""The three modes of a network and the one function that moves it from one to the next."""

from __future__ import annotations

from copy import deepcopy

import megengine.module as M
from megengine.module.qat import QATModule, QuantStub
from megengine.module.quantized import QuantizedModule
from megengine.quantization import quantize, quantize_qat

from mgq.errors import InputError
from mgq.quantization.float_layers import replace_float_layers
from mgq.quantization.int8_casts import casts_in_numpy
from mgq.quantization.option_names import Mode as Mode
from mgq.quantization.option_names import parse_mode as parse_mode
from mgq.quantization.relu6 import FLOAT_TO_QAT, QAT_TO_QUANTIZED
from mgq.quantization.targets import MEGENGINE, Target, UnitScaleObserver, target_of
from mgq.zoo.blueprint_network import BlueprintNetwork
from mgq.zoo.layers import without_initialization

ORDER = tuple(Mode)


def mode_of(network: M.Module) -> Mode:
    """The mode that ``network`` is in."""
    kinds = {type(module) for module in network.modules()}
    if any(issubclass(kind, QuantizedModule) for kind in kinds):
        return Mode.QUANTIZED
    return Mode.QAT if any(issubclass(kind, QATModule) for kind in kinds) else Mode.NORMAL


def to_mode(network: M.Module, mode: Mode, target: Target = MEGENGINE, in_place: bool = False) -> M.Module:
    """Convert ``network`` to ``mode``, step by step: a copy, or with ``in_place`` the network itself. In ``qat`` its
    observers have no ranges yet: train, calibrate, load a state or apply ranges before ``quantized``. Raises InputError
    for a step backward.
    """
    now = mode_of(network)
    if ORDER.index(mode) < ORDER.index(now):
        raise InputError(f"a network in mode {now.value} cannot go back to {mode.value}; load it again")
    training = network.training
    network = network if in_place else deepcopy(network)
    with without_initialization():
        if now is Mode.NORMAL and mode is not Mode.NORMAL:
            if isinstance(network, BlueprintNetwork) and target is MEGENGINE:
                raise InputError("MegEngine has no int8 for imported networks: pass --target onnx")
            target.prepare(network)
            quantize_qat(network, qconfig=target.qconfig, mapping={**target.replacements, **FLOAT_TO_QAT})
            if isinstance(network, BlueprintNetwork):
                network.set_floors()
            for module in network.modules():
                if isinstance(module, QATModule):
                    target.equip(module)
            fix_input_scale(network)
        if mode is Mode.QUANTIZED and now is not Mode.QUANTIZED:
            if target_of(network) is not MEGENGINE:
                raise InputError(
                    f"MegEngine cannot run int8 networks for the target {target_of(network).name}; "
                    "write an ONNX file of it"
                )
            network.eval()
            replace_float_layers(network)
            with casts_in_numpy():
                quantize(network, mapping=QAT_TO_QUANTIZED)
            network.eval()
    if mode is not Mode.QUANTIZED:
        network.train(training)
    return network


def fix_input_scale(network: M.Module) -> None:
    """Pixels minus 128 are the int8 input: the observer at the input stub gives scale 1 whatever it sees."""
    for module in network.modules():
        if isinstance(module, QuantStub):
            module.act_observer = UnitScaleObserver(dtype="qint8")
