"""Downloads files: a file is whole and verified, or it is not there."""

from __future__ import annotations

import hashlib
import io
import json
import re
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mgq.errors import FailureError, InputError, printable
from mgq.events import OnProgress, Progress, log_progress
from mgq.io.atomic import (
    drop_abandoned,
    ensure_writable_folder,
    explain_write_errors,
    put_in_place,
    write_text_atomically,
)
from mgq.io.locks import hold_lock
from mgq.io.private_cache import CACHE_VARIABLE
from mgq.io.private_cache import cache_folder as cache_folder

if TYPE_CHECKING:
    import requests

LARGEST_UNDECLARED = 2 << 30  # bytes taken from a server where the source declares no size
_OTHER_CACHE = f"set {CACHE_VARIABLE} to another folder"
_CHUNK = 1 << 16  # bytes
_REDIRECTS = 5
_LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1", "[::1]"})
_PASSING_STATUSES = frozenset({408, 425, 429, *range(500, 600)})


@dataclass(frozen=True)
class Source:
    """A file to download, and how it is verified.

    ``name`` is the file's name in the cache folder, ``size`` is in bytes, ``sha256`` is 64 hexadecimal digits
    and ``sha256_prefix`` the first few of them, where no more is published. Where none of the three is known, the
    server must state the length: nothing else shows whether a file is complete.
    Raises InputError for values that cannot be.
    """

    url: str
    name: str
    size: int | None = None
    sha256: str | None = None
    sha256_prefix: str | None = None

    def __post_init__(self) -> None:
        name = printable(self.name)
        if not self.name or self.name.startswith(".") or set(self.name) & set("/\\\0"):
            raise InputError(f"{self.name!r} cannot be the name of a cached file: give a plain file name")
        if self.size is not None and self.size < 1:
            raise InputError(f"the size of {name} cannot be {self.size}: give it in bytes, or None")
        if self.sha256 is not None and not re.fullmatch("[0-9a-fA-F]{64}", self.sha256):
            raise InputError(f"the sha256 of {name} is not 64 hexadecimal digits: correct it")
        if self.sha256_prefix is not None and not re.fullmatch("[0-9a-fA-F]{6,64}", self.sha256_prefix):
            raise InputError(f"the sha256_prefix of {name} is not 6 to 64 hexadecimal digits: correct it")

    @property
    def expected_digits(self) -> str:
        """The known digits of the SHA-256, lower case; empty when none is known."""
        return (self.sha256 or self.sha256_prefix or "").lower()


@dataclass(frozen=True)
class Patience:
    """How long to wait for a server (seconds) and how often to try. The pause doubles after every try."""

    connect_s: float = 10.0
    read_s: float = 30.0
    tries: int = 5
    pause_s: float = 0.5


_PATIENCE = Patience()


def find_cached(source: Source, folder: Path | None = None) -> Path | None:
    """The file in the cache if it is there with the right size and hash, else None. No network is touched.

    Raises InputError when there is something that cannot be read, and FailureError when the disk is broken.
    """
    path = (folder or cache_folder()) / source.name
    return path if _fault(path, source) is None else None


