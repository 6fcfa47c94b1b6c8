"""Deformable RoI pooling (Dai et al., Deformable Convolutional Networks, 2017): RoIAlign whose bins move.

    output[k, c, p, q] = mean over samples of bilinear(input[b_k, c], y + gamma h_k offset[k, 1, p, q],
                                                                      x + gamma w_k offset[k, 0, p, q])

(y, x) are RoIAlign's samples of bin (p, q) with pixel centres at half-integers (aligned=True), w_k and h_k the RoI's
size in feature pixels: offsets are fractions of the RoI, x before y (mmcv's order). Offset None moves nothing.

All samples of a bin move together, so a bin is separable as in RoIAlign, but each has rows and columns of its own:
output[p, q] = rows[p, q] @ map @ columns[p, q]. The gradient in an offset puts the derivative of the rows, or of the
columns, in their place: +-1 on the two pixels beside a sample, 0 where the sample is held at the border or lies outside.
(mmcv's kernel differs in these bands around the map: it extrapolates before the first pixel, and past the last one gives
0 on both axes.) At a pixel centre, where bilinear interpolation has a kink, the derivative is the one to the right.
"""

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from fastrcnn._extension import has_kernel
from fastrcnn.ops._bind import bind
from fastrcnn.ops._checks import check_map, check_number, check_same_device, check_tensor
from fastrcnn.ops.roi_align import (
    MOST_SAMPLES,
    _as_coordinates,
    _empty_output,
    _layout,
    check_images,
    check_sampling,
    weighted_sum,
)


def _bin_axis(low: Tensor, high: Tensor, step: Tensor, offset: Tensor | None, bins: int, size: int, rules):
    """Weights [p, q, size] of an axis' pixels in each bin, their derivative in the bin's offset, and which are read.

    low, high: the RoI's edges (scalars, image pixels); step: the bin's index along this axis, [p, 1] or [1, q];
    offset [p, q] or None.
    """
    scale, ratio, gamma = rules
    start = low * scale - 0.5
    length = high * scale - 0.5 - start
    bin_size = length / bins
    empty = start.new_zeros(*(offset if offset is not None else step).shape, size)
    samples = ratio if ratio > 0 else int(torch.ceil(bin_size).nan_to_num(0, 0, 0).clamp(0, MOST_SAMPLES))
    if samples == 0 or not bool(torch.isfinite(bin_size) & torch.isfinite(start)):
        return empty, empty, empty
    if offset is not None:
        start = start + gamma * length * offset[..., None]
    i = torch.arange(samples, device=low.device, dtype=low.dtype)
    at = start + step[..., None] * bin_size + (i + 0.5) * bin_size / samples  # [p, q, samples]
    inside = (at >= -1) & (at <= size)
    moves = (at >= 0) & (at < size - 1)
    at = torch.where(moves, at, at.detach().nan_to_num().clamp(0, size - 1))
    first = at.detach().long()
    second, frac = (first + 1).clamp(max=size - 1), at - first

    def spread(on_first: Tensor, on_second: Tensor) -> Tensor:
        return empty.scatter_add(2, first, on_first * inside).scatter_add(2, second, on_second * inside) / samples

    moved = moves.to(low.dtype)
    read = spread(torch.ones_like(moved), ((frac > 0) | moves).to(low.dtype))
    slopes = spread(-moved, moved)
    return spread(1 - frac, frac), torch.where(slopes == 0, 0, slopes * (gamma * length)), read


def _bins(rois: Tensor, offset: Tensor | None, maps: Tensor, pooled_h: int, pooled_w: int, rules):
    """Yields (k, image, (rows, slopes, read), (columns, slopes, read)) for every RoI that is not padding."""
    check_images(rois, len(maps))
    rows = torch.arange(pooled_h, device=rois.device, dtype=rois.dtype)[:, None]
    columns = torch.arange(pooled_w, device=rois.device, dtype=rois.dtype)[None, :]
    for k, roi in enumerate(rois):
        if not bool(roi[0] >= 0):
            continue
        dx, dy = (None, None) if offset is None else offset[k].to(rois.dtype)
        y = _bin_axis(roi[2], roi[4], rows, dy, pooled_h, maps.shape[2], rules)
        x = _bin_axis(roi[1], roi[3], columns, dx, pooled_w, maps.shape[3], rules)
        expanded = [[t.expand(pooled_h, pooled_w, -1) for t in axis] for axis in (y, x)]
        yield k, int(roi[0]), *expanded


def _forward(
    input: Tensor,
    rois: Tensor,
    offset: Tensor | None,
    pooled_h: int,
    pooled_w: int,
    spatial_scale: float,
    sampling_ratio: int,
    gamma: float,
) -> Tensor:
    out = _empty_output([input], len(rois), pooled_h, pooled_w).zero_()
    rules = spatial_scale, sampling_ratio, gamma
    for k, image, (rows, *_), (columns, *_) in _bins(
        _as_coordinates(rois, [input]), offset, input, pooled_h, pooled_w, rules
    ):
        out[k] = weighted_sum("chw,pqh,pqw->cpq", input[image].to(rows.dtype), rows, columns).to(out.dtype)
    return out


