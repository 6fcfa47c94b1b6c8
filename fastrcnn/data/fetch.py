"""The bytes behind a path or an address: regular files only, counted, and an address's whole answer within a time."""

import os
import stat
import time
import urllib.parse
from http.client import HTTPException

from fastrcnn.checkpoints.fetch import in_time, opener

TIMEOUT_S = 30  # for the whole answer of an address
CHUNK = 1 << 16


def is_address(source: str) -> bool:
    return source.lower().startswith(("http://", "https://"))


def read_bytes(source: str, limit: float) -> bytes:
    """The content of a file or an http(s) address. Raises OSError with the reason: also for what is no regular file (a
    pipe, a device) and for more than `limit` bytes."""
    return _fetch(source, limit) if is_address(source) else _read_file(source, limit)


def open_regular(path: str):
    """A regular file, open to be read in binary; OSError for a folder, a pipe, a device."""
    # Without O_NONBLOCK, opening a pipe waits until somebody writes to it.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    kind = os.fstat(descriptor).st_mode
    if stat.S_ISREG(kind):
        return open(descriptor, "rb")
    os.close(descriptor)
    raise OSError("Is a directory" if stat.S_ISDIR(kind) else "it is no regular file")


def _read_file(path: str, limit: float) -> bytes:
    with open_regular(path) as file:
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
    deadline = time.monotonic() + TIMEOUT_S
    quoted = urllib.parse.quote(address, safe="%/:=&?~#+!$,;'@()*[]")

    def ask() -> bytes:
        with opener(("http", "https")).open(quoted, timeout=TIMEOUT_S) as response:
            data = _count(response.read1, limit, deadline)
            if missing := getattr(response, "length", None):
                raise OSError(f"the answer breaks off {missing} bytes before its end")
            return data

    try:
        return in_time(TIMEOUT_S, ask)
    except TimeoutError as error:
        raise OSError(str(error) or f"timed out: no whole answer within {TIMEOUT_S} s") from None
    except OSError:
        raise
    except Exception as error:
        kind = "the answer breaks off" if isinstance(error, HTTPException) else "no address that can be asked"
        raise OSError(f"{kind}: {str(error) or type(error).__name__}") from None
