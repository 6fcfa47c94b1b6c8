"""Targets for a batch: pads the ground truth, then assigns it with `ops.match_boxes`."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastrcnn.models.profiles import Profile
from fastrcnn.ops import match_boxes

ASSIGNER = dict(
    type="MaxIoUAssigner", pos_iou_thr=0.5, neg_iou_thr=0.5, min_pos_iou=0.0, match_low_quality=True, ignore_iof_thr=-1
)


def _padded(boxes: Sequence[Tensor], device) -> tuple[Tensor, Tensor]:
    """[B, M, 4] and the counts [B] of a list of [M_i, 4]."""
    counts = torch.tensor([len(b) for b in boxes], dtype=torch.int64, device=device)
    dtype = torch.promote_types(torch.float32, boxes[0].dtype) if boxes else torch.float32
    out = torch.zeros(len(boxes), max((len(b) for b in boxes), default=0), 4, dtype=dtype, device=device)
    for row, b in zip(out, boxes):
        row[: len(b)] = b
    return out, counts


def assign(boxes: Tensor, targets: Sequence[dict], assigner: dict, profile: Profile) -> tuple[Tensor, Tensor]:
    """Ground-truth index of each box [B, N] int64, -1 background, -2 ignored, and its best IoU [B, N].

    boxes [N, 4] or [B, N, 4] xyxy pixels; targets: dicts with boxes [M, 4] and optionally ignore_boxes [R, 4];
    assigner: MMDetection's MaxIoUAssigner options. A neg_iou_thr of (low, high) ignores what overlaps by less than low.
    """
    rules = {**ASSIGNER, **assigner}
    unknown = set(rules) - set(ASSIGNER) - {"gt_max_assign_all", "gpu_assign_thr"}
    if unknown or rules["type"] != "MaxIoUAssigner":
        raise ValueError(f"assigner: expected MaxIoUAssigner with {sorted(ASSIGNER)}, got {assigner}")
    gts, counts = _padded([t["boxes"] for t in targets], boxes.device)
    ignore, ignore_counts = None, None
    if rules["ignore_iof_thr"] > 0 and any(len(t.get("ignore_boxes", ())) for t in targets):
        none = boxes.new_zeros(0, 4)
        ignore, ignore_counts = _padded([t.get("ignore_boxes", none) for t in targets], boxes.device)
    negative = rules["neg_iou_thr"]
    floor, rules["neg_iou_thr"] = negative if isinstance(negative, list | tuple) else (0.0, negative)
    thresholds = {k: float(rules[k]) for k in ("pos_iou_thr", "neg_iou_thr", "min_pos_iou", "ignore_iof_thr")}
    matches, max_iou = match_boxes(
        boxes, gts, counts, ignore, ignore_counts, match_low_quality=bool(rules["match_low_quality"]),
        low_quality=profile.low_quality, iou_eps=profile.iou_eps, **thresholds,
    )  # fmt: skip
    if floor > 0:
        matches = torch.where((matches == -1) & (max_iou < floor), -2, matches)
    return matches, max_iou
