"""What a user names, as paths and addresses of pictures: files, folders, patterns, addresses, lists of them."""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from fastrcnn.data.fetch import is_address
from fastrcnn.data.folders import entries
from fastrcnn.data.images import list_images


def find_sources(
    asked: Sequence[str],
    recursive: bool = False,
    wanted: Callable[[str], bool] | None = None,
    beside: str | os.PathLike[str] | None = None,
) -> tuple[list[str], int]:
    """`list_images` of all that is asked for, and how many more lie in sub-folders of what is a folder. A file in .txt is a
    list with a source a line, "-" such a list on standard input. beside: a folder whose files are left out where it lies
    below one that is asked for: that of the results. Raises ValueError or OSError for a list that cannot be read."""
    found: list[str] = []
    below = 0
    for source in _lines_of(asked):
        own = list_images(source, recursive, wanted)
        if not is_address(source) and os.path.isdir(os.path.expanduser(source)):
            every = own if recursive else list_images(source, True, wanted)
            every = [path for path in every if beside is None or not _within(path, beside, source)]
            own = every if recursive else own
            below += len(every) - len(own)
        found += own
    return found, below


def _within(path: str, folder: str | os.PathLike[str], root: str) -> bool:
    """Whether a path lies in a folder that itself lies below `root`."""
    place, root = os.path.realpath(folder), os.path.realpath(os.path.expanduser(root))
    return place != root and os.path.realpath(path).startswith(place + os.sep)


def _lines_of(asked: Sequence[str]) -> Iterator[str]:
    for source in asked:
        if source == "-":
            yield from (line.strip() for line in sys.stdin if line.strip())
        elif source.lower().endswith(".txt") and not is_address(source):
            yield from entries(Path(os.path.expanduser(source)))
        else:
            yield source


def shard_of(items: Sequence[str], shard: str) -> tuple[list[str], list[int]]:
    """Part i of n, from "i/n" with i from 1, of items: every n-th, and their places among all from 1. Raises ValueError."""
    first, slash, count = shard.partition("/")
    if not (slash and first.isdigit() and count.isdigit() and 1 <= int(first) <= int(count)):
        raise ValueError(f"shard: expected i/n with i from 1 to n, as 2/8, got {shard!r}")
    places = list(range(int(first) - 1, len(items), int(count)))
    return [items[k] for k in places], [k + 1 for k in places]
