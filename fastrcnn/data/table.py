"""Annotations as columns: what a dataset keeps of its files, so that ten million pictures are a few arrays and no
objects."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastrcnn.data.findings import Findings


def as_bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


class Texts(Sequence):
    """Texts in one buffer: `texts[i]`. data: their UTF-8 end to end; ends: int64 [N], where each ends."""

    def __init__(self, data: bytes | bytearray, ends: np.ndarray):
        self.data, self.ends = np.frombuffer(data, np.uint8), ends

    @classmethod
    def of(cls, texts: Iterable[bytes]) -> "Texts":
        texts = list(texts)
        return cls(b"".join(texts), np.cumsum(np.fromiter(map(len, texts), np.int64, len(texts))))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:
        index = range(len(self))[index]
        start = self.ends[index - 1] if index else 0
        return self.data[start : self.ends[index]].tobytes().decode("utf-8", "surrogatepass")

    def kept(self, places: np.ndarray) -> "Texts":
        return Texts.of(as_bytes(self[i]) for i in places)


class Truth(NamedTuple):
    """The M annotations of some pictures as they are written, as columns."""

    images: np.ndarray  # int64 [M], the picture's index in the dataset
    labels: np.ndarray  # int64 [M]
    boxes: np.ndarray  # float64 [M, 4] x, y, width, height in pixels
    areas: np.ndarray  # float64 [M] square pixels
    crowd: np.ndarray  # bool [M]: what is found there counts neither for nor against


@dataclass
class Table:
    """N pictures and M annotations, those of picture i at starts[i]:starts[i + 1]."""

    path: Path  # what was opened
    folders: list[Path]  # where the pictures may lie, the likeliest first
    names: Texts  # of the pictures' files, as they are written
    image_ids: Sequence  # int32 or int64 [N], or whole numbers and texts
    sizes: np.ndarray  # int32 [N, 2] height, width; 0 where nobody says
    starts: np.ndarray  # int64 [N + 1]
    boxes: np.ndarray  # float64 [M, 4] x, y, width, height in pixels as written
    labels: np.ndarray  # int32 [M]
    areas: np.ndarray  # float64 [M]
    crowd: np.ndarray  # bool [M]: iscrowd, ignore, difficult
    lines: np.ndarray  # int32 [M]: the entry or line of the annotation in its file
    class_names: list[str]
    category_ids: list[int]
    findings: Findings
    files: Texts | None = None  # of each picture's annotations, where they are not in `path`


def grouped(images: np.ndarray, count: int) -> tuple[np.ndarray | None, np.ndarray]:
    """(order int64 [M], starts int64 [count + 1]) that bring annotations of `images` int [M] picture by picture, those
    of one picture as they came. The order is None where they stand so already."""
    starts = np.zeros(count + 1, np.int64)
    np.cumsum(np.bincount(images, minlength=count), out=starts[1:])
    return (np.argsort(images, kind="stable") if (images[1:] < images[:-1]).any() else None), starts
