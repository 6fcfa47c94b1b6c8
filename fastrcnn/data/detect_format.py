"""Which of the formats lies at a path, and its dataset."""

from pathlib import Path

from fastrcnn.data.coco import read_coco
from fastrcnn.data.dataset import DetectionDataset


def open_dataset(path: str | Path, images: str | Path | None = None, split: str | None = None) -> DetectionDataset:
    return DetectionDataset(read_coco(path, images, strict=False))
