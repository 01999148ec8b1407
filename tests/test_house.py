"""The walls of the house: which room may import which, what modules may be called, and where tests lie."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TypeGuard

import pytest
import tomli
from packaging.requirements import Requirement

import mgq

ROOT = Path(mgq.__file__).parent
TESTS = Path(__file__).parent
ROOMS = (
    "deprecation",
    "errors",
    "events",
    "machine",
    "system",
    "io",
    "weights",
    "data",
    "zoo",
    "quantization",
    "graph",
    "cpu_kernels",
    "ptq",
    "export",
    "runtime",
    "engine",
    "bench",
    "reports",
    "service",
    "api",
    "cli",
)
"""From the foot to the roof: a room imports only rooms that stand before it."""
KNOWS_NOTHING_OF = {
    "io": {"machine", "system"},
    "weights": {"system"},
    "data": {"system", "weights"},
    "zoo": {"system", "data"},
    # Ranges are a text file that travels with weights: of the rooms of files only the reader of small ones is known.
    "quantization": {"system", "weights", "data"},
    "graph": {"system", "io", "weights", "data"},
    "cpu_kernels": {"system", "io", "weights", "data", "graph"},
    "ptq": {"io", "weights", "data"},
    "export": {"system", "data", "zoo", "cpu_kernels", "ptq"},
    "runtime": {"system", "weights", "data", "zoo", "cpu_kernels", "ptq"},
    # It runs where networks are deployed: classifiers are all that it knows.
    "service": {
        *("deprecation", "system", "io", "weights", "zoo", "quantization", "graph", "cpu_kernels", "ptq"),
        *("export", "runtime", "bench", "reports"),
    },
}
"""Rooms that stand before and are still no business of a room's."""
ENGINE = (("distributed",), ("classifier",), ("runs",), ("calibration", "training"))
"""The rooms inside the engine, from the foot to the roof. The last two use each other: a training may begin with a
calibration, and a calibration may use the images of a training."""
SAY_NOTHING = {
    "base",
    "calls",
    "common",
    "core",
    "files",
    "funcs",
    "functions",
    "helpers",
    "misc",
    "names",
    "objects",
    "parts",
    "shared",
    "stuff",
    "things",
    "tools",
    "types",
    "util",
    "utils",
    "values",
}
"""Names of files that tell nobody what is inside."""


def modules() -> dict[str, Path]:
    """Dotted name -> file, for all of mgq."""
    found = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def nodes_for_types_alone(tree: ast.Module) -> set[ast.AST]:
    """All below ``if TYPE_CHECKING:``, which never runs."""
    blocks = [n for n in ast.walk(tree) if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    return {node for block in blocks for statement in block.body for node in ast.walk(statement)}


def names_imported(path: Path, types_too: bool = True, package: str = "mgq") -> Iterator[str]:
    """What of ``package`` the module at ``path`` imports, anywhere in it: ``mgq.room.module.name``."""
    tree = tree_of(path)
    left_out = set() if types_too else nodes_for_types_alone(tree)
    for node in ast.walk(tree):
        if node in left_out:
            continue
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == package:
            yield from (f"{node.module}.{name.name}" for name in node.names)
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names if name.name.split(".")[0] == package)


def imported_rooms(path: Path) -> set[str]:
    """The rooms of mgq that the module at ``path`` imports, anywhere in it."""
    return {parts[1] for parts in (name.split(".") for name in names_imported(path)) if len(parts) > 1}


def files_of(room: str) -> list[Path]:
    return [ROOT / f"{room}.py"] if (ROOT / f"{room}.py").exists() else sorted((ROOT / room).rglob("*.py"))


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_rooms_before_it(room: str) -> None:
    may = set(ROOMS[: ROOMS.index(room)]) - KNOWS_NOTHING_OF.get(room, set()) | {room}
    for path in files_of(room):
        wrong = imported_rooms(path) - may
        assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"


def test_rooms_of_the_engine_import_only_those_below() -> None:
    folders = {path.name for path in (ROOT / "engine").iterdir() if path.is_dir() and any(path.rglob("*.py"))}
    assert folders == {name for level in ENGINE for name in level}
    may: set[str] = set()
    for level in ENGINE:
        may |= set(level)
        for path in (path for name in level for path in (ROOT / "engine" / name).rglob("*.py")):
            parts = [name.split(".") for name in names_imported(path) if name.startswith("mgq.engine.")]
            wrong = {found[2] for found in parts} - may
            assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"


