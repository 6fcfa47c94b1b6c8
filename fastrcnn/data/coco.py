"""Annotations in COCO's JSON format, as COCO writes it and as the tools do: CVAT, Label Studio, Roboflow, LabelMe,
VIA."""

import contextlib
import gc
import mmap
from collections import Counter
from pathlib import Path

import numpy as np

from fastrcnn.data.coco_rows import Columns, entry, identity
from fastrcnn.data.dataset import DetectionDataset
from fastrcnn.data.findings import Findings, short
from fastrcnn.data.folders import split_of
from fastrcnn.data.json_rows import json_parts
from fastrcnn.data.table import Table, Texts, as_bytes, grouped

PARTS = ("images", "annotations", "categories")
PIECE = 1 << 20
NOTHING = ("background", "none", "null", "placeholder", "n/a")  # names of a category 0
ENCODINGS = ("utf-8", "utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be")


def _places_of(ids: np.ndarray | list, asked: np.ndarray | list) -> np.ndarray:
    """int32: where each of `asked` stands in `ids`, -1 where it does not."""
    if isinstance(ids, list) or isinstance(asked, list):
        place: dict = {}
        for i, v in enumerate(ids if isinstance(ids, list) else ids.tolist()):
            place.setdefault(v, i)
        return np.array([place.get(v, -1) for v in (asked if isinstance(asked, list) else asked.tolist())], np.int32)
    found = np.full(len(asked), -1, np.int32)
    if ids.dtype != asked.dtype:
        ids = ids.astype(np.int64)
    order = None if (ids[1:] > ids[:-1]).all() else np.argsort(ids, kind="stable")
    for first in range(0, len(asked) if len(ids) else 0, PIECE):
        part = asked[first : first + PIECE].astype(ids.dtype)
        where = np.searchsorted(ids, part, sorter=order).clip(max=len(ids) - 1)
        where = where if order is None else order[where]
        found[first : first + PIECE] = np.where(ids[where] == part, where, -1)
    return found


def _repeated(ids: np.ndarray | list) -> list[tuple[int, int]]:
    """(first, later) places of what stands there more than once."""
    if isinstance(ids, np.ndarray):
        order = None if (ids[1:] > ids[:-1]).all() else np.argsort(ids, kind="stable")
        if order is None or not (again := np.flatnonzero(ids[order][1:] == ids[order][:-1])).size:
            return []
        ids, places = ids[order], {}
        return sorted((places.setdefault(int(ids[k]), int(order[k])), int(order[k + 1])) for k in again)
    first: dict = {}
    return [(first[v], i) for i, v in enumerate(ids) if first.setdefault(v, i) != i]


def _kept(ids, names: Texts, findings: Findings, path: Path) -> np.ndarray:
    """bool [N]: which images are kept of those with one id: the first where all name one file, else none."""
    kept = np.ones(len(names), bool)
    for first, later in _repeated(ids):
        findings.drop("duplicate id", path, "", f"images[{first}] and [{later}] have the same id {short(ids[first])}")
        kept[later] = False
        if names[first] != names[later]:
            kept[first] = False
    return kept


def _classes(rows: list[dict], used: set[int], findings: Findings, path: Path) -> list[dict]:
    """The categories by ascending id, without a placeholder that no annotation has: the super category that Roboflow lists
    beside its classes, told by them or by its own "none", or the 0 that others keep for what is no object."""
    kept: list[dict] = []
    seen, above = set(), Counter(row["supercategory"] for row in rows if isinstance(row["supercategory"], str))
    for i, row in enumerate(rows):
        name, others = row["name"], len(rows) - 1
        over = others > 0 and above[name] - (row["supercategory"] == name) == others
        alone = row["supercategory"] == "none" and above["none"] == 1
        nothing = row["id"] == 0 and (alone or name.strip("_ ").lower() in NOTHING)
        if row["id"] not in used and others and (over or nothing):
            findings.note("placeholder category", path, entry("categories", i, row["id"]),
                          f"{short(name)} is no class of its own and has no object: left out")  # fmt: skip
        elif (row["id"], name) not in seen:
            seen.add((row["id"], name))
            kept.append(row)
        elif findings.strict:
            raise ValueError(f"{path}: categories[{i}]: a category before it has the same id {row['id']}")
    for key in ("id", "name"):
        first: dict = {}
        for i, row in enumerate(kept):
            if (before := first.setdefault(row[key], i)) != i:
                raise ValueError(f"{path}: categories[{before}] and [{i}] have the same {key} {short(row[key])}")
    return sorted(kept, key=lambda row: row["id"])


def folders_of(path: Path) -> list[Path]:
    """Where the pictures of an annotation file may lie: `images` beside it, then where the tools put them."""
    here, above, split = (
        path.parent,
        path.parent.parent,
        path.stem.removeprefix("instances_").removeprefix("_annotations"),
    )
    folders = [here / "images", here, above / "images", above / split, above / "images" / split, here / split,
               here / "images" / split, here / "JPEGImages", above / "JPEGImages", above]  # fmt: skip
    return [folder for k, folder in enumerate(folders) if k == 0 or folder.is_dir()]


def _is_coco(path: Path) -> bool:
    """Told by two of its keys, whatever its encoding."""
    if not path.stat().st_size:
        return False
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return sum(any(data.find(f'"{part}"'.encode(code)) >= 0 for code in ENCODINGS) for part in PARTS) > 1


