"""Datasets written again: in another format, or split into sets. hotcoco's conversions are not used: they round VOC's
boxes to whole pixels, write two pictures of one name in two folders into one file, and move no picture."""

import hashlib
import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from xml.sax.saxutils import escape

import numpy as np

from fastrcnn.data.dataset import DetectionDataset
from fastrcnn.data.detect_format import detect_format
from fastrcnn.data.fetch import read_bytes
from fastrcnn.data.folders import is_picture

ROUNDING = 1e-6  # pixels
Part = tuple[str, DetectionDataset, Sequence[int]]  # a split, and which pictures of a dataset are in it


def _stem(name: str) -> str:
    return os.path.splitext(name)[0]


def _placed(part: Part, folder: Path, taken: set[str], done: Counter) -> list[tuple[int, str]]:
    """(index, name) of the pictures of a part, which then lie in the folder under its name, with a number where
    another has that: as a second name of the file where the disk allows that, else as a copy."""
    _, dataset, indices = part
    folder.mkdir(parents=True, exist_ok=True)
    placed = []
    for index in indices:
        source = dataset.picture(index)
        name = Path(dataset.table.names[index].replace("\\", "/")).name
        stem, suffix = os.path.splitext(name)
        for k in range(2, len(taken) + 3):
            if _stem(name) not in taken:
                break
            name = f"{stem}_{k}{suffix}"
        if not os.path.isfile(source):
            done["pictures that are missing"] += 1
            continue
        taken.add(_stem(name))
        try:
            os.link(os.path.realpath(source), folder / name)  # of a link the file: the link may be a relative one
        except OSError:
            shutil.copyfile(source, folder / name)
        placed.append((index, name))
        done["pictures"] += 1
    return placed


def _to_coco(parts: list[Part], out: Path, done: Counter) -> None:
    taken: set[str] = set()
    for part in parts:
        split, dataset, _ = part
        placed = _placed(part, out / "images", taken, done)
        ids = dict(enumerate(index for index, _ in placed))
        images = [dict(id=_plain(dataset.image_ids[index]), file_name=name, width=int(dataset.sizes[index, 1]),
                       height=int(dataset.sizes[index, 0])) for index, name in placed]  # fmt: skip
        rows = dataset.rows(list(ids.values()))
        annotations = [
            dict(row, id=n, image=images[row["image"]]["id"], category=dataset.category_ids[row["category"]])
            for n, row in enumerate(rows, 1)
        ]
        for row in annotations:
            row["image_id"], row["category_id"] = row.pop("image"), row.pop("category")
        categories = [dict(id=i, name=name) for i, name in zip(dataset.category_ids, dataset.class_names)]
        done["boxes"] += len(rows)
        (out / "annotations").mkdir(exist_ok=True)
        with open(out / "annotations" / f"instances_{split}.json", "w") as file:
            json.dump(dict(images=images, annotations=annotations, categories=categories), file)


def _plain(value):
    return value.item() if isinstance(value, np.generic) else value


def _is_whole(boxes: np.ndarray) -> bool:
    """Of boxes [N, 4]: whether they can be said in pixels counted from 1, so that a reader takes them for that."""
    return bool((np.abs(boxes - boxes.round()) < ROUNDING).all() and (boxes[:, :2] > -0.5).all())


def _to_voc(parts: list[Part], out: Path, done: Counter) -> None:
    """In VOC's pixels counted from 1 where every box is of whole pixels, else as the corners themselves: see
    data/voc.py."""
    for folder in ("Annotations", "ImageSets/Main"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    (out / "labels.txt").write_text("".join(f"{name}\n" for name in parts[0][1].class_names))
    taken: set[str] = set()
    placed = [(split, dataset, _placed((split, dataset, indices), out / "JPEGImages", taken, done))
              for split, dataset, indices in parts]  # fmt: skip
    whole = all(_is_whole(dataset.table.boxes[slice(*dataset.table.starts[index : index + 2])])
                for _, dataset, pictures in placed for index, _ in pictures)  # fmt: skip
    for split, dataset, pictures in placed:
        for index, name in pictures:
            height, width = dataset.sizes[index]
            objects = []
            for row in dataset.rows([index]):
                x, y, w, h = map(round, row["bbox"]) if whole else row["bbox"]
                if whole and not (w and h):
                    done["boxes that VOC cannot say (no width or height)"] += 1
                    continue
                sides = [x + whole, y + whole, x + w, y + h]
                box = "".join(f"<{k}>{v:.12g}</{k}>" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), sides))
                objects.append(f"  <object><name>{escape(dataset.class_names[row['category']])}</name>"
                               f"<difficult>{row['iscrowd']}</difficult><bndbox>{box}</bndbox></object>\n")  # fmt: skip
            done["boxes"] += len(objects)
            text = (f"<annotation>\n  <filename>{escape(name)}</filename>\n  <size><width>{width}</width><height>{height}"
                    f"</height><depth>3</depth></size>\n{''.join(objects)}</annotation>\n")  # fmt: skip
            (out / "Annotations" / f"{_stem(name)}.xml").write_text(text)
        stems = "".join(f"{_stem(name)}\n" for _, name in pictures)
        (out / "ImageSets" / "Main" / f"{split}.txt").write_text(stems)


