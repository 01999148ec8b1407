"""``mgq eval``: measures accuracy on labelled images."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mgq.cli.network_command import NetworkCommand
from mgq.cli.option_needs import need_run
from mgq.cli.option_types import AT_LEAST_NONE, COUNT
from mgq.cli.shared_options import (
    AsJson,
    EngineName,
    Jobs,
    LabelledData,
    Limit,
    MaxBad,
    ReportFreq,
    Workers,
    mode_option,
    open_network,
    take_checkpoint,
    with_newest_run,
)
from mgq.engine.classifier.network_options import NetworkOptions, Usage
from mgq.errors import InputError, plural, printable
from mgq.export.formats import format_of

if TYPE_CHECKING:
    from rich.table import Table

    from mgq.data.datasets import Dataset
    from mgq.engine.classifier.classifier import Classifier
    from mgq.engine.classifier.evaluation_result import Confusion, Evaluation
    from mgq.events import OnProgress

BATCH = 8
CONFUSED = 5
KEPT = Usage(kept=True)


@dataclass(frozen=True, kw_only=True)
class EvalCommand(NetworkCommand):
    """Measure accuracy on labelled pictures.

    Prints top-1, top-5, loss and the most confused classes. Without -d it takes the pictures that the checkpoint was
    measured on when it was trained. Folders are matched with the network's classes by name; for ImageNet, WordNet ids
    are names, too.

    \b
    Examples:
      mgq eval -d imagenet -m normal
      mgq eval -d flowers -c runs/resnet18.qat/checkpoint.safetensors --per-class
      mgq eval -d imagenet --limit 1000 --jobs 4 --json
    """

    data: LabelledData = None
    mode: Annotated[str | None, mode_option("quantized where the weights can serve it, else normal")] = None
    engine: EngineName = None
    workers: Workers = None
    jobs: Jobs = 1
    limit: Limit = None
    batch_size: Annotated[int, typer.Option("--batch-size", click_type=COUNT, help="Batch size.")] = BATCH
    per_class: Annotated[bool, typer.Option("--per-class", help="A table of all classes.")] = False
    confused: Annotated[
        int | None,
        typer.Option(
            "--confused",
            click_type=AT_LEAST_NONE,
            metavar="K",
            help="Show the K most confused pairs of classes.",
            show_default="5 repeated ones",
        ),
    ] = None
    as_json: AsJson = False
    report_freq: ReportFreq = None
    max_bad: MaxBad = 0.01
    devices: Annotated[
        int,
        typer.Option(
            "-n",
            "--ngpus",
            click_type=AT_LEAST_NONE,
            help="Accepted for compatibility; one device is used. See --jobs.",
        ),
    ] = 1

    needs = (need_run(lambda command: [command.mode] if command.mode else ["quantized", "normal"]),)

    def execute(self) -> None:
        """Measure, then print the tables or the JSON."""
        from mgq.cli.console import note, progress

        refuse_more_than_cores(self.jobs)
        wish = self.import_wish()
        if self.devices > 1:
            note(f"-n {self.devices}: evaluation uses one device; --jobs N shares the pictures among N processes")
        with progress(self.report_freq) as on_progress:
            dataset = find_data(self.data, on_progress) if self.data is not None else None
            int8 = self.mode != "normal"
            checkpoint = take_checkpoint(self.checkpoint, key=self.key, save=self.save, wish=wish, int8=int8)
            classifier = self.open(checkpoint, on_progress)
            from mgq.data.datasets import subset
            from mgq.data.labelled_folders import is_unsplit
            from mgq.engine.classifier.labelled_sets import evaluation_data

            if dataset is None or (self.data is not None and is_unsplit(self.data)):
                dataset = evaluation_data(self.data, classifier.recipe, classifier.image_size, on_progress)
            total = len(dataset)
            dataset = dataset if self.limit is None else subset(dataset, self.limit)
            result = self.measure(classifier, dataset, on_progress)
            advice = advice_for(classifier, dataset, result)
        if advice is not None:
            note(advice)
        for problem in result.problems:
            note(problem)
        if result.problems:
            note(f"{len(result.problems):,} of {len(dataset):,} pictures could not be read and are left out")
        facts = facts_of(classifier, dataset, total, result, self.batch_size, self.workers)
        if self.as_json:
            show_json(result, facts, self.confused)
        else:
            show_evaluation(classifier, result, facts, self.per_class, self.confused)

    def open(self, checkpoint: Path | None, on_progress: OnProgress) -> Classifier:
        """Open the network that the options choose; ``checkpoint`` is the file that ``-c`` stands for, after an
        import."""
        options = with_newest_run(self.network_options(checkpoint, self.engine), self.mode)
        if self.mode:
            return open_network(options, self.mode, on_progress, KEPT)
        return open_int8_or_float(options, on_progress)

    def measure(self, classifier: Classifier, dataset: Dataset, on_progress: OnProgress) -> Evaluation:
        """Accuracy on all of ``dataset``."""
        from mgq.engine.classifier import evaluate as evaluation

        return evaluation.evaluate(
            classifier,
            dataset,
            jobs=self.jobs,
            batch_size=self.batch_size,
            workers=self.workers,
            max_bad=self.max_bad,
            prepare=preparation_for(classifier),
            on_progress=on_progress,
        )


def refuse_more_than_cores(jobs: int) -> None:
    """Raise InputError for more processes than can work at the same time, before anything is loaded."""
    from mgq.machine import usable_cores

    if jobs > usable_cores():
        raise InputError(
            f"--jobs {jobs} is more than the {plural(usable_cores(), 'core')} here: give 1 to {usable_cores()}"
        )


def preparation_for(classifier: Classifier) -> Callable[[], None]:
    """What a process that shares the work needs: MegEngine only where that runs the network."""
    from mgq.machine import hush_decoders
    from mgq.quantization.option_names import MEGENGINE
    from mgq.system.megengine_start import prepare_process

    of_others = classifier.file is not None and format_of(classifier.file[0]) != MEGENGINE
    return hush_decoders if of_others else prepare_process


def advice_for(classifier: Classifier, dataset: Dataset, result: Evaluation) -> str | None:
    """Advice for an imported network with hardly any right answer: the preprocessing that gives more. None without."""
    if not classifier.spec.is_described or classifier.file is not None:
        return None  # and MegEngine need not be here
    from mgq.engine.classifier.input_advice import advise_on_input

    return advise_on_input(classifier, dataset, result)


def find_data(folder: Path, on_progress: OnProgress) -> Dataset:
    from mgq.cli.console import note
    from mgq.data.labelled_folders import evaluation_folder

    return evaluation_folder(folder, on_progress, note)


def open_int8_or_float(options: NetworkOptions, on_progress: OnProgress) -> Classifier:
    """The int8 network; the float one, with a remark that says why, where the weights have no ranges for int8."""
    from mgq.cli.console import note

    if options.checkpoint is None and not options.pretrained and has_only_float_run(options.arch, options.save):
        note("the newest run is float: measured in mode normal; `mgq qat` or `mgq calibrate` makes int8 of it")
        return open_network(options, "normal", on_progress)
    try:
        return open_network(options, None, on_progress, KEPT)
    except InputError as error:
        if options.ranges is not None:
            raise
        try:
            classifier = open_network(options, "normal", on_progress)
        except InputError:
            raise error from None
        note(f"measured in mode normal, not quantized: {error}")
        return classifier


def has_only_float_run(arch: str | None, save: Path) -> bool:
    """Whether the architecture has a float run under ``save``, and none that int8 could be made of."""
    from mgq.engine.classifier.run_lookup import DEFAULT_ARCH, find_unused_float_run
    from mgq.quantization.option_names import Mode
    from mgq.zoo.registry import spec_of

    return find_unused_float_run(spec_of(arch or DEFAULT_ARCH), Mode.QUANTIZED, save) is not None


# ---- what is said of it ----


def facts_of(
    classifier: Classifier,
    dataset: Dataset,
    total: int,
    result: Evaluation,
    batch_size: int,
    workers: int | None,
) -> dict[str, Any]:
    """The result and its conditions as JSON knows them: None instead of NaN and infinity."""
    from mgq.engine.classifier.classifier import versions
    from mgq.machine import usable_cores
    from mgq.system.environment import this_machine

    machine = this_machine()
    return {
        "arch": classifier.spec.name,
        "mode": classifier.mode.value,
        "weights": classifier.origin,
        "data": dataset.name,
        "pictures": total,
        "image_size": classifier.image_size,
        "classes": len(classifier.classes),
        "images": result.images,
        "top1": finite(result.top1),
        "top1_standard_error": finite(result.top1_error),
        "top5": finite(result.top5),
        "loss": finite(result.loss),
        "seconds": result.seconds,
        "images_per_second": result.images_per_second,
        "jobs": result.jobs,
        "workers": usable_cores() if workers is None else workers,
        "batch_size": batch_size,
        "cpu": machine.cpu,
        "cores": machine.usable_cores,
        "busy": machine.busy,
        "versions": versions(),
        "problems": list(result.problems),
    }


def finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def show_json(result: Evaluation, facts: dict[str, Any], confused: int | None) -> None:
    """Print one JSON document: the facts, every class with images, and ``confused`` pairs of classes (None: all)."""
    classes = [
        {
            "index": entry.index,
            "class": entry.name,
            "images": entry.images,
            "correct": entry.correct,
            "predicted": entry.predicted,
        }
        for entry in result.per_class()
    ]
    pairs = [
        {"class": pair.true, "taken_for": pair.predicted, "count": pair.count, "images": pair.images}
        for pair in result.confused(confused)
    ]
    sys.stdout.write(json.dumps({**facts, "per_class": classes, "confused": pairs}, indent=1) + "\n")


def show_evaluation(
    classifier: Classifier, result: Evaluation, facts: dict[str, Any], per_class: bool, confused: int | None
) -> None:
    """Print what was measured, the figures, and the tables that are wanted. Fits 80 columns."""
    from mgq.cli.console import out, say, show_table
    from mgq.cli.infer import headline

    whole = plural(facts["pictures"], "picture", ",")
    images = whole if facts["images"] == facts["pictures"] else f"{facts['images']:,} of {whole}"
    say(headline(classifier), style="dim")
    say(f"data: {facts['data']}, {images}", style="dim")
    show_table(figures(result))
    if per_class:
        show_table(class_table(result))
    pairs = result.confused(CONFUSED if confused is None else confused)
    pairs = [pair for pair in pairs if confused is not None or pair.count > 1]
    if pairs:
        show_table(confusion_table(pairs))
    out.print(conditions(facts), style="dim", markup=False)


def figures(result: Evaluation) -> Table:
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    table.add_row("top-1", f"{result.top1:.1f} % ± {result.top1_error:.1f}")
    if len(result.classes) > 5:  # of fewer, the right one is always there
        table.add_row("top-5", f"{result.top5:.1f} %")
    table.add_row("loss", f"{result.loss:.4f}")
    table.add_row("speed", f"{result.images_per_second:.1f} pictures/s ({result.seconds:.1f} s)")
    return table


def class_table(result: Evaluation) -> Table:
    """How often each class was recognised, and how often its name was right when it was given."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("class", overflow="fold")
    for name in ("pictures", "correct", "top-1", "precision"):
        table.add_column(name, justify="right", no_wrap=True)
    for entry in result.per_class():
        percents = [f"{share:.1f} %" if math.isfinite(share) else "-" for share in (entry.top1, entry.precision)]
        table.add_row(Text(printable(entry.name)), f"{entry.images:,}", f"{entry.correct:,}", *percents)
    return table


def confusion_table(pairs: list[Confusion]) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("class", overflow="fold")
    table.add_column("taken for", overflow="fold")
    table.add_column("times", justify="right", no_wrap=True)
    for pair in pairs:
        table.add_row(Text(printable(pair.true)), Text(printable(pair.predicted)), f"{pair.count:,} of {pair.images:,}")
    return table


def conditions(facts: dict[str, Any]) -> str:
    processes = plural(facts["jobs"], "process")
    threads = f"{plural(facts['workers'], 'thread')} decode{'s' * (facts['workers'] == 1)}"
    busy = "; the machine was busy" if facts["busy"] else ""
    version = facts["versions"].get("megengine")
    megengine = f"; MegEngine {version}" if version else ""
    return (
        f"± one standard error. {facts['cpu']}, {plural(facts['cores'], 'core')}; {processes}, {threads}, batches of "
        f"{facts['batch_size']}, {facts['image_size']} pixels{megengine}{busy}"
    )
