"""A network that answers over HTTP: as `mgq infer` does, within limits, and to the last request when it stops."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import requests

from mgq.data.decoding import bundled_cat
from mgq.data.image_sources import expand
from mgq.engine.calibration import calibration_run
from mgq.engine.classifier.classifier import Classifier
from mgq.engine.classifier.deployed_files import open_file
from mgq.engine.classifier.dump import dump_classifier
from mgq.engine.classifier.open import convert
from mgq.engine.classifier.predict import predict
from mgq.ptq.presets import CalibrationConfig
from mgq.quantization.option_names import Mode
from mgq.quantization.targets import ONNX
from mgq.service import server as servers
from mgq.service.application import Service
from mgq.service.limits import Limits
from mgq.service.server import open_socket
from tests.conftest import Mgq, classifier_of, one_line_about, the_error, write_images
from tests.fakes.services import PATIENCE_S, served

pytestmark = pytest.mark.usefixtures("short_shufflenet")
ARCH = "shufflenet_v1_x0_5_g3"
FILES = ("any.onnx", "one.onnx", "net.so")


@pytest.fixture(scope="module")
def deployed(short_shufflenet: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``any.onnx`` takes any number of pictures, ``one.onnx`` one at a time; ``net.so`` where there is a linker; six
    pictures in ``photos``."""
    folder = tmp_path_factory.mktemp("served")
    cat = expand([str(bundled_cat())])
    config = CalibrationConfig(target=ONNX, weight_rounding="nearest")
    found = convert(calibration_run.calibrate(classifier_of(ARCH), cat, 1, config=config).classifier, Mode.QUANTIZED)
    dump_classifier(found, folder / "any.onnx", batch=None)
    dump_classifier(found, folder / "one.onnx", batch=1)
    dump_classifier(found, folder / "net.so")
    write_images(folder / "photos", 6)
    return folder


@pytest.fixture(scope="module")
def answering(deployed: Path) -> Iterator[tuple[str, Service]]:
    with served(open_file(deployed / "any.onnx", "onnxruntime")) as found:
        yield found


def photos(folder: Path) -> list[Path]:
    return sorted((folder / "photos").glob("*.png"))


def form(paths: Sequence[Path]) -> list[tuple[str, tuple[str, bytes]]]:
    return [("picture", (path.name, path.read_bytes())) for path in paths]


def guesses(answers: Sequence[Mapping[str, Any]]) -> list[Any]:
    return [answer["guesses"] for answer in answers]


def expected(classifier: Classifier, paths: Sequence[Path]) -> list[Any]:
    """What `mgq infer` answers."""
    return guesses([answer.to_json() for answer in predict(classifier, expand([str(path) for path in paths]))])


# ---- answers ----


@pytest.mark.parametrize("file", FILES)
def test_many_clients_get_the_answers_of_infer_whatever_runs_together(deployed: Path, file: str) -> None:
    if not (deployed / file).exists():
        pytest.skip("there is no linker here: the native file was not linked")
    classifier = open_file(deployed / file, "onnxruntime" if file.endswith(".onnx") else "auto")
    paths = photos(deployed)
    wanted = expected(classifier, paths)
    with served(classifier, Limits(gather_s=0.02, batch=16)) as (address, service), ThreadPoolExecutor(8) as clients:

        def ask(number: int) -> Any:
            return requests.post(f"{address}/predict", paths[number % 6].read_bytes(), timeout=PATIENCE_S).json()

        found = list(clients.map(ask, range(48)))
        together = requests.post(f"{address}/predict", files=form(paths), timeout=PATIENCE_S).json()
        metrics = service.figures.text().decode()
    assert [guesses(body["answers"])[0] for body in found] == [wanted[number % 6] for number in range(48)]
    assert guesses(together["answers"]) == wanted
    assert [answer["picture"] for answer in together["answers"]] == [path.name for path in paths]
    batches = float(re.findall(r"^mgq_batch_pictures_count (\S+)$", metrics, re.MULTILINE)[0])
    assert batches == 54 if file == "one.onnx" else batches < 54


