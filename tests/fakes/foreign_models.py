"""ONNX classifiers as other programs write them, made up and small."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

Array = npt.NDArray[Any]
CLASSES = 10


class Model:
    """A graph under construction: each call adds a node and gives the name of what it makes."""

    def __init__(self, shape: tuple[Any, ...] = ("N", 3, 32, 32), opset: int = 17, seed: int = 0) -> None:
        self.shape, self.opset = shape, opset
        self.random = np.random.default_rng(seed)
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def add(self, operator: str, *inputs: str, outputs: int = 1, **attributes: Any) -> str:
        names = [f"t{len(self.nodes)}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(operator, inputs, names, name=f"n{len(self.nodes)}", **attributes))
        return names[0]

    def constant(self, value: Any, dtype: Any = np.float32) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def weights(self, *shape: int) -> str:
        fan_in = max(int(np.prod(shape[1:])), 1)
        return self.constant(self.random.standard_normal(shape) * np.sqrt(2 / fan_in))

    def conv(self, source: str, channels: int, outputs: int, kernel: int = 3, group: int = 1, **attributes: Any) -> str:
        weight = self.weights(outputs, channels // group, kernel, kernel)
        bias = self.constant(self.random.standard_normal(outputs) * 0.1)
        return self.add("Conv", source, weight, bias, group=group, **attributes)

    def norm(self, source: str, channels: int) -> str:
        parts = [1 + 0.2 * self.random.standard_normal(channels), 0.2 * self.random.standard_normal(channels)]
        parts += [0.1 * self.random.standard_normal(channels), 0.5 + self.random.random(channels)]
        return self.add("BatchNormalization", source, *(self.constant(part) for part in parts))

    def classify(self, source: str, channels: int) -> str:
        flat = self.add("Flatten", self.add("GlobalAveragePool", source))
        bias = self.constant(np.zeros(CLASSES))
        return self.add("Gemm", flat, self.weights(CLASSES, channels), bias, transB=1)

    def proto(self, output: str, rank: int = 2, kind: int = TensorProto.FLOAT) -> Any:
        graph = helper.make_graph(
            self.nodes,
            "foreign",
            [helper.make_tensor_value_info("image", kind, self.shape)],
            [helper.make_tensor_value_info(output, TensorProto.FLOAT, [None] * rank)],
            self.constants,
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=8)

    def save(self, path: Path, output: str, **how: Any) -> Path:
        onnx.save(self.proto(output, **how), str(path))
        return path


def five_axes(model: Model) -> str:
    """A sum of tensors of five axes."""
    shape = model.constant([0, 2, 4, 16, 16], np.int64)
    parts = [model.add("Relu", model.conv("image", 3, 8, pads=[1] * 4, strides=[2, 2])) for _ in range(2)]
    total = model.add("Add", *(model.add("Reshape", part, shape) for part in parts))
    return model.add("Reshape", model.add("Relu", total), model.constant([0, 8, 16, 16], np.int64))


def plain(model: Model) -> str:
    """Convolution, batch norm, ReLU, a residual sum, and a depthwise convolution of stride 2."""
    stem = model.add("Relu", model.norm(model.conv("image", 3, 8, pads=[1] * 4, strides=[2, 2]), 8))
    branch = model.conv(stem, 8, 8, pads=[1] * 4)
    total = model.add("Relu", model.add("Add", branch, stem))
    return model.add("Relu", model.conv(total, 8, 8, group=8, pads=[1] * 4, strides=[2, 2]))


def padless(model: Model) -> str:
    """Nothing stands around the picture."""
    return model.add("Relu", model.conv("image", 3, 8))


def squeeze_and_excite(model: Model) -> str:
    """MobileNetV3's: hard swish, and a gate of 1x1 convolutions."""
    stem = model.add("HardSwish", plain(model))
    squeezed = model.add("GlobalAveragePool", stem)
    inner = model.add("Relu", model.conv(squeezed, 8, 4, 1))
    gate = model.add("HardSigmoid", model.conv(inner, 4, 8, 1), alpha=1 / 6, beta=0.5)
    return model.add("Mul", stem, gate)


def old_swishes(model: Model) -> str:
    """Activations as older exporters spell them out: x * sigmoid(x), x * relu6(x + 3) / 6 and GELU by erf."""
    first = plain(model)
    silu = model.add("Mul", first, model.add("Sigmoid", first))
    six = model.constant(6.0)
    limited = model.add("Clip", model.add("Add", silu, model.constant(3.0)), model.constant(0.0), six)
    hard = model.add("Div", model.add("Mul", silu, limited), six)
    share = model.add("Add", model.add("Erf", model.add("Div", hard, model.constant(np.sqrt(2)))), model.constant(1.0))
    return model.add("Mul", model.add("Mul", hard, share), model.constant(0.5))


