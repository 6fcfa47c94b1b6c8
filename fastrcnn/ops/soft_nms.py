"""Soft-NMS (Bodla et al., "Soft-NMS: Improving Object Detection With One Line of Code", 2017).

The box with the highest score is taken; every remaining score is multiplied by a weight that falls with its IoU o with
that box: "linear" 1 - o where o >= iou_threshold, "gaussian" exp(-o^2 / sigma), "naive" 0 where o >= iou_threshold (hard
NMS). Scores below min_score leave the race. Equal scores go to the lower index. Methods and defaults are mmcv's.
`batched_soft_nms` runs it within each group by itself and merges the groups by their decayed scores; `soft_nms_padded`
does that for a batch of images, with static shapes.
"""

import torch
from torch import Tensor

from fastrcnn.ops._bind import bind, declare
from fastrcnn.ops._box_math import exp
from fastrcnn.ops._checks import (
    ANY_COUNT,
    check_choice,
    check_int,
    check_number,
    check_positive,
    check_same_device,
    check_same_length,
    check_tensor,
    coordinates,
)

METHODS = ("naive", "linear", "gaussian")


def _plain_reference(
    boxes: Tensor, scores: Tensor, iou_threshold: float, sigma: float, min_score: float, method: str
) -> tuple[Tensor, Tensor]:
    boxes = coordinates(boxes)
    scores = scores.to(boxes.dtype).nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    dets, indices = [], []
    while len(scores) and bool((best_score := scores.max()) > -torch.inf):
        best = int((scores == best_score).nonzero()[0])
        dets.append(torch.cat([boxes[best], best_score[None]]))
        indices.append(best)
        low, high = torch.maximum(boxes[best, :2], boxes[:, :2]), torch.minimum(boxes[best, 2:], boxes[:, 2:])
        size = (high - low).clamp(min=0)
        inter = size[:, 0] * size[:, 1]
        overlap = inter / (areas[best] + areas - inter)
        if method == "gaussian":
            weight = exp(-(overlap * overlap) / sigma).nan_to_num(nan=1.0)
        else:
            below = 1 - overlap if method == "linear" else torch.zeros_like(overlap)
            weight = torch.where(overlap >= iou_threshold, below, torch.ones_like(overlap))
        scores[best] = -torch.inf
        decayed = scores * weight
        scores = torch.where(
            (scores > -torch.inf) & (decayed >= min_score), decayed, torch.full_like(scores, -torch.inf)
        )
    if not dets:
        return boxes.new_empty(0, 5), torch.empty(0, dtype=torch.int64, device=boxes.device)
    return torch.stack(dets), torch.tensor(indices, dtype=torch.int64, device=boxes.device)


def _batched_reference(
    boxes: Tensor,
    scores: Tensor,
    idxs: Tensor,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    method: str,
    max_output: int | None = None,
) -> tuple[Tensor, Tensor]:
    dets, indices = [coordinates(boxes).new_empty(0, 5)], [idxs.new_empty(0, dtype=torch.int64)]
    for group in idxs.unique():
        members = (idxs == group).nonzero()[:, 0]
        d, kept = _plain_reference(boxes[members], scores[members], iou_threshold, sigma, min_score, method)
        dets.append(d)
        indices.append(members[kept])
    dets, indices = torch.cat(dets), torch.cat(indices)
    best = dets[:, 4].sort(descending=True, stable=True).indices[:max_output]
    return dets[best], indices[best]


