"""Greedy non-maximum suppression: exact, by groups, and with static shapes.

A box survives iff no surviving box with a higher score (and of the same group) has IoU > iou_threshold with it, where
IoU = intersection / (area_a + area_b - intersection). Equal scores count in index order, NaN scores come first (as
torch.sort puts them), and a NaN IoU (two empty boxes) suppresses nothing. `nms` gives the indices of
torchvision.ops.nms; groups are compared by id, never by shifted coordinates, which lose precision.
"""

import math

import torch
from torch import Tensor

from fastrcnn.ops._bind import bind, declare
from fastrcnn.ops._checks import (
    ANY_COUNT,
    check_int,
    check_number,
    check_same_device,
    check_same_length,
    check_tensor,
    coordinates,
)


def _comparable(threshold: float, like: Tensor) -> float:
    """The threshold as torchvision's kernels compare with it: on CUDA rounded to float for boxes of every dtype, on the
    CPU a double. A float IoU against a double threshold equals one against the largest float that does not exceed it.
    """
    rounded = torch.tensor(threshold, dtype=torch.float32)
    if like.device.type != "cpu":
        return rounded.item()
    if like.dtype == torch.float64:
        return threshold
    if rounded.item() > threshold:
        rounded = torch.nextafter(rounded, torch.tensor(-math.inf))
    return rounded.item()


BLOCK = 256  # boxes that are compared with each other at a time


def _overlap(
    boxes: Tensor, others: Tensor, group: Tensor | None, other_group: Tensor | None, threshold: float
) -> Tensor:
    """[N, M]: whether the IoU of boxes [N, 4] with others [M, 4] is above the threshold, and their groups are the same."""
    x1, y1, x2, y2 = boxes[:, :, None].unbind(1)
    u1, v1, u2, v2 = others.unbind(1)
    width = (torch.minimum(x2, u2) - torch.maximum(x1, u1)).clamp_(min=0)
    inter = (torch.minimum(y2, v2) - torch.maximum(y1, v1)).clamp_(min=0).mul_(width)
    over = inter / ((x2 - x1) * (y2 - y1) + (u2 - u1) * (v2 - v1) - inter) > threshold
    return over if group is None or other_group is None else over & (group[:, None] == other_group)


def _greedy(
    boxes: Tensor, scores: Tensor, groups: Tensor | None, iou_threshold: float, max_output: int | None
) -> Tensor:
    """Block by block of the sorted boxes: those that an earlier survivor covers fall out, and among the others the answer
    settles from the best downwards, a box's as soon as those of all above it that cover it have."""
    boxes = coordinates(boxes)
    order = torch.sort(scores.to(boxes.dtype), descending=True, stable=True).indices
    boxes, group = boxes[order], None if groups is None else groups[order]
    threshold = _comparable(iou_threshold, boxes)
    kept = torch.zeros(0, dtype=torch.int64, device=boxes.device)
    for start in range(0, len(order), BLOCK):
        if max_output is not None and len(kept) >= max_output:
            break
        own, own_group = boxes[start : start + BLOCK], None if group is None else group[start : start + BLOCK]
        before = None if group is None else group[kept]
        free = ~_overlap(boxes[kept], own, before, own_group, threshold).any(0)
        over = _overlap(own, own, own_group, own_group, threshold).triu(1)
        alive, last = free, None
        while last is None or not torch.equal(alive, last):
            alive, last = free & ~over[alive].any(0), alive
        kept = torch.cat([kept, start + alive.nonzero()[:, 0]])
    return order[kept[:max_output]]


