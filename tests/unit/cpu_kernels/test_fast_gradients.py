"""Fast training steps on a CPU against MegEngine's own: results, gradients, state; and what they leave alone."""

from __future__ import annotations

import contextlib
import copy
import gc
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import megengine as mge
import megengine.module as M
import megengine.module.conv as conv_module
import megengine.module.qat as Q
import numpy as np
import numpy.typing as npt
import psutil  # type: ignore[import-untyped]
import pytest
from megengine import Parameter, Tensor
from megengine.autodiff import GradManager
from megengine.optimizer import SGD
from megengine.quantization import LSQ
from megengine.quantization.utils import QuantMode, create_qparams, fake_quant_tensor

from mgq.cpu_kernels import batch_norm_loops, fast_gradients, fast_gradients_enabled, feature_maps, onednn, switch
from mgq.cpu_kernels.autograd_functions import (
    Convolution,
    FakeQuantizedConvolution,
    FoldedConvolution,
    NormalizedConvolution,
)
from mgq.cpu_kernels.batch_norm import Limits, NormalizedMap
from mgq.cpu_kernels.channels_last import shuffle
from mgq.cpu_kernels.elementwise import (
    PIECE,
    add_to_histograms,
    apply_mask,
    clamp_below,
    extremes,
    extremes_of_rows,
    fake_quantize,
    find_moments,
    run_in_pieces,
)
from mgq.cpu_kernels.fake_quantization import UNKNOWN, Quantizer, quantizer_of
from mgq.cpu_kernels.tensor_exchange import gathering_state, read_state, write_state
from mgq.errors import FailureError
from mgq.machine import has_bfloat16, usable_cores
from mgq.quantization.modes import Mode, to_mode
from mgq.quantization.qat import freeze_batch_norm
from mgq.quantization.relu6 import QatConvBnRelu6
from mgq.zoo.layers import ConvBnRelu6
from mgq.zoo.network_state import state_of
from mgq.zoo.registry import specs
from tests.conftest import EACH_FAMILY, FAMILIES, blank, filled, one_line_about, smooth_images
from tests.fakes.two_processes import ThreadExchange, run_both

Array = npt.NDArray[np.float32]

TOLERANCE = 1e-5
FUSED = (M.ConvBn2d, M.ConvBnRelu2d, ConvBnRelu6, Q.ConvBn2d, Q.ConvBnRelu2d, QatConvBnRelu6)
KINDS = {"bn": M.ConvBn2d, "bn relu": M.ConvBnRelu2d, "bn relu6": ConvBnRelu6}


class Shape(NamedTuple):
    """A convolution of the zoo: square ``kernel``, one ``stride`` and ``padding`` for both axes."""

    in_channels: int
    out_channels: int
    kernel: int
    stride: int
    padding: int
    groups: int

    def input_size(self) -> int:
        """Of maps that give an output of 3x3."""
        return max(3, 2 * self.stride + self.kernel - 2 * self.padding)


class Outcome(NamedTuple):
    output: Array
    gradients: dict[str, Array]
    state: dict[str, Array]


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def relative(found: Array, expected: Array) -> float:
    """Norm of the difference over the norm of ``expected``."""
    return float(np.linalg.norm(np.ravel(found - expected)) / (np.linalg.norm(np.ravel(expected)) + 1e-30))


def whole(gradients: dict[str, Array]) -> Array:
    return np.concatenate([gradients[name].ravel() for name in sorted(gradients)])


def stepped(module: M.Module, source: Array, d_output: Array | None, fast: bool, wants_source: bool = True) -> Outcome:
    """A copy of ``module`` run on ``source`` and back from ``d_output``: output, all gradients, the state it is in."""
    module = copy.deepcopy(module)
    x = Tensor(source)
    x.qparams.update(create_qparams(QuantMode.SYMMERTIC, "qint8", scale=Tensor(0.03)))
    manager = GradManager().attach([*module.parameters(), *([x] if wants_source else [])])
    with fast_gradients() if fast else contextlib.nullcontext(), manager:
        output = module(x)
        manager.backward(output, Tensor(normal(*output.shape, seed=1) if d_output is None else d_output))
    gradients = {name: p.grad.numpy() for name, p in module.named_parameters() if p.grad is not None}
    if wants_source:
        gradients["source"] = x.grad.numpy()
    return Outcome(output.numpy(), gradients, state_of(module))


def assert_alike(fast: Outcome, stock: Outcome, about: object = "", tolerance: float = TOLERANCE) -> None:
    assert relative(fast.output, stock.output) < tolerance, about
    assert fast.gradients.keys() == stock.gradients.keys(), about
    assert relative(whole(fast.gradients), whole(stock.gradients)) < tolerance, about
    assert fast.state.keys() == stock.state.keys(), about
    for name, value in stock.state.items():
        assert fast.state[name].shape == value.shape, (about, name)
        np.testing.assert_allclose(fast.state[name], value, rtol=1e-4, atol=1e-6, err_msg=f"{about} {name}")


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[type]:
    """Filled with the fast functions that were called."""
    calls: list[type] = []
    for kind in (Convolution, NormalizedConvolution):
        stock = kind.forward

        def forward(self: Any, *inputs: Tensor, stock: Callable[..., Tensor] = stock) -> Tensor:
            calls.append(type(self))
            return stock(self, *inputs)

        monkeypatch.setattr(kind, "forward", forward)
    return calls


# ---- every layer of the zoo ----