def _padded_reference(
    boxes: Tensor,
    scores: Tensor,
    groups: Tensor | None,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    method: str,
    max_output: int,
    counts: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, n = scores.shape
    indices = torch.full((batch, max_output), -1, dtype=torch.int64, device=boxes.device)
    decayed = torch.zeros(batch, max_output, dtype=coordinates(boxes).dtype, device=boxes.device)
    num_kept = torch.zeros(batch, dtype=torch.int64, device=boxes.device)
    for i in range(batch):
        valid = n if counts is None else min(max(int(counts[i]), 0), n)
        ids = torch.zeros_like(scores[i], dtype=torch.int64) if groups is None else groups[i]
        rows = boxes[i, :valid], scores[i, :valid], ids[:valid]
        dets, kept = _batched_reference(*rows, iou_threshold, sigma, min_score, method, max_output)
        indices[i, : len(kept)], decayed[i, : len(kept)], num_kept[i] = kept, dets[:, 4], len(kept)
    return decayed, indices, num_kept


def _fake(boxes: Tensor, *_) -> tuple[Tensor, Tensor]:
    n = torch.library.get_ctx().new_dynamic_size()
    dtype = torch.float64 if boxes.dtype == torch.float64 else torch.float32
    return boxes.new_empty(n, 5, dtype=dtype), boxes.new_empty(n, dtype=torch.int64)


def _padded_fake(
    boxes, scores, groups, iou_threshold, sigma, min_score, method, max_output, counts=None
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.float64 if boxes.dtype == torch.float64 else torch.float32
    shape = boxes.shape[0], max_output
    indices = boxes.new_empty(shape, dtype=torch.int64)
    return boxes.new_empty(shape, dtype=dtype), indices, boxes.new_empty(shape[0], dtype=torch.int64)


declare("soft_nms", _plain_reference, _fake)
declare("batched_soft_nms", _batched_reference, _fake)
declare("soft_nms_padded", _padded_reference, _padded_fake)


def _check(
    boxes, scores, iou_threshold, sigma, min_score, method, rows="N", **others
) -> tuple[float, float, float, str]:
    check_tensor("boxes", boxes, f"{rows}, 4", last=4)
    check_tensor("scores", scores, rows)
    check_same_length("scores", scores, "boxes", boxes, scores.dim())
    check_same_device(boxes=boxes, scores=scores, **others)
    rules = check_number("iou_threshold", iou_threshold), check_positive("sigma", sigma)
    return *rules, check_number("min_score", min_score), check_choice("method", method, METHODS)


def _soft_nms(
    op,
    boxes: Tensor,
    scores: Tensor,
    iou_threshold: float = 0.3,
    sigma: float = 0.5,
    min_score: float = 1e-3,
    method: str = "linear",
) -> tuple[Tensor, Tensor]:
    """(dets [K, 5] = xyxy and the decayed score, indices [K] int64), in the order the boxes were taken.

    boxes [N, 4] xyxy pixels, scores [N]; sigma > 0 is the gaussian's variance. dets are float32 (float64 for float64).
    Not differentiable. Raises TypeError or ValueError naming the argument.
    """
    rules = _check(boxes, scores, iou_threshold, sigma, min_score, method)
    with torch.no_grad():
        return op(boxes, scores, *rules)


def _batched_soft_nms(
    op,
    boxes: Tensor,
    scores: Tensor,
    idxs: Tensor,
    iou_threshold: float = 0.3,
    sigma: float = 0.5,
    min_score: float = 1e-3,
    method: str = "linear",
    max_output: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Soft-NMS within each group: scores decay only by boxes whose `idxs` (class, image...) are equal.

    idxs [N] integers; the rest as in `soft_nms`. Returns (dets [K, 5], indices [K]) by descending decayed score, the
    first `max_output` of them where it is given; equal scores by group, then in the order taken.
    Raises TypeError or ValueError naming the argument.
    """
    check_tensor("idxs", idxs, "N", floating=False)
    rules = _check(boxes, scores, iou_threshold, sigma, min_score, method, idxs=idxs)
    check_same_length("idxs", idxs, "boxes", boxes)
    if max_output is not None:
        max_output = check_int("max_output", max_output, 0, ANY_COUNT)
    with torch.no_grad():
        return op(boxes, scores, idxs, *rules, max_output)


def _soft_nms_padded(
    op,
    boxes: Tensor,
    scores: Tensor,
    groups: Tensor | None,
    iou_threshold: float = 0.3,
    sigma: float = 0.5,
    min_score: float = 1e-3,
    method: str = "linear",
    max_output: int = 100,
    counts: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Soft-NMS of a batch with static shapes and no host synchronisation.

    boxes [B, N, 4] xyxy pixels, scores [B, N], groups [B, N] integers or None (one group an image), counts [B] integers
    or None: only an image's first counts[b] rows take part. Returns the decayed scores [B, max_output] in descending
    order and 0 after the last survivor, indices [B, max_output] int64 into N and -1 there, and their counts [B] int64;
    equal scores as in `batched_soft_nms`. Raises TypeError or ValueError naming the argument.
    """
    if groups is not None:
        check_tensor("groups", groups, "B, N", floating=False)
    if counts is not None:
        check_tensor("counts", counts, "B", floating=False)
    rules = _check(boxes, scores, iou_threshold, sigma, min_score, method, "B, N", groups=groups, counts=counts)
    if groups is not None:
        check_same_length("groups", groups, "boxes", boxes, 2)
    if counts is not None:
        check_same_length("counts", counts, "boxes", boxes)
    most = check_int("max_output", max_output, 0)
    with torch.no_grad():
        return op(boxes, scores, groups, *rules, most, counts)


soft_nms = bind(_soft_nms, torch.ops.fastrcnn.soft_nms.default, "soft_nms")
soft_nms_reference = bind(_soft_nms, _plain_reference, "soft_nms_reference")
batched_soft_nms = bind(_batched_soft_nms, torch.ops.fastrcnn.batched_soft_nms.default, "batched_soft_nms")
batched_soft_nms_reference = bind(_batched_soft_nms, _batched_reference, "batched_soft_nms_reference")
soft_nms_padded = bind(_soft_nms_padded, torch.ops.fastrcnn.soft_nms_padded.default, "soft_nms_padded")
soft_nms_padded_reference = bind(_soft_nms_padded, _padded_reference, "soft_nms_padded_reference")