def _to_yolo(parts: list[Part], out: Path, done: Counter) -> None:
    for part in parts:
        split, dataset, _ = part
        placed = _placed(part, out / "images" / split, set(), done)
        (out / "labels" / split).mkdir(parents=True, exist_ok=True)
        for index, name in placed:
            if not is_picture(name):
                done["pictures whose suffix YOLO does not know"] += 1
            height, width = dataset.sizes[index].tolist()
            lines = []
            for row in dataset.rows([index]):
                x, y, w, h = row["bbox"]
                left, top, right, bottom = max(x, 0), max(y, 0), min(x + w, width), min(y + h, height)
                if row["iscrowd"] or right <= left or bottom <= top:
                    done["boxes that YOLO cannot say (crowds, outside)"] += 1
                    continue
                middle = (left + right) / 2 / width, (top + bottom) / 2 / height
                values = *middle, (right - left) / width, (bottom - top) / height
                lines.append(f"{row['category']} " + " ".join(f"{v:.12g}" for v in values) + "\n")
            done["boxes"] += len(lines)
            (out / "labels" / split / f"{_stem(name)}.txt").write_text("".join(lines))
    names = "".join(f"  {i}: {json.dumps(name)}\n" for i, name in enumerate(parts[0][1].class_names))
    splits = "".join(f"{split}: images/{split}\n" for split, _, _ in parts)
    (out / "data.yaml").write_text(f"{splits}names:\n{names}")


WRITERS: dict[str, Callable] = {"coco": _to_coco, "voc": _to_voc, "yolo": _to_yolo}


def _write(parts: list[Part], to: str, out: Path) -> Counter:
    if to not in WRITERS:
        raise ValueError(f"to: expected one of {', '.join(WRITERS)}, got {to!r}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"out: expected a folder that is empty or not there yet, got {out}")
    first = parts[0][1]
    for split, dataset, _ in parts:
        if dataset.class_names != first.class_names:
            raise ValueError(f"{dataset.path}: the classes of {split} are {dataset.class_names}, those of {parts[0][0]} "
                             f"{first.class_names}")  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    done: Counter = Counter()
    WRITERS[to](parts, out, done)
    return done


def convert(
    path: str | Path, to: str, out: str | Path, images: str | Path | None = None
) -> tuple[Counter, list[DetectionDataset]]:
    """Writes the dataset at a path, all its splits, as "coco", "voc" or "yolo" into a new folder, pictures and all.
    Returns what was written, counted, and the datasets that were read, whose `findings` say what was dropped. Raises
    ValueError as `open_dataset` does, and for a folder that is not empty, OSError."""
    found, images = detect_format(path).splits, None if images is None else Path(images)
    datasets = {split or "train": DetectionDataset(read(images, False)) for split, read in found.items()}
    parts = [(split, dataset, range(len(dataset))) for split, dataset in datasets.items()]
    return _write(parts, to, Path(out)), list(datasets.values())


def split(path: str | Path, out: str | Path, val: float = 0.2, test: float = 0.0, seed: int = 0, to: str | None = None,
          images: str | Path | None = None) -> tuple[Counter, dict[str, int]]:  # fmt: skip
    """Writes the dataset at a path, which has no splits, as train, val and perhaps test into a new folder, in its own
    format or `to` another. val, test: their parts of the pictures. Files of the same bytes go together. Returns what
    was written, counted, and how many pictures each split has. Raises ValueError as `convert`, and for parts that leave
    no picture."""
    found, images = detect_format(path), None if images is None else Path(images)
    if set(found.splits) != {None}:
        raise ValueError(f"{path}: has splits already: {', '.join(filter(None, found.splits))}")
    for name, part in (("val", val), ("test", test)):
        if not 0 <= part < 1 or val + test >= 1:
            raise ValueError(f"{name}: expected a part of the pictures, from 0 to below 1 together, got {part}")
    dataset = DetectionDataset(found.splits[None](images, False))
    groups: dict = {}
    for index in range(len(dataset)):
        groups.setdefault(_digest(dataset.picture(index)) or index, []).append(index)
    groups = list(groups.values())
    order = [groups[k] for k in np.random.default_rng(seed).permutation(len(groups))]
    indices: dict[str, list[int]] = {"val": [], "test": [], "train": []}
    for group in order:
        name = next(
            (n for n, part in (("val", val), ("test", test)) if len(indices[n]) < round(part * len(dataset))), "train"
        )
        indices[name] += group
    wanted = [name for name, part in (("train", 1), ("val", val), ("test", test)) if part]
    if empty := [name for name in wanted if not indices[name]]:
        raise ValueError(f"{path}: {len(dataset)} pictures leave none for {', '.join(empty)}")
    parts = [(name, dataset, sorted(indices[name])) for name in wanted]
    return _write(parts, to or found.format, Path(out)), {name: len(indices[name]) for name in wanted}


def _digest(path: Path) -> bytes | None:
    try:
        return hashlib.sha256(read_bytes(str(path), math.inf)).digest()
    except (OSError, ValueError):
        return None
