"""Which of the formats lies at a path, told by what is there, and its dataset."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fastrcnn.data.coco import find_coco, read_coco
from fastrcnn.data.dataset import DetectionDataset
from fastrcnn.data.folders import SPLITS
from fastrcnn.data.table import Table
from fastrcnn.data.voc import find_voc, listed, parse, read_voc
from fastrcnn.data.yolo import Yolo, find_yaml, find_yolo, read_yolo


@dataclass
class Found:
    """A format, and of each split ("train", "val", "test"; None: there are none) how its table is read: read(images,
    strict)."""

    format: str
    splits: dict[str | None, Callable[[Path | None, bool], Table]]


def _coco(files: dict[str | None, Path]) -> dict:
    return {split: lambda images, strict, file=file: read_coco(file, images, strict) for split, file in files.items()}


def _yolo(sources: dict[str | None, Yolo]) -> dict:
    return {split: lambda images, strict, y=y: read_yolo(y, images, strict) for split, y in sources.items()}


def _voc(folder: Path) -> dict:
    return {split: lambda images, strict, belongs=belongs: read_voc(folder, belongs, images, strict)
            for split, belongs in find_voc(folder).items()}  # fmt: skip


FORMATS = {
    "coco": lambda folder: _coco(find_coco(folder)),
    "voc": _voc,
    "yolo": lambda folder: _yolo(find_yolo(folder)),
}


def detect_format(path: str | Path) -> Found:
    """Raises ValueError naming the path and what was expected where it is none of the formats, OSError."""
    path = Path(path)
    if path.is_dir():
        for name, find in FORMATS.items():
            if splits := find(path):
                return Found(name, {split: splits[split] for split in (*SPLITS, None) if split in splits})
        expected = (
            "a COCO file (_annotations.coco.json, annotations/*.json), XML files of Pascal VOC's, "
            "or pictures with text files of YOLO's"
        )
        raise ValueError(f"{path}: no annotations found: expected {expected}")
    if path.suffix.lower() in (".yaml", ".yml"):
        return Found("yolo", _yolo(find_yaml(path)))
    if path.suffix.lower() == ".txt" and path.parent.parent.name == "ImageSets":
        belongs, folder = listed(path), path.parents[2]
        return Found("voc", {None: lambda images, strict: read_voc(folder, belongs, images, strict)})
    if path.suffix.lower() == ".xml":
        try:
            parse(path)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        return Found("voc", {None: lambda images, strict: read_voc(path.parent, path.name.__eq__, images, strict)})
    if path.suffix.lower() == ".txt":
        return Found("yolo", _yolo({None: Yolo(path.parent, [path], None, None)}))
    return Found("coco", _coco({None: path}))


def open_dataset(path: str | Path, images: str | Path | None = None, split: str | None = None,
                 strict: bool = False) -> DetectionDataset:  # fmt: skip
    """The pictures and boxes at a path: an annotation file of COCO's (JSON), YOLO's (data.yaml, a list of pictures)
    or VOC's (a list in ImageSets, or the XML of one picture), or a folder of COCO's, Pascal VOC's or YOLO's, as CVAT, Label
    Studio, Roboflow, ultralytics and others lay it out.

    images: where the pictures are (default: looked for around the annotations). split: "train", "val" or "test" of a
    folder that has them ("val" is its test set where it has no other); None: the training set of such a folder, all of
    another. strict: refuse what is otherwise dropped, and counted in `left_out` and `findings`. Raises ValueError
    naming file and entry, or the splits that there are, OSError.
    """
    found, images = detect_format(path), None if images is None else Path(images)
    if split not in (*SPLITS, None):
        raise ValueError(f"split: expected one of {', '.join(SPLITS)} or None, got {split!r}")
    wanted = {None: (None, *SPLITS), "val": ("val", "test")}.get(split, (split,))
    chosen = [name for name in wanted if name in found.splits]
    if not chosen:
        there = ", ".join(filter(None, found.splits)) or "no splits"
        raise ValueError(f"{path}: no {split} split: there are {there}")
    return DetectionDataset(found.splits[chosen[0]](images, strict))
