"""The documents: links lead somewhere, commands exist, the reference is complete, the examples run."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import itertools
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from types import ModuleType

import pytest

import mgq
from mgq.api import make_train_options
from mgq.cli.main import verbs
from mgq.engine.calibration.calibrate_options import CalibrateOptions
from mgq.engine.training.recipe import Recipe
from mgq.zoo.registry import specs
from tests.fakes.commands import ARCH
from tests.fakes.places import ROOT

DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md")])
EXAMPLES = DOCS / "examples"
LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)")
BLOCK = re.compile(r"^( *)```(\w+)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`(mgq [^`]+)`")


def names_of(pages: list[Path]) -> list[str]:
    return [str(page.relative_to(ROOT)) for page in pages]


def blocks(text: str, language: str) -> list[str]:
    """The code blocks of a page in ``language``."""
    return [match[3] for match in BLOCK.finditer(text) if match[2] == language]


def commands_in(text: str) -> Iterator[list[str]]:
    """The words of every ``mgq`` command in a page's shell blocks and in its code spans."""
    lines = [line for block in blocks(text, "sh") for line in block.replace("\\\n", " ").splitlines()]
    spans = [span for span in CODE.findall(BLOCK.sub("", text)) if "..." not in span]
    for command in (part for line in [*lines, *spans] for part in line.split("&&")):
        words = shlex.split(command, comments=True)
        if "mgq" in words:
            yield words[words.index("mgq") + 1 :]


def anchor(heading: str) -> str:
    """The anchor that MkDocs and GitHub give to a heading."""
    return re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower())


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    """The program that writes the generated parts of the pages."""
    spec = importlib.util.spec_from_file_location("docs_reference", DOCS / "hooks" / "reference.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_readme_is_a_page_and_no_manual() -> None:
    assert (ROOT / "README.md").stat().st_size < 10_000


def test_the_readme_has_the_test_command_that_ci_runs() -> None:
    assert "<!-- tests -->\n```sh\n" in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=names_of(PAGES))
def test_links_lead_to_files_and_headings_that_exist(page: Path) -> None:
    for target, fragment in LINK.findall(page.read_text(encoding="utf-8")):
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), f"{page.name} links to {target}"
        if fragment and path.suffix == ".md":
            headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            assert fragment in map(anchor, headings), f"{page.name} links to {target}#{fragment}"


@pytest.mark.parametrize("page", PAGES, ids=names_of(PAGES))
def test_commands_have_verbs_and_options_that_exist(page: Path) -> None:
    known = verbs()
    for words in commands_in(page.read_text(encoding="utf-8")):
        while words and words[0].startswith("-"):
            assert words.pop(0) in ("--debug", "--version", "--help", "--install-completion"), words
        if not words or words[0] == "VERB":
            continue
        assert words[0] in known, f"{page.name}: mgq {words[0]}"
        flags = {f for option in known[words[0]].params for f in (*option.opts, *option.secondary_opts)}
        given = {word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)}
        assert given <= flags | {"--help", "-h"}, f"{page.name}: mgq {' '.join(words)}"


@pytest.mark.parametrize("page", PAGES, ids=names_of(PAGES))
def test_python_in_the_pages_is_python(page: Path) -> None:
    for block in blocks(page.read_text(encoding="utf-8"), "python"):
        indent = len(block) - len(block.lstrip(" "))
        compile("\n".join(line[indent:] for line in block.splitlines()), str(page), "exec")


@pytest.mark.skipif(not (ROOT / "mgq" / "ptq").is_dir(), reason="the modules are not in their rooms yet")
@pytest.mark.parametrize("page", sorted((DOCS / "contributing").glob("*.md")), ids=lambda page: page.name)
def test_files_that_contributors_are_sent_to_exist(page: Path) -> None:
    for name in re.findall(r"`((?:mgq|tests|docs)/[^`<>\s]*)`", page.read_text(encoding="utf-8")):
        assert (ROOT / name).exists(), f"{page.name}: {name}"


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in DOCS.rglob("*.md"):
        assert str(page.relative_to(DOCS)) in navigation


