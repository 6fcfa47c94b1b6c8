"""Downloads, from a server of this machine: kept, checked, and never more or longer than is bearable."""

import hashlib
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from fastrcnn.checkpoints import fetch as fetching
from fastrcnn.checkpoints.fetch import fetch

CONTENT = b"weights" * 1000
SHA, MD5 = hashlib.sha256(CONTENT).hexdigest()[:8], hashlib.md5(CONTENT).hexdigest()[:6]


@pytest.fixture
def server(tmp_path, monkeypatch):
    """(address, paths that were asked for); answers by the path, with CONTENT but where it says otherwise."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            if "moved" in self.path:
                self.send_response(302)
                self.send_header("Location", "file:///etc/passwd" if "file" in self.path else "ftp://127.0.0.1/x")
                self.end_headers()
                return
            if "dripping" in self.path:  # a head that never ends
                for _ in range(50):
                    self.wfile.write(b"X")
                    time.sleep(0.05)
                return
            if "empty" in self.path:
                self.send_response(200)
                self.end_headers()
                return
            self.send_response(404 if "missing" in self.path else 200)
            if "endless" not in self.path:
                self.send_header("Content-Length", str(len(CONTENT) + 7 * ("short" in self.path)))
            self.end_headers()
            try:
                for _ in range(200 if "endless" in self.path else 1):
                    self.wfile.write(self.path.encode()[:4] + CONTENT[4:] if "other" in self.path else CONTENT)
            except OSError:
                pass

        def log_message(self, *args):
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    monkeypatch.setattr(fetching, "SCHEMES", ("http", "https"))
    yield f"http://127.0.0.1:{httpd.server_port}/", asked
    httpd.shutdown()
    httpd.server_close()


@pytest.mark.parametrize("name", [f"a-{SHA}.pth?x=1", f"b/model_final_{MD5}.pkl", "plain.pth"])
def test_a_download_is_made_once_and_kept(server, name):
    address, asked = server
    first = fetch(address + name)
    assert first.read_bytes() == CONTENT and fetch(address + name) == first and len(asked) == 1
    assert [p.name for p in first.parent.iterdir()] == [first.name]
    first.write_bytes(b"damaged since")
    again = fetch(address + name).read_bytes()
    assert again == (b"damaged since" if "plain" in name else CONTENT)  # a name without a digest says nothing


def test_two_addresses_of_one_name_are_two_files(server):
    address, _ = server
    assert fetch(address + "other/latest.pth").read_bytes() != fetch(address + "a/latest.pth").read_bytes()


@pytest.mark.parametrize("name", ["x-00000000.pth", "model_final_000000.pkl"])
def test_a_download_of_another_digest_is_refused_and_removed(server, tmp_path, name):
    with pytest.raises(ValueError, match=f"{name}: the download is damaged"):
        fetch(server[0] + name)
    assert not any((tmp_path / "checkpoints").iterdir())


@pytest.mark.parametrize(
    "name, why",
    [
        ("missing.pth", "404"),
        ("short.pth", "broke off after 7000 of 7007"),
        ("moved.pth", "ftp"),
        ("moved_file.pth", "file"),
        ("a b.pth", "control characters"),
        ("endless.pth", "more than 100000 bytes"),
        ("slow.pth", "not done after"),
        ("dripping.pth", "not done after"),
        ("empty.pth", "the answer is empty"),
    ],
)
def test_a_download_that_fails_is_one_clear_error(server, tmp_path, monkeypatch, name, why):
    monkeypatch.setattr(fetching, "LARGEST", 100_000)
    if name in ("slow.pth", "dripping.pth"):
        monkeypatch.setattr(fetching, "LONGEST", -1.0 if name == "slow.pth" else 0.3)
    with pytest.raises(OSError, match=rf"cannot download .*{name}: .*{why}.*--weights") as error:
        fetch(server[0] + name)
    assert error.value.__suppress_context__ and not any((tmp_path / "checkpoints").iterdir())


@pytest.mark.parametrize("address", ["http://example.com/a.pth", "ftp://example.com/a.pth", "file:///etc/passwd"])
def test_only_https_is_asked(address):
    with pytest.raises(ValueError, match="https"):
        fetch(address)
