"""Test-time augmentation: an image seen at several scales and mirrored, its detections put together.

Two ways, both of them MMDetection's. `det_tta` (its DetTTAModel of 3.x) takes any detector: the detections of all views
go through one more NMS. `aug_test` (two-stage detectors in 2.x) works inside Faster R-CNN: all views share one set of
proposals, and what the second stage says of a proposal is averaged over the views before the only NMS.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrcnn.models.base_detector import BaseDetector
from fastrcnn.models.faster_rcnn import FasterRCNN
from fastrcnn.models.frame import Frame
from fastrcnn.models.post_process import check_nms, suppress
from fastrcnn.models.roi_head import StandardRoIHead
from fastrcnn.models.rpn import RPN
from fastrcnn.ops._checks import coordinates

FLIPS = {None: (), "horizontal": (2,), "vertical": (1,), "diagonal": (1, 2)}  # the axes of an image [3, H, W]


def flip_boxes(boxes: Tensor, size: Sequence[int], flip: str | None) -> Tensor:
    """boxes [..., 4] xyxy pixels in an image of `size` (height, width) -> the same boxes in the mirrored image."""
    (height, width), axes = size, FLIPS[flip]
    x1, y1, x2, y2 = boxes.unbind(-1)
    if 2 in axes:
        x1, x2 = width - x2, width - x1
    if 1 in axes:
        y1, y2 = height - y2, height - y1
    return torch.stack((x1, y1, x2, y2), -1)


@dataclass(frozen=True)
class View:
    """How the network sees one image: resized to `size` (height, width), by `factor` (width, height), new over old, and
    then flipped."""

    size: tuple[int, int]
    factor: tuple[float, float]
    flip: str | None

    def forward(self, boxes: Tensor) -> Tensor:
        """boxes [..., 4] in pixels of the original image -> in pixels of the view."""
        return flip_boxes(boxes * boxes.new_tensor(self.factor * 2), self.size, self.flip)

    def back(self, boxes: Tensor) -> Tensor:
        """boxes [..., 4] in pixels of the view -> in pixels of the original image."""
        return flip_boxes(boxes, self.size, self.flip) / boxes.new_tensor(self.factor * 2)


def _check(model: BaseDetector, kinds: tuple[type, ...], images, scales, flips) -> None:
    if not isinstance(model, kinds):
        names = " or ".join(kind.__name__ for kind in kinds)
        raise TypeError(f"model: expected a {names}, got {type(model).__name__}")
    if model.training:
        raise ValueError("model: expected a model in evaluation mode, call model.eval() first")
    for name, values in (("images", images), ("scales", scales), ("flips", flips)):
        if len(values) == 0:
            raise ValueError(f"{name}: expected at least one, got none")
    for i, scale in enumerate(scales):
        pair = isinstance(scale, Sequence) and len(scale) == 2
        if not pair or not all(isinstance(v, int) and v > 0 for v in scale):
            raise ValueError(
                f"scales[{i}]: expected two numbers of pixels above 0, (long side, short side), got {scale!r}"
            )
    for i, flip in enumerate(flips):
        if flip not in tuple(FLIPS):
            raise ValueError(f"flips[{i}]: expected one of {tuple(FLIPS)}, got {flip!r}")


def _batches(model: BaseDetector, images, scales, flips) -> Iterator[tuple[Tensor, list[View]]]:
    """The input batch of every scale and flip, with the views of its images."""
    for scale in scales:
        preprocessor = copy.copy(model.data_preprocessor)  # the model keeps its own sizes
        preprocessor.min_size, preprocessor.max_size = min(scale), max(scale)
        batch, sizes, factors = preprocessor(images, model.dtype)
        sizes, factors = sizes.tolist(), factors.tolist()
        for flip in flips:
            views = [View(tuple(size), tuple(factor), flip) for size, factor in zip(sizes, factors)]
            yield _flipped(batch, views), views


def _flipped(batch: Tensor, views: Sequence[View]) -> Tensor:
    """Every image mirrored within its own size: the padding stays right and below."""
    if views[0].flip is None:
        return batch
    flipped = batch.clone()
    for row, source, view in zip(flipped, batch, views):
        height, width = view.size
        row[:, :height, :width] = source[:, :height, :width].flip(FLIPS[view.flip])
    return flipped


@torch.no_grad()
def det_tta(
    model: BaseDetector,
    images: Sequence[Tensor],
    scales: Sequence[tuple[int, int]],
    flips: Sequence[str | None] = (None, "horizontal"),
    nms: dict = dict(type="nms", iou_threshold=0.5),
    max_per_img: int = 100,
) -> list[dict[str, Tensor]]:
    """`model(images)` at every scale and flip, the detections merged by NMS within each class (DetTTAModel).

    images: [3, H, W] RGB each, float in 0..1 or uint8, of any sizes; scales: (long side, short side) in pixels, at most;
    flips: None, "horizontal", "vertical" or "diagonal". Returns of each image a dict of boxes [N, 4] xyxy pixels of the
    original image, scores [N], labels [N] (the profile's), by descending score. Raises TypeError or ValueError naming the
    argument.
    """
    _check(model, (BaseDetector,), images, scales, flips)
    check_nms(nms, "nms")
    seen: list[list[dict[str, Tensor]]] = [[] for _ in images]
    for batch, views in _batches(model, images, scales, flips):
        found = model.predict(batch, [v.size for v in views], [v.factor for v in views])
        for own, image, one, view in zip(seen, images, found, views):
            own.append({**one, "boxes": flip_boxes(one["boxes"], image.shape[1:], view.flip)})
    results = []
    for own in seen:
        boxes, scores, labels = (torch.cat([one[key] for one in own]) for key in ("boxes", "scores", "labels"))
        keep, scores = suppress(boxes, scores, labels, nms, max_per_img)
        results.append(dict(boxes=boxes[keep], labels=labels[keep], scores=scores))
    return results


@torch.no_grad()
def aug_test_rpn(
    model: FasterRCNN | RPN,
    images: Sequence[Tensor],
    scales: Sequence[tuple[int, int]],
    flips: Sequence[str | None] = (None, "horizontal"),
) -> list[tuple[Tensor, Tensor]]:
    """The proposals of all views merged by one NMS: (boxes [K, 4] xyxy pixels of the original image, scores [K]) of each.

    At most max_per_img of the RPN's test_cfg, by descending score. Its NMS knows no levels here, so that even one view
    keeps fewer than `model.proposals`. Arguments and errors as in `det_tta`.
    """
    _check(model, (FasterRCNN, RPN), images, scales, flips)
    found = []
    for batch, views in _batches(model, images, scales, flips):
        found.append((_propose(model, model.extract_feat(batch), batch, views), views))
    return _merged_proposals(model, found)


@torch.no_grad()
def aug_test(
    model: FasterRCNN,
    images: Sequence[Tensor],
    scales: Sequence[tuple[int, int]],
    flips: Sequence[str | None] = (None, "horizontal"),
) -> list[dict[str, Tensor]]:
    """Detections of each image from scores and boxes that are averaged over the views (MMDetection 2's aug_test).

    The proposals of `aug_test_rpn` are carried into every view; score threshold, NMS and max_per_img are those of the RoI
    head's test_cfg, applied once, in pixels of the original image. The feature maps of all views are held at the same
    time. Arguments, result and errors as in `det_tta`.
    """
    _check(model, (FasterRCNN,), images, scales, flips)
    seen, found = [], []
    for batch, views in _batches(model, images, scales, flips):
        feats = model.extract_feat(batch)
        seen.append((feats, views))
        found.append((_propose(model, feats, batch, views), views))
    proposals = [boxes for boxes, _ in _merged_proposals(model, found)]
    said = [_second_stage(model.roi_head, feats, views, proposals) for feats, views in seen]
    boxes, scores = (torch.stack(column).mean(0) for column in zip(*said))
    counts = [len(p) for p in proposals]
    parts = zip(boxes.split(counts), scores.split(counts), images)
    return model.outside([_detections(model.roi_head, b, s, image.shape[1:]) for b, s, image in parts])


def _propose(model: FasterRCNN | RPN, feats, batch: Tensor, views: Sequence[View]) -> list[tuple[Tensor, Tensor]]:
    """The RPN's (boxes [K, 4] in pixels of the view, scores [K]) of each image."""
    head = model.rpn_head
    boxes, scores, counts = head.predict(*head(feats), Frame.of(batch, [v.size for v in views]), head.test_cfg)
    return [(b[:n], s[:n]) for b, s, n in zip(boxes, scores, counts.tolist())]


def _merged_proposals(model: FasterRCNN | RPN, found) -> list[tuple[Tensor, Tensor]]:
    """found: of every batch, the proposals of its images and their views -> (boxes, scores) of each original image."""
    cfg = model.rpn_head.test_cfg
    nms = dict(type="nms", iou_threshold=cfg["nms"]["iou_threshold"])
    merged = []
    for i in range(len(found[0][1])):
        boxes = torch.cat([views[i].back(proposals[i][0]) for proposals, views in found])
        scores = torch.cat([proposals[i][1] for proposals, _ in found])
        keep, scores = suppress(boxes, scores, torch.zeros_like(scores, dtype=torch.int64), nms, cfg["max_per_img"])
        merged.append((boxes[keep], scores))
    return merged


def _second_stage(
    head: StandardRoIHead, feats: Sequence[Tensor], views: Sequence[View], proposals: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Boxes [P, C, 4] (C is 1 where the head knows no classes) in pixels of the original images, clipped to the view,
    and scores [P, classes] of the proposals of all images, image by image."""
    carried = [view.forward(boxes) for view, boxes in zip(views, proposals)]
    rois = torch.cat([F.pad(boxes, (1, 0), value=i) for i, boxes in enumerate(carried)])
    logits, deltas = head(feats, rois)
    counts = [len(boxes) for boxes in carried]
    boxes = []
    for view, old, moves in zip(views, carried, deltas.split(counts)):
        new = head.bbox_head.bbox_coder.decode(old, moves, torch.tensor(view.size, device=old.device).float())
        boxes.append(view.back(new.unflatten(1, (-1, 4))))
    return torch.cat(boxes), F.softmax(coordinates(logits), -1)[:, :-1]  # the background is last


def _detections(head: StandardRoIHead, boxes: Tensor, scores: Tensor, size: Sequence[int]) -> dict[str, Tensor]:
    """Detections of one image of `size` (height, width), from boxes [P, C, 4] in its pixels and scores [P, classes]."""
    row, column, label = head.candidates(scores)
    frame = Frame(torch.tensor([list(size)], device=boxes.device), tuple(size))
    return head.finish(boxes[row, column], scores[row, label], label, torch.zeros_like(label), frame)[0]
