"""Annotations in Pascal VOC's XML: Annotations/ beside JPEGImages/ and ImageSets/, or a file beside each picture.

Coordinates are those of VOC: the pixels of the corners, counted from 1, the last one inside: x = xmin - 1, width = xmax
- xmin + 1. Many tools write the corners themselves instead, counted from 0; a set in which a coordinate is 0, or not
whole, shows that it is theirs, and is then read so: x = xmin, width = xmax - xmin. A note among the findings says
which.
"""

import math
from array import array
from collections.abc import Callable
from pathlib import Path
from xml.parsers import expat

import numpy as np

from fastrcnn.data.coco_rows import number, whole
from fastrcnn.data.findings import Findings, short
from fastrcnn.data.folders import MOST_BYTES, entries, files_under, is_picture, split_of
from fastrcnn.data.table import Table, Texts, as_bytes

DEEPEST, LONGEST = 32, 1 << 16  # elements in each other; characters of a value
BOX = ("xmin", "ymin", "xmax", "ymax")
OBJECT = ("annotation", "object")
PLACES = {("annotation", "filename"), ("annotation", "size", "width"), ("annotation", "size", "height"), (*OBJECT, "name"),
          (*OBJECT, "difficult"), *((*OBJECT, "bndbox", side) for side in BOX)}  # fmt: skip


class _Reader:
    """One annotation file: `values` of the whole, and for each object (line, values)."""

    def __init__(self, data: bytes):
        self.values: dict[str, str] = {}
        self.objects: list[tuple[int, dict[str, str]]] = []
        self.at: tuple[str, ...] = ()
        self.text: list[str] | None = None
        self.parser = parser = expat.ParserCreate()
        parser.buffer_text = True
        # Entities are declared in a document type, which no annotation has: nothing is expanded, nothing fetched.
        parser.StartDoctypeDeclHandler = self._refuse
        parser.StartElementHandler, parser.EndElementHandler = self._start, self._end
        parser.CharacterDataHandler = self._characters
        parser.Parse(data, True)

    def _refuse(self, *declared) -> None:
        raise ValueError("a document type, with which no annotation begins")

    def _start(self, name: str, attributes) -> None:
        if not self.at and name != "annotation":
            raise ValueError(f"the root is {short(name)}, where Pascal VOC's is 'annotation'")
        if len(self.at) == DEEPEST:
            raise ValueError(f"line {self.parser.CurrentLineNumber}: elements more than {DEEPEST} deep")
        self.at += (name,)
        if self.at == OBJECT:
            self.objects.append((self.parser.CurrentLineNumber, {}))
        self.text = [] if self.at in PLACES else None

    def _characters(self, text: str) -> None:
        if self.text is not None and sum(map(len, self.text)) < LONGEST:
            self.text.append(text)

    def _end(self, name: str) -> None:
        if self.text is not None:
            values = self.objects[-1][1] if self.at[:2] == OBJECT else self.values
            values.setdefault(name, "".join(self.text).strip())
        self.at, self.text = self.at[:-1], None


def parse(path: Path) -> tuple[dict[str, str], list[tuple[int, dict[str, str]]]]:
    """(values, objects) of an annotation file. Raises ValueError naming it and saying what is wrong, OSError."""
    with open(path, "rb") as file:
        data = file.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise ValueError(f"more than {MOST_BYTES:,} bytes")
    try:
        found = _Reader(data)
    except expat.ExpatError as error:
        raise ValueError(f"no XML: {expat.errors.messages.get(error.code, error)}, line {error.lineno}") from None
    except (LookupError, UnicodeError) as error:  # an encoding that nobody knows
        raise ValueError(f"no XML: {error}") from None
    return found.values, found.objects


def _number(text: str) -> float:
    try:
        return number(float(text))
    except ValueError:
        return math.nan


def _object(values: dict[str, str]) -> tuple[str, list[float], bool]:
    """(name, xmin ymin xmax ymax, difficult)"""
    if not values.get("name"):
        raise ValueError("name is missing")
    for side in BOX:
        if side not in values:
            raise ValueError(f"bndbox: {side} is missing")
    box = [_number(values[side]) for side in BOX]
    if not all(abs(v) < 1e9 for v in box):
        raise ValueError(f"bndbox: expected four finite numbers, got {short([values[side] for side in BOX])}")
    if box[2] < box[0] or box[3] < box[1]:
        raise ValueError(f"bndbox: expected xmin, ymin, xmax, ymax, got a negative size: {box}")
    difficult = values.get("difficult") or "0"
    if difficult.lower() not in ("0", "1", "true", "false"):
        raise ValueError(f"difficult: expected 0 or 1, got {short(difficult)}")
    return values["name"], box, difficult.lower() in ("1", "true")


def listed(path: Path) -> Callable[[str], bool]:
    """Which of the XML files a list of ImageSets/Main names. Raises what `entries` raises."""
    lines = entries(path)  # a name, in which there may be blanks, or a name and a flag
    stems = {*lines, *(line.split()[0] for line in lines)}
    stems |= {stem.rpartition("/")[2].rpartition(".")[0] for stem in stems if is_picture(stem)}
    return lambda file: Path(file).stem in stems


