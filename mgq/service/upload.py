"""Reads the images in the body of a request, within the limits."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import NamedTuple

from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from mgq.errors import plural, printable
from mgq.service.limits import MEGA, Limits

UNNAMED = "the picture"
"""What a picture is called whose request does not name it."""
HOW = "send a picture as the body, or files of multipart/form-data, as `curl -F picture=@cat.jpg` does"


class RefusalError(Exception):
    """Raised for a request that is refused: one line, and the HTTP status."""

    def __init__(self, status: int, line: str) -> None:
        super().__init__(line)
        self.status = status


class Upload(NamedTuple):
    """A file that was sent: what its sender calls it, and its bytes."""

    name: str
    content: bytes


class ParserInMemory(MultiPartParser):
    """A multipart parser that keeps everything in memory: bodies are limited in size."""

    spool_max_size = 1 << 40


async def read_uploads(request: Request, limits: Limits) -> list[Upload]:
    """The files in the body of ``request``. Raises RefusalError where there are none, or more than ``limits`` allow."""
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > limits.body_bytes:
        raise too_large_error(limits)
    if request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        return await read_form(request, limits)
    content = bytearray()
    async for chunk in read_limited(request, limits):
        content += chunk
    if not content:
        raise RefusalError(400, f"there is no picture in the request: {HOW}")
    return [Upload(UNNAMED, bytes(content))]


async def read_form(request: Request, limits: Limits) -> list[Upload]:
    parser = ParserInMemory(request.headers, read_limited(request, limits), max_files=limits.pictures, max_fields=0)
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise RefusalError(400, why_refused(error.message, limits)) from None
    uploads = []
    for _, part in form.multi_items():
        if isinstance(part, UploadFile):
            uploads.append(Upload(part.filename or UNNAMED, await part.read()))
            await part.close()
    if not uploads:
        raise RefusalError(400, f"there is no picture in the form: {HOW}")
    return uploads


def why_refused(said: str, limits: Limits) -> str:
    if said.startswith("Too many files"):
        return f"there are more than {plural(limits.pictures, 'picture')} in one request: send several"
    if said.startswith("Too many fields"):
        return f"the form has a field that is no file: {HOW}"
    return f"the form cannot be read ({printable(said).rstrip('.')}): {HOW}"


async def read_limited(request: Request, limits: Limits) -> AsyncGenerator[bytes, None]:
    """The body of ``request`` in pieces, up to its limit. Raises RefusalError beyond that."""
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > limits.body_bytes:
            raise too_large_error(limits)
        yield chunk


def too_large_error(limits: Limits) -> RefusalError:
    return RefusalError(413, f"more than {limits.body_bytes / MEGA:g} MB in one request: send a smaller picture")