def test_the_reference_names_every_verb_and_option(reference: ModuleType) -> None:
    text = reference.command_line()
    for name, command in verbs().items():
        section = text.partition(f"## mgq {name}\n")[2].partition("\n## ")[0]
        missing = [
            flag for option in command.params for flag in option.opts if flag.startswith("-") and flag not in section
        ]
        assert not missing, name


def test_the_reference_names_every_key_of_a_recipe_and_every_network(reference: ModuleType) -> None:
    keys, networks = reference.recipe_keys(), reference.zoo()
    assert all(f"| `{field.name}` |" in keys for field in fields(Recipe))
    assert all(f"| `{name}` |" in networks for name in specs())


def test_every_mark_in_the_pages_is_replaced(reference: ModuleType) -> None:
    for page in DOCS.rglob("*.md"):
        assert "<!-- generated" not in reference.on_page_markdown(page.read_text(encoding="utf-8"))


def run_example(code: list[str], folder: Path) -> str:
    """What a program prints; it runs in ``folder`` and must not fail."""
    done = subprocess.run([sys.executable, *code], cwd=folder, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    assert not list(folder.iterdir()), "an example leaves nothing behind"
    return done.stdout


def calls_in(block: str) -> Iterator[tuple[str, list[object], dict[str, object]]]:
    """Name, arguments and keywords of each call of ``mgq``; what is no plain value is None."""

    def value_of(node: ast.expr) -> object:
        try:
            return ast.literal_eval(node)
        except ValueError:
            return None

    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.Call) and re.fullmatch(r"mgq\.\w+", ast.unparse(node.func)):
            keywords = {str(keyword.arg): value_of(keyword.value) for keyword in node.keywords}
            yield ast.unparse(node.func).removeprefix("mgq."), [value_of(each) for each in node.args], keywords


def test_calls_in_the_guide_to_python_have_names_and_keywords_that_exist() -> None:
    text = (DOCS / "guides" / "python.md").read_text(encoding="utf-8")
    found = [call for block in blocks(text, "python") for call in calls_in(block)]
    assert {"infer", "create_model", "quantize", "train", "calibrate", "report"} <= {name for name, _, _ in found}
    for name, arguments, keywords in found:
        inspect.signature(getattr(mgq, name)).bind(*arguments, **keywords)
        if name in ("train", "qat"):
            options = make_train_options(keywords)
            assert set(options.changes) <= {field.name for field in fields(Recipe)}
        if name == "calibrate":
            CalibrateOptions(**keywords)  # type: ignore[arg-type]


