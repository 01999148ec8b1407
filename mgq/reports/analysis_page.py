"""Makes the HTML page of an analysis."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from mgq.engine.calibration.analysis import Analysis, format_decibels, format_points
from mgq.engine.classifier.open import versions
from mgq.errors import plural
from mgq.io.atomic import write_text_output
from mgq.ptq.sensitivity import EXACT, LayerSensitivity, Values
from mgq.reports.drawings import Bar, Curve, Dot, Drawing, Line, Outline, Shape, Text
from mgq.reports.html import BLUE, GREEN, GREY, ORANGE, Link, Table, render

MARKED = 10
"""The number of worst layers that are drawn in the colour of warning."""
TOP_DB = 60.0
"""Above it no layer is a problem: curves end there."""
STEP = 15.0


def write_page(analysis: Analysis, path: Path) -> None:
    """Write the page to ``path``. Raises as :func:`mgq.io.atomic.write_text_output` does."""
    write_text_output(path, page_of(analysis))


def page_of(analysis: Analysis) -> str:
    """HTML 5, in itself complete."""
    found, arch = analysis.found, analysis.classifier.spec.name
    return render(
        "analysis.html",
        title=f"{arch}: analysis",
        arch=arch,
        analysis=analysis,
        versions=versions(),
        remarks=[*analysis.remarks, *analysis.images.problems],
        summary=summary(analysis),
        marked=min(MARKED, len(found.layers)),
        alone=alone_chart(found.layers, {layer.name for layer in found.worst(MARKED)}),
        top_db=TOP_DB,
        noise=noise_chart(found.layers),
        layers=layer_table(analysis),
        details=[(layer, list(figures_of(layer))) for layer in found.layers],
    )


# ---- the whole of it ----


def summary(analysis: Analysis) -> Table:
    found = analysis.found
    rows = [("logits, all layers int8", f"{format_decibels(found.whole.logit_snr, ' dB')}")]
    rows.append(("same answer as float", f"{found.whole.same:.1f} %"))
    if found.float_top1 is not None:
        rows.append(("top-1, float", f"{found.float_top1:.1f} % ±{analysis.float_error:.1f}"))
        rows.append(("change of top-1", f"{format_points(found.whole)} points"))
    note = "± is one standard error" if found.float_top1 is not None else "accuracy needs labelled pictures"
    return Table(f"All layers in simulated int8. {note}.", ["what", "value"], rows)


# ---- drawings ----


def error_percent(snr: float) -> float:
    """The error's size in percent of the signal's, from dB."""
    return 100 * 10 ** (-snr / 20)


def alone_chart(layers: Sequence[LayerSensitivity], worst: set[str]) -> Drawing:
    """A bar a layer, from the input down to the output."""
    left, width, height = 230, 560, 15
    errors = [error_percent(layer.alone.logit_snr) for layer in layers]
    largest = max([error for error in errors if math.isfinite(error)], default=0.0) or 1.0
    parts: list[Shape] = []
    for number, (layer, error) in enumerate(zip(layers, errors, strict=True)):
        y = number * height
        length = width * min(error, largest) / largest
        colour = ORANGE if layer.name in worst else BLUE
        told = f"{error:.2g} %  ({format_decibels(layer.alone.logit_snr, ' dB')})"
        parts.append(Text(left - 8, y + 11, layer.name, "end"))
        parts.append(Bar(left, y + 2, max(length, 0.5), height - 4, colour))
        parts.append(Text(left + length + 6, y + 11, told))
    return Drawing(left + width + 130, len(layers) * height, "error of the logits with one layer in int8", parts)


def noise_chart(layers: Sequence[LayerSensitivity]) -> Drawing:
    """Three curves over the layers."""
    left, top, height = 40, 24, 240
    step = max(9.0, 900 / max(1, len(layers)))
    width = step * max(1, len(layers) - 1)
    kinds = {
        "weights": (BLUE, [layer.weights.snr if layer.weights else None for layer in layers]),
        "outputs": (GREEN, [layer.activations.snr if layer.activations else None for layer in layers]),
        "carried": (ORANGE, [layer.carried_snr for layer in layers]),
    }
    values = [value for _, found in kinds.values() for value in found if value is not None]
    bottom = STEP * math.floor(min([0.0, *(value for value in values if math.isfinite(value))]) / STEP)

    def place(number: int, value: float) -> tuple[float, float]:
        inside = min(max(value, bottom), TOP_DB)
        return left + number * step, top + height * (TOP_DB - inside) / (TOP_DB - bottom)

    parts: list[Shape] = []
    for tick in range(round((TOP_DB - bottom) / STEP) + 1):
        decibels = bottom + tick * STEP
        y = place(0, decibels)[1]
        parts += [Line(left, y, left + width, y), Text(left - 6, y + 4, f"{decibels:.0f}", "end")]
    for turn, (kind, (colour, found)) in enumerate(kinds.items()):
        points = [(i, place(i, value)) for i, value in enumerate(found) if value is not None]
        parts.append(Curve([point for _, point in points], colour))
        for i, (x, y) in points:
            parts.append(Dot(x, y, colour, f"{layers[i].name}, {kind}: {format_decibels(found[i], ' dB')}"))
        x = left + 90 * turn
        parts += [Bar(x, 4, 10, 10, colour), Text(x + 15, 13, kind)]
    parts.append(Text(left, top + height + 20, "input"))
    parts.append(Text(left + width, top + height + 20, "output", "end"))
    return Drawing(left + width + 10, top + height + 28, "signal to noise in dB along the network", parts)


def histogram(values: Values) -> Drawing:
    width, height = 256.0, 70.0
    tallest = math.log1p(max(values.histogram))
    bar = width / len(values.histogram)
    steps = []
    for number, count in enumerate(values.histogram):
        y = height * (1 - math.log1p(count) / tallest) if tallest else height
        steps.append(f"V{y:.1f}H{(number + 1) * bar:.0f}")
    low, high = values.grid
    parts: list[Shape] = [Outline(f"M0 {height:.0f}{''.join(steps)}V{height:.0f}Z", BLUE)]
    for edge in (values.low, values.high):
        x = width * (min(max(edge, low), high) - low) / (high - low)
        parts.append(Line(x, 0, x, height, ORANGE))
    parts += [Line(0, height, width, height, GREY), Text(0, height + 13, f"{low:.3g}")]
    parts.append(Text(width, height + 13, f"{high:.3g}", "end"))
    return Drawing(width, height + 18, "histogram", parts)


def channel_chart(values: Values) -> Drawing:
    """The largest value of each channel in terms of the range, the largest first."""
    width, height = 180.0, 70.0
    shares = sorted((min(share, 1.0) for share in values.shares), reverse=True)
    bar = width / len(shares)
    steps = "".join(f"V{height * (1 - share):.1f}H{(i + 1) * bar:.1f}" for i, share in enumerate(shares))
    middle = height * (1 - min(values.median_share, 1.0))
    outline = Outline(f"M0 {height:.0f}{steps}V{height:.0f}Z", GREEN)
    parts: list[Shape] = [outline, Line(0, middle, width, middle, GREY)]
    parts += [Line(0, height, width, height, GREY), Text(0, height + 13, plural(len(shares), "channel"))]
    parts.append(Text(width, height + 13, f"median {values.median_share:.0%}", "end"))
    return Drawing(width, height + 18, "largest value of each channel", parts)


# ---- layer by layer ----


def layer_table(analysis: Analysis) -> Table:
    places = {layer.name: number for number, layer in enumerate(analysis.found.layers)}
    heads = ["logits\ndB", "same\n%", "top-1\npoints"]
    for what in ("weights", "outputs"):
        heads += [f"{what}\ndB", f"{what}\nmedian", f"{what}\nchannels", f"{what}\nclipped"]
    rows = []
    for layer in analysis.found.worst():
        cells: list[object] = [
            format_decibels(layer.alone.logit_snr),
            f"{layer.alone.same:.1f}",
            format_points(layer.alone),
        ]
        for values in (layer.weights, layer.activations):
            cells += cells_of(values)
        rows.append([Link(f"#layer-{places[layer.name]}", layer.name), *cells, format_decibels(layer.carried_snr)])
    return Table("all layers, the worst first", ["layer", *heads, "carried\ndB"], rows)


def cells_of(values: Values | None) -> list[str]:
    if values is None:
        return ["-"] * 4
    channels = ", ".join(map(str, values.find_dominant_channels())) or "-"
    return [format_decibels(values.snr), f"{values.median_share:.0%}", channels, f"{values.clipped:.2%}"]


def figures_of(layer: LayerSensitivity) -> Iterator[tuple[Drawing, str]]:
    """What int8 makes of the weights and of the outputs, each with a caption."""
    for what, values in (("weights", layer.weights), ("outputs", layer.activations)):
        if values is None:
            continue
        told = f"{what}: {values.low:.4g} to {values.high:.4g}, int8 covers ±{values.limit:.4g}"
        told += ", nothing lost" if values.snr > EXACT else f", {values.snr:.1f} dB"
        channels = values.find_dominant_channels()
        of = f"channels that set the range: {', '.join(map(str, channels))}" if channels else "no channel stands out"
        yield histogram(values), told
        yield channel_chart(values), of