def test_every_room_is_known() -> None:
    folders = {path.name for path in ROOT.iterdir() if path.is_dir() and any(path.rglob("*.py"))}
    files = {path.stem for path in ROOT.glob("*.py")} - {"__init__", "__main__"}
    assert folders | files == set(ROOMS)


def test_every_folder_with_modules_is_a_package() -> None:
    for path in ROOT.rglob("*.py"):
        assert (path.parent / "__init__.py").exists(), path


def test_no_module_imports_itself_by_way_of_others() -> None:
    known = modules()
    # The package's face names for types what it imports when it is asked for, and rooms ask it for the version.
    imports = {
        name: {module_of(i, known) for i in names_imported(path, types_too=name != "mgq")}
        for name, path in known.items()
    }
    left = {name: wanted - {name} for name, wanted in imports.items()}
    # Take away what imports nothing that is left, and what nothing that is left imports: circles stay.
    while left and (
        free := {n for n, wanted in left.items() if not wanted & left.keys()} or left.keys() - wanted_in(left)
    ):
        left = {name: wanted for name, wanted in left.items() if name not in free}
    assert not left, f"circles of imports among {sorted(left)}"


def wanted_in(imports: dict[str, set[str]]) -> set[str]:
    return set().union(*imports.values())


def module_of(name: str, known: dict[str, Path]) -> str:
    """The module that ``import name`` or ``from ... import`` it takes."""
    return name if name in known else name.rpartition(".")[0]


def test_every_import_finds_its_module() -> None:
    known = modules()
    for path in known.values():
        for name in names_imported(path):
            assert module_of(name, known) in known, f"{path.relative_to(ROOT)} imports {name}"


def test_no_file_has_a_name_that_says_nothing() -> None:
    for path in ROOT.rglob("*.py"):
        assert path.stem not in SAY_NOTHING, path


def test_only_the_command_line_prints() -> None:
    for path in ROOT.rglob("*.py"):
        if path.parent.name == "cli":
            continue
        assert "print" not in called_names(path), path


def test_temporary_folders_are_made_in_one_place() -> None:
    """Any other way leaves them where the process is killed."""
    own = ROOT / "io" / "temporary_folders.py"
    assert [path for path in ROOT.rglob("*.py") if list(names_imported(path, package="tempfile"))] == [own]


ENVIRONMENT = re.compile(r"\bos\.environ|\bgetenv\b")
OF_THE_ENVIRONMENT = (
    *("machine.py", "cli", "system", "bench", "engine/distributed"),
    *("io/private_cache.py", "export/native/cache.py", "cpu_kernels/onednn.py"),
)
"""What may read variables of the environment: what an algorithm gives depends on its arguments alone."""


def test_variables_of_the_environment_are_read_in_named_places() -> None:
    for path in ROOT.rglob("*.py"):
        if not any(path.is_relative_to(ROOT / place) for place in OF_THE_ENVIRONMENT):
            assert not ENVIRONMENT.search(path.read_text()), path


COUNTED = (
    *("batch", "class", "core", "device", "epoch", "file", "image", "input"),
    *("layer", "name", "network", "output", "picture", "process", "thread"),
)
"""What messages count."""


def test_a_message_says_one_class_and_two_classes() -> None:
    """A number that may be 1 stands with its noun in :func:`mgq.errors.plural`; ``1 of 3 pictures`` need not."""
    nouns = "|".join(f"{noun}e?s" for noun in COUNTED)
    for path in ROOT.rglob("*.py"):
        for text in (node for node in ast.walk(tree_of(path)) if isinstance(node, ast.JoinedStr)):
            whole = "".join(
                str(part.value) if isinstance(part, ast.Constant) else "{}" if is_whole_number(part) else "{..}"
                for part in text.values
            )
            said = re.search(rf"(?<!\bof )(?<!\+ )\{{\}} ({nouns})\b", whole)
            assert said is None, f"{path.relative_to(ROOT)}, line {text.lineno}: '{whole}' of one {said[1]}"


def is_whole_number(part: ast.expr) -> bool:
    """Whether what an f-string has here may be a count: not a rate, a length or a text that is looked up."""
    return (
        isinstance(part, ast.FormattedValue)
        and (part.format_spec is None or ast.unparse(part.format_spec) == "f','")
        and not ast.unparse(part.value).endswith((".suffix", "names"))  # texts
    )