def test_the_guide_to_python_runs_where_it_needs_no_files_of_the_users_own(tmp_path: Path) -> None:
    """Errors, progress and logging: the first block needs weights and photos, the last a file."""
    text = (DOCS / "guides" / "python.md").read_text(encoding="utf-8")
    _, errors, progress, logs, _ = blocks(text, "python")
    (tmp_path / "assets").mkdir()
    shutil.copy(ROOT / "assets" / "cat.jpg", tmp_path / "assets")
    done = subprocess.run(
        [sys.executable, "-c", "\n".join((errors, progress, logs))], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[0].startswith("missing.safetensors") and "classify 1 1 pictures" in done.stdout


USERS_FILES = """
import cv2, numpy as np
import megengine

rng = np.random.default_rng(0)
for number in range(24):
    path = Path(f"flowers/{'val' if number < 8 else 'train'}/{'ab'[number % 2]}/{number}.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), rng.integers(0, 256, (40, 40, 3), np.uint8))
shutil.copytree("flowers/train", "photos")
images = rng.integers(0, 256, (16, 3, 32, 32), np.uint8)
megengine.save(mgq.create_model("resnet18", classes=10).state_dict(), "resnet18.pkl")
""".replace("resnet18", ARCH)
"""What the first block of the guide takes for granted, in the working folder: photos of two classes, weights."""

SHORTER_CALLS = """
import functools, shutil
from pathlib import Path
import mgq

def shorten(function, **fewer):
    return lambda *words, **named: function(*words, **{**named, **fewer})

mgq.train = shorten(mgq.train, epochs=1, image_size=32)
mgq.qat = shorten(mgq.qat, epochs=1)
mgq.benchmark = shorten(mgq.benchmark, rounds=1, threads=[1], image_size=32)
"""


@pytest.mark.slow
def test_the_guide_to_python_trains_quantizes_and_measures_as_written(tmp_path: Path) -> None:
    """The whole first block, on few photos, for one epoch and with a smaller network than the guide names."""
    first = blocks((DOCS / "guides" / "python.md").read_text(encoding="utf-8"), "python")[0]
    first = first.replace("resnet18", ARCH)
    shutil.copy(ROOT / "assets" / "cat.jpg", tmp_path)
    checks = "print(answers[0].scores[0].name, int8 is not None)"
    done = subprocess.run(
        [sys.executable, "-c", "\n".join((SHORTER_CALLS, USERS_FILES, first, checks))],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "tiger cat" in done.stdout
    assert (tmp_path / "cat.megengine").exists()
    assert {path.name for path in (tmp_path / "runs").iterdir()} >= {
        f"{ARCH}.{kind}" for kind in ("normal", "qat", "calibration")
    }


@pytest.mark.slow
def test_the_example_runs_its_file_without_mgq(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    assert "cat.jpg: tiger cat" in run_example([str(EXAMPLES / "deploy_without_mgq.py")], tmp_path)


@pytest.mark.slow
def test_the_example_trains_and_measures(tmp_path: Path) -> None:
    said = run_example([str(EXAMPLES / "train_and_measure.py")], tmp_path)
    assert re.search(r"^int8: top-1 [\d.]+ % ± [\d.]+, 32 images$", said, re.MULTILINE)


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(tmp_path: Path) -> None:
    notebook = json.loads((EXAMPLES / "quantize_your_network.ipynb").read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    said = run_example(["-c", "\n\n".join(cells)], tmp_path)
    found = re.search(r"^([\d.]+) dB, same answer on", said, re.MULTILINE)
    assert found is not None and float(found[1]) > 15


def rows_below(text: str, heading: str) -> list[list[str]]:
    """The cells of the rows of the first table below ``heading``, bold or not."""
    lines = text.partition(f"\n{heading}\n")[2].partition("\n| --- |")[2].splitlines()[1:]
    rows = itertools.takewhile(lambda line: line.startswith("|"), lines)
    return [[cell.strip().replace("**", "") for cell in row.strip("|").split("|")] for row in rows]


def test_the_readme_has_the_accuracy_of_the_results() -> None:
    readme = rows_below((ROOT / "README.md").read_text(encoding="utf-8"), "## Accuracy")
    page = (DOCS / "results" / "accuracy.md").read_text(encoding="utf-8")
    measured = rows_below(page, "## Target `onnx`, beside other tools")
    found = {(row[3].removesuffix(" %"), row[1], row[5].split(" / ")[0]) for row in measured}
    assert len(readme) == len(measured) == 7
    assert {tuple(row[1:]) for row in readme} == found


def test_the_readme_has_the_speed_of_the_results() -> None:
    page = (DOCS / "results" / "speed.md").read_text(encoding="utf-8")
    rates = [set(re.findall(r"^\w.*? +([\d.]+) +[\d.]+ +[\d.]+ ", part, re.MULTILINE)) for part in page.split("\n\n")]
    readme = rows_below((ROOT / "README.md").read_text(encoding="utf-8"), "## Speed")
    assert len(readme) == 4
    for row in readme:
        assert any(set(row[1:6]) <= found for found in rates), row


def test_the_chinese_readme_has_the_figures_and_links_of_the_english_one() -> None:
    english, chinese = (
        (ROOT / name).read_text(encoding="utf-8").partition("\n## ")[2] for name in ("README.md", "README.zh.md")
    )
    assert [target for target, _ in LINK.findall(chinese)] == [target for target, _ in LINK.findall(english)]
    figures = re.compile(r"(?<=\| )[\d.]+(?: ± [\d.]+)?(?: \([\d.-]+\))?(?= \|)")
    assert figures.findall(chinese) == figures.findall(english)
