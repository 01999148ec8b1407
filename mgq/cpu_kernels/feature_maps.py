"""Feature maps: arrays with channels last that fast layers hand to each other in training, without MegEngine.

A copy into MegEngine and out of it again for every layer, and the turn from its layout into oneDNN's and back, would
cost as much as the convolutions. So a layer hands the next one a :class:`FeatureMap`. MegEngine's autograd sees only a
token of it, one number, by which it calls the layers' gradients in the right order.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from megengine import Tensor
from megengine.autodiff import Function
from megengine.core._imperative_rt.core2 import get_grad_key
from megengine.quantization.observer import MinMaxObserver
from megengine.quantization.utils import QParams, create_qparams

from mgq.cpu_kernels import channels_last
from mgq.cpu_kernels.channels_last import Pool
from mgq.cpu_kernels.elementwise import apply_mask
from mgq.cpu_kernels.fake_quantization import Quantizer, update_observer
from mgq.cpu_kernels.tensor_exchange import Array, Shape, values

TOKEN = np.zeros(1, np.float32)
_tokens: dict[str, Tensor] = {}


class Gradient:
    """The gradient with respect to a feature map, which its readers add to: float32 (N, H, W, C)."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.sum: Array | None = None

    def add(self, part: Array | None) -> None:
        if part is not None:
            # In memory of its own: several maps may have been given the same part.
            self.sum = part if self.sum is None else channels_last.add(self.sum, part)

    def take(self) -> Array:
        found = np.zeros(self.shape, np.float32) if self.sum is None else self.sum
        self.sum = None
        return found


class FeatureMap:
    """The output of a layer: ``array``, float32 (N, H, W, C), whose shape for others is (N, C, H, W).

    ``token`` represents it in MegEngine's autograd. It has those attributes of a tensor that modules between the layers
    read.
    """

    dtype = np.dtype(np.float32)
    ndim = 4

    def __init__(self, array: Array, gradient: Gradient, token: Tensor) -> None:
        self.array, self.gradient, self.token = array, gradient, token
        self._qparams: QParams | None = None

    @property
    def _tuple_shape(self) -> Shape:
        batch, height, width, channels = self.array.shape
        return batch, channels, height, width

    @property
    def qparams(self) -> QParams:
        """As a tensor has them."""
        if self._qparams is None:
            self._qparams = create_qparams()
        return self._qparams

    def to_tensor(self) -> Tensor:
        """As a MegEngine tensor, float32 (N, C, H, W)."""
        tensor = ToTensor(self)(self.token)
        if self._qparams is not None:
            tensor.qparams.update(self._qparams)
        return tensor


def to_plain(value: Any) -> Any:
    """``value`` as MegEngine's own functions take it."""
    return value.to_tensor() if isinstance(value, FeatureMap) else value


def token_of(value: Tensor | FeatureMap) -> Tensor:
    """The tensor that represents ``value`` in MegEngine's autograd."""
    return value.token if isinstance(value, FeatureMap) else value


def of_tensor(tensor: Tensor) -> FeatureMap:
    """A plain tensor, float32 (N, C, H, W), as a feature map with a gradient where the tensor has one."""
    (array,) = values(tensor)
    found = FromTensor(channels_last.to_channels_last(array)).apply_to_maps(tensor)
    if tensor._qparams is not None:
        found.qparams.update(tensor._qparams)
    return found


def new_token(device: Any) -> Tensor:
    """One number on ``device``. All are copies of one: a tensor's own memory takes ten times as long to get."""
    name = str(device)
    if name not in _tokens:
        _tokens[name] = Tensor(TOKEN, device=device)
    return Tensor(_tokens[name])


class MapFunction(Function):  # type: ignore[misc]
    """A differentiable function that gives a feature map."""

    gradient: Gradient
    array: Array

    def apply_to_maps(self, *inputs: Tensor | FeatureMap) -> FeatureMap:
        """Its result for ``inputs``."""
        token = self(*map(token_of, inputs))
        array = self.array
        del self.array
        return FeatureMap(array, self.gradient, token)

    def emit(self, array: Array, device: Any) -> Tensor:
        """Give ``array`` as the result, and its token to MegEngine."""
        self.array, self.gradient = array, Gradient(array.shape)
        return new_token(device)


class FromTensor(MapFunction):
    """A tensor as a feature map; ``turned`` holds its values with channels last."""

    def __init__(self, turned: Array) -> None:
        super().__init__()
        self.turned = turned

    def forward(self, source: Tensor) -> Tensor:
        token = self.emit(self.turned, source.device)
        del self.turned
        return token

    def backward(self, token: Tensor) -> Tensor:
        return Tensor(channels_last.to_channels_first(self.gradient.take()), device=token.device)


class ToTensor(Function):  # type: ignore[misc]
    """A feature map as a tensor."""

    def __init__(self, source: FeatureMap) -> None:
        super().__init__()
        self.source = source

    def forward(self, token: Tensor) -> Tensor:
        self.to = self.source.gradient
        output = Tensor(channels_last.to_channels_first(self.source.array), device=token.device)
        del self.source
        return output

    def backward(self, d_output: Tensor) -> Tensor:
        (gradient,) = values(d_output)
        self.to.add(channels_last.to_channels_last(gradient))
        return new_token(d_output.device)


