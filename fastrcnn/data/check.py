"""What is wrong with a dataset, found before a run begins: its entries, its boxes, its pictures, and between its
splits.

hotcoco's health check is not used: of a file in COCO's format it gives the ids of some faults, and neither entries nor
anything of the pictures.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from fastrcnn.data.dataset import CUT, DetectionDataset
from fastrcnn.data.detect_format import detect_format
from fastrcnn.data.findings import Findings
from fastrcnn.data.images import ImageError, read_image, read_stored_size

FEW = 10  # objects of a class
PIECE = 4096  # pictures that are handed to the threads at once
ALIKE = 0.95  # IoU of two boxes of one class that are the same object twice
# What is said and no fault: pictures and boxes of these are trained on.
INFORMATION = {"convention", "no size stated", "placeholder category", "empty picture", "class with few objects",
               "unused class", CUT}  # fmt: skip


def faults(findings: Findings) -> dict[str, int]:
    """How many of each kind there are that --strict refuses."""
    return {kind: count for kind, count in findings.counts.items() if kind not in INFORMATION}


def check(path: str | Path, images: str | Path | None = None) -> Findings:
    """Everything that is wrong with the dataset at a path, of all its splits: a list of Finding (kind, file, entry,
    message, dropped), with `counts` by kind.

    Entries that are not the format's, unknown and repeated ids; boxes outside, cut, degenerate, or there twice;
    pictures that are missing, cannot be read, are of another size than stated or turned by EXIF against their boxes,
    are named twice, have no objects; classes with few objects or none; one picture in two splits. Every picture is
    decoded. Raises ValueError where the format cannot be told or a file is none of it.
    """
    found, seen, first = Findings(), {}, None
    for split, read in detect_format(path).splits.items():
        dataset = DetectionDataset(read(None if images is None else Path(images), False))
        check_dataset(dataset, split, seen, found)
        first = first or (split, dataset.class_names)
        if others := set(dataset.class_names) - set(first[1]):
            message = f"{', '.join(sorted(others)[:10])}: classes of {split} that {first[0]} does not have"
            found.note("classes of one split alone", dataset.path, "", message, len(others))
    return found


def check_dataset(dataset: DetectionDataset, split: str | None = None, seen: dict | None = None,
                  found: Findings | None = None) -> Findings:  # fmt: skip
    """`check` of one dataset. seen: digests of pictures -> (split, path), of the splits before, which grows by this
    one's."""
    found = Findings() if found is None else found
    for finding in dataset.findings:
        (found.drop if finding.dropped else found.note)(finding.kind, finding.file, finding.entry, finding.message)
    for kind, count in (dataset.findings.counts - Counter(f.kind for f in dataset.findings)).items():
        found.counts[kind] += count  # beyond those that are listed
    found.dropped.update(dataset.findings.dropped - Counter(f.kind for f in dataset.findings if f.dropped))
    _boxes(dataset, found)
    _classes(dataset, found)
    _pictures(dataset, split, {} if seen is None else seen, found)
    return found


def _boxes(dataset: DetectionDataset, found: Findings) -> None:
    table = dataset.table
    for reason, places in dataset.reasons():
        for k in places:
            index = int(np.searchsorted(table.starts, k, side="right")) - 1
            file, entry = dataset.where_box(k)
            height, width = table.sizes[index]
            message = f"{reason}: x, y, width, height {table.boxes[k].tolist()} of a picture of {width} x {height}"
            (found.note if reason == CUT else found.drop)(reason, file, entry, message)
    for index in np.flatnonzero(np.diff(table.starts) > 1):
        part = slice(*table.starts[index : index + 2])
        boxes, labels = table.boxes[part], table.labels[part]
        low = np.maximum(boxes[:, None, :2], boxes[None, :, :2])
        ends = boxes[:, :2] + boxes[:, 2:]
        sides = (np.minimum(ends[:, None], ends[None]) - low).clip(0)
        shared, area = sides.prod(2), boxes[:, 2:].prod(1)
        joint = area[:, None] + area[None] - shared
        same = (shared > ALIKE * joint) & (labels[:, None] == labels[None])
        for later, first in zip(*np.nonzero(np.tril(same, -1))):
            file, entry = dataset.where_box(part.start + later)
            other = dataset.where_box(part.start + first)[1]
            found.note("duplicate box", file, entry, f"the box of {other} again, of the same class")