def test_the_document_is_that_of_infer(answering: tuple[str, Service], deployed: Path, mgq: Mgq) -> None:
    path = photos(deployed)[0]
    said = mgq("infer", "-c", deployed / "any.onnx", "--engine", "onnxruntime", "--json", path)
    body = requests.post(f"{answering[0]}/predict", path.read_bytes(), timeout=PATIENCE_S).json()
    document = json.loads(said.out)
    for one in (body, document):
        del one["answers"][0]["milliseconds"], one["answers"][0]["picture"]
    assert body == document


def test_topk_and_fields_of_the_form(answering: tuple[str, Service], deployed: Path) -> None:
    path = photos(deployed)[0]
    url = f"{answering[0]}/predict"
    one = requests.post(f"{url}?topk=1", path.read_bytes(), timeout=PATIENCE_S)
    assert one.status_code == 200 and len(one.json()["answers"][0]["guesses"]) == 1
    for said in ("0", "11", "many", ""):
        refused = requests.post(f"{url}?topk={said}", path.read_bytes(), timeout=PATIENCE_S)
        assert refused.status_code == 400 and one_line_about(refused.json()["error"], "give 1")
    field = requests.post(url, data={"a": "b"}, files=form([path]), timeout=PATIENCE_S)
    assert field.status_code == 400 and one_line_about(field.json()["error"], "no file", "curl -F")


def test_a_file_that_is_no_picture_gets_a_line_and_the_others_their_answers(
    answering: tuple[str, Service], deployed: Path
) -> None:
    url = f"{answering[0]}/predict"
    alone = requests.post(url, b"no picture", timeout=PATIENCE_S)
    assert alone.status_code == 422 and alone.json()["failed"] == 1
    assert one_line_about(alone.json()["error"], "the picture", "is not a picture")
    cut = photos(deployed)[0].read_bytes()[:-40]
    files = [("a", ("cut\n.png", cut)), *form(photos(deployed)[:1])]
    mixed = requests.post(url, files=files, timeout=PATIENCE_S)
    assert mixed.status_code == 200 and mixed.json()["failed"] == 1
    assert "cut short" in mixed.json()["answers"][0]["error"] and "guesses" in mixed.json()["answers"][1]
    empty = requests.post(url, b"", timeout=PATIENCE_S)
    assert empty.status_code == 400 and one_line_about(empty.json()["error"], "no picture", "curl -F")


def test_forms_that_are_none_get_a_line(answering: tuple[str, Service]) -> None:
    url = f"{answering[0]}/predict"
    for kind in ("multipart/form-data", "multipart/form-data; boundary=x"):
        refused = requests.post(url, b"--y\r\nrubbish", headers={"Content-Type": kind}, timeout=PATIENCE_S)
        assert refused.status_code == 400 and one_line_about(refused.json()["error"], "form")


def test_health_metrics_and_other_paths(answering: tuple[str, Service]) -> None:
    address, _ = answering
    health = requests.get(f"{address}/health", timeout=PATIENCE_S)
    assert health.status_code == 200 and health.json()["status"] == "ok" and health.json()["arch"] == ARCH
    metrics = requests.get(f"{address}/metrics", timeout=PATIENCE_S)
    assert metrics.headers["Content-Type"].startswith("text/plain")
    from prometheus_client.parser import text_string_to_metric_families

    names = {family.name for family in text_string_to_metric_families(metrics.text)}
    assert {"mgq_requests", "mgq_pictures", "mgq_request_seconds", "mgq_batch_pictures"} <= names
    missing = requests.get(f"{address}/nothing", timeout=PATIENCE_S)
    assert missing.status_code == 404 and "POST /predict" in missing.json()["error"]
    assert requests.get(f"{address}/predict", timeout=PATIENCE_S).status_code == 405


