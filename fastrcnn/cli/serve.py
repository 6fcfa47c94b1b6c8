"""fastrcnn serve."""

import socket
from typing import Annotated

import typer

from fastrcnn.cli.common import (
    Device,
    Json,
    MaxSize,
    MinSize,
    Model,
    Names,
    Precision,
    Score,
    Weights,
    fail,
    open_detector,
    say,
    say_json,
)


def serve(
    weights: Weights = None,
    model: Model = None,
    names: Names = None,
    host: Annotated[str, typer.Option(help="address to listen on; 0.0.0.0 is every one of this machine")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free")] = 8000,
    device: Device = "auto",
    precision: Precision = "auto",
    score: Score = 0.05,
    min_size: MinSize = None,
    max_size: MaxSize = None,
    max_batch: Annotated[int | None, typer.Option(min=1, help="pictures a step [default: 8 on CUDA, 1 on a CPU]")] = None,
    max_wait: Annotated[float, typer.Option(min=0.0, help="ms that a picture waits for others")] = 5.0,
    queue: Annotated[int, typer.Option(min=1, help="requests taken at a time; others get 429")] = 64,
    max_mb: Annotated[float, typer.Option(min=0.001, help="megabytes of a picture")] = 20.0,
    max_megapixels: Annotated[float, typer.Option(min=0.001, help="millions of pixels of a picture")] = 25.0,
    timeout: Annotated[float, typer.Option(min=0.1, help="seconds for a picture to arrive, and again to be answered")] = 60,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Answer over HTTP: POST /detect, and a page to try it on.

    Health, readiness and Prometheus's metrics are there, too. Needs the extra serve. SIGTERM or Ctrl-C lets it answer what
    it took, and then ends it with status 0.

    \b
    Examples
      fastrcnn serve --weights runs/mine/best.safetensors --port 8000
      curl -F file=@street.jpg http://127.0.0.1:8000/detect
    """
    try:
        from fastrcnn.serve import create_app
        from fastrcnn.serve import serve as answer
    except ImportError as error:
        fail(f"serve needs more packages ({error}): pip install 'fastrcnn[serve]'")
    try:
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        fail(f"--host {host} --port {port}: cannot listen there ({error.strerror or error})")
    with listener:
        detector = open_detector(model, weights, device, precision, score, names, min_size=min_size, max_size=max_size)
        limits = dict(max_bytes=int(max_mb * 1e6), max_pixels=int(max_megapixels * 1e6), timeout=timeout)
        app = create_app(detector, max_batch, max_wait / 1000, queue, **limits)
        shown = f"[{host}]" if ":" in host else host
        address = f"http://{shown}:{listener.getsockname()[1]}"
        if as_json:
            say_json(dict(address=address, device=str(detector.device), precision=detector.precision))
        else:
            say(f"{address} answers on {detector.device} ({detector.precision}); Ctrl-C ends it")
        answer(app, listener, 2 * timeout)
