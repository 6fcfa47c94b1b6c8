"""What a folder of pictures and annotations is made of: splits by name, files by suffix, small text files."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from fastrcnn.data.decode import IMAGE_SUFFIXES

SPLITS = ("train", "val", "test")
MOST_BYTES = 1 << 26  # of an XML or text file
_SPLIT = re.compile(r"(?<![a-z])(train|val|test)(val|ing|id|idation)?(?=[0-9]*(?![a-z]))")


def split_of(name: str) -> str | None:
    """ "train", "val" or "test" for the name of a folder or file that says so (train2017, valid, instances_val)."""
    found = _SPLIT.search(name.lower())
    return found and found.group(1)


def files_under(root: Path) -> Iterator[str]:
    """The files below a folder, their paths from there, in order; links to folders are followed once."""
    seen = set()
    for folder, folders, files in os.walk(root, followlinks=True):
        if (real := os.path.realpath(folder)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        below = os.path.relpath(folder, root)
        for name in sorted(files):
            yield name if below == "." else f"{below}/{name}"


def is_picture(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in (*IMAGE_SUFFIXES, ".npy")


def without_caches(pictures: list[str]) -> list[str]:
    """The same without the arrays that lie beside a picture of their name: ultralytics keeps decoded pictures so."""
    others = {name.rpartition(".")[0] for name in pictures if not name.lower().endswith(".npy")}
    return [name for name in pictures if not (name.lower().endswith(".npy") and name.rpartition(".")[0] in others)]


def read_text(path: Path) -> str:
    """A small text file, in UTF-8. Raises ValueError naming it, OSError where it cannot be read."""
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: not a file")
    with open(path, "rb") as file:
        data = file.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise ValueError(f"{path}: more than {MOST_BYTES:,} bytes")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not text in UTF-8 ({error.reason} at byte {error.start})") from None


def entries(path: Path) -> list[str]:
    """The lines of a list that are not blank."""
    return [line.strip() for line in read_text(path).splitlines() if line.strip()]
