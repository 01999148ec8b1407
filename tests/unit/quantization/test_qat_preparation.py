"""Quantization-aware training: observers, learned scales, phases, and the plain form that is saved."""

from __future__ import annotations

import math
from typing import Any

import megengine.functional as F
import megengine.module as M
import numpy as np
import numpy.typing as npt
import pytest
from megengine import Tensor
from megengine.autodiff import GradManager
from megengine.core.tensor.dtype import get_scale
from megengine.optimizer import SGD
from megengine.quantization import FakeQuantize, ema_fakequant_qconfig
from megengine.quantization.observer import ExponentialMovingAverageObserver, MinMaxObserver

from mgq.errors import InputError
from mgq.quantization.learned_scales import LearnedFakeQuantize, LearnedStepSize, TrainedThreshold
from mgq.quantization.modes import Mode, mode_of, to_mode
from mgq.quantization.qat import (
    OBSERVERS,
    CurrentRangeObserver,
    Phase,
    SwitchableSyncMinMaxObserver,
    find_learned_quantizers,
    freeze_observers,
    observe,
    plain_qat,
    prepare_qat,
    set_phase,
)
from mgq.quantization.qat_layers import fold_weight, observe_weights
from mgq.quantization.targets import UnitScaleObserver
from mgq.zoo.layers import ConvBnRelu6
from mgq.zoo.network_state import state_of
from mgq.zoo.weight_loading import load_state
from tests.conftest import State, blank, logits_of, one_line_about, same_state

CLASSES = 3
RATE = 0.03


class Tiny(M.Module):  # type: ignore[misc]
    """Every kind of quantized layer once: ReLU, depthwise with ReLU6, linear, a shortcut; one that never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.quant = M.QuantStub()
        self.first = M.ConvBnRelu2d(3, 8, 3, 2, 1, bias=False)
        self.second = ConvBnRelu6(8, 8, 3, 1, 1, groups=8, bias=False)
        self.third = M.ConvBn2d(8, 8, 1, bias=False)
        self.add = M.Elemwise("FUSE_ADD_RELU")
        self.unused = M.Elemwise("ADD")
        self.dequant = M.DequantStub()
        self.fc = M.Linear(8, CLASSES)
        self.fc.disable_quantize()

    def forward(self, x: Tensor) -> Tensor:
        first = self.first(self.quant(x))
        return self.fc(F.mean(self.dequant(self.add(first, self.third(self.second(first)))), (2, 3)))


def tiny() -> M.Module:
    """Always the same one, its batch norms near what the pictures give."""
    network = Tiny()
    rng = np.random.default_rng(1)
    for name, value in network.named_tensors():
        if name.endswith("weight") and "bn" not in name:
            value[...] = rng.normal(0, 1 / math.sqrt(np.prod(value.shape[-3:])), value.shape).astype(np.float32)
    network.first.bn.running_var[...] = np.full((1, 8, 1, 1), 4000, np.float32)
    return network


def toy_batch(seed: int, number: int = 24) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int32]]:
    """Noise whose class is the channel that is brighter than the others: uint8 (N, 3, 8, 8), int32 (N,)."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, number).astype(np.int32)
    images = rng.integers(0, 200, (number, 3, 8, 8))
    images[np.arange(number), labels] += 55
    return images.astype(np.uint8), labels


class Run:
    """A network that is being trained, and its optimizer."""

    def __init__(self, observer: str) -> None:
        self.network = prepare_qat(tiny(), observer)
        self.optimizer = SGD(self.network.parameters(), lr=RATE, momentum=0.9)
        self.gradients = GradManager().attach(self.network.parameters())

    def observe(self, batches: int = 2) -> None:
        set_phase(self.network, Phase.OBSERVE)
        for seed in range(batches):
            logits_of(self.network, toy_batch(seed)[0])

    def step(self, seed: int) -> float:
        images, labels = toy_batch(seed)
        with self.gradients:
            logits = self.network(Tensor(images.astype(np.float32) - 128))
            loss = F.nn.cross_entropy(logits, Tensor(labels))
            self.gradients.backward(loss)
        self.optimizer.step().clear_grad()
        return float(loss.numpy())

    def train(self, phase: Phase, seeds: range) -> list[float]:
        """One epoch, with a validation after it."""
        set_phase(self.network, phase)
        losses = [self.step(seed) for seed in seeds]
        self.network.eval()
        logits_of(self.network, toy_batch(999)[0])
        return losses

    def state(self) -> tuple[State, dict[str, Any]]:
        return dict(state_of(self.network)), self.optimizer.state_dict()


