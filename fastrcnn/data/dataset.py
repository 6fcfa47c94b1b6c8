"""Pictures and their boxes, whatever format they were written in: one dataset over one table of arrays."""

import os
import unicodedata
import urllib.parse
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from fastrcnn.data.images import read_image, read_size
from fastrcnn.data.table import Table, Truth
from fastrcnn.data.transforms import apply

THIN, OUTSIDE, CUT = "less than a pixel wide or high", "outside the picture", "cut at the edge"

PIECE = 1 << 20


def _other_names(name: str) -> Iterator[str]:
    """How the picture of a `file_name` may be called on this machine: as it is written, with the slashes of Windows or the
    escapes of an address undone, behind the query of a labelling server, without its folders, the outer ones first; with
    the other letters for the suffix, and for accents."""
    plain = urllib.parse.unquote(name).rpartition("?d=")[2].replace("\\", "/")
    parts = plain.split("/")[-8:]
    for found in (name, plain, name.rpartition("/")[2], *("/".join(parts[k:]) for k in range(len(parts)))):
        stem, suffix = os.path.splitext(found)
        yield from (found, stem + suffix.lower(), stem + suffix.upper())
        yield from (unicodedata.normalize(form, found) for form in ("NFC", "NFD"))


def refuse_path(name: str, dataset) -> None:
    """Raises TypeError where an argument is the path of a dataset."""
    if isinstance(dataset, str | os.PathLike):
        raise TypeError(
            f"{name}: expected a dataset, such as fastrcnn.data.open_dataset({os.fspath(dataset)!r}), got the path"
        )


class _Each(Sequence):
    """`get(i)` of `count` items as a sequence."""

    def __init__(self, count: int, get):
        self.count, self.get = count, get

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index):
        places = range(self.count)[index]
        return self.get(places) if isinstance(places, int) else [self.get(i) for i in places]