def called_names(path: Path) -> set[str]:
    calls = [node.func for node in ast.walk(tree_of(path)) if isinstance(node, ast.Call)]
    return {function.id for function in calls if isinstance(function, ast.Name)}


MOST_LINES = 50
"""Of a function, with its signature and its docstring: what is longer has parts with names."""


def test_no_function_is_longer_than_a_screen() -> None:
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = node.end_lineno - node.lineno + 1 if node.end_lineno is not None else 0
                assert lines <= MOST_LINES, f"{path.relative_to(ROOT)}: {node.name} has {lines} lines"


# ---- names ----

NO_VERBS = {
    *("again", "another", "around", "at", "behind", "beside", "between", "beyond", "each", "elsewhere", "here"),
    *("in", "instead", "nowhere", "on", "or", "over", "some", "there", "through", "too", "under", "up", "while"),
    *("within", "without"),
}
"""Words that say neither what a function does nor what it gives."""
IRREGULAR_PARTICIPLES = {
    *("begun", "brought", "built", "chosen", "done", "drawn", "fed", "found", "frozen", "given", "gone", "hidden"),
    *("kept", "known", "left", "lost", "made", "meant", "said", "seen", "sent", "shown", "shrunk", "taken", "thought"),
    *("told", "torn", "understood", "worn", "written", "rewritten"),
}
NO_PARTICIPLES = {
    *("ceiling", "clipping", "embed", "encoding", "feed", "filling", "listing", "need", "padding", "preprocessing"),
    *("ring", "rounding", "seed", "speed", "string", "timing"),
}
"""Verbs and nouns that end like participles."""
PUBLIC_NAMES = {"confused"}
"""Of results that Python programs get: they stay."""


def is_participle(word: str) -> bool:
    return word not in NO_PARTICIPLES and (word.endswith(("ed", "ing")) or word in IRREGULAR_PARTICIPLES)


def says_nothing(name: str) -> bool:
    """Whether a function's ``name`` is a participle or a particle, alone or before a particle: ``kept``, ``asked_for``.

    A verb (``read_image``), a noun for what is computed (``cosine``, ``learned_scale``), a test (``is_empty``) and a
    conversion (``to_batch``, ``with_ranges``, ``in_batches``) are names.
    """
    words = name.strip("_").split("_")
    particles = NO_VERBS | {"as", "before", "by", "for", "from", "of", "to", "with"}
    vague = words[0] in NO_VERBS or is_participle(words[0])
    return vague and (len(words) == 1 or (is_participle(words[0]) and words[1] in particles))


