"""Files that are whole at every moment."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


def beside(path: Path) -> Path:
    """Where a file is written before it takes the name `path`: in its folder, so that the renaming is one step."""
    return path.with_name(f".{path.name[:80]}.{os.getpid()}.part")


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write in, which takes the name `path` when the block ends, and is gone where that raises. Nothing waits for
    the disk: a loss of power may leave it empty."""
    part = beside(path)
    try:
        with open(part, "wb") as file:
            yield file
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Writes a file beside `path`, brings it to the disk, and renames it: `path` is the old or the new file, never a part.
    Raises OSError; the old file is still there then."""
    try:
        with replacing(path) as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
    except RuntimeError as error:  # torch.save ends its archive with one of its own over the disk's
        raise error.__context__ if isinstance(error.__context__, OSError) else error from None
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # else the renaming may be lost with the power
    finally:
        os.close(folder)
