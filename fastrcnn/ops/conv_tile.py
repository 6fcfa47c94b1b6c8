"""relu(conv(input, weight) + bias + residual) as csrc/cuda/conv_bn_relu.cu makes it, in a tile of the caller's choice. The
normalisation is folded before; conv_cuda.py calls it where a plan (conv_plan.py) says so.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrcnn.ops._bind import declare

# Pixels x output channels of a block, in the order of csrc/cuda/conv_bn_relu.cu; "groups" keeps narrow groups together.
TILES = ("128x128", "128x64", "64x64", "128x32", "256x128", "groups")
FLOAT_TILES = TILES[1:4]  # three products need the registers of the others


def out_size(n: int, k: int, stride: int, padding: int, dilation: int) -> int:
    return (n + 2 * padding - dilation * (k - 1) - 1) // stride + 1


def out_shape(input: Tensor, weight: Tensor, stride: Sequence[int], padding, dilation) -> list[int]:
    axes = zip(input.shape[2:], weight.shape[2:], stride, padding, dilation)
    return [input.shape[0], weight.shape[0], *(out_size(*axis) for axis in axes)]


def half_size(n: int) -> int:
    return (n + 1) // 2


def upsampled(x: Tensor, size: Sequence[int]) -> Tensor:
    """x [B, C, ceil(h / 2), ceil(w / 2)] read by nearest neighbour, [B, C, h, w]: pixel i is i // 2."""
    return torch.ops.aten.upsample_nearest2d(x, size, 2.0, 2.0)


def _reference(
    input: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, stride: Sequence[int],
    padding: Sequence[int], dilation: Sequence[int], groups: int, upsample_residual: bool, relu: bool, tile: int,
) -> Tensor:  # fmt: skip
    """[B, O, H', W'] channels-last. input [B, C, H, W], weight [O, C / groups, kh, kw] and residual of one dtype and
    channels-last; bias [O] of that or float32; residual [B, O, H', W'], or of half_size with upsample_residual."""
    wide = torch.promote_types(input.dtype, torch.float32)
    bias = None if bias is None else bias.to(wide)
    out = F.conv2d(input.to(wide), weight.to(wide), bias, stride, padding, dilation, groups)
    if residual is not None:
        out = out + (upsampled(residual, out.shape[2:]) if upsample_residual else residual)
    out = torch.relu(out) if relu else out
    return out.to(input.dtype, memory_format=torch.channels_last)


def _fake(input, weight, bias, residual, stride, padding, dilation, *_):
    shape = out_shape(input, weight, stride, padding, dilation)
    return input.new_empty(shape).contiguous(memory_format=torch.channels_last)


declare("_conv_tile", _reference, _fake)
conv_tile = torch.ops.fastrcnn._conv_tile.default