def _plain_reference(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    return _greedy(boxes, scores, None, iou_threshold, None)


def _batched_reference(
    boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float, max_output: int | None = None
) -> Tensor:
    return _greedy(boxes, scores, idxs, iou_threshold, max_output)


def _padded_reference(
    boxes: Tensor,
    scores: Tensor,
    groups: Tensor | None,
    iou_threshold: float,
    max_output: int,
    counts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    batch, n = scores.shape
    indices = torch.full((batch, max_output), -1, dtype=torch.int64, device=boxes.device)
    num_kept = torch.zeros(batch, dtype=torch.int64, device=boxes.device)
    for i in range(batch):
        valid = n if counts is None else min(max(int(counts[i]), 0), n)
        group = None if groups is None else groups[i, :valid]
        kept = _greedy(boxes[i, :valid], scores[i, :valid], group, iou_threshold, max_output)
        indices[i, : len(kept)] = kept
        num_kept[i] = len(kept)
    return indices, num_kept


def _fake(boxes, scores, *_):
    return boxes.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.int64)


def _padded_fake(boxes, scores, groups, iou_threshold, max_output, counts=None):
    batch = boxes.shape[0]
    return boxes.new_empty(batch, max_output, dtype=torch.int64), boxes.new_empty(batch, dtype=torch.int64)


declare("nms", _plain_reference, _fake)
declare("batched_nms", _batched_reference, _fake)
declare("nms_padded", _padded_reference, _padded_fake)


def _nms(op, boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Indices [K] int64 of the survivors, by descending score: those of torchvision.ops.nms, index for index.

    boxes [N, 4] xyxy pixels, scores [N], any floating dtype; iou_threshold in [0, 1].
    Raises TypeError or ValueError naming the argument for a wrong type, shape or device.
    """
    check_tensor("boxes", boxes, "N, 4", last=4)
    check_tensor("scores", scores, "N")
    check_same_length("scores", scores, "boxes", boxes)
    check_same_device(boxes=boxes, scores=scores)
    return op(boxes, scores, check_number("iou_threshold", iou_threshold, 0, 1))


def _batched_nms(
    op, boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float, max_output: int | None = None
) -> Tensor:
    """NMS within each group: boxes suppress one another only where `idxs` (class, level, image...) are equal.

    boxes [N, 4] xyxy pixels, scores [N], idxs [N] integers. Returns indices [K] int64 by descending score, the first
    `max_output` of them where it is given: work stops as soon as they are known.
    Raises TypeError or ValueError naming the argument for a wrong type, shape or device.
    """
    check_tensor("boxes", boxes, "N, 4", last=4)
    check_tensor("scores", scores, "N")
    check_tensor("idxs", idxs, "N", floating=False)
    check_same_length("scores", scores, "boxes", boxes)
    check_same_length("idxs", idxs, "boxes", boxes)
    check_same_device(boxes=boxes, scores=scores, idxs=idxs)
    if max_output is not None:
        max_output = check_int("max_output", max_output, 0, ANY_COUNT)
    return op(boxes, scores, idxs, check_number("iou_threshold", iou_threshold, 0, 1), max_output)


def _nms_padded(
    op,
    boxes: Tensor,
    scores: Tensor,
    groups: Tensor | None,
    iou_threshold: float,
    max_output: int,
    counts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """NMS of a batch with static shapes and no host synchronisation.

    boxes [B, N, 4] xyxy pixels, scores [B, N], groups [B, N] integers or None (one group an image), counts [B] integers
    or None: only an image's first counts[b] rows take part. Returns indices [B, max_output] int64 into N, by descending
    score and -1 after the last survivor, and their counts [B] int64.
    Raises TypeError or ValueError naming the argument for a wrong type, shape or device.
    """
    check_tensor("boxes", boxes, "B, N, 4", last=4)
    check_tensor("scores", scores, "B, N")
    check_same_length("scores", scores, "boxes", boxes, 2)
    if groups is not None:
        check_tensor("groups", groups, "B, N", floating=False)
        check_same_length("groups", groups, "boxes", boxes, 2)
    if counts is not None:
        check_tensor("counts", counts, "B", floating=False)
        check_same_length("counts", counts, "boxes", boxes)
    check_same_device(boxes=boxes, scores=scores, groups=groups, counts=counts)
    threshold, most = check_number("iou_threshold", iou_threshold, 0, 1), check_int("max_output", max_output, 0)
    return op(boxes, scores, groups, threshold, most, counts)


nms = bind(_nms, torch.ops.fastrcnn.nms.default, "nms")
nms_reference = bind(_nms, _plain_reference, "nms_reference")
batched_nms = bind(_batched_nms, torch.ops.fastrcnn.batched_nms.default, "batched_nms")
batched_nms_reference = bind(_batched_nms, _batched_reference, "batched_nms_reference")
nms_padded = bind(_nms_padded, torch.ops.fastrcnn.nms_padded.default, "nms_padded")
nms_padded_reference = bind(_nms_padded, _padded_reference, "nms_padded_reference")
