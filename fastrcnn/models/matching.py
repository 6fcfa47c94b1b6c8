"""Targets for a batch: pads the ground truth, then assigns it with `ops.match_boxes`."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastrcnn.models.profiles import Profile
from fastrcnn.ops import match_boxes

ASSIGNER = dict(
    type="MaxIoUAssigner", pos_iou_thr=0.5, neg_iou_thr=0.5, min_pos_iou=0.0, match_low_quality=True,
    gt_max_assign_all=True, ignore_iof_thr=-1,
)  # fmt: skip
# What may be said of it without a choice: how much memory it takes, and what its only IoU and ignore rule are.
_FIXED = dict(gpu_assign_thr=None, ignore_wrt_candidates=True, iou_calculator=dict(type="BboxOverlaps2D"))


def check_assigner(assigner: dict) -> dict:
    """`assigner` with MMDetection's defaults. Raises ValueError for another type, option or value."""
    rules = {**ASSIGNER, **assigner}
    odd = {k: rules.pop(k) for k in set(rules) - set(ASSIGNER)}
    odd = {k: v for k, v in odd.items() if k not in _FIXED or (k != "gpu_assign_thr" and v != _FIXED[k])}
    if odd or rules["type"] != "MaxIoUAssigner":
        raise ValueError(f"assigner: expected MaxIoUAssigner with {sorted({*ASSIGNER, *_FIXED})}, got {assigner}")
    return rules


def _padded(boxes: Sequence[Tensor], device) -> tuple[Tensor, Tensor]:
    """[B, M, 4] and the counts [B] of a list of [M_i, 4]."""
    counts = torch.tensor([len(b) for b in boxes], dtype=torch.int64).to(device, non_blocking=True)
    dtype = torch.promote_types(torch.float32, boxes[0].dtype) if boxes else torch.float32
    out = torch.zeros(len(boxes), max((len(b) for b in boxes), default=0), 4, dtype=dtype, device=device)
    for row, b in zip(out, boxes):
        row[: len(b)] = b
    return out, counts


def assign(boxes: Tensor, targets: Sequence[dict], assigner: dict, profile: Profile) -> tuple[Tensor, Tensor]:
    """Ground-truth index of each box [B, N] int64, -1 background, -2 ignored, and its best IoU [B, N].

    boxes [N, 4] or [B, N, 4] xyxy pixels; targets: dicts with boxes [M, 4] and optionally ignore_boxes [R, 4]; assigner:
    MMDetection's MaxIoUAssigner options, all of them, as `check_assigner` gives them. A neg_iou_thr of (low, high) ignores
    what overlaps by less than low.
    """
    rules = dict(assigner)
    gts, counts = _padded([t["boxes"] for t in targets], boxes.device)
    ignore, ignore_counts = None, None
    if rules["ignore_iof_thr"] > 0 and any(len(t.get("ignore_boxes", ())) for t in targets):
        none = boxes.new_zeros(0, 4)
        ignore, ignore_counts = _padded([t.get("ignore_boxes", none) for t in targets], boxes.device)
    negative = rules["neg_iou_thr"]
    floor, rules["neg_iou_thr"] = negative if isinstance(negative, list | tuple) else (0.0, negative)
    thresholds = {k: float(rules[k]) for k in ("pos_iou_thr", "neg_iou_thr", "min_pos_iou", "ignore_iof_thr")}
    first_only = rules["match_low_quality"] and not rules["gt_max_assign_all"]
    matches, max_iou = match_boxes(
        boxes, gts, counts, ignore, ignore_counts, match_low_quality=rules["match_low_quality"] and not first_only,
        low_quality=profile.low_quality, iou_eps=profile.iou_eps, **thresholds,
    )  # fmt: skip
    if floor > 0:  # an image without ground truth is background all the same
        matches = torch.where((matches == -1) & (max_iou < floor) & (counts > 0)[:, None], -2, matches)
    if first_only:
        for row, best, gt, b in zip(matches, max_iou, targets, boxes.expand(len(gts), -1, -1)):
            _match_first(row, best, gt["boxes"], b, rules["min_pos_iou"], profile.iou_eps)
    return matches, max_iou


def _match_first(matches: Tensor, max_iou: Tensor, gts: Tensor, boxes: Tensor, min_pos_iou: float, eps: float) -> None:
    """gt_max_assign_all=False, in place: of the boxes with a ground-truth box's own best IoU the first one only."""
    for g in range(len(gts)):
        _, iou = match_boxes(boxes, gts[g : g + 1], match_low_quality=False, iou_eps=eps)
        iou = torch.where(max_iou < 0, -1.0, iou)  # in an ignore region
        if iou.numel() and iou.max() >= min_pos_iou:
            matches[iou.argmax()] = g
