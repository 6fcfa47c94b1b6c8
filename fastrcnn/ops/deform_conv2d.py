"""Deformable convolution, v1 (Dai et al., Deformable Convolutional Networks, 2017) and v2 (Zhu et al., 2019):

out[o, p] = bias[o] + sum over taps k and channels c of weight[o, c, k] * mask[k, p] * input[c, at],
at = p * stride - padding + k * dilation + offset[k, p]

The input is read bilinearly with zeros outside; v1 has no mask. Channels are split into offset groups, each with its own
offsets and mask, and into the convolution's groups. Offsets are ordered as torchvision and mmcv have them: offset group,
tap (row by row), then y and x, in input pixels. Where a point lies on whole pixels the slope is that towards the next pixel
(torchvision's rule); mmcv has slope 0 for a point at exactly -1. A pixel of weight 0 is not read: what is no finite number
there does not spread.

The kernels gather columns [rows, taps * C] for some rows (output positions) at a time and leave the product to torch's
matmul, so that memory does not grow with the map. Channels-last maps are gathered as they lie; NCHW maps are copied once.
Backward is deterministic: no atomic additions, on the GPU the contributions to a pixel are sorted first.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastrcnn.ops._bind import bind
from fastrcnn.ops._checks import check_pair, check_same_device, check_tensor, coordinates
from fastrcnn.ops.roi_align import _layout


def _out_size(input: Tensor, weight: Tensor, stride, padding, dilation) -> list[int]:
    return [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(input.shape[2:], weight.shape[2:], stride, padding, dilation)
    ]


def _points(input: Tensor, offset: Tensor, kernel: Sequence[int], stride, padding, dilation) -> tuple[Tensor, Tensor]:
    """y and x [B, G, taps, OH, OW] that the taps read, in pixels."""
    size = offset.shape[2:]
    offset = offset.to(torch.float64 if input.dtype == torch.float64 else torch.float32)
    offset = offset.reshape(len(input), -1, kernel[0] * kernel[1], 2, *size)
    axes = []
    for axis in range(2):
        tap = torch.arange(kernel[axis], device=input.device) * dilation[axis] - padding[axis]
        out = torch.arange(size[axis], device=input.device) * stride[axis]
        tap = tap[:, None].expand(*kernel) if axis == 0 else tap.expand(*kernel)
        out = out[:, None] if axis == 0 else out
        axes.append(tap.reshape(-1, 1, 1) + out + offset[:, :, :, axis])
    return axes[0], axes[1]


def _corners(y: Tensor, x: Tensor, height: int, width: int):
    """Yields (pixel index, inside, weight, slope along y, slope along x) of the four pixels around each point."""
    within = (y >= -1) & (y < height) & (x >= -1) & (x < width)
    y, x = torch.where(within, y, 0), torch.where(within, x, 0)
    low_y, low_x = y.floor(), x.floor()
    fy, fx = y - low_y, x - low_x
    for i in range(2):
        for j in range(2):
            row, column = low_y.long() + i, low_x.long() + j
            inside = within & (row >= 0) & (row < height) & (column >= 0) & (column < width)
            wy, wx = fy if i else 1 - fy, fx if j else 1 - fx
            pixel = torch.where(inside, row * width + column, 0)
            yield pixel, inside, wy * wx, (wx if i else -wx), (wy if j else -wy)


def _gather(maps: Tensor, pixel: Tensor) -> Tensor:
    """maps [B, G, C, H * W] at pixel [B, G, taps, OH, OW] -> [B, G, C, taps, OH, OW]."""
    batch, groups, channels = maps.shape[:3]
    index = pixel.reshape(batch, groups, 1, -1).expand(-1, -1, channels, -1)
    return maps.gather(3, index).view(batch, groups, channels, *pixel.shape[2:])


def _times(weight: Tensor, values: Tensor) -> Tensor:
    """weight [B, G, taps, OH, OW] times values [B, G, C, taps, OH, OW], also 0 for 0 times what is not finite."""
    weight = weight[:, :, None]
    return torch.where((weight == 0) & ~values.isfinite(), 0, weight * values)


def _columns(maps: Tensor, y: Tensor, x: Tensor, scale: Tensor | None, size: Sequence[int]) -> Tensor:
    """What the taps read, [B, G, C, taps, OH, OW]."""
    total = torch.zeros((), dtype=maps.dtype, device=maps.device)
    for pixel, inside, w, _, _ in _corners(y, x, *size):
        w = torch.where(inside, w if scale is None else w * scale, 0)
        total = total + _times(w, _gather(maps, pixel))
    return total


def _split(input: Tensor, offset: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, int]:
    """The maps [B, offset groups, C, H * W] and the weight [groups, O, C * taps], and the number of groups."""
    batch, channels = input.shape[:2]
    groups, taps = channels // weight.shape[1], weight.shape[2] * weight.shape[3]
    maps = coordinates(input).reshape(batch, offset.shape[1] // (2 * taps), -1, input.shape[2] * input.shape[3])
    return maps, coordinates(weight).reshape(groups, weight.shape[0] // groups, -1), groups


def _forward(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    maps, filters, groups = _split(input, offset, weight)
    batch, size = len(input), _out_size(input, weight, stride, padding, dilation)
    y, x = _points(input, offset, weight.shape[2:], stride, padding, dilation)
    scale = None if mask is None else mask.to(maps.dtype).reshape(y.shape)
    columns = _columns(maps, y, x, scale, input.shape[2:])
    columns = columns.reshape(batch, groups, filters.shape[2], size[0] * size[1])
    out = (filters @ columns).reshape(batch, weight.shape[0], *size).to(input.dtype)
    return _in_layout(out, input)


def _in_layout(out: Tensor, input: Tensor) -> Tensor:
    """A new tensor in the memory format of `input`, stride for stride as the kernels return it."""
    if _layout([input]) == torch.channels_last:
        return out.permute(0, 2, 3, 1).clone(memory_format=torch.contiguous_format).permute(0, 3, 1, 2)
    return out.clone(memory_format=torch.contiguous_format)


def _backward(
    grad: Tensor,
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    maps, filters, groups = _split(input, offset, weight)
    y, x = _points(input, offset, weight.shape[2:], stride, padding, dilation)
    batch, (height, width) = len(input), input.shape[2:]
    grad = coordinates(grad).reshape(batch, groups, filters.shape[1], -1)
    grad_columns = (filters.mT @ grad).reshape(*maps.shape[:3], *y.shape[2:])
    scale = None if mask is None else mask.to(maps.dtype).reshape(y.shape)
    grad_maps, value = torch.zeros_like(maps), torch.zeros_like(y)
    along_y, along_x = torch.zeros_like(y), torch.zeros_like(x)
    for pixel, inside, w, slope_y, slope_x in _corners(y, x, height, width):
        index = pixel.reshape(*maps.shape[:2], 1, -1).expand_as(grad_columns.flatten(3))
        share = _times(torch.where(inside, w if scale is None else w * scale, 0), grad_columns)
        grad_maps.scatter_add_(3, index, share.flatten(3))
        dot = torch.where(inside, (grad_columns * _gather(maps, pixel)).sum(2), 0)
        value, along_y, along_x = value + w * dot, along_y + slope_y * dot, along_x + slope_x * dot
    columns = _columns(maps, y, x, scale, (height, width)).reshape(batch, groups, filters.shape[2], -1)
    slopes = torch.stack([along_y, along_x], 3)
    if scale is not None:
        within = (y >= -1) & (y < height) & (x >= -1) & (x < width)
        slopes = torch.where(within[:, :, :, None], slopes * scale[:, :, :, None], 0)
    return (
        _in_layout(grad_maps.reshape(input.shape).to(input.dtype), input),
        slopes.reshape(offset.shape).to(offset.dtype),
        (grad @ columns.mT).sum(0).reshape(weight.shape).to(weight.dtype),
        maps.new_zeros(0) if mask is None else value.reshape(mask.shape).to(mask.dtype),
    )


_operator = torch.library.custom_op("fastrcnn::deform_conv2d", _forward, mutates_args=())
_gradient = torch.library.custom_op("fastrcnn::deform_conv2d_backward", _backward, mutates_args=())


@_operator.register_fake
def _(input, offset, weight, mask, stride, padding, dilation):
    size = _out_size(input, weight, stride, padding, dilation)
    return _in_layout(input.new_empty(input.shape[0], weight.shape[0], *size), input)


@_gradient.register_fake
def _(grad, input, offset, weight, mask, stride, padding, dilation):
    grad_mask = coordinates(input).new_empty(0) if mask is None else mask.new_empty(mask.shape)
    return _in_layout(input, input), offset.new_empty(offset.shape), weight.new_empty(weight.shape), grad_mask


def _setup_context(ctx, inputs, output):
    *tensors, ctx.stride, ctx.padding, ctx.dilation = inputs
    ctx.has_mask = tensors[3] is not None
    ctx.save_for_backward(*tensors)


def _gradients(ctx, grad):
    where = ctx.stride, ctx.padding, ctx.dilation
    *grads, grad_mask = torch.ops.fastrcnn.deform_conv2d_backward(grad, *ctx.saved_tensors, *where)
    return *grads, grad_mask if ctx.has_mask else None, None, None, None


_operator.register_autograd(_gradients, setup_context=_setup_context)


def _deform_conv2d(
    op,
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = (1, 1),
    padding: int | Sequence[int] = (0, 0),
    dilation: int | Sequence[int] = (1, 1),
    mask: Tensor | None = None,
) -> Tensor:
    """[B, O, OH, OW] in the dtype and memory format of `input`, as torchvision.ops.deform_conv2d gives it. Differentiable
    in every tensor, once.

    input [B, C, H, W], weight [O, C / groups, kh, kw] and bias [O] of one dtype; offset [B, 2 * G * kh * kw, OH, OW] in
    pixels and mask [B, G * kh * kw, OH, OW] of any floating dtype, used in float32 (float64 beside a float64 input).
    The shapes give the number of groups and of offset groups G. Raises TypeError or ValueError naming the argument.
    """
    check_tensor("input", input, "B, C, H, W")
    check_tensor("weight", weight, "O, C / groups, kh, kw")
    channels, (filters, share, *kernel) = input.shape[1], weight.shape
    if share < 1 or min(kernel) < 1 or channels < 1 or channels % share or filters % (channels // share):
        raise ValueError(f"weight: expected [O, C / groups, kh, kw] with groups dividing O and C = {channels}, "
                         f"got {list(weight.shape)}")  # fmt: skip
    where = check_pair("stride", stride, 1), check_pair("padding", padding, 0), check_pair("dilation", dilation, 1)
    size, taps = _out_size(input, weight, *where), kernel[0] * kernel[1]
    if min(size) < 1:
        raise ValueError(f"input: {list(input.shape)} is smaller than the kernel {kernel}")
    check_tensor("offset", offset, "B, 2 * offset_groups * kh * kw, OH, OW")
    groups = offset.shape[1] // (2 * taps)
    if groups < 1 or channels % groups:
        raise ValueError(f"offset: expected {2 * taps} channels for each offset group, whose number divides the input's "
                         f"{channels} channels, got {list(offset.shape)}")  # fmt: skip
    for name, value, planes in (("offset", offset, 2 * groups * taps), ("mask", mask, groups * taps)):
        if value is not None:
            check_tensor(name, value, "B, offset_groups * kh * kw, OH, OW")
            if list(value.shape) != [input.shape[0], planes, *size]:
                raise ValueError(f"{name}: expected shape {[input.shape[0], planes, *size]}, got {list(value.shape)}")
    if bias is not None:
        check_tensor("bias", bias, "O", last=filters)
    check_same_device(input=input, offset=offset, weight=weight, bias=bias, mask=mask)
    if torch.is_autocast_enabled(input.device.type) and input.dtype != torch.float64:  # as torch.conv2d has it
        dtype = torch.get_autocast_dtype(input.device.type)
        input, weight, bias = (t if t is None else t.to(dtype) for t in (input, weight, bias))
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None and value.dtype != input.dtype:
            raise TypeError(f"{name}: expected the dtype {input.dtype} of input, got {value.dtype}")
    out = op(input, offset, weight, mask, *where)
    return out if bias is None else out + bias[:, None, None]


deform_conv2d = bind(_deform_conv2d, torch.ops.fastrcnn.deform_conv2d.default, "deform_conv2d")
deform_conv2d_reference = bind(_deform_conv2d, _forward, "deform_conv2d_reference")