@pytest.mark.parametrize("observer", OBSERVERS)
class TestTraining:
    def test_it_learns_and_int8_says_what_fake_quantization_says(self, observer: str) -> None:
        run = Run(observer)
        run.observe()
        losses = run.train(Phase.QUANTIZE, range(100, 170))
        losses += run.train(Phase.FREEZE_BATCH_NORM, range(170, 190))
        losses += run.train(Phase.FREEZE_OBSERVERS, range(190, 200))
        assert np.isfinite(losses).all()
        assert np.mean(losses[-10:]) < 0.6 * np.mean(losses[:5])

        images, labels = toy_batch(5000, 200)
        fake = logits_of(run.network, images)
        real = logits_of(to_mode(run.network, Mode.QUANTIZED), images)
        assert (fake.argmax(1) == labels).mean() > 0.9
        assert (fake.argmax(1) == real.argmax(1)).mean() > 0.97
        assert np.corrcoef(fake.ravel(), real.ravel())[0, 1] > 0.999

    def test_the_plain_form_is_the_same_network_to_the_bit(self, observer: str) -> None:
        run = Run(observer)
        run.observe()
        run.train(Phase.QUANTIZE, range(5))
        before = state_of(run.network)
        plain = plain_qat(run.network)
        assert same_state(state_of(run.network), before)
        assert mode_of(plain) is Mode.QAT
        assert not plain.training

        loaded = to_mode(Tiny(), Mode.QAT)
        load_state(loaded, dict(state_of(plain)), "plain state")
        loaded.eval()
        images, _ = toy_batch(7)
        expected = logits_of(run.network, images)
        int8 = to_mode(run.network, Mode.QUANTIZED)
        for same in (plain, loaded):
            assert np.array_equal(logits_of(same, images), expected)
            again = to_mode(same, Mode.QUANTIZED)
            assert np.array_equal(logits_of(again, images), logits_of(int8, images))
            for name in ("quant", "first", "second", "third", "add"):
                scales = [get_scale(getattr(n, name).output_dtype) for n in (again, int8)]
                assert scales[0] == scales[1], name

    @pytest.mark.parametrize("phase", [phase for phase in Phase if phase is not Phase.OBSERVE])
    def test_a_saved_run_goes_on_to_the_bit(self, observer: str, phase: Phase) -> None:
        undisturbed = Run(observer)
        undisturbed.observe()
        undisturbed.train(Phase.QUANTIZE, range(2))
        undisturbed.train(phase, range(2, 4))
        network_state, optimizer_state = undisturbed.state()
        undisturbed.train(phase, range(4, 7))

        resumed = Run(observer)
        load_state(resumed.network, network_state, "saved state")
        resumed.optimizer.load_state_dict(optimizer_state)
        resumed.train(phase, range(4, 7))
        expected = state_of(undisturbed.network)
        for name, value in state_of(resumed.network).items():
            assert np.array_equal(value, expected[name]), name
        assert any(not np.array_equal(value, network_state[name]) for name, value in expected.items())

    def test_a_run_stopped_between_observing_and_training_goes_on_to_the_bit(self, observer: str) -> None:
        undisturbed, resumed = Run(observer), Run(observer)
        undisturbed.observe()
        load_state(resumed.network, undisturbed.state()[0], "saved state")
        for run in (undisturbed, resumed):
            run.train(Phase.QUANTIZE, range(2))
        assert same_state(state_of(undisturbed.network), state_of(resumed.network))

    def test_input_scale_and_classifier_stay_as_they_are(self, observer: str) -> None:
        run = Run(observer)
        run.observe()
        run.train(Phase.QUANTIZE, range(2))
        assert type(run.network.quant.act_observer) is UnitScaleObserver
        assert run.network.quant.act_observer.get_qparams().scale.numpy() == 1.0
        int8 = to_mode(run.network, Mode.QUANTIZED)
        assert get_scale(int8.quant.output_dtype) == 1.0
        assert type(int8.fc) is M.Linear