def branches(model: Model) -> str:
    """Inception's and ShuffleNetV2's: pools that hang over, concatenation, split, channel shuffle."""
    stem = plain(model)
    pooled = model.add("MaxPool", stem, kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1)
    averaged = model.add("AveragePool", stem, kernel_shape=[3, 3], strides=[2, 2], pads=[0, 0, 1, 1])
    averaged = model.add("Slice", averaged, *(model.constant(v, np.int64) for v in ([0, 0], [4, 4], [2, 3])))
    joined = model.add("Concat", pooled, averaged, axis=1)
    shape = model.constant([0, 2, 8, 4, 4], np.int64)
    shuffled = model.add("Transpose", model.add("Reshape", joined, shape), perm=[0, 2, 1, 3, 4])
    back = model.add("Reshape", shuffled, model.constant([0, 16, 4, 4], np.int64))
    half = model.add("Split", back, outputs=2, axis=1, **({} if model.opset > 12 else {"split": [8, 8]}))
    return model.add("LeakyRelu", half, alpha=0.1)


def rare(model: Model) -> str:
    """LRN, PReLU, dilation, odd padding, a product with a constant, and Pad."""
    stem = model.add("LRN", plain(model), size=5)
    sloped = model.add("PRelu", stem, model.constant(np.full((8, 1, 1), 0.2)))
    wide = model.conv(sloped, 8, 8, pads=[2, 2, 2, 2], dilations=[2, 2])
    odd = model.conv(model.add("Tanh", wide), 8, 8, auto_pad="SAME_UPPER", strides=[2, 2])
    scaled = model.add("Mul", odd, model.constant(np.linspace(0.5, 1.5, 8).reshape(8, 1, 1)))
    padded = model.add("Pad", scaled, model.constant([0, 0, 1, 0, 0, 0, 0, 1], np.int64), mode="constant")
    return model.conv(model.add("Relu", padded), 8, 8, 2)


def keras(model: Model) -> str:
    """MobileNetV2 as Keras has it: zeros below and to the right alone, ReLU6, and one behind a gate."""

    def limited(source: str) -> str:
        return model.add("Clip", model.norm(source, 8), model.constant(0.0), model.constant(6.0))

    sides = model.constant([0, 0, 0, 0, 0, 0, 1, 1], np.int64)
    stem = limited(model.conv(model.add("Pad", "image", sides, mode="constant"), 3, 8, strides=[2, 2]))
    deep = limited(model.conv(stem, 8, 8, group=8, auto_pad="SAME_UPPER", strides=[2, 2]))
    total = model.add("Add", model.norm(model.conv(deep, 8, 8, 1), 8), deep)
    gate = model.add("Sigmoid", model.conv(model.add("GlobalAveragePool", total), 8, 8, 1))
    return limited(model.conv(model.add("Mul", total, gate), 8, 8, 1))


def swishes(model: Model) -> str:
    """EfficientNet's and MobileNetV3's: activations right behind convolutions, each also a depthwise one."""
    first = model.conv("image", 3, 8, pads=[1] * 4, strides=[2, 2])
    silu = model.add("Mul", first, model.add("Sigmoid", first))
    second = model.conv(silu, 8, 8, group=8, pads=[1] * 4)
    limited = model.add("Clip", model.add("Add", second, model.constant(3.0)), model.constant(0.0), model.constant(6.0))
    hard = model.add("Div", model.add("Mul", second, limited), model.constant(6.0))
    return model.add("Add", model.conv(hard, 8, 8, 1), silu)


def channels_last(model: Model) -> str:
    """ConvNeXt's: layer norm and linear layers with channels last, scaled behind them; and a scale alone."""
    stem = model.add("Mul", plain(model), model.constant(np.linspace(0.5, 2, 8).reshape(8, 1, 1)))
    spatial = model.conv(stem, 8, 8, group=8, pads=[1] * 4)
    squares = model.add("Transpose", spatial, perm=[0, 2, 3, 1])
    mean = model.add("ReduceMean", squares, axes=[-1])
    moved = model.add("Sub", squares, mean)
    variance = model.add("ReduceMean", model.add("Mul", moved, moved), axes=[-1])
    deviation = model.add("Sqrt", model.add("Add", variance, model.constant(1e-6)))
    normal = model.add("Div", moved, deviation)
    normal = model.add("Mul", normal, model.constant(np.linspace(0.5, 1.5, 8)))
    normal = model.add("Add", normal, model.constant(np.linspace(-0.5, 0.5, 8)))
    wide = model.add("Add", model.add("MatMul", normal, model.weights(8, 16)), model.constant(np.linspace(0, 1, 16)))
    share = model.add("Add", model.add("Erf", model.add("Div", wide, model.constant(np.sqrt(2)))), model.constant(1.0))
    active = model.add("Mul", model.add("Mul", wide, share), model.constant(0.5))
    narrow = model.add("MatMul", active, model.weights(16, 8))
    scaled = model.add("Mul", narrow, model.constant(np.linspace(0.2, 0.4, 8)))
    return model.add("Add", model.add("Transpose", scaled, perm=[0, 3, 1, 2]), stem)


