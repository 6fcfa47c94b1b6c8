"""RoIAlign (He et al., Mask R-CNN, 2017) on one map, and what its form on a pyramid shares with it.

A RoI is split into output_size bins; a bin is the mean of bilinear samples on a regular grid of sampling_ratio points an
axis (0: as many as the bin has pixels, rounded up). With aligned=True pixel centres lie at half-integers (Detectron2,
MMDetection); with False the RoI is shifted by half a pixel and at least one pixel large (torchvision's default).
Bilinear sampling on a grid is separable, so the reference writes a bin's rows and columns as two weight matrices:
output = W_y @ map @ W_x^T.

Layout: where every map is channels-last the output is, too; otherwise it is NCHW. Nothing is copied to change layout.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastrcnn.ops._checks import check_same_device, check_tensor, coordinates


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
    samples = ratio if ratio > 0 else max(int(torch.ceil(bin_size)), 0)
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


def roi_levels(rois: Tensor, num_levels: int, finest_scale: float, profile: str) -> Tensor:
    """Pyramid level [K] of each RoI [K, 5]. The peers put the epsilon in different places."""
    size = torch.sqrt((rois[:, 3] - rois[:, 1]) * (rois[:, 4] - rois[:, 2]))
    if profile == "mmdet":
        level = torch.floor(torch.log2(size / finest_scale + 1e-6))
    elif profile == "torchvision":
        level = torch.floor(4 + torch.log2(size / (4 * finest_scale)) + 1e-6) - 2
    else:
        level = torch.floor(4 + torch.log2(size / (4 * finest_scale) + 1e-8)) - 2
    return level.nan_to_num(nan=0.0).clamp(0, num_levels - 1).long()


def _roi_weights(rois: Tensor, shapes, pooled_h, pooled_w, scales, sampling_ratio, aligned, finest_scale, profile):
    """Yields (k, level, image, W_y [pooled_h, H], W_x [pooled_w, W]) for every RoI that is not padding."""
    rois = coordinates(rois)
    levels = roi_levels(rois, len(shapes), finest_scale, profile)
    for k, (roi, level) in enumerate(zip(rois, levels.tolist())):
        if not bool(roi[0] >= 0):
            continue
        height, width = shapes[level]
        rule = scales[level], sampling_ratio, aligned
        rows = _axis_weights(roi[2], roi[4], rule[0], pooled_h, height, *rule[1:])
        columns = _axis_weights(roi[1], roi[3], rule[0], pooled_w, width, *rule[1:])
        yield k, level, int(roi[0]), rows, columns


def _layout(maps: Sequence[Tensor]) -> torch.memory_format:
    """Channels-last where every map is: the rule of csrc/cpu/roi_align.h."""
    channels_last = all(m.shape[1] > 1 and m.stride(1) == 1 for m in maps)
    return torch.channels_last if channels_last else torch.contiguous_format


def _empty_output(maps: Sequence[Tensor], num_rois: int, pooled_h: int, pooled_w: int) -> Tensor:
    shape = (num_rois, maps[0].shape[1], pooled_h, pooled_w)
    return torch.empty(shape, dtype=maps[0].dtype, device=maps[0].device, memory_format=_layout(maps))


def _forward(
    features: Sequence[Tensor],
    rois: Tensor,
    pooled_h: int,
    pooled_w: int,
    scales: Sequence[float],
    sampling_ratio: int,
    aligned: bool,
    finest_scale: float,
    profile: str,
) -> Tensor:
    out = _empty_output(features, len(rois), pooled_h, pooled_w).zero_()
    rois = rois.to(torch.float64 if features[0].dtype == torch.float64 else torch.float32)
    rules = [m.shape[2:] for m in features], pooled_h, pooled_w, scales, sampling_ratio, aligned, finest_scale, profile
    for k, level, image, rows, columns in _roi_weights(rois, *rules):
        out[k] = (rows @ features[level][image].to(rows.dtype) @ columns.T).to(out.dtype)
    return out


def _backward(
    grad: Tensor,
    features: Sequence[Tensor],
    rois: Tensor,
    scales: Sequence[float],
    sampling_ratio: int,
    aligned: bool,
    finest_scale: float,
    profile: str,
) -> list[Tensor]:
    rois = rois.to(torch.float64 if features[0].dtype == torch.float64 else torch.float32)
    grads = [torch.zeros_like(m, dtype=rois.dtype, memory_format=_layout(features)) for m in features]
    rules = [m.shape[2:] for m in features], *grad.shape[2:], scales, sampling_ratio, aligned, finest_scale, profile
    for k, level, image, rows, columns in _roi_weights(rois, *rules):
        grads[level][image] += rows.T @ grad[k].to(rows.dtype) @ columns
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
    return _forward([input], rois, pooled_h, pooled_w, [spatial_scale], sampling_ratio, aligned, 56.0, "mmdet")


def _one_backward(
    grad: Tensor, input: Tensor, rois: Tensor, spatial_scale: float, sampling_ratio: int, aligned: bool
) -> Tensor:
    return _backward(grad, [input], rois, [spatial_scale], sampling_ratio, aligned, 56.0, "mmdet")[0]


_roi_align = torch.library.custom_op("fastrcnn::roi_align", _one_forward, mutates_args=())
_roi_align_backward = torch.library.custom_op("fastrcnn::roi_align_backward", _one_backward, mutates_args=())


@_roi_align.register_fake
def _(input, rois, pooled_h, pooled_w, spatial_scale, sampling_ratio, aligned):
    return _empty_output([input], rois.shape[0], pooled_h, pooled_w)


@_roi_align_backward.register_fake
def _(grad, input, rois, spatial_scale, sampling_ratio, aligned):
    return torch.empty_like(input, memory_format=_layout([input]))


def _roi_setup(ctx, inputs, output):
    input, rois, _, _, *ctx.rules = inputs
    ctx.save_for_backward(input, rois)


def _roi_grad(ctx, grad):
    input, rois = ctx.saved_tensors
    return torch.ops.fastrcnn.roi_align_backward(grad, input, rois, *ctx.rules), None, None, None, None, None, None


_roi_align.register_autograd(_roi_grad, setup_context=_roi_setup)


def _pair(output_size: int | Sequence[int]) -> tuple[int, int]:
    pair = (output_size, output_size) if isinstance(output_size, int) else tuple(output_size)
    if len(pair) != 2 or min(pair) < 1:
        raise ValueError(f"output_size: expected a positive int or a pair of them, got {output_size}")
    return int(pair[0]), int(pair[1])


def _single(op, input, rois, output_size, spatial_scale, sampling_ratio, aligned):
    check_tensor("input", input, "B, C, H, W")
    check_tensor("rois", rois, "K, 5", last=5)
    check_same_device(input=input, rois=rois)
    return op(input, rois, *_pair(output_size), float(spatial_scale), int(sampling_ratio), bool(aligned))


def roi_align_reference(
    input: Tensor,
    rois: Tensor,
    output_size: int | Sequence[int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = 0,
    aligned: bool = True,
) -> Tensor:
    return _single(_one_forward, input, rois, output_size, spatial_scale, sampling_ratio, aligned)


def roi_align(
    input: Tensor,
    rois: Tensor,
    output_size: int | Sequence[int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = 0,
    aligned: bool = True,
) -> Tensor:
    """RoI features [K, C, out_h, out_w] in the dtype of `input`, summed in float32. Differentiable in `input`.

    input [B, C, H, W], NCHW or channels-last; rois [K, 5] = (image index, xyxy in image pixels), a negative index being
    padding that gives zeros; spatial_scale = map size / image size. Backward is deterministic.
    Raises TypeError or ValueError naming the argument; RuntimeError for an image index beyond B on the CPU. On CUDA the
    host does not wait to look at the indices: such RoIs give zeros there, as padding does.
    """
    return _single(torch.ops.fastrcnn.roi_align, input, rois, output_size, spatial_scale, sampling_ratio, aligned)
