"""RoIAlign (He et al., Mask R-CNN, 2017) on one map, and what its form on a pyramid shares with it.

A RoI is split into output_size bins; a bin is the mean of bilinear samples on a regular grid of sampling_ratio points an
axis (0: as many as the bin has pixels, rounded up). With aligned=True pixel centres lie at half-integers (Detectron2,
MMDetection); with False the RoI is shifted by half a pixel and at least one pixel large (torchvision's default).
Bilinear sampling on a grid is separable, so the reference writes a bin's rows and columns as two weight matrices:
output = W_y @ map @ W_x^T.

A pixel of weight 0 is not read: what is no finite number there does not spread.

Layout: where every map is channels-last the output is, too; otherwise it is NCHW. Nothing is copied to change layout.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastrcnn.ops._bind import bind
from fastrcnn.ops._checks import (
    LARGEST,
    check_flag,
    check_int,
    check_map,
    check_number,
    check_pair,
    check_same_device,
    check_tensor,
)

MOST_SAMPLES = 2**16  # of a bin along an axis


def _axis_weights(low: Tensor, high: Tensor, scale: float, bins: int, size: int, ratio: int, aligned: bool) -> Tensor:
    """[bins, size]: the weight of each pixel of an axis in each bin of the RoI [low, high] (scalars, image pixels)."""
    offset = 0.5 if aligned else 0.0
    start = low * scale - offset
    length = high * scale - offset - start
    if not aligned:
        length = length.clamp(min=1.0)
    bin_size = length / bins
    weights = start.new_zeros(bins, size)
    if not bool(torch.isfinite(bin_size) & torch.isfinite(start)):
        return weights
    samples = ratio if ratio > 0 else min(max(int(torch.ceil(bin_size)), 0), MOST_SAMPLES)
    if samples == 0:
        return weights
    p = torch.arange(bins, device=low.device, dtype=low.dtype)[:, None]
    i = torch.arange(samples, device=low.device, dtype=low.dtype)[None, :]
    at = start + p * bin_size + (i + 0.5) * bin_size / samples  # [bins, samples]
    inside = (at >= -1) & (at <= size)
    at = torch.where(inside, at, torch.zeros_like(at)).clamp(min=0)
    first = at.long()
    last_pixel = first >= size - 1
    first = first.clamp(max=size - 1)
    second = (first + 1).clamp(max=size - 1)
    frac = torch.where(last_pixel, torch.zeros_like(at), at - first)
    weights.scatter_add_(1, first, (1 - frac) * inside)
    weights.scatter_add_(1, second, frac * inside)
    return weights / samples


def level_rule(finest_scale: float, profile: str) -> list[float]:
    """(scale, first, inside, outside, lowest): level = floor(first + log2(size / scale + inside) + outside) - lowest. The
    peers put the epsilon in different places, which moves RoIs that lie on a boundary."""
    if profile == "mmdet":
        return [finest_scale, 0.0, 1e-6, 0.0, 0.0]
    inside, outside = (0.0, 1e-6) if profile == "torchvision" else (1e-8, 0.0)
    return [4 * finest_scale, 4.0, inside, outside, 2.0]


ANY_LEVEL = level_rule(56.0, "mmdet")  # for one map


def roi_levels(rois: Tensor, num_levels: int, finest_scale: float, profile: str) -> Tensor:
    """Pyramid level [K] of each RoI [K, 5]."""
    return _levels(rois, num_levels, level_rule(finest_scale, profile))


def _levels(rois: Tensor, num_levels: int, rule: Sequence[float]) -> Tensor:
    scale, first, inside, outside, lowest = rule
    size = torch.sqrt((rois[:, 3] - rois[:, 1]) * (rois[:, 4] - rois[:, 2]))
    level = torch.floor(first + torch.log2(size / scale + inside) + outside) - lowest
    return level.nan_to_num(nan=0.0).clamp(0, num_levels - 1).long()


def check_images(rois: Tensor, batch: int) -> None:
    beyond = (rois[:, 0] >= batch).nonzero()
    if len(beyond):
        k = int(beyond[0])
        raise ValueError(f"rois: row {k} has image index {rois[k, 0].item():g}, of {batch} images")


def _roi_weights(rois: Tensor, maps: Sequence[Tensor], pooled_h, pooled_w, scales, sampling_ratio, aligned, rule):
    """Yields (k, level, image, W_y [pooled_h, H], W_x [pooled_w, W]) for every RoI that is not padding."""
    check_images(rois, len(maps[0]))
    for k, (roi, level) in enumerate(zip(rois, _levels(rois, len(maps), rule).tolist())):
        if not bool(roi[0] >= 0):
            continue
        height, width = maps[level].shape[2:]
        rules = scales[level], sampling_ratio, aligned
        rows = _axis_weights(roi[2], roi[4], rules[0], pooled_h, height, *rules[1:])
        columns = _axis_weights(roi[1], roi[3], rules[0], pooled_w, width, *rules[1:])
        yield k, level, int(roi[0]), rows, columns


def weighted_sum(equation: str, values: Tensor, *weights: Tensor) -> Tensor:
    """einsum(equation, values, *weights) without the products of weight 0, where a NaN or infinity would become NaN."""
    finite = torch.isfinite(values)
    total = torch.einsum(equation, torch.where(finite, values, 0), *weights)
    if not finite.all():
        read = [(w != 0).to(values.dtype) for w in weights]
        for odd in (torch.nan, torch.inf, -torch.inf):
            where = values.isnan() if odd != odd else values == odd
            total = total + torch.where(torch.einsum(equation, where.to(values.dtype), *read) > 0, odd, 0.0)
    return total


def _layout(maps: Sequence[Tensor]) -> torch.memory_format:
    """Channels-last where every map is: the rule of csrc/cpu/roi_align.h."""
    channels_last = all(m.shape[1] > 1 and m.stride(1) == 1 for m in maps)
    return torch.channels_last if channels_last else torch.contiguous_format


def _empty_output(maps: Sequence[Tensor], num_rois: int, pooled_h: int, pooled_w: int) -> Tensor:
    shape = (num_rois, maps[0].shape[1], pooled_h, pooled_w)
    return torch.empty(shape, dtype=maps[0].dtype, device=maps[0].device, memory_format=_layout(maps))


def _as_coordinates(rois: Tensor, maps: Sequence[Tensor]) -> Tensor:
    return rois.to(torch.float64 if maps[0].dtype == torch.float64 else torch.float32)


def _forward(
    features: Sequence[Tensor],
    rois: Tensor,
    pooled_h: int,
    pooled_w: int,
    scales: Sequence[float],
    sampling_ratio: int,
    aligned: bool,
    level_rule: Sequence[float],
) -> Tensor:
    out = _empty_output(features, len(rois), pooled_h, pooled_w).zero_()
    rules = features, pooled_h, pooled_w, scales, sampling_ratio, aligned, level_rule
    for k, level, image, rows, columns in _roi_weights(_as_coordinates(rois, features), *rules):
        out[k] = weighted_sum("chw,ph,qw->cpq", features[level][image].to(rows.dtype), rows, columns).to(out.dtype)
    return out


def _backward(
    grad: Tensor,
    features: Sequence[Tensor],
    rois: Tensor,
    scales: Sequence[float],
    sampling_ratio: int,
    aligned: bool,
    level_rule: Sequence[float],
) -> list[Tensor]:
    rois = _as_coordinates(rois, features)
    grads = [torch.zeros_like(m, dtype=rois.dtype, memory_format=_layout(features)) for m in features]
    rules = features, *grad.shape[2:], scales, sampling_ratio, aligned, level_rule
    for k, level, image, rows, columns in _roi_weights(rois, *rules):
        grads[level][image] += weighted_sum("cpq,ph,qw->chw", grad[k].to(rows.dtype), rows, columns)
    return [g.to(m.dtype) for g, m in zip(grads, features)]


def _one_forward(
    input: Tensor,
    rois: Tensor,
    pooled_h: int,
    pooled_w: int,
    spatial_scale: float,
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    return _forward([input], rois, pooled_h, pooled_w, [spatial_scale], sampling_ratio, aligned, ANY_LEVEL)


def _one_backward(
    grad: Tensor, input: Tensor, rois: Tensor, spatial_scale: float, sampling_ratio: int, aligned: bool
) -> Tensor:
    return _backward(grad, [input], rois, [spatial_scale], sampling_ratio, aligned, ANY_LEVEL)[0]


_operator = torch.library.custom_op("fastrcnn::roi_align", _one_forward, mutates_args=())
_gradient = torch.library.custom_op("fastrcnn::roi_align_backward", _one_backward, mutates_args=())


@_operator.register_fake
def _(input, rois, pooled_h, pooled_w, spatial_scale, sampling_ratio, aligned):
    return _empty_output([input], rois.shape[0], pooled_h, pooled_w)


@_gradient.register_fake
def _(grad, input, rois, spatial_scale, sampling_ratio, aligned):
    return torch.empty_like(input, memory_format=_layout([input]))


def _roi_setup(ctx, inputs, output):
    input, rois, _, _, *ctx.rules = inputs
    ctx.save_for_backward(input, rois)


def _roi_grad(ctx, grad):
    input, rois = ctx.saved_tensors
    return torch.ops.fastrcnn.roi_align_backward(grad, input, rois, *ctx.rules), None, None, None, None, None, None


_operator.register_autograd(_roi_grad, setup_context=_roi_setup)


def check_sampling(rois, output_size, sampling_ratio) -> tuple[int, int, int]:
    """What every RoI operator takes -> (pooled_h, pooled_w, sampling_ratio)."""
    check_tensor("rois", rois, "K, 5", last=5)
    pooled = check_pair("output_size", output_size, 1)
    if pooled[0] * pooled[1] > LARGEST:
        raise ValueError(f"output_size: expected at most {LARGEST} bins, got {output_size}")
    return *pooled, check_int("sampling_ratio", sampling_ratio, high=MOST_SAMPLES)


def _roi_align(
    op,
    input: Tensor,
    rois: Tensor,
    output_size: int | Sequence[int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = 0,
    aligned: bool = True,
) -> Tensor:
    """RoI features [K, C, out_h, out_w] in the dtype of `input`, summed in float32. Differentiable in `input`.

    input [B, C, H, W], NCHW or channels-last; rois [K, 5] = (image index, xyxy in image pixels), a negative index being
    padding that gives zeros; spatial_scale = map size / image size; sampling_ratio at most 65536. Backward is
    deterministic. Raises TypeError or ValueError naming the argument, also for an image index beyond B on the CPU. On
    CUDA the host does not wait to look at the indices: such RoIs give zeros there, as padding does, and output_size has at
    most 512 bins along both axes together.
    """
    check_map("input", input)
    *pooled, ratio = check_sampling(rois, output_size, sampling_ratio)
    check_same_device(input=input, rois=rois)
    scale = check_number("spatial_scale", spatial_scale)
    return op(input, rois, *pooled, scale, ratio, check_flag("aligned", aligned))


roi_align = bind(_roi_align, torch.ops.fastrcnn.roi_align.default, "roi_align")
roi_align_reference = bind(_roi_align, _one_forward, "roi_align_reference")
