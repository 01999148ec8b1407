"""Casts of weights to int8 without MegEngine's operator."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import megengine as mge
import megengine.module as M
import numpy as np
import pytest
from megengine import Tensor
from megengine.core.tensor.dtype import get_scale, qint8, qint32

from mgq.quantization.int8_casts import casts_in_numpy
from mgq.quantization.modes import Mode, to_mode
from mgq.quantization.qat_layers import quantize_weight
from mgq.runtime.megengine import TracedRuntime
from mgq.zoo.layers import ConvBnRelu6


def test_halves_go_away_from_zero_and_the_ends_saturate() -> None:
    values = np.array([-200, -128.5, -2.5, -0.5, 0.49, 0.5, 1.5, 127.5, 300], np.float32)
    with casts_in_numpy():
        found = Tensor(values * np.float32(0.25)).astype(qint8(0.25))
    assert found.numpy().tolist() == [-128, -128, -3, -1, 0, 1, 2, 127, 127]
    assert found.numpy().dtype == np.int8 and get_scale(found.dtype) == 0.25


def test_the_operator_agrees_away_from_halves() -> None:
    rng = np.random.default_rng(0)
    scale = np.float32(0.0123)
    steps = rng.integers(-130, 130, (8, 16, 3, 3)) + rng.uniform(-0.49, 0.49, (8, 16, 3, 3))
    values = Tensor((steps * scale).astype(np.float32))
    stock = values.astype(qint8(scale))
    with casts_in_numpy():
        found = values.astype(qint8(scale))
    assert found.dtype == stock.dtype and get_scale(found.dtype) == get_scale(stock.dtype)
    np.testing.assert_array_equal(found.numpy(), stock.numpy())


def test_other_types_and_later_casts_are_the_operators() -> None:
    values = Tensor(np.array([0.5, 2.5], np.float32))
    stock = Tensor.astype
    with casts_in_numpy():
        assert values.astype("int32").numpy().tolist() == [0, 2]
        assert values.astype(qint32(0.5)).numpy().tolist() == [1, 5]
    assert Tensor.astype is stock
    with pytest.raises(ZeroDivisionError), casts_in_numpy():
        raise ZeroDivisionError
    assert Tensor.astype is stock


def observed_network() -> M.Module:
    class Network(M.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.quant = M.QuantStub()
            self.layers = M.Sequential(*(ConvBnRelu6(3 if i == 0 else 8, 8, 3, 1, 1, bias=False) for i in range(6)))
            self.dequant = M.DequantStub()

        def forward(self, inp: Tensor) -> Tensor:
            return self.dequant(self.layers(self.quant(inp))).mean(axis=(2, 3))

    network = to_mode(Network(), Mode.QAT)
    network.train()
    network(Tensor(np.random.default_rng(0).uniform(-128, 127, (2, 3, 8, 8)).astype(np.float32)))
    network.eval()
    return network


def test_int8_weights_are_those_of_fake_quantization() -> None:
    network = observed_network()
    int8 = to_mode(network, Mode.QUANTIZED)
    for layer, real in zip(network.layers, int8.layers, strict=True):
        integers = quantize_weight(layer).numpy() / layer.weight_observer.get_qparams().scale.numpy()
        np.testing.assert_array_equal(real.weight.numpy(), np.rint(integers))


class MallInfo(ctypes.Structure):
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]


def bytes_in_use() -> int:
    """What the C library has given out and not got back."""
    libc: Any = ctypes.CDLL(None)
    if not hasattr(libc, "mallinfo2"):
        pytest.skip("the C library does not tell")
    libc.mallinfo2.restype = MallInfo
    mge._full_sync()
    return int(libc.mallinfo2().uordblks)


def growth(work: Callable[[int], Any], times: int = 20) -> float:
    """kB that each of many calls of ``work`` leaves behind."""
    for number in range(5):
        work(number)
    before = bytes_in_use()
    for number in range(5, 5 + times):
        work(number)
    return (bytes_in_use() - before) / times / 1000


def test_an_int8_network_of_new_scales_leaves_little_behind_once_it_has_run() -> None:
    """Six convolutions by operators: some 500 kB."""
    network = observed_network()
    images = np.random.default_rng(1).integers(0, 256, (2, 3, 8, 8)).astype(np.uint8)

    def new_scales(factor: float) -> None:
        for layer in network.layers.modules():
            for observer in (getattr(layer, "act_observer", None), getattr(layer, "weight_observer", None)):
                if observer is not None:
                    observer.max_val[...] = observer.max_val * factor

    def run(number: int) -> None:
        new_scales(0.999)
        assert np.isfinite(TracedRuntime(to_mode(network, Mode.QUANTIZED)).run(images)).all()

    assert growth(run) < 100
