"""Help and completion: examples that work as they stand, values that a shell offers."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from dataclasses import fields

import click
import pytest

from mgq.cli.import_options import ImportOptions
from mgq.cli.main import verbs
from mgq.engine.training.recipe import SCHEDULES
from mgq.quantization.option_names import QUALITIES
from mgq.quantization.qat import OBSERVERS
from mgq.quantization.targets import TARGETS
from mgq.runtime.registry import backend_names
from mgq.zoo.mobilenet_v2 import ACTIVATIONS
from mgq.zoo.registry import specs
from tests.conftest import Mgq


def examples_of(text: str) -> list[str]:
    """The commands in the part of a help text that is called Examples."""
    part = re.search(r"Examples:\n((?:    mgq .*\n)+)", text)
    return [] if part is None else [line.strip() for line in part.group(1).splitlines()]


@pytest.mark.parametrize("verb", verbs())
def test_help_says_what_a_verb_does_with_examples_that_parse(mgq: Mgq, verb: str) -> None:
    said = mgq(verb, "--help")
    assert said.code == 0 and said.err == ""
    assert all(len(line) <= 80 for line in said.out.splitlines())
    examples = examples_of(said.out)
    assert 2 <= len(examples) <= 4, said.out
    for example in examples:
        program, name, *arguments = shlex.split(example)
        assert (program, name) == ("mgq", verb)
        with verbs()[verb].make_context(verb, arguments):
            pass


def test_many_options_stand_in_groups_each_once(mgq: Mgq) -> None:
    titles = re.findall(r"^(\w+):$", mgq("train", "--help").out, re.MULTILINE)
    assert titles == ["Network", "Pictures", "Import", "Options", "Devices", "Output"]
    for name, verb in verbs().items():
        said = mgq(name, "--help").out
        for parameter in verb.params:
            if parameter.param_type_name == "option":
                assert len(re.findall(rf"^  (-\w, )?{parameter.opts[-1]}\b(?!-)", said, re.MULTILINE)) == 1
    group = re.search(r"^Network:\n(.*?)\n\n", mgq("calibrate", "--help").out, re.DOTALL | re.MULTILINE)
    assert group is not None and "--arch" in group[1] and "--ranges" not in group[1]


def test_all_that_is_said_of_an_import_stands_together(mgq: Mgq) -> None:
    flags = {"rgb": "--rgb / --bgr"}
    wanted = {flags.get(field.name, f"--{field.name}") for field in fields(ImportOptions)}
    group = re.search(r"^Import:\n(.*?)\n\n", mgq("calibrate", "--help").out, re.DOTALL | re.MULTILINE)
    assert group is not None and all(flag in group[1] for flag in wanted), wanted


def test_all_verbs_are_listed_with_a_whole_sentence(mgq: Mgq) -> None:
    said = mgq("--help")
    for name in verbs():
        (line,) = [line for line in said.out.splitlines() if line.startswith(f"  {name} ")]
        assert line.endswith(".") and not line.endswith("..."), line


def completed(mgq: Mgq, monkeypatch: pytest.MonkeyPatch, words: str) -> list[str]:
    """What bash would offer for the last of ``words``."""
    monkeypatch.setenv("_MGQ_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(len(words.split(" ")) - 1))
    return mgq().out.split()


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("mgq inf", ["infer"]),
        ("mgq infer --tar", ["--target"]),
        ("mgq infer -a resnet", [name for name in specs() if name.startswith("resnet")]),
        ("mgq bench -a ", list(specs())),
        ("mgq eval -m ", ["normal", "qat", "quantized"]),
        ("mgq infer --target ", list(TARGETS)),
        ("mgq eval --engine ", list(backend_names())),
        ("mgq calibrate --quality ", list(QUALITIES)),
        ("mgq calibrate --method m", ["min-max", "mse"]),
        ("mgq qat --observer ", list(OBSERVERS)),
        ("mgq train --schedule ", list(SCHEDULES)),
        ("mgq train --activation ", list(ACTIVATIONS)),
        ("mgq dump --format ", ["megengine", "onnx", "native"]),
        ("mgq dump --check ", ["logits", "layers", "none"]),
        ("mgq bench --mode ", ["latency", "throughput"]),
    ],
)
def test_values_complete(mgq: Mgq, monkeypatch: pytest.MonkeyPatch, words: str, offered: list[str]) -> None:
    assert completed(mgq, monkeypatch, words) == offered


def test_completion_imports_neither_megengine_nor_numpy() -> None:
    for words in ("mgq infer -a res", "mgq infer --engine ", "mgq qat --target ", "mgq calibrate --method "):
        code = (
            "import atexit, os, sys\n"
            "def heavy(): os._exit(9 if {'megengine', 'numpy', 'cv2'} & set(sys.modules) else 0)\n"
            "atexit.register(heavy)\n"
            "sys.argv = ['mgq']\n"
            "from mgq.cli.main import run\n"
            "run()\n"
        )
        variables = {"_MGQ_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, env={**os.environ, **variables})
        assert done.returncode == 0, (words, done.stderr)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_scripts_of_every_shell_are_shown(mgq: Mgq, monkeypatch: pytest.MonkeyPatch, shell: str) -> None:
    monkeypatch.setattr("shellingham.detect_shell", lambda: (shell, f"/bin/{shell}"))
    said = mgq("--show-completion")
    assert said.code == 0 and "_MGQ_COMPLETE" in said.out and said.err == ""


def test_versions_name_what_matters(mgq: Mgq, monkeypatch: pytest.MonkeyPatch) -> None:
    said = mgq("--version")
    names = [line.rsplit(" ", 1)[0] for line in said.out.splitlines()]
    assert names[:2] == ["mgq", "MegEngine"] and {"oneDNN", "ONNX Runtime", "OpenVINO", "Python"} <= set(names)
    monkeypatch.setattr("mgq.cli.main.package_version", lambda package: None)
    assert "OpenVINO not installed" in mgq("--version").out


def test_every_option_and_argument_says_what_it_is_for() -> None:
    for name, verb in verbs().items():
        for parameter in verb.params:
            record = parameter.get_help_record(click.Context(verb))
            assert record is None or re.match(r"\w", record[1]), f"{name} {parameter.name}"


def test_a_locale_without_utf_8_is_no_failure() -> None:
    variables = {**os.environ, "LC_ALL": "C", "PYTHONIOENCODING": "ascii", "COLUMNS": "80"}
    done = subprocess.run([sys.executable, "-m", "mgq", "models"], capture_output=True, env=variables)
    assert done.returncode == 0 and done.stderr == b"", done.stderr
    assert b"resnet18" in done.stdout and done.stdout.isascii()