class GlobalAverage(Function):  # type: ignore[misc]
    """A feature map -> tensor (N, C, 1, 1), its mean over height and width."""

    def __init__(self, source: FeatureMap) -> None:
        super().__init__()
        self.source = source

    def forward(self, token: Tensor) -> Tensor:
        self.to, self.shape = self.source.gradient, self.source.array.shape
        mean = self.source.array.mean((1, 2))
        del self.source
        return Tensor(mean[:, :, None, None], device=token.device)

    def backward(self, d_output: Tensor) -> Tensor:
        batch, height, width, channels = self.shape
        share = d_output.numpy().reshape(batch, 1, 1, channels) / np.float32(height * width)
        self.to.add(np.broadcast_to(share, self.shape).copy())
        return new_token(d_output.device)


class Sum(MapFunction):
    """The sum of two feature maps and, with ``relu``, max(sum, 0)."""

    def __init__(self, a: FeatureMap, b: FeatureMap, relu: bool) -> None:
        super().__init__()
        self.sources, self.relu = (a, b), relu

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        self.to = [source.gradient for source in self.sources]
        first, second = self.sources
        added = channels_last.add(first.array, second.array, self.relu)
        del self.sources
        self.output = added if self.relu else None
        return self.emit(added, a.device)

    def backward(self, token: Tensor) -> tuple[Tensor, Tensor]:
        gradient = self.gradient.take()
        if self.output is not None:
            gradient = channels_last.mask_negative(self.output, gradient)
        del self.output
        for to in self.to:
            to.add(gradient)
        return token, token


class QuantizedSum(MapFunction):
    """The sum of two feature maps and, with ``relu``, max(sum, 0), fake-quantized by what its ``observer`` says then.

    ``qparams`` are there once it was called. The gradient passes where nothing was clipped, and is 0 elsewhere.
    """

    def __init__(self, a: FeatureMap, b: FeatureMap, relu: bool, observer: MinMaxObserver) -> None:
        super().__init__()
        self.sources, self.relu, self.observer = (a, b), relu, observer

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        self.to = [source.gradient for source in self.sources]
        first, second = self.sources
        added, extremes = channels_last.add_and_watch(first.array, second.array, self.relu)
        del self.sources
        self.qparams = update_observer(self.observer, lambda: extremes)
        self.passes = self.qparams.quantizer.apply_in_place(added, self.relu)
        return self.emit(added, a.device)

    def backward(self, token: Tensor) -> tuple[Tensor, Tensor]:
        gradient = self.gradient.take()
        if self.passes is not None:
            gradient = apply_mask(gradient, self.passes)
        del self.passes
        for to in self.to:
            to.add(gradient)
        return token, token


class MaxPool(MapFunction):
    """The largest value of each window; each of several equal ones gets the whole gradient, as in MegEngine."""

    def __init__(self, source: FeatureMap, pool: Pool) -> None:
        super().__init__()
        self.source, self.pool = source, pool

    def forward(self, token: Tensor) -> Tensor:
        self.to, self.read = self.source.gradient, self.source.array
        del self.source
        self.output = channels_last.max_pool(self.read, self.pool)
        return self.emit(self.output, token.device)

    def backward(self, token: Tensor) -> Tensor:
        self.to.add(channels_last.max_pool_gradient(self.read, self.output, self.gradient.take(), self.pool))
        del self.read, self.output
        return token


class Shuffle(MapFunction):
    """Channels seen as a (C / groups, groups) table, transposed."""

    def __init__(self, source: FeatureMap, groups: int) -> None:
        super().__init__()
        self.source, self.groups = source, groups

    def forward(self, token: Tensor) -> Tensor:
        self.to = self.source.gradient
        shuffled = channels_last.shuffle(self.source.array, self.groups)
        del self.source
        return self.emit(shuffled, token.device)

    def backward(self, token: Tensor) -> Tensor:
        gradient = self.gradient.take()
        self.to.add(channels_last.shuffle(gradient, gradient.shape[-1] // self.groups))
        return token


class QuantizedMap(MapFunction):
    """A feature map, fake-quantized by ``quantizer``. The gradient passes where nothing was clipped, and is 0
    elsewhere."""

    def __init__(self, source: FeatureMap, quantizer: Quantizer) -> None:
        super().__init__()
        self.source, self.quantizer = source, quantizer

    def forward(self, token: Tensor) -> Tensor:
        self.to = self.source.gradient
        output, self.passes = self.quantizer.apply(self.source.array)
        del self.source
        return self.emit(output, token.device)

    def backward(self, token: Tensor) -> Tensor:
        gradient = self.gradient.take()
        self.to.add(gradient if self.passes is None else apply_mask(gradient, self.passes))
        del self.passes
        return token


def needs_gradient(*inputs: Tensor | FeatureMap) -> bool:
    """Whether a gradient with respect to one of ``inputs`` is being recorded."""
    return get_grad_key(tuple(map(token_of, inputs))) is not None
