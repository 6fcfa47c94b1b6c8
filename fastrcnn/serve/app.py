"""The HTTP API of a detector: POST /detect, health, readiness, metrics, and the page."""

import asyncio
import base64
import hashlib
import logging
import re
import socket
import time
from contextlib import asynccontextmanager
from pathlib import Path

import torch
import uvicorn
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel
from starlette.requests import ClientDisconnect

from fastrcnn.data.decode import TooManyPixelsError
from fastrcnn.data.images import ImageError
from fastrcnn.inference import Detections, Detector
from fastrcnn.serve.batcher import Batcher
from fastrcnn.serve.metrics import Metrics
from fastrcnn.serve.upload import picture_bytes

LOG = logging.getLogger("fastrcnn.serve")
PAGE = Path(__file__).parent.parent / "assets" / "serve.html"
WARM_UP = 480, 640  # of the picture that is looked at before the first request
MOST_CONNECTIONS = 1024
GONE = 499  # nginx's number for a caller who did not wait; nobody reads it but the metrics


class Object(BaseModel):
    box: tuple[float, float, float, float]  # x1, y1, x2, y2 in pixels of the picture
    score: float
    label: int
    name: str


class Found(BaseModel):
    detections: list[Object]


class Problem(BaseModel):
    detail: str


BINARY = {"type": "string", "format": "binary"}
FORM = {"type": "object", "required": ["file"], "properties": {"file": BINARY}}
JSON = {"type": "object", "required": ["image"], "properties": {"image": {"type": "string", "format": "byte"}}}
BODY = {
    "required": True,
    "content": {
        "multipart/form-data": {"schema": FORM},
        "application/json": {"schema": JSON},
        "image/*": {"schema": BINARY},
    },
}
PROBLEMS = {
    400: "no picture, or one that cannot be read",
    408: "the picture did not come in time",
    413: "too many bytes or pixels",
    415: "a compressed body",
    422: "the model fails on this picture",
    429: "too many requests are taken already: try again after Retry-After seconds",
    500: "the detector failed",
    503: "no answer in time",
}


def as_json(found: Detections) -> dict:
    rows = zip(found.boxes.tolist(), found.scores.tolist(), found.labels.tolist(), found.names)
    return {
        "detections": [
            dict(box=[round(v, 2) for v in box], score=round(score, 5), label=label, name=name)
            for box, score, label, name in rows
        ]
    }


def create_app(
    detector: Detector,
    max_batch: int | None = None,
    max_wait: float = 0.005,
    queue: int = 64,
    max_bytes: int = 20_000_000,
    max_pixels: int = 25_000_000,
    timeout: float = 60.0,
) -> FastAPI:
    """The ASGI application that answers with what `detector` finds.

    max_batch, max_wait (seconds), max_pixels: see `Batcher`. `queue` requests are taken at a time, from their first
    byte to their answer; others get 429. A picture has at most `max_bytes`, and `timeout` seconds to arrive, and then
    as many to be answered. Memory is bounded by 4/3 queue * max_bytes, and three bytes a pixel of 2 max_batch + 2
    pictures, beside what the network needs. When it ends, all that was taken is answered.
    """
    metrics = Metrics()
    taken = 0
    batcher: Batcher | None = None

    @asynccontextmanager
    async def lifespan(app: FastAPI):
        nonlocal batcher
        picture = torch.zeros(detector.channels, *WARM_UP, dtype=torch.uint8)
        await asyncio.to_thread(detector, [picture])
        batcher = Batcher(detector, max_batch, max_wait, max_pixels, metrics.batch.observe)
        yield
        closing, batcher = batcher, None
        await asyncio.to_thread(closing.close)

    # Swagger's pages load scripts from elsewhere; the description itself is at /openapi.json.
    app = FastAPI(title="fastrcnn", lifespan=lifespan, docs_url=None, redoc_url=None)

    async def answered(request: Request) -> Detections:
        """Raises HTTPException for everything that goes wrong."""
        try:
            data = await asyncio.wait_for(picture_bytes(request, max_bytes), timeout)
        except ClientDisconnect:
            raise HTTPException(GONE, "the caller is gone") from None
        except asyncio.TimeoutError:
            raise HTTPException(408, f"the picture did not come within {timeout:g} s") from None
        answer = asyncio.wrap_future(batcher.submit(data))
        gone = asyncio.ensure_future(request.receive())  # nothing more comes but the end of the connection
        try:
            await asyncio.wait({answer, gone}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
        if not answer.done():
            left = gone.done()
            answer.cancel()
            raise HTTPException(GONE if left else 503, f"no answer within {timeout:g} s", {"Retry-After": "1"})
        try:
            return answer.result()
        except TooManyPixelsError as error:
            raise HTTPException(413, str(error)) from None
        except ImageError as error:  # with a cause it is the model that failed
            raise HTTPException(422 if error.__cause__ else 400, str(error)) from None
        except Exception as error:
            LOG.error("the detector failed", exc_info=error)
            raise HTTPException(500, f"the detector failed: {error}") from None

    @app.post(
        "/detect",
        response_model=Found,
        summary="Find objects in a picture",
        openapi_extra={"requestBody": BODY},
        responses={status: {"description": said, "model": Problem} for status, said in PROBLEMS.items()},
    )
    async def detect(request: Request) -> Response:
        nonlocal taken
        start, status = time.perf_counter(), 500
        try:
            if taken >= queue:
                raise HTTPException(429, f"{taken} requests are taken already", {"Retry-After": "1"})
            taken += 1
            try:
                found = await answered(request)
            finally:
                taken -= 1
            status = 200
            metrics.seconds.observe(time.perf_counter() - start)
            metrics.objects.inc(len(found))
            return JSONResponse(as_json(found))
        except HTTPException as error:
            status = error.status_code
            raise
        finally:
            metrics.requests.labels(str(status)).inc()

    @app.get("/health", summary="The process is there")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/ready", summary="A request would be taken now", responses={503: {"model": Problem}})
    async def ready() -> dict[str, str]:
        if batcher is None or taken >= queue:
            raise HTTPException(503, f"{taken} requests are taken already")
        return {"status": "ready"}

    @app.get("/metrics", response_class=PlainTextResponse, summary="Prometheus's text format")
    async def prometheus() -> Response:
        metrics.taken.set(taken)
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    page = PAGE.read_text("utf-8")
    policy = content_policy(page)

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def index() -> Response:
        return HTMLResponse(page, headers={"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff"})

    return app


def content_policy(page: str) -> str:
    """A Content-Security-Policy under which the page's own script and style run and nothing else is fetched or run."""

    def digest(tag: str) -> str:
        inside = re.search(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)[1]
        return f"'sha256-{base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()}'"

    return (
        f"default-src 'none'; script-src {digest('script')}; style-src {digest('style')}; img-src blob: data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def serve(app: FastAPI, listener: socket.socket, grace: float) -> None:
    """Answers on a bound socket until SIGTERM or SIGINT; what was taken by then is answered, within `grace` seconds."""
    # Or an answer's body waits until the caller has acknowledged its head, 40 ms; connections take this over.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, server_header=False, ws="none", lifespan="on",
        limit_concurrency=MOST_CONNECTIONS, timeout_graceful_shutdown=int(grace) + 1,
    )  # fmt: skip
    server = uvicorn.Server(config)
    try:
        server.run(sockets=[listener])
    except (KeyboardInterrupt, SystemExit):  # it raises the signal again when all is done
        if not server.started:
            raise