class TestPreparation:
    def test_an_unknown_observer_is_refused_with_those_there_are(self) -> None:
        with pytest.raises(InputError) as error:
            prepare_qat(tiny(), "best")
        assert one_line_about(str(error.value), "'best'", "ema, min-max, lsq, tqt")

    def test_a_copy_unless_in_place(self) -> None:
        network = tiny()
        before = state_of(network)
        assert mode_of(prepare_qat(network, "lsq")) is Mode.QAT
        assert mode_of(network) is Mode.NORMAL
        assert same_state(state_of(network), before)
        assert prepare_qat(network, "lsq", in_place=True) is network

    @pytest.mark.parametrize("arch", ["resnet18", "mobilenet_v2", "shufflenet_v1_x0_5_g3"])
    def test_a_plain_state_has_the_names_of_the_public_example(self, arch: str) -> None:
        from megengine.quantization import quantize_qat

        public = quantize_qat(blank(arch), inplace=False, qconfig=ema_fakequant_qconfig)
        expected = {name: value.shape for name, value in public.named_tensors()}
        for network in (to_mode(blank(arch), Mode.QAT), plain_qat(prepare_qat(blank(arch), "tqt"))):
            assert {name: value.shape for name, value in network.named_tensors()} == expected

    @pytest.mark.parametrize("observer", ["min-max", "lsq", "tqt"])
    def test_ranges_that_are_there_already_are_kept(self, observer: str) -> None:
        run = Run("ema")
        run.observe()
        run.train(Phase.QUANTIZE, range(3))
        other = prepare_qat(plain_qat(run.network), observer)
        set_phase(other, Phase.QUANTIZE)
        other.eval()
        for name in ("quant", "first", "second", "third", "add"):
            one, two = (getattr(n, name).get_activation_qparams().scale.numpy() for n in (run.network, other))
            assert np.isclose(one, two, rtol=2e-7), name

    def test_it_can_be_prepared_for_more_training_of_the_same_kind(self) -> None:
        run = Run("lsq")
        run.observe()
        run.train(Phase.QUANTIZE, range(3))
        again = prepare_qat(run.network, "lsq")
        assert same_state(state_of(again), state_of(run.network))

    @pytest.mark.parametrize("observer", ["ema", "tqt"])
    def test_it_can_be_prepared_for_another_observer(self, observer: str) -> None:
        run = Run("lsq")
        run.observe()
        run.train(Phase.QUANTIZE, range(3))
        other = prepare_qat(run.network, observer)
        kinds = {type(module.act_fake_quant) for module in (other.first, other.second, other.third, other.add)}
        assert kinds == {FakeQuantize if observer == "ema" else TrainedThreshold}
        scale = run.network.second.get_activation_qparams().scale.numpy()
        set_phase(other, Phase.QUANTIZE)
        assert np.isclose(other.second.get_activation_qparams().scale.numpy(), scale, rtol=2e-7)

    def test_weights_have_the_range_they_have_now_not_the_widest_ever(self) -> None:
        run = Run("ema")
        assert type(run.network.third.weight_observer) is CurrentRangeObserver
        set_phase(run.network, Phase.QUANTIZE)
        run.network.third.conv.weight *= 100
        logits_of(run.network, toy_batch(0)[0])
        run.network.third.conv.weight /= 100
        logits_of(run.network, toy_batch(0)[0])
        run.network.eval()
        observed = run.network.third.weight_observer.max_val.numpy()
        observe_weights(run.network)
        weight = fold_weight(run.network.third).numpy()
        assert run.network.third.weight_observer.max_val.numpy() == weight.max()
        assert np.isclose(observed, weight.max(), rtol=0.3)  # one update of the running variance apart

    def test_observing_weights_anew_does_not_change_what_training_does(self) -> None:
        one, other = Run("ema"), Run("ema")
        for run in (one, other):
            run.observe()
            run.train(Phase.QUANTIZE, range(2))
        observe_weights(other.network)
        for run in (one, other):
            run.train(Phase.QUANTIZE, range(2, 4))
        assert same_state(state_of(one.network), state_of(other.network))

    def test_the_observer_for_many_devices_can_be_switched_off(self) -> None:
        observer = SwitchableSyncMinMaxObserver(dtype="qint8")
        observer(Tensor([1.0, 2.0]))
        observer.disable()
        observer(Tensor([5.0]))
        assert (observer.min_val.numpy(), observer.max_val.numpy()) == (1, 2)


