"""The requests that a service answers."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from mgq.data.decoding import read_image
from mgq.data.transforms import to_batch
from mgq.engine.classifier.classifier import Classifier
from mgq.engine.classifier.predict import Prediction, best_scores, check_topk, describe_network
from mgq.errors import InputError, printable
from mgq.events import OnMessage, log_message
from mgq.machine import usable_cores
from mgq.service.batching import Batcher
from mgq.service.figures import KIND, Figures
from mgq.service.limits import Limits
from mgq.service.upload import RefusalError, Upload, read_uploads

PAGE = Path(__file__).with_name("page.html")
RETRY_S = "1"
BATCH = 16
"""Images in a batch, by default."""
ONE_BY_ONE = ("native", "native library")
"""Engines that spread one picture over all cores: a batch makes clients wait, and gains nothing."""
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
}
log = logging.getLogger("mgq")


class Service:
    """One network behind HTTP; ``app`` is the program that a server runs.

    ``on_message`` gets a line for each request that failed by a fault of the service. While it is ``stopping``,
    requests are still answered, and their connections close afterwards.
    """

    def __init__(self, classifier: Classifier, limits: Limits, on_message: OnMessage = log_message) -> None:
        self.classifier, self.limits, self.on_message = classifier, limits, on_message
        self.figures = Figures()
        self.decoders = ThreadPoolExecutor(usable_cores(), "decoder")
        self.batcher = Batcher(self.run_network, group_size(classifier, limits), limits.gather_s)
        self.busy = 0
        self.stopping = False
        self.app = Starlette(
            routes=[
                Route("/", self.page),
                Route("/predict", self.predict, methods=["POST"]),
                Route("/health", self.health),
                Route("/metrics", self.metrics),
            ],
            lifespan=self.lifespan,
            exception_handlers={HTTPException: self.refuse_path},
        )

    @contextlib.asynccontextmanager
    async def lifespan(self, _: Starlette) -> AsyncIterator[None]:
        worker = asyncio.ensure_future(self.batcher.work())
        try:
            yield
        finally:
            worker.cancel()
            self.decoders.shutdown()
            self.batcher.thread.shutdown()

    # ---- what is asked for ----

    async def page(self, _: Request) -> Response:
        return self.mark_last(HTMLResponse(PAGE.read_text(encoding="utf-8"), headers=PAGE_HEADERS))

    async def health(self, _: Request) -> Response:
        state = {"status": "stopping" if self.stopping else "ok", **describe_network(self.classifier)}
        return self.mark_last(JSONResponse(state, 503 if self.stopping else 200))

    async def metrics(self, _: Request) -> Response:
        return self.mark_last(Response(self.figures.text(), media_type=KIND))

    async def refuse_path(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        known = "there are POST /predict, GET /health, GET /metrics and GET /"
        line = f"{request.method} {printable(request.url.path)[:80]} is nothing that is answered: {known}"
        return self.mark_last(JSONResponse({"error": line}, error.status_code, error.headers))

    async def predict(self, request: Request) -> Response:
        start = time.perf_counter()
        try:
            with self.in_work():
                response = await self.answer(request)
        except RefusalError as refusal:
            response = JSONResponse({"error": str(refusal)}, refusal.status)
            if refusal.status == 503:
                response.headers["Retry-After"] = RETRY_S
        except ClientDisconnect:
            response = Response(status_code=499)  # nobody reads it
        except Exception as error:
            line = f"unexpected {type(error).__name__}: {printable(error)[:300]}"
            self.on_message(f"a request failed: {line}")
            log.debug("a request failed", exc_info=True)
            response = JSONResponse({"error": line}, 500)
        self.figures.requests.labels(str(response.status_code)).inc()
        self.figures.seconds.observe(time.perf_counter() - start)
        return self.mark_last(response)

    def mark_last(self, response: Response) -> Response:
        if self.stopping:
            response.headers["Connection"] = "close"
        return response

    # ---- how it is answered ----

    @contextlib.contextmanager
    def in_work(self) -> Iterator[None]:
        """Raises RefusalError where as many requests as may be are in work."""
        if self.busy >= self.limits.requests:
            raise RefusalError(503, f"{self.busy} requests are in work, and no more at a time: try again in a second")
        self.busy += 1
        self.figures.in_work.set(self.busy)
        try:
            yield
        finally:
            self.busy -= 1
            self.figures.in_work.set(self.busy)

    async def answer(self, request: Request) -> Response:
        """The document of ``mgq infer --json``; status 422 where no picture could be read."""
        topk = self.topk_of(request)
        try:
            uploads = await asyncio.wait_for(read_uploads(request, self.limits), self.limits.body_s)
        except asyncio.TimeoutError:
            raise RefusalError(408, f"the upload took more than {self.limits.body_s:g} s: send it again") from None
        try:
            found = await asyncio.wait_for(self.answers_to(uploads, topk), self.limits.answer_s)
        except asyncio.TimeoutError:
            line = f"there was no answer within {self.limits.answer_s:g} s: try again, or send fewer pictures"
            raise RefusalError(503, line) from None
        failed = sum(answer.error is not None for answer in found)
        self.figures.pictures.labels("refused").inc(failed)
        self.figures.pictures.labels("answered").inc(len(found) - failed)
        body = {
            **describe_network(self.classifier),
            "answers": [answer.to_json() for answer in found],
            "failed": failed,
        }
        if failed == len(found):
            return JSONResponse({"error": found[0].error, **body}, 422)
        return JSONResponse(body)

    def topk_of(self, request: Request) -> int:
        said = request.query_params.get("topk")
        try:
            return check_topk(self.classifier, None if said is None else int(said))
        except InputError as error:
            raise RefusalError(400, str(error)) from None
        except ValueError:
            raise RefusalError(400, f"topk {printable(said)[:80]} is not a whole number: give 1 or more") from None

    async def answers_to(self, uploads: list[Upload], topk: int) -> list[Prediction]:
        return await asyncio.gather(*(self.answer_to(upload, topk) for upload in uploads))

    async def answer_to(self, upload: Upload, topk: int) -> Prediction:
        loop = asyncio.get_running_loop()
        try:
            crop = await loop.run_in_executor(self.decoders, self.crop_of, upload)
        except InputError as error:
            return Prediction(upload.name, error=str(error))
        ran = await self.batcher.ask(crop)
        return Prediction(upload.name, best_scores(ran.logits, self.classifier.classes, topk), ran.milliseconds)

    def crop_of(self, upload: Upload) -> npt.NDArray[np.uint8]:
        return self.classifier.crop(read_image(upload.content, upload.name))

    def run_network(self, crops: list[npt.NDArray[np.uint8]]) -> npt.NDArray[np.float32]:
        self.figures.batch.observe(len(crops))
        with self.figures.network.time():
            return self.classifier.logits(to_batch(crops))


def group_size(classifier: Classifier, limits: Limits) -> int:
    """How many pictures run together: one, where the file takes one at a time, or the engine is no faster with more."""
    runtime = getattr(classifier.network, "runtime", None)
    if runtime is not None and runtime.batch == 1:
        return 1
    return limits.batch or (1 if runtime is not None and runtime.name in ONE_BY_ONE else BATCH)
