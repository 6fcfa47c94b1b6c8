"""Annotations in YOLO's text: a line an object (class, centre x, centre y, width, height, of the picture's sides), a
file a picture, in labels/ where the picture is in images/, or beside it; with data.yaml or without.

Lines of polygons (class, x, y, x, y, ...) give the box round them. Category ids are the classes' places, counted from
1.
"""

import math
import os
from array import array
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from fastrcnn.data.data_yaml import read_data_yaml
from fastrcnn.data.findings import Findings, short
from fastrcnn.data.folders import entries, files_under, is_picture, read_text, split_of, without_caches
from fastrcnn.data.images import read_size
from fastrcnn.data.table import Table, Texts, as_bytes

YAMLS = ("data.yaml", "dataset.yaml")
NAMES = ("classes.txt", "obj.names", "labels.txt", "_darknet.labels")
ROUNDING = 1e-3


@dataclass
class Yolo:
    """Where the pictures of a split are (folders, or lists of files), and the classes' names, if they are told."""

    folder: Path
    sources: list[Path]
    names: list[str] | None
    told_by: Path | None


def names_of(path: Path, found: dict) -> list[str] | None:
    """The classes' names in a data.yaml that was read."""
    given = found.get("names")
    if isinstance(given, dict):
        if not all(k.isdecimal() and int(k) < 100_000 for k in given):
            raise ValueError(f"{path}: names: expected class numbers, got {short(list(given))}")
        given = [given.get(str(i), str(i)) for i in range(max(map(int, given)) + 1)]
    if given is not None and not isinstance(given, list):
        raise ValueError(f"{path}: names: expected a list, got {short(given)}")
    return [str(name) for name in given] if given else None


def _resolved(path: Path, base: Path, value: str) -> Path | None:
    """A folder or list that data.yaml names: from its `path`, from where it lies, and as Roboflow means it
    ('../train')."""
    value = value.replace("\\", "/")
    inner = value
    while inner.startswith("../"):
        inner = inner[3:]
    places = [base / value, path.parent / value, path.parent / inner, base / inner]
    return next((p for p in places if os.path.exists(p)), None)  # False also for what is no name


def find_yaml(path: Path) -> dict[str | None, Yolo]:
    """What a data.yaml names, by split."""
    found = read_data_yaml(path)
    names, base = names_of(path, found), path.parent
    if isinstance(found.get("path"), str) and found["path"]:
        base = base / os.path.expanduser(found["path"])
    splits, missing = {}, []
    for split, keys in (("train", ["train"]), ("val", ["val", "valid"]), ("test", ["test"])):
        values = next((found[k] for k in keys if found.get(k)), [])
        values = [values] if isinstance(values, str) else list(values)
        sources = [_resolved(path, base, value) for value in values]
        missing += [value for value, source in zip(values, sources) if source is None]
        if sources and None not in sources:
            splits[split] = Yolo(path.parent, sources, names, path)
    if not splits:
        said = f"there is no {', '.join(map(short, missing))}" if missing else "expected train: or val: with a folder"
        raise ValueError(f"{path}: {said}")
    return splits


def _label_of(picture: str) -> list[str]:
    """Where the label file of a picture may be: in labels/ for the last images/ of its path, or beside it."""
    stem = picture.rpartition(".")[0]
    parts = stem.split("/")
    for k in range(len(parts) - 2, -1, -1):
        if parts[k] == "images":
            return ["/".join([*parts[:k], "labels", *parts[k + 1 :]]) + ".txt", stem + ".txt"]
    return [stem + ".txt"]


def _above(folder: Path) -> dict[str | None, Yolo]:
    """The same of a folder that is a part of what lies above it: of what a data.yaml there names, or of an images/ whose
    labels/ lie beside it."""
    here = folder.resolve()
    for path in (place / name for place in here.parents[:2] for name in YAMLS):
        try:
            named = find_yaml(path) if path.is_file() else {}
        except ValueError:  # which is about other folders
            continue
        inside = {}
        for split, y in named.items():
            if own := [s for s in y.sources if here in (s.resolve(), *s.resolve().parents)]:
                inside[split] = replace(y, sources=own)
        if inside:
            return inside if len(inside) > 1 else dict.fromkeys([None], *inside.values())
    base = next((place.parent for place in (here, *here.parents) if place.name == "images"), None)
    if base is None or not any(os.path.isfile(_label_of(f"{here}/{n}")[0]) for n in files_under(here) if is_picture(n)):
        return {}
    told_by = next((base / name for name in NAMES if (base / name).is_file()), None)
    return {None: Yolo(base, [here], entries(told_by) if told_by else None, told_by)}


def find_yolo(folder: Path) -> dict[str | None, Yolo]:
    """What a folder holds in YOLO's format, by split, None: it has no splits; {} where there is nothing."""
    yamls = [p for p in sorted([*folder.glob("*.yaml"), *folder.glob("*.yml")]) if "names" in read_text(p)]
    yamls = [p for p in yamls if p.name in YAMLS] or yamls
    if yamls:
        return find_yaml(yamls[0])
    told_by = next((folder / name for name in NAMES if (folder / name).is_file()), None)
    names = entries(told_by) if told_by else None
    splits: dict[str | None, set[Path]] = {}
    everything = set(files_under(folder))
    for name in sorted(everything):
        if is_picture(name) and any(label in everything for label in _label_of(name)):
            parts = name.split("/")[:-1]
            k = next((k for k, part in enumerate(parts) if split_of(part)), None)
            source = folder / "/".join(parts[: k + 1]) if k is not None else folder
            splits.setdefault(None if k is None else split_of(parts[k]), set()).add(source)
    if set(splits) - {None}:
        splits.pop(None, None)
    if not splits or names is None:
        above = _above(folder)
        if not splits:
            return above
        names, told_by = next(((y.names, y.told_by) for y in above.values()), (names, told_by))
    return {split: Yolo(folder, sorted(sources), names, told_by) for split, sources in splits.items()}