def _backward(
    grad: Tensor,
    input: Tensor,
    rois: Tensor,
    offset: Tensor | None,
    spatial_scale: float,
    sampling_ratio: int,
    gamma: float,
) -> tuple[Tensor, Tensor]:
    """(gradient in `input`, gradient in `offset` or an empty tensor where there is none)."""
    rois = _as_coordinates(rois, [input])
    grad_input = torch.zeros_like(input, dtype=rois.dtype, memory_format=_layout([input]))
    grad_offset = torch.zeros((0,) if offset is None else offset.shape, dtype=rois.dtype, device=input.device)
    rules = spatial_scale, sampling_ratio, gamma
    for k, image, (rows, d_rows, *rows_read), (columns, d_columns, *columns_read) in _bins(
        rois, offset, input, *grad.shape[2:], rules
    ):
        g = grad[k].to(rois.dtype)
        grad_input[image] += weighted_sum("cpq,pqh,pqw->chw", g, rows, columns)
        if offset is not None:
            maps = input[image].to(rois.dtype)
            finite = torch.isfinite(maps)
            odd = torch.einsum("chw,pqh,pqw->cpq", (~finite).to(rois.dtype), *rows_read, *columns_read) > 0
            for axis, weights in enumerate(((rows, d_columns), (d_rows, columns))):
                along = torch.einsum("chw,pqh,pqw->cpq", torch.where(finite, maps, 0), *weights)
                grad_offset[k, axis] = (torch.where(odd, torch.nan, along) * g).sum(0)
    return grad_input.to(input.dtype), grad_offset.to(input.dtype if offset is None else offset.dtype)


_operator = torch.library.custom_op("fastrcnn::deform_roi_pool", _forward, mutates_args=())
_gradient = torch.library.custom_op("fastrcnn::deform_roi_pool_backward", _backward, mutates_args=())


@_operator.register_fake
def _(input, rois, offset, pooled_h, pooled_w, spatial_scale, sampling_ratio, gamma):
    return _empty_output([input], rois.shape[0], pooled_h, pooled_w)


@_gradient.register_fake
def _(grad, input, rois, offset, spatial_scale, sampling_ratio, gamma):
    grad_offset = input.new_empty(0) if offset is None else offset.new_empty(offset.shape)
    return torch.empty_like(input, memory_format=_layout([input])), grad_offset


def _alert_not_deterministic(device: torch.device) -> None:
    """What torch's own nondeterministic kernels do; the stable ABI has no call for it."""
    if device.type != "cuda" or not torch.are_deterministic_algorithms_enabled():
        return
    if not has_kernel("deform_roi_pool_backward", "cuda"):
        return  # the reference adds in a fixed order
    message = (
        "deform_roi_pool's backward on CUDA adds with atomics and has no deterministic implementation, but "
        "torch.use_deterministic_algorithms is on; warn_only=True makes this a warning"
    )
    if not torch.is_deterministic_algorithms_warn_only_enabled():
        raise RuntimeError(message)
    warnings.warn(message, stacklevel=2)


def _setup(ctx, inputs, output):
    input, rois, offset, _, _, *ctx.rules = inputs
    ctx.save_for_backward(input, rois, offset)


def _grad(ctx, grad):
    input, rois, offset = ctx.saved_tensors
    _alert_not_deterministic(grad.device)
    grad_input, grad_offset = torch.ops.fastrcnn.deform_roi_pool_backward(grad, input, rois, offset, *ctx.rules)
    return grad_input, None, None if offset is None else grad_offset, None, None, None, None, None


_operator.register_autograd(_grad, setup_context=_setup)


def _deform_roi_pool(
    op,
    input: Tensor,
    rois: Tensor,
    offset: Tensor | None,
    output_size: int | Sequence[int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = 0,
    gamma: float = 0.1,
) -> Tensor:
    """RoI features [K, C, out_h, out_w] in the dtype of `input`, summed in float32. Differentiable in `input`, `offset`.

    input [B, C, H, W], NCHW or channels-last; rois [K, 5] = (image index, xyxy in image pixels), a negative index being
    padding that gives zeros; offset [K, 2, out_h, out_w] = (x, y) in RoI sizes / gamma, of any floating dtype, or None;
    sampling_ratio points an axis in each bin, 0 for as many as the bin has pixels. Backward is deterministic on the CPU.
    Raises TypeError or ValueError naming the argument, also for an image index beyond B (on CUDA: rows of NaN).
    """
    check_map("input", input)
    *pooled, ratio = check_sampling(rois, output_size, sampling_ratio)
    if offset is not None:
        check_tensor("offset", offset, "K, 2, out_h, out_w")
        if offset.shape != (rois.shape[0], 2, *pooled):
            want = [rois.shape[0], 2, *pooled]
            raise ValueError(f"offset: expected shape [K, 2, out_h, out_w] = {want}, got {list(offset.shape)}")
    check_same_device(input=input, rois=rois, offset=offset)
    rules = check_number("spatial_scale", spatial_scale), ratio, check_number("gamma", gamma)
    return op(input, rois, offset, *pooled, *rules)


deform_roi_pool = bind(_deform_roi_pool, torch.ops.fastrcnn.deform_roi_pool.default, "deform_roi_pool")
deform_roi_pool_reference = bind(_deform_roi_pool, _forward, "deform_roi_pool_reference")
