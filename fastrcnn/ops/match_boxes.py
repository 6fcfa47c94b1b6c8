"""Max-IoU assignment of ground truth to boxes (Ren et al., Faster R-CNN, 2015, section 3.1.2; MMDetection's
MaxIoUAssigner, torchvision's and Detectron2's Matcher), without keeping the boxes x ground-truth matrix.

A box is positive where its best IoU >= pos_iou_thr, background where it is < neg_iou_thr, ignored between. With
match_low_quality every box that attains a ground-truth box's own best IoU becomes positive as well, provided that best is
>= min_pos_iou. Boxes of which more than ignore_iof_thr lies in one ignore region take no part.
"""

import torch
from torch import Tensor

from fastrcnn.ops._bind import bind, declare
from fastrcnn.ops._checks import (
    check_choice,
    check_flag,
    check_number,
    check_same_device,
    check_same_length,
    check_tensor,
    coordinates,
)

BACKGROUND, IGNORED = -1, -2
LOW_QUALITY = ("last_gt", "argmax")


def _intersections(a: Tensor, b: Tensor) -> Tensor:
    size = torch.minimum(a[:, None, 2:], b[None, :, 2:]) - torch.maximum(a[:, None, :2], b[None, :, :2])
    size = size.clamp(min=0)
    return size[..., 0] * size[..., 1]


def _areas(b: Tensor) -> Tensor:
    return (b[:, 2] - b[:, 0]) * (b[:, 3] - b[:, 1])


def _match_one(boxes, gts, regions, pos_iou_thr, neg_iou_thr, min_pos_iou, match_low_quality, low_quality_last_gt,
               ignore_iof_thr, iou_eps):  # fmt: skip
    """boxes [N, 4], gts [M, 4], regions [R, 4] -> matches [N], max_iou [N]."""
    n = len(boxes)
    if len(gts) == 0 or n == 0:
        return torch.full((n,), BACKGROUND, dtype=torch.int64, device=boxes.device), boxes.new_zeros(n)
    inter = _intersections(gts, boxes)
    union = _areas(gts)[:, None] + _areas(boxes)[None] - inter
    iou = torch.where(inter > 0, inter / (union.clamp(min=iou_eps) if iou_eps > 0 else union), torch.zeros_like(inter))
    iou = torch.where(iou.isnan(), torch.zeros_like(iou), iou)  # a NaN or infinite box meets nothing
    if ignore_iof_thr > 0 and len(regions):
        iof = _intersections(regions, boxes) / _areas(boxes).clamp(min=1e-6)
        iou[:, (iof > ignore_iof_thr).any(0)] = -1
    max_iou, arg = iou.max(0)
    matches = torch.full_like(arg, IGNORED)
    matches[(max_iou >= 0) & (max_iou < neg_iou_thr)] = BACKGROUND
    positive = max_iou >= pos_iou_thr
    matches[positive] = arg[positive]
    if match_low_quality:
        best = iou.max(1).values
        for g in range(len(gts)):
            if best[g] >= min_pos_iou:
                attains = (iou[g] == best[g]) & (max_iou >= 0)
                matches[attains] = g if low_quality_last_gt else arg[attains]
    return matches, max_iou


def _op_reference(
    boxes: Tensor,
    gt_boxes: Tensor,
    gt_counts: Tensor,
    ignore_boxes: Tensor | None,
    ignore_counts: Tensor | None,
    pos_iou_thr: float,
    neg_iou_thr: float,
    min_pos_iou: float,
    match_low_quality: bool,
    low_quality_last_gt: bool,
    ignore_iof_thr: float,
    iou_eps: float,
) -> tuple[Tensor, Tensor]:
    boxes = coordinates(boxes)
    matches, ious = [], []
    for i in range(len(gt_boxes)):
        b = boxes[0 if len(boxes) == 1 else i]
        gts = gt_boxes[i, : max(int(gt_counts[i]), 0)].to(b.dtype)
        regions = b.new_zeros(0, 4)
        if ignore_boxes is not None:
            regions = ignore_boxes[i, : max(int(ignore_counts[i]), 0)].to(b.dtype)
        m, v = _match_one(b, gts, regions, pos_iou_thr, neg_iou_thr, min_pos_iou, match_low_quality,
                          low_quality_last_gt, ignore_iof_thr, iou_eps)  # fmt: skip
        matches.append(m)
        ious.append(v)
    if not matches:
        return boxes.new_zeros(0, boxes.shape[1], dtype=torch.int64), boxes.new_zeros(0, boxes.shape[1])
    return torch.stack(matches), torch.stack(ious)


