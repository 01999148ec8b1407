"""The walls of the house: which room may know of which."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import mgq

ROOT = Path(mgq.__file__).parent
FLOOR = {"errors", "events", "machine"}
MAY_IMPORT = {
    "files": FLOOR,
    "zoo": FLOOR | {"files"},
    "data": FLOOR | {"files"},
    "quant": FLOOR | {"files", "zoo"},
    "deploy": FLOOR | {"files", "zoo", "quant"},
    "export": FLOOR | {"files"},
    "runtime": FLOOR | {"files", "quant", "deploy", "export"},
    "engine": FLOOR | {"files", "zoo", "data", "quant", "deploy", "export", "runtime"},
    "bench": FLOOR | {"files", "zoo", "data", "quant", "engine", "deploy", "runtime"},
    "reports": FLOOR | {"files", "zoo", "data", "quant", "engine", "deploy", "runtime", "bench"},
    "cli": FLOOR | {"files", "zoo", "data", "quant", "engine", "deploy", "export", "runtime", "bench", "reports"},
}


def imported_rooms(path: Path) -> set[str]:
    """The rooms of mgq that the module at ``path`` imports, anywhere in it."""
    rooms: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("mgq."):
            rooms.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            rooms.update(name.name.split(".")[1] for name in node.names if name.name.startswith("mgq."))
    return rooms


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_imports_only_rooms_below_it(room: str) -> None:
    for path in (ROOT / room).rglob("*.py"):
        wrong = imported_rooms(path) - MAY_IMPORT[room] - {room}
        assert not wrong, f"{path.name} imports {wrong}"


def test_every_room_is_known() -> None:
    rooms = {path.name for path in ROOT.iterdir() if path.is_dir() and (path / "__init__.py").exists()}
    assert rooms == set(MAY_IMPORT)


def test_only_the_command_line_prints() -> None:
    for path in ROOT.rglob("*.py"):
        if path.parent.name == "cli":
            continue
        assert "print" not in called_names(path), path


def called_names(path: Path) -> set[str]:
    calls = [node.func for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    return {function.id for function in calls if isinstance(function, ast.Name)}