def _classes(dataset: DetectionDataset, found: Findings) -> None:
    table = dataset.table
    numbers = np.bincount(table.labels[dataset.used & ~table.crowd], minlength=len(dataset.class_names))
    for name, count in zip(dataset.class_names, numbers.tolist()):
        if count < FEW:
            kind = "class with few objects" if count else "unused class"
            hint = "" if count else "; a placeholder of a tool's? Take it out of the file, it would be trained on"
            found.note(kind, dataset.path, "", f"{name!r} has {count or 'no'} objects{hint}")
    for index in np.flatnonzero(dataset.objects == 0):
        found.note("empty picture", *dataset.where(index), f"{dataset.picture(index)} has no objects: background")


def _pictures(dataset: DetectionDataset, split: str | None, seen: dict, found: Findings) -> None:
    named: dict[str, int] = {}
    for index, (fault, digest) in enumerate(_read_all(dataset)):
        path, where = str(dataset.picture(index)), dataset.where(index)
        if (first := named.setdefault(path, index)) != index:
            found.note("picture named twice", *where, f"{path} is {': '.join(dataset.where(first))}'s as well")
        elif fault is not None:
            found.drop(*fault)
        elif digest is not None:
            before, other = seen.setdefault(digest, (split, path))
            if before != split:
                found.note(
                    "same picture in two splits", path, "", f"the same pixels as {other}, in {before} and {split}"
                )
            elif other != path:
                found.note("same picture twice", path, "", f"the same pixels as {other}")


def _read_all(dataset: DetectionDataset) -> Iterator[tuple[tuple | None, bytes | None]]:
    """((kind, file, entry, message) or None, digest of the pixels) of each picture, in order, read in threads."""

    def read(index: int) -> tuple[tuple | None, bytes | None]:
        path, where = dataset.picture(index), dataset.where(index)
        if not os.path.isfile(path):
            return ("missing picture", *where, f"there is no {path}{_hint(dataset.table.names[index])}"), None
        try:
            image = read_image(path, None)
        except ImageError as error:
            return ("unreadable picture", *where, error), None
        try:
            dataset.check_size(index, image)
        except ValueError as error:
            said = str(error).removeprefix(": ".join(filter(None, where)) + ": ")
            turned = read_stored_size(path) == tuple(dataset.sizes[index])
            return ("turned by EXIF" if turned else "other size", *where, said), None
        return None, hashlib.blake2b(image.numpy().tobytes(), digest_size=16).digest() + bytes(
            str(image.shape), "ascii"
        )

    yield from _in_threads(read, len(dataset))


def _in_threads(read: Callable, count: int) -> Iterator:
    """read(0), read(1) ... read(count - 1), in order; `map` makes an object for each call at once, of which a large dataset
    has too many."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for first in range(0, count, PIECE):
            yield from pool.map(read, range(first, min(first + PIECE, count)))


def _hint(name: str) -> str:
    """What to do about a name that is a place on a labelling server."""
    if name.startswith(("/data/", "upload/", "http:", "https:")) or "local-files" in name:
        return " (a labelling server's name: export with the pictures, or name their folder with --images)"
    return ""


def read_through(dataset) -> Counter:
    """Reads every (image, target) of a dataset once, in threads, and counts the objects by label, so that nothing ends
    a long run that could be seen before it. Raises ValueError naming the first items that cannot be read, and their
    number.
    """

    def read(index: int) -> list[int] | Exception:
        try:
            target = dataset[index][1]
            return target["labels"].tolist() if "labels" in target else [0] * len(target["boxes"])
        except (ValueError, TypeError, OSError) as error:
            return error

    counts, errors = Counter(), []
    for found in _in_threads(read, len(dataset)):
        errors.append(found) if isinstance(found, Exception) else counts.update(found)
    if errors:
        more = f"; and {len(errors) - 3} more" if len(errors) > 3 else ""
        raise ValueError("; ".join(map(str, errors[:3])) + f"{more} ({len(errors)} of {len(dataset)} pictures)")
    return counts