def test_pictures_run_one_by_one_where_more_at_a_time_gain_nothing(deployed: Path) -> None:
    sizes = {
        engine: Service(open_file(deployed / "any.onnx", engine), Limits()).batcher.most
        for engine in ("native", "onnxruntime", "openvino")
    }
    assert sizes == {"native": 1, "onnxruntime": 16, "openvino": 16}


def test_a_batch_that_the_file_does_not_take_is_refused(deployed: Path, mgq: Mgq) -> None:
    assert "the file takes one picture at a time" in the_error(
        mgq("serve", "-c", deployed / "one.onnx", "--batch", "4", "--port", "0")
    )


@pytest.mark.parametrize(
    ("file", "words", "mend"),
    [
        ("one.onnx", (), "give --batch, where the file takes more"),
        ("any.onnx", ("--engine", "native"), "give --batch, where"),
        ("any.onnx", ("--engine", "onnxruntime", "--batch", "1"), "give more by --batch"),
    ],
)
def test_a_wait_for_others_is_refused_where_each_picture_runs_alone(
    deployed: Path, mgq: Mgq, file: str, words: tuple[str, ...], mend: str
) -> None:
    said = the_error(mgq("serve", "-c", deployed / file, *words, "--wait", "5", "--port", "0"))
    assert one_line_about(said, "--wait", "each runs alone", mend)


# ---- limits ----


class Endless(io.RawIOBase):
    """A body of ``size`` bytes that is made while it is sent, and how much of it was taken."""

    def __init__(self, size: int) -> None:
        self.size, self.sent = size, 0

    def __iter__(self) -> Iterator[bytes]:
        while self.sent < self.size:
            self.sent += 1 << 16
            yield bytes(1 << 16)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("kind", ["image/jpeg", "multipart/form-data; boundary=x"])
