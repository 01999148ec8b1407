"""Downloads from a real server on this machine that can be told to misbehave."""

from __future__ import annotations

import contextlib
import errno
import gzip
import hashlib
import random
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from mgq.errors import FailureError, InputError
from mgq.events import Progress
from mgq.io import download as module
from mgq.io.download import Patience, Source, cache_folder, download, find_cached, sha256_of
from tests.fakes.download_server import CONTENT, Asked, Handler, Mood, Shelf, well
from tests.fakes.places import ROOT
from tests.fakes.small_disk import run_on_small_disk, the_line

OTHER_CONTENT = random.Random(8).randbytes(200_000)
HALF = len(CONTENT) // 2
QUICK = Patience(connect_s=10.0, read_s=20.0, tries=3, pause_s=0.01)  # patient with a busy machine
HURRIED = Patience(connect_s=10.0, read_s=0.3, tries=3, pause_s=0.01)  # for servers that hang on purpose
UNHURRIED = Patience(connect_s=20.0, read_s=20.0, tries=3, pause_s=0.01)


def drops(handler: Handler, asked: Asked) -> None:
    rest = handler.head_and_rest(asked)
    handler.body(asked, rest[: len(rest) // 2])


def hangs_up_at_once(handler: Handler, asked: Asked) -> None:
    pass


def hangs(handler: Handler, asked: Asked) -> None:
    handler.shelf.go_on.wait(20)


def hangs_half_way(handler: Handler, asked: Asked) -> None:
    rest = handler.head_and_rest(asked)
    handler.body(asked, rest[: len(rest) // 2])
    handler.shelf.go_on.wait(20)
    handler.body(asked, rest[len(rest) // 2 :])


def knows_no_ranges(handler: Handler, asked: Asked) -> None:
    handler.head(200, {"Content-Length": str(len(handler.shelf.content))})
    handler.body(asked, handler.shelf.content)


def ignores_if_range(handler: Handler, asked: Asked) -> None:
    handler.body(asked, handler.head_and_rest(asked, heed_if_range=False))


def sends_the_wrong_range(handler: Handler, asked: Asked) -> None:
    total = len(handler.shelf.content)
    handler.head(206, {"Content-Range": f"bytes 0-{total - 1}/{total}", "Content-Length": str(total)})
    handler.body(asked, handler.shelf.content)


def in_chunks(handler: Handler, asked: Asked) -> None:
    handler.head(200, {"Transfer-Encoding": "chunked"})
    data = handler.shelf.content
    handler.body(asked, b"%x\r\n%b\r\n0\r\n\r\n" % (len(data), data))


def until_it_closes(handler: Handler, asked: Asked) -> None:
    handler.head(200, {})
    handler.body(asked, handler.shelf.content)


def says(status: int) -> Mood:
    def mood(handler: Handler, asked: Asked) -> None:
        handler.head(status, {"Content-Length": "0"})

    return mood


def sends_to(place: str) -> Mood:
    def mood(handler: Handler, asked: Asked) -> None:
        handler.head(302, {"Location": place, "Content-Length": "0"})

    return mood


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


def refusal(source: Source, folder: Path, patience: Patience = QUICK) -> str:
    """The one line that a download ends in. It leaves no file of the final name."""
    with pytest.raises(FailureError) as caught:
        download(source, folder, patience=patience)
    assert not (folder / source.name).exists()
    return the_line(caught)


def is_whole(path: Path, content: bytes = CONTENT) -> bool:
    """The file is there, and nothing is left of the way to it."""
    return path.read_bytes() == content and not [p for p in path.parent.iterdir() if ".part" in p.name]


def test_a_file_is_fetched_once_and_then_found(shelf: Shelf, tmp_path: Path) -> None:
    source = shelf.source()
    assert find_cached(source, tmp_path) is None
    path = download(source, tmp_path, patience=QUICK)
    assert path == tmp_path / "weights.bin"
    assert is_whole(path)
    assert download(source, tmp_path, patience=QUICK) == path == find_cached(source, tmp_path)
    assert len(shelf.asked) == 1


def test_progress_is_in_bytes_and_ends_at_the_size(shelf: Shelf, tmp_path: Path) -> None:
    seen: list[Progress] = []
    download(shelf.source(), tmp_path, seen.append, patience=QUICK)
    assert seen[0] == Progress("download weights.bin", 0, len(CONTENT), "B")
    assert seen[-1] == Progress("download weights.bin", len(CONTENT), len(CONTENT), "B")
    assert [step.done for step in seen] == sorted(step.done for step in seen)
    assert len(seen) > 2


def test_what_a_killed_download_left_of_its_mark_is_taken_away(shelf: Shelf, tmp_path: Path) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    left = tmp_path / f".weights.bin.part.json.{gone.pid}-0123456789abcdef.part"
    left.touch()
    assert is_whole(download(shelf.source(), tmp_path, patience=QUICK))
    assert not left.exists()


def test_a_file_that_rotted_in_the_cache_is_noticed_and_fetched_again(shelf: Shelf, tmp_path: Path) -> None:
    path = download(shelf.source(), tmp_path, patience=QUICK)
    path.write_bytes(b"\xff" + CONTENT[1:])  # of the right size
    assert find_cached(shelf.source(), tmp_path) is None
    assert is_whole(download(shelf.source(), tmp_path, patience=QUICK))
    assert len(shelf.asked) == 2


def test_a_dropped_connection_is_taken_up_where_it_broke(shelf: Shelf, tmp_path: Path) -> None:
    shelf.moods.extend([drops, drops])
    assert is_whole(download(shelf.source(), tmp_path, patience=QUICK))
    assert [asked.first_byte for asked in shelf.asked] == [None, HALF, HALF + HALF // 2]
    assert sum(asked.sent for asked in shelf.asked) == len(CONTENT)
    assert shelf.asked[1].headers["If-Range"] == '"one"'


def test_a_connection_that_drops_before_it_answers_is_tried_again(shelf: Shelf, tmp_path: Path) -> None:
    shelf.moods.extend([hangs_up_at_once])
    assert is_whole(download(shelf.source(), tmp_path, patience=QUICK))


def test_a_server_that_keeps_dropping_is_given_up_and_taken_up_the_next_time(shelf: Shelf, tmp_path: Path) -> None:
    shelf.moods.extend([drops] * QUICK.tries)
    message = refusal(shelf.source(), tmp_path)
    assert "could not download weights.bin from 127.0.0.1" in message
    assert f"gave up at try {QUICK.tries}" in message
    assert len(shelf.asked) == QUICK.tries
    assert is_whole(download(shelf.source(), tmp_path, patience=QUICK))
    assert sum(asked.sent for asked in shelf.asked) == len(CONTENT)


def test_a_server_without_ranges_is_asked_for_all_again(shelf: Shelf, tmp_path: Path) -> None:
    shelf.moods.extend([drops, knows_no_ranges])
    assert is_whole(download(shelf.source(), tmp_path, patience=QUICK))
    assert shelf.asked[1].sent == len(CONTENT)


@pytest.mark.parametrize("answer", [says(416), sends_the_wrong_range])
def test_a_range_that_is_not_the_one_asked_for_starts_over(shelf: Shelf, tmp_path: Path, answer: Mood) -> None:
    shelf.moods.extend([drops, answer])
    assert is_whole(download(shelf.source(), tmp_path, patience=QUICK))
    assert [asked.first_byte for asked in shelf.asked] == [None, HALF, None]


def leave_half(shelf: Shelf, folder: Path, source: Source) -> None:
    shelf.moods.extend([drops])
    refusal(source, folder, replace(QUICK, tries=1))
    assert (folder / f"{source.name}.part").stat().st_size == HALF
    shelf.asked.clear()


@pytest.mark.parametrize("later", [well, ignores_if_range])
@pytest.mark.parametrize("mark", ["ETag", "Last-Modified"])
def test_a_file_that_changed_between_tries_is_not_spliced(shelf: Shelf, tmp_path: Path, later: Mood, mark: str) -> None:
    shelf.headers = {mark: '"one"' if mark == "ETag" else "Mon, 03 Nov 2025 10:00:00 GMT"}
    # With the size alone to go by, only the mark can tell.
    source = Source(f"http://127.0.0.1:{shelf.port}/w", "w", len(CONTENT), None)

    def changes(handler: Handler, asked: Asked) -> None:
        shelf.content = OTHER_CONTENT
        shelf.headers = {mark: '"two"' if mark == "ETag" else "Tue, 04 Nov 2025 10:00:00 GMT"}
        later(handler, asked)

    shelf.moods.extend([drops, changes])
    assert is_whole(download(source, tmp_path, patience=QUICK), OTHER_CONTENT)
    assert shelf.asked[1].first_byte == HALF


def test_pieces_of_two_versions_that_no_mark_tells_apart_are_fetched_anew(shelf: Shelf, tmp_path: Path) -> None:
    shelf.headers = {}
    shelf.content = OTHER_CONTENT
    leave_half(shelf, tmp_path, shelf.source())
    shelf.content = CONTENT
    assert is_whole(download(shelf.source(), tmp_path, patience=QUICK))
    assert [asked.first_byte for asked in shelf.asked] == [HALF, None]


@pytest.mark.parametrize("headers", [{}, {"ETag": 'W/"one"'}])
def test_with_neither_a_mark_nor_a_hash_nothing_is_taken_up(
    shelf: Shelf, tmp_path: Path, headers: dict[str, str]
) -> None:
    shelf.headers = headers
    shelf.moods.extend([drops])
    assert is_whole(download(replace(shelf.source(), sha256=None), tmp_path, patience=QUICK))
    assert [asked.first_byte for asked in shelf.asked] == [None, None]


def test_a_weak_etag_gives_way_to_the_date(shelf: Shelf, tmp_path: Path) -> None:
    date = "Mon, 03 Nov 2025 10:00:00 GMT"
    shelf.headers = {"ETag": 'W/"one"', "Last-Modified": date}
    shelf.moods.extend([drops, ignores_if_range])
    assert is_whole(download(shelf.source(), tmp_path, patience=QUICK))
    assert shelf.asked[1].headers["If-Range"] == date


def test_the_rest_of_a_file_that_grew_is_not_fetched(shelf: Shelf, tmp_path: Path) -> None:
    shelf.headers = {}
    leave_half(shelf, tmp_path, shelf.source())
    shelf.content = CONTENT + b"more"
    assert f"{len(CONTENT) + 4} bytes, expected {len(CONTENT)}" in refusal(shelf.source(), tmp_path)
    assert [asked.first_byte for asked in shelf.asked] == [HALF, None]


def test_a_part_from_another_address_is_not_used(shelf: Shelf, tmp_path: Path) -> None:
    leave_half(shelf, tmp_path, shelf.source())
    moved = replace(shelf.source(), url=f"http://127.0.0.1:{shelf.port}/moved")
    assert is_whole(download(moved, tmp_path, patience=QUICK))
    assert [asked.first_byte for asked in shelf.asked] == [None]


@pytest.mark.parametrize("origin", ["", "{", "[]", '{"url": 1}', '{"url": "x", "mark": 3}'])
def test_a_part_with_a_torn_note_beside_it_is_not_used(shelf: Shelf, tmp_path: Path, origin: str) -> None:
    leave_half(shelf, tmp_path, shelf.source())
    (tmp_path / "weights.bin.part.json").write_text(origin)
    assert is_whole(download(shelf.source(), tmp_path, patience=QUICK))
    assert [asked.first_byte for asked in shelf.asked] == [None]


@pytest.mark.parametrize("restarted", [False, True])
def test_without_a_hash_a_part_is_used_only_if_the_machine_was_not_restarted(
    shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, restarted: bool
) -> None:
    source = replace(shelf.source(), size=None, sha256=None)
    leave_half(shelf, tmp_path, source)
    if restarted:
        monkeypatch.setattr("mgq.io.download.boot_id", lambda: "another")
    assert is_whole(download(source, tmp_path, patience=QUICK))
    assert [asked.first_byte for asked in shelf.asked] == [None if restarted else HALF]


def test_a_file_of_unknown_size_and_hash_is_whole_when_the_stated_length_has_come(shelf: Shelf, tmp_path: Path) -> None:
    source = replace(shelf.source(), size=None, sha256=None)
    shelf.moods.extend([drops])
    refusal(source, tmp_path, replace(QUICK, tries=1))
    assert not (tmp_path / source.name).exists()
    assert is_whole(download(source, tmp_path, patience=QUICK))


def test_a_part_that_was_whole_is_checked_without_the_network(shelf: Shelf, tmp_path: Path) -> None:
    leave_half(shelf, tmp_path, shelf.source())
    (tmp_path / "weights.bin.part").write_bytes(CONTENT)
    assert is_whole(download(shelf.source(), tmp_path, patience=QUICK))
    assert shelf.asked == []


def test_a_part_that_is_too_long_is_not_used(shelf: Shelf, tmp_path: Path) -> None:
    leave_half(shelf, tmp_path, shelf.source())
    (tmp_path / "weights.bin.part").write_bytes(CONTENT + b"x")
    assert is_whole(download(shelf.source(), tmp_path, patience=QUICK))
    assert [asked.first_byte for asked in shelf.asked] == [None]


def test_a_wrong_hash_is_refused_and_the_part_deleted(shelf: Shelf, tmp_path: Path) -> None:
    shelf.content = OTHER_CONTENT
    message = refusal(shelf.source(), tmp_path)
    assert hashlib.sha256(CONTENT).hexdigest()[:12] in message
    assert hashlib.sha256(OTHER_CONTENT).hexdigest()[:12] in message
    assert "weights.bin from 127.0.0.1 is not the file it should be" in message
    assert str(tmp_path / "weights.bin") in message
    assert "--checkpoint FILE" in message
    assert [path.name for path in tmp_path.iterdir()] == [".weights.bin.lock"]
    assert len(shelf.asked) == 1


def test_a_prefix_of_the_hash_is_enough_to_tell(shelf: Shelf, tmp_path: Path) -> None:
    digits = hashlib.sha256(CONTENT).hexdigest()
    right = Source(shelf.source().url, "right", None, None, digits[:8].upper())
    wrong = Source(shelf.source().url, "wrong", None, None, "0" * 8)
    assert is_whole(download(right, tmp_path, patience=QUICK))
    assert f"sha256 {digits[:12]}, expected 00000000" in refusal(wrong, tmp_path)


@pytest.mark.parametrize("length", [HALF, 2 * len(CONTENT)])
def test_a_wrong_declared_length_is_refused_before_it_is_fetched(shelf: Shelf, tmp_path: Path, length: int) -> None:
    shelf.content = bytes(length)
    seen: list[Progress] = []
    with pytest.raises(FailureError) as caught:
        download(shelf.source(), tmp_path, seen.append, patience=QUICK)
    assert f"{length} bytes, expected {len(CONTENT)}" in the_line(caught)
    assert seen == []
    assert len(shelf.asked) == 1


@pytest.mark.parametrize("mood", [in_chunks, until_it_closes])
def test_a_server_that_does_not_say_the_length_will_do(shelf: Shelf, tmp_path: Path, mood: Mood) -> None:
    shelf.moods.extend([mood, mood])
    assert is_whole(download(shelf.source(), tmp_path, patience=QUICK))
    seen: list[Progress] = []
    unknown = replace(shelf.source(), name="unknown", size=None)
    assert is_whole(download(unknown, tmp_path, seen.append, patience=QUICK))
    assert {step.total for step in seen} == {None}


@pytest.mark.parametrize("mood", [in_chunks, until_it_closes])
def test_a_server_that_sends_too_much_is_cut_off(shelf: Shelf, tmp_path: Path, mood: Mood) -> None:
    shelf.content = bytes(50 * len(CONTENT))
    shelf.moods.extend([mood])
    seen: list[Progress] = []
    with pytest.raises(FailureError) as caught:
        download(shelf.source(), tmp_path, seen.append, patience=QUICK)
    assert f"more than the expected {len(CONTENT)} bytes" in the_line(caught)
    assert seen[-1].done <= len(CONTENT)
    assert [path.name for path in tmp_path.iterdir()] == [".weights.bin.lock"]


def test_a_server_that_sends_too_little_is_given_up(shelf: Shelf, tmp_path: Path) -> None:
    shelf.content = CONTENT[:HALF]
    shelf.moods.extend([until_it_closes] * QUICK.tries)
    assert f"ended after {HALF} of {len(CONTENT)} bytes" in refusal(shelf.source(), tmp_path)


@pytest.mark.parametrize("mood", [well, in_chunks])
def test_without_a_declared_size_there_is_a_bound(
    shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mood: Mood
) -> None:
    monkeypatch.setattr(module, "LARGEST_UNDECLARED", HALF)
    shelf.moods.extend([mood])
    assert f"over {HALF} bytes" in refusal(replace(shelf.source(), size=None), tmp_path)


def test_a_content_encoding_is_left_as_it_is(shelf: Shelf, tmp_path: Path) -> None:
    packed = gzip.compress(CONTENT)
    shelf.content = packed
    shelf.headers["Content-Encoding"] = "gzip"
    assert is_whole(download(shelf.source(packed), tmp_path, patience=QUICK), packed)
    assert shelf.asked[0].headers["Accept-Encoding"] == "identity"


@pytest.mark.parametrize(("status", "words"), [(404, "404 Not Found"), (403, "403 Forbidden"), (418, "418")])
def test_a_refusing_server_is_not_asked_twice(shelf: Shelf, tmp_path: Path, status: int, words: str) -> None:
    shelf.moods.extend([says(status)])
    source = shelf.source()
    message = refusal(source, tmp_path)
    assert message.startswith(f"could not download weights.bin from 127.0.0.1 (the server answered {words}")
    assert message.endswith(
        f"): get {source.url} on another machine, and put it at {tmp_path / 'weights.bin'}, "
        "or pass it with --checkpoint FILE"
    )
    assert len(shelf.asked) == 1


@pytest.mark.parametrize("status", [500, 503, 429])
def test_a_server_in_trouble_is_asked_again(shelf: Shelf, tmp_path: Path, status: int) -> None:
    shelf.moods.extend([says(status)])
    assert is_whole(download(shelf.source(), tmp_path, patience=QUICK))


def test_a_server_that_stays_in_trouble_is_given_up(shelf: Shelf, tmp_path: Path) -> None:
    shelf.moods.extend([says(500)] * QUICK.tries)
    assert "500 Internal Server Error; gave up at try 3" in refusal(shelf.source(), tmp_path)
    assert len(shelf.asked) == QUICK.tries


def test_a_part_of_something_not_asked_for_is_refused(shelf: Shelf, tmp_path: Path) -> None:
    shelf.moods.extend([sends_the_wrong_range])
    assert "206 Partial Content" in refusal(shelf.source(), tmp_path)


def test_a_hanging_server_is_given_up(shelf: Shelf, tmp_path: Path) -> None:
    shelf.moods.extend([hangs])
    assert "nothing came for 0.3 s" in refusal(shelf.source(), tmp_path, HURRIED)
    assert len(shelf.asked) == 1


def test_a_server_that_hangs_half_way_is_asked_for_the_rest(shelf: Shelf, tmp_path: Path) -> None:
    shelf.moods.extend([hangs_half_way])
    assert is_whole(download(shelf.source(), tmp_path, patience=replace(HURRIED, read_s=2.0)))
    assert [asked.first_byte for asked in shelf.asked] == [None, HALF]


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
    return port


def test_a_refused_connection_is_one_line_at_once(tmp_path: Path) -> None:
    source = Source(f"http://127.0.0.1:{closed_port()}/w", "w", 1, None)
    message = refusal(source, tmp_path, replace(QUICK, tries=100, pause_s=60))
    assert "(Connection refused)" in message


def test_a_machine_that_does_not_answer_is_one_line_at_once(tmp_path: Path) -> None:
    # Once the queue of a server that accepts nobody is full, the system leaves connections hanging.
    with contextlib.ExitStack() as queue:
        server = queue.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(4):
            waiting = queue.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(server.getsockname())
        source = Source(f"http://127.0.0.1:{server.getsockname()[1]}/w", "w", 1, None)
        message = refusal(source, tmp_path, replace(QUICK, connect_s=0.3, tries=100, pause_s=60))
    assert "(no connection within 0.3 s)" in message


def test_a_name_that_is_not_resolved_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    message = refusal(Source("https://weights.invalid/w", "w", 1, None), tmp_path)
    assert message.startswith("could not download w from weights.invalid (the host's name cannot be resolved")


@pytest.mark.parametrize("there", [True, False])
def test_a_proxy_in_the_way_is_one_line(
    shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    port = shelf.port if there else closed_port()
    monkeypatch.setenv("https_proxy", f"http://user:secret@127.0.0.1:{port}")
    message = refusal(Source("https://weights.invalid/w", "w", 1, None), tmp_path)
    assert "the proxy does not let it through: " in message
    assert ("403 Not from here" if there else "Connection refused") in message
    assert "secret" not in message


def test_a_server_that_does_not_speak_tls_is_one_line(shelf: Shelf, tmp_path: Path) -> None:
    source = replace(shelf.source(), url=f"https://127.0.0.1:{shelf.port}/w")
    assert "no secure connection" in refusal(source, tmp_path)


def test_a_damaged_file_that_cannot_be_replaced_is_told_of_and_kept(shelf: Shelf, tmp_path: Path) -> None:
    path = tmp_path / "weights.bin"
    path.write_bytes(b"copied by hand, in part")
    shelf.moods.extend([says(403)])
    with pytest.raises(FailureError) as caught:
        download(shelf.source(), tmp_path, patience=QUICK)
    assert "the cached one is damaged: 23 bytes, expected 200000" in the_line(caught)
    assert path.exists()


def test_redirects_are_followed_and_resumed_through(shelf: Shelf, tmp_path: Path) -> None:
    shelf.moods.extend([sends_to("/there"), sends_to("elsewhere?a=b"), drops, sends_to("/there")])
    assert is_whole(download(shelf.source(), tmp_path, patience=QUICK))
    assert [asked.first_byte for asked in shelf.asked] == [None, None, None, HALF, HALF]


@pytest.mark.parametrize(
    "place",
    [
        "file:///etc/hostname",
        "http://example.org/w",
        "http://127.0.0.1@example.org/w",
        "http://example.org\\@127.0.0.1/w",
        "ftp://127.0.0.1/w",
        "http://[::2/w",
        "http://exam\nple.org/w",
    ],
)
def test_a_redirect_that_leaves_https_is_refused(shelf: Shelf, tmp_path: Path, place: str) -> None:
    shelf.moods.extend([sends_to(place.replace("\n", "%0A"))])
    message = refusal(shelf.source(), tmp_path)
    assert "is not https" in message or "cannot be understood" in message
    assert len(shelf.asked) == 1


def test_the_body_of_a_redirect_is_not_read(shelf: Shelf, tmp_path: Path) -> None:
    def goes_on_for_ever(handler: Handler, asked: Asked) -> None:
        handler.head(302, {"Location": "/there"})
        while not shelf.go_on.is_set():
            handler.body(asked, bytes(1 << 20))

    shelf.moods.extend([goes_on_for_ever])
    assert is_whole(download(shelf.source(), tmp_path, patience=QUICK))


def test_redirects_have_a_bound(shelf: Shelf, tmp_path: Path) -> None:
    shelf.moods.extend([sends_to("/again")] * 100)
    assert "more than 5 redirects" in refusal(shelf.source(), tmp_path)
    assert len(shelf.asked) == 6


@pytest.mark.parametrize("url", ["http://example.org/w", "file:///etc/hostname", "ftp://a/w", "w", "", "https://"])
def test_an_address_that_is_not_https_is_refused(tmp_path: Path, url: str) -> None:
    assert "is not https" in refusal(Source(url, "w", 1, None), tmp_path)


def test_a_server_elsewhere_cannot_send_us_to_this_machine(
    shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = shelf.source().url
    real_get = module._Transfer._get

    def get(transfer: module._Transfer, session: object, url: str, headers: dict[str, str]) -> object:
        return real_get(transfer, session, here, headers)  # type: ignore[arg-type]

    # The server here stands for the one elsewhere.
    monkeypatch.setattr(module._Transfer, "_get", get)
    shelf.moods.extend([sends_to(here)])
    message = refusal(replace(shelf.source(), url="https://weights.invalid/w"), tmp_path)
    assert "which is not https" in message
    assert len(shelf.asked) == 1


SCRIPT = """
import sys
from pathlib import Path
from mgq.io.download import Source, download

def tell(progress):
    print(progress.what, progress.done, flush=True)

url, name, size, sha256, folder = sys.argv[1:]
print(download(Source(url, name, int(size), sha256), Path(folder), tell), flush=True)
"""


def in_another_process(source: Source, folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SCRIPT, source.url, source.name, str(source.size), str(source.sha256)]
    return subprocess.Popen([*command, str(folder)], cwd=ROOT, stdout=subprocess.PIPE, text=True)


def read_until(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdout is not None
    for told in process.stdout:
        if told.startswith(line):
            return
    raise AssertionError(f"the process ended and never said {line!r}")


def test_a_killed_download_is_taken_up_by_the_next_process(shelf: Shelf, tmp_path: Path) -> None:
    shelf.moods.extend([hangs_half_way])
    with in_another_process(shelf.source(), tmp_path) as process:
        read_until(process, f"download weights.bin {HALF}")
        process.send_signal(signal.SIGKILL)
    assert not (tmp_path / "weights.bin").exists()
    assert is_whole(download(shelf.source(), tmp_path, patience=UNHURRIED))
    assert [asked.first_byte for asked in shelf.asked] == [None, HALF]


def test_of_two_processes_one_fetches_and_the_other_waits(shelf: Shelf, tmp_path: Path) -> None:
    shelf.moods.extend([hangs_half_way])
    with in_another_process(shelf.source(), tmp_path) as first:
        read_until(first, f"download weights.bin {HALF}")
        with in_another_process(shelf.source(), tmp_path) as second:
            read_until(second, f"wait for another download of weights.bin {HALF}")
            shelf.go_on.set()
            read_until(first, str(tmp_path / "weights.bin"))
            read_until(second, str(tmp_path / "weights.bin"))
    assert (first.returncode, second.returncode) == (0, 0)
    assert is_whole(tmp_path / "weights.bin")
    assert len(shelf.asked) == 1


def test_an_interrupt_leaves_a_part_to_go_on_from(shelf: Shelf, tmp_path: Path) -> None:
    shelf.moods.extend([drops])

    def interrupt(progress: Progress) -> None:
        if progress.done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        download(shelf.source(), tmp_path, interrupt, patience=QUICK)
    assert not (tmp_path / "weights.bin").exists()
    assert is_whole(download(shelf.source(), tmp_path, patience=QUICK))
    assert sum(asked.sent for asked in shelf.asked) < 2 * len(CONTENT)
    assert shelf.asked[1].first_byte


def test_a_listeners_own_error_is_not_taken_for_a_write_error(shelf: Shelf, tmp_path: Path) -> None:
    def closed(_: Progress) -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    with pytest.raises(BrokenPipeError):
        download(shelf.source(), tmp_path, closed, patience=QUICK)


def test_a_disk_that_fills_up_is_one_line(shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module, "_write_all", full)
        message = refusal(shelf.source(), tmp_path)
    assert str(tmp_path / "weights.bin.part") in message
    assert "full: free some space, or set MGQ_CACHE" in message
    assert is_whole(download(shelf.source(), tmp_path, patience=QUICK))


def test_a_really_full_disk_is_one_line(shelf: Shelf, tmp_path: Path) -> None:
    source = shelf.source()
    script = f"""
import sys
from pathlib import Path
from mgq.errors import FailureError
from mgq.io.download import Source, download

folder = Path(sys.argv[1])
try:
    download(Source({source.url!r}, "w", {source.size}, {source.sha256!r}), folder)
except FailureError as error:
    print(error)
print((folder / "w").exists())
"""
    message, there = run_on_small_disk(tmp_path, script).splitlines()
    assert "w.part: the disk or your quota is full: free some space" in message
    assert there == "False"


def test_a_cache_that_cannot_be_written_is_refused_with_the_variable(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError) as caught:
        download(Source("https://weights.invalid/w", "w", 1, None), tmp_path / "file" / "below")
    assert "MGQ_CACHE" in the_line(caught)


def test_a_folder_in_the_files_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "w").mkdir()
    with pytest.raises(InputError) as caught:
        download(Source("https://weights.invalid/w", "w", 1, None), tmp_path)
    assert "is a folder where a file should be" in the_line(caught)


def test_a_whole_file_in_a_folder_that_cannot_be_written_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "w").write_bytes(CONTENT)

    def no_writing(*_: object) -> None:
        raise AssertionError("wrote to the cache")

    monkeypatch.setattr(module, "ensure_writable_folder", no_writing)
    digits = hashlib.sha256(CONTENT).hexdigest()
    assert download(Source("https://weights.invalid/w", "w", None, digits), tmp_path) == tmp_path / "w"


def test_the_cache_is_where_the_variable_says_or_in_the_users_own(
    shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MGQ_CACHE", str(tmp_path / "chosen"))
    assert cache_folder() == tmp_path / "chosen"
    assert download(shelf.source(), patience=QUICK) == tmp_path / "chosen" / "weights.bin"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MGQ_CACHE", "~/mine")
    assert cache_folder() == tmp_path / "mine"
    monkeypatch.setenv("MGQ_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "mgq"


@pytest.mark.parametrize(
    "wrong",
    [
        {"name": ""},
        {"name": "../w"},
        {"name": "a/w"},
        {"name": ".hidden"},
        {"size": 0},
        {"sha256": "abc"},
        {"sha256": "g" * 64},
        {"sha256_prefix": "12"},
    ],
)
def test_a_source_that_cannot_be_right_is_refused(wrong: dict[str, object]) -> None:
    fields: dict[str, object] = {"url": "https://a/w", "name": "w", "size": 1, "sha256": None, **wrong}
    with pytest.raises(InputError) as caught:
        Source(**fields)  # type: ignore[arg-type]
    the_line(caught)


def test_sha256_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "w").write_bytes(3 * bytes(1 << 20))
    assert sha256_of(tmp_path / "w") == hashlib.sha256(3 * bytes(1 << 20)).hexdigest()