def plain_functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """The functions and methods at ``path`` but properties, which are values, and context managers."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            marks = {ast.unparse(mark).split("(")[0].split(".")[-1] for mark in node.decorator_list}
            gives = ast.unparse(node.returns) if node.returns is not None else ""
            if not marks & {"property", "cached_property", "contextmanager"} and "AbstractContextManager" not in gives:
                yield node


def test_functions_are_named_for_what_they_do_or_give() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{function.lineno} {function.name}"
        for path in sorted(ROOT.rglob("*.py"))
        for function in plain_functions(path)
        if says_nothing(function.name) and function.name not in PUBLIC_NAMES
    ]
    assert not found, "\n".join(["name these functions by a verb:", *found])


NOUNS = {"drawing", "finding"}
"""Of classes: a function of such a name would be a participle."""


def test_classes_are_nouns() -> None:
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.ClassDef):
                name = node.name.strip("_").lower()
                assert name in NOUNS or not is_participle(name), f"{path.relative_to(ROOT)}: {node.name}"


@pytest.mark.parametrize(
    "name", ["kept", "_begun", "asked_for", "made_with", "finding", "there", "_around", "measured_on"]
)
def test_a_participle_or_particle_is_no_name(name: str) -> None:
    assert says_nothing(name)


@pytest.mark.parametrize(
    "name", ["read_image", "cosine", "learning_rate", "is_empty", "to_batch", "in_batches", "feed"]
)
def test_verbs_nouns_tests_and_conversions_are_names(name: str) -> None:
    assert not says_nothing(name)


# ---- references in docstrings ----

REFERENCE = re.compile(r":(?:func|data|class|meth|attr|mod):`(?:[^`<]*<)?~?([\w.]+)>?`")


@cache
def names_in(path: Path) -> frozenset[str]:
    """What the module at ``path`` defines or imports; methods and attributes alone and behind their class."""
    found = set()
    for node in tree_of(path).body:
        parts = [node, *(ast.walk(node) if isinstance(node, ast.ClassDef | ast.If) else [])]
        own = {name for part in parts for name in names_bound_by(part)}
        found |= own | ({f"{node.name}.{name}" for name in own} if isinstance(node, ast.ClassDef) else set())
    return frozenset(found)


def names_bound_by(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        yield node.name
    elif isinstance(node, ast.Import | ast.ImportFrom):
        yield from (name.asname or name.name for name in node.names)
    elif isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        parts = [part for target in targets for part in ast.walk(target)]
        yield from (part.id for part in parts if isinstance(part, ast.Name))
        yield from (part.attr for part in parts if isinstance(part, ast.Attribute))


def exists(name: str, path: Path, known: dict[str, Path]) -> bool:
    """Whether what a docstring at ``path`` calls ``name`` is there; other packages are taken at their word."""
    first, dot, _ = name.partition(".")
    if first != "mgq":
        return name in names_in(path) or bool(dot and (first in names_in(path) or first.islower()))
    parts = name.split(".")
    module = next(found for end in range(len(parts), 0, -1) if (found := ".".join(parts[:end])) in known)
    return module == name or name[len(module) + 1 :] in names_in(known[module])


def test_docstrings_refer_to_what_exists() -> None:
    known = modules()
    wrong = [
        f"{path.relative_to(ROOT)} names {name}"
        for path in known.values()
        for name in REFERENCE.findall(path.read_text(encoding="utf-8"))
        if not exists(name, path, known)
    ]
    assert not wrong, "\n".join(wrong)


# ---- dependencies ----


def test_dependencies_are_ranges_and_the_tested_versions_are_pinned_for_uv() -> None:
    found = tomli.loads((TESTS.parent / "pyproject.toml").read_text(encoding="utf-8"))
    project = found["project"]
    listed = [Requirement(line) for group in project["optional-dependencies"].values() for line in group]
    listed += [Requirement(line) for line in project["dependencies"]]
    ranges = [entry for entry in listed if entry.name != "mgq"]
    assert all(clause.operator != "==" for entry in ranges for clause in entry.specifier), "pins belong to [tool.uv]"
    pins = {pin.name: pin.specifier for pin in map(Requirement, found["tool"]["uv"]["constraint-dependencies"])}
    assert all(clause.operator == "==" for pin in pins.values() for clause in pin)
    for name, pin in pins.items():
        version = next(iter(pin)).version
        assert any(entry.name == name and version in entry.specifier for entry in ranges), name


# ---- tests ----

TEST_FOLDERS = {"unit", "cli", "integration", "robustness", "benchmarks", "fakes"}


def test_tests_lie_in_folders_that_mirror_the_rooms() -> None:
    assert {path.name for path in TESTS.iterdir() if path.is_dir() and any(path.rglob("*.py"))} == TEST_FOLDERS
    assert [path.name for path in TESTS.glob("test_*.py")] == ["test_house.py"]
    rooms = {path.name for path in (TESTS / "unit").iterdir() if path.is_dir() and any(path.rglob("*.py"))}
    assert rooms <= set(ROOMS)


def test_every_test_is_found_and_no_fake_is_one() -> None:
    for path in TESTS.rglob("*.py"):
        assert (path.parent / "__init__.py").exists(), path
        tests = {node.name for node in tree_of(path).body if is_test(node)}
        assert not tests or path.name.startswith("test_"), f"pytest finds no {tests} in {path}"


def is_test(node: ast.stmt) -> TypeGuard[ast.FunctionDef | ast.ClassDef]:
    return isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name.startswith(("test_", "Test"))


def test_no_test_module_imports_another() -> None:
    for path in TESTS.rglob("*.py"):
        own = ".".join(path.relative_to(TESTS.parent).with_suffix("").parts)
        for name in names_imported(path, package="tests"):
            modules_of_tests = [part for part in name.split(".")[1:] if part.startswith("test_")]
            assert not modules_of_tests or name.startswith(own), f"{path} imports {name}: put it into tests/fakes"
