"""RPN maps to proposals (Ren et al., Faster R-CNN, 2015), all images and levels at once, with static shapes.

Per image and level: the nms_pre highest-scoring anchors are taken, their deltas decoded, the boxes clipped to the image's
own size and those not larger than min_size on both sides dropped. Anchor a of cell (y, x) is base_anchors[a] moved by
(x * stride_x, y * stride_y); candidates count in the order y, x, a, and equal scores keep it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastrcnn.ops._bind import bind, declare
from fastrcnn.ops._box_math import sigmoid
from fastrcnn.ops._boxes import take_boxes
from fastrcnn.ops._checks import (
    ANY_COUNT,
    check_choice,
    check_coder,
    check_flag,
    check_int,
    check_number,
    check_pair,
    check_positive,
    check_same_device,
    check_tensor,
    check_tensors,
)
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
    batch_shape: Sequence[int] | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = _dtype(cls_logits)
    if batch_shape:
        strides = [batch_shape[1 - k] // max(x.shape[3 - k], 1) for x in cls_logits for k in range(2)]
    sizes = image_sizes.to(dtype)
    batch, device = len(sizes), sizes.device
    boxes, scores, levels = [], [], []
    for level, (logits, deltas, base) in enumerate(zip(cls_logits, bbox_deltas, base_anchors)):
        num_anchors, _, width = logits.shape[1:]
        n = logits.shape[1:].numel()
        logits = logits.to(dtype).permute(0, 2, 3, 1).reshape(batch, n)
        deltas = deltas.to(dtype).permute(0, 2, 3, 1).reshape(batch, n, 4)
        rank_by = (logits if topk_on_logits else sigmoid(logits)).nan_to_num(nan=-torch.inf, posinf=torch.inf)
        count = min(nms_pre, logits.shape[1]) if nms_pre > 0 else logits.shape[1]
        top = torch.sort(rank_by, dim=1, descending=True, stable=True).indices[:, :count]  # [B, count]
        cell = top // num_anchors
        cell = torch.stack([cell % width, cell // width], -1).to(dtype)
        shift = cell * cell.new_tensor(strides[2 * level : 2 * level + 2])
        anchors = base.to(dtype)[top % num_anchors] + shift.repeat(1, 1, 2)
        deltas = take_boxes(deltas, top)
        boxes.append(_decode_reference(anchors, deltas, sizes, means, stds, wh_ratio_clip, symmetric_clip))
        logits = logits.gather(1, top)
        scores.append(logits if return_logits else sigmoid(logits))
        levels.append(torch.full((batch, count), level, dtype=torch.int64, device=device))
    boxes, scores, levels = torch.cat(boxes, 1), torch.cat(scores, 1), torch.cat(levels, 1)
    size = boxes[..., 2:] - boxes[..., :2]
    valid = (size > min_size).all(-1)  # also drops NaN
    first = torch.sort(valid.int(), dim=1, descending=True, stable=True).indices
    valid = valid.gather(1, first)
    boxes = torch.where(valid[..., None], take_boxes(boxes, first), 0.0)
    scores = torch.where(valid, scores.gather(1, first), 0.0)
    levels = torch.where(valid, levels.gather(1, first), -1)
    return boxes, scores, levels, valid.sum(1)


def _fake(cls_logits, bbox_deltas, base_anchors, strides, image_sizes, nms_pre, *rules):
    batch = image_sizes.shape[0]
    sizes = [x.shape[1] * x.shape[2] * x.shape[3] for x in cls_logits]
    total = sum(torch.sym_min(nms_pre, n) if nms_pre > 0 else n for n in sizes)
    out = image_sizes.new_empty(batch, total, 4, dtype=_dtype(cls_logits))
    levels = image_sizes.new_empty(batch, total, dtype=torch.int64)
    return out, out.new_empty(batch, total), levels, image_sizes.new_empty(batch, dtype=torch.int64)


declare("decode_proposals", _op_reference, _fake)


def _check_levels(cls_logits: list, bbox_deltas: list, base_anchors: list, image_sizes) -> None:
    whole = isinstance(image_sizes, Tensor) and not image_sizes.is_floating_point()
    check_tensor("image_sizes", image_sizes, "B, 2", floating=not whole, last=2)
    for i, (logits, deltas, base) in enumerate(zip(cls_logits, bbox_deltas, base_anchors)):
        check_tensor(f"cls_logits[{i}]", logits, "B, A, H, W")
        check_tensor(f"bbox_deltas[{i}]", deltas, "B, 4 * A, H, W")
        check_tensor(f"base_anchors[{i}]", base, "A, 4", last=4)
        b, a, h, w = logits.shape
        if b != image_sizes.shape[0]:
            raise ValueError(f"image_sizes: expected [{b}, 2] beside cls_logits[{i}] {list(logits.shape)}, "
                             f"got {list(image_sizes.shape)}")  # fmt: skip
        if deltas.shape != (b, 4 * a, h, w):
            raise ValueError(f"bbox_deltas[{i}]: expected {[b, 4 * a, h, w]}, got {list(deltas.shape)}")
        if len(base) != a:
            raise ValueError(f"base_anchors[{i}]: expected [{a}, 4], got {list(base.shape)}")
        check_same_device(**{"image_sizes": image_sizes, f"cls_logits[{i}]": logits, f"bbox_deltas[{i}]": deltas,
                             f"base_anchors[{i}]": base})  # fmt: skip


def _decode_proposals(
    op,
    cls_logits: Sequence[Tensor],
    bbox_deltas: Sequence[Tensor],
    base_anchors: Sequence[Tensor],
    strides: Sequence[float | tuple[float, float]] | None,
    image_sizes: Tensor,
    nms_pre: int,
    means: Sequence[float] = (0.0, 0.0, 0.0, 0.0),
    stds: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
    wh_ratio_clip: float = 16 / 1000,
    symmetric_clip: bool = True,
    min_size: float = 0.0,
    topk_on: str = "sigmoid",
    score: str = "sigmoid",
    batch_shape: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(boxes [B, K, 4] xyxy pixels, scores [B, K], levels [B, K] int64, counts [B] int64), K = sum of min(nms_pre, A*H*W).

    Per level: cls_logits [B, A, H, W], bbox_deltas [B, 4 * A, H, W] (any floating dtype and layout), base_anchors [A, 4]
    xyxy around the origin, strides a number or (x, y) in pixels, or None: batch_shape (height, width) // map size, as
    torchvision has it; image_sizes [B, 2] (height, width) before padding.
    An image's first counts[b] rows are valid, level by level and by descending score; the rest are zeros with level -1:
    just what `nms_padded` takes. nms_pre <= 0 keeps every anchor. `topk_on` ranks by "sigmoid" (MMDetection; ties where
    it saturates) or "logits" (torchvision, Detectron2); `score` is what is returned. Boxes and scores are float32 (float64
    for float64 logits). Not differentiable: proposals are detached by definition.
    Raises TypeError or ValueError naming the argument. CUDA takes up to 8 levels.
    """
    cls_logits, bbox_deltas = check_tensors("cls_logits", cls_logits), check_tensors("bbox_deltas", bbox_deltas)
    base_anchors = check_tensors("base_anchors", base_anchors)
    if strides is None and batch_shape is None:
        raise TypeError("strides: expected some, or None and a batch_shape (height, width)")
    if strides is not None and batch_shape is not None:
        raise TypeError(f"batch_shape: expected None beside strides, got {batch_shape!r}")
    if strides is not None and not isinstance(strides, (list, tuple)):
        raise TypeError(f"strides: expected a number or (x, y) for each level, got {type(strides).__name__}")
    lists = ("bbox_deltas", bbox_deltas), ("base_anchors", base_anchors), ("strides", strides)
    for name, given in lists[: 2 if strides is None else 3]:
        if len(given) != len(cls_logits):
            raise ValueError(f"{name}: expected one entry for each of the {len(cls_logits)} levels of cls_logits, "
                             f"got {len(given)}")  # fmt: skip
    _check_levels(cls_logits, bbox_deltas, base_anchors, image_sizes)
    coder = check_coder(means, stds, wh_ratio_clip)
    shape = None if batch_shape is None else check_pair("batch_shape", batch_shape, 1)
    pairs = [s if isinstance(s, (list, tuple)) else (s, s) for s in strides or ()]
    if any(len(pair) != 2 for pair in pairs):
        raise ValueError(f"strides: expected a number or (x, y) for each level, got {list(strides)}")
    pairs = [check_positive(f"strides[{i}]", v) for i, pair in enumerate(pairs) for v in pair]
    rules = *coder, check_flag("symmetric_clip", symmetric_clip), check_number("min_size", min_size)
    choices = ("topk_on", topk_on), ("score", score)
    flags = [check_choice(name, value, ("sigmoid", "logits")) == "logits" for name, value in choices]
    count = check_int("nms_pre", nms_pre, -ANY_COUNT, ANY_COUNT)
    with torch.no_grad():
        return op(cls_logits, bbox_deltas, base_anchors, pairs, image_sizes, count, *rules, *flags, shape)


decode_proposals = bind(_decode_proposals, torch.ops.fastrcnn.decode_proposals.default, "decode_proposals")
decode_proposals_reference = bind(_decode_proposals, _op_reference, "decode_proposals_reference")
