"""A report as one HTML page that needs nothing else."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

from mgq.bench.statistics import Speed, Speedup
from mgq.bench.tables import three_digits
from mgq.engine.classifier.evaluate import ClassResult, Evaluation
from mgq.engine.runs.run_folder import Metrics
from mgq.reports.backend_comparison import ROUNDS, BackendComparison, Row
from mgq.reports.drawings import Series, bars, curves, embed_image, heat_map, legend
from mgq.reports.html import BLUE, GREEN, GREY, ORANGE, page, table, text
from mgq.reports.run_predictions import FLOAT, INT8, SIMULATED, VERDICTS, Change, Measurements, Networks

if TYPE_CHECKING:
    from mgq.reports.report import Report

MATRIX = 20
"""More classes have a list of confusions instead of a matrix."""
CONFUSIONS = 15
LISTED_CLASSES = 120
IMAGES_A_CLASS = 5
"""With fewer than so many pictures a class (the median) its accuracy says little, and is left out."""
NONE = "-"
WHAT = {
    "normal": "trained in float32",
    "qat": "trained with quantization, for int8",
    "calibration": "calibrated for int8, without training",
}

STYLE = """
dl { margin: .6rem 0; } dd { margin: 0; } .facts { display: grid; grid-template-columns: max-content 1fr;
  gap: .1rem 1rem; } .facts dt { color: var(--dim); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .6rem; margin: 1.2rem 0; }
.tiles > div { background: var(--soft); border-radius: 8px; padding: .6rem .8rem; }
.tiles dt { font-size: 13px; color: var(--dim); } .tiles .large { font-size: 1.5rem; font-weight: 600;
  font-variant-numeric: tabular-nums; line-height: 1.3; } .tiles .small { font-size: 13px; }
.missing { border-left: 4px solid var(--orange); background: var(--soft); padding: .5rem .9rem; margin: 1rem 0;
  border-radius: 0 6px 6px 0; } .missing ul { margin: .2rem 0; padding-left: 1.2rem; }
.curves { flex: 1 1 20rem; max-width: 32rem; } .curves > svg { width: 100%; }
.curves figcaption { font-weight: 600; color: var(--ink); }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: .1rem 1rem; margin: .2rem 0; padding: 0;
  font-size: 13px; } .legend li { display: flex; align-items: center; gap: .4rem; }
.gallery { list-style: none; margin: .4rem 0; padding: 0; display: grid; gap: 1rem .8rem;
  grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); }
.gallery img { display: block; width: 100%; max-width: 160px; height: auto; border-radius: 4px; }
.gallery figcaption { line-height: 1.35; margin-top: .3rem; } .gallery b { color: var(--ink); font-weight: 600; }
.heat { font-size: 13px; } .heat td { text-align: center; min-width: 2.4rem; border: 1px solid var(--rule); }
.heat thead th { height: 7rem; padding: .3rem .2rem; text-align: left; }
.heat thead th span { display: inline-block; writing-mode: vertical-rl; transform: rotate(180deg);
  max-height: 9rem; overflow-wrap: anywhere; }
td svg { width: 7rem; min-width: 4rem; } .right { color: var(--ink); }
footer { margin-top: 3rem; font-size: 13px; color: var(--dim); border-top: 1px solid var(--rule); padding-top: .6rem; }
@media (max-width: 30rem) { .facts { grid-template-columns: 1fr; } .facts dd { margin-bottom: .4rem; }
  th, td { padding: .2rem .4rem; } .gallery { grid-template-columns: repeat(2, 1fr); } }
