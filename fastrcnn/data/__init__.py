"""Pictures and annotations: decoding, COCO, VOC and YOLO files, batches, transforms, checks, rendered cells."""

from fastrcnn.data.batches import batches, steps_per_epoch
from fastrcnn.data.check import check, read_through
from fastrcnn.data.coco import CocoDataset
from fastrcnn.data.convert import convert, split
from fastrcnn.data.dataset import DetectionDataset
from fastrcnn.data.detect_format import open_dataset
from fastrcnn.data.images import IMAGE_SUFFIXES, ImageError, as_image, list_images, read_image
from fastrcnn.data.names import read_names
from fastrcnn.data.sources import find_sources, shard_of

__all__ = ["IMAGE_SUFFIXES", "CocoDataset", "DetectionDataset", "ImageError", "as_image", "batches", "check", "convert",
           "find_sources", "list_images", "open_dataset", "read_image", "read_names", "read_through", "shard_of", "split",
           "steps_per_epoch"]  # fmt: skip