class TestPhases:
    @pytest.mark.parametrize("observer", OBSERVERS)
    def test_observing_sees_the_float_network_and_changes_nothing_else(self, observer: str) -> None:
        network, run = tiny(), Run(observer)
        network.eval()
        set_phase(run.network, Phase.OBSERVE)
        images, _ = toy_batch(0)
        assert np.allclose(logits_of(run.network, images), logits_of(network, images), rtol=1e-4, atol=1e-5)
        before, after = state_of(network), state_of(run.network)
        assert all(np.array_equal(value, after[name]) for name, value in before.items())
        assert run.network.first.act_observer.max_val.numpy() > 0

    @pytest.mark.parametrize(
        ("phase", "fakes", "watches_activations", "watches_weights", "bn_trains", "trains"),
        [
            (Phase.OBSERVE, False, True, True, False, False),
            (Phase.QUANTIZE, True, True, True, True, True),
            (Phase.FREEZE_BATCH_NORM, True, True, True, False, True),
            (Phase.FREEZE_OBSERVERS, True, False, True, False, True),
        ],
    )
    def test_what_is_on(
        self, phase: Phase, fakes: bool, watches_activations: bool, watches_weights: bool, bn_trains: bool, trains: bool
    ) -> None:
        network = prepare_qat(tiny())
        for before in (*Phase, None):  # from wherever it comes
            if before is not None:
                set_phase(network, before)
            network.eval()
            network.train()
            set_phase(network, phase)
            layer = network.second
            assert layer.act_fake_quant.enabled is layer.weight_fake_quant.enabled is fakes
            assert layer.act_observer.enabled is watches_activations
            assert layer.weight_observer.enabled is watches_weights
            assert layer.bn.training is bn_trains
            assert network.training is trains

    @pytest.mark.parametrize("observer", OBSERVERS)
    def test_frozen_batch_norms_keep_their_statistics_and_train_as_in_evaluation(self, observer: str) -> None:
        run = Run(observer)
        run.observe()
        run.train(Phase.QUANTIZE, range(2))
        before = state_of(run.network)
        run.train(Phase.FREEZE_BATCH_NORM, range(2, 5))
        after = state_of(run.network)
        for name, value in after.items():
            if "running_" in name and "observer" not in name:
                assert np.array_equal(value, before[name]), name
        for name in ("second.conv.weight", "second.bn.weight", "second.bn.bias", "fc.bias"):
            assert not np.array_equal(after[name], before[name]), name

        set_phase(run.network, Phase.FREEZE_OBSERVERS)
        observe_weights(run.network)
        images, _ = toy_batch(3)
        trained = logits_of(run.network, images)
        run.network.eval()
        assert np.array_equal(logits_of(run.network, images), trained)

    def test_frozen_observers_keep_ranges_of_activations(self) -> None:
        run = Run("ema")
        run.observe()
        run.train(Phase.QUANTIZE, range(2))
        before = state_of(run.network)
        run.train(Phase.FREEZE_OBSERVERS, range(2, 5))
        after = state_of(run.network)
        changed = {name for name in after if "observer" in name and not np.array_equal(after[name], before[name])}
        assert not any("act_observer" in name for name in changed)
        assert any("weight_observer" in name for name in changed)

    @pytest.mark.parametrize("phase", [phase for phase in Phase if phase is not Phase.OBSERVE])
    def test_a_part_that_is_kept_still_stays_still(self, phase: Phase) -> None:
        network = prepare_qat(tiny())
        network.train()
        network.first.bn.eval()
        set_phase(network, phase)
        assert not network.first.bn.training
        assert network.first.training is (phase is Phase.QUANTIZE)

    def test_each_can_be_asked_for_alone(self) -> None:
        network = prepare_qat(tiny())
        set_phase(network, Phase.QUANTIZE)
        freeze_observers(network)
        assert network.first.bn.training
        assert not network.first.act_observer.enabled
        observe(network)
        assert network.first.act_observer.enabled

    @pytest.mark.parametrize("observer", ["lsq", "tqt"])
    def test_learned_scales_start_where_the_observers_were(self, observer: str) -> None:
        run = Run(observer)
        run.observe()
        owned = [id(quantizer.trained) for quantizer in find_learned_quantizers(run.network)]
        set_phase(run.network, Phase.QUANTIZE)
        assert [id(quantizer.trained) for quantizer in find_learned_quantizers(run.network)] == owned
        assert len(owned) == 8  # three convolutions twice, two sums
        for layer in (run.network.first, run.network.second, run.network.third, run.network.add):
            expected = layer.act_observer.get_qparams().scale.numpy()
            assert np.isclose(layer.act_fake_quant.get_qparams().scale.numpy(), expected, rtol=2e-7)
        weight = fold_weight(run.network.first).numpy()
        scale = run.network.first.weight_fake_quant.get_qparams().scale.numpy()
        assert np.isclose(scale, np.abs(weight).max() / 127, rtol=1e-6)

    @pytest.mark.parametrize("observer", ["lsq", "tqt"])
    def test_without_anything_observed_they_are_refused(self, observer: str) -> None:
        with pytest.raises(ValueError, match="observe some batches first"):
            set_phase(prepare_qat(tiny(), observer), Phase.QUANTIZE)