@media print { .tiles > div, .missing { border: 1px solid var(--rule); } * { print-color-adjust: exact; } }
"""


def page_of(report: Report) -> str:
    """HTML 5, in itself complete."""
    return page(f"{report.run.path.name}: report", parts_of(report), STYLE)


def parts_of(report: Report) -> Iterator[str]:
    yield from head(report)
    yield from numbers(report)
    yield from training(report)
    if report.found is not None:
        yield from changes(report.found)
        yield from confusions(report.found)
        yield from classes(report.found)
    if report.engines is not None:
        yield from engines(report, report.engines)
    yield from files(report)
    yield from repetition(report)


# ---- what it is, and the whole of it ----


def head(report: Report) -> Iterator[str]:
    run, info = report.run, report.run.info
    yield f"<header><h1>{text(info.arch)}: {WHAT[run.kind]}</h1>"
    if (lead := lead_of(report)) is not None:
        yield f"<p>{lead}</p>"
    yield "</header>"
    tiles = list(tiles_of(report))
    if tiles:
        cells = (
            f'<div><dt>{text(name)}</dt><dd class="large">{text(large)}</dd><dd class="small">{text(small)}</dd></div>'
            for name, large, small in tiles
        )
        yield f'<dl class="tiles">{"".join(cells)}</dl>'
    if report.missing:
        lines = "".join(f"<li>{text(line)}</li>" for line in report.missing)
        yield f'<div class="missing"><strong>Not on this page</strong><ul>{lines}</ul></div>'
    facts = "".join(f"<dt>{text(name)}</dt><dd>{text(value)}</dd>" for name, value in facts_of(report))
    yield f'<dl class="facts">{facts}</dl>'


def lead_of(report: Report) -> str | None:
    """The result in a sentence."""
    found = report.found
    if found is None:
        return None
    of = f"of {found.images:,} {text(kind_of(found))} right"
    if found.pair is None:
        return f"{name_in_words(found)} answers {percent(found.last.top1)} {of}."
    drop, error = found.drop(INT8)
    change = f"{abs(drop):.1f} ± {error:.1f} points {'less' if drop >= 0 else 'more'} than float32"
    if abs(drop) <= 2 * error:
        change += ", which is within what chance would do"
    same = percent(found.same(INT8))
    return f"int8 answers {percent(found.last.top1)} {of}: {change}. It gives float32's answer to {same}."


def name_in_words(found: Measurements) -> str:
    return INT8 if INT8 in found.found else FLOAT


def kind_of(found: Measurements) -> str:
    return "synthetic pictures (drawings, which say nothing about photos)" if found.synthetic else "pictures"


def tiles_of(report: Report) -> Iterator[tuple[str, str, str]]:
    found, networks, compared = report.found, report.networks, report.engines
    if found is not None:
        yield f"top-1, {name_in_words(found)}", percent(found.last.top1), f"± {found.last.top1_error:.1f} points"
        if found.pair is not None:
            drop, error = found.drop(INT8)
            yield (
                f"{'less' if drop >= 0 else 'more'} than float32",
                f"{abs(drop):.1f}",
                f"± {error:.1f} points of top-1",
            )
            yield "same answer as float32", percent(found.same(INT8)), f"on {found.images:,} pictures"
    by_name = networks.by_name
    if INT8 in by_name:
        small = networks.bytes_of(INT8)
        large = networks.bytes_of(FLOAT) if FLOAT in by_name else 0
        ratio = f"{large / small:.1f} times smaller than float32" if large else ""
        yield "weights, int8", megabytes(small), ratio
    best = compared.fastest(INT8 if INT8 in by_name else FLOAT) if compared is not None else None
    if compared is not None and best is not None and best.speed is not None:
        gain = f", {ratio_text(compared.gain)} times float32" if compared.gain else ""
        yield f"pictures a second, {best.what}", three_digits(best.speed.fps), f"{best.engine}, 1 thread{gain}"


def ratio_text(gain: Speedup) -> str:
    return f"{gain.median:.2g}"


def facts_of(report: Report) -> Iterator[tuple[str, object]]:
    run, info, machine, found = report.run, report.run.info, report.machine, report.found
    yield "run", str(run.path)
    yield "architecture", f"{info.arch}, {len(info.classes):,} classes, {info.image_size}x{info.image_size} pixels"
    if run.is_int8:
        kept = f"; weights of {', '.join(info.float_layers)} stay float32" if info.float_layers else ""
        yield "target", f"{info.target}, mode {info.mode}{kept}"
    else:
        yield "mode", info.mode
    yield "weights", info.origin
    if found is not None:
        left = f"; {found.left_out}" if found.left_out else ""
        yield "measured on", f"{found.images:,} of {found.dataset.name}{left}"
        problems = found.last.problems
        if problems:
            yield "left out", f"{len(problems)} pictures that could not be read, the first: {problems[0]}"
    yield "network of", f"{run.finished:%Y-%m-%d %H:%M}"
    yield "measured", f"{report.made:%Y-%m-%d %H:%M %Z}"
    busy = f"; busy at the start (load {machine.load[0]:.1f}), so take its speeds with care" if machine.busy else ""
    yield "machine", f"{machine.cpu}, {machine.usable_cores} cores; {machine.system}{busy}"
    yield "versions", ", ".join(f"{name} {version}" for name, version in report.versions.items())


def percent(value: float) -> str:
    return f"{value:.1f} %" if math.isfinite(value) else NONE


def megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"


# ---- the numbers ----


def numbers(report: Report) -> Iterator[str]:
    found = report.found
    yield "<h2>Accuracy</h2>"
    if found is None:
        yield from list_notes(report)
        return
    has_top5 = len(found.last.classes) > 5
    heads = ["network", "top-1", *(["top-5"] if has_top5 else []), "drop", "as float32", "loss", "weights"]
    rows: list[list[object]] = []
    for name, evaluation in found.found.items():
        if name == SIMULATED and report.run.calibrated:
            rows.append(calibrated_row(report.run.calibrated, has_top5))
        rows.append(row_of(name, evaluation, found, report.networks, has_top5))
    images = f"{found.images:,} {kind_of(found)}"
    yield table(f"on {images}; ± one standard error", heads, rows)
    told = (
        "Drop: points of top-1 less than float32, its error from the pictures on which just one of both is right. "
        "As float32: how often the answer is float32's. Loss: mean cross entropy in nats. Weights: in memory."
    )
    if report.run.calibrated:
        told += " Calibrated: before training, as the run itself measured it on its own pictures."
    yield f'<p class="dim">{told}</p>'


def row_of(name: str, evaluation: Evaluation, found: Measurements, networks: Networks, has_top5: bool) -> list[object]:
    beside = name != FLOAT and FLOAT in found.found
    drop, error = found.drop(name) if beside else (math.nan, math.nan)
    return [
        name,
        f"{evaluation.top1:.1f} % ± {evaluation.top1_error:.1f}",
        *([percent(evaluation.top5)] if has_top5 else []),
        f"{drop:+.1f} ± {error:.1f}" if beside else NONE,
        percent(found.same(name)) if beside else NONE,
        f"{evaluation.loss:.3f}",
        NONE if name == SIMULATED else megabytes(networks.bytes_of(name)),
    ]


def calibrated_row(figures: Mapping[str, float], has_top5: bool) -> list[object]:
    top5 = [percent(figures["top5"])] if has_top5 else []
    return ["calibrated", percent(figures["top1"]), *top5, NONE, NONE, f"{figures['loss']:.3f}", NONE]


def list_notes(report: Report) -> Iterator[str]:
    """What the run itself noted of its accuracy, where there are no pictures to measure it on."""
    measured = [entry for entry in report.run.metrics if math.isfinite(number(entry, "val_top1"))]
    if not measured:
        yield "<p>It was not measured: there were no labelled pictures at hand, and the run noted none.</p>"
        return
    best = max(measured, key=lambda entry: number(entry, "val_top1"))
    kind = SIMULATED if report.run.kind == "qat" else FLOAT
    rows: list[list[object]] = [
        [f"{kind}, epoch {best['epoch']}", *(figure(best, name) for name in ("val_top1", "val_top5", "val_loss"))]
    ]
    if report.run.calibrated:
        figures = report.run.calibrated
        rows.insert(0, ["calibrated", percent(figures["top1"]), percent(figures["top5"]), f"{figures['loss']:.3f}"])
    yield table("as the run noted it while it was trained; the best epoch", ["network", "top-1", "top-5", "loss"], rows)


def number(entry: Mapping[str, Any], name: str) -> float:
    value = entry.get(name, math.nan)
    return float(value) if isinstance(value, int | float) else math.nan


def figure(entry: Mapping[str, Any], name: str) -> str:
    value = number(entry, name)
    return NONE if not math.isfinite(value) else f"{value:.3f}" if name.endswith("loss") else percent(value)


# ---- the training ----


def training(report: Report) -> Iterator[str]:
    own, before = report.run.metrics, report.float_metrics
    if not own and not before:
        return
    kind = report.run.kind
    yield "<h2>Training</h2>"
    if before:
        what = "QAT goes on from it" if kind == "qat" else "the calibration began with it"
        yield f"<p>The float training comes first; {what}.</p>"
    drawn = [
        curves("loss", series_of(before, own, "loss"), border_of(before, own)),
        curves("top-1 in percent", series_of(before, own, "top1"), border_of(before, own), percent=True),
    ]
    yield f'<div class="row">{"".join(drawn)}</div>'
    heads = ["epoch", "loss", "val loss", "top-1", "val top-1", "learning rate", "pictures/s"]
    names = ("loss", "val_loss", "top1", "val_top1")
    rows = []
    for what, entries in (("float", before), (kind if kind != "normal" else "float", own)):
        for entry in entries:
            lr, rate = number(entry, "lr"), number(entry, "images_per_second")
            cells = [figure(entry, name) for name in names]
            rows.append([f"{what} {entry['epoch']}", *cells, f"{lr:.3g}", f"{rate:.1f}"])
    yield f"<details><summary>All epochs as a table</summary>{table('every epoch', heads, rows)}</details>"


def series_of(before: Sequence[Metrics], own: Sequence[Metrics], key: str) -> list[Series]:
    """Training and validation, of float and of what went on from it."""
    shift = last_epoch(before) if before else 0
    second = "QAT" if before and own else ""
    found = []
    for entries, offset, name, colours in ((before, 0, "float", (GREY, BLUE)), (own, shift, second, (GREEN, ORANGE))):
        for prefix, what, colour, dashes in (("", "train", colours[0], "5 3"), ("val_", "val", colours[1], "")):
            points = [(offset + entry["epoch"], number(entry, f"{prefix}{key}")) for entry in entries]
            found.append(Series(f"{name} {what}".strip(), colour, points, dashes))
    return found


def border_of(before: Sequence[Metrics], own: Sequence[Metrics]) -> float | None:
    return float(last_epoch(before)) if before and own else None


def last_epoch(metrics: Sequence[Metrics]) -> int:
    return max(int(entry["epoch"]) for entry in metrics)


# ---- pictures ----


def changes(found: Measurements) -> Iterator[str]:
    if found.pair is None:
        return
    total = sum(map(len, found.groups.values()))
    yield "<h2>Answers that int8 changed</h2>"
    if not total:
        yield f"<p>None: int8 answers all {found.images:,} pictures as float32 does.</p>"
        return
    counts = ", ".join(f"{verdict} on {len(found.groups[verdict])}" for verdict in VERDICTS)
    yield (
        f"<p>{total:,} of {found.images:,} pictures ({percent(100 * total / found.images)}): {counts}. Percentages are "
        "the probabilities that each network gave its own answer; the pictures are what the networks saw.</p>"
    )
    for verdict in VERDICTS:
        shown, all_of_them = found.changes.get(verdict, []), found.groups[verdict]
        if shown:
            more = "" if len(shown) == len(all_of_them) else f", {len(shown)} of {len(all_of_them)} shown"
            yield f"<h3>{verdict[0].upper()}{verdict[1:]}{more}</h3>"
            yield f'<ul class="gallery">{"".join(map(card, shown))}</ul>'


def card(change: Change) -> str:
    image = embed_image(change.thumbnail, change.side, f"{change.name}, of class {change.truth}")
    answers = "<br>".join(
        f"{name}: {text(guess.name)} {guess.probability:.0%}{mark(guess.name == change.truth)}"
        for name, guess in (("float32", change.before), ("int8", change.after))
    )
    return f"<li><figure>{image}<figcaption><b>{text(change.truth)}</b><br>{answers}</figcaption></figure></li>"


def mark(right: bool) -> str:
    return " ✓" if right else ""


# ---- classes ----


def confusions(found: Measurements) -> Iterator[str]:
    evaluation, what = found.last, name_in_words(found)
    yield "<h2>What is taken for what</h2>"
    if len(evaluation.classes) <= MATRIX:
        yield heat_map(
            evaluation.confusion,
            evaluation.classes,
            f"{what}: rows are the classes, columns the answers; blue is right, orange wrong, stronger is more often",
        )
        return
    beside = found.pair[0] if found.pair is not None else None
    before = {(one.true, one.predicted): one.count for one in beside.confused()} if beside is not None else {}
    rows: list[list[object]] = []
    for one in evaluation.confused(CONFUSIONS):
        counts = [f"{one.count} of {one.images}", *([before.get((one.true, one.predicted), 0)] * bool(beside))]
        rows.append([one.true, one.predicted, *counts])
    if not rows:
        yield "<p>Nothing: all answers are right.</p>"
        return
    heads = ["class", "taken for", what, *(["float32"] if beside else [])]
    yield table(
        f"the most frequent confusions of {len(evaluation.classes):,} classes, in pictures", heads, rows, names=2
    )


def classes(found: Measurements) -> Iterator[str]:
    last = found.last.per_class()
    yield "<h2>Accuracy of each class</h2>"
    images = median(one.images for one in last) if last else 0
    if images < IMAGES_A_CLASS:
        few = "1 picture" if images == 1 else f"{images:.0f} pictures"
        yield f"<p>Left out: most classes have {few} or fewer, which says little of a class.</p>"
        return
    before: dict[int, ClassResult] = {}
    if found.pair is not None:
        before = {one.index: one for one in found.pair[0].per_class()}
    ordered = sorted(last, key=lambda one: one.top1)
    what = name_in_words(found)
    heads = ["class", "pictures", *(["float32"] if before else []), what, *(["change"] if before else []), "0 to 100 %"]
    rows: list[list[object]] = []
    for one in ordered[:LISTED_CLASSES]:
        beside = before.get(one.index)
        shares = [(beside.top1, BLUE)] if beside else []
        told = f"float32 {beside.top1:.0f} %, " if beside else ""
        rows.append(
            [
                one.name,
                one.images,
                *([percent(beside.top1)] if beside else []),
                percent(one.top1),
                *([f"{one.top1 - beside.top1:+.1f}"] if beside else []),
                bars([*shares, (one.top1, ORANGE)], f"{told}{what} {one.top1:.0f} %"),
            ]
        )
    more = f"; the {LISTED_CLASSES} worst of {len(ordered)}" if len(ordered) > LISTED_CLASSES else ""
    yield table(f"top-1 of each class, the worst first{more}", heads, rows)
    yield legend([*([Series("float32", BLUE, [])] if before else []), Series(what, ORANGE, [])])


# ---- engines and files ----


def engines(report: Report, compared: BackendComparison) -> Iterator[str]:
    counted = compared.images > 0
    heads = ["engine", "network", "file", *(["top-1", "as MegEngine"] if counted else []), "pictures/s", "spread", "ms"]
    yield "<h2>Engines</h2>"
    rows = [[f"{row.engine} {row.version}".strip(), row.what, *cells_of(row, counted)] for row in compared.rows]
    label = f"one picture at a time on one thread; answers to {compared.images:,} pictures" if counted else "speed"
    yield table(label, heads, rows, names=2)
    problems = dict.fromkeys(f"{row.engine}, {row.what}: {row.problem}" for row in compared.rows if row.problem)
    if problems:
        yield f'<ul class="remark">{"".join(f"<li>{text(problem)}</li>" for problem in problems)}</ul>'
    yield (
        f'<p class="dim">Times: {ROUNDS} rounds in shuffled turns, each engine in a process of its own that sleeps '
        "between its turns; the bundled photograph of a cat, reading and decoding not included. Pictures/s: median of "
        "the rounds; spread: their interquartile range; ms: median of single runs. "
        + (
            f"Top-1: ± {compared.error:.1f} points. As MegEngine: how often the answer is that of MegEngine"
            f"{describe_simulation(report)}. "
            if counted
            else ""
        )
        + "File: what the engine reads. A few answers change between engines because they round sums differently.</p>"
    )


def describe_simulation(report: Report) -> str:
    """MegEngine cannot run what was quantized for others; then the engine that measured int8 is meant."""
    return "" if report.run.info.target == "megengine" else ", or for int8 of the engine that measured it above"


def cells_of(row: Row, counted: bool) -> list[str]:
    answers = [NONE if value is None else percent(value) for value in (row.top1, row.same)] if counted else []
    size = NONE if row.file_bytes is None else megabytes(row.file_bytes)
    return [size, *answers, *speed_cells(row.speed, len(row.rounds))]


def speed_cells(speed: Speed | None, rounds: int) -> list[str]:
    if speed is None:
        return [NONE] * 3
    spread = three_digits(speed.fps_iqr) if rounds > 1 else NONE
    return [three_digits(speed.fps), spread, three_digits(speed.p50_ms)]


def files(report: Report) -> Iterator[str]:
    yield "<h2>Files of the run</h2>"
    yield table(str(report.run.path), ["file", "size"], [[name, size_of(size)] for name, size in report.run.files()])


def size_of(size: int) -> str:
    return megabytes(size) if size >= 100_000 else f"{size / 1e3:.1f} kB"


def repetition(report: Report) -> Iterator[str]:
    yield "<h2>Once more</h2>"
    yield f"<p>The run:</p><pre><code>{text(report.run.command)}</code></pre>"
    yield f"<p>This page:</p><pre><code>{text(report.command)}</code></pre>"
    if report.run.recipe:
        what = "provenance of the ranges" if report.run.kind == "calibration" else "whole recipe"
        lines = "\n".join(text(line) for line in report.run.recipe.splitlines())
        yield f"<details><summary>The {what}</summary><pre><code>{lines}</code></pre></details>"
    yield f"<footer>Written by mgq {text(report.versions.get('mgq', ''))}; all of it is in this file.</footer>"
