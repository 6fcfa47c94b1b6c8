"""Large pictures in tiles: each is detected in as it is, and what is found is put together by the operator's NMS."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrcnn.data.images import ImageError, as_image
from fastrcnn.inference.detections import Detections
from fastrcnn.inference.detector import Answer, Detector
from fastrcnn.ops import batched_nms

NEAR = 0.01  # of a tile's side: a box that ends so close to it was cut there
COVERED = 0.5  # of a cut box's area, by a whole one of its class: the same object


class Tile(NamedTuple):
    """Pixels of the picture, x2 and y2 not inside."""

    x1: int
    y1: int
    x2: int
    y2: int


def tiles_of(height: int, width: int, tile: int, overlap: float) -> list[Tile]:
    """Squares of `tile` pixels that cover a picture, neighbours sharing at least `overlap` of a side: row by row, the
    last of a row and column moved back inside. A side that is shorter is taken whole."""
    step = max(1, int(tile * (1 - overlap)))

    def starts(side: int) -> list[int]:
        return [*range(0, max(side - tile, 0), step), max(side - tile, 0)]

    return [Tile(x, y, min(x + tile, width), min(y + tile, height)) for y in starts(height) for x in starts(width)]


def _cut(boxes: Tensor, tile: Tile, height: int, width: int) -> Tensor:
    """bool [N]: the boxes [N, 4], pixels of the picture, that end at a side of the tile which is none of the picture's."""
    near = NEAR * max(tile.x2 - tile.x1, tile.y2 - tile.y1)
    inner = torch.tensor([tile.x1 > 0, tile.y1 > 0, tile.x2 < width, tile.y2 < height])
    return (((boxes - torch.tensor(tile, dtype=boxes.dtype)).abs() <= near) & inner).any(1)


def _held(boxes: Tensor, tiles: Sequence[Tile]) -> Tensor:
    """bool [N]: the boxes [N, 4] that lie whole in one of the tiles."""
    inner = torch.tensor(tiles, dtype=boxes.dtype)
    return ((boxes[:, None, :2] >= inner[:, :2]) & (boxes[:, None, 2:] <= inner[:, 2:])).all(2).any(1)


def merge_tiles(
    parts: Sequence[Detections], cut: Tensor, iou_threshold: float, max_per_img: int | None = None
) -> Detections:
    """Detections of one picture from those of its tiles, all in the picture's pixels.

    cut: bool [N], of all of them in order: whether a tile's border goes through the object. Such a part is left out where a
    whole object of its class in another of `parts` covers half of it; then NMS within each class
    (`fastrcnn.ops.batched_nms`), whole objects before parts.
    """
    boxes, scores, labels = (torch.cat([getattr(p, key) for p in parts]) for key in ("boxes", "scores", "labels"))
    view = torch.arange(len(parts)).repeat_interleave(torch.tensor([len(p) for p in parts]))
    whole = torch.nonzero(~cut)[:, 0]
    low = torch.maximum(boxes[:, None, :2], boxes[None, whole, :2])
    high = torch.minimum(boxes[:, None, 2:], boxes[None, whole, 2:])
    # What one view shows twice, it holds for two objects.
    others = (labels[:, None] == labels[whole]) & (view[:, None] != view[whole])
    shared = (high - low).clamp(min=0).prod(2) * others
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    kept = torch.nonzero(~cut | ~(shared > COVERED * area[:, None]).any(1))[:, 0]
    rank = scores[kept] - cut[kept].to(scores.dtype)  # scores are at most 1: every part comes after the whole ones
    chosen = kept[batched_nms(boxes[kept], rank, labels[kept], iou_threshold)]
    chosen = chosen[scores[chosen].argsort(descending=True, stable=True)][:max_per_img]
    more = [None if parts[0].features is None else torch.cat([getattr(p, key) for p in parts])[chosen]
            for key in ("class_scores", "features")]  # fmt: skip
    names = parts[0].class_names, parts[0].category_ids
    return Detections(boxes[chosen], scores[chosen], labels[chosen], *names, *more)


class Tiled:
    """A Detector that looks at pictures larger than `tile` pixels in tiles, and at the whole, too, as the model resizes it:
    objects that no tile holds whole come from there. Calls and `stream` are the Detector's own.

    overlap: part of a tile's side that neighbours share, 0 to below 1: an object up to this size lies whole in one of them.
    Raises ValueError naming the argument.
    """

    def __init__(self, detector: Detector, tile: int, overlap: float = 0.2, max_per_img: int | None = None):
        if not isinstance(tile, int) or tile < 1:
            raise ValueError(f"tile: expected a whole number of pixels above 0, got {tile!r}")
        if not isinstance(overlap, int | float) or not 0 <= overlap < 1:
            raise ValueError(f"overlap: expected a number from 0 to below 1, got {overlap!r}")
        self.detector, self.tile, self.overlap, self.max_per_img = detector, tile, overlap, max_per_img
        self.class_names, self.category_ids = detector.class_names, detector.category_ids

    def __call__(self, images: Any, batch_size: int | None = None) -> list[Detections]:
        single = not isinstance(images, Iterable) or isinstance(images, str | bytes) or hasattr(images, "shape")
        sources = [images] if single else list(images)
        results = []
        for (_, _, found), source in zip(self.stream(sources, batch_size), sources):
            if isinstance(found, Exception):
                raise found
            found.source = source
            results.append(found)
        return results

    def stream(self, images: Iterable[Any], batch_size: int | None = None) -> Iterator[Answer]:
        for index, source in enumerate(images):
            try:
                name = source if isinstance(source, str) else f"images[{index}]"
                image = as_image(source, name, self.detector.channels)
                yield index, image, self.detect(image, batch_size)
            except (ImageError, ValueError, TypeError, MemoryError, RuntimeError) as error:
                yield index, None, error

    def detect(self, image: Tensor, batch_size: int | None = None) -> Detections:
        """The objects of one picture [3, H, W]."""
        height, width = image.shape[1:]
        if max(height, width) <= self.tile:
            return self.detector(image)[0]
        views = [Tile(0, 0, width, height), *tiles_of(height, width, self.tile, self.overlap)]
        parts, cut = [], []
        for view, found in zip(views, self.detector([image[:, t.y1 : t.y2, t.x1 : t.x2] for t in views], batch_size)):
            if view is views[0]:
                found = found[~_held(found.boxes, views[1:])]
            boxes = found.boxes + torch.tensor([view.x1, view.y1] * 2)
            cut.append(_cut(boxes, view, height, width))
            found.boxes = boxes
            parts.append(found)
        return merge_tiles(parts, torch.cat(cut), self.detector.iou_threshold, self.max_per_img)