LEARNED = (LearnedStepSize, TrainedThreshold)


def learned(
    kind: type[LearnedFakeQuantize], scale: float, dtype: str = "qint8", gain: float = 1.0, **options: Any
) -> LearnedFakeQuantize:
    quantizer = kind(dtype, **options)
    quantizer.gain[...] = Tensor(gain, dtype="float32")
    quantizer.trained[...] = Tensor(quantizer.to_trained(scale * quantizer.half), dtype="float32")
    quantizer.initialized[...] = Tensor(1.0)
    return quantizer


def gradients_of(
    quantizer: LearnedFakeQuantize, values: npt.NDArray[np.float32], d_output: npt.NDArray[np.float32]
) -> tuple[npt.NDArray[np.float32], float]:
    source = Tensor(values)
    manager = GradManager().attach([source, quantizer.trained])
    with manager:
        manager.backward(quantizer(source), Tensor(d_output))
    return source.grad.numpy(), float(quantizer.trained.grad.numpy())


class TestLearnedScales:
    @pytest.mark.parametrize("dtype", ["qint8", "qint8_narrow"])
    @pytest.mark.parametrize(("scale", "gain"), [(0.004, 1.0), (0.03, 1.0), (0.01, 0.016)])
    def test_lsq_has_the_gradients_of_its_paper(self, dtype: str, scale: float, gain: float) -> None:
        rng = np.random.default_rng(0)
        values, d_output = rng.normal(0, 1, (2, 4, 5, 6, 6)).astype(np.float32)
        quantizer = learned(LearnedStepSize, scale, dtype, gain, per_image=dtype == "qint8")
        scale = float(quantizer.get_qparams().scale.numpy())
        low, high = (-128, 127) if dtype == "qint8" else (-127, 127)
        d_values, d_scale = 0 * d_output, 0.0
        for index, value in np.ndenumerate(values):  # Equations 3 and 5
            v = float(np.float32(value) / np.float32(scale))
            if low < v < high:
                d_values[index] = d_output[index]
                slope = math.floor(abs(v) + 0.5) * math.copysign(1, v) - v
            else:
                slope = float(low if v <= low else high)
            d_scale += float(d_output[index]) * slope
        elements = values[0].size if dtype == "qint8" else values.size
        found = gradients_of(quantizer, values, d_output)
        assert np.array_equal(found[0], d_values)
        assert np.isclose(found[1], d_scale * gain / math.sqrt(elements * 127), rtol=1e-4)
        assert np.isclose(quantizer.trained.numpy() * gain, scale, rtol=1e-6)

    @pytest.mark.parametrize("dtype", ["qint8", "qint8_narrow"])
    @pytest.mark.parametrize("scale", [0.004, 0.03])
    def test_tqt_has_the_gradients_of_its_paper(self, dtype: str, scale: float) -> None:
        rng = np.random.default_rng(0)
        values, d_output = rng.normal(0, 1, (2, 4, 5, 6, 6)).astype(np.float32)
        quantizer = learned(TrainedThreshold, scale, dtype)
        scale = float(quantizer.get_qparams().scale.numpy())
        low, high = (-128, 127) if dtype == "qint8" else (-127, 127)
        d_values, d_threshold = 0 * d_output, 0.0
        for index, value in np.ndenumerate(values):  # Equations 7 and 8
            v = float(np.float32(value) / np.float32(scale))
            rounded = math.floor(abs(v) + 0.5) * math.copysign(1, v)
            if low <= rounded <= high:
                d_values[index] = d_output[index]
                slope = rounded - v
            else:
                slope = float(low if rounded < low else high)
            d_threshold += float(d_output[index]) * scale * math.log(2) * slope
        found = gradients_of(quantizer, values, d_output)
        assert np.array_equal(found[0], d_values)
        assert np.isclose(found[1], d_threshold, rtol=1e-4)
        threshold = 2 ** float(quantizer.trained.numpy())
        assert np.isclose(scale, threshold / 128, rtol=1e-6)

    @pytest.mark.parametrize("kind", LEARNED)
    def test_forward_is_fake_quantization_to_the_bit(self, kind: type[LearnedFakeQuantize]) -> None:
        values = np.random.default_rng(0).normal(0, 2, (3, 7, 11, 13)).astype(np.float32)
        for scale in (0.5, 0.0123, 3e-5):
            quantizer = learned(kind, scale)
            if scale == 0.5 and kind is LearnedStepSize:
                values[0, 0, 0, :4] = 0.25, -0.25, 0.75, np.nextafter(np.float32(0.25), np.float32(0))  # ties
            expected = FakeQuantize("qint8")(Tensor(values), quantizer.get_qparams())
            assert np.array_equal(quantizer(Tensor(values)).numpy(), expected.numpy())

    @pytest.mark.parametrize("kind", LEARNED)
    def test_other_devices_compute_the_same(self, kind: type[LearnedFakeQuantize], monkeypatch: Any) -> None:
        rng = np.random.default_rng(0)
        values, d_output = rng.normal(0, 1, (2, 4, 5, 6, 6)).astype(np.float32)
        output, (d_values, d_trained) = (
            learned(kind, 0.01)(Tensor(values)),
            gradients_of(learned(kind, 0.01), values, d_output),
        )
        monkeypatch.setattr("mgq.quantization.learned_scales.is_on_cpu", lambda _: False)
        monkeypatch.setattr("mgq.quantization.learned_scales.cpu_gradients", None)
        assert np.array_equal(learned(kind, 0.01)(Tensor(values)).numpy(), output.numpy())
        other = gradients_of(learned(kind, 0.01), values, d_output)
        assert np.array_equal(other[0], d_values)
        assert np.isclose(other[1], d_trained, rtol=1e-5)

    @pytest.mark.parametrize("kind", LEARNED)
    @pytest.mark.parametrize("dtype", ["qint8", "qint8_narrow"])
    def test_every_scale_is_one_that_an_observer_gives(self, kind: type[LearnedFakeQuantize], dtype: str) -> None:
        observer = MinMaxObserver(dtype=dtype)
        for scale in np.random.default_rng(0).uniform(0.01, 0.02, 200):
            quantizer = learned(kind, scale, dtype)
            observer.min_val[...], observer.max_val[...] = Tensor(0.0), Tensor(quantizer.limit())
            assert observer.get_qparams().scale.numpy() == quantizer.get_qparams().scale.numpy()
            assert np.isclose(quantizer.get_qparams().scale.numpy(), scale, rtol=1e-6)

    @pytest.mark.parametrize("kind", LEARNED)
    def test_behind_a_relu6_the_range_stays_within_6(self, kind: type[LearnedFakeQuantize]) -> None:
        quantizer = learned(kind, 10.0, ceiling=6.0)
        assert float(quantizer.limit()) == 6
        wants_more = np.full((1, 4), 2000, np.float32)
        assert gradients_of(quantizer, wants_more, -np.ones((1, 4), np.float32))[1] == 0
        quantizer.trained.grad = None
        assert gradients_of(quantizer, wants_more, np.ones((1, 4), np.float32))[1] > 0
        network = prepare_qat(tiny(), "lsq")
        assert network.second.act_fake_quant.highest == 6
        assert network.first.act_fake_quant.highest == math.inf

    @pytest.mark.parametrize("kind", LEARNED)
    def test_a_scale_is_never_0_or_negative(self, kind: type[LearnedFakeQuantize]) -> None:
        quantizer = kind("qint8")
        quantizer.trained[...] = Tensor(-50.0)
        assert np.isclose(quantizer.get_qparams().scale.numpy(), 1e-5, rtol=1e-6)
        values = np.full((1, 4), 1e-7, np.float32)
        assert gradients_of(quantizer, values, -np.ones((1, 4), np.float32))[1] == 0  # would sink further
        assert np.isfinite(quantizer(Tensor(values)).numpy()).all()

    def test_a_layer_that_never_ran_takes_no_range(self) -> None:
        quantizer = LearnedStepSize("qint8")
        quantizer.initialize(ExponentialMovingAverageObserver(dtype="qint8"))
        assert quantizer.initialized.numpy() == 0