def find_voc(folder: Path) -> dict[str | None, Callable[[str], bool]]:
    """Which of the XML files (paths from the folder) belong to each split; {} where there are none, None: no splits."""
    files = [name for name in files_under(folder) if name.lower().endswith(".xml")]
    if not files:
        return {}
    for main in sorted({folder / "ImageSets" / "Main", *folder.glob("**/ImageSets/Main")} if folder.is_dir() else ()):
        lists = {}
        for name in ("train", "trainval", "val", "test"):
            if (main / f"{name}.txt").is_file():
                lists.setdefault(split_of(name), listed(main / f"{name}.txt"))
        if lists:
            return lists
    splits = {split_of(name.split("/")[0]) for name in files if "/" in name} - {None}
    if not splits:
        return {None: lambda file: True}
    return {split: lambda file, split=split: "/" in file and split_of(file.split("/")[0]) == split for split in splits}


def _class_names(folder: Path, found: set[str]) -> list[str]:
    """In the order of labels.txt, or of CVAT's labelmap.txt, where there is one; else sorted."""
    listed: list[str] = []
    if (folder / "labels.txt").is_file():
        listed = list(dict.fromkeys(entries(folder / "labels.txt")))
    elif (folder / "labelmap.txt").is_file():  # name:color:parts:actions, and a class that is none
        listed = [line.split(":")[0] for line in entries(folder / "labelmap.txt") if not line.startswith("#")]
        listed = list(dict.fromkeys(n for n in listed if n != "background" or n in found))
    return listed + sorted(found - set(listed))


def read_voc(folder: Path, belongs: Callable[[str], bool], images: Path | None = None, strict: bool = False) -> Table:
    """The annotations of the XML files below a folder that belong to a split (`find_voc`). Classes are those of all
    files, so that every split counts them alike: sorted, ids from 1. `difficult` objects are ignored, as a crowd is.
    images: where the pictures are looked for (default: the folder). Raises ValueError naming the file, OSError."""
    findings, root = Findings(strict), images or folder
    everything = list(files_under(folder))
    pictures = [name for name in (everything if root == folder else files_under(root)) if is_picture(name)]
    if images is None and not pictures:  # of Annotations/ alone
        root = folder.absolute().parent
        pictures = [name for name in files_under(root) if is_picture(name)]
    by_place = {name.rpartition(".")[0]: name for name in reversed(pictures)}
    by_stem = {Path(name).stem: name for name in reversed(pictures)}
    by_name = {Path(name).name: name for name in reversed(pictures)}
    labels_of: dict[str, int] = {}
    names, files, sizes, counts = [], [], array("i"), array("q")
    boxes, labels, crowd, lines, plain = array("d"), array("i"), array("b"), array("i"), False
    for file in everything:
        if not file.lower().endswith(".xml"):
            continue
        path, inside = folder / file, belongs(file)
        try:
            values, objects = parse(path)
        except ValueError as error:
            if inside:
                findings.drop("bad entry", path, "", error)
            continue
        before = len(labels)
        for line, given in objects:
            try:
                name, box, difficult = _object(given)
            except ValueError as error:
                if inside:
                    findings.drop("bad entry", path, f"line {line}", error)
                continue
            plain = plain or min(box) < 1 or any(v % 1 for v in box)
            label = labels_of.setdefault(name, len(labels_of))
            if inside:
                boxes.extend(box)
                labels.append(label)
                crowd.append(difficult)
                lines.append(line)
        if inside:
            place, said = file.rpartition(".")[0], values.get("filename", "").replace("\\", "/").rpartition("/")[2]
            picture = by_place.get(place) or (said in by_name and by_name[said]) or by_stem.get(Path(file).stem)
            height, width = (whole(values.get(side, "")) or 0 for side in ("height", "width"))
            names.append(as_bytes(picture or said or f"{place}.jpg"))
            files.append(as_bytes(str(path)))
            counts.append(len(labels) - before)
            sizes.extend((height, width) if 0 < height < 2**31 and 0 < width < 2**31 else (0, 0))
    if not names:
        raise ValueError(f"{folder}: no annotation file of Pascal VOC's can be read")
    table = np.array(boxes, np.float64).reshape(-1, 4)
    table[:, 2:] -= table[:, :2]
    if not plain:
        table += [-1, -1, 1, 1]
    said = "corners counted from 0" if plain else "pixels counted from 1, the last one inside"
    findings.note("convention", folder, "", f"coordinates are read as {said}")
    class_names = _class_names(folder, set(labels_of))
    place = np.array([class_names.index(name) for name in labels_of], np.int32)
    ids, starts = np.arange(1, len(names) + 1), np.concatenate([[0], np.cumsum(np.array(counts, np.int64))])
    return Table(folder, [root], Texts.of(names), ids, np.array(sizes, np.int32).reshape(-1, 2), starts, table,
                 place[np.array(labels, np.int32)], table[:, 2] * table[:, 3], np.array(crowd, bool),
                 np.array(lines, np.int32), class_names, list(range(1, len(class_names) + 1)), findings,
                 Texts.of(files))  # fmt: skip
