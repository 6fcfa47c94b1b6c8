"""Annotations in COCO's JSON format, as COCO writes it and as the tools do: CVAT, Label Studio, Roboflow, LabelMe, VIA."""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from pathlib import Path

import numpy as np

from fastrcnn.data.dataset import DetectionDataset
from fastrcnn.data.findings import Findings, short
from fastrcnn.data.json_rows import json_parts
from fastrcnn.data.masks import box_of_segmentation
from fastrcnn.data.table import Table, Texts, as_bytes, grouped

PARTS = ("images", "annotations", "categories")


def _wrong(what: str, expected: str, got) -> ValueError:
    return ValueError(f"{what}: expected {expected}, got {short(got)}")


def _field(row: dict, key: str):
    if key not in row:
        raise ValueError(f"{key} is missing")
    return row[key]


def whole(value) -> int | None:
    """A whole number of 64 bits, also one written as 3.0 or "3", as some tools do; None for anything else."""
    if isinstance(value, str):
        return int(value) if re.fullmatch(r"0|-?[1-9][0-9]{0,17}", value) else None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63 else None


def number(value) -> float:
    """A finite number, else NaN."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return math.nan
    try:
        return float(value) if math.isfinite(value) else math.nan
    except OverflowError:
        return math.nan


def _identity(value) -> int | str:
    """0 and "0" are the same image."""
    found = whole(value)
    if found is None and not (isinstance(value, str) and value):
        raise _wrong("id", "a whole number or a text", value)
    return value if found is None else found


def _category(row: dict) -> dict:
    found, name = whole(_field(row, "id")), _field(row, "name")
    if found is None:
        raise _wrong("id", "a whole number", row["id"])
    if isinstance(name, int | float) and not isinstance(name, bool):
        name = str(name)
    if not isinstance(name, str) or not name.strip():
        raise _wrong("name", "a text", name)
    return dict(id=found, name=name, supercategory=row.get("supercategory"))


def _image(row: dict, strict: bool) -> tuple[int | str, bytes, int, int]:
    """(id, file name, height, width); without `strict` a size that is not there is 0, to be read from the picture."""
    name, sides = _field(row, "file_name"), []
    if not isinstance(name, str) or not name or "\0" in name:
        raise _wrong("file_name", "a text", name)
    for side in ("height", "width"):
        given = _field(row, side) if strict else row.get(side)
        pixels = 0 if not strict and (given is None or whole(given) == 0) else whole(given)
        if pixels is None or not (strict <= pixels < 2**31):
            raise _wrong(side, "pixels, a whole number from 1 up", given)
        sides.append(pixels)
    return _identity(_field(row, "id")), as_bytes(name), *(sides if all(sides) else (0, 0))


def _flag(row: dict, key: str) -> int:
    value = row.get(key, 0)
    value = 0 if value is None else int(value) if isinstance(value, bool) else whole(value)
    if value not in (0, 1):
        raise _wrong(key, "0 or 1", row[key])
    return value


def _annotation(row: dict) -> tuple:
    """(image, category, x, y, width, height, area, crowd, id)"""
    image, category = _identity(_field(row, "image_id")), whole(_field(row, "category_id"))
    if category is None:
        raise ValueError(f"category_id: no category has the id {short(row['category_id'])}")
    given, expected = row.get("bbox"), "four finite numbers x, y, width, height"
    if not given and row.get("segmentation"):
        given = box_of_segmentation(row["segmentation"])
    if given is None:
        given = _field(row, "bbox")
    if not isinstance(given, list) or len(given) != 4:
        raise _wrong("bbox", expected, given)
    x, y, w, h = (number(v) for v in given)
    if not math.isfinite(x + w) or not math.isfinite(y + h) or not math.isfinite(w * h):
        raise _wrong("bbox", expected, given)
    if w < 0 or h < 0:
        raise ValueError(f"bbox: expected x, y, width, height, got a negative size: {short(given)}")
    crowd = _flag(row, "iscrowd") | _flag(row, "ignore")
    area = w * h if row.get("area") is None else number(row["area"])
    if not area >= 0:
        raise _wrong("area", "square pixels, a number from 0 up", row["area"])
    own = whole(row.get("id", -1))
    return image, category, x, y, w, h, area, crowd, -1 if own is None else own


def _types(values: Iterable) -> set[type]:
    return set(map(type, values))


def _plain_images(rows: list[dict]) -> list | None:
    """The columns of `_image` for a run in which everything is as COCO writes it; None where a row has to be looked at."""
    try:
        ids, names, heights, widths = ([r[k] for r in rows] for k in ("id", "file_name", "height", "width"))
        if _types(ids) | _types(heights) | _types(widths) != {int} or _types(names) != {str}:
            return None
        sizes = np.array([heights, widths], np.int64)
        names = [as_bytes(name) for name in names]
        if sizes.min() < 1 or sizes.max() >= 2**31 or not all(names) or any(b"\0" in name for name in names):
            return None
        return [np.array(ids, np.int64), names, *sizes.astype(np.int32)]
    except (KeyError, TypeError, OverflowError):
        return None


def _plain_annotations(rows: list[dict]) -> list | None:
    """The same of `_annotation`."""
    try:
        whole_numbers = [[r[k] for r in rows] for k in ("image_id", "category_id")]
        crowd, own = [r.get("iscrowd", 0) for r in rows], [r.get("id", -1) for r in rows]
        boxes, areas = [r["bbox"] for r in rows], [r.get("area") for r in rows]
        if (_types(chain(*whole_numbers, crowd, own)) != {int} or _types(boxes) != {list}
                or not _types(chain.from_iterable(boxes)) <= {int, float} or any("ignore" in r for r in rows)):  # fmt: skip
            return None
        boxes = np.array(boxes, np.float64).reshape(len(rows), 4)
        with np.errstate(all="ignore"):
            sides = boxes[:, 2] * boxes[:, 3]
            finite = np.isfinite(boxes[:, :2] + boxes[:, 2:]).all() and np.isfinite(sides).all()
        if _types(areas) == {type(None)}:
            areas = sides
        elif not _types(areas) <= {int, float}:
            return None
        areas, crowd = np.array(areas, np.float64), np.array(crowd, np.int64)
        if not (finite and boxes[:, 2:].min() >= 0 and areas.min() >= 0 and np.isfinite(areas).all()
                and ((crowd == 0) | (crowd == 1)).all()):  # fmt: skip
            return None
        return [*(np.array(v, np.int64) for v in whole_numbers), *boxes.T, areas, crowd, np.array(own, np.int64)]
    except (KeyError, TypeError, OverflowError, ValueError):
        return None


def entry(part: str, place: int, own=None) -> str:
    return f"{part}[{place}]" + ("" if own is None else f" (id {short(own)})")


class _Columns:
    """A part of the file as columns, grown by runs of rows. `places`: of the rows that are kept, in the file."""

    def __init__(self, part: str, width: int, plain: Callable, one: Callable, findings: Findings, path: Path):
        self.part, self.plain, self.one, self.findings, self.path = part, plain, one, findings, path
        self.columns, self.places = [[] for _ in range(width)], []

    def add(self, first: int, rows: list) -> None:
        columns = self.plain(rows) if rows and _types(rows) == {dict} else None
        places = np.arange(first, first + len(rows), dtype=np.int32)
        if columns is None:
            kept = []
            for i, row in enumerate(rows):
                try:
                    if not isinstance(row, dict):
                        raise ValueError(f"expected an object with keys, got {short(row)}")
                    kept.append((i, self.one(row)))
                except ValueError as error:
                    own = row.get("id") if isinstance(row, dict) else None
                    self.findings.drop("bad entry", self.path, entry(self.part, first + i, own), error)
            places = places[[i for i, _ in kept]]
            columns = [list(c) for c in zip(*(row for _, row in kept))] or [[] for _ in self.columns]
        for column, run in zip(self.columns, columns):
            column.append(run)
        self.places.append(places)

    def array(self, column: int, dtype) -> np.ndarray:
        """A column in one piece; its pieces are let go."""
        runs, self.columns[column] = self.columns[column], []
        return np.concatenate([np.zeros(0, dtype), *(np.asarray(run, dtype) for run in runs)])

    def ids(self, column: int) -> np.ndarray | list:
        """int64 [N], or, where some are texts, a list of whole numbers and texts."""
        runs = self.columns[column]
        if any(isinstance(v, str) for run in runs if isinstance(run, list) for v in run):
            self.columns[column] = []
            return [v for run in runs for v in (run if isinstance(run, list) else run.tolist())]
        return self.array(column, np.int64)


def _places_of(ids: np.ndarray | list, asked: np.ndarray | list) -> np.ndarray:
    """int64: where each of `asked` stands in `ids`, -1 where it does not."""
    if isinstance(ids, list) or isinstance(asked, list):
        place: dict = {}
        for i, v in enumerate(ids if isinstance(ids, list) else ids.tolist()):
            place.setdefault(v, i)
        return np.array([place.get(v, -1) for v in (asked if isinstance(asked, list) else asked.tolist())], np.int64)
    if not len(ids) or not len(asked):
        return np.full(len(asked), -1, np.int64)
    order = None if (ids[1:] > ids[:-1]).all() else np.argsort(ids, kind="stable")
    found = np.searchsorted(ids, asked, sorter=order).clip(max=len(ids) - 1)
    found = found if order is None else order[found]
    found[ids[found] != asked] = -1
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


def _refuse_or_drop_repeated(ids, names: Texts, findings: Findings, path: Path) -> np.ndarray:
    """bool [N]: which images are kept of those with one id: the first where all name one file, else none."""
    kept = np.ones(len(names), bool)
    for first, later in _repeated(ids):
        findings.drop("duplicate id", path, "", f"images[{first}] and [{later}] have the same id {short(ids[first])}")
        kept[later] = False
        if names[first] != names[later]:
            kept[first] = False
    return kept


def _is_placeholder(row: dict, others: Sequence[dict]) -> bool:
    """The super category that Roboflow lists beside its classes, and the background of LabelMe's scripts."""
    background = row["id"] == 0 and row["name"].strip("_ ").lower() == "background"
    return background or (bool(others) and all(other["supercategory"] == row["name"] for other in others))


