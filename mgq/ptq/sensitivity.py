"""Measures where the error of int8 comes from: in each layer, and in the answers with one layer quantized."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import megengine.module as M
import megengine.module.qat as Q
import numpy as np
import numpy.typing as npt
from megengine import Tensor
from megengine.module.qat import QATModule, QuantStub
from megengine.quantization.fake_quant import _FakeQuantize
from megengine.quantization.observer import Observer

from mgq.events import OnProgress, Progress, log_progress
from mgq.ptq.range_measurement import as_input
from mgq.quantization.floors import floor_of
from mgq.quantization.half_to_even import ends_of
from mgq.quantization.qat_layers import add_to_bias, bias_parameter, fold_weight, quant_levels, quantize_weight
from mgq.quantization.targets import UNSIGNED, levels_of
from mgq.zoo.layers import forward_hooks

Array = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]

BATCH = 8
"""Images in a batch: the outputs of all layers for them are kept in memory."""
BINS = 64
SAMPLE = 200_000
"""The most activations of a batch in a histogram, evenly spread: more change no bar visibly."""
DOMINANT = 2.0
"""A channel dominates if its largest value is more than so many times that of the median channel."""
ROUNDING = 1e-6
"""Rounding error of float32 relative to the largest value seen."""
EXACT = 100.0
"""From this many dB on values count as equal: the rest is the rounding of float32."""


@dataclass(frozen=True)
class Values:
    """A layer's weights (batch norm folded in) or activations, and what int8 makes of them.

    ``snr`` in dB, infinite where nothing is lost: energy of the float values / energy of the rounding and clipping
    error. ``low`` and ``high`` are the smallest and largest value seen, ``limit`` is the largest that int8 covers, all
    in the float network's units. ``clipped`` is the share (0..1) of values beyond it. ``histogram`` counts values in
    ``BINS`` even bins over ``grid``, those beyond at its ends, as int8 has them. ``shares`` (channels,) is the largest
    absolute value of each output channel / the range it is given.
    """

    snr: float
    low: float
    high: float
    limit: float
    clipped: float
    grid: tuple[float, float]
    histogram: tuple[int, ...]
    shares: tuple[float, ...]

    @property
    def median_share(self) -> float:
        """The part of the range (0..1) that the median channel uses: small where a few channels set it for all."""
        return float(np.median(self.shares))

    def find_dominant_channels(self, number: int = 3) -> list[int]:
        """The channels that set the range: of those beyond ``DOMINANT`` medians the largest, the first one first."""
        order = np.argsort(-np.asarray(self.shares), kind="stable")[:number]
        return [int(i) for i in order if self.shares[i] > DOMINANT * self.median_share]


@dataclass(frozen=True)
class Effect:
    """What quantization does to the answers.

    ``logit_snr`` in dB, infinite where they are equal: energy of the float logits / energy of the difference. ``same``:
    percent of the pictures with the same answer as in float. ``top1_change`` in points, negative where quantization
    loses, and its standard error, that of a mean of paired differences; None without labels.
    """

    logit_snr: float
    same: float
    top1_change: float | None = None
    top1_error: float | None = None


@dataclass(frozen=True)
class LayerSensitivity:
    """One quantized layer. ``alone`` is the effect when all others are float.

    ``weights`` is None for a layer without, ``activations`` where the output stays float. ``carried_snr`` in dB is what
    the float output of the layer is to the error behind it when all layers are quantized, None where it stays float.
    """

    name: str
    kind: str
    weights: Values | None
    activations: Values | None
    alone: Effect
    carried_snr: float | None


@dataclass(frozen=True)
class Sensitivity:
    """The layers in the order in which they run, and the effect of all of them at once, on ``images`` pictures.

    ``float_top1`` in percent, None without labels.
    """

    images: int
    layers: tuple[LayerSensitivity, ...]
    whole: Effect
    float_top1: float | None

    def worst(self, number: int | None = None) -> list[LayerSensitivity]:
        """The layers that alone disturb the logits most, the worst first; at most ``number``."""
        return sorted(self.layers, key=lambda layer: layer.alone.logit_snr)[:number]

    @property
    def rounded_before(self) -> bool:
        """Whether the weights lie on the int8 grid already, so that their own error cannot be seen."""
        weights = [layer.weights for layer in self.layers if layer.weights is not None]
        return bool(weights) and sum(values.snr > EXACT for values in weights) > len(weights) / 2


def sensitivity_of(
    network: M.Module,
    images: npt.NDArray[np.uint8],
    labels: Labels | None = None,
    corrections: Mapping[str, Sequence[float]] | None = None,
    on_progress: OnProgress = log_progress,
) -> Sensitivity:
    """Quantize each layer of ``network`` alone, then all of them, and compare with float on ``images``.

    ``network`` is in mode ``qat``, in evaluation state, and has its ranges; it is left as it was. ``images`` are uint8
    (N, 3, H, W), BGR, ``labels`` int64 (N,), the indices of their logits. ``corrections`` are those that the biases
    hold (layer -> float for each channel): float and single layers run without them, because they correct errors of all
    layers before.
    """
    parts = [images[i : i + BATCH] for i in range(0, len(images), BATCH)]
    layers = find_analyzed_layers(network)
    with keep_switches(network):
        for layer in layers.values():
            layer.set_fake_quant(False)
            layer.set_observer(False)
        survey = Survey(network, layers, corrections or {})
        for number, part in enumerate(parts):
            for done, total in survey.see(as_input(part)):
                on_progress(Progress("layers alone", number * total + done, len(parts) * total, "runs"))
        return survey.result(labels)


def find_analyzed_layers(network: M.Module) -> dict[str, QATModule]:
    """Name -> layer that quantizes its weights or its output; not the input, which is int8 by nature."""
    return {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, QATModule)
        and not isinstance(module, QuantStub)
        and (module.act_observer is not None or module.weight_observer is not None)
    }


@contextmanager
def keep_switches(network: M.Module) -> Iterator[None]:
    """Afterwards each observer and each fake quantization is on or off as it was before."""
    parts = [module for module in network.modules() if isinstance(module, _FakeQuantize | Observer)]
    were = [part.enabled for part in parts]
    try:
        yield
    finally:
        for part, enabled in zip(parts, were, strict=True):
            part.enabled = enabled


@contextmanager
def observe_outputs(layers: Mapping[str, QATModule], seen: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Inside, ``seen`` is shown the output of each layer that runs."""

    def hook_of(name: str) -> Callable[..., None]:
        def hook(_module: QATModule, _inputs: object, output: Tensor) -> None:
            seen(name, output)

        return hook

    with forward_hooks((layer, hook_of(name)) for name, layer in layers.items()):
        yield