def download(
    source: Source,
    folder: Path | None = None,
    on_progress: OnProgress = log_progress,
    *,
    patience: Patience = _PATIENCE,
) -> Path:
    """The path of the file in ``folder`` (the cache folder by default), fetched unless it is there already.

    The file's size and SHA-256 are checked at every use, and a damaged one is fetched again. An interrupted
    download leaves ``NAME.part`` and goes on from there the next time, if the server still has the same file.
    The final name appears only after the check. When two processes want the same file, one fetches and the
    other waits. Progress is in bytes.

    Addresses are https, or http on this machine itself, and so are the redirects, at most five. Proxies are
    taken from the usual environment variables.

    Raises InputError when the folder cannot be written; FailureError when the network or the server refuses,
    the disk is full, or what came is not the file that was expected. The message says what to do instead.
    """
    folder = folder or cache_folder()
    path = folder / source.name
    if _fault(path, source) is None:
        return path
    ensure_writable_folder(folder, _OTHER_CACHE)

    def report_other() -> None:
        done = _size_or_zero(_part_of(path))
        on_progress(Progress(f"wait for another download of {source.name}", done, source.size, "B"))

    with hold_lock(path, _OTHER_CACHE, report_other):
        if _fault(path, source) is not None:
            _Transfer(source, path, on_progress, patience).run()
    return path


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, 64 lower-case hexadecimal digits. Raises OSError."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _fault(path: Path, source: Source) -> str | None:
    """What is wrong with the file at ``path``, in words, or None when it is the right one."""
    try:
        if path.is_dir():
            raise InputError(f"{printable(path)} is a folder where a file should be: move it away")
        size = path.stat().st_size
        if source.size is not None and size != source.size:
            return f"{size} bytes, expected {source.size}"
        digits = sha256_of(path) if source.expected_digits else ""
    except (FileNotFoundError, NotADirectoryError):
        return "not there"
    except OSError as error:
        kind = InputError if isinstance(error, PermissionError) else FailureError
        raise kind(f"cannot read {printable(path)}: {error.strerror}: mend that, or {_OTHER_CACHE}") from error
    if not digits.startswith(source.expected_digits):
        return f"sha256 {digits[:12]}, expected {source.expected_digits[:12]}"
    return None


class _PassingError(Exception):
    """The server or the connection gave up in a way that may pass. The text says why, in words."""


class _RefusalError(Exception):
    """Raised where a retry cannot help. The text says why, in words."""


class _WrongFileError(Exception):
    """What the server has is not the file. The text says why, in words."""


