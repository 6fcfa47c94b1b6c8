"""Reads an annotation file entry by entry, and a dataset item by item: what is wrong is named before a run begins."""

import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


def _short(value) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _wrong(what: str, expected: str, got) -> ValueError:
    return ValueError(f"{what}: expected {expected}, got {_short(got)}")


def _field(row: dict, key: str):
    if key not in row:
        raise ValueError(f"{key} is missing")
    return row[key]


def _whole(value) -> int | None:
    """A whole number, also one written as 3.0 or "3", as some tools do; None for anything else."""
    if isinstance(value, str):
        return int(value) if re.fullmatch(r"0|-?[1-9][0-9]{0,18}", value) else None
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _number(value) -> float:
    """A finite number, else NaN."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return math.nan
    try:
        return float(value) if math.isfinite(value) else math.nan
    except OverflowError:
        return math.nan


def _identity(value) -> int | str:
    """0 and "0" are the same image."""
    number = _whole(value)
    if number is None and not (isinstance(value, str) and value):
        raise _wrong("id", "a whole number or a text", value)
    return value if number is None else number


def _category(row: dict) -> dict:
    number, name = _whole(_field(row, "id")), _field(row, "name")
    if number is None:
        raise _wrong("id", "a whole number", row["id"])
    if isinstance(name, int | float) and not isinstance(name, bool):
        name = str(name)
    if not isinstance(name, str) or not name.strip():
        raise _wrong("name", "a text", name)
    return {**row, "id": number, "name": name}


def _image(row: dict) -> dict:
    name, sides = _field(row, "file_name"), {side: _whole(_field(row, side)) for side in ("width", "height")}
    if not isinstance(name, str) or not name or "\0" in name:
        raise _wrong("file_name", "a text", name)
    for side, pixels in sides.items():
        if pixels is None or not 1 <= pixels < 2**31:
            raise _wrong(side, "pixels, a whole number from 1 up", row[side])
    return {**row, "id": _identity(_field(row, "id")), **sides}


def _annotation(row: dict, images: set, categories: set) -> dict:
    image, category = _identity(_field(row, "image_id")), _whole(_field(row, "category_id"))
    if image not in images:
        raise ValueError(f"image_id: no image has the id {_short(row['image_id'])}")
    if category not in categories:
        raise ValueError(f"category_id: no category has the id {_short(row['category_id'])}")
    given, expected = _field(row, "bbox"), "four finite numbers x, y, width, height"
    if not isinstance(given, list) or len(given) != 4:
        raise _wrong("bbox", expected, given)
    x, y, w, h = box = [_number(v) for v in given]
    if not math.isfinite(x + w) or not math.isfinite(y + h) or not math.isfinite(w * h):
        raise _wrong("bbox", expected, given)
    if w < 0 or h < 0:
        raise ValueError(f"bbox: expected x, y, width, height, got a negative size: {_short(given)}")
    crowd = row.get("iscrowd", 0)
    crowd = int(crowd) if isinstance(crowd, bool) else _whole(crowd)
    if crowd not in (0, 1):
        raise _wrong("iscrowd", "0 or 1", row["iscrowd"])
    area = w * h if row.get("area") is None else _number(row["area"])
    if not area >= 0:
        raise _wrong("area", "square pixels, a number from 0 up", row["area"])
    return dict(image_id=image, category_id=category, bbox=box, area=area, iscrowd=crowd)


def _rows(content: dict, part: str, check: Callable[[dict], dict], source) -> list[dict]:
    given = content[part]
    if not isinstance(given, list):
        raise ValueError(f"{source}: {part}: expected a list, got {_short(given)}")
    checked = []
    for i, row in enumerate(given):
        try:
            if not isinstance(row, dict):
                raise ValueError(f"expected an object with keys, got {_short(row)}")
            checked.append(check(row))
        except ValueError as error:
            named = f" (id {_short(row['id'])})" if isinstance(row, dict) and "id" in row else ""
            raise ValueError(f"{source}: {part}[{i}]{named}: {error}") from None
    return checked


def _no_two(rows: list[dict], part: str, key: str, source) -> None:
    first: dict = {}
    for i, row in enumerate(rows):
        if first.setdefault(row[key], i) != i:
            raise ValueError(f"{source}: {part}[{first[row[key]]}] and [{i}] have the same {key} {_short(row[key])}")


def read_json(path: Path):
    """What a JSON file holds, in UTF-8, UTF-16 or UTF-32, with a byte-order mark or without. Raises ValueError, naming it,
    for another content, OSError where it cannot be read."""
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: not a file")
    data = path.read_bytes()
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        hint = ": XML, as Pascal VOC's files are; COCO's are JSON" if data.lstrip()[:1] == b"<" else ""
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise ValueError(f"{path}: not JSON{hint or f' ({reason})'}") from None


def read_coco(path: str | Path) -> tuple[list[dict], list[dict], list[dict]]:
    """(images, categories, annotations) of a file in COCO's format, every entry checked.

    Images and categories keep their keys; ids and sizes are whole numbers (an image's id may be a text), categories come
    by ascending id. Annotations are image_id, category_id, bbox (x, y, width, height as written), area (width x height
    where the file says none) and iscrowd. Raises ValueError naming file and entry for what is not COCO's format, OSError.
    """
    content, path = read_json(Path(path)), Path(path)
    if not isinstance(content, dict):
        content = {}
    missing = {"images", "annotations", "categories"} - set(content)
    if missing:
        raise ValueError(f"{path}: not a COCO annotation file, it lacks {sorted(missing)}")
    images = _rows(content, "images", _image, path)
    categories = _rows(content, "categories", _category, path)
    for part, rows in (("images", images), ("categories", categories)):
        if not rows:
            raise ValueError(f"{path}: {part}: expected at least one")
        _no_two(rows, part, "id", path)
    _no_two(categories, "categories", "name", path)
    known = {row["id"] for row in images}, {row["id"] for row in categories}
    annotations = _rows(content, "annotations", lambda row: _annotation(row, *known), path)
    sides = [v for row in annotations for v in row["bbox"]]
    if sides and min(sides) >= 0 and max(sides) <= 1 and not all(v.is_integer() for v in sides):
        raise ValueError(f"{path}: every bbox lies between 0 and 1: relative coordinates, where COCO's are pixels")
    return images, sorted(categories, key=lambda row: row["id"]), annotations


def read_through(dataset) -> Counter:
    """Reads every (image, target) of a dataset once, in threads, and counts the objects by label, so that nothing ends a
    long run that could be seen before it. Raises ValueError naming the first items that cannot be read, and their number.
    """

    def read(index: int) -> list[int] | Exception:
        try:
            target = dataset[index][1]
            return target["labels"].tolist() if "labels" in target else [0] * len(target["boxes"])
        except (ValueError, TypeError, OSError) as error:
            return error

    counts, errors = Counter(), []
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for found in pool.map(read, range(len(dataset))):
            errors.append(found) if isinstance(found, Exception) else counts.update(found)
    if errors:
        more = f"; and {len(errors) - 3} more" if len(errors) > 3 else ""
        raise ValueError("; ".join(map(str, errors[:3])) + f"{more} ({len(errors)} of {len(dataset)} pictures)")
    return counts