def zoo_convolutions() -> list[Shape]:
    """Of all architectures, none twice."""
    found = set()
    for arch in specs():
        for module in blank(arch).modules():
            if isinstance(module, M.Conv2d):
                sizes = (module.kernel_size[0], module.stride[0], module.padding[0])
                found.add(Shape(module.in_channels, module.out_channels, *sizes, module.groups))
    return sorted(found)


@pytest.mark.slow
def test_every_convolution_of_the_zoo_has_the_stock_gradients(used: list[type]) -> None:
    shapes = zoo_convolutions()
    assert len(shapes) > 100
    for shape in shapes:
        module = M.Conv2d(*shape[:5], groups=shape.groups, bias=False)
        source = normal(2, shape.in_channels, shape.input_size(), shape.input_size())
        assert_alike(stepped(module, source, None, True), stepped(module, source, None, False), shape)
    assert used == [Convolution] * len(shapes)


def fused_module(kind: str, qat: bool, shape: Shape) -> M.Module:
    module = KINDS[kind](*shape[:5], groups=shape.groups, bias=False)
    module.bn.weight[...] = np.random.default_rng(2).uniform(0.5, 2, module.bn.weight.shape).astype(np.float32)
    module.bn.bias[...] = normal(*module.bn.bias.shape, seed=3)
    module.bn.running_var[...] = np.random.default_rng(4).uniform(0.5, 2, module.bn.weight.shape).astype(np.float32)
    if qat:
        module = to_mode(M.Sequential(module), Mode.QAT)
    module.train()
    return module


SHAPES = (
    Shape(3, 24, 3, 2, 1, 1),
    Shape(16, 40, 1, 1, 0, 1),
    Shape(24, 24, 3, 2, 1, 24),
    Shape(24, 24, 7, 2, 3, 24),
    Shape(16, 16, 5, 1, 2, 16),
    Shape(30, 60, 1, 1, 0, 3),
)


@pytest.mark.parametrize("kind", KINDS)
def test_fused_float_layers_are_stock_in_output_gradients_and_state(kind: str, used: list[type]) -> None:
    for shape in SHAPES:
        module, source = fused_module(kind, False, shape), normal(3, shape.in_channels, 5, 5)
        assert_alike(stepped(module, source, None, True), stepped(module, source, None, False), shape)
    assert used == [NormalizedConvolution] * len(SHAPES)


