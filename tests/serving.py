"""A server on a loopback port, a detector that can be held, and pictures that it tells apart."""

import io
import socket
import threading
import time
from contextlib import contextmanager

import httpx
import uvicorn
from PIL import Image

from fastrcnn.data.rendered_cells import render_cells
from fastrcnn.serve import create_app


def encoded(seed: int = 0, kind: str = "PNG", height: int = 64, width: int = 96, **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(render_cells(seed, height, width)[0]).save(file, kind, **options)
    return file.getvalue()


class Held:
    """A detector that waits in front of each step until `go` is set, and knows what it was given."""

    def __init__(self, detector):
        self.detector, self.device, self.channels = detector, detector.device, detector.channels
        self.go, self.steps = threading.Event(), []

    def __call__(self, images):
        return self.detector(images)

    def stream(self, images, batch_size):
        self.steps.append(len(images))
        assert self.go.wait(60)
        return self.detector.stream(images, batch_size)


def until(condition, seconds: float = 30) -> None:
    """Waits until it holds; fails after so many seconds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came to be"
        time.sleep(0.01)


@contextmanager
def running(detector, **options):
    """An httpx client of a server in a thread of its own."""
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(create_app(detector, **options), log_level="warning", ws="none", lifespan="on")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs=dict(sockets=[listener]), daemon=True)
    thread.start()
    try:
        until(lambda: server.started)
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with httpx.Client(base_url=address, timeout=60, limits=limits, trust_env=False) as client:
            yield client
    finally:
        server.should_exit = True
        thread.join(60)
    assert not thread.is_alive()
