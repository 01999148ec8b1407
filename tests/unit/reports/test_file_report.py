"""``mgq report`` of a deployed file: what its page says, what it leaves out, and what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mgq.data.labelled_folders import evaluation_folder
from mgq.engine.classifier.dump import dump_classifier
from mgq.engine.classifier.evaluate import evaluate
from mgq.engine.classifier.network_choice import choose_network
from mgq.engine.classifier.network_options import NetworkOptions
from mgq.quantization.modes import Mode
from mgq.reports.contents import FileReport
from mgq.reports.report import report
from mgq.runtime.registry import get_backend
from tests.conftest import Mgq, Read, classifier_of, one_line_about, the_error, words_on, write_images
from tests.fakes.finished_runs import ARCH, HOSTILE, NAMES
from tests.fakes.foreign_models import write

pytestmark = pytest.mark.usefixtures("short_shufflenet", "no_downloads")


@pytest.fixture(scope="module")
def place(short_shufflenet: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the float file ``net.onnx``, one that takes four pictures a run, and three classes in ``val``."""
    folder = tmp_path_factory.mktemp("deployed")
    network = replace(classifier_of(ARCH), classes=NAMES, origin=f"made by {HOSTILE}")
    dump_classifier(network, folder / "net.onnx", batch=None)
    dump_classifier(network, folder / "four.onnx", batch=4)
    (folder / "val").mkdir()
    for name in NAMES[:3]:
        write_images(folder / "val" / name, 4)
    return folder


def report_on(file: Path, **words: object) -> FileReport:
    found = report(file, output=file.with_name("page.html"), **words)  # type: ignore[arg-type]
    assert isinstance(found, FileReport)
    return found


def test_the_page_has_the_figures_of_the_file_and_its_wrong_answers(place: Path) -> None:
    written = report_on(place / "net.onnx", data=place, engines=False)
    expected = evaluate(
        choose_network(NetworkOptions(checkpoint=place / "net.onnx"), Mode.NORMAL), evaluation_folder(place)
    )
    assert written.found is not None and written.what == "float32"
    np.testing.assert_array_equal(written.found.last.predictions, expected.predictions)
    wrong = int((expected.predictions != expected.labels).sum())
    page = written.page.read_text()
    assert 0 < wrong == page.count("data:image/jpeg;base64,")
    said = words_on(written.page)
    for part in (f"{expected.top1:.1f} % ± {expected.top1_error:.1f}", f"{wrong} of 12 pictures", written.sha256):
        assert part in said
    for one in written.wrong:
        assert one.answer.name != one.truth.name and one.answer.probability >= one.truth.probability
        assert f"taken for {one.answer.name} {one.answer.probability:.0%}" in said


def test_few_wrong_answers_are_shown_where_few_are_wanted(place: Path) -> None:
    written = report_on(place / "net.onnx", data=place, engines=False, images=2)
    assert written.page.read_text().count("<img") == 2 and "2 of them shown" in words_on(written.page)


def test_names_of_strangers_are_text(place: Path) -> None:
    written = report_on(place / "net.onnx", data=place, engines=False)
    read = Read(written.page.read_text())
    assert read.open == [] and HOSTILE in "".join(read.words) and "<script" not in written.page.read_text()


def test_what_only_a_run_knows_is_said_in_one_line(place: Path) -> None:
    written = report_on(place / "net.onnx", data=place, engines=False)
    assert len(written.missing) == 1
    assert one_line_about(written.missing[0], "float32", "error of each layer", "curves", "mgq report RUN")
    assert written.missing[0] in words_on(written.page)


def test_without_pictures_the_rest_is_told(place: Path) -> None:
    written = report_on(place / "net.onnx", engines=[get_backend("onnxruntime")])
    assert written.found is None and any("-d FOLDER" in line for line in written.missing)
    assert "It was not measured" in words_on(written.page)
    assert written.engines is not None and [row.engine for row in written.engines.rows] == ["ONNX Runtime"]


def test_engines_that_are_here_are_measured_and_compared(place: Path) -> None:
    absent = replace(get_backend("onnxruntime"), name="Nothing", package="no_such_package")
    engines = [get_backend("openvino"), get_backend("onnxruntime"), get_backend("library"), absent]
    written = report_on(place / "net.onnx", data=place, engines=engines, limit=6)
    assert written.engines is not None and written.engines.images == 6
    assert [row.engine for row in written.engines.rows] == ["OpenVINO", "ONNX Runtime"]
    for row in written.engines.rows:
        assert row.speed is not None and row.same == 100.0 and row.file_bytes == written.file_bytes
    assert f"as {written.runtime.name}" in words_on(written.page)


def test_a_file_that_takes_four_pictures_is_timed_with_four(place: Path) -> None:
    written = report_on(place / "four.onnx", data=place, engines=[get_backend("onnxruntime")], limit=6)
    assert written.engines is not None
    [row] = written.engines.rows
    assert row.problem is None and row.speed is not None
    assert row.speed.fps == pytest.approx(4000 / row.speed.p50_ms, rel=0.9)
    assert "4 pictures at a time" in words_on(written.page)


def test_the_command_writes_the_page_beside_the_file(place: Path, mgq: Mgq) -> None:
    for words in ([str(place / "net.onnx")], ["-c", str(place / "net.onnx")]):
        body = json.loads(mgq("report", *words, "--no-engines", "--json").out)
        assert body["page"] == str(place / "net.onnx.report.html") and body["file"] == str(place / "net.onnx")
        Path(body["page"]).unlink()


def test_what_does_not_go_with_a_file_is_refused(place: Path, mgq: Mgq, tmp_path: Path) -> None:
    file = str(place / "net.onnx")
    assert one_line_about(the_error(mgq("report", file, "-c", file)), "finished file", "-c")
    assert one_line_about(the_error(mgq("report", file, "--key", "ema")), "finished file", "--key")
    assert one_line_about(the_error(mgq("report", file, "--mean", "0,0,0", "--std", "1,1,1")), "--mean", "ONNX files")
    assert one_line_about(the_error(mgq("report", "gone.onnx")), "gone.onnx")
    assert one_line_about(the_error(mgq("report", file, "-d", "gone")), "gone")
    assert one_line_about(the_error(mgq("report", file, "-o", ".")), "folder")
    other = write(tmp_path / "other.onnx")
    assert one_line_about(the_error(mgq("report", str(other))), "another program", "mgq calibrate -c")