class Mapped(M.Module):  # type: ignore[misc]
    """A layer that is given a feature map, where training is fast."""

    def __init__(self, layer: M.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        if not fast_gradients_enabled():
            return self.layer(x)
        output = self.layer(feature_maps.of_tensor(x))
        assert isinstance(output, feature_maps.FeatureMap)
        return output.to_tensor()


@pytest.mark.parametrize("qat", [False, True], ids=["float", "qat"])
@pytest.mark.parametrize("kind", KINDS)
def test_layers_of_feature_maps_are_stock_in_output_gradients_and_state(kind: str, qat: bool) -> None:
    for shape in SHAPES:
        layer, source = fused_module(kind, qat, shape), normal(3, shape.in_channels, 5, 5)
        d_output = steady_gradient(next(part for part in layer.modules() if isinstance(part, FUSED)), source)
        module = Mapped(layer)
        fast, stock = (stepped(module, source, d_output, fast) for fast in (True, False))
        assert_alike(rounded_alike(layer, source, fast, stock) if qat else fast, stock, shape)


@pytest.mark.skipif(not has_bfloat16(), reason="this processor has no bfloat16")
def test_convolutions_in_bfloat16_round_what_they_multiply_and_nothing_else() -> None:
    module, source = M.ConvBnRelu2d(32, 16, 3, padding=1, bias=False), normal(4, 32, 6, 6)
    module.conv.weight[...] = Tensor(normal(16, 32, 3, 3, seed=3))
    exact = stepped(module, source, None, fast=False)
    with fast_gradients(bfloat16=True):
        rounded = stepped(module, source, None, fast=False)
    assert 1e-4 < relative(rounded.output, exact.output) < 1e-2
    assert 1e-4 < relative(whole(rounded.gradients), whole(exact.gradients)) < 3e-2
    whole_numbers = normal(4, 32, 6, 6).round()  # bfloat16 holds these, and these weights
    module.conv.weight[...] = Tensor(normal(16, 32, 3, 3, seed=3).round())
    with fast_gradients(bfloat16=True):
        same = stepped(module, whole_numbers, None, fast=False)
    assert relative(same.output, stepped(module, whole_numbers, None, fast=False).output) < TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
def test_batch_norm_in_eval_mode_within_a_training_network_has_the_gradients_of_its_formula(
    kind: str, used: list[type]
) -> None:
    """MegEngine's own gradient of the scale reads memory that nothing was written to, and is wrong now and then."""
    for shape in SHAPES:
        module, source = fused_module(kind, False, shape), normal(3, shape.in_channels, 5, 5)
        module.bn.eval()
        fast = stepped(module, source, None, True)
        assert_alike(fast, by_fixed_statistics(module, kind, source), shape)
    assert used == [NormalizedConvolution] * len(SHAPES)


def by_fixed_statistics(module: M.Module, kind: str, source: Array) -> Outcome:
    """What :func:`stepped` gives, by MegEngine's convolution and the formula of batch norm with given statistics."""
    bn = module.bn
    factor = 1 / np.sqrt(bn.running_var.numpy() + np.float32(bn.eps))
    normal_values = (module.conv(Tensor(source)).numpy() - bn.running_mean.numpy()) * factor
    output = normal_values * bn.weight.numpy() + bn.bias.numpy()
    d_output = normal(*output.shape, seed=1)
    if kind != "bn":
        d_output *= (output > 0) & ((output < 6) | (kind == "bn relu"))
        output = np.clip(output, 0, 6 if kind == "bn relu6" else None)
    conv = stepped(module.conv, source, d_output * bn.weight.numpy() * factor, False)
    gradients = {
        "source": conv.gradients["source"],
        "conv.weight": conv.gradients["weight"],
        "bn.weight": (d_output * normal_values).sum((0, 2, 3)).reshape(bn.weight.shape),
        "bn.bias": d_output.sum((0, 2, 3)).reshape(bn.bias.shape),
    }
    return Outcome(output, gradients, state_of(module))


@pytest.mark.parametrize("frozen_norm", [False, True], ids=["training statistics", "frozen batch norm"])
@pytest.mark.parametrize("kind", KINDS)
def test_fused_fake_quantized_layers_are_stock_in_output_gradients_and_state(
    kind: str, frozen_norm: bool, used: list[type]
) -> None:
    for shape in SHAPES:
        module, source = fused_module(kind, True, shape), normal(3, shape.in_channels, 5, 5)
        if frozen_norm:
            freeze_batch_norm(module)
        d_output = steady_gradient(next(part for part in module.modules() if isinstance(part, FUSED)), source)
        fast, stock = (stepped(module, source, d_output, fast) for fast in (True, False))
        assert_alike(rounded_alike(module, source, fast, stock), stock, shape)
    assert used == [FoldedConvolution if frozen_norm else FakeQuantizedConvolution] * len(SHAPES)


def rounded_alike(module: M.Module, source: Array, fast: Outcome, stock: Outcome) -> Outcome:
    """``fast`` with the values of ``stock`` where rounding decides.

    The sums of a convolution differ by float rounding: one that lies between two steps may go to either, and no other.
    """
    far = np.abs(fast.output - stock.output) > 1e-5 * np.abs(stock.output).max()
    steps, scale = steps_before_rounding(next(p for p in module.modules() if isinstance(p, FUSED)), source)
    np.testing.assert_allclose(np.abs(steps[far]) % 1, 0.5, atol=1e-3)
    np.testing.assert_allclose(np.abs(fast.output - stock.output)[far], scale, rtol=1e-3)
    return fast._replace(output=np.where(far, stock.output, fast.output))


def steps_before_rounding(module: M.Module, source: Array) -> tuple[Array, float]:
    """How many steps of its output's scale the values are that a fake-quantized ``module`` rounds, and that scale."""
    x = Tensor(source)
    x.qparams.update(create_qparams(QuantMode.SYMMERTIC, "qint8", scale=Tensor(0.03)))
    scale = float(copy.deepcopy(module)(x).qparams.scale.numpy().item())
    before: Array = copy.deepcopy(module).calc_conv_bn_qat(x).numpy()
    return before / np.float32(scale), scale


def steady_gradient(module: M.Module, source: Array) -> Array:
    """Noise for an output's gradient; 0 where rounding decides if it passes: near 0, near 6, at the largest value."""
    module = copy.deepcopy(module)
    x = Tensor(source)
    x.qparams.update(create_qparams(QuantMode.SYMMERTIC, "qint8", scale=Tensor(0.03)))
    if isinstance(module, Q.QATModule):
        before = module.calc_conv_bn_qat(x).numpy()
    else:
        before = module.bn(module.conv(x)).numpy()
    after = np.minimum(before, 6) if isinstance(module, ConvBnRelu6 | QatConvBnRelu6) else before
    margin = 1e-4 * np.abs(after).max()
    unsteady = (np.abs(before) < margin) | (np.abs(before - 6) < margin) | (after > after.max() - margin)
    return np.where(unsteady, np.float32(0), normal(*before.shape, seed=1))


@pytest.mark.parametrize("mode", [Mode.NORMAL, Mode.QAT], ids=lambda mode: mode.value)
@pytest.mark.parametrize("arch", EACH_FAMILY)
def test_all_layers_of_a_network_together_have_the_stock_gradient(arch: str, mode: Mode, used: list[type]) -> None:
    """Each on what it is given within the network: rounding in one, which may flip ReLUs later, is not carried on."""
    network = filled(blank(arch))
    network = network if mode is Mode.NORMAL else to_mode(network, Mode.QAT)
    network.train()
    sources = layer_inputs(network, smooth_images(4, 32, 32).astype(np.float32) - 128)
    difference = size = 0.0
    for module, source in sources:
        d_output = steady_gradient(module, source)
        fast, stock = (stepped(module, source, d_output, fast) for fast in (True, False))
        assert fast.gradients.keys() == stock.gradients.keys()
        found, expected = whole(fast.gradients), whole(stock.gradients)
        difference += float(np.sum((found - expected) ** 2))
        size += float(np.sum(expected**2))
        for name, value in stock.state.items():
            np.testing.assert_allclose(fast.state[name], value, rtol=1e-4, atol=1e-6, err_msg=name)
    assert np.sqrt(difference / size) < TOLERANCE
    expected_kind = NormalizedConvolution if mode is Mode.NORMAL else FakeQuantizedConvolution
    assert used == [expected_kind] * len(sources)


def layer_inputs(network: M.Module, images: Array) -> list[tuple[M.Module, Array]]:
    """The fused layers of ``network``, no two alike in kind and shape, and what each is given for ``images``."""
    found: dict[Any, tuple[M.Module, Array]] = {}

    def note(module: M.Module, inputs: tuple[Tensor, ...]) -> None:
        conv = module.conv
        key = (type(module), conv.weight.shape, conv.stride, inputs[0].shape)
        found.setdefault(key, (module, inputs[0].numpy()))

    state = copy.deepcopy(network)
    hooks = [module.register_forward_pre_hook(note) for module in state.modules() if isinstance(module, FUSED)]
    state(Tensor(images))
    for hook in hooks:
        hook.remove()
    return list(found.values())


# ---- element by element ----


@pytest.mark.parametrize("size", [0, 1, PIECE, 9 * PIECE * usable_cores() + 5])
def test_pieces_cover_everything_once_and_in_order(size: int) -> None:
    pieces = run_in_pieces(lambda piece: (piece.start, piece.stop), size)
    assert [element for start, stop in pieces for element in range(start, stop)] == list(range(size))


def test_fake_quantization_is_that_of_megengine_to_the_bit() -> None:
    array = 100 * normal(9 * PIECE * usable_cores() + 5)
    array[:8] = [0.5, -0.5, 1.5, 2.5, 0.49999997, 127.5, -128.5, np.nextafter(np.float32(1.5), np.float32(0))]
    for scale in (1.0, 0.37):
        qparams = create_qparams(QuantMode.SYMMERTIC, "qint8", scale=Tensor(scale))
        x = Tensor(array)
        manager = GradManager().attach([x])
        with manager:
            expected = fake_quant_tensor(x, qparams)
            manager.backward(expected, Tensor(np.ones_like(array)))
        found = quantizer_of(qparams)
        assert found is not None
        output, passes = found.apply(array)
        assert passes is not None
        np.testing.assert_array_equal(output, expected.numpy())
        np.testing.assert_array_equal(passes, x.grad.numpy() != 0)
        np.testing.assert_array_equal(apply_mask(array, passes), array * passes)


def test_a_ceiling_holds_large_arrays_below_it() -> None:
    array = normal(9 * PIECE * usable_cores() + 5)
    held = array.copy()
    below = clamp_below(held, 1.0)
    np.testing.assert_array_equal(held, np.minimum(array, 1))
    assert below is not None
    np.testing.assert_array_equal(below, array < 1)
    assert clamp_below(held, 2.0) is None
    assert list(extremes(array)) == [array.min(), array.max()]


# ---- whole steps ----


def small_network(mode: Mode, depth: int = 3) -> M.Module:
    mge.random.seed(1)
    layers = [
        M.ConvBnRelu2d(3, 16, 3, 2, 1, bias=False),
        ConvBnRelu6(16, 16, 3, 1, 1, groups=16, bias=False),
        M.Conv2d(16, 8, 1),
    ]
    network = M.Sequential(*layers[:depth])
    network = network if mode is Mode.NORMAL else to_mode(network, Mode.QAT)
    network.train()
    return network


def trained(network: M.Module, batches: list[Array]) -> M.Module:
    """``network`` after one step of SGD on each of ``batches``."""
    manager = GradManager().attach(network.parameters())
    optimizer = SGD(network.parameters(), 0.01, momentum=0.9, weight_decay=1e-4)
    for batch in batches:
        with manager:
            loss = (network(Tensor(batch)) ** 2).mean()
            manager.backward(loss)
        optimizer.step().clear_grad()
    return network


@pytest.mark.parametrize("arch", EACH_FAMILY)
def test_a_network_differs_from_stock_by_no_more_than_rounding_does(arch: str) -> None:
    """Rounding flips ReLUs at 0 and a deep network amplifies it: stock with its weights shaken by 1e-6 is the mark."""
    network = filled(blank(arch))
    network.train()
    for module in network.modules():
        if isinstance(module, M.Dropout):
            module.drop_prob = 0.0
    images = smooth_images(8).astype(np.float32) - 128
    d_output = normal(8, 10, seed=1) / 80
    stock, fast = (stepped(network, images, d_output, fast, wants_source=False) for fast in (False, True))
    shaken = [stepped(shaken_by_rounding(network, seed), images, d_output, False, False) for seed in (1, 2)]
    mark = max(relative(whole(other.gradients), whole(stock.gradients)) for other in shaken)
    assert relative(whole(fast.gradients), whole(stock.gradients)) < 10 * mark
    mark = max(relative(other.output, stock.output) for other in shaken)
    assert relative(fast.output, stock.output) < 10 * mark < 0.1


def shaken_by_rounding(network: M.Module, seed: int) -> M.Module:
    network = copy.deepcopy(network)
    for number, parameter in enumerate(network.parameters()):
        factor = 1 + 1e-6 * normal(*parameter.shape, seed=1000 * seed + number)
        parameter._reset(Tensor(parameter.numpy() * factor.astype(np.float32)))
    return network


@pytest.mark.parametrize("mode", [Mode.NORMAL, Mode.QAT], ids=lambda mode: mode.value)
def test_the_same_steps_give_the_same_bits(mode: Mode) -> None:
    batches = [normal(size, 3, 16, 16, seed=size) for size in (8, 8, 5)]
    network = small_network(mode)
    with fast_gradients():
        one, other = (state_of(trained(copy.deepcopy(network), batches)) for _ in range(2))
    assert all(np.array_equal(one[name], other[name]) for name in one)
    before = state_of(network)
    assert any(not np.array_equal(one[name], before[name]) for name in one)


def test_steps_follow_stock_steps_through_odd_batches() -> None:
    batches = [normal(size, 3, 15, 17, seed=size) for size in (8, 3, 1, 8)]
    network = small_network(Mode.NORMAL)
    stock = state_of(trained(copy.deepcopy(network), batches))
    with fast_gradients():
        fast = state_of(trained(network, batches))
    for name, value in stock.items():
        np.testing.assert_allclose(fast[name], value, rtol=1e-3, atol=1e-5, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("mode", [Mode.NORMAL, Mode.QAT], ids=lambda mode: mode.value)
def test_a_thousand_steps_do_not_leak(mode: Mode) -> None:
    network, batch = small_network(mode, 2), normal(16, 3, 24, 24)

    def memory_after(steps: int) -> int:
        trained(network, [batch] * steps)
        mge._full_sync()
        gc.collect()
        return int(psutil.Process().memory_info().rss)

    with fast_gradients():
        before = memory_after(200)
        after = memory_after(800)
    # One activation kept a step would be 800 times 0.15 MB.
    assert after - before < 20e6


# ---- what is left alone ----


@pytest.mark.parametrize("batch, size", [(1, 3), (2, 1)])
def test_maps_of_one_pixel_and_batches_of_one(batch: int, size: int) -> None:
    for qat in (False, True):
        module = fused_module("bn relu", qat, Shape(8, 16, 1, 1, 0, 1))
        source = normal(batch, 8, size, size)
        fast, stock = (stepped(module, source, None, fast) for fast in (True, False))
        # Two values a channel nearly cancel when they are normalized.
        assert_alike(fast, stock, tolerance=1e-4)


def test_a_frozen_batch_norm_is_stock_after_a_fast_convolution(used: list[type]) -> None:
    module = fused_module("bn relu", False, Shape(8, 16, 3, 1, 1, 1))
    module.bn.freeze = True
    source = normal(2, 8, 6, 6)
    fast, stock = (stepped(module, source, None, fast) for fast in (True, False))
    assert_alike(fast, stock)
    assert used == [Convolution]


def test_dilation_and_forward_without_gradients_are_stock(used: list[type]) -> None:
    dilated, plain = M.Conv2d(4, 8, 3, dilation=2), M.Conv2d(4, 8, 3)
    source = normal(2, 4, 8, 8)
    assert_alike(stepped(dilated, source, None, True), stepped(dilated, source, None, False))
    expected = plain(Tensor(source)).numpy()
    with fast_gradients():
        assert np.array_equal(plain(Tensor(source)).numpy(), expected)
    assert used == []


def test_traced_code_is_stock(used: list[type]) -> None:
    module = M.Conv2d(4, 8, 3)
    source = Tensor(normal(2, 4, 8, 8))
    manager = GradManager().attach(module.parameters())

    @mge.jit.trace(symbolic=True)  # type: ignore[untyped-decorator]
    def step(x: Tensor) -> Tensor:
        with manager:
            loss = (module(x) ** 2).mean()
            manager.backward(loss)
        return loss

    with fast_gradients():
        step(source)
    assert used == []


def test_an_unknown_fake_quantization_keeps_its_own_code_and_gets_fast_convolutions(used: list[type]) -> None:
    module = fused_module("bn relu", True, Shape(8, 16, 3, 1, 1, 1))
    inner = next(part for part in module.modules() if isinstance(part, Q.ConvBnRelu2d))
    source = normal(2, 8, 6, 6)
    module(Tensor(source))
    for name in ("weight", "act"):
        quantizer = LSQ(dtype=getattr(inner, f"{name}_observer").dtype)
        quantizer.set_qparams(getattr(inner, f"{name}_observer").get_qparams())
        setattr(inner, f"{name}_fake_quant", quantizer)
    fast, stock = (stepped(module, source, None, fast) for fast in (True, False))
    assert fast.gradients.keys() == stock.gradients.keys()
    # LSQ's step sizes have gradients that a single rounding the other way changes.
    for name in ("source", *(n for n in stock.gradients if n.endswith("conv.weight"))):
        assert relative(fast.gradients[name], stock.gradients[name]) < 1e-3, name
    assert used == [Convolution]


@pytest.fixture
def stock_functions() -> Iterator[tuple[Any, ...]]:
    yield conv_module.conv2d, M.ConvBn2d.forward, Q.ConvBnRelu2d.forward, Q.QATModule._apply_fakequant_with_observer


def test_everything_is_put_back_even_after_an_error(stock_functions: tuple[Any, ...]) -> None:
    with pytest.raises(KeyError), fast_gradients():
        with fast_gradients():
            assert fast_gradients_enabled()
        assert fast_gradients_enabled()
        assert conv_module.conv2d is not stock_functions[0]
        raise KeyError
    assert not fast_gradients_enabled()
    now = (conv_module.conv2d, M.ConvBn2d.forward, Q.ConvBnRelu2d.forward, Q.QATModule._apply_fakequant_with_observer)
    assert now == stock_functions


def test_a_missing_onednn_is_one_line_that_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "PACKAGE", "no-such-package")
    # Past the cache: what is loaded stays, as the programs made so far belong to it.
    monkeypatch.setattr(onednn, "library", onednn.library.__wrapped__)
    with pytest.raises(FailureError) as caught, fast_gradients():
        pass
    assert one_line_about(str(caught.value), "oneDNN", "no-such-package")
    assert not fast_gradients_enabled()


@pytest.mark.parametrize("elements", [1, 63, 64, 65, 1000])
def test_moments_are_numpys(elements: int) -> None:
    rows = np.random.default_rng(0).standard_normal((37, elements)).astype(np.float32)
    lows, highs, totals, squares = find_moments(rows)
    np.testing.assert_array_equal(lows, rows.min(axis=1))
    np.testing.assert_array_equal(highs, rows.max(axis=1))
    exact = rows.astype(np.float64)
    np.testing.assert_allclose(totals, exact.sum(axis=1), atol=1e-4)
    np.testing.assert_allclose(squares, np.square(exact).sum(axis=1), rtol=1e-5)
    for at, strange in enumerate((np.nan, np.inf, -np.inf)):
        rows[at, at % elements] = strange
    assert list(np.flatnonzero(~np.isfinite(find_moments(rows)[2]))) == [0, 1, 2]


def test_histograms_are_numpys() -> None:
    """Each row has bins of its own; values at the ends, of 0 and of rows without a width fall where they should."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=(3, 5000)).astype(np.float32)
    values[0, :1000], values[2] = 0, 7.0
    weights = rng.normal(size=values.shape).astype(np.float32)
    lowest, highest = values.min(axis=1).astype(np.float64), values.max(axis=1).astype(np.float64)
    squares, sums = np.zeros((3, 64)), np.zeros((3, 16), np.float32)
    add_to_histograms(values, weights, lowest, highest, squares, sums)
    assert squares[2, 0] == pytest.approx(np.square(weights[2], dtype=np.float64).sum(), rel=1e-5)
    for row in (0, 1):
        counted = values[row] != 0
        ends = (lowest[row], highest[row])
        for bins, found, wanted in ((64, squares, weights**2), (16, sums, weights)):
            expected, _ = np.histogram(values[row][counted], bins, ends, weights=wanted[row][counted])
            # A value next to the edge of a bin may be on the other side of it in float32.
            assert np.abs(found[row] - expected).sum() < 0.01 * np.abs(wanted[row]).sum()


@pytest.mark.parametrize("mode", [Mode.NORMAL, Mode.QAT], ids=lambda mode: mode.value)
@pytest.mark.parametrize("arch", EACH_FAMILY)
def test_layers_of_a_network_hand_on_feature_maps_and_not_tensors(
    arch: str, mode: Mode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copies between the layers cost as much as their convolutions: only the input is turned."""
    turned: list[Tensor] = []

    def of_tensor(tensor: Tensor) -> feature_maps.FeatureMap:
        turned.append(tensor)
        return feature_maps.of_tensor(tensor)

    monkeypatch.setattr(switch, "of_tensor", of_tensor)
    network = blank(arch) if mode is Mode.NORMAL else to_mode(blank(arch), Mode.QAT)
    network.train()
    manager = GradManager().attach(network.parameters())
    with fast_gradients(), manager:
        manager.backward(network(Tensor(normal(2, 3, 32, 32))).sum())
    assert len(turned) == 1 and all(parameter.grad is not None for parameter in network.parameters())


@pytest.mark.parametrize("decay", [0.0, 1e-2])
def test_steps_of_descent_are_those_of_megengine_to_the_bit(decay: float) -> None:
    states = []
    for fast in (True, False):
        parameters = [Parameter(normal(3, 5, seed=1)), Parameter(normal(40000, seed=2)), Parameter(np.float32(0.7))]
        optimizer = SGD(parameters, lr=0.03, momentum=0.9, weight_decay=decay)
        with fast_gradients() if fast else contextlib.nullcontext():
            for step in range(3):
                for place, parameter in enumerate(parameters):
                    parameter.grad = Tensor(normal(*parameter.shape, seed=10 * step + place))
                optimizer.step()
        states.append(
            [p.numpy() for p in parameters] + [optimizer._state[p]["momentum_buffer"].numpy() for p in parameters]
        )
    for found, expected in zip(*states, strict=True):
        assert found.shape == expected.shape
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_steps_take_gradients_that_are_arrays(momentum: float) -> None:
    found = []
    for kind in (Tensor, np.asarray):
        parameter = Parameter(normal(3, 5, seed=1))
        optimizer = SGD([parameter], lr=0.03, momentum=momentum)
        with fast_gradients():
            for step in range(2):
                parameter.grad = kind(normal(3, 5, seed=step))
                optimizer.step().clear_grad()
        found.append(parameter.numpy())
    np.testing.assert_array_equal(*found)


def test_velocities_can_be_kept_restored_and_used_by_megengine() -> None:
    def descended(fast: bool, then_fast: bool) -> list[Array]:
        parameter = M.Conv2d(3, 4, 1).weight
        parameter[...] = Tensor(normal(4, 3, 1, 1))
        optimizer = SGD([parameter], lr=0.03, momentum=0.9, weight_decay=1e-2)

        def step(seed: int) -> None:
            parameter.grad = Tensor(normal(4, 3, 1, 1, seed=seed))
            optimizer.step()

        with fast_gradients() if fast else contextlib.nullcontext():
            step(1)
            kept = optimizer.state_dict()
            value = optimizer._state[parameter]["momentum_buffer"].numpy()
            step(2)
            optimizer.load_state_dict(kept)
            step(3)
            optimizer._state[parameter]["momentum_buffer"][...] = Tensor(value * 2)
            step(4)
            found = [value, optimizer._state[parameter]["momentum_buffer"].numpy(), parameter.numpy()]
        with fast_gradients() if then_fast else contextlib.nullcontext():
            step(5)
        assert isinstance(optimizer._state[parameter]["momentum_buffer"], Tensor)
        return [*found, parameter.numpy()]

    stock = descended(False, False)
    for choice in ((True, False), (True, True), (False, True)):
        for found, expected in zip(descended(*choice), stock, strict=True):
            np.testing.assert_array_equal(found, expected)


def test_a_layers_state_is_read_right_just_after_it_was_written() -> None:
    state = [Tensor(np.zeros(1 << 20, np.float32)) for _ in range(3)]
    for number in range(1, 4):
        for tensor in state:
            write_state(tensor, np.full(1 << 20, number, np.float32))
        assert all((value == number).all() for value in read_state(*state))


def test_a_layers_state_that_is_gathered_keeps_its_shapes_and_who_wrote_it_last() -> None:
    shapes: tuple[tuple[int, ...], ...] = ((), (1,), (1, 5, 1, 1), (7,))
    state = [Tensor(np.zeros(shape, np.float32)) for shape in shapes]
    with fast_gradients():
        with gathering_state():
            for tensor in state:
                write_state(tensor, np.full(tensor.shape, 1, np.float32))
                write_state(tensor, np.full(tensor.shape, 2, np.float32))
                assert (read_state(tensor)[0] == 2).all()
            state[-1][...] = np.full(7, 3, np.float32)
        assert [tensor.shape for tensor in state] == list(shapes)
        assert [float(tensor.numpy().max()) for tensor in state] == [2, 2, 2, 3]
        state[0]._reset(Tensor(np.float32(4)))
        assert [float(array.max()) for array in read_state(*state)] == [4, 2, 2, 3]


@pytest.mark.parametrize("shape", [(4, 3), (5, 300), (3, 1, 2, 2)])
def test_extremes_of_rows_are_those_of_all_products(shape: tuple[int, ...]) -> None:
    rows, factors = normal(*shape), normal(shape[0], seed=1)
    products = rows.reshape(len(rows), -1) * factors[:, None]
    np.testing.assert_array_equal(extremes_of_rows(rows, factors), [products.min(), products.max()])
    rows.reshape(-1)[-1] = np.nan
    assert np.isnan(extremes_of_rows(rows, factors)).all() and np.isnan(extremes(rows)).all()


@pytest.mark.parametrize("size, stride, padding", [(3, 2, 1), (2, 2, 0), (3, 1, 0)])
def test_pooled_feature_maps_and_their_gradients_are_those_of_megengine(size: int, stride: int, padding: int) -> None:
    """Of several largest values in a window each gets the whole gradient."""
    source = Tensor(np.random.default_rng(0).integers(0, 3, (2, 5, 9, 9)).astype(np.float32))
    results = []
    for fast in (True, False):
        manager = GradManager().attach([source])
        with fast_gradients(), manager:
            read = feature_maps.of_tensor(source) if fast else source
            output = feature_maps.to_plain(M.MaxPool2d(size, stride, padding)(read))
            manager.backward(output, Tensor(normal(*output.shape)))
        results.append((output.numpy(), source.grad.numpy()))
        source.grad = None
    for found, expected in zip(*results, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


def test_a_network_whose_layers_are_watched_gives_its_watchers_tensors() -> None:
    network = blank(FAMILIES[0])
    network.train()
    seen: list[object] = []
    handles = [
        m.register_forward_hook(lambda _m, _i, o: seen.append(o)) for m in network.modules() if isinstance(m, FUSED)
    ]
    manager = GradManager().attach(network.parameters())
    with fast_gradients(), manager:
        manager.backward(network(Tensor(normal(2, 3, 32, 32))).sum())
    for handle in handles:
        handle.remove()
    assert len(seen) > 5 and all(isinstance(output, Tensor) for output in seen)


@pytest.mark.parametrize("scale, qmin, qmax", [(0.03, -128, 127), (1.7e-5, 0, 255), (3.0, -127, 127)])
def test_the_limits_of_what_is_clipped_are_exact(scale: float, qmin: int, qmax: int) -> None:
    step, limits = np.float32(scale), np.empty(2, np.float32)
    batch_norm_loops.find_clipped(
        step, np.float32(qmin), np.float32(qmax), np.float32(-np.inf), np.float32(np.inf), limits
    )
    low, high = limits
    ends = [low, np.nextafter(low, np.float32(np.inf)), np.nextafter(high, np.float32(-np.inf)), high]
    passes = fake_quantize(np.array(ends, np.float32), step, np.float32(0), np.float32(qmin), np.float32(qmax))
    assert passes is not None and passes.tolist() == [False, True, True, False]


@pytest.mark.parametrize("shape", [(2, 3, 3, 24), (1, 1, 1, 5), (4, 8, 8, 90), (32, 16, 16, 48)])
def test_normalized_maps_know_their_extremes_before_they_are_there(shape: tuple[int, ...]) -> None:
    pixels, channels = normal(*shape) * np.float32(3) + np.float32(100), shape[-1]
    scale, shift = normal(channels, seed=1), normal(channels, seed=2)
    mean, variance = np.empty((2, channels), np.float32)
    limits = Limits.of(relu=True, ceiling=6.0)
    found = NormalizedMap(pixels, scale, shift, 1e-5, limits, mean, variance, fixed=False, observed=True)
    np.testing.assert_allclose(mean, pixels.mean((0, 1, 2), dtype=np.float64), rtol=1e-6)
    np.testing.assert_allclose(variance, pixels.var((0, 1, 2), dtype=np.float64), rtol=1e-4, atol=1e-9)
    np.testing.assert_array_equal(found.extremes(), extremes(found.output()))


def test_a_pixel_that_is_no_number_is_seen_in_the_extremes_and_stays_in_the_output() -> None:
    pixels = normal(2, 4, 4, 5)
    pixels[1, 2, 3, 4] = np.nan
    ones, zeros = np.ones(5, np.float32), np.zeros(5, np.float32)
    for fixed in (False, True):
        statistics = zeros.copy(), ones.copy()
        for array in statistics if fixed else ():
            array.setflags(write=False)  # as a frozen layer's are
        limits = Limits.of(relu=True, ceiling=None)
        found = NormalizedMap(pixels, ones, zeros, 1e-5, limits, *statistics, fixed=fixed, observed=True)
        assert np.isnan(found.extremes()).all() and np.isnan(found.output()[1, 2, 3, 4])


def test_weights_whose_ends_are_not_clipped_need_no_mask() -> None:
    weights, factors = normal(5, 3, 3, 3), np.abs(normal(5, seed=1)) + np.float32(0.5)
    ends = extremes_of_rows(weights, factors)
    zero, qmin, qmax = np.float32(0), np.float32(-127), np.float32(127)
    wide = Quantizer(np.abs(ends).max() / qmax, zero, qmin, qmax)
    narrow = wide._replace(scale=wide.scale / 2)
    for quantizer in (wide, narrow):
        rounded, passes = quantizer.apply_to_rows(weights, factors, True, ends)
        again, known = quantizer.apply_to_rows(weights, factors, True, UNKNOWN)
        np.testing.assert_array_equal(rounded, again)
        inside = np.abs(weights * factors[:, None, None, None]) <= quantizer.scale * np.float32(127.5)
        assert known is not None
        np.testing.assert_array_equal(known, inside)
        assert (passes is None) == inside.all() == (quantizer is wide)


def test_weights_that_are_no_numbers_get_no_gradient() -> None:
    weights, ones = normal(2, 1, 1, 3), np.ones(2, np.float32)
    weights[1, 0, 0, 2] = np.nan
    quantizer = Quantizer(np.float32(1), np.float32(0), np.float32(-127), np.float32(127))
    _, passes = quantizer.apply_to_rows(weights, ones, True, extremes_of_rows(weights, ones))
    assert passes is not None and passes.sum() == 5 and not passes[1, 0, 0, 2]


@pytest.mark.parametrize("clips", [False, True])
def test_the_gradient_of_a_map_is_whole_where_rounding_clips_nothing(clips: bool) -> None:
    pixels, gradient, ones, zeros = normal(2, 4, 4, 24), normal(2, 4, 4, 24, seed=1), np.ones(24), np.zeros(24)
    scale, shift = ones.astype(np.float32), zeros.astype(np.float32)
    plain, rounded = (
        NormalizedMap(pixels, scale, shift, 1e-5, Limits(), shift.copy(), shift.copy(), fixed=False, observed=seen)
        for seen in (False, True)
    )
    step = np.abs(rounded.extremes()).max() / np.float32(254 if clips else 126)
    rounded.output(Quantizer(step, np.float32(0), np.float32(-128), np.float32(127)))
    assert rounded.masks == clips
    expected = plain.gradients(gradient * (np.abs(plain.output() / step) < 127.5))
    for found, wanted in zip(rounded.gradients(gradient), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(4, 3, 3, 24), (2, 1, 1, 5), (32, 8, 8, 96)])
def test_two_processes_that_share_statistics_normalize_as_one(shape: tuple[int, ...]) -> None:
    pixels, gradient = normal(*shape) * np.float32(3) + np.float32(10), normal(*shape, seed=1)
    scale, shift = normal(shape[-1], seed=2), normal(shape[-1], seed=3)
    limits, first = Limits.of(relu=True, ceiling=1.0), shape[0] // 2 - (shape[0] > 2)  # not two halves

    def run(part: slice, exchange: ThreadExchange | None = None) -> tuple[Any, ...]:
        mean, variance = np.empty((2, shape[-1]), np.float32)
        done = NormalizedMap(
            *(pixels[part], scale, shift, 1e-5, limits, mean, variance), fixed=False, observed=True, exchange=exchange
        )
        return done.elements, mean, variance, done.output(), *done.gradients(gradient[part])

    whole = run(slice(None))
    parts = run_both(lambda exchange: run([slice(first), slice(first, None)][exchange.rank], exchange))
    for number, (found, other) in enumerate(zip(*parts, strict=True)):
        together = found + other if number > 4 else found if number < 3 else np.concatenate([found, other])
        np.testing.assert_allclose(together, whole[number], rtol=1e-5, atol=1e-5)
    for place in (1, 2):
        np.testing.assert_array_equal(parts[0][place], parts[1][place])


@pytest.mark.parametrize("groups, channels", [(3, 90), (30, 90), (3, 3), (8, 48), (6, 48), (1, 5)])
def test_shuffled_channels_are_those_of_a_transposed_table(groups: int, channels: int) -> None:
    source = normal(2, 3, 1, channels)
    table = source.reshape(2, 3, 1, channels // groups, groups)
    np.testing.assert_array_equal(shuffle(source, groups), table.swapaxes(3, 4).reshape(source.shape))