@contextmanager
def name_outputs(layer: QATModule, output: Tensor) -> Iterator[None]:
    """Inside, ``layer`` gives ``output`` and computes nothing."""
    layer.forward = lambda *_: output
    try:
        yield
    finally:
        del layer.forward  # the method of its class is back


@contextmanager
def without_corrections(layers: Mapping[str, QATModule], corrections: Mapping[str, Sequence[float]]) -> Iterator[None]:
    """Inside, the biases are without ``corrections``; afterwards they are to the bit what they were."""
    biases = [bias_parameter(layers[name]) for name in corrections]
    were = [bias.numpy().copy() for bias in biases if bias is not None]
    try:
        for name, correction in corrections.items():
            add_to_bias(layers[name], [-value for value in correction])
        yield
    finally:
        for bias, values in zip((bias for bias in biases if bias is not None), were, strict=True):
            bias[...] = Tensor(values)


def logits_of(network: M.Module, batch: Array) -> Array:
    logits: Array = network(Tensor(batch)).numpy()
    return logits


@dataclass
class Tally:
    """Sums over the values of one tensor, batch after batch."""

    limits: npt.NDArray[np.float64]  # of each channel, or the one of all
    lowest: float
    signal: float = 0.0
    noise: float = 0.0
    low: float = math.inf
    high: float = -math.inf
    count: int = 0
    beyond: int = 0
    counts: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(BINS, np.int64))
    peaks: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros(1))

    @property
    def limit(self) -> float:
        return float(self.limits.max())

    def add(self, values: Array, quantized: Array) -> None:
        """Channels first: float32 (C, ...), both."""
        rows, errors = values.reshape(len(values), -1), (values - quantized).ravel()
        self.signal += float(np.vdot(rows, rows))
        self.noise += float(np.vdot(errors, errors))
        lows, highs = rows.min(1), rows.max(1)
        self.low, self.high = min(self.low, float(lows.min())), max(self.high, float(highs.max()))
        peaks = np.maximum(np.abs(lows), np.abs(highs)).astype(np.float64)
        self.peaks = np.maximum(self.peaks, peaks)
        limits = np.broadcast_to(self.limits, len(rows)) * (1 + ROUNDING)
        over = peaks > limits
        self.beyond += int((np.abs(rows[over]) > limits[over, None]).sum())
        self.count += rows.size
        sample = rows.ravel()[:: max(1, rows.size // SAMPLE)]
        inside = np.clip(sample, self.lowest, self.limit)
        self.counts += np.histogram(inside, BINS, (self.lowest, self.limit))[0]

    def values(self) -> Values:
        return Values(
            snr=decibels(self.signal, self.noise),
            low=self.low,
            high=self.high,
            limit=self.limit,
            clipped=self.beyond / self.count,
            grid=(self.lowest, self.limit),
            histogram=tuple(self.counts.tolist()),
            shares=tuple((self.peaks / self.limits).tolist()),
        )


def decibels(signal: float, noise: float) -> float:
    """10 log10(signal / noise): infinite without noise, minus infinite where there is nothing but noise."""
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf


def weights_of(layer: QATModule) -> Values | None:
    """None for a layer that has none."""
    if layer.weight_observer is None:
        return None
    exact, fake = fold_weight(layer).numpy(), quantize_weight(layer).numpy()
    channels = math.prod(exact.shape[: 2 if exact.ndim == 5 else 1])
    limits = np.ravel(layer.get_weight_qparams().scale.numpy()).astype(np.float64) * levels_of(layer)
    tally = Tally(limits, -float(limits.max()))
    tally.add(exact.reshape(channels, -1), fake.reshape(channels, -1))
    return tally.values()


def activation_tally(layer: QATModule) -> Tally | None:
    """None for a layer whose output stays float."""
    if layer.act_observer is None:
        return None
    scale = float(layer.get_activation_qparams().scale.numpy())
    if floor_of(layer.act_observer.dtype) is not None:
        lowest, highest = (steps * scale for steps in ends_of(layer.act_observer.dtype, scale))
        return Tally(np.array([highest]), lowest)
    limit = scale * quant_levels(layer)
    return Tally(np.array([limit]), 0.0 if layer.act_observer.dtype == UNSIGNED else -limit)


def channels_first(output: Array) -> Array:
    return np.ascontiguousarray(np.moveaxis(output, 1, 0))


def kind_of(layer: QATModule) -> str:
    """What a layer is, in a word or two."""
    conv = getattr(layer, "conv", layer)
    if hasattr(conv, "kernel_size"):
        kernel = "x".join(str(side) for side in conv.kernel_size)
        grouped = "" if conv.groups == 1 else " depthwise" if conv.groups == conv.in_channels else " grouped"
        return f"{kernel}{grouped} convolution"
    if isinstance(layer, Q.Elemwise):
        return "sum"
    return "linear" if isinstance(layer, Q.Linear) else "features"


@dataclass
class Survey:
    """Collects values of the layers and answers, batch after batch. Between its runs all layers are float; each run
    switches on the layers that it measures.
    """

    network: M.Module
    layers: Mapping[str, QATModule]
    corrections: Mapping[str, Sequence[float]]
    order: list[str] = field(default_factory=list)
    activations: dict[str, Tally | None] = field(default_factory=dict)
    carried: dict[str, tuple[float, float]] = field(default_factory=dict)
    exact: list[Array] = field(default_factory=list)
    alone: dict[str, list[Array]] = field(default_factory=dict)
    whole: list[Array] = field(default_factory=list)

    def see(self, batch: Array) -> Iterator[tuple[int, int]]:
        """float32 (N, 3, H, W), pixels minus 128. Yields how many runs of how many are done."""
        outputs: dict[str, Array] = {}
        with without_corrections(self.layers, self.corrections):
            with observe_outputs(self.layers, lambda name, output: outputs.update({name: output.numpy()})):
                self.exact.append(logits_of(self.network, batch))
            for name, output in outputs.items():
                self.measure(name, output)
            with ExitStack() as before:
                for done, (name, output) in enumerate(outputs.items(), 1):
                    layer = self.layers[name]
                    layer.set_fake_quant(True)
                    self.alone.setdefault(name, []).append(logits_of(self.network, batch))
                    layer.set_fake_quant(False)
                    # From now on everything up to here is float and known. A new tensor carries no grid that the next
                    # layer would round it to.
                    before.enter_context(name_outputs(layer, Tensor(output)))
                    yield done, len(outputs) + 1
        self.quantize_all(batch, outputs)
        yield len(outputs) + 1, len(outputs) + 1

    def measure(self, name: str, output: Array) -> None:
        layer = self.layers[name]
        if name not in self.activations:
            self.order.append(name)
            self.activations[name] = activation_tally(layer)
        tally = self.activations[name]
        if tally is not None:
            layer.act_fake_quant.enable()
            fake = layer.apply_quant_activation(Tensor(output)).numpy()
            layer.act_fake_quant.disable()
            floor = floor_of(layer.act_observer.dtype)
            seen = output if floor is None else np.maximum(output, tally.lowest)  # below it all values are the same
            tally.add(channels_first(seen), channels_first(fake))

    def quantize_all(self, batch: Array, outputs: Mapping[str, Array]) -> None:
        def compare(name: str, output: Tensor) -> None:
            exact, error = outputs[name], outputs[name] - output.numpy()
            signal, noise = self.carried.get(name, (0.0, 0.0))
            self.carried[name] = signal + float(np.vdot(exact, exact)), noise + float(np.vdot(error, error))

        for layer in self.layers.values():
            layer.set_fake_quant(True)
        with observe_outputs(self.layers, compare):
            self.whole.append(logits_of(self.network, batch))
        for layer in self.layers.values():
            layer.set_fake_quant(False)

    def result(self, labels: Labels | None) -> Sensitivity:
        exact = np.concatenate(self.exact)
        found = []
        for name in self.order:
            tally = self.activations[name]
            found.append(
                LayerSensitivity(
                    name=name,
                    kind=kind_of(self.layers[name]),
                    weights=weights_of(self.layers[name]),
                    activations=tally.values() if tally is not None else None,
                    alone=effect_of(exact, np.concatenate(self.alone[name]), labels),
                    carried_snr=decibels(*self.carried[name]) if tally is not None else None,
                )
            )
        top1 = None if labels is None else 100 * float((exact.argmax(1) == labels).mean())
        return Sensitivity(len(exact), tuple(found), effect_of(exact, np.concatenate(self.whole), labels), top1)


def effect_of(exact: Array, quantized: Array, labels: Labels | None) -> Effect:
    """Compare the logits ``quantized`` with ``exact``, both float32 (N, classes)."""
    error = (exact - quantized).ravel()
    snr = decibels(float(np.vdot(exact, exact)), float(np.vdot(error, error)))
    before, after = exact.argmax(1), quantized.argmax(1)
    same = 100 * float((before == after).mean())
    if labels is None:
        return Effect(snr, same)
    change = (after == labels).astype(np.float64) - (before == labels)
    deviation = float(change.std(ddof=1)) if len(change) > 1 else math.nan
    return Effect(snr, same, 100 * float(change.mean()), 100 * deviation / math.sqrt(len(change)))