def keras_without_gate(model: Model) -> str:
    """MobileNetV2 as Keras has it: ReLU6, and zeros below and to the right alone, also of depthwise convolutions."""

    def limited(source: str) -> str:
        return model.add("Clip", model.norm(source, 8), model.constant(0.0), model.constant(6.0))

    def padded(source: str) -> str:
        return model.add("Pad", source, model.constant([0, 0, 0, 0, 0, 0, 1, 1], np.int64), mode="constant")

    stem = limited(model.conv(padded("image"), 3, 8, strides=[2, 2]))
    wide = limited(model.conv(stem, 8, 8, 1))
    deep = limited(model.conv(padded(wide), 8, 8, group=8, strides=[2, 2]))
    narrow = model.norm(model.conv(deep, 8, 8, 1), 8)
    again = limited(model.conv(narrow, 8, 8, 1))
    deeper = limited(model.conv(again, 8, 8, group=8, pads=[1] * 4))
    total = model.add("Add", model.norm(model.conv(deeper, 8, 8, 1), 8), narrow)
    return limited(model.conv(total, 8, 8, 1))


def pools(model: Model) -> str:
    """ResNet's stem, where zeros are also around a max pool, a shortcut, and an average of some pixels."""
    sides = model.constant([0, 0, 1, 1, 0, 0, 1, 1], np.int64)
    stem = model.add("Relu", model.norm(model.conv("image", 3, 8, pads=[1] * 4), 8))
    pooled = model.add("MaxPool", model.add("Pad", stem, sides, mode="constant"), kernel_shape=[3, 3], strides=[2, 2])
    branch = model.add("Relu", model.norm(model.conv(pooled, 8, 8, pads=[1] * 4, strides=[2, 2]), 8))
    branch = model.norm(model.conv(branch, 8, 8, pads=[1] * 4), 8)
    total = model.add("Relu", model.add("Add", branch, model.norm(model.conv(pooled, 8, 8, 1, strides=[2, 2]), 8)))
    last = model.add("Relu", model.conv(total, 8, 8, 1))
    return model.add("AveragePool", last, kernel_shape=[2, 2], strides=[2, 2])


def timm(model: Model) -> str:
    """What networks of timm have besides: pixels moved into channels, blurring behind a mirrored border, a gate that is
    repeated by itself, and the highest number beside the mean."""
    stem = model.add("Relu", model.norm(model.conv(model.add("SpaceToDepth", "image", blocksize=2), 12, 8, 3), 8))
    sides = model.constant([0, 0, 1, 1, 0, 0, 1, 1], np.int64)
    around = model.add("Pad", stem, sides, mode="reflect")
    blur = model.constant(np.broadcast_to(np.outer([1, 2, 1], [1, 2, 1]) / 16, (8, 1, 3, 3)))
    small = model.add("Conv", around, blur, group=8, strides=[2, 2])
    shape = model.add("Shape", small)
    highest = model.add("ReduceMax", small, axes=[2, 3])
    inner = model.conv(model.add("Add", model.add("GlobalAveragePool", small), highest), 8, 8, 1)
    gated = model.add("Mul", small, model.add("Expand", model.add("Sigmoid", inner), shape))
    spots = model.add("ReduceMax", gated, axes=[1])
    return model.add("Mul", gated, model.add("Sigmoid", model.conv(spots, 1, 1, pads=[1] * 4)))


def normalizing(model: Model) -> str:
    """Norms of single pictures, activations of several layers, and pixels that are repeated."""
    stem = model.conv("image", 3, 8, pads=[1] * 4, strides=[2, 2])
    each = [model.constant(np.linspace(low, 1, 8)) for low in (0.5, -1)]
    normal = model.add("InstanceNormalization", stem, *each)
    curved = model.add("Elu", model.conv(normal, 8, 8, 1), alpha=0.7)
    soft = model.add("Mul", curved, model.add("Tanh", model.add("Softplus", curved)))
    leaky = model.add("Max", soft, model.add("Mul", soft, model.constant(0.1)))
    half = model.add("AveragePool", leaky, kernel_shape=[2, 2], strides=[2, 2])
    again = model.add("Resize", half, model.constant([]), model.constant([1, 1, 2, 2]), mode="nearest")
    lengths = model.add("Add", model.add("ReduceL2", again, axes=[1]), model.constant(1.0))
    back = (model.constant(v, np.int64) for v in ([-1], [-100], [3], [-1]))
    return model.add("Slice", model.add("Div", model.add("Add", again, leaky), lengths), *back)