def find_coco(folder: Path) -> dict[str | None, Path]:
    """The annotation files of a folder by split, None: it has no splits; {} where there are none. Raises ValueError
    where several files might be meant."""
    files = [p for pattern in ("*.json", "annotations/*.json", "*/*.json") for p in sorted(folder.glob(pattern))]
    splits: dict[str | None, list[Path]] = {}
    for path in dict.fromkeys(files):
        if path.is_file() and _is_coco(path):
            inside = path.parent != folder and split_of(path.parent.name)
            splits.setdefault(split_of(path.stem) or inside or None, []).append(path)
    found = {}
    for split, paths in splits.items():
        paths = [p for p in paths if p.stem.startswith("instances")] or paths
        if len(paths) > 1:
            raise ValueError(f"{folder}: several annotation files, name one: {', '.join(str(p) for p in paths[:5])}")
        found[split] = paths[0]
    if len(found) > 1:
        found.pop(None, None)
    return found


def read_coco(path: str | Path, images: str | Path | None = None, strict: bool = True) -> Table:
    """The annotations of a file in COCO's format. images: the folder of the pictures (default: looked for around the
    file).

    Ids are whole numbers, 3.0 and "3" too (an image's may be a text); area is width x height and iscrowd 0 where the
    file says none; a bbox that is missing is that of the segmentation; categories come by ascending id. With `strict`
    an entry that is not COCO's is refused; else it is dropped and stands in the table's findings, and a size that is
    missing is the picture's. Raises ValueError naming file and entry for what is refused, or cannot be read at all,
    OSError.
    """
    path, findings = Path(path), Findings(strict)
    found: dict[str, Columns] = {}
    with _no_collector():
        for part, first, rows in json_parts(path, PARTS):
            if not isinstance(rows, list):
                raise ValueError(f"{path}: {part}: expected a list, got {short(rows)}")
            if first == 0:
                found[part] = Columns(part, findings, path)
            found[part].add(first, rows)
    if missing := set(PARTS) - set(found):
        raise ValueError(f"{path}: not a COCO annotation file, it lacks {sorted(missing)}")
    pictures, objects = found["images"], found["annotations"]
    ids, names, sizes = (pictures.take(k) for k in range(3))
    categories = found["categories"].take(0).tolist()
    for part, rows in (("images", names), ("categories", categories)):
        if not len(rows):
            raise ValueError(f"{path}: {part}: expected at least one")
    kept = _kept(ids, names, findings, path)
    place, labels, lines, classes = _join(objects, ids, kept, categories)
    boxes = objects.take(2)
    if (
        len(boxes)
        and boxes.min() >= 0
        and boxes.max() <= 1
        and any((run % 1).any() for run in np.array_split(boxes, 64))
    ):
        raise ValueError(f"{path}: every bbox lies between 0 and 1: relative coordinates, where COCO's are pixels")
    columns = [boxes, objects.take(3), objects.take(4), labels, lines]
    if (labels < 0).any() or not kept.all():
        good, some = np.flatnonzero(labels >= 0), np.flatnonzero(kept)
        place = (np.cumsum(kept) - 1)[place[good]]
        columns = [column[good] for column in columns]
        names, sizes = names.kept(some), sizes[some]
        ids = [ids[i] for i in some] if isinstance(ids, list) else ids[some]
    order, starts = grouped(place, len(names))
    if order is not None:
        columns = [column[order] for column in columns]
    boxes, areas, crowd, labels, lines = columns
    folders = [Path(images)] if images is not None else folders_of(path)
    ids = Identities.of(as_bytes(str(v)) for v in ids) if isinstance(ids, list) else ids
    return Table(path, folders, names, ids, sizes, starts, boxes, labels, areas, crowd, lines,
                 [row["name"] for row in classes], [row["id"] for row in classes], findings)  # fmt: skip


class Identities(Texts):
    """Ids of which some are texts."""

    def __getitem__(self, index: int) -> int | str:
        return identity(super().__getitem__(index))


@contextlib.contextmanager
def _no_collector():
    """Rows come and go by the million and hold no circles: looking for some takes as long as reading them."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _join(objects: Columns, ids, kept: np.ndarray, categories: list[dict]):
    """(place int32 [M] of the image of each annotation, its label int32 [M], its entry int32 [M], categories): a label
    of -1 is an annotation to drop."""
    findings, path, lines = objects.findings, objects.path, objects.take(-1)
    owners, numbers, own = objects.take(0), objects.take(1), objects.take(5)
    if not (own[1:] > own[:-1]).all():
        given = np.sort(own[own != -1])
        if again := int((given[1:] == given[:-1]).sum()):
            findings.note("duplicate id", path, "annotations", f"{again} have the id of another", again)
    classes = _classes(categories, set(np.unique(numbers).tolist()), findings, path)
    labels = _places_of(np.array([c["id"] for c in classes], np.int64), numbers)
    place = _places_of(ids, owners)

    def named(k: int) -> str:
        return entry("annotations", lines[k], None if own[k] == -1 else own[k])

    wrong = np.zeros(len(labels), bool)
    for kind, mask, tell in [
        ("unknown image", place < 0, lambda k: f"image_id: no image has the id {short(owners[k])}"),
        ("unknown category", labels < 0, lambda k: f"category_id: no category has the id {numbers[k]}"),
        ("duplicate id", ~kept[place], lambda k: f"image_id: several images have the id {short(owners[k])}"),
    ]:
        findings.drop_all(kind, path, np.flatnonzero(mask & ~wrong), named, tell)
        wrong |= mask
    labels[wrong] = -1
    return place, labels, lines, classes


class CocoDataset(DetectionDataset):
    """The DetectionDataset of a COCO annotation file, every entry of which has to be COCO's: raises ValueError naming
    file and entry where one is not. images: the folder of the pictures (default: looked for around the file)."""

    def __init__(self, annotations: str | Path, images: str | Path | None = None, transforms=None):
        super().__init__(read_coco(annotations, images), transforms)