class _Transfer:
    """One download under its lock: ``NAME.part`` grows until it is whole, and then becomes ``NAME``.

    ``NAME.part.json`` holds the address, and the server's own mark of the version that the part is of.
    """

    def __init__(self, source: Source, path: Path, on_progress: OnProgress, patience: Patience) -> None:
        self.source = source
        self.path = path
        self.part = _part_of(path)
        self.origin = path.with_name(f"{path.name}.part.json")
        self.on_progress = on_progress
        self.patience = patience
        self.server_answered = False
        self.resumed = False  # whether the part was put together from several answers

    def run(self) -> None:
        """Fetches, verifies and puts in place. Raises as :func:`download` does."""
        if not self.source.expected_digits and self._boot_of_part() != boot_id():
            self._discard()  # a length alone does not vouch for what a machine that went down left
        try:
            self._complete_part()
            fault = _fault(self.part, self.source)
            if fault and self.resumed:
                # Left by a crash, or pieces of two versions that the server does not tell apart.
                self._discard()
                self._complete_part()
                fault = _fault(self.part, self.source)
            if fault:
                raise _WrongFileError(fault)
        except _WrongFileError as error:
            self._discard()
            raise self._wrong_file_error(str(error)) from error
        except _RefusalError as error:
            raise self._no_download_error(str(error)) from error
        with explain_write_errors(self.path, _OTHER_CACHE):
            put_in_place(self.part, self.path)
            self.origin.unlink(missing_ok=True)
            drop_abandoned(self.origin)

    def _complete_part(self) -> None:
        """Asks until the part is whole, each time going on where the last try ended."""
        self.resumed = False
        failures = 0
        while True:
            try:
                with _session() as session:
                    self._ask_once(session)
                return
            except _PassingError as error:
                failures += 1
                if failures >= self.patience.tries:
                    raise _RefusalError(f"{error}; gave up at try {failures}") from error
            time.sleep(self.patience.pause_s * 2 ** (failures - 1))

    def _ask_once(self, session: requests.Session) -> None:
        mark = self._mark_to_resume_from()
        offset = 0 if mark is None else self.part.stat().st_size
        if self.source.size is not None and offset == self.source.size:
            self.resumed = True
            return  # stopped between the last byte and the check
        with self._answer(session, _range_headers(offset, mark)) as response:
            if response.status_code == 200:
                self._start_part(response)
                self._receive(response, 0)
                return
            if mark is not None and self._continues_part(response, offset, mark):
                self.resumed = True
                self._receive(response, offset)
                return
        if mark is None:
            raise _RefusalError(f"the server answered {_status_in_words(response.status_code)}")
        # It has no such range (416), or another version of the file.
        self._discard()
        self._ask_once(session)

    def _answer(self, session: requests.Session, headers: dict[str, str]) -> requests.Response:
        """The server's first answer that is no redirect, if its status is 200, 206 or 416."""
        url = self.source.url
        for _ in range(1 + _REDIRECTS):
            self._check_address(url)
            response = self._get(session, url, headers)
            if not response.is_redirect:
                break
            response.close()
            url = _redirect_of(session, response)
        else:
            raise _RefusalError(f"more than {_REDIRECTS} redirects")
        status = response.status_code
        if status in (200, 206, 416):
            return response
        response.close()
        kind = _PassingError if status in _PASSING_STATUSES else _RefusalError
        raise kind(f"the server answered {_status_in_words(status)}")

    def _check_address(self, url: str) -> None:
        import urllib3

        try:
            address = urllib3.util.parse_url(url)  # by the parser that the request itself goes by
        except urllib3.exceptions.LocationParseError as error:
            raise _RefusalError("its address cannot be understood") from error
        # A server elsewhere must not send us to one on this machine, so the first address counts, too.
        on_this_machine = address.scheme == "http" and address.host in _LOOPBACK and _is_here(self.source.url)
        if not address.host or not (address.scheme == "https" or on_this_machine):
            what = "its address" if url == self.source.url else f"it redirects to {printable(url)}, which"
            raise _RefusalError(f"{what} is not https")

    def _get(self, session: requests.Session, url: str, headers: dict[str, str]) -> requests.Response:
        import requests

        timeout = (self.patience.connect_s, self.patience.read_s)
        try:
            request = session.prepare_request(requests.Request("GET", url, headers))
            settings = session.merge_environment_settings(url, {}, True, None, None)
            # Not by the session, which reads the whole body of a redirect, even of one it is not to follow.
            response = session.get_adapter(url).send(request, timeout=timeout, **settings)
        except requests.RequestException as error:
            raise self._network_error(error) from error
        self.server_answered = True
        return response

    def _start_part(self, response: requests.Response) -> None:
        """Begins an empty part, marked as belonging to this answer."""
        length = _content_length(response)
        if length is not None:
            self._check_size(length, whole=True)
        elif self.source.size is None and not self.source.expected_digits:
            raise _RefusalError("the server does not say how long the file is")
        self._discard()  # before the mark is written: it must never stand beside another version's part
        self.resumed = False
        origin = {"url": self.source.url, "mark": _mark_of(response), "boot": boot_id()}
        write_text_atomically(self.origin, json.dumps(origin))

    def _receive(self, response: requests.Response, offset: int) -> None:
        """Appends the answer's bytes to the part. Raises _PassingError when fewer come than there should."""
        what = f"download {self.source.name}"
        done = offset
        length = _content_length(response)
        total = self.source.size if self.source.size or length is None else offset + length
        self.on_progress(Progress(what, done, total, "B"))
        with explain_write_errors(self.part, _OTHER_CACHE):
            # Unbuffered, so that the file holds all that a process had received when it was killed.
            file = self.part.open("ab", buffering=0)
        with file:
            for chunk in self._chunks(response):
                done += len(chunk)
                self._check_size(done, whole=False)
                with explain_write_errors(self.part, _OTHER_CACHE):
                    _write_all(file, chunk)
                self.on_progress(Progress(what, done, total, "B"))
        if total is not None and done < total:
            raise _PassingError(f"the connection ended after {done} of {total} bytes")

    def _chunks(self, response: requests.Response) -> Iterator[bytes]:
        """The body as sent. No Content-Encoding is undone: sizes, hashes and ranges are of the file."""
        import urllib3

        try:
            # read1 gives what has come; read would hold it back, and lose it when the connection breaks.
            while chunk := response.raw.read1(_CHUNK, decode_content=False):
                yield chunk
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise self._network_error(error) from error

    def _check_size(self, size: int, whole: bool) -> None:
        """Refuses a file that has, or exceeds, ``size`` bytes where it should have another number."""
        declared = self.source.size
        if declared is None:
            if size > LARGEST_UNDECLARED:
                raise _WrongFileError(f"over {LARGEST_UNDECLARED} bytes, too many where none are declared")
        elif whole and size != declared:
            raise _WrongFileError(f"{size} bytes, expected {declared}")
        elif size > declared:
            raise _WrongFileError(f"more than the expected {declared} bytes")

    def _mark_to_resume_from(self) -> dict[str, str] | None:
        """The server's mark of the version that the part is the start of. None: there is no such part.

        An empty mark will do where the hash is known: pieces of two versions will not pass that.
        """
        size = _size_or_zero(self.part)
        if size == 0 or (self.source.size is not None and size > self.source.size):
            return None
        try:
            origin = json.loads(self.origin.read_text(encoding="utf-8"))
            url, mark = origin["url"], dict(origin["mark"])
        except (OSError, ValueError, KeyError, TypeError):
            return None  # missing, or torn by a crash
        return mark if url == self.source.url and (mark or self.source.expected_digits) else None

    def _boot_of_part(self) -> str | None:
        try:
            return str(json.loads(self.origin.read_text(encoding="utf-8"))["boot"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _continues_part(self, response: requests.Response, offset: int, mark: dict[str, str]) -> bool:
        """Whether the answer is the rest of the part, also from a server that ignores If-Range."""
        pattern = r"bytes ([0-9]{1,18})-[0-9]+/([0-9]{1,18}|\*)"
        given = re.fullmatch(pattern, _header(response, "Content-Range"))
        if response.status_code != 206 or given is None or int(given[1]) != offset:
            return False
        if self.source.size is not None and given[2] not in ("*", str(self.source.size)):
            return False
        return all(mark.get(name, value) == value for name, value in _mark_of(response).items())

    def _discard(self) -> None:
        with explain_write_errors(self.part, _OTHER_CACHE):
            self.part.unlink(missing_ok=True)
            self.origin.unlink(missing_ok=True)

    def _network_error(self, error: Exception) -> _PassingError | _RefusalError:
        """A connection that broke may be tried again. A server that was never reached is not."""
        reason, broke = _trouble_in_words(error, self.patience)
        return _PassingError(reason) if broke or self.server_answered else _RefusalError(reason)

    def _no_download_error(self, reason: str) -> FailureError:
        if self.path.exists():
            reason += f"; the cached one is damaged: {_fault(self.path, self.source)}"
        url = printable(self.source.url)
        return FailureError(
            f"could not download {printable(self.source.name)} from {_host(url)} ({reason}): get {url} "
            f"on another machine, and put it at {printable(self.path)}, or pass it with --checkpoint FILE"
        )

    def _wrong_file_error(self, fault: str) -> FailureError:
        return FailureError(
            f"{printable(self.source.name)} from {_host(self.source.url)} is not the file it should be ({fault}) "
            f"and was deleted: try again, or get the right one and put it at {printable(self.path)}, "
            "or pass another with --checkpoint FILE"
        )


def boot_id() -> str:
    """An id of this boot of the machine: a part is resumed only within the boot that wrote it."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return secrets.token_hex(8)  # unknown: as if the machine had just started


def _session() -> requests.Session:
    import requests

    session = requests.Session()
    session.headers.update({"User-Agent": "mgq", "Accept-Encoding": "identity"})
    return session


def _part_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.part")


def _size_or_zero(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _write_all(file: io.FileIO, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def _is_here(url: str) -> bool:
    return url.startswith("http:") and _host(url) in _LOOPBACK


def _host(url: str) -> str:
    import urllib3

    try:
        return urllib3.util.parse_url(url).host or url
    except urllib3.exceptions.LocationParseError:
        return url


def _status_in_words(status: int) -> str:
    # Not the server's own words: those could be anything.
    import http

    try:
        return f"{status} {http.HTTPStatus(status).phrase}"
    except ValueError:
        return str(status)


def _range_headers(offset: int, mark: dict[str, str] | None) -> dict[str, str]:
    """Asks for the rest of a file, or for all of it if it is no longer the one marked (RFC 9110, 13.1.5)."""
    if mark is None:
        return {}
    headers = {"Range": f"bytes={offset}-"}
    condition = mark.get("ETag") or mark.get("Last-Modified")
    return {**headers, "If-Range": condition} if condition else headers


def _mark_of(response: requests.Response) -> dict[str, str]:
    """The identifier of this version of the file. A weak ETag is none: it does not promise equal bytes."""
    mark = {name: _header(response, name) for name in ("ETag", "Last-Modified")}
    return {name: value for name, value in mark.items() if value and not value.startswith("W/")}


def _header(response: requests.Response, name: str) -> str:
    return (response.headers.get(name) or "").strip()


def _content_length(response: requests.Response) -> int | None:
    length = _header(response, "Content-Length")
    return int(length) if re.fullmatch("[0-9]{1,18}", length) else None


def _redirect_of(session: requests.Session, response: requests.Response) -> str:
    from urllib.parse import urljoin

    try:
        return urljoin(response.url or "", session.get_redirect_target(response) or "")
    except ValueError as error:
        raise _RefusalError("it redirects to an address that cannot be understood") from error


def _trouble_in_words(error: Exception, patience: Patience) -> tuple[str, bool]:
    """Why the network failed, and whether that was an open connection that broke."""
    import socket
    import ssl

    import requests
    import urllib3

    chain = list(_causes(error))
    said = [cause.strerror for cause in chain if isinstance(cause, OSError) and cause.strerror]
    innermost = printable(said[-1] if said else chain[-1])

    def has(*kinds: type[BaseException]) -> bool:
        return any(isinstance(cause, kinds) for cause in chain)

    if has(requests.exceptions.ProxyError, urllib3.exceptions.ProxyError):
        return f"the proxy does not let it through: {innermost}", False
    if has(socket.gaierror, urllib3.exceptions.NameResolutionError):
        return "the host's name cannot be resolved; is this machine on line?", False
    if has(requests.exceptions.SSLError, urllib3.exceptions.SSLError, ssl.SSLError):
        return f"no secure connection: {innermost}", False
    if has(urllib3.exceptions.NewConnectionError):
        return innermost, False
    if has(requests.ConnectTimeout, urllib3.exceptions.ConnectTimeoutError):
        return f"no connection within {patience.connect_s:g} s", False
    if has(requests.ReadTimeout, urllib3.exceptions.ReadTimeoutError, TimeoutError):
        return f"nothing came for {patience.read_s:g} s", False
    if has(requests.ConnectionError, urllib3.exceptions.ProtocolError, ConnectionError):
        return f"the connection broke: {innermost}", True
    return innermost, False


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and all it came from, outermost first. The libraries wrap in several ways."""
    seen: list[BaseException] = []
    waiting: list[object] = [error]
    while waiting:
        cause = waiting.pop(0)
        if isinstance(cause, BaseException) and not any(cause is other for other in seen):
            seen.append(cause)
            yield cause
            waiting += [*cause.args, getattr(cause, "reason", None), cause.__cause__, cause.__context__]