def test_a_gigabyte_is_refused_while_it_is_read(
    answering: tuple[str, Service], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(servers, "HEAD_S", 1.0)  # the rest, which nobody wants, is not waited for any longer
    before = resident_bytes()
    body = Endless(1 << 30)
    start = b'--x\r\nContent-Disposition: form-data; name="p"; filename="p"\r\n\r\n' if "multipart" in kind else b""

    def pieces() -> Iterator[bytes]:
        yield start or b"\xff\xd8"
        yield from body

    with contextlib.suppress(requests.ConnectionError):
        refused = requests.post(
            f"{answering[0]}/predict", data=pieces(), headers={"Content-Type": kind}, timeout=PATIENCE_S
        )
        assert refused.status_code == 413 and one_line_about(refused.json()["error"], "20 MB")
    assert resident_bytes() - before < 150e6
    assert requests.get(f"{answering[0]}/health", timeout=PATIENCE_S).status_code == 200


def test_an_announced_gigabyte_is_refused_before_it_is_read(answering: tuple[str, Service]) -> None:
    with connection(answering[0]) as client:
        client.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 1073741824\r\n\r\n")
        assert client.recv(4096).startswith(b"HTTP/1.1 413")


@contextlib.contextmanager
def connection(address: str) -> Iterator[socket.socket]:
    host, _, port = address.removeprefix("http://").rpartition(":")
    with socket.create_connection((host, int(port)), PATIENCE_S) as client:
        yield client


def all_of(client: socket.socket) -> bytes:
    """What comes until the other side closes."""
    found = b""
    while piece := client.recv(1 << 16):
        found += piece
    return found


def test_a_slow_body_is_given_up(deployed: Path) -> None:
    classifier = open_file(deployed / "any.onnx", "onnxruntime")
    with served(classifier, Limits(body_s=0.3)) as (address, service), connection(address) as client:
        client.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nabc")
        assert client.recv(4096).startswith(b"HTTP/1.1 408")
        assert service.busy == 0


@pytest.mark.parametrize("sent", [b"", b"POST /predict HTTP/1.1\r\nHost: x\r\nX: "])
def test_a_connection_that_brings_no_request_is_closed(
    answering: tuple[str, Service], sent: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(servers, "HEAD_S", 0.2)
    with connection(answering[0]) as client:
        client.sendall(sent)
        assert all_of(client) == b""


class Held:
    """A network that waits until it is let go."""

    name = "held"
    batch: int | None = None

    def __init__(self, runtime: Any) -> None:
        self.runtime, self.free = runtime, threading.Event()

    def run(self, batch: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        assert self.free.wait(PATIENCE_S)
        found: npt.NDArray[np.float32] = self.runtime.run(batch)
        return found


@pytest.fixture
def held(deployed: Path) -> Iterator[tuple[Classifier, threading.Event]]:
    from dataclasses import replace

    classifier = open_file(deployed / "any.onnx", "onnxruntime")
    runtime = Held(classifier.network.runtime)
    yield replace(classifier, network=replace(classifier.network, runtime=runtime)), runtime.free
    runtime.free.set()


def wait_until(holds: Any) -> None:
    end = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_more_requests_than_may_be_are_told_to_come_again(
    held: tuple[Classifier, threading.Event], deployed: Path
) -> None:
    classifier, free = held
    content = photos(deployed)[0].read_bytes()
    with served(classifier, Limits(requests=2)) as (address, service), ThreadPoolExecutor(2) as clients:
        asked = [clients.submit(requests.post, f"{address}/predict", content, timeout=PATIENCE_S) for _ in range(2)]
        wait_until(lambda: service.busy == 2)
        refused = requests.post(f"{address}/predict", content, timeout=PATIENCE_S)
        assert refused.status_code == 503 and refused.headers["Retry-After"] == "1"
        assert one_line_about(refused.json()["error"], "2 requests", "again")
        assert requests.get(f"{address}/health", timeout=PATIENCE_S).status_code == 200
        free.set()
        assert [one.result().status_code for one in asked] == [200, 200]
        assert requests.post(f"{address}/predict", content, timeout=PATIENCE_S).status_code == 200


def test_an_answer_that_takes_too_long_is_given_up(held: tuple[Classifier, threading.Event], deployed: Path) -> None:
    classifier, free = held
    with served(classifier, Limits(answer_s=0.2)) as (address, service):
        refused = requests.post(f"{address}/predict", photos(deployed)[0].read_bytes(), timeout=PATIENCE_S)
        assert refused.status_code == 503 and one_line_about(refused.json()["error"], "0.2 s")
        free.set()
        wait_until(lambda: service.busy == 0)
        assert requests.post(f"{address}/predict", photos(deployed)[0].read_bytes()).status_code == 200


def test_a_failure_of_the_engine_is_told_to_both_sides_and_the_service_lives(
    held: tuple[Classifier, threading.Event], deployed: Path
) -> None:
    classifier, free = held
    free.set()
    content = photos(deployed)[0].read_bytes()
    told: list[str] = []

    def fail(_: object) -> None:
        raise RuntimeError("out of order\nfor now")

    with served(classifier, on_message=told.append) as (address, _):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(classifier.network.runtime, "run", fail)
            failed = requests.post(f"{address}/predict", content, timeout=PATIENCE_S)
        assert failed.status_code == 500 and one_line_about(failed.json()["error"], "RuntimeError", "out of order")
        assert len(told) == 1 and one_line_about(told[0], "out of order")
        assert requests.post(f"{address}/predict", content, timeout=PATIENCE_S).status_code == 200


def test_too_many_pictures_are_refused(deployed: Path) -> None:
    classifier = open_file(deployed / "any.onnx", "onnxruntime")
    with served(classifier, Limits(pictures=2)) as (address, _):
        refused = requests.post(f"{address}/predict", files=form(photos(deployed)[:3]), timeout=PATIENCE_S)
    assert refused.status_code == 400 and one_line_about(refused.json()["error"], "more than 2")


# ---- the command ----


@contextlib.contextmanager
def command(folder: Path, *words: str, pass_fds: Sequence[int] = ()) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """``mgq serve WORDS`` in a process of its own, and its address, once it answers."""
    process = subprocess.Popen(
        [sys.executable, "-m", "mgq", "serve", "-c", "any.onnx", "--engine", "onnxruntime", *words],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        pass_fds=pass_fds,
        env={**os.environ, "MGQ_CACHE": str(folder / "cache"), "PYTHONUNBUFFERED": "1"},
    )
    try:
        assert process.stdout is not None and process.stderr is not None
        line = process.stdout.readline()
        assert "answers" in line, process.stderr.read()
        yield process, line.split()[0]
    finally:
        process.kill()
        process.communicate()


def test_sigterm_lets_requests_end_accepts_no_more_and_exits_with_0(deployed: Path) -> None:
    content = photos(deployed)[0].read_bytes()
    with command(deployed, "--port", "0") as (process, address), connection(address) as client:
        head = f"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n".encode()
        client.sendall(head + content[:100])
        wait_until(lambda: "mgq_requests_in_work 1" in requests.get(f"{address}/metrics", timeout=PATIENCE_S).text)
        process.send_signal(signal.SIGTERM)

        def is_refused() -> bool:
            try:
                requests.get(f"{address}/health", timeout=PATIENCE_S)
            except requests.ConnectionError:
                return True
            return False

        wait_until(is_refused)
        client.sendall(content[100:])
        answer = all_of(client)
        assert answer.startswith(b"HTTP/1.1 200") and b'"failed":0' in answer
        assert process.wait(PATIENCE_S) == 0


def test_nothing_is_lost_where_one_process_takes_over_from_another(deployed: Path) -> None:
    contents = [path.read_bytes() for path in photos(deployed)]
    listening = open_socket("127.0.0.1", 0)
    listening.listen(64)
    url = f"{servers.address_of(listening)}/predict"
    statuses: list[int] = []
    stop = threading.Event()

    def ask() -> None:
        with requests.Session() as session:
            for number in range(100_000):
                if stop.is_set():
                    return
                statuses.append(session.post(url, contents[number % 6], timeout=PATIENCE_S).status_code)

    words = ("--fd", str(listening.fileno()))
    with ThreadPoolExecutor(4) as clients, contextlib.ExitStack() as processes:
        pass_fds = [listening.fileno()]
        first, _ = processes.enter_context(command(deployed, *words, pass_fds=pass_fds))
        asking = [clients.submit(ask) for _ in range(4)]
        try:
            wait_until(lambda: len(statuses) > 20)
            second, _ = processes.enter_context(command(deployed, *words, pass_fds=pass_fds))
            first.send_signal(signal.SIGTERM)
            assert first.wait(PATIENCE_S) == 0
            seen = len(statuses)
            wait_until(lambda: len(statuses) > seen + 20)
        finally:
            stop.set()
        for one in asking:
            one.result()
        second.send_signal(signal.SIGTERM)
        assert second.wait(PATIENCE_S) == 0
    listening.close()
    assert set(statuses) == {200}


def test_it_answers_where_nothing_can_be_kept(deployed: Path) -> None:
    content = photos(deployed)[0].read_bytes()
    environment = {"MGQ_CACHE": "/dev/null/full"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, "MGQ_CACHE", environment["MGQ_CACHE"])
        classifier = open_file(deployed / "any.onnx", "native")
    with served(classifier) as (address, _):
        assert requests.post(f"{address}/predict", content, timeout=PATIENCE_S).status_code == 200


def test_a_port_in_use_is_told_in_a_line(deployed: Path, mgq: Mgq) -> None:
    with open_socket("127.0.0.1", 0) as taken:
        taken.listen()
        port = str(taken.getsockname()[1])
        assert one_line_about(
            the_error(mgq("serve", "-c", deployed / "any.onnx", "--port", port)), port, "in use", "--port"
        )


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--host", "nowhere.invalid"], ["nowhere.invalid", "give another"]),
        (["--port", "70000"], ["--port 70000", "65,535"]),
        (["--fd", "999"], ["--fd 999", "no socket"]),
        (["--max-requests", "0"], ["--max-requests"]),
        (["-c", "weights.pkl"], ["weights.pkl", "mgq dump"]),
        (["-c", "missing.onnx"], ["missing.onnx"]),
    ],
)
def test_what_cannot_be_served_is_told_in_a_line(mgq: Mgq, words: list[str], parts: list[str]) -> None:
    assert one_line_about(the_error(mgq("serve", *words)), *parts)


# ---- the page ----

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
ARGUMENTS = "--no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-component-update"
DROP = """([text, name]) => {
  const bytes = Uint8Array.from(atob(text), (one) => one.charCodeAt(0));
  const moved = new DataTransfer();
  moved.items.add(new File([bytes], name, {type: 'image/png'}));
  const event = new DragEvent('drop', {dataTransfer: moved, bubbles: true, cancelable: true});
  document.getElementById('drop').dispatchEvent(event);
}"""


@pytest.fixture
def tab(tmp_path: Path) -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("there is no chromium to look at the page with: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            tmp_path / "profile", executable_path=CHROMIUM, args=ARGUMENTS.split(), headless=True
        )
        yield context.new_page()
        context.close()


def test_the_page_shows_what_is_in_pictures_that_are_chosen_or_dropped(
    tab: Any, answering: tuple[str, Service], deployed: Path, tmp_path: Path
) -> None:
    from playwright.sync_api import expect

    address, _ = answering
    complaints: list[str] = []
    asked: list[str] = []
    tab.on("console", lambda message: complaints.append(message.text))
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    tab.on("request", lambda request: asked.append(request.url))
    tab.set_viewport_size({"width": 800, "height": 900})
    tab.goto(f"{address}/")
    expect(tab.locator("#network")).to_contain_text(ARCH)
    assert complaints == [], complaints
    bad = tmp_path / "<b>no picture.png"
    bad.write_bytes(b"rubbish")
    first, second = photos(deployed)[:2]
    wanted = expected(open_file(deployed / "any.onnx", "onnxruntime"), [first, second])
    tab.set_input_files("#files", [first, bad])
    expect(tab.locator("article")).to_have_count(2)
    articles = tab.locator("article")
    assert "is not a picture" in articles.nth(0).inner_text() and bad.name in articles.nth(0).inner_text()
    assert [row.split("\t")[0] for row in articles.nth(1).locator("tr").all_inner_texts()] == [
        guess["class"] for guess in wanted[0]
    ]
    tab.evaluate(DROP, [base64.b64encode(second.read_bytes()).decode(), second.name])
    expect(tab.locator("article")).to_have_count(3)
    assert f"{wanted[1][0]['probability'] * 100:.1f} %" in articles.nth(0).inner_text()
    assert tab.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert all(url.startswith((address, "blob:", "data:")) for url in asked), asked
    shot = tmp_path / "page.png"
    tab.screenshot(path=shot)
    assert shot.read_bytes().startswith(b"\x89PNG")


def test_the_page_says_why_there_is_no_answer(tab: Any, deployed: Path, tmp_path: Path) -> None:
    from playwright.sync_api import expect

    large = tmp_path / "large.png"
    large.write_bytes(bytes(3000))
    classifier = open_file(deployed / "any.onnx", "onnxruntime")
    with served(classifier, Limits(body_bytes=2000)) as (address, _):
        tab.goto(f"{address}/")
        tab.set_input_files("#files", large)
        expect(tab.locator("#state")).to_contain_text("MB in one request")