def _fake(boxes, gt_boxes, gt_counts, *rules):
    shape = gt_boxes.shape[0], boxes.shape[1]
    dtype = torch.float64 if boxes.dtype == torch.float64 else torch.float32
    return boxes.new_empty(shape, dtype=torch.int64), boxes.new_empty(shape, dtype=dtype)


declare("match_boxes", _op_reference, _fake)


def _counts(name: str, counts: Tensor | None, of_name: str, of: Tensor) -> Tensor:
    """How many of the rows `of` [B, M, 4] count: all where it isn't said."""
    if counts is None:
        return torch.full((len(of),), of.shape[1], dtype=torch.int64, device=of.device)
    check_tensor(name, counts, "B", floating=False)
    check_same_length(name, counts, of_name, of)
    return counts


def _match_boxes(
    op,
    boxes: Tensor,
    gt_boxes: Tensor,
    gt_counts: Tensor | None = None,
    ignore_boxes: Tensor | None = None,
    ignore_counts: Tensor | None = None,
    pos_iou_thr: float = 0.7,
    neg_iou_thr: float = 0.3,
    min_pos_iou: float = 0.3,
    match_low_quality: bool = True,
    low_quality: str = "last_gt",
    ignore_iof_thr: float = -1.0,
    iou_eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """(matches [B, N] int64, max_iou [B, N]): the ground-truth index of each box, -1 background, -2 ignored.

    boxes [N, 4] shared by the batch (anchors) or [B, N, 4]; gt_boxes [B, M, 4] padded, of which an image's first
    gt_counts[b] count (None: all); ignore_boxes [B, R, 4] and ignore_counts alike; all xyxy pixels. Without the batch
    dimension, gt_boxes [M, 4] gives matches [N]. `low_quality` settles a box that attains the best of several
    ground-truth boxes: "last_gt" takes the last of them (MMDetection), "argmax" the box's own best (torchvision,
    Detectron2). iou_eps bounds the union from below (MMDetection 1e-6, the others 0). An image without ground truth is
    all background. Not differentiable. Raises TypeError or ValueError naming the argument.
    """
    batched = isinstance(gt_boxes, Tensor) and gt_boxes.dim() == 3
    check_tensor("gt_boxes", gt_boxes, "B, M, 4" if batched else "M, 4", last=4)
    shared = isinstance(boxes, Tensor) and boxes.dim() == 2
    check_tensor("boxes", boxes, "N, 4" if shared else "B, N, 4", last=4)
    gts = gt_boxes if batched else gt_boxes[None]
    if not shared and len(boxes) != len(gts):
        raise ValueError(f"boxes: expected the batch size {len(gts)} of gt_boxes, got {len(boxes)}")
    if ignore_boxes is None and ignore_counts is not None:
        raise ValueError("ignore_counts: given without ignore_boxes")
    gt_counts = _counts("gt_counts", gt_counts, "gt_boxes", gts)
    if ignore_boxes is not None:
        check_tensor("ignore_boxes", ignore_boxes, "B, R, 4" if batched else "R, 4", last=4)
        ignore_boxes = ignore_boxes if batched else ignore_boxes[None]
        check_same_length("ignore_boxes", ignore_boxes, "gt_boxes", gts)
        ignore_counts = _counts("ignore_counts", ignore_counts, "ignore_boxes", ignore_boxes)
    check_same_device(boxes=boxes, gt_boxes=gts, gt_counts=gt_counts, ignore_boxes=ignore_boxes,
                      ignore_counts=ignore_counts)  # fmt: skip
    thresholds = ("pos_iou_thr", pos_iou_thr), ("neg_iou_thr", neg_iou_thr), ("min_pos_iou", min_pos_iou)
    rules = [check_number(name, value) for name, value in thresholds]
    last_gt = check_choice("low_quality", low_quality, LOW_QUALITY) == "last_gt"
    rules += check_flag("match_low_quality", match_low_quality), last_gt
    rules += check_number("ignore_iof_thr", ignore_iof_thr), check_number("iou_eps", iou_eps)
    b = boxes[None] if shared else boxes
    with torch.no_grad():
        matches, max_iou = op(b, gts, gt_counts, ignore_boxes, ignore_counts, *rules)
    return (matches, max_iou) if batched else (matches[0], max_iou[0])


match_boxes = bind(_match_boxes, torch.ops.fastrcnn.match_boxes.default, "match_boxes")
match_boxes_reference = bind(_match_boxes, _op_reference, "match_boxes_reference")
