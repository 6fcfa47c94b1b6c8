"""Files for addresses: downloaded once, kept in torch.hub's cache, checked whenever they are used."""

import hashlib
import http.client
import queue
import re
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO, TypeVar
from urllib.parse import urlsplit

import torch

T = TypeVar("T")
SCHEMES = ("https",)
DETECTRON2 = "detectron2://", "https://dl.fbaipublicfiles.com/detectron2/"  # what its own configurations call its files
LARGEST = 8 * 2**30  # bytes of a download
LONGEST = 3600.0  # seconds for the whole of it
SILENCE = 30.0  # seconds without a byte
_CHUNK = 2**20


def opener(schemes: Sequence[str]) -> urllib.request.OpenerDirector:
    """urllib's opener, which a server cannot lead to other schemes than these."""

    class Redirects(urllib.request.HTTPRedirectHandler):
        def redirect_request(self, request, *args):
            new = super().redirect_request(request, *args)
            if new is not None and urlsplit(new.full_url).scheme not in schemes:
                expected = " or ".join(schemes)
                raise urllib.error.URLError(f"it leads to {new.full_url[:200]}, expected an {expected} address")
            return new

    return urllib.request.build_opener(Redirects)


def in_time(seconds: float, ask: Callable[[], T]) -> T:
    """What `ask` returns or raises. Raises TimeoutError when the time is over: in a thread, which is left behind then,
    since a server that sends its head byte by byte outlasts every time limit of a socket."""
    answers: queue.SimpleQueue = queue.SimpleQueue()

    def run() -> None:
        try:
            answers.put((ask(), None))
        except Exception as error:  # whatever it is, it belongs to who waits
            answers.put((None, error))

    threading.Thread(target=run, daemon=True).start()
    try:
        answer, error = answers.get(timeout=max(seconds, 0.0))
    except queue.Empty:
        raise TimeoutError from None
    if error is not None:
        raise error
    return answer


def _download(address: str, file: BinaryIO) -> None:
    """The whole answer into `file`. Raises OSError for one that fails, breaks off, is too long or takes too long."""
    start = told = time.monotonic()
    request = urllib.request.Request(address, headers={"User-Agent": "fastrcnn"})
    with opener(SCHEMES).open(request, timeout=SILENCE) as answer:
        expected, done = answer.length, 0  # None where the server does not say
        while chunk := answer.read1(_CHUNK):
            done += len(chunk)
            now = time.monotonic()
            if done > LARGEST or (expected or 0) > LARGEST:
                raise OSError(f"more than {LARGEST} bytes")
            if now - start > LONGEST:
                raise OSError(f"not done after {LONGEST:.0f} seconds")
            if now - told > 10:
                whole = f" of {expected / 1e6:.0f}" if expected else ""
                print(f"{address}: {done / 1e6:.0f}{whole} MB", file=sys.stderr)
                told = now
            file.write(chunk)
        if expected is not None and done < expected:
            raise OSError(f"it broke off after {done} of {expected} bytes")
        if not done:
            raise OSError("the answer is empty")


def _digest(name: str) -> tuple[str, str] | None:
    """(algorithm, first digits) that a file's name says of its content: `-0123abcd.` of the SHA-256, as MMDetection and
    torchvision write them, or `_0123ab.pkl` of the MD5, Detectron2's."""
    sha256, md5 = re.search(r"-([0-9a-f]{8,64})\.\w+$", name), re.search(r"_([0-9a-f]{6})\.pkl$", name)
    return ("sha256", sha256[1]) if sha256 else ("md5", md5[1]) if md5 else None


def _is_whole(path: Path, said: tuple[str, str] | None) -> bool:
    if said is None:
        return True
    found = hashlib.new(said[0], usedforsecurity=False)
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            found.update(chunk)
    return found.hexdigest().startswith(said[1])


def fetch(path_or_url: str | Path) -> Path:
    """A local file for a path, an https address or one of Detectron2's (detectron2://...), downloaded once into torch.hub's
    cache.

    Where the name ends in digits of a digest, the download and the kept file are checked by them; where it does not, the
    file is kept by its whole address. Raises FileNotFoundError, ValueError for a damaged download (which is removed) and
    for another kind of address, OSError for one that fails.
    """
    text = str(path_or_url)
    if text.startswith(DETECTRON2[0]):
        text = DETECTRON2[1] + text.removeprefix(DETECTRON2[0])
    if not re.match(r"[\w.+-]+://", text):
        path = Path(text).expanduser()
        if path.is_dir():
            weights = sorted(p.name for p in path.iterdir() if p.suffix in (".safetensors", ".pth", ".pkl"))
            inside = f": it has {', '.join(weights[:5])}" if weights else ""
            raise ValueError(f"{path}: a folder, expected a file of weights{inside}")
        if not path.is_file():
            raise FileNotFoundError(f"no such checkpoint file: {path}")
        return path
    if urlsplit(text).scheme not in SCHEMES:
        raise ValueError(f"{text}: expected a file or an https address")
    name = re.sub(r"[^\w.-]", "_", urlsplit(text).path.rsplit("/", 1)[-1])[-100:]
    said = _digest(name)
    if said is None:  # nothing but the address tells two files of one name apart
        name = f"{hashlib.sha256(text.encode()).hexdigest()[:16]}-{name}"
    target = Path(torch.hub.get_dir()) / "checkpoints" / name
    if target.is_file() and _is_whole(target, said):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{name}.{time.monotonic_ns()}.part")
    try:
        with open(part, "wb") as file:
            try:
                in_time(LONGEST, lambda: _download(text, file))
            except TimeoutError as error:
                raise OSError(str(error) or f"not done after {LONGEST:.0f} seconds") from None
        if not _is_whole(part, said):
            raise ValueError(f"{text}: the download is damaged (its {said[0]} does not begin with {said[1]})")
        part.replace(target)
    except (OSError, http.client.HTTPException) as error:  # URLError and time-outs are OSErrors
        raise OSError(f"cannot download {text}: {error}. Pass a local file with --weights instead.") from None
    finally:
        part.unlink(missing_ok=True)
    return target