def _pictures(source: Path) -> list[str]:
    """The paths of the pictures of a folder, or of a list of them."""
    if os.path.isdir(source):
        return [f"{source}/{name}" for name in without_caches([n for n in files_under(source) if is_picture(n)])]
    listed = []
    for line in entries(source):
        places = [source.parent / line, source.parent / "images" / Path(line).name, source.parent.parent / line,
                  source.parent / line.partition("/")[2]]  # fmt: skip
        listed.append(str(next((p for p in places if os.path.isfile(p)), places[0])))
    return listed


def _box(line: str, classes: int | None) -> tuple[int, list[float]]:
    """(class, [x, y, width, height] as parts of the picture's sides)"""
    try:
        first, *values = map(float, line.split())
    except ValueError:
        raise ValueError(f"expected numbers, got {short(line.strip())}") from None
    if not (first.is_integer() and 0 <= first < 1e6):
        raise ValueError(f"expected a class number first, got {short(line.strip())}")
    if classes is not None and first >= classes:
        raise ValueError(f"class {int(first)} is none of the {classes} that are named")
    if len(values) >= 6 and len(values) % 2 == 0:
        xs, ys = values[::2], values[1::2]
        values = [min(xs), min(ys), max(xs), max(ys)]
        values = [
            (values[0] + values[2]) / 2,
            (values[1] + values[3]) / 2,
            values[2] - values[0],
            values[3] - values[1],
        ]
    if len(values) != 4:
        raise ValueError(f"expected a class and four numbers, or a polygon, got {1 + len(values)} numbers")
    if not all(math.isfinite(v) and -ROUNDING <= v <= 1 + ROUNDING for v in values):
        raise ValueError(f"expected parts of the picture's sides, from 0 to 1, got {short(values)}")
    x, y, w, h = values
    if w < 0 or h < 0:
        raise ValueError(f"expected a width and a height from 0 up, got {w} and {h}")
    return int(first), [x - w / 2, y - h / 2, w, h]


def _size(picture: str) -> tuple[int, int] | ValueError:
    try:
        return read_size(picture)
    except ValueError as error:
        return error


def read_yolo(found: Yolo, images: Path | None = None, strict: bool = False) -> Table:
    """The annotations of one split (`find_yolo`). A picture without a label file, or with an empty one, has no objects.
    images: where the pictures are (default: where they were found). Raises ValueError naming file and line, OSError."""
    findings, root = Findings(strict), found.folder
    pictures = [name for source in ([images] if images else found.sources) for name in _pictures(source)]
    if not pictures:
        raise ValueError(f"{', '.join(map(str, found.sources))}: no pictures")
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        sizes_read = list(pool.map(_size, pictures))
    names, files, sizes, counts = [], [], array("i"), array("q")
    boxes, labels, lines = array("d"), array("i"), array("i")
    labelled = set()
    for picture, size in zip(pictures, sizes_read):
        places = [*_label_of(picture), str(root / "labels" / (Path(picture).stem + ".txt"))]
        label = next((place for place in places if os.path.isfile(place)), places[0])
        labelled.add(label)
        if isinstance(size, ValueError):
            findings.drop("unreadable picture", picture, "", str(size).removeprefix(f"{picture}: "))
            continue
        try:
            text = read_text(Path(label)) if os.path.isfile(label) else ""
        except ValueError as error:
            findings.drop("bad entry", label, "", str(error).removeprefix(f"{label}: "))
            continue
        before, (height, width) = len(labels), size
        for number, line in enumerate(text.splitlines(), 1):
            if not line.strip():
                continue
            try:
                kind, (x, y, w, h) = _box(line, found.names and len(found.names))
            except ValueError as error:
                findings.drop("bad entry", label, f"line {number}", error)
                continue
            boxes.extend((x * width, y * height, w * width, h * height))
            labels.append(kind)
            lines.append(number)
        names.append(as_bytes(os.path.relpath(picture, root)))
        files.append(as_bytes(label))
        counts.append(len(labels) - before)
        sizes.extend(size)
    for folder in sorted({os.path.dirname(label) for label in labelled if "/labels/" in label}):
        for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else ():
            if name.endswith(".txt") and f"{folder}/{name}" not in labelled and name not in NAMES:
                findings.drop("missing picture", f"{folder}/{name}", "", "there is no picture of this name")
    if not names:
        raise ValueError(f"{root}: no picture of {len(pictures)} can be read: {findings[0]}")
    class_names = found.names or [str(i) for i in range(max(labels, default=-1) + 1)]
    if not class_names:
        raise ValueError(f"{root}: no class is named and no object annotated")
    for i, name in enumerate(class_names):
        if not name.strip() or class_names.index(name) != i:
            raise ValueError(
                f"{found.told_by}: names: class {i}: expected a name that no class before it has, got {short(name)}"
            )
    table = np.array(boxes, np.float64).reshape(-1, 4)
    starts = np.concatenate([[0], np.cumsum(np.array(counts, np.int64))])
    return Table(root, [root], Texts.of(names), np.arange(1, len(names) + 1), np.array(sizes, np.int32).reshape(-1, 2),
                 starts, table, np.array(labels, np.int32), table[:, 2] * table[:, 3], np.zeros(len(labels), bool),
                 np.array(lines, np.int32), class_names, list(range(1, len(class_names) + 1)), findings,
                 Texts.of(files))  # fmt: skip
