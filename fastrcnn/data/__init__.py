"""Images and annotations: decoding, COCO files, rendered cells."""

from fastrcnn.data.check import read_through
from fastrcnn.data.coco import CocoDataset
from fastrcnn.data.images import IMAGE_SUFFIXES, ImageError, as_image, list_images, read_image

__all__ = ["IMAGE_SUFFIXES", "CocoDataset", "ImageError", "as_image", "list_images", "read_image", "read_through"]
