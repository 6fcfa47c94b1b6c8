"""Test-time augmentation: an image seen at several scales and mirrored, its detections put together.

Two ways, both of them MMDetection's. `det_tta` (its DetTTAModel of 3.x) takes any detector: the detections of all views
go through one more NMS. `aug_test` (two-stage detectors in 2.x) works inside Faster R-CNN: all views share one set of
proposals, and what the second stage says of a proposal is averaged over the views before the only NMS.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastrcnn.models.base_detector import BaseDetector
from fastrcnn.models.faster_rcnn import FasterRCNN
from fastrcnn.models.frame import Frame
from fastrcnn.models.padded import Padded
from fastrcnn.models.post_process import check_nms, suppress
from fastrcnn.models.roi_head import StandardRoIHead, class_scores, padded_rois
from fastrcnn.models.rpn import RPN
from fastrcnn.ops._boxes import take_boxes

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
    seen, missing = [], 0
    for batch, views in _batches(model, images, scales, flips):
        found, lost = model.find(batch, Frame.of(batch, [v.size for v in views], [v.factor for v in views]))
        pairs = zip(found.boxes, images, views)
        boxes = [flip_boxes(own, image.shape[1:], view.flip) for own, image, view in pairs]
        seen.append(found._replace(boxes=torch.stack(boxes)))
        missing = missing | lost
    return model.outside(suppress(Padded.cat(seen), nms, max_per_img).lists(missing))


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
        found.append(_propose(model, model.extract_feat(batch), batch, views))
    merged = _merged_proposals(model, found)
    return [(boxes[:n], scores[:n]) for boxes, scores, n in zip(merged.boxes, merged.scores, merged.counts.tolist())]


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
        found.append(_propose(model, feats, batch, views))
    merged, head = _merged_proposals(model, found), model.roi_head
    most = max(int(merged.counts.max()), 1)  # the others would go through the box head for nothing
    proposals = Padded(*(t[:, :most] for t in merged[:3]), merged.counts)
    said = [_second_stage(head, feats, views, proposals) for feats, views in seen]
    boxes, scores = (torch.stack(column).mean(0) for column in zip(*said))
    row, column, candidates, number = head.candidates(scores, proposals.counts)
    best = take_boxes(boxes.flatten(1, 2), row * boxes.shape[2] + column)
    sizes = torch.tensor([list(image.shape[1:]) for image in images], device=best.device)
    return model.outside(Padded.lists(*head.finish(candidates._replace(boxes=best), number, Frame(sizes, ()))))


def _propose(model: FasterRCNN | RPN, feats, batch: Tensor, views: Sequence[View]) -> Padded:
    """The RPN's proposals, in pixels of the original images."""
    head = model.rpn_head
    boxes, scores, counts = head.predict(*head(feats), Frame.of(batch, [v.size for v in views]), head.test_cfg)
    boxes = torch.stack([view.back(own) for view, own in zip(views, boxes)])
    return Padded(boxes, scores, torch.zeros_like(scores, dtype=torch.int64), counts)


def _merged_proposals(model: FasterRCNN | RPN, found: Sequence[Padded]) -> Padded:
    """Those of all batches, which hold the same images, by one NMS."""
    cfg = model.rpn_head.test_cfg
    return suppress(Padded.cat(found), dict(iou_threshold=cfg["nms"]["iou_threshold"]), cfg["max_per_img"])


def _second_stage(
    head: StandardRoIHead, feats: Sequence[Tensor], views: Sequence[View], proposals: Padded
) -> tuple[Tensor, Tensor]:
    """Boxes [B, P, C, 4] (C is 1 where the head knows no classes) in pixels of the original images, clipped to the view,
    and scores [B, P, classes] of the proposals."""
    carried = torch.stack([view.forward(boxes) for view, boxes in zip(views, proposals.boxes)])
    logits, deltas = (x.unflatten(0, carried.shape[:2]) for x in head(feats, padded_rois(carried, proposals.counts)))
    sizes = torch.tensor([view.size for view in views], device=carried.device).float()
    new = head.bbox_head.bbox_coder.decode(carried, deltas, sizes).unflatten(2, (-1, 4))
    return torch.stack([view.back(boxes) for view, boxes in zip(views, new)]), class_scores(logits)
