"""Makes the HTML page of a report on a run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from statistics import median
from typing import TYPE_CHECKING, Any

from mgq.bench.statistics import Speed, Speedup
from mgq.bench.tables import format_three_digits
from mgq.engine.classifier.evaluation_result import ClassResult, Evaluation
from mgq.errors import format_size, plural
from mgq.reports.drawings import Figure, HeatMap, Series, bars, curves, heat_map
from mgq.reports.engine_rows import ROUNDS, BackendComparison, Row
from mgq.reports.html import BLUE, GREEN, GREY, ORANGE, Table, render
from mgq.reports.measurements import FLOAT, INT8, SIMULATED, VERDICTS, Measurements
from mgq.system.environment import Machine

if TYPE_CHECKING:
    from mgq.engine.runs.run_folder import Metrics
    from mgq.reports.contents import Report
    from mgq.reports.run_predictions import Networks

MATRIX = 20
"""More classes have a list of confusions instead of a matrix."""
CONFUSIONS = 15
LISTED_CLASSES = 120
IMAGES_A_CLASS = 5
"""The least median of images a class for which the accuracy of single classes is shown."""
NONE = "-"
WHAT = {
    "normal": "trained in float32",
    "qat": "trained with quantization, for int8",
    "calibration": "calibrated for int8, without training",
}


def page_of(report: Report) -> str:
    """HTML 5, in itself complete."""
    found = report.found
    return render(
        "report.html",
        title=f"{report.run.path.name}: report",
        report=report,
        run=report.run,
        found=found,
        what=WHAT[report.run.kind],
        lead=lead_of(report),
        tiles=list(tiles_of(report)),
        facts=facts_of(report),
        accuracy=list_notes(report) if found is None else accuracy(report, found),
        curves=curves_of(report),
        epochs=epochs(report),
        engines=None if report.engines is None else engines(report.engines),
        problems=[] if report.engines is None else problems_of(report.engines),
        rounds=ROUNDS,
        files=files(report),
        **({} if found is None else {**changes(found), **confusions(found), **classes(found)}),
    )


# ---- what it is, and the whole of it ----


def lead_of(report: Report) -> str | None:
    """The result in a sentence."""
    found = report.found
    if found is None:
        return None
    of = f"of {found.images:,} {kind_of(found)} right"
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
            yield "same answer as float32", percent(found.same(INT8)), f"on {plural(found.images, 'picture', ',')}"
    by_name = networks.by_name
    if INT8 in by_name:
        small = networks.bytes_of(INT8)
        large = networks.bytes_of(FLOAT) if FLOAT in by_name else 0
        ratio = f"{large / small:.1f} times smaller than float32" if large else ""
        yield "weights, int8", format_size(small), ratio
    best = compared.fastest(INT8 if INT8 in by_name else FLOAT) if compared is not None else None
    if compared is not None and best is not None and best.speed is not None:
        gain = f", {ratio_text(compared.gain)} times float32" if compared.gain else ""
        yield f"pictures a second, {best.what}", format_three_digits(best.speed.fps), f"{best.engine}, 1 thread{gain}"


def ratio_text(gain: Speedup) -> str:
    return f"{gain.median:.2g}"


def facts_of(report: Report) -> Iterator[tuple[str, object]]:
    run, info, machine, found = report.run, report.run.info, report.machine, report.found
    yield "run", str(run.path)
    yield (
        "architecture",
        f"{info.arch}, {plural(len(info.classes), 'class', ',')}, {info.image_size}x{info.image_size} pixels",
    )
    if run.is_int8:
        kept = f"; weights of {', '.join(info.float_layers)} stay float32" if info.float_layers else ""
        yield "target", f"{info.target}, mode {info.mode}{kept}"
    else:
        yield "mode", info.mode
    yield "weights", info.origin
    if found is not None:
        yield from list_conditions(found)
    yield "network of", f"{run.finished:%Y-%m-%d %H:%M}"
    yield from conditions_of(report.made, machine, report.versions)


def list_conditions(found: Measurements) -> Iterator[tuple[str, str]]:
    left = f"; {found.left_out}" if found.left_out else ""
    yield "measured on", f"{found.images:,} of {found.dataset.name}{left}"
    problems = found.last.problems
    if problems:
        yield "left out", f"{plural(len(problems), 'picture')} that could not be read, the first: {problems[0]}"


def conditions_of(made: datetime, machine: Machine, versions: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    yield "measured", f"{made:%Y-%m-%d %H:%M %Z}"
    busy = f"; busy at the start (load {machine.load[0]:.1f}), so take its speeds with care" if machine.busy else ""
    yield "machine", f"{machine.cpu}, {plural(machine.usable_cores, 'core')}; {machine.system}{busy}"
    yield "versions", ", ".join(f"{name} {version}" for name, version in versions.items())


def percent(value: float) -> str:
    return f"{value:.1f} %" if math.isfinite(value) else NONE


# ---- the numbers ----


def accuracy(report: Report, found: Measurements) -> Table:
    has_top5 = len(found.last.classes) > 5
    heads = ["network", "top-1", *(["top-5"] if has_top5 else []), "drop", "as float32", "loss", "weights"]
    rows: list[list[object]] = []
    for name, evaluation in found.found.items():
        if name == SIMULATED and report.run.calibrated:
            rows.append(calibrated_row(report.run.calibrated, has_top5))
        rows.append(row_of(name, evaluation, found, report.networks, has_top5))
    return Table(f"on {found.images:,} {kind_of(found)}; ± one standard error", heads, rows)


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
        NONE if name == SIMULATED else format_size(networks.bytes_of(name)),
    ]


def calibrated_row(figures: Mapping[str, float], has_top5: bool) -> list[object]:
    top5 = [percent(figures["top5"])] if has_top5 else []
    return ["calibrated", percent(figures["top1"]), *top5, NONE, NONE, f"{figures['loss']:.3f}", NONE]


def list_notes(report: Report) -> Table | None:
    """What the run itself noted of its accuracy, where there are no pictures to measure it on."""
    measured = [entry for entry in report.run.metrics if math.isfinite(number(entry, "val_top1"))]
    if not measured:
        return None
    best = max(measured, key=lambda entry: number(entry, "val_top1"))
    kind = SIMULATED if report.run.kind == "qat" else FLOAT
    rows: list[list[object]] = [
        [f"{kind}, epoch {best['epoch']}", *(figure(best, name) for name in ("val_top1", "val_top5", "val_loss"))]
    ]
    if report.run.calibrated:
        figures = report.run.calibrated
        rows.insert(0, ["calibrated", percent(figures["top1"]), percent(figures["top5"]), f"{figures['loss']:.3f}"])
    caption = "as the run noted it while it was trained; the best epoch"
    return Table(caption, ["network", "top-1", "top-5", "loss"], rows)


def number(entry: Mapping[str, Any], name: str) -> float:
    value = entry.get(name, math.nan)
    return float(value) if isinstance(value, int | float) else math.nan


def figure(entry: Mapping[str, Any], name: str) -> str:
    value = number(entry, name)
    return NONE if not math.isfinite(value) else f"{value:.3f}" if name.endswith("loss") else percent(value)


# ---- the training ----


def curves_of(report: Report) -> list[Figure]:
    """Loss and accuracy over the epochs, as far as there are any."""
    own, before = report.run.metrics, report.float_metrics
    border = border_of(before, own)
    return [
        *curves("loss", series_of(before, own, "loss"), border),
        *curves("top-1 in percent", series_of(before, own, "top1"), border, percent=True),
    ]


def epochs(report: Report) -> Table:
    kind = report.run.kind
    heads = ["epoch", "loss", "val loss", "top-1", "val top-1", "learning rate", "pictures/s"]
    names = ("loss", "val_loss", "top1", "val_top1")
    rows = []
    for what, entries in (("float", report.float_metrics), (kind if kind != "normal" else "float", report.run.metrics)):
        for entry in entries:
            lr, rate = number(entry, "lr"), number(entry, "images_per_second")
            cells = [figure(entry, name) for name in names]
            rows.append([f"{what} {entry['epoch']}", *cells, f"{lr:.3g}", f"{rate:.1f}"])
    return Table("every epoch", heads, rows)


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


def changes(found: Measurements) -> dict[str, Any]:
    """Group the images with another answer in int8: kind of change, the images shown, and their number."""
    if found.pair is None:
        return {}
    total = sum(map(len, found.groups.values()))
    groups = [(verdict, found.changes.get(verdict, []), len(found.groups[verdict])) for verdict in VERDICTS]
    return {
        "changed": total,
        "changed_share": percent(100 * total / found.images),
        "changed_counts": ", ".join(f"{verdict} on {len(found.groups[verdict])}" for verdict in VERDICTS),
        "groups": [group for group in groups if group[1]],
    }


# ---- classes ----


def confusions(found: Measurements) -> dict[str, HeatMap | Table | None]:
    """A matrix for few classes, a list of the most frequent ones for many."""
    evaluation, what = found.last, name_in_words(found)
    if len(evaluation.classes) <= MATRIX:
        told = f"{what}: rows are the classes, columns the answers; blue is right, orange wrong, stronger is more often"
        return {"matrix": heat_map(evaluation.confusion, evaluation.classes, told)}
    beside = found.pair[0] if found.pair is not None else None
    before = {(one.true, one.predicted): one.count for one in beside.confused()} if beside is not None else {}
    rows: list[list[object]] = []
    for one in evaluation.confused(CONFUSIONS):
        counts = [f"{one.count} of {one.images}", *([before.get((one.true, one.predicted), 0)] * bool(beside))]
        rows.append([one.true, one.predicted, *counts])
    caption = f"the most frequent confusions of {plural(len(evaluation.classes), 'class', ',')}, in pictures"
    heads = ["class", "taken for", what, *(["float32"] if beside else [])]
    return {"matrix": None, "confused": Table(caption, heads, rows, names=2) if rows else None}


def classes(found: Measurements) -> dict[str, Any]:
    """A table of the accuracies, or how few pictures there are of most classes."""
    last = found.last.per_class()
    images = median(one.images for one in last) if last else 0
    if images < IMAGES_A_CLASS:
        return {"few_pictures": "1 picture" if images == 1 else f"{images:.0f} pictures"}
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
    return {
        "few_pictures": "",
        "classes": Table(f"top-1 of each class, the worst first{more}", heads, rows),
        "classes_legend": [*([Series("float32", BLUE, [])] if before else []), Series(what, ORANGE, [])],
    }


# ---- engines and files ----


def engines(compared: BackendComparison, reference: str = "MegEngine") -> Table:
    counted = compared.images > 0
    heads = [
        "engine",
        "network",
        "file",
        *(["top-1", f"as {reference}"] if counted else []),
        "pictures/s",
        "spread",
        "ms",
    ]
    rows = [[f"{row.engine} {row.version}".strip(), row.what, *cells_of(row, counted)] for row in compared.rows]
    timed = f"{plural(compared.batch, 'picture')} at a time on one thread"
    label = f"{timed}; answers to {plural(compared.images, 'picture', ',')}" if counted else timed
    return Table(label, heads, rows, names=2)


def problems_of(compared: BackendComparison) -> list[str]:
    return list(dict.fromkeys(f"{row.engine}, {row.what}: {row.problem}" for row in compared.rows if row.problem))


def cells_of(row: Row, counted: bool) -> list[str]:
    answers = [NONE if value is None else percent(value) for value in (row.top1, row.same)] if counted else []
    size = NONE if row.file_bytes is None else format_size(row.file_bytes)
    return [size, *answers, *speed_cells(row.speed, len(row.rounds))]


def speed_cells(speed: Speed | None, rounds: int) -> list[str]:
    if speed is None:
        return [NONE] * 3
    spread = format_three_digits(speed.fps_iqr) if rounds > 1 else NONE
    return [format_three_digits(speed.fps), spread, format_three_digits(speed.p50_ms)]


def files(report: Report) -> Table:
    return Table(
        str(report.run.path), ["file", "size"], [[name, format_size(size)] for name, size in report.run.files()]
    )
