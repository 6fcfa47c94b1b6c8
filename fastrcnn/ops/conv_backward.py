"""The gradients of a convolution to its input and its weight: torch's own, and on a CPU Winograd's (conv_winograd.py) for
the 3x3 kernels where that is faster.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastrcnn.ops import conv_winograd
from fastrcnn.ops._bind import declare


def _reference(
    gradient: Tensor, input: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], groups: int, of_input: bool, of_weight: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(that of input [B, C, H, W], channels-last; that of weight [O, C / groups, kh, kw]) from that of the output
    [B, O, H', W'], all of one dtype; an empty one where it is not asked for."""
    wanted = [of_input, of_weight, False]
    found = torch.ops.aten.convolution_backward(
        gradient, input, weight, None, stride, padding, dilation, False, [0, 0], groups, wanted
    )
    return _filled(input, *found[:2])


def _filled(input: Tensor, of_input: Tensor | None, of_weight: Tensor | None) -> tuple[Tensor, Tensor]:
    nothing = input.new_empty(0)
    of_input = nothing if of_input is None else of_input.contiguous(memory_format=torch.channels_last)
    return of_input, nothing if of_weight is None else of_weight.contiguous()


def pointwise_view(
    x: Tensor, kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int], groups: int
) -> Tensor | None:
    """The places of x [B, C, H, W] that a 1x1 convolution with a stride reads, a view in which it has none; None for
    another convolution. oneDNN's gradients of some such 1x1 write past the end of their memory, those of fewer than 16
    channels on two threads: without the stride they do not."""
    if (*kernel_size, *padding, groups) != (1, 1, 0, 0, 1) or max(stride) == 1:
        return None
    return x[:, :, :: stride[0], :: stride[1]]


def _cpu(gradient, input, weight, stride, padding, dilation, groups, of_input, of_weight):
    if conv_winograd.pays(input, weight, stride, padding, dilation, groups):
        return _filled(input, *conv_winograd.gradients(gradient, input, weight, padding, of_input, of_weight))
    seen = pointwise_view(input, weight.shape[2:], stride, padding, groups)
    if seen is None:
        return _reference(gradient, input, weight, stride, padding, dilation, groups, of_input, of_weight)
    part, of_weight = _reference(gradient, seen, weight, (1, 1), padding, (1, 1), 1, of_input, of_weight)
    if not of_input:
        return part, of_weight
    whole = torch.zeros_like(input, memory_format=torch.channels_last)
    whole[:, :, :: stride[0], :: stride[1]] = part
    return whole, of_weight


def _fake(gradient, input, weight, stride, padding, dilation, groups, of_input, of_weight):
    found = (t.new_empty(t.shape) if asked else None for t, asked in ((input, of_input), (weight, of_weight)))
    return _filled(input, *found)


declare("_conv_backward", _reference, _fake)
torch.library.impl("fastrcnn::_conv_backward", "cpu", _cpu)
conv_backward = torch.ops.fastrcnn._conv_backward.default
