"""An analysis as one HTML page that needs nothing else."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from mgq.engine.calibration.analysis import Analysis, in_decibels, in_points
from mgq.engine.classifier.open import versions
from mgq.io.atomic import write_text_atomically
from mgq.ptq.sensitivity import EXACT, LayerSensitivity, Values
from mgq.reports.html import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    Html,
    curve,
    dot,
    draw_text,
    line,
    make_scrollable,
    page,
    svg,
    table,
    text,
)

MARKED = 10
"""So many of the worst layers have the colour of warning."""
TOP_DB = 60.0
"""Above it no layer is a problem: curves end there."""
STEP = 15.0


def write_page(analysis: Analysis, path: Path) -> None:
    """Write the page to ``path``. Raises as :func:`mgq.io.atomic.atomic_write` does."""
    write_text_atomically(path, page_of(analysis))


def page_of(analysis: Analysis) -> str:
    """HTML 5, in itself complete."""
    found, arch = analysis.found, text(analysis.classifier.spec.name)
    worst = {layer.name for layer in found.worst(MARKED)}
    parts = [
        f"<h1>{arch}: what int8 costs, layer by layer</h1>",
        *facts(analysis),
        summary(analysis),
        "<h2>One layer alone in int8</h2>",
        "<p>All other layers are float. The bar is the error of the logits in percent of their size (root of the "
        f"energies); the {min(MARKED, len(found.layers))} largest are orange.</p>",
        alone_chart(found.layers, worst),
        "<h2>Signal to noise along the network</h2>",
        f"<p>In dB, more is better, cut at {TOP_DB:.0f}. Weights and outputs: what rounding does to them where their "
        "input is float. Carried: the error behind the layer when all layers are int8.</p>",
        noise_chart(found.layers),
        "<h2>All layers, the worst first</h2>",
        "<p>Median: the part of the range that the median channel uses. Where it is small the named channels set "
        "the range for all. Clipped: the share of values beyond what int8 covers.</p>",
        layer_table(analysis),
        "<h2>Ranges and channels</h2>",
        "<p>Histograms show what int8 covers, counts on a logarithmic scale; values beyond stand at the ends. Lines "
        "mark the smallest and largest value. Beside them the largest value of each channel in percent of the range, "
        "the largest first.</p>",
        *(details(number, layer) for number, layer in enumerate(found.layers)),
    ]
    return page(f"{analysis.classifier.spec.name}: analysis", parts)


# ---- what it is, and the whole of it ----


def facts(analysis: Analysis) -> list[str]:
    classifier, images = analysis.classifier, analysis.images
    known = "labelled" if images.labels is not None else "without labels"
    lines = [
        f"Target {text(classifier.target.name)}. Weights: {text(classifier.origin)}. "
        f"{analysis.found.images} pictures of {classifier.image_size} pixels, {known}: {text(images.name)}. "
        f"mgq {text(versions()['mgq'])}, MegEngine {text(versions()['megengine'])}."
    ]
    return [
        *(f'<p class="dim">{line}</p>' for line in lines),
        *(f'<p class="remark">{text(remark)}</p>' for remark in [*analysis.remarks, *images.problems]),
    ]


def summary(analysis: Analysis) -> str:
    found = analysis.found
    rows = [("logits, all layers int8", f"{in_decibels(found.whole.logit_snr, ' dB')}")]
    rows.append(("same answer as float", f"{found.whole.same:.1f} %"))
    if found.float_top1 is not None:
        rows.append(("top-1, float", f"{found.float_top1:.1f} % ±{analysis.float_error:.1f}"))
        rows.append(("change of top-1", f"{in_points(found.whole)} points"))
    note = "± is one standard error" if found.float_top1 is not None else "accuracy needs labelled pictures"
    return table(f"All layers in simulated int8. {note}.", ["what", "value"], rows)


# ---- drawings ----


def error_percent(snr: float) -> float:
    """The error's size in percent of the signal's, from dB."""
    return 100 * 10 ** (-snr / 20)


def alone_chart(layers: Sequence[LayerSensitivity], worst: set[str]) -> str:
    """A bar a layer, from the input down to the output."""
    left, width, height = 230, 560, 15
    errors = [error_percent(layer.alone.logit_snr) for layer in layers]
    largest = max([error for error in errors if math.isfinite(error)], default=0.0) or 1.0
    parts = []
    for number, (layer, error) in enumerate(zip(layers, errors, strict=True)):
        y = number * height
        length = width * min(error, largest) / largest
        colour = ORANGE if layer.name in worst else BLUE
        parts.append(draw_text(left - 8, y + 11, layer.name, "end"))
        parts.append(
            f'<rect x="{left}" y="{y + 2}" width="{max(length, 0.5):.1f}" height="{height - 4}" fill="{colour}"/>'
        )
        parts.append(
            draw_text(left + length + 6, y + 11, f"{error:.2g} %  ({in_decibels(layer.alone.logit_snr, ' dB')})")
        )
    label = "error of the logits with one layer in int8"
    return make_scrollable(svg(left + width + 130, len(layers) * height, parts, label), label)


def noise_chart(layers: Sequence[LayerSensitivity]) -> str:
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

    parts = []
    for tick in range(round((TOP_DB - bottom) / STEP) + 1):
        decibels = bottom + tick * STEP
        y = place(0, decibels)[1]
        parts += [line(left, y, left + width, y), draw_text(left - 6, y + 4, f"{decibels:.0f}", "end")]
    for turn, (kind, (colour, found)) in enumerate(kinds.items()):
        points = [(i, place(i, value)) for i, value in enumerate(found) if value is not None]
        parts.append(curve([point for _, point in points], colour))
        for i, (x, y) in points:
            parts.append(dot(x, y, colour, f"{layers[i].name}, {kind}: {in_decibels(found[i], ' dB')}"))
        x = left + 90 * turn
        parts += [f'<rect x="{x}" y="4" width="10" height="10" fill="{colour}"/>', draw_text(x + 15, 13, kind)]
    parts.append(draw_text(left, top + height + 20, "input"))
    parts.append(draw_text(left + width, top + height + 20, "output", "end"))
    label = "signal to noise in dB along the network"
    return make_scrollable(svg(left + width + 10, top + height + 28, parts, label), label)


def histogram(values: Values) -> str:
    width, height = 256.0, 70.0
    tallest = math.log1p(max(values.histogram))
    bar = width / len(values.histogram)
    steps = []
    for number, count in enumerate(values.histogram):
        y = height * (1 - math.log1p(count) / tallest) if tallest else height
        steps.append(f"V{y:.1f}H{(number + 1) * bar:.0f}")
    low, high = values.grid
    parts = [f'<path d="M0 {height:.0f}{"".join(steps)}V{height:.0f}Z" fill="{BLUE}"/>']
    for edge in (values.low, values.high):
        x = width * (min(max(edge, low), high) - low) / (high - low)
        parts.append(line(x, 0, x, height, ORANGE))
    parts += [line(0, height, width, height, GREY), draw_text(0, height + 13, f"{low:.3g}")]
    parts.append(draw_text(width, height + 13, f"{high:.3g}", "end"))
    return svg(width, height + 18, parts, "histogram")


def channel_chart(values: Values) -> str:
    """The largest value of each channel in terms of the range, the largest first."""
    width, height = 180.0, 70.0
    shares = sorted((min(share, 1.0) for share in values.shares), reverse=True)
    bar = width / len(shares)
    steps = "".join(f"V{height * (1 - share):.1f}H{(i + 1) * bar:.1f}" for i, share in enumerate(shares))
    middle = height * (1 - min(values.median_share, 1.0))
    parts = [f'<path d="M0 {height:.0f}{steps}V{height:.0f}Z" fill="{GREEN}"/>', line(0, middle, width, middle, GREY)]
    parts += [line(0, height, width, height, GREY), draw_text(0, height + 13, f"{len(shares)} channels")]
    parts.append(draw_text(width, height + 13, f"median {values.median_share:.0%}", "end"))
    return svg(width, height + 18, parts, "largest value of each channel")


# ---- layer by layer ----


def layer_table(analysis: Analysis) -> str:
    places = {layer.name: number for number, layer in enumerate(analysis.found.layers)}
    heads = ["logits<br>dB", "same<br>%", "top-1<br>points"]
    for what in ("weights", "outputs"):
        heads += [f"{what}<br>dB", f"{what}<br>median", f"{what}<br>channels", f"{what}<br>clipped"]
    rows = []
    for layer in analysis.found.worst():
        cells = [in_decibels(layer.alone.logit_snr), f"{layer.alone.same:.1f}", in_points(layer.alone)]
        for values in (layer.weights, layer.activations):
            cells += cells_of(values)
        name = Html(f'<a href="#layer-{places[layer.name]}">{text(layer.name)}</a>')
        rows.append([name, *cells, in_decibels(layer.carried_snr)])
    return table("all layers, the worst first", ["layer", *map(Html, heads), Html("carried<br>dB")], rows)


def cells_of(values: Values | None) -> list[str]:
    if values is None:
        return ["-"] * 4
    channels = ", ".join(map(str, values.dominating())) or "-"
    return [in_decibels(values.snr), f"{values.median_share:.0%}", channels, f"{values.clipped:.2%}"]


def details(number: int, layer: LayerSensitivity) -> str:
    figures = []
    for what, values in (("weights", layer.weights), ("outputs", layer.activations)):
        if values is None:
            continue
        told = f"{what}: {values.low:.4g} to {values.high:.4g}, int8 covers ±{values.limit:.4g}"
        told += ", nothing lost" if values.snr > EXACT else f", {values.snr:.1f} dB"
        channels = values.dominating()
        of = f"channels that set the range: {', '.join(map(str, channels))}" if channels else "no channel stands out"
        figures.append(f"<figure>{histogram(values)}<figcaption>{told}</figcaption></figure>")
        figures.append(f"<figure>{channel_chart(values)}<figcaption>{of}</figcaption></figure>")
    title = f'<h3>{text(layer.name)} <span class="dim">{text(layer.kind)}</span></h3>'
    return f'<section id="layer-{number}">{title}<div class="row">{"".join(figures)}</div></section>'
