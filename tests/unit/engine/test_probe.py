"""The classifier that a fine-tuning begins with: the best one on what trained weights make of the pictures."""

from __future__ import annotations

import megengine.functional as F
import megengine.module as M
import numpy as np
import numpy.typing as npt
from megengine import Tensor

from mgq.data.augmentation import EvalTransform
from mgq.data.loader import Loader
from mgq.engine.training.input_layer import find_input_layer, input_layer_lr_scale
from mgq.engine.training.linear_probe import DECAY, fit_linear_probe, solve_softmax_regression
from mgq.events import Progress
from mgq.zoo.network_state import state_of
from mgq.zoo.registry import create_model
from tests.conftest import same_state


def features(seed: int = 0) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Three clouds that overlap a little."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, 300)
    return (rng.normal(0, 10, (300, 8)) + 25 * np.eye(3, 8)[labels]).astype(np.float32), labels


class TestSolved:
    def test_it_answers_new_ones_right(self) -> None:
        weight, bias = solve_softmax_regression(*features(), 3, 0.1)
        new, labels = features(1)
        assert weight.shape == (3, 8) and bias.shape == (3,) and weight.dtype == bias.dtype == np.float32
        assert np.mean((new @ weight.T + bias).argmax(1) == labels) > 0.85

    def test_no_other_weights_are_better(self) -> None:
        found, labels = features()
        weight, bias = (value.astype(np.float64) for value in solve_softmax_regression(found, labels, 3, 0.1))
        scale = np.sqrt(np.mean(found.astype(np.float64) ** 2))

        def loss(weight: npt.NDArray[np.float64], bias: npt.NDArray[np.float64]) -> float:
            logits = found @ weight.T + bias
            logs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
            wanted = np.eye(3)[labels] * 0.9 + 0.1 / 3
            return float(-(wanted * logs).sum(1).mean() + DECAY / 2 * ((weight * scale) ** 2).sum())

        least = loss(weight, bias)
        rng = np.random.default_rng(2)
        for _ in range(20):
            assert loss(weight + rng.normal(0, 0.003, weight.shape), bias) > least
            assert loss(weight, bias + rng.normal(0, 0.05, bias.shape)) > least

    def test_without_a_bias_there_is_none(self) -> None:
        weight, bias = solve_softmax_regression(*features(), 3, 0.1, with_bias=False)
        new, labels = features(1)
        assert not bias.any() and np.mean((new @ weight.T).argmax(1) == labels) > 0.85

    def test_features_of_any_scale_give_the_same_answers(self) -> None:
        found, labels = features()
        (weight, bias), (other, other_bias) = (
            solve_softmax_regression(found, labels, 3, 0.1),
            solve_softmax_regression(found * 1000, labels, 3, 0.1),
        )
        np.testing.assert_allclose(other * 1000, weight, rtol=0.02, atol=1e-4)
        np.testing.assert_allclose(other_bias, bias, rtol=0.02, atol=0.01)


class Colours:
    """Pictures of one colour each, which is their class."""

    name, classes = "colours", ("blue", "green", "red")
    labels = np.arange(30) % 3

    def __len__(self) -> int:
        return 30

    def image(self, index: int) -> npt.NDArray[np.uint8]:
        rng = np.random.default_rng(index)
        image = rng.integers(0, 60, (40, 40, 3), dtype=np.uint8)
        image[..., index % 3] += np.uint8(150)
        return image


class Net(M.Module):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.body = M.ConvBn2d(3, 4, 3, 2, 1, bias=False)
        self.fc = M.Linear(4, 3)
        self.body.conv.weight[...] = Tensor(np.random.default_rng(0).normal(0, 0.01, (4, 3, 3, 3)).astype(np.float32))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.mean(F.relu(self.body(x)), (2, 3)))


def test_a_networks_classifier_is_solved_and_nothing_else_changes() -> None:
    network = Net()
    before = state_of(network)
    seen: list[Progress] = []
    with Loader(Colours(), EvalTransform(32), 8, workers=0) as loader:
        fit_linear_probe(network, "fc", loader, 0.0, seen.append)
        (batch,) = list(Loader(Colours(), EvalTransform(32), 30, workers=0).batches(0))
    answers = network(Tensor(batch.images.astype(np.float32) - 128)).numpy().argmax(1)
    assert np.array_equal(answers, batch.labels)
    after = state_of(network)
    assert not np.array_equal(after["fc.weight"], before["fc.weight"])
    assert same_state(*({n: v for n, v in s.items() if not n.startswith("fc.")} for s in (before, after)))
    assert [progress.done for progress in seen] == [1, 2, 3, 4]


class TestStem:
    def test_it_is_found_in_every_family(self) -> None:
        for arch in ("resnet18", "mobilenet_v2", "shufflenet_v1_x0_5_g3", "efficientnet_lite0"):
            state = state_of(create_model(arch, 10))
            name = find_input_layer(state)
            assert name is not None and state[name].shape[1] == 3 and name == find_input_layer(dict(state.items()))

    def test_weights_with_the_spread_of_pixels_folded_in_go_slowly(self) -> None:
        drawn = np.random.default_rng(0).normal(0, np.sqrt(2 / 27), (64, 3, 3, 3)).astype(np.float32)
        assert np.isclose(input_layer_lr_scale({"stem": drawn / 58}), 1 / 58**2, rtol=0.1)
        assert np.isclose(input_layer_lr_scale({"stem": drawn / 116}), 1 / 116**2, rtol=0.1)
        assert (
            input_layer_lr_scale({"stem": drawn})
            == input_layer_lr_scale({"stem": drawn * 10})
            == input_layer_lr_scale({"stem": drawn / 3})
            == 1
        )
        assert input_layer_lr_scale({"other": drawn[:, :2]}) == input_layer_lr_scale({"stem": drawn * 0}) == 1
