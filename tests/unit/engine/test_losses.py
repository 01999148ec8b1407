"""What a training minimises, and weights averaged on the way, against plain numpy."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from megengine import Parameter, Tensor
from megengine.autodiff import GradManager

from mgq.engine.training.ema import ModelEma
from mgq.engine.training.losses import TEMPERATURE, cross_entropy, distillation
from tests.conftest import blank

LOGITS = np.random.default_rng(0).normal(0, 2, (6, 4)).astype(np.float32)
OTHER = np.random.default_rng(1).normal(0, 2, (6, 4)).astype(np.float32)
LABELS = np.array([0, 3, 1, 2, 2, 0], np.int32)


def softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    weights = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True))
    return np.asarray(weights / weights.sum(1, keepdims=True))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_smoothed_cross_entropy_gives_every_class_a_share_of_the_label(smoothing: float) -> None:
    wanted = np.full((6, 4), smoothing / 4)
    wanted[np.arange(6), LABELS] += 1 - smoothing
    expected = -(wanted * np.log(softmax(LOGITS))).sum(1).mean()
    found = cross_entropy(Tensor(LOGITS), Tensor(LABELS), smoothing).numpy().item()
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("offset", [0, -500, 500])
def test_distillation_is_the_divergence_from_the_softened_teacher(offset: int) -> None:
    teacher, student = softmax(OTHER / np.float32(TEMPERATURE)), softmax(LOGITS / np.float32(TEMPERATURE))
    expected = (teacher * np.log(teacher / student)).sum(1).mean() * TEMPERATURE**2
    found = distillation(Tensor(LOGITS + np.float32(offset)), Tensor(OTHER + np.float32(offset))).numpy().item()
    assert found == pytest.approx(expected, rel=1e-4)


def test_distillation_leads_the_student_to_the_teacher() -> None:
    student = Parameter(LOGITS)
    with GradManager().attach([student]) as manager:
        manager.backward(distillation(student, Tensor(OTHER)))
    expected = TEMPERATURE * (softmax(LOGITS / np.float32(2)) - softmax(OTHER / np.float32(2))) / 6
    assert np.allclose(student.grad.numpy(), expected, atol=1e-5)
    assert distillation(Tensor(OTHER), Tensor(OTHER)).numpy().item() == pytest.approx(0, abs=1e-6)


def test_averaged_weights_follow_those_of_the_network() -> None:
    network = blank("shufflenet_v1_x0_5_g3")
    name = "features.0.branch_main_1.0.conv.weight"
    values = dict(network.named_tensors())
    values[name]._reset(Tensor(np.zeros(values[name].shape, np.float32)))
    average = ModelEma(network, 0.5)
    expected = 0.0
    for step in range(1, 6):
        values[name]._reset(Tensor(np.full(values[name].shape, float(step), np.float32)))
        average.update(network)
        keep = min(0.5, (1 + step) / (10 + step))
        expected = keep * expected + (1 - keep) * step
    found = dict(average.make_averaged_copy(network).named_tensors())[name].numpy()
    assert np.allclose(found, expected, rtol=1e-6)
    assert np.all(values[name].numpy() == 5), "the network itself stays as it was"
