"""The stem of a ResNet whose norm is folded: max_pool(relu(conv(input, weight) + bias)), a convolution of 7x7 with stride 2
and padding 3, then maxima of 3x3 with stride 2 and padding 1. csrc/cuda/conv_stem.cu makes both in one pass, and
conv_cuda.py calls it where a plan (conv_plan.py) says so.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrcnn._extension import has_kernel
from fastrcnn.ops._bind import declare
from fastrcnn.ops.conv_bn_relu import conv_bn_relu


def pooled(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, 2, 1)


def separate(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return pooled(conv_bn_relu(input, weight, None, bias, None, None, stride=2, padding=3))


def _reference(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """[B, O, ceil(H / 4), ceil(W / 4)] channels-last. input [B, 3, H, W] and weight [O, 3, 7, 7] of one dtype and
    channels-last; bias [O] of that or float32. The kernel takes half precision, and even widths."""
    wide = torch.promote_types(input.dtype, torch.float32)
    bias = None if bias is None else bias.to(wide)
    out = pooled(torch.relu(F.conv2d(input.to(wide), weight.to(wide), bias, 2, 3)))
    return out.to(input.dtype, memory_format=torch.channels_last)


def _fake(input, weight, bias):
    sides = ((n + 3) // 4 for n in input.shape[2:])
    return input.new_empty(input.shape[0], weight.shape[0], *sides).contiguous(memory_format=torch.channels_last)


declare("_conv_stem", _reference, _fake)
conv_stem = torch.ops.fastrcnn._conv_stem.default
declare("_stem", separate, _fake)  # what is planned on CUDA


def stem(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """[B, O, ceil(H / 4), ceil(W / 4)] of input [B, C, H, W], weight [O, C, 7, 7] and bias [O]. Differentiable."""
    trained = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (input, weight, bias))
    # Dynamo cannot ask the dispatcher which kernels there are.
    if trained or torch.compiler.is_compiling() or not has_kernel("_stem", input.device.type):
        return separate(input, weight, bias)
    return torch.ops.fastrcnn._stem(input, weight, bias)
