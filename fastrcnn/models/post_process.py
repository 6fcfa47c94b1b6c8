"""From candidate boxes to detections: scaling back, suppression within each class, clipping, in a peer's order."""

import torch
from torch import Tensor

from fastrcnn.models.frame import Frame
from fastrcnn.models.profiles import Profile
from fastrcnn.ops import batched_nms, batched_soft_nms

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


def suppress(boxes: Tensor, scores: Tensor, labels: Tensor, cfg: dict, max_output: int) -> tuple[Tensor, Tensor]:
    """(kept indices, their scores) by descending score, of NMS or soft-NMS within each class (or across all of them).

    boxes [N, 4], scores [N], labels [N]; cfg: what `check_nms` lets through; max_output: not above 0 keeps all.
    """
    groups = torch.zeros_like(labels) if cfg.get("class_agnostic") else labels
    return _within(groups, boxes, scores, cfg, nms_limit(cfg, max_output))


def _within(groups: Tensor, boxes: Tensor, scores: Tensor, cfg: dict, most: int | None) -> tuple[Tensor, Tensor]:
    if cfg.get("type", "nms") == "nms":
        threshold = cfg.get("score_threshold", 0)
        above = (scores > threshold).nonzero()[:, 0] if threshold > 0 else slice(None)
        keep = batched_nms(boxes[above], scores[above], groups[above], cfg["iou_threshold"], most)
        keep = above[keep] if threshold > 0 else keep
        return keep, scores[keep]
    options = {k: v for k, v in cfg.items() if k not in _SHARED}
    dets, keep = batched_soft_nms(boxes, scores, groups, **options, max_output=most)
    return keep, dets[:, 4]


def finish(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor,
    images: Tensor,
    frame: Frame,
    cfg: dict,
    profile: Profile,
    min_size: float = -1,
) -> list[dict[str, Tensor]]:
    """Detections of each image: dict of boxes [K, 4], scores [K], labels [K], by descending score.

    boxes [N, 4] xyxy pixels of the resized images, the candidates of all of them; images [N] int64: whose they are;
    cfg: `nms` and `max_per_img` (not above 0 keeps all) of MMDetection's test_cfg; min_size: boxes enter NMS if both sides
    are longer, in the pixels that NMS sees; below 0 all do. The host waits for the whole batch, not image by image.
    """
    image_sizes = frame.sizes
    factors = None if frame.factors is None else 1.0 / frame.factors  # [B, 2]
    if factors is not None and profile.rescale_before_nms:
        boxes = boxes * factors.repeat(1, 2)[images]
    if min_size >= 0:
        large = ((boxes[:, 2:] - boxes[:, :2]) > min_size).all(-1).nonzero()[:, 0]
        boxes, scores, labels, images = boxes[large], scores[large], labels[large], images[large]
    nms = cfg["nms"]
    most = nms_limit(nms, cfg["max_per_img"])
    groups = images if nms.get("class_agnostic") else images * 2**32 + labels
    keep, scores = _within(groups, boxes, scores, nms, most if len(image_sizes) == 1 else None)
    boxes, labels, images = boxes[keep], labels[keep], images[keep]
    of_image = images[:, None] == torch.arange(len(image_sizes), device=images.device)  # [K, B]
    wanted = torch.ones_like(images, dtype=torch.bool)
    if most is not None:
        wanted = of_image.cumsum(0).gather(1, images[:, None])[:, 0] <= most
    if factors is not None and not profile.rescale_before_nms:
        boxes = boxes * factors.repeat(1, 2)[images]
    if profile.clip_after_rescale:
        limits = image_sizes.flip(1).float() * (1.0 if factors is None else factors)
        whole = limits.round()  # an image's sides are, but for the last digit of the factor
        limits = torch.where((limits - whole).abs() < 1e-3, whole, limits)
        boxes = torch.minimum(boxes.clamp(min=0), limits.repeat(1, 2)[images])
        wanted = wanted & (boxes[:, 2:] > boxes[:, :2]).all(-1)
    counts = (of_image & wanted[:, None]).sum(0).tolist()
    order = torch.where(wanted, images, len(image_sizes)).sort(stable=True).indices[: sum(counts)]
    parts = zip(*(t[order].split(counts) for t in (boxes, labels, scores)))
    return [dict(boxes=b, labels=k, scores=s) for b, k, s in parts]