def _classes(rows: list[dict], used: np.ndarray, findings: Findings, path: Path) -> list[dict]:
    """The categories by ascending id, without a placeholder that no annotation has."""
    kept: list[dict] = []
    for i, row in enumerate(rows):
        others = [other for k, other in enumerate(rows) if k != i]
        if row["id"] not in used and others and _is_placeholder(row, others):
            findings.note("placeholder category", path, entry("categories", i, row["id"]),
                          f"{short(row['name'])} stands over the others and has no object: left out")  # fmt: skip
        elif not any(other["id"] == row["id"] and other["name"] == row["name"] for other in kept):
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


def read_coco(path: str | Path, images: str | Path | None = None, strict: bool = True) -> Table:
    """The annotations of a file in COCO's format. images: the folder of the pictures (default: looked for around the file).

    Ids are whole numbers, 3.0 and "3" too (an image's may be a text); area is width x height and iscrowd 0 where the file
    says none; a bbox that is missing is that of the segmentation; categories come by ascending id. With `strict` an entry
    that is not COCO's is refused; else it is dropped and stands in the table's findings, and a size that is missing is the
    picture's. Raises ValueError naming file and entry for what is refused, or cannot be read at all, OSError.
    """
    path, findings = Path(path), Findings(strict)
    parts = {
        "images": lambda: _Columns("images", 4, _plain_images, lambda row: _image(row, strict), findings, path),
        "annotations": lambda: _Columns("annotations", 9, _plain_annotations, _annotation, findings, path),
        "categories": lambda: _Columns(
            "categories", 1, lambda rows: None, lambda row: (_category(row),), findings, path
        ),
    }
    found: dict[str, _Columns] = {}
    for part, first, rows in json_parts(path, PARTS):
        if not isinstance(rows, list):
            raise ValueError(f"{path}: {part}: expected a list, got {short(rows)}")
        if first == 0:
            found[part] = parts[part]()
        found[part].add(first, rows)
    if missing := set(PARTS) - set(found):
        raise ValueError(f"{path}: not a COCO annotation file, it lacks {sorted(missing)}")
    pictures, objects = found["images"], found["annotations"]
    names, ids = Texts.of(pictures.columns[1]), pictures.ids(0)
    categories = list(chain.from_iterable(found["categories"].columns[0]))
    for part, rows in (("images", names), ("categories", categories)):
        if not len(rows):
            raise ValueError(f"{path}: {part}: expected at least one")
    sizes = np.stack([pictures.array(2, np.int32), pictures.array(3, np.int32)], 1)
    kept = _refuse_or_drop_repeated(ids, names, findings, path)

    owners, lines = objects.ids(0), np.concatenate([np.zeros(0, np.int32), *objects.places])
    numbers, own = objects.array(1, np.int64), objects.array(8, np.int64)
    classes = _classes(categories, np.unique(numbers), findings, path)
    category_ids = [row["id"] for row in classes]
    place, labels = _places_of(ids, owners), _places_of(np.array(category_ids, np.int64), numbers)

    def named(k: int) -> str:
        return entry("annotations", lines[k], None if own[k] == -1 else int(own[k]))

    unknown = [
        ("unknown image", place < 0, lambda k: f"image_id: no image has the id {short(owners[k])}"),
        ("unknown category", labels < 0, lambda k: f"category_id: no category has the id {numbers[k]}"),
        ("duplicate id", (place >= 0) & ~kept[place], lambda k: f"image_id: several images have the id {short(owners[k])}"),
    ]  # fmt: skip
    wrong = np.zeros(len(labels), bool)
    for kind, mask, tell in unknown:
        findings.drop_all(kind, path, np.flatnonzero(mask & ~wrong), named, tell)
        wrong |= mask
    given = own[own != -1]
    if again := len(given) - len(np.unique(given)):
        findings.note("duplicate id", path, "annotations", f"{again} have the id of another", again)
    del owners, numbers, own, given

    boxes = np.empty((len(labels), 4))
    for k in range(4):
        boxes[:, k] = objects.array(2 + k, np.float64)
    if len(boxes) and boxes.min() >= 0 and boxes.max() <= 1 and (boxes % 1).any():
        raise ValueError(f"{path}: every bbox lies between 0 and 1: relative coordinates, where COCO's are pixels")
    areas, crowd, labels = objects.array(6, np.float64), objects.array(7, bool), labels.astype(np.int32)
    if wrong.any() or not kept.all():
        good = np.flatnonzero(~wrong)
        place = (np.cumsum(kept) - 1)[place[good]]
        boxes, areas, crowd, labels, lines = boxes[good], areas[good], crowd[good], labels[good], lines[good]
        some = np.flatnonzero(kept)
        names, sizes = names.kept(some), sizes[some]
        ids = [ids[i] for i in some] if isinstance(ids, list) else ids[some]
    order, starts = grouped(place, len(names))
    del place
    if not (order[1:] > order[:-1]).all():
        boxes, areas, crowd, labels, lines = boxes[order], areas[order], crowd[order], labels[order], lines[order]
    folders = [Path(images)] if images is not None else folders_of(path)
    return Table(path, folders, names, ids, sizes, starts, boxes, labels, areas, crowd, lines,
                 [row["name"] for row in classes], category_ids, findings)  # fmt: skip


class CocoDataset(DetectionDataset):
    """The DetectionDataset of a COCO annotation file, every entry of which has to be COCO's: raises ValueError naming file
    and entry where one is not. images: the folder of the pictures (default: looked for around the file)."""

    def __init__(self, annotations: str | Path, images: str | Path | None = None, transforms=None):
        super().__init__(read_coco(annotations, images), transforms)
