"""The entries of a COCO file, one by one where they have to be looked at, and as columns where they are many."""

import math
import re
from collections.abc import Iterable
from itertools import chain
from pathlib import Path

import numpy as np

from fastrcnn.data.findings import Findings, short
from fastrcnn.data.masks import box_of_segmentation
from fastrcnn.data.table import Texts, as_bytes


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


def identity(value) -> int | str:
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
    return identity(_field(row, "id")), as_bytes(name), *(sides if all(sides) else (0, 0))


def _flag(row: dict, key: str) -> int:
    value = row.get(key, 0)
    value = 0 if value is None else int(value) if isinstance(value, bool) else whole(value)
    if value not in (0, 1):
        raise _wrong(key, "0 or 1", row[key])
    return value


def _annotation(row: dict) -> tuple:
    """(image, category, x, y, width, height, area, crowd, id)"""
    image, category = identity(_field(row, "image_id")), whole(_field(row, "category_id"))
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


def _joined(names: list[bytes]) -> tuple[bytes, np.ndarray]:
    return b"".join(names), np.fromiter(map(len, names), np.int32, len(names))


def _plain_images(rows: list[dict]) -> list | None:
    """The columns of `image_columns` for a run in which everything is as COCO writes it; None where rows have to be
    looked at one by one."""
    try:
        ids, names, heights, widths = ([r[k] for r in rows] for k in ("id", "file_name", "height", "width"))
        if _types(ids) | _types(heights) | _types(widths) != {int} or _types(names) != {str}:
            return None
        sizes = np.array([heights, widths], np.int64).T
        data, lengths = _joined([as_bytes(name) for name in names])
        if sizes.min() < 1 or sizes.max() >= 2**31 or not lengths.all() or b"\0" in data:
            return None
        return [np.array(ids, np.int64), (data, lengths), sizes.astype(np.int32)]
    except (KeyError, TypeError, OverflowError):
        return None


def image_columns(images: list[tuple]) -> list:
    """[ids, (names end to end, their lengths), sizes int32 [N, 2]] of rows of `_image`."""
    ids, names, heights, widths = zip(*images) if images else ((),) * 4
    return [list(ids), _joined(names), np.array([heights, widths], np.int32).T]


def _plain_annotations(rows: list[dict]) -> list | None:
    """The same of `annotation_columns`."""
    try:
        numbers = [[r[k] for r in rows] for k in ("image_id", "category_id")]
        crowd, own = [r.get("iscrowd", 0) for r in rows], [r.get("id", -1) for r in rows]
        boxes, areas = [r["bbox"] for r in rows], [r.get("area") for r in rows]
        sides = list(chain.from_iterable(boxes))
        if (_types(chain(*numbers, crowd, own)) != {int} or _types(boxes) != {list} or not _types(sides) <= {int, float}
                or set(map(len, boxes)) != {4} or any("ignore" in r for r in rows)):  # fmt: skip
            return None
        boxes = np.array(sides, np.float64).reshape(-1, 4)
        with np.errstate(all="ignore"):
            products = boxes[:, 2] * boxes[:, 3]
            finite = np.isfinite(boxes[:, :2] + boxes[:, 2:]).all() and np.isfinite(products).all()
        if _types(areas) == {type(None)}:
            areas = products
        elif not _types(areas) <= {int, float}:
            return None
        areas, crowd = np.array(areas, np.float64), np.array(crowd, np.int64)
        if not (finite and boxes[:, 2:].min() >= 0 and areas.min() >= 0 and np.isfinite(areas).all()
                and ((crowd == 0) | (crowd == 1)).all()):  # fmt: skip
            return None
        image, category, own = (np.array(v, np.int64) for v in (*numbers, own))
        return [image, category, boxes, areas, crowd.astype(bool), own]
    except (KeyError, TypeError, OverflowError, ValueError):
        return None


def annotation_columns(annotations: list[tuple]) -> list:
    """[image ids, category ids, boxes [N, 4], areas, crowd, own ids] of rows of `_annotation`."""
    image, category, *box, area, crowd, own = zip(*annotations) if annotations else ((),) * 9
    return [list(image), np.array(category, np.int64), np.array(box, np.float64).T, np.array(area, np.float64),
            np.array(crowd, bool), np.array(own, np.int64)]  # fmt: skip


def entry(part: str, place: int, own=None) -> str:
    return f"{part}[{place}]" + ("" if own is None else f" (id {short(own)})")


class Grown:
    """A column that grows in place: what realloc moves is mapped elsewhere and never there twice."""

    def __init__(self, dtype, *shape: int):
        self.data, self.count = np.empty((1 << 12, *shape), dtype), 0

    def add(self, run) -> None:
        end = self.count + len(run)
        if end > len(self.data):
            self.data.resize((max(end, len(self.data) * 9 // 8), *self.data.shape[1:]), refcheck=False)
        self.data[self.count : end], self.count = run, end

    def take(self) -> np.ndarray:
        self.data.resize((self.count, *self.data.shape[1:]), refcheck=False)
        return self.data


class Whole(Grown):
    """Whole numbers: int32 as long as all fit, then int64."""

    def __init__(self):
        super().__init__(np.int32)

    def add(self, run) -> None:
        run = np.asarray(run, np.int64)
        if self.data.dtype == np.int32 and len(run) and not -(2**31) <= run.min() <= run.max() < 2**31:
            self.data = self.data.astype(np.int64)
        super().add(run)


class Names:
    def __init__(self):
        self.data, self.lengths = bytearray(), Grown(np.int32)

    def add(self, run: tuple[bytes, np.ndarray]) -> None:
        self.data += run[0]
        self.lengths.add(run[1])

    def take(self) -> Texts:
        return Texts(self.data, np.cumsum(self.lengths.take(), dtype=np.int64))


class Ids(Whole):
    """The same, or, from the first text on, a list of whole numbers and texts."""

    def __init__(self):
        super().__init__()
        self.mixed: list | None = None

    def add(self, run) -> None:
        if self.mixed is None and isinstance(run, list) and any(isinstance(v, str) for v in run):
            self.mixed = super().take().tolist()
        if self.mixed is None:
            super().add(run)
        else:
            self.mixed += run if isinstance(run, list) else run.tolist()

    def take(self) -> np.ndarray | list:
        return super().take() if self.mixed is None else self.mixed


class Columns:
    """A part of a file as columns, grown by runs of rows; the last column says which entries of the file they are."""

    def __init__(self, part: str, findings: Findings, path: Path):
        self.part, self.findings, self.path = part, findings, path
        self.plain, self.one, self.columns, grown = {
            "images": (
                _plain_images,
                lambda row: _image(row, findings.strict),
                image_columns,
                lambda: [Ids(), Names(), Grown(np.int32, 2)],
            ),
            "annotations": (
                _plain_annotations,
                _annotation,
                annotation_columns,
                lambda: [
                    Ids(),
                    *(Whole(), Grown(np.float64, 4), Grown(np.float64), Grown(bool), Whole()),
                ],
            ),
            "categories": (lambda rows: None, _category, lambda rows: [rows], lambda: [Grown(object)]),
        }[part]
        self.grown = [*grown(), Grown(np.int32)]

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
            columns = self.columns([row for _, row in kept])
        for column, run in zip(self.grown, [*columns, places]):
            column.add(run)

    def take(self, column: int):
        """A column in one piece, which is then no longer kept here."""
        found, self.grown[column] = self.grown[column].take(), None
        return found
