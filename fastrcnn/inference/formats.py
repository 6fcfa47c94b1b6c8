"""What was found, as files: COCO's JSON, CSV and Parquet from the lines of a run, YOLO's text and crops of each picture.

A line is JSON: dict(image=dict(id, file_name, width, height, ...), annotations=[COCO results]). Files of a whole run are
made from the lines one after the other, so that they need little memory however many there are.
"""

import csv
import io
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor

from fastrcnn._write import write_whole
from fastrcnn.inference.detections import Detections

FORMATS = ("json", "csv", "parquet", "yolo", "crops")
COLUMNS = ("image_id", "file_name", "x1", "y1", "x2", "y2", "score", "category_id", "name")
ROWS = 50_000  # of a Parquet file that are held at a time
Row = dict[str, Any]


def check_formats(formats: tuple[str, ...]) -> None:
    """Raises ValueError for an unknown format, ImportError where a package for it is missing."""
    unknown = [name for name in formats if name not in FORMATS]
    if unknown:
        raise ValueError(f"format: expected some of {', '.join(FORMATS)}, got {', '.join(unknown)}")
    if "parquet" in formats:
        try:
            import pyarrow  # noqa: F401
        except ImportError:
            raise ImportError("format parquet needs pyarrow: pip install 'fastrcnn[tables]'") from None


def read_rows(lines: BinaryIO) -> Iterator[Row]:
    """The whole lines of a file about images, by the images' ids."""
    lines.seek(0)
    places, place = [], 0
    for line in lines:
        if line.endswith(b"\n") and "image" in (row := json.loads(line)):  # a torn line could not be finished
            places.append((row["image"]["id"], place))
        place += len(line)
    for _, place in sorted(places):
        lines.seek(place)
        yield json.loads(lines.readline())


def objects_of(row: Row, names: dict[int, str]) -> Iterator[tuple[Any, ...]]:
    """The COLUMNS of each object in a row."""
    image = row["image"]
    for a in row["annotations"]:
        x, y, w, h = a["bbox"]
        box = x, y, round(x + w, 2), round(y + h, 2)
        yield image["id"], image["file_name"], *box, a["score"], a["category_id"], names[a["category_id"]]


def write_coco(lines: BinaryIO, path: Path, categories: list[dict[str, Any]], info: dict[str, Any]) -> None:
    """A COCO file of the detections, with their scores, in the order of the images' ids."""

    def parts() -> Iterator[str]:
        yield f'{{"info": {json.dumps(info)}, "images": ['
        for n, row in enumerate(read_rows(lines)):
            yield (", " if n else "") + json.dumps(row["image"])
        yield '], "annotations": ['
        number = 0
        for row in read_rows(lines):
            for a in row["annotations"]:
                number += 1
                area = a["bbox"][2] * a["bbox"][3]
                yield (", " if number > 1 else "") + json.dumps(dict(id=number, area=area, iscrowd=0, **a))
        yield f'], "categories": {json.dumps(categories)}}}'

    _write(path, lambda file: file.writelines(part.encode() for part in parts()))


def write_csv(lines: BinaryIO, path: Path, categories: list[dict[str, Any]], info: dict[str, Any]) -> None:
    """A line an object."""
    names = {c["id"]: c["name"] for c in categories}

    def write(file: BinaryIO) -> None:
        text = io.TextIOWrapper(file, "utf-8", newline="", errors="surrogateescape")
        writer = csv.writer(text)
        writer.writerow(COLUMNS)
        for row in read_rows(lines):
            writer.writerows(objects_of(row, names))
        text.flush()
        text.detach()

    _write(path, write)


def write_parquet(lines: BinaryIO, path: Path, categories: list[dict[str, Any]], info: dict[str, Any]) -> None:
    """A row an object: ids int64, pixels and score float32, texts."""
    import pyarrow
    from pyarrow import parquet

    names = {c["id"]: c["name"] for c in categories}
    number, pixels, text = pyarrow.int64(), pyarrow.float32(), pyarrow.string()
    schema = pyarrow.schema(list(zip(COLUMNS, [number, text, *[pixels] * 5, number, text])))

    def table(rows: list[tuple[Any, ...]]) -> Any:
        columns = [list(column) for column in zip(*rows)] or [[] for _ in COLUMNS]
        columns[1] = [
            name.encode("utf-8", "backslashreplace").decode() for name in columns[1]
        ]  # a file's need not be UTF-8
        return pyarrow.table([pyarrow.array(c, f.type) for c, f in zip(columns, schema)], schema=schema)

    def write(file: BinaryIO) -> None:
        held: list[tuple[Any, ...]] = []
        with parquet.ParquetWriter(file, schema) as writer:
            for row in read_rows(lines):
                held.extend(objects_of(row, names))
                if len(held) >= ROWS:
                    writer.write_table(table(held))
                    held.clear()
            writer.write_table(table(held))

    _write(path, write)


OF_A_RUN: dict[str, Callable[[BinaryIO, Path, list[dict[str, Any]], dict[str, Any]], None]] = dict(
    json=write_coco, csv=write_csv, parquet=write_parquet
)


@contextmanager
def written(path: Path) -> Iterator[Path]:
    """The file that a path stands for, of a link what it points to, to be written. Raises OSError naming it where the block
    does, and where there is something else than a file."""
    path = Path(os.path.realpath(path))
    try:
        if path.exists() and not path.is_file():
            raise OSError("it is no regular file")
        yield path
    except OSError as error:
        raise OSError(f"{path}: cannot be written ({error.strerror or error})") from None


def _write(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    with written(path) as place:
        write_whole(place, write)


def write_yolo(found: Detections, image: Tensor, folder: Path, stem: str) -> None:
    """labels/<stem>.txt: a line an object, none where nothing was found."""
    (folder / "labels").mkdir(exist_ok=True)
    lines = found.to_yolo((image.shape[1], image.shape[2]))
    (folder / "labels" / f"{stem}.txt").write_text("".join(f"{line}\n" for line in lines))


def write_crops(
    found: Detections, image: Tensor, folder: Path, stem: str, write: Callable[[Path, Tensor], None]
) -> None:
    """crops/<class>/<stem>_<number>.jpg: each object cut out, the best first."""
    height, width = image.shape[1:]
    for n, (box, name) in enumerate(zip(found.boxes.tolist(), found.names), 1):
        x1, y1, x2, y2 = (round(min(max(v, 0), most)) for v, most in zip(box, (width, height, width, height)))
        place = folder / "crops" / (re.sub(r"[^\w\- ]", "_", name)[:80].strip() or "object")
        place.mkdir(parents=True, exist_ok=True)
        if x2 > x1 and y2 > y1:
            write(place / f"{stem}_{n}.jpg", image[:3, y1:y2, x1:x2])