class DetectionDataset(Dataset):
    """(image uint8 [C, H, W], target) pairs, to train on, RGB unless `channels` says otherwise; `truth` is what the
    files say as they say it, to measure against.

    target: boxes [N, 4] float32 xyxy pixels, labels [N] int64 counted from 0 in the order of the category ids,
    ignore_boxes [R, 4] (iscrowd, ignore, difficult), image_id. Boxes are cut at the picture's edge; what is then not a
    pixel wide and high is left out; `left_out` counts both, and the entries that were dropped. class_names and
    category_ids are by label, `sizes` int32 [N, 2] (height, width), `image_ids`, `objects` int32 [N] (boxes of each
    target) by index. An index of 10^7 pictures is a few arrays, which worker processes share. Raises ValueError, at its
    turn, for a picture that cannot be read or is not of the stated size.
    """

    def __init__(self, table: Table, transforms=None):
        self.table, self.path, self.transforms, self.findings = table, table.path, transforms, table.findings
        self.class_names, self.category_ids = table.class_names, table.category_ids
        self.channels: int | None = 3  # of the pictures, as the model wants them: see `read_image`
        self.image_ids = table.image_ids
        self.folder = self._folder()
        self._fill_sizes()
        self.sizes, self.left_out = table.sizes, Counter(table.findings.dropped)
        self.used, self.objects = self._used()

    def _folder(self) -> Path:
        """The one of the table's folders in which the most of a few pictures lie."""
        some = [self.table.names[i] for i in range(0, len(self), max(1, len(self) // 8))]
        found = [sum(os.path.isfile(folder / name) for name in some) for folder in self.table.folders]
        return self.table.folders[found.index(max(found))]

    def _fill_sizes(self) -> None:
        sizes = self.table.sizes
        for i in np.flatnonzero(sizes[:, 0] == 0):
            try:
                sizes[i] = read_size(self.picture(i))
                self.findings.note("no size stated", *self.where(i), "the size is the picture's")
            except ValueError as error:  # which is raised again at its turn
                self.findings.note("no size stated", *self.where(i), error)

    def _used(self) -> tuple[np.ndarray, np.ndarray]:
        """bool [M]: the annotations that targets hold; int32 [N]: how many objects each target has. Counts the
        others."""
        used = np.ones(len(self.table.boxes), bool)
        for reason, places in self.reasons():
            if len(places):
                self.left_out[reason] += len(places)
                if reason != CUT:
                    used[places] = False
        ends = np.concatenate([[0], np.cumsum(used & ~self.table.crowd, dtype=np.int64)])[self.table.starts]
        return used, np.diff(ends).astype(np.int32)

    def reasons(self) -> Iterator[tuple[str, np.ndarray]]:
        """(reason, which annotations [K]): those that are left out, or cut at the edge, in pieces of the table."""
        table = self.table
        for first in range(0, len(table.boxes), PIECE):  # the whole at once would be many times the table
            part = slice(first, first + PIECE)
            xy, wh = table.boxes[part, :2], table.boxes[part, 2:]
            owners = np.searchsorted(table.starts[1:], np.arange(first, first + len(xy)), side="right")
            size = table.sizes[owners][:, ::-1]
            inside = np.minimum(xy + wh, size) - np.maximum(xy, 0)
            thin = (wh < 1).any(1)
            outside = ~thin & (inside < 1).any(1)
            # Less than a pixel over the edge is rounding.
            cut = ~thin & ~outside & (np.maximum(-xy, xy + wh - size) > 1).any(1)
            for reason, mask in ((THIN, thin), (OUTSIDE, outside), (CUT, cut)):
                yield reason, first + np.flatnonzero(mask)

    def __len__(self) -> int:
        return len(self.table.names)

    def picture(self, index: int) -> Path:
        """Where the picture of an image lies; where none of its names is a file, the first of them."""
        name = self.table.names[index]
        first = self.folder / name
        if os.path.isfile(first):
            return first
        folders = dict.fromkeys([self.folder, *self.table.folders])
        return next((f / n for n in dict.fromkeys(_other_names(name)) for f in folders if os.path.isfile(f / n)), first)

    def where(self, index: int) -> tuple[str, str]:
        """The file, and the entry in it, that speak of an image."""
        if self.table.files is not None:
            return self.table.files[index], ""
        return str(self.path), f"images[{index}]"

    def where_box(self, place: int) -> tuple[str, str]:
        """The same of an annotation."""
        line = int(self.table.lines[place])
        if self.table.files is None:
            return str(self.path), f"annotations[{line}]"
        return self.table.files[int(np.searchsorted(self.table.starts, place, side="right")) - 1], f"line {line}"

    def target(self, index: int) -> dict:
        part = slice(*self.table.starts[index : index + 2])
        used, crowd = self.used[part], self.table.crowd[part]
        height, width = self.sizes[index]
        boxes = self.table.boxes[part].copy()
        boxes[:, 2:] += boxes[:, :2]
        boxes = boxes.clip(0, [width, height, width, height]).astype(np.float32)
        image_id = self.image_ids[index]
        return dict(
            boxes=torch.from_numpy(boxes[used & ~crowd]),
            labels=torch.from_numpy(self.table.labels[part][used & ~crowd].astype(np.int64)),
            ignore_boxes=torch.from_numpy(boxes[used & crowd]),
            image_id=image_id.item() if isinstance(image_id, np.generic) else image_id,
        )

    @property
    def targets(self) -> Sequence[dict]:
        """The target of every image, made when it is asked for."""
        return _Each(len(self), self.target)

    def rows(self, indices: Sequence[int]) -> list[dict]:
        """The annotations of some images as they are written: image (its place in `indices`), category (the label),
        bbox (x, y, width, height), area, iscrowd."""
        table, rows = self.table, []
        for i, index in enumerate(indices):
            part = slice(*table.starts[index : index + 2])
            columns = (table.labels[part], table.boxes[part], table.areas[part], table.crowd[part].astype(int))
            rows += [dict(image=i, category=c, bbox=b, area=a, iscrowd=crowd)
                     for c, b, a, crowd in zip(*(column.tolist() for column in columns))]  # fmt: skip
        return rows

    def truth(self, indices: Sequence[int]) -> Truth:
        """The annotations of some images as they are written, image by image in the order of the indices. Raises ValueError
        where there is no object."""
        table, indices = self.table, np.asarray(indices, np.int64).reshape(-1)
        counts = table.starts[indices + 1] - table.starts[indices]
        rows = np.arange(counts.sum()) + np.repeat(table.starts[indices] - np.cumsum(counts) + counts, counts)
        if table.crowd[rows].all():
            raise ValueError(f"{self.path}: no object is annotated on these {len(indices)} pictures")
        columns = table.labels[rows].astype(np.int64), table.boxes[rows], table.areas[rows], table.crowd[rows]
        return Truth(np.repeat(indices, counts), *columns)

    def check_size(self, index: int, image: Tensor) -> None:
        """Raises ValueError for a picture [C, H, W] of another size than the file says: the boxes are not its own."""
        height, width = image.shape[-2:]
        said = tuple(self.sizes[index].tolist())
        if (height, width) != said:
            swapped = (width, height) == said
            hint = " (turned by its EXIF orientation, or annotated with the sides swapped)" if swapped else ""
            where = ": ".join(filter(None, self.where(index)))
            raise ValueError(f"{where}: {said[1]} x {said[0]} pixels are stated, "
                             f"{self.picture(index)} has {width} x {height}{hint}")  # fmt: skip

    def __getitem__(self, index: int) -> tuple[Tensor, dict]:
        index = range(len(self))[index]
        image, target = read_image(self.picture(index), self.channels), self.target(index)
        self.check_size(index, image)
        return (image, target) if self.transforms is None else apply(self.transforms, image, target)