def attention(model: Model) -> str:
    """A transformer's block, whose exporter mixes the batch with other axes: tokens as rows of a matrix, a class token
    that is a constant, and heads in front of pictures."""

    def shaped(source: str, *shape: int) -> str:
        return model.add("Reshape", source, model.constant(shape, np.int64))

    grid = shaped(model.conv("image", 3, 8, 4, strides=[4, 4]), 0, 8, 64)
    tokens = model.add(
        "Concat", model.constant(np.ones((1, 1, 8))), model.add("Transpose", grid, perm=[0, 2, 1]), axis=1
    )
    tokens = model.add("Add", tokens, model.weights(1, 65, 8))
    rows = model.add("Gemm", shaped(tokens, 65, 8), model.weights(8, 24), model.constant(np.linspace(-1, 1, 24)))
    heads = model.add("Transpose", shaped(rows, 1, 65, 3, 2, 4), perm=[2, 0, 3, 1, 4])
    query, key, value = (model.add("Gather", heads, model.constant(place, np.int64), axis=0) for place in range(3))
    alike = model.add(
        "MatMul", model.add("Mul", query, model.constant(0.5)), model.add("Transpose", key, perm=[0, 1, 3, 2])
    )
    found = model.add("MatMul", model.add("Softmax", alike, axis=-1), value)
    joined = shaped(model.add("Transpose", found, perm=[2, 0, 1, 3]), 65, 8)
    mixed = model.add("Add", shaped(model.add("Gemm", joined, model.weights(8, 8)), 1, 65, 8), tokens)
    back = model.add("Slice", mixed, *(model.constant(v, np.int64) for v in ([1], [65], [1])))
    return shaped(model.add("Transpose", back, perm=[0, 2, 1]), 0, 8, 8, 8)


def unfolded(model: Model) -> str:
    """A perceptron with a SiLU over tokens along two axes, the places in a patch and the patches, as in MobileViT."""

    def shaped(source: str, *shape: int) -> str:
        return model.add("Reshape", source, model.constant(shape, np.int64))

    patches = model.add(
        "Transpose", shaped(model.conv("image", 3, 8, 4, strides=[4, 4]), 0, 8, 4, 16), perm=[0, 2, 3, 1]
    )
    gain, shift = model.constant(np.linspace(0.5, 1.5, 8)), model.constant(np.linspace(-0.5, 0.5, 8))
    normal = model.add("LayerNormalization", patches, gain, shift, axis=-1)
    wide = model.add("Add", model.add("MatMul", normal, model.weights(8, 16)), model.constant(np.linspace(-1, 1, 16)))
    gated = model.add("Mul", wide, model.add("Sigmoid", wide))
    narrow = model.add("Add", model.add("MatMul", gated, model.weights(16, 8)), model.constant(np.linspace(-1, 1, 8)))
    whole = model.add("Add", narrow, patches)
    return shaped(model.add("Transpose", whole, perm=[0, 3, 1, 2]), 0, 8, 8, 8)


def dense(model: Model) -> str:
    """DenseNet's: each layer reads a norm of all that was made before."""
    parts = [model.conv("image", 3, 8, pads=[1] * 4, strides=[2, 2])]
    for channels in (8, 12):
        whole = model.add("Concat", *parts, axis=1) if len(parts) > 1 else parts[0]
        parts.append(model.conv(model.add("Relu", model.norm(whole, channels)), channels, 4, pads=[1] * 4))
    whole = model.add("Relu", model.norm(model.add("Concat", *parts, axis=1), 16))
    return model.conv(whole, 16, 8)


BODIES: dict[str, Callable[[Model], str]] = {
    "plain": plain,
    "squeeze_and_excite": squeeze_and_excite,
    "old_swishes": old_swishes,
    "branches": branches,
    "rare": rare,
    "keras": keras,
    "swishes": swishes,
    "channels_last": channels_last,
    "keras_without_gate": keras_without_gate,
    "pools": pools,
    "padless": padless,
    "timm": timm,
    "normalizing": normalizing,
    "attention": attention,
    "five_axes": five_axes,
    "unfolded": unfolded,
    "dense": dense,
}
"""Each ends in 8 channels."""


def write(path: Path, body: str = "plain", opset: int = 17, softmax: bool = False) -> Path:
    """A classifier of 10 classes for pictures of 32x32 pixels."""
    model = Model(opset=opset)
    output = model.classify(BODIES[body](model), 8)
    if softmax:
        output = model.add("Softmax", output, axis=1)
    return model.save(path, output)
