"""``mgq report``: what its page says of a run, what it says where something is gone, and that strangers' names are
harmless."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mgq.data.labelled_folders import evaluation_folder
from mgq.engine.classifier.evaluate import evaluate
from mgq.engine.classifier.evaluation_result import Evaluation
from mgq.engine.classifier.open import open_classifier
from mgq.engine.runs.provenance import write_environment
from mgq.quantization.modes import Mode
from mgq.reports.contents import Report
from mgq.reports.finished_run import find_run
from mgq.reports.measurements import FLOAT, INT8, Measurements
from mgq.reports.report_options import ReportOptions
from mgq.reports.run_predictions import choose_changes
from mgq.reports.run_report import report_run
from mgq.runtime.registry import get_backend
from tests.conftest import SIZE, Mgq, Read, classifier_of, one_line_about, the_error, words_on, write_images
from tests.fakes.finished_runs import ARCH, HOSTILE, NAMES, make_run
from tests.fakes.foreign_models import write

pytestmark = pytest.mark.usefixtures("short_shufflenet", "no_downloads")


@pytest.fixture(scope="module")
def run(short_shufflenet: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def written(run: Path) -> Report:
    return report(run, engines=False, output=run.parent / "whole.html")


def report(run: Path, **words: Any) -> Report:
    return report_run(ReportOptions(run=run, **words))


def found_in(written: Report) -> Measurements:
    assert written.found is not None
    return written.found


def test_the_page_has_the_figures_of_both_networks(run: Path, written: Report) -> None:
    images = evaluation_folder(run.parent.parent / "set")
    for name, mode, file in ((FLOAT, Mode.NORMAL, "float"), (INT8, Mode.QUANTIZED, "checkpoint")):
        expected = evaluate(open_classifier(checkpoint=run / f"{file}.safetensors", mode=mode), images)
        found = found_in(written).found[name]
        np.testing.assert_array_equal(found.predictions, expected.predictions)
        assert f"{expected.top1:.1f} % ± {expected.top1_error:.1f}" in words_on(written.page)
    for part in (ARCH, "12 of", "trained with quantization", "megengine", "as float32", "recipe"):
        assert part in words_on(written.page)
    assert f"{SIZE}x{SIZE} pixels" in words_on(written.page) and "synthetic" not in words_on(written.page)


def test_changed_answers_are_shown_with_both_answers_and_counted_in_all(written: Report) -> None:
    found = found_in(written)
    assert found.pair is not None
    differing = int((found.pair[0].predictions != found.pair[1].predictions).sum())
    assert differing > 2 and sum(map(len, found.groups.values())) == differing
    page = written.page.read_text()
    assert page.count("data:image/jpeg;base64,") == differing
    assert f"{differing} of 12 pictures" in words_on(written.page)
    for change in (change for group in found.changes.values() for change in group):
        assert change.before.name != change.after.name and 0 < change.before.probability <= 1
        assert f"float32: {change.before.name} {change.before.probability:.0%}" in words_on(written.page)


def test_a_single_image_and_a_single_answer_are_told_as_one(written: Report) -> None:
    found = found_in(written)
    assert found.pair is not None and found.images_of == f"12 pictures of {found.dataset.name}"
    one = {name: replace(each, images=1) for name, each in found.found.items()}
    single = replace(found, found=one)
    single.__dict__["groups"] = {"int8 was right": [3]}
    lines = replace(written, found=single).summary()
    assert lines[1].startswith(f"top-1 on 1 picture of {found.dataset.name}: ")
    assert lines[2] == "int8 changed 1 answer: int8 was right 1"


def test_few_images_are_shown_whatever_their_number(run: Path, tmp_path: Path) -> None:
    page = report(run, engines=False, images=2, output=tmp_path / "few.html", limit=6).page.read_text()
    assert page.count("<img") == 2 and " shown</h3>" in page and " of 6 pictures" in page


def test_small_groups_are_shown_whole() -> None:
    assert choose_changes({"a": [1], "b": [2, 3, 4, 5], "c": [6, 7, 8]}, 6) == {"a": [1], "b": [2, 3, 4], "c": [6, 7]}
    assert choose_changes({"a": [1], "b": []}, 6) == {"a": [1], "b": []}


def test_names_of_strangers_are_text_and_the_page_asks_for_nothing(written: Report) -> None:
    page = written.page.read_text()
    read = Read(page)
    assert read.open == [] and HOSTILE in "".join(read.words)
    assert not read.tags & {"script", "link", "iframe", "object", "use", "image"}
    assert "http:" not in page and "https:" not in page and "url(" not in page and "@import" not in page
    assert "<script" not in page and "default-src 'none'" in page


def test_the_error_of_the_drop_counts_images_on_which_one_alone_is_right(written: Report) -> None:
    def answers(right: list[int]) -> Evaluation:
        labels, indices = np.zeros(4, np.int64), np.arange(4)
        return Evaluation(4, 0.0, 25.0 * sum(right), 0.0, 1.0, 1 - np.array(right), labels, indices, ("a", "b"))

    pair = replace(found_in(written), found={FLOAT: answers([1, 1, 1, 0]), INT8: answers([1, 1, 0, 0])})
    drop, error = pair.drop(INT8)
    assert drop == 25.0 and error == pytest.approx(100 * np.std([0, 0, 1, 0], ddof=1) / 2)


# ---- what is gone ----


def test_without_images_it_tells_what_the_run_noted_and_the_mend(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    shutil.rmtree(tmp_path / "set")
    written = report(run, engines=False)
    assert written.page == run / "report.html" and written.found is None
    assert (
        "-d FOLDER" in words_on(written.page)
        and "50.5 %" in words_on(written.page)
        and "epoch 1" in words_on(written.page)
    )


def test_a_float_network_that_is_gone_is_named_and_can_be_given(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    (run / "float.safetensors").rename(tmp_path / "moved.safetensors")
    alone = report(run, engines=False)
    assert "-c FILE" in words_on(alone.page) and set(found_in(alone).found) == {"fake-quantized", INT8}
    assert found_in(report(run, engines=False, checkpoint=tmp_path / "moved.safetensors")).pair is not None


def test_a_float_run_has_its_own_figures_and_names_the_way_to_int8(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    (run / "float.safetensors").replace(run / "checkpoint.safetensors")
    written = report(run, engines=False)
    assert written.run.kind == "normal" and set(found_in(written).found) == {FLOAT}
    assert f"mgq calibrate -a {ARCH}" in words_on(written.page)


def test_a_calibration_leaves_out_what_it_has_seen_and_finds_its_float_run(tmp_path: Path) -> None:
    run, origin = make_run(tmp_path), tmp_path / "runs" / f"{ARCH}.normal" / "checkpoint.safetensors"
    origin.parent.mkdir()
    (run / "float.safetensors").rename(origin)
    (run / "metrics.jsonl").rename(origin.parent / "metrics.jsonl")
    seen: dict[str, Any] = {"pictures": str(tmp_path / "set"), "images": 5, "of": 12, "made_by": "mgq calibrate"}
    (run / "ranges.json").write_text(json.dumps({"provenance": seen}))
    made = replace(classifier_of(ARCH, Mode.QAT), classes=NAMES, origin=f"{origin} (made up)")
    made.write_checkpoint(run / "checkpoint.safetensors")
    written = report(run, engines=False)
    assert written.run.kind == "calibration" and found_in(written).images == 7
    assert "5 pictures on which the ranges were measured" in words_on(written.page)
    assert found_in(written).pair is not None and len(written.float_metrics) == 2
    later = written.run.checkpoint.stat().st_mtime + 60
    os.utime(origin, (later, later))
    assert "trained again since" in words_on(report(run, engines=False).page)
    assert written.run.command == "mgq calibrate"
    write_environment(run, {"processes": [{"command": "mgq calibrate -d 'my set'"}]})
    assert report(run, engines=False).run.command == "mgq calibrate -d 'my set'"


def test_the_command_of_the_page_names_all_that_the_page_was_made_with(tmp_path: Path) -> None:
    (run := tmp_path / "net.calibration").mkdir()
    float_network, page = tmp_path / "float net.onnx", tmp_path / "page.html"
    given = ReportOptions(
        run="net", checkpoint=float_network, arch=ARCH, data=tmp_path, key="ema", limit=8, images=3, output=page,
        engines=False,
    )  # fmt: skip
    assert given.command_for(run) == (
        f"mgq report {run} -a {ARCH} -c '{float_network}' --key ema -d {tmp_path} --limit 8 --pictures 3 -o {page} "
        "--no-engines"
    )
    assert ReportOptions(checkpoint=tmp_path / "net.onnx").command_for(tmp_path / "net.onnx").count("net.onnx") == 1


# ---- engines ----


def test_engines_are_measured_and_one_that_is_missing_says_why(run: Path, tmp_path: Path) -> None:
    missing = replace(get_backend("onnxruntime"), name="Nothing", package="no_such_package", mend="pip install it")
    engines = [get_backend("onnxruntime"), missing]
    written = report(run, engines=engines, limit=6, output=tmp_path / "engines.html")
    assert written.engines is not None and written.engines.images == 6
    rows = {(row.engine, row.what): row for row in written.engines.rows}
    for what in (FLOAT, INT8):
        row = rows["ONNX Runtime", what]
        assert row.speed is not None and row.speed.fps > 0 and row.file_bytes and row.top1 is not None
        assert rows["Nothing", what].speed is None
    float_row = rows["ONNX Runtime", FLOAT]
    assert float_row.same == 100.0 and float_row.top1 == pytest.approx(found_in(written).found[FLOAT].top1)
    assert "Nothing is not installed: pip install it" in words_on(written.page)


# ---- the command ----


def test_the_command_takes_the_newest_run_and_says_where_the_page_is(mgq: Mgq, tmp_path: Path) -> None:
    make_run(tmp_path)
    body = json.loads(mgq("report", "--no-engines", "--limit", "3", "--json", "-o", "page.html").out)
    assert (body["arch"], body["kind"], body["images"], body["page"]) == (ARCH, "qat", 3, "page.html")
    assert (tmp_path / "page.html").is_file()
    assert find_run(f"{ARCH}.qat", Path("runs")).path == find_run(None, Path("runs")).path
    other = tmp_path / "runs" / "resnet18.normal"
    shutil.copytree(tmp_path / "runs" / f"{ARCH}.qat", other)
    os.utime(other / "checkpoint.safetensors", (2e9, 2e9))  # the newest now
    body = json.loads(mgq("report", "-a", ARCH, "--no-engines", "--limit", "3", "--json", "-o", "page.html").out)
    assert body["run"] == f"runs/{ARCH}.qat"
    assert "there is no run of resnet50 under runs: `mgq qat -a resnet50`" in the_error(mgq("report", "-a", "resnet50"))
    shutil.rmtree(other)
    assert "no run nobody.qat" in the_error(mgq("report", "nobody.qat"))
    assert one_line_about(the_error(mgq("report", "-d", "nothing", "--no-engines")), "nothing")
    assert "folder" in the_error(mgq("report", "-o", "."))
    assert "--limit 0" in the_error(mgq("report", "--limit", "0"))


def test_without_a_run_the_way_to_one_is_named(mgq: Mgq) -> None:
    assert "mgq qat" in the_error(mgq("report"))


def test_the_network_of_c_chooses_the_run(mgq: Mgq, tmp_path: Path) -> None:
    """It was the newest run, of whatever network, and the message was about ``-a``, which nobody had typed."""
    mine, other = write(tmp_path / "mine.onnx"), write(tmp_path / "other.onnx")
    photos, words = tmp_path / "photos", ("--limit", "4", "--no-engines", "--json")
    photos.mkdir()
    for name in "abcdefghij":
        write_images(photos / name, 2)
    assert "`mgq calibrate -c FILE -d FOLDER` makes one" in the_error(mgq("report", "-c", mine, "-d", photos, *words))
    for file in (mine, other):
        said = mgq("calibrate", "-c", file, "-d", photos, "--images", "4", "--method", "min-max")
        assert said.code == 0, said
    for named in (mine, "runs/mine.calibration/checkpoint.safetensors"):
        said = mgq("report", "-c", named, "-d", photos, *words)
        assert json.loads(said.out)["run"] == "runs/mine.calibration"


def test_a_page_in_a_new_folder_that_is_not_written_leaves_no_folder(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mgq.reports.run_report.page_of", interrupt)
    with pytest.raises(KeyboardInterrupt):
        report(run, engines=False, limit=4, output=tmp_path / "new" / "folder" / "page.html")
    assert not (tmp_path / "new").exists()
