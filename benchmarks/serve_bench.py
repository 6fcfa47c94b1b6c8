"""`fastrcnn serve` under load, beside a bare loop of the same Detector over the same files.

1, 8 and 64 clients, each with a connection of its own, send pictures one after another to a server process on a loopback
address. Every answer is compared with what the Detector finds in that picture; the server's own count must be the number
sent. ours_ms is wall time by pictures; the bare loop reads, decodes and detects, decoding ahead.

python benchmarks/serve_bench.py [--quick] [--device cuda]
"""

import http.client
import io
import json
import os
import queue
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from PIL import Image
from timing import arguments, check, report, row

from fastrcnn import Detector
from fastrcnn.data.rendered_cells import render_cells
from fastrcnn.inference.memory import keep_memory

WEIGHTS = Path(__file__).parent.parent / "fastrcnn" / "assets" / "demo.safetensors"
PICTURES = 16


def pictures(height: int, width: int) -> list[bytes]:
    files = []
    for seed in range(PICTURES):
        file = io.BytesIO()
        Image.fromarray(render_cells(seed, height, width)[0]).save(file, "JPEG", quality=90)
        files.append(file.getvalue())
    return files


def bare_loop(detector: Detector, paths: list[str], times: int) -> tuple[float, list]:
    """(seconds a picture, what is found in each of the first round)."""
    start, found = time.perf_counter(), {}
    for index, _, objects in detector.stream(paths * times):
        found[index % len(paths)] = objects
    return (time.perf_counter() - start) / (times * len(paths)), [found[i] for i in range(len(paths))]


def start_server(device: str) -> tuple[subprocess.Popen, str, int]:
    command = [
        sys.executable,
        "-m",
        "fastrcnn.cli",
        "serve",
        "--weights",
        str(WEIGHTS),
        "--port",
        "0",
        "--device",
        device,
    ]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    address = server.stdout.readline().split()
    if not address:
        raise SystemExit("the server does not start")
    host, port = address[0].removeprefix("http://").rsplit(":", 1)
    return server, host, int(port)


def load(host: str, port: int, files: list[bytes], clients: int, requests: int) -> tuple[float, list[float], list]:
    """(seconds in all, seconds of each answer, (picture, objects) of each)."""
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    for i in range(requests):
        waiting.put(i % len(files))
    seconds, answers, lock, begin = [], [], threading.Lock(), threading.Barrier(clients + 1)

    def client() -> None:
        connection = http.client.HTTPConnection(host, port, timeout=120)
        connection.connect()
        begin.wait()
        while True:
            try:
                picture = waiting.get_nowait()
            except queue.Empty:
                return
            start = time.perf_counter()
            connection.request("POST", "/detect", files[picture], {"Content-Type": "image/jpeg"})
            answer = connection.getresponse()
            body = answer.read()
            took = time.perf_counter() - start
            if answer.status != 200:
                raise SystemExit(f"{answer.status}: {body!r}")
            with lock:
                seconds.append(took)
                answers.append((picture, json.loads(body)["detections"]))

    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    begin.wait()
    start = time.perf_counter()
    for thread in threads:
        thread.join()
    return time.perf_counter() - start, seconds, answers


def difference(answers: list, found: list) -> float:
    """The largest distance of a box's side in pixels; infinite where the objects are not those of the picture."""
    most = 0.0
    for picture, objects in answers:
        expected = found[picture]
        if [o["label"] for o in objects] != expected.labels.tolist():
            return float("inf")
        boxes = torch.tensor([o["box"] for o in objects]).reshape(-1, 4)
        most = max(most, *(boxes - expected.boxes).abs().amax(1).tolist(), 0.0)
    return most


def counted(host: str, port: int) -> int:
    """How many requests the server says it has answered with 200."""
    connection = http.client.HTTPConnection(host, port, timeout=60)
    connection.request("GET", "/metrics")
    lines = connection.getresponse().read().decode().splitlines()
    return next((int(float(line.split()[-1])) for line in lines if 'requests_total{status="200"}' in line), 0)


def main() -> None:
    args = arguments(__doc__.partition("\n\n")[0])
    height, width = (120, 160) if args.quick else (480, 640)
    requests = 64 if args.quick else 128
    files, rows = pictures(height, width), []
    keep_memory()  # as the command does
    detector = Detector(WEIGHTS, device=args.device)
    with tempfile.TemporaryDirectory() as folder:
        paths = [str(Path(folder) / f"{i}.jpg") for i in range(PICTURES)]
        for path, data in zip(paths, files):
            Path(path).write_bytes(data)
        bare_loop(detector, paths, 1)
        loops = [bare_loop(detector, paths, max(requests // PICTURES // 2, 1))]
        print(f"bare loop {1 / loops[0][0]:.1f} pictures/s", flush=True)
        server, host, port = start_server(args.device)
        try:
            load(host, port, files, 1, PICTURES)
            sent = PICTURES
            for clients in (1, 8, 64):
                seconds, each, answers = load(host, port, files, clients, requests)
                sent += requests
                if len(answers) != requests or counted(host, port) != sent:
                    raise SystemExit(f"{requests} were sent, {len(answers)} answered: lost, or answered twice")
                error = check("boxes", difference(answers, loops[0][1]), 0.01)
                tenths = statistics.quantiles(each, n=100)
                shape = f"{clients} clients, {width}x{height}, p50 {tenths[49] * 1e3:.0f} p99 {tenths[98] * 1e3:.0f} ms"
                print(f"{shape}, {requests / seconds:.1f} pictures/s", flush=True)
                rows.append((shape, 1e3 * seconds / requests, error))
        finally:
            server.terminate()
            server.wait(60)
        # Before and after: the same machine.
        loops.append(bare_loop(detector, paths, max(requests // PICTURES // 2, 1)))
    bare = 1e3 * statistics.mean(seconds for seconds, _ in loops)
    report(
        [row("serve", shape, torch.float32, args.device, ms, "bare loop", bare, 0, error) for shape, ms, error in rows],
        args,
    )


if __name__ == "__main__":
    main()
