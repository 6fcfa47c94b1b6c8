"""Box regression deltas to boxes (Girshick et al., R-CNN, 2014, appendix C; MMDetection's DeltaXYWHBBoxCoder).

(dx, dy, dw, dh) = deltas * stds + means;  centre += (dx, dy) * size;  size *= exp((dw, dh)), with dw and dh clamped to
|log(wh_ratio_clip)| from above and, with symmetric_clip (MMDetection; torchvision and Detectron2 do not), from below;
then clipped to [0, width] x [0, height]; what is no number in a box or its limit stays none.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastrcnn.ops._bind import bind
from fastrcnn.ops._box_math import exp
from fastrcnn.ops._checks import (
    FLOATING,
    INTEGERS,
    check_coder,
    check_flag,
    check_numbers,
    check_same_device,
    check_tensor,
    coordinates,
)


def _parts(anchors, deltas, means, stds, wh_ratio_clip, symmetric_clip):
    """anchors [..., 1, 4], deltas [..., C, 4] -> centre, size, (dx, dy), (dw, dh) before and after the clamp."""
    d = deltas * deltas.new_tensor(stds) + deltas.new_tensor(means)
    limit = abs(math.log(wh_ratio_clip))
    clamped = d[..., 2:].clamp(min=-limit if symmetric_clip else None, max=limit)
    size = anchors[..., 2:] - anchors[..., :2]
    centre = (anchors[..., :2] + anchors[..., 2:]) * 0.5 + size * d[..., :2]
    return centre, size, d, clamped


def _limits(max_shape: Tensor) -> Tensor:
    """[B, 2] (height, width) -> [B, 1, 1, 2] (width, height)."""
    return max_shape.flip(-1)[:, None, None, :]


def _op_reference(
    anchors: Tensor,
    deltas: Tensor,
    max_shape: Tensor | None,
    means: Sequence[float],
    stds: Sequence[float],
    wh_ratio_clip: float,
    symmetric_clip: bool,
) -> Tensor:
    a = coordinates(anchors)
    batch, n, _ = a.shape
    d = deltas.to(a.dtype).reshape(batch, n, deltas.shape[2] // 4, 4)
    centre, size, _, dwh = _parts(a[:, :, None, :], d, means, stds, wh_ratio_clip, symmetric_clip)
    half = size * exp(dwh) * 0.5
    low, high = centre - half, centre + half
    if max_shape is not None:
        limits = _limits(max_shape.to(a.dtype))
        low, high = torch.minimum(low.clamp(min=0), limits), torch.minimum(high.clamp(min=0), limits)
    return torch.cat([low, high], -1).reshape(deltas.shape)


_operator = torch.library.custom_op("fastrcnn::decode_boxes", _op_reference, mutates_args=())


@_operator.register_fake
def _(anchors, deltas, max_shape, means, stds, wh_ratio_clip, symmetric_clip):
    return deltas.new_empty(deltas.shape, dtype=torch.float64 if anchors.dtype == torch.float64 else torch.float32)


def _setup_context(ctx, inputs, output):
    anchors, deltas, max_shape, *ctx.rules = inputs
    ctx.save_for_backward(anchors, deltas, max_shape)


def _backward(ctx, grad):
    anchors, deltas, max_shape = ctx.saved_tensors
    means, stds, wh_ratio_clip, symmetric_clip = ctx.rules
    a = coordinates(anchors)
    batch, n, _ = a.shape
    d = deltas.to(a.dtype).reshape(batch, n, deltas.shape[2] // 4, 4)
    centre, size, denorm, dwh = _parts(a[:, :, None, :], d, means, stds, wh_ratio_clip, symmetric_clip)
    scale = exp(dwh)
    half = size * scale * 0.5
    g = grad.reshape(d.shape)
    g_low, g_high = g[..., :2], g[..., 2:]
    if max_shape is not None:  # a clipped coordinate passes no gradient
        limits = _limits(max_shape.to(a.dtype))
        low, high = centre - half, centre + half
        g_low = g_low * ((low >= 0) & (low <= limits))
        g_high = g_high * ((high >= 0) & (high <= limits))
    g_centre, g_half = g_low + g_high, g_high - g_low
    free = dwh == denorm[..., 2:]
    g_d = torch.cat([g_centre * size, g_half * half * free], -1) * d.new_tensor(stds)
    g_size = (g_centre * denorm[..., :2] + g_half * scale * 0.5).sum(2)
    g_mid = g_centre.sum(2) * 0.5
    g_a = torch.cat([g_mid - g_size, g_mid + g_size], -1)
    return g_a.to(anchors.dtype), g_d.reshape(deltas.shape).to(deltas.dtype), None, None, None, None, None


_operator.register_autograd(_backward, setup_context=_setup_context)


def _decode(
    op,
    anchors: Tensor,
    deltas: Tensor,
    max_shape: Tensor | Sequence[int] | None = None,
    means: Sequence[float] = (0.0, 0.0, 0.0, 0.0),
    stds: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
    wh_ratio_clip: float = 16 / 1000,
    symmetric_clip: bool = True,
) -> Tensor:
    """Boxes xyxy in pixels, the shape of `deltas`, float32 (float64 for float64 anchors). Differentiable.

    anchors [N, 4] or [B, N, 4] xyxy pixels; deltas [N, 4 * C] or [B, N, 4 * C], four a class; max_shape (height, width)
    in pixels, or [B, 2] of them, or None for no clipping. Raises TypeError or ValueError naming the argument.
    """
    batched = isinstance(anchors, Tensor) and anchors.dim() == 3
    shape = "B, N, 4" if batched else "N, 4"
    check_tensor("anchors", anchors, shape, last=4)
    check_tensor("deltas", deltas, shape.replace("4", "4 * C"))
    if deltas.shape[:-1] != anchors.shape[:-1] or deltas.shape[-1] % 4:
        raise ValueError(f"deltas: expected [{shape.replace('4', '4 * C')}] beside anchors {list(anchors.shape)}, "
                         f"got {list(deltas.shape)}")  # fmt: skip
    coder = check_coder(means, stds, wh_ratio_clip)
    a, d = (anchors, deltas) if batched else (anchors[None], deltas[None])
    if max_shape is not None:
        if not isinstance(max_shape, Tensor):
            max_shape = torch.tensor(check_numbers("max_shape", max_shape, 2), dtype=torch.float64, device=a.device)
        if max_shape.dtype not in (*FLOATING, *INTEGERS):
            raise TypeError(f"max_shape: expected a tensor of numbers, got {max_shape.dtype}")
        rank = max_shape.dim()
        if rank not in (1, 2) or max_shape.shape[-1] != 2 or (rank == 2 and max_shape.shape[0] != a.shape[0]):
            raise ValueError(f"max_shape: expected (height, width) or [{len(a)}, 2], got shape {list(max_shape.shape)}")
        max_shape = max_shape.expand(a.shape[0], 2)
    check_same_device(anchors=a, deltas=d, max_shape=max_shape)
    out = op(a, d, max_shape, *coder, check_flag("symmetric_clip", symmetric_clip))
    return out if batched else out[0]


decode_boxes = bind(_decode, torch.ops.fastrcnn.decode_boxes.default, "decode_boxes")
decode_boxes_reference = bind(_decode, _op_reference, "decode_boxes_reference")
