"""From candidate boxes to detections: scaling back, suppression within each class, clipping, in a peer's order."""

import torch
from torch import Tensor

from fastrcnn.models.frame import Frame
from fastrcnn.models.padded import Padded
from fastrcnn.models.profiles import Profile
from fastrcnn.ops import nms_padded, soft_nms_padded

# Of an image, or of a level of one: what one sort on a GPU takes without torch's, and more than a detector with scores
# worth having ever finds. More are only cut off where a score threshold near 0 meets many classes.
MOST_CANDIDATES = 16384

NMS_OPTIONS = {
    "nms": {"iou_threshold", "score_threshold"},
    "soft_nms": {"iou_threshold", "sigma", "min_score", "method"},
}
_SHARED = {"type", "class_agnostic", "max_num", "split_thr"}  # the last tells mmcv how to compute the same


def check_nms(cfg: dict, what: str, allowed: dict[str, set[str]] = NMS_OPTIONS) -> None:
    """Raises ValueError, naming `what`, where `cfg` is no dict as MMDetection's dict(type="nms", iou_threshold=0.5)."""
    kind = cfg.get("type", "nms") if isinstance(cfg, dict) else None
    if kind not in allowed:
        raise ValueError(f"{what}: expected a dict with type {' or '.join(map(repr, allowed))}, got {cfg!r}")
    unknown = set(cfg) - _SHARED - allowed[kind]
    if unknown or (kind == "nms" and "iou_threshold" not in cfg):
        options = sorted(allowed[kind] | _SHARED)
        raise ValueError(f"{what}: expected iou_threshold and some of {options}, got {cfg}")


def nms_limit(cfg: dict, max_per_img: int) -> int | None:
    """The smaller of max_per_img and the nms dict's own max_num, of those above 0; None where neither is."""
    return min((n for n in (max_per_img, cfg.get("max_num", -1)) if n > 0), default=None)


def suppress(found: Padded, cfg: dict, max_output: int) -> Padded:
    """What NMS or soft-NMS within each class (or across all of them) leaves, by descending score.

    found: boxes, scores [B, N] and labels [B, N]; cfg: what `check_nms` lets through; max_output: rows of the result, not
    above 0 gives N.
    """
    kind = cfg.get("type", "nms")
    if kind == "nms" and cfg.get("score_threshold", 0) > 0:
        found = found.only(found.scores > cfg["score_threshold"])
    boxes, scores, labels, counts = found
    groups = None if cfg.get("class_agnostic") else labels
    most = nms_limit(cfg, max_output) or scores.shape[1]
    if kind == "nms":
        keep, counts = nms_padded(boxes, scores, groups, cfg["iou_threshold"], most, counts)
        return found.take(keep, scores.gather(1, keep.clamp(min=0)), counts)
    options = {k: v for k, v in cfg.items() if k not in _SHARED}
    scores, keep, counts = soft_nms_padded(boxes, scores, groups, **options, max_output=most, counts=counts)
    return found.take(keep, scores, counts)


def finish(found: Padded, frame: Frame, cfg: dict, profile: Profile, min_size: float = -1) -> Padded:
    """Detections from candidates in pixels of the resized images.

    cfg: `nms` and `max_per_img` (not above 0 keeps all) of MMDetection's test_cfg; min_size: boxes enter NMS if both sides
    are longer, in the pixels that NMS sees; below 0 all do.
    """
    factors = None if frame.factors is None else 1.0 / frame.factors  # [B, 2]
    scale = None if factors is None else factors.repeat(1, 2)[:, None]
    if scale is not None and profile.rescale_before_nms:
        found = found._replace(boxes=found.boxes * scale)
    if min_size >= 0:
        found = found.only((found.boxes[..., 2:] - found.boxes[..., :2] > min_size).all(-1))
    found = suppress(found, cfg["nms"], cfg["max_per_img"])
    if scale is not None and not profile.rescale_before_nms:
        found = found._replace(boxes=found.boxes * scale)
    if profile.clip_after_rescale:
        limits = frame.sizes.flip(1).float() * (1.0 if factors is None else factors)
        whole = limits.round()  # an image's sides are, but for the last digit of the factor
        limits = torch.where((limits - whole).abs() < 1e-3, whole, limits)
        boxes = torch.minimum(found.boxes.clamp(min=0), limits.repeat(1, 2)[:, None])
        found = found._replace(boxes=boxes).only((boxes[..., 2:] > boxes[..., :2]).all(-1))
    return found


def lost(found: Padded, left_out: Tensor, cfg: dict) -> Tensor:
    """[B] bool: the images where a candidate that was left out might have become a detection; left_out [B]: the score that
    none of these is above, 0 where there are none. NMS takes the best first: where max_per_img of higher scores were found,
    none had a place left."""
    any_left = left_out > 0
    if nms_limit(cfg["nms"], cfg["max_per_img"]) is None or cfg["nms"].get("type", "nms") != "nms":
        return any_left
    return any_left & (left_out > found.scores[:, -1])  # 0 where fewer were found
