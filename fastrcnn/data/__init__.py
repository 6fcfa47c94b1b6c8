"""Pictures and annotations: decoding, COCO, VOC and YOLO files, batches, transforms, rendered cells."""

from fastrcnn.data.batches import batches, steps_per_epoch
from fastrcnn.data.check import read_through
from fastrcnn.data.coco import CocoDataset
from fastrcnn.data.dataset import DetectionDataset
from fastrcnn.data.detect_format import open_dataset
from fastrcnn.data.images import IMAGE_SUFFIXES, ImageError, as_image, list_images, read_image

__all__ = ["IMAGE_SUFFIXES", "CocoDataset", "DetectionDataset", "ImageError", "as_image", "batches", "list_images",
           "open_dataset", "read_image", "read_through", "steps_per_epoch"]  # fmt: skip
