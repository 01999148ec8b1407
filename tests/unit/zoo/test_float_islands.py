"""Which layers with int8 kernels stay in float, because those around them do."""

from __future__ import annotations

from mgq.zoo.blueprint import INPUT, Blueprint, LayerPlan

CONV = {"activation": ""}


def on_grid(*layers: LayerPlan) -> frozenset[str]:
    return Blueprint(layers, layers[-1].name, (3, 32, 32), 10).with_float_islands().on_grid()


def test_the_length_that_divides_a_vector_is_on_no_grid() -> None:
    found = on_grid(
        LayerPlan("conv", "conv_1", (INPUT,), CONV),
        LayerPlan("mul", "mul_1", ("conv_1", "conv_1")),
        LayerPlan("mean", "mean_1", ("mul_1",)),
        LayerPlan("sqrt", "sqrt_1", ("mean_1",)),
        LayerPlan("clip", "clip_1", ("sqrt_1",), {"low": 1e-12, "high": 1e9}),
        LayerPlan("expand", "expand_1", ("clip_1",)),
        LayerPlan("div", "div_1", ("conv_1", "expand_1")),
        LayerPlan("conv", "conv_2", ("div_1",), CONV),
        LayerPlan("softmax", "softmax_1", ("conv_2",)),
    )
    assert found == {"conv_1", "div_1", "conv_2"}


def test_what_integers_make_or_read_is_on_a_grid() -> None:
    found = on_grid(
        LayerPlan("conv", "conv_1", (INPUT,), CONV),
        LayerPlan("softmax", "softmax_1", ("conv_1",)),
        LayerPlan("sigmoid", "sigmoid_1", ("conv_1",)),  # made of integers
        LayerPlan("relu", "relu_1", ("softmax_1",)),  # read by a convolution
        LayerPlan("add", "add_1", ("softmax_1", "sigmoid_1")),  # of both
        LayerPlan("clip", "clip_1", ("softmax_1",), {"low": 0.1, "high": 1}),  # of and for floats alone
        LayerPlan("conv", "conv_2", ("relu_1",), CONV),
        LayerPlan("sub", "sub_1", ("add_1", "clip_1")),
        LayerPlan("div", "div_1", ("conv_2", "sub_1")),
        LayerPlan("exp", "exp_1", ("div_1",)),
    )
    assert found == {"conv_1", "softmax_1", "sigmoid_1", "relu_1", "add_1", "conv_2"}


def test_what_the_picture_itself_is_squared_to_is_for_floats_alone() -> None:
    found = on_grid(
        LayerPlan("mul", "mul_1", (INPUT, INPUT)),
        LayerPlan("slice", "slice_1", ("mul_1",)),
        LayerPlan("sqrt", "sqrt_1", ("slice_1",)),
        LayerPlan("conv", "conv_1", ("sqrt_1",), CONV),
        LayerPlan("exp", "exp_1", ("conv_1",)),
    )
    assert found == {"sqrt_1", "conv_1"}
