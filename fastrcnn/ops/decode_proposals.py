"""RPN maps to proposals (Ren et al., Faster R-CNN, 2015), all images and levels at once, with static shapes.

Per image and level: the nms_pre highest-scoring anchors are taken, their deltas decoded, the boxes clipped to the image's
own size and those not larger than min_size on both sides dropped. Anchor a of cell (y, x) is base_anchors[a] moved by
(x * stride_x, y * stride_y); candidates count in the order y, x, a, and equal scores keep it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastrcnn.ops._checks import check_coder, check_same_device, check_tensor
from fastrcnn.ops.decode_boxes import _op_reference as _decode_reference


def _dtype(cls_logits: Sequence[Tensor]) -> torch.dtype:
    return torch.float64 if cls_logits[0].dtype == torch.float64 else torch.float32


def _op_reference(
    cls_logits: Sequence[Tensor],
    bbox_deltas: Sequence[Tensor],
    base_anchors: Sequence[Tensor],
    strides: Sequence[float],
    image_sizes: Tensor,
    nms_pre: int,
    means: Sequence[float],
    stds: Sequence[float],
    wh_ratio_clip: float,
    symmetric_clip: bool,
    min_size: float,
    topk_on_logits: bool,
    return_logits: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = _dtype(cls_logits)
    sizes = image_sizes.to(dtype)
    batch, device = len(sizes), sizes.device
    boxes, scores, levels = [], [], []
    for level, (logits, deltas, base) in enumerate(zip(cls_logits, bbox_deltas, base_anchors)):
        num_anchors, _, width = logits.shape[1:]
        n = logits.shape[1:].numel()
        logits = logits.to(dtype).permute(0, 2, 3, 1).reshape(batch, n)
        deltas = deltas.to(dtype).permute(0, 2, 3, 1).reshape(batch, n, 4)
        rank_by = (logits if topk_on_logits else logits.sigmoid()).nan_to_num(nan=-torch.inf, posinf=torch.inf)
        count = min(nms_pre, logits.shape[1]) if nms_pre > 0 else logits.shape[1]
        top = torch.sort(rank_by, dim=1, descending=True, stable=True).indices[:, :count]  # [B, count]
        cell = top // num_anchors
        shift = torch.stack([cell % width * strides[2 * level], cell // width * strides[2 * level + 1]], -1).to(dtype)
        anchors = base.to(dtype)[top % num_anchors] + shift.repeat(1, 1, 2)
        deltas = deltas.gather(1, top[..., None].expand(-1, -1, 4))
        boxes.append(_decode_reference(anchors, deltas, sizes, means, stds, wh_ratio_clip, symmetric_clip))
        logits = logits.gather(1, top)
        scores.append(logits if return_logits else logits.sigmoid())
        levels.append(torch.full((batch, count), level, dtype=torch.int64, device=device))
    boxes, scores, levels = torch.cat(boxes, 1), torch.cat(scores, 1), torch.cat(levels, 1)
    size = boxes[..., 2:] - boxes[..., :2]
    valid = (size > min_size).all(-1)  # also drops NaN
    first = torch.sort(valid.int(), dim=1, descending=True, stable=True).indices
    valid = valid.gather(1, first)
    boxes = torch.where(valid[..., None], boxes.gather(1, first[..., None].expand(-1, -1, 4)), 0.0)
    scores = torch.where(valid, scores.gather(1, first), 0.0)
    levels = torch.where(valid, levels.gather(1, first), -1)
    return boxes, scores, levels, valid.sum(1)


_decode_proposals = torch.library.custom_op("fastrcnn::decode_proposals", _op_reference, mutates_args=())


@_decode_proposals.register_fake
def _(cls_logits, bbox_deltas, base_anchors, strides, image_sizes, nms_pre, *rules):
    batch = image_sizes.shape[0]
    sizes = [x.shape[1] * x.shape[2] * x.shape[3] for x in cls_logits]
    total = sum(min(nms_pre, n) if nms_pre > 0 else n for n in sizes)
    out = image_sizes.new_empty(batch, total, 4, dtype=_dtype(cls_logits))
    levels = image_sizes.new_empty(batch, total, dtype=torch.int64)
    return out, out.new_empty(batch, total), levels, image_sizes.new_empty(batch, dtype=torch.int64)


def _call(op, cls_logits, bbox_deltas, base_anchors, strides, image_sizes, nms_pre, means, stds, wh_ratio_clip,
          symmetric_clip, min_size, topk_on, score):  # fmt: skip
    cls_logits, bbox_deltas, base_anchors = list(cls_logits), list(bbox_deltas), list(base_anchors)
    levels = len(cls_logits)
    lengths = {"bbox_deltas": len(bbox_deltas), "base_anchors": len(base_anchors), "strides": len(strides)}
    for name, length in lengths.items():
        if length != levels or levels == 0:
            raise ValueError(f"{name}: expected one entry for each of the {levels} levels of cls_logits, got {length}")
    whole = isinstance(image_sizes, Tensor) and not image_sizes.is_floating_point()
    check_tensor("image_sizes", image_sizes, "B, 2", floating=not whole, last=2)
    for i in range(levels):
        check_tensor(f"cls_logits[{i}]", cls_logits[i], "B, A, H, W")
        check_tensor(f"bbox_deltas[{i}]", bbox_deltas[i], "B, 4 * A, H, W")
        check_tensor(f"base_anchors[{i}]", base_anchors[i], "A, 4", last=4)
        b, a, h, w = cls_logits[i].shape
        if bbox_deltas[i].shape != (b, 4 * a, h, w) or len(base_anchors[i]) != a or b != len(image_sizes):
            got = [list(cls_logits[i].shape), list(bbox_deltas[i].shape), list(base_anchors[i].shape)]
            raise ValueError(f"level {i}: expected cls_logits [B, A, H, W], bbox_deltas [B, 4 * A, H, W], base_anchors "
                             f"[A, 4] and image_sizes [B, 2], got {got} and {list(image_sizes.shape)}")  # fmt: skip
        check_same_device(**{"image_sizes": image_sizes, f"cls_logits[{i}]": cls_logits[i],
                             f"bbox_deltas[{i}]": bbox_deltas[i], f"base_anchors[{i}]": base_anchors[i]})  # fmt: skip
    check_coder(means, stds, wh_ratio_clip)
    for name, value in (("topk_on", topk_on), ("score", score)):
        if value not in ("sigmoid", "logits"):
            raise ValueError(f'{name}: expected "sigmoid" or "logits", got {value!r}')
    pairs = [tuple(s) if isinstance(s, Sequence) else (s, s) for s in strides]
    if any(len(pair) != 2 for pair in pairs):
        raise ValueError(f"strides: expected a number or (x, y) for each level, got {list(strides)}")
    pairs = [float(v) for pair in pairs for v in pair]
    rules = list(map(float, means)), list(map(float, stds)), float(wh_ratio_clip), symmetric_clip, float(min_size)
    flags = topk_on == "logits", score == "logits"
    return op(cls_logits, bbox_deltas, base_anchors, pairs, image_sizes, int(nms_pre), *rules, *flags)


def decode_proposals_reference(
    cls_logits: Sequence[Tensor],
    bbox_deltas: Sequence[Tensor],
    base_anchors: Sequence[Tensor],
    strides: Sequence[float | tuple[float, float]],
    image_sizes: Tensor,
    nms_pre: int,
    means: Sequence[float] = (0.0, 0.0, 0.0, 0.0),
    stds: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
    wh_ratio_clip: float = 16 / 1000,
    symmetric_clip: bool = True,
    min_size: float = 0.0,
    topk_on: str = "sigmoid",
    score: str = "sigmoid",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _call(_op_reference, cls_logits, bbox_deltas, base_anchors, strides, image_sizes, nms_pre, means, stds,
                 wh_ratio_clip, symmetric_clip, min_size, topk_on, score)  # fmt: skip


def decode_proposals(
    cls_logits: Sequence[Tensor],
    bbox_deltas: Sequence[Tensor],
    base_anchors: Sequence[Tensor],
    strides: Sequence[float | tuple[float, float]],
    image_sizes: Tensor,
    nms_pre: int,
    means: Sequence[float] = (0.0, 0.0, 0.0, 0.0),
    stds: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
    wh_ratio_clip: float = 16 / 1000,
    symmetric_clip: bool = True,
    min_size: float = 0.0,
    topk_on: str = "sigmoid",
    score: str = "sigmoid",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(boxes [B, K, 4] xyxy pixels, scores [B, K], levels [B, K] int64, counts [B] int64), K = sum of min(nms_pre, A*H*W).

    Per level: cls_logits [B, A, H, W], bbox_deltas [B, 4 * A, H, W] (any floating dtype and layout), base_anchors [A, 4]
    xyxy around the origin, strides a number or (x, y) in pixels; image_sizes [B, 2] (height, width) before padding.
    An image's first counts[b] rows are valid, level by level and by descending score; the rest are zeros with level -1:
    just what `nms_padded` takes. nms_pre <= 0 keeps every anchor. `topk_on` ranks by "sigmoid" (MMDetection; ties where
    it saturates) or "logits" (torchvision, Detectron2); `score` is what is returned. Boxes and scores are float32 (float64
    for float64 logits). Not differentiable: proposals are detached by definition.
    Raises TypeError or ValueError naming the argument.
    """
    op = torch.ops.fastrcnn.decode_proposals
    with torch.no_grad():
        return _call(op, cls_logits, bbox_deltas, base_anchors, strides, image_sizes, nms_pre, means, stds,
                     wh_ratio_clip, symmetric_clip, min_size, topk_on, score)  # fmt: skip
