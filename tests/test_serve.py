"""serve/: what is answered is what the Detector finds, to each caller once, whatever comes and whatever happens."""

import base64
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

import httpx
import uvicorn
from conftest import tiny_model
from fastapi import FastAPI
from serving import Held, encoded, running, until
from test_cli import run

import fastrcnn.serve.batcher
from fastrcnn import Detector
from fastrcnn.data.decode import decode
from fastrcnn.data.images import ImageError
from fastrcnn.serve import Batcher, serve
from fastrcnn.serve.app import as_json, content_policy
from fastrcnn.serve.batcher import READERS
from fastrcnn.weights import save

ROOT = Path(__file__).resolve().parent.parent
NAMES = ["red", "white", "platelet"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    model = tiny_model()
    model.class_names = NAMES
    return save(model, tmp_path_factory.mktemp("weights") / "tiny.safetensors")


@pytest.fixture(scope="module")
def detector(weights):
    return Detector(weights, device="cpu", score_threshold=0.2)


@pytest.fixture(scope="module")
def client(detector):
    with running(detector, max_bytes=200_000, max_pixels=300_000, timeout=20) as client:
        yield client


def expected(detector, data: bytes) -> list[dict]:
    (found,) = detector([decode(data)])
    rows = zip(found.boxes.double().tolist(), found.scores.double().tolist(), found.labels.tolist())
    return [
        dict(box=[round(v, 2) for v in box], score=round(score, 5), label=label, name=NAMES[label])
        for box, score, label in rows
    ]


def as_base64(data: bytes, prefix: str = "") -> dict:
    return dict(json={"image": prefix + base64.b64encode(data).decode()})


WAYS = {
    "form": lambda data: dict(files={"file": ("a.jpg", data)}),
    "form of another name": lambda data: dict(files={"picture": ("a", data)}, data={"note": "x"}),
    "bytes": lambda data: dict(content=data, headers={"content-type": "image/jpeg"}),
    "bytes of no type": lambda data: dict(content=data),
    "curl's default": lambda data: dict(content=data, headers={"content-type": "application/x-www-form-urlencoded"}),
    "chunks": lambda data: dict(content=iter([data[:100], data[100:]])),
    "base64": as_base64,
    "data address": lambda data: as_base64(data, "data:image/jpeg;base64,"),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_every_way_of_sending_gives_what_the_detector_finds(way, kind, detector, client):
    exif = b"MM\0*\0\0\0\x08\0\1\x01\x12\0\3\0\0\0\1\0\6\0\0\0\0\0\0"  # lies on its side
    data = encoded(3, kind, exif=b"Exif\0\0" + exif)
    answer = client.post("/detect", **WAYS[way](data))
    assert answer.status_code == 200 and answer.json() == {"detections": expected(detector, data)}
    assert len(answer.json()["detections"]) > 3 and decode(data).shape == (3, 96, 64)


def png(width: int, height: int) -> bytes:
    """A picture of zeros with a head that says so many pixels, and less than a megabyte behind it."""
    chunk = lambda kind, body: struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))  # noqa: E731
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    packed = zlib.compress(bytes(min(height * (3 * width + 1), 1 << 20)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def many_scans() -> bytes:
    """A progressive JPEG that says its last refinement again and again: a byte of it costs thousands of pixels."""
    data = encoded(1, "JPEG", progressive=True)
    return data[:-2] + data[data.rfind(b"\xff\xda") : -2] * 200 + data[-2:]


JPEG = encoded(3, "JPEG")
FORM = {"content-type": "multipart/form-data; boundary=x"}
AS_JSON = {"content-type": "application/json"}
HOSTILE = {
    "nothing": (400, dict(content=b"")),
    "text": (400, dict(content=b"hello")),
    "page": (400, dict(content=b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>")),
    "half a JPEG": (400, dict(content=JPEG[: len(JPEG) // 2])),
    "damaged JPEG": (400, dict(content=JPEG[:30] + bytes(300) + JPEG[330:])),
    "JPEG of many scans": (400, dict(content=many_scans())),
    "a head alone": (400, dict(content=png(100, 100)[:40])),
    "a picture that unpacks to gigabytes": (413, dict(content=png(60_000, 60_000))),
    "a few pixels too many": (413, dict(content=png(301, 1000))),
    "another size than it says": (400, dict(content=png(400, 700).replace(b"\0\0\1\x90", b"\0\0\1\x91", 1))),
    "array of objects": (400, dict(content=b"\x93NUMPY\1\0\x46\0{'descr':'|O','fortran_order':False,'shape':(1,1,3)}")),
    "too many bytes": (413, dict(content=JPEG + bytes(200_001))),
    "too many bytes in chunks": (413, dict(content=(bytes(50_000) for _ in range(10)))),
    "too many bytes in a form": (413, dict(files={"file": ("a.jpg", JPEG + bytes(200_001))})),
    "too many bytes in base64": (413, as_base64(JPEG + bytes(200_001))),
    "far too many bytes in base64": (413, as_base64(bytes(900_000))),
    "packed": (415, dict(content=zlib.compress(JPEG), headers={"content-encoding": "gzip"})),
    "form without a file": (400, dict(content=b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\nb\r\n--x--\r\n',
                                      headers=FORM)),
    "form of two files": (400, dict(files=[("file", ("a.jpg", JPEG)), ("file", ("b.jpg", JPEG))])),
    "form of many fields": (400, dict(files={"file": ("a.jpg", JPEG)}, data={str(i): "x" for i in range(40)})),
    "form of no parts": (400, dict(content=b"hello", headers=FORM)),
    "form without a boundary": (400, dict(content=b"hello", headers={"content-type": "multipart/form-data"})),
    "form that breaks off": (400, dict(content=b"--x\r\nContent-Disposi", headers=FORM)),
    "form with an empty file": (400, dict(files={"file": ("a.jpg", b"")})),
    "no JSON": (400, dict(content=b"{", headers=AS_JSON)),
    "JSON that is no text": (400, dict(content=b"\xff\xfe\x00", headers=AS_JSON)),
    "deep JSON": (400, dict(content=b"[" * 200_000, headers=AS_JSON)),
    "long number": (400, dict(content=b"1" * 200_000, headers=AS_JSON)),
    "JSON of another shape": (400, dict(json=[1])),
    "number for a picture": (400, dict(json={"image": 1})),
    "no base64": (400, dict(json={"image": "%%%"})),
    "not ASCII": (400, dict(json={"image": "ä"})),
    "base64 of text": (400, as_base64(b"hello")),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_uploads_are_refused_and_the_server_goes_on(name, detector, client):
    status, request = HOSTILE[name]
    answer = client.post("/detect", **request)
    assert answer.status_code == status and answer.json()["detail"], answer.text
    assert client.post("/detect", content=JPEG).json() == {"detections": expected(detector, JPEG)}


def test_no_pixel_is_decoded_of_too_large_a_picture(detector, monkeypatch):
    def never(data, channels):
        raise AssertionError("decoded")

    monkeypatch.setattr(fastrcnn.serve.batcher, "decode", never)
    with running(detector, max_pixels=64 * 96 - 1) as client:
        answer = client.post("/detect", content=JPEG)
        assert answer.status_code == 413 and "96 x 64 pixels" in answer.json()["detail"]


def test_the_length_is_looked_at_before_the_body_comes(client):
    with socket.create_connection((client.base_url.host, client.base_url.port), timeout=20) as raw:
        raw.sendall(b"POST /detect HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999999999999\r\n\r\n")
        assert raw.recv(100).startswith(b"HTTP/1.1 413")


def test_a_body_without_an_end_is_refused_while_it_comes(client):
    with socket.create_connection((client.base_url.host, client.base_url.port), timeout=15) as raw:
        raw.sendall(b"POST /detect HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        raw.sendall(b"186a1\r\n" + bytes(100_001) + b"\r\n" + b"186a1\r\n" + bytes(100_001) + b"\r\n")
        assert raw.recv(100).startswith(b"HTTP/1.1 413")


@pytest.mark.parametrize(
    "said", [b"\0" * 5000, b"GET /" + b"a" * 100_000, b"POST /detect HTTP/1.1\r\nContent-Length: x\r\n\r\n"]
)
def test_what_is_no_http_harms_nobody(said, client):
    with socket.create_connection((client.base_url.host, client.base_url.port), timeout=20) as raw:
        raw.sendall(said)
        raw.shutdown(socket.SHUT_WR)
        assert raw.recv(100)[:12] in (b"HTTP/1.1 400", b"")
    assert client.get("/health").status_code == 200


def test_each_of_many_callers_gets_the_answer_to_its_own_picture_once(detector):
    pictures = [encoded(seed) for seed in range(12)]
    answers = [expected(detector, data) for data in pictures]
    assert len({json.dumps(a) for a in answers}) == 12
    with running(detector, max_batch=4, queue=64) as client, ThreadPoolExecutor(32) as pool:
        sent = [i * 7 % 12 for i in range(192)]
        got = list(pool.map(lambda i: client.post("/detect", content=pictures[i]), sent))
        assert [a.status_code for a in got] == [200] * 192
        assert [a.json()["detections"] for a in got] == [answers[i] for i in sent]
        lines = client.get("/metrics").text.splitlines()
    assert 'fastrcnn_requests_total{status="200"} 192.0' in lines and "fastrcnn_request_seconds_count 192.0" in lines
    assert "fastrcnn_batch_pictures_sum 192.0" in lines and "fastrcnn_taken 0.0" in lines
    steps = next(float(line.split()[1]) for line in lines if line.startswith("fastrcnn_batch_pictures_count"))
    assert steps < 192  # some went together
    assert f"fastrcnn_objects_total {sum(len(answers[i]) for i in sent):.1f}" in lines


def test_what_is_too_much_is_refused_and_what_was_taken_is_answered(detector):
    held = Held(detector)
    with running(held, queue=3) as client, ThreadPoolExecutor(3) as pool:
        assert client.get("/ready").json() == {"status": "ready"}
        taken = [pool.submit(client.post, "/detect", content=encoded(i)) for i in range(3)]
        until(lambda: "fastrcnn_taken 3.0" in client.get("/metrics").text)
        try:
            for _ in range(5):
                refused = client.post("/detect", content=encoded(9), timeout=10)  # one that is taken gets no answer
                assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
            assert client.get("/ready").status_code == 503 and client.get("/health").status_code == 200
        finally:
            held.go.set()
        for i, answer in enumerate(taken):
            assert answer.result().json() == {"detections": expected(detector, encoded(i))}
        assert client.post("/detect", content=encoded(9)).status_code == 200
        assert 'fastrcnn_requests_total{status="429"} 5.0' in client.get("/metrics").text


def test_who_waits_too_long_is_told_so_and_leaves_room(detector):
    held = Held(detector)
    with running(held, timeout=0.3, queue=1) as client:
        answer = client.post("/detect", content=JPEG)
        assert answer.status_code == 503 and answer.headers["retry-after"]
        with socket.create_connection((client.base_url.host, client.base_url.port), timeout=20) as raw:
            raw.sendall(b"POST /detect HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n" + JPEG[:500])
            assert raw.recv(100).startswith(b"HTTP/1.1 408")
        held.go.set()
        until(lambda: client.post("/detect", content=JPEG).status_code == 200)


def test_a_picture_whose_caller_left_is_not_looked_at(detector):
    held = Held(detector)
    with running(held, max_batch=1) as client, ThreadPoolExecutor(1) as pool:
        first = pool.submit(client.post, "/detect", content=JPEG)
        until(lambda: held.steps == [1])
        with pytest.raises(httpx.ReadTimeout):
            client.post("/detect", content=encoded(1), timeout=0.3)
        until(lambda: "fastrcnn_taken 1.0" in client.get("/metrics").text)
        held.go.set()
        assert first.result().status_code == 200 and client.post("/detect", content=JPEG).status_code == 200
        assert held.steps == [1, 1]


def test_pictures_wait_encoded_however_many_there_are(detector, monkeypatch):
    held, seen, lock = Held(detector), [], Lock()

    def counted(data, channels):
        with lock:
            seen.append(len(data))
        return decode(data, channels)

    monkeypatch.setattr(fastrcnn.serve.batcher, "decode", counted)
    batcher = Batcher(held, max_batch=2)
    answers = [batcher.submit(encoded(i % 12)) for i in range(40)]
    until(lambda: len(seen) > 2 + READERS)
    with pytest.raises(AssertionError, match="never came"):
        until(lambda: len(seen) > 2 * 2 + READERS, 0.3)
    held.go.set()
    batcher.close()
    found = [as_json(answer.result(0))["detections"] for answer in answers]
    assert found == [expected(detector, encoded(i % 12)) for i in range(40)]
    assert sum(held.steps) == 40 and max(held.steps) == 2


def test_a_failure_of_the_detector_is_its_pictures_alone(detector):
    class Failing(Held):
        def stream(self, images, batch_size):
            if images[0].float().std() == 0:
                raise SystemError("broken")
            return (((i, None, ImageError("no")) if image.shape[1] == 50 else (i, image, *detector([image])))
                    for i, image in enumerate(images))  # fmt: skip

    batcher = Batcher(Failing(detector), max_batch=1)
    flat, bad, good = batcher.submit(png(50, 70)), batcher.submit(encoded(1, height=50)), batcher.submit(JPEG)
    batcher.close()
    assert isinstance(flat.exception(), SystemError) and isinstance(bad.exception(), ImageError)
    assert as_json(good.result())["detections"] == expected(detector, JPEG)
    with running(Failing(detector)) as client:
        assert client.post("/detect", content=png(50, 70)).status_code == 500
        assert client.post("/detect", content=JPEG).status_code == 200


def test_the_interface_is_described(client):
    described = client.get("/openapi.json").json()
    post = described["paths"]["/detect"]["post"]
    assert set(post["requestBody"]["content"]) == {"multipart/form-data", "application/json", "image/*"}
    assert {"200", "400", "413", "429", "503"} <= set(post["responses"])
    assert set(described["components"]["schemas"]["Object"]["properties"]) == {"box", "score", "label", "name"}
    assert {"/health", "/ready", "/metrics"} <= set(described["paths"])
    assert client.get("/detect").status_code == 405 and client.get("/nothing").status_code == 404
    page = client.get("/")
    assert page.headers["content-security-policy"] == content_policy(page.text)
    assert "unsafe" not in content_policy(page.text)


def listens(host: str, port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((host, port)) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_server_that_is_told_to_end_answers_what_it_took(number, weights, detector):
    command = [
        sys.executable,
        "-m",
        "fastrcnn.cli",
        "serve",
        "--weights",
        str(weights),
        "--port",
        "0",
        "--score",
        "0.2",
    ]
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environ)
    try:
        address = server.stdout.readline().split()[0]
        host, port = address.removeprefix("http://").split(":")
        begun = [socket.create_connection((host, int(port)), timeout=60) for _ in range(6)]
        for raw in begun:
            raw.sendall(b"POST /detect HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(JPEG) + JPEG[:100])
        until(lambda: "fastrcnn_taken 6.0" in httpx.get(f"{address}/metrics", trust_env=False).text)
        server.send_signal(number)
        until(lambda: not listens(host, int(port)))
        for raw in begun:
            raw.sendall(JPEG[100:])
        said = [b"".join(iter(lambda: raw.recv(1 << 16), b"")) for raw in begun]  # noqa: B023
        assert [json.loads(answer.partition(b"\r\n\r\n")[2]) for answer in said] == [
            {"detections": expected(detector, JPEG)}
        ] * 6
        assert server.wait(30) == 0
        assert not server.stderr.read()
    finally:
        server.kill()
        server.communicate()


def test_what_keeps_a_server_from_starting_is_one_sentence(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = run("serve", "--weights", "nothing.pth", "--port", port, status=1)
        assert f"--port {port}: cannot listen there (Address already in use" in said
    assert "nothing.pth" in run("serve", "--weights", "nothing.pth", "--port", 0, status=1)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    for name in [name for name in sys.modules if name.startswith("fastrcnn.serve")]:
        monkeypatch.delitem(sys.modules, name)
    assert "pip install 'fastrcnn[serve]'" in run("serve", "--weights", "nothing.pth", "--port", 0, status=1)


def test_answers_do_not_wait_for_acknowledgements(monkeypatch):
    """asyncio says so to connections of its own sockets alone, and the command brings one."""
    seen = []
    asked = socket.IPPROTO_TCP, socket.TCP_NODELAY
    monkeypatch.setattr(uvicorn.Server, "run", lambda self, sockets: seen.append(sockets[0].getsockopt(*asked)))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        serve(FastAPI(), listener, 1.0)
    assert seen and seen[0]
