"""From candidate boxes to detections: scaling back, suppression within each class, clipping, in a peer's order."""

import torch
from torch import Tensor

from fastrcnn.models.profiles import Profile
from fastrcnn.ops import batched_nms, soft_nms


def suppress(boxes: Tensor, scores: Tensor, labels: Tensor, cfg: dict, max_output: int) -> tuple[Tensor, Tensor]:
    """(kept indices, their scores) by descending score, of NMS or soft-NMS within each class (or across all of them).

    boxes [N, 4], scores [N], labels [N]; cfg: MMDetection's dict(type="nms", iou_threshold=0.5) or "soft_nms". Raises
    ValueError for another type.
    """
    options = {k: v for k, v in cfg.items() if k not in ("type", "class_agnostic", "split_thr", "max_num")}
    kind = cfg.get("type", "nms")
    if kind not in ("nms", "soft_nms"):
        raise ValueError(f"nms: expected type 'nms' or 'soft_nms', got {kind!r}")
    groups = torch.zeros_like(labels) if cfg.get("class_agnostic") else labels
    if kind == "nms":
        keep = batched_nms(boxes, scores, groups, options["iou_threshold"], max_output)
        return keep, scores[keep]
    kept, decayed = [], []
    for group in groups.unique().tolist():
        members = (groups == group).nonzero()[:, 0]
        dets, indices = soft_nms(boxes[members], scores[members], **options)
        kept.append(members[indices])
        decayed.append(dets[:, 4])
    kept = torch.cat(kept) if kept else labels[:0]
    decayed = torch.cat(decayed) if decayed else scores[:0]
    best = decayed.sort(descending=True, stable=True).indices[:max_output]
    return kept[best], decayed[best]


def finish(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor,
    image_size: Tensor,
    scale: Tensor | None,
    cfg: dict,
    profile: Profile,
    min_size: float = -1,
) -> dict[str, Tensor]:
    """Detections of one image: dict of boxes [K, 4], scores [K], labels [K], by descending score.

    boxes [N, 4] xyxy pixels of the resized image, of size image_size [2] (height, width); scale [2] (width, height), new
    over old, or None to stay there; cfg: `nms` and `max_per_img` of MMDetection's test_cfg;
    min_size: boxes enter NMS if both sides are longer, in the pixels that NMS sees; below 0 all do.
    """
    factor = None if scale is None else (1.0 / scale).repeat(2)
    if factor is not None and profile.rescale_before_nms:
        boxes = boxes * factor
    if min_size >= 0:
        large = ((boxes[:, 2:] - boxes[:, :2]) > min_size).all(-1)
        boxes, scores, labels = boxes[large], scores[large], labels[large]
    keep, scores = suppress(boxes, scores, labels, cfg["nms"], cfg["max_per_img"])
    boxes, labels = boxes[keep], labels[keep]
    if factor is not None and not profile.rescale_before_nms:
        boxes = boxes * factor
    if profile.clip_after_rescale:
        limit = image_size.flip(0).float() * (1.0 if factor is None else factor[:2])
        boxes = torch.minimum(boxes.clamp(min=0), limit.repeat(2))
        keep = (boxes[:, 2:] > boxes[:, :2]).all(-1)
        boxes, scores, labels = boxes[keep], scores[keep], labels[keep]
    return dict(boxes=boxes, labels=labels, scores=scores)
