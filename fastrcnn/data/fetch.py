"""The bytes behind a path or an address: regular files only, counted, and an address's whole answer within a time."""

import os
import queue
import stat
import threading
import time
import urllib.parse
import urllib.request
from http.client import HTTPException

TIMEOUT_S = 30  # for the whole answer of an address
CHUNK = 1 << 16


def is_address(source: str) -> bool:
    return source.lower().startswith(("http://", "https://"))


def read_bytes(source: str, limit: float) -> bytes:
    """The content of a file or an http(s) address. Raises OSError with the reason: also for what is no regular file (a
    pipe, a device) and for more than `limit` bytes."""
    return _fetch(source, limit) if is_address(source) else _read_file(source, limit)


def _read_file(path: str, limit: float) -> bytes:
    # Without O_NONBLOCK, opening a pipe waits until somebody writes to it.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:
        kind = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(kind):
            raise OSError("Is a directory")
        if not stat.S_ISREG(kind):
            raise OSError("it is no regular file")
        return _count(file.read, limit)


def _count(read, limit: float, deadline: float = float("inf")) -> bytes:
    data = bytearray()
    while chunk := read(CHUNK):
        data += chunk
        if len(data) > limit:
            raise OSError(f"it has more than {int(limit):,} bytes")
        if time.monotonic() > deadline:
            raise TimeoutError
    return bytes(data)


def _fetch(address: str, limit: float) -> bytes:
    """In a thread that is left behind when the time is over: a server that sends its head byte by byte outlasts every
    time limit of a socket."""
    answers: queue.SimpleQueue = queue.SimpleQueue()
    deadline = time.monotonic() + TIMEOUT_S
    quoted = urllib.parse.quote(address, safe="%/:=&?~#+!$,;'@()*[]")

    def ask() -> None:
        try:
            with urllib.request.urlopen(quoted, timeout=TIMEOUT_S) as response:
                data = _count(response.read1, limit, deadline)
                missing = getattr(response, "length", None)
            answers.put(OSError(f"the answer breaks off {missing} bytes before its end") if missing else data)
        except Exception as error:  # whatever it is, it belongs to who waits
            answers.put(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        answer = answers.get(timeout=TIMEOUT_S)
    except queue.Empty:
        answer = TimeoutError()
    if isinstance(answer, bytes):
        return answer
    if isinstance(answer, TimeoutError) and not str(answer):
        raise OSError(f"timed out: no whole answer within {TIMEOUT_S} s")
    if isinstance(answer, OSError):
        raise answer
    kind = "the answer breaks off" if isinstance(answer, HTTPException) else "no address that can be asked"
    raise OSError(f"{kind}: {str(answer) or type(answer).__name__}")
