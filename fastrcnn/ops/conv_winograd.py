"""relu(conv(input, weight) + bias + residual) for 3x3 kernels of stride 1 by Winograd's F(4x4, 3x3), in float32:

y = A^T [sum over channels of (G w G^T) * (B^T d B)] A

for tiles y of 4x4 outputs, d their 6x6 inputs, w the kernel: 36 products in place of 144. The gradient of w is the same sum
over tiles, read backwards. The kernels are csrc/cpu/conv_winograd.cpp and conv_winograd_weight.cpp.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrcnn._extension import has_kernel
from fastrcnn.ops._bind import declare
from fastrcnn.ops.conv_tile import upsampled

# Of the CPU as torch sees it (ATEN_CPU_CAPABILITY=avx2 in the environment takes it down), and floats in its vectors.
CAPABILITY = torch.backends.cpu.get_cpu_capability()
LANES = {"AVX512": 16, "AVX2": 8}.get(CAPABILITY, 4)
NARROWEST = 16  # channels and filters from which tiles pay for their transforms
FEWEST_PIXELS = 1024  # of outputs from which a weight's way to its points pays for one call

# For the points 0, +-a, +-1/a and infinity with a = sqrt(1/2), which lose least to rounding (Alam et al., 2022).
_A = 0.5**0.5
OF_INPUT = torch.tensor([
    [1, 0, -2.5, 0, 1, 0],
    [0, -2 * _A, -2, _A, 1, 0],
    [0, 2 * _A, -2, -_A, 1, 0],
    [0, -_A, -0.5, 2 * _A, 1, 0],
    [0, _A, -0.5, -2 * _A, 1, 0],
    [0, 1, 0, -2.5, 0, 1],
], dtype=torch.float64)  # fmt: skip
OF_WEIGHT = torch.tensor([
    [1, 0, 0],
    [-2 / 3, -2 / 3 * _A, -1 / 3],
    [-2 / 3, 2 / 3 * _A, -1 / 3],
    [1 / 6, 1 / 3 * _A, 1 / 3],
    [1 / 6, -1 / 3 * _A, 1 / 3],
    [0, 0, 1],
], dtype=torch.float64)  # fmt: skip
OF_OUTPUT = torch.tensor([
    [1, 1, 1, 1, 1, 0],
    [0, _A, -_A, 2 * _A, -2 * _A, 0],
    [0, 0.5, 0.5, 2, 2, 0],
    [0, 0.5 * _A, -0.5 * _A, 4 * _A, -4 * _A, 1],
], dtype=torch.float64)  # fmt: skip


def winograd_weight(weight: Tensor, lanes: int = LANES, turned: bool = False) -> Tensor:
    """weight [O, C, 3, 3] as the kernel reads it, float32 [36 points, panels of 2 * lanes filters, C, 2 * lanes]: filters
    and channels are filled up with zeros to whole panels and whole `lanes`. Four times the numbers of `weight`. turned:
    that of the gradient, whose filters are `weight`'s channels and whose kernels stand on their heads."""
    weight = weight.transpose(0, 1).flip(2, 3) if turned else weight
    filters, channels = weight.shape[:2]
    g = OF_WEIGHT.to(weight.device)
    points = (g @ weight.double() @ g.T).flatten(2).permute(2, 1, 0)  # [36, C, O]
    points = F.pad(points, (0, -filters % (2 * lanes), 0, -channels % lanes))
    return points.unflatten(2, (-1, 2 * lanes)).transpose(1, 2).float().contiguous()


def _fake_weight(weight, lanes=LANES, turned=False):
    filters, channels = (weight.shape[i] for i in ((1, 0) if turned else (0, 1)))
    panels, chunks = -(-filters // (2 * lanes)), -(-channels // lanes)
    return weight.new_empty(36, panels, chunks * lanes, 2 * lanes)


def _tiles(input: Tensor, padding: Sequence[int]) -> tuple[Tensor, int, int]:
    """[B, C, rows of tiles, columns of tiles, 6, 6] of input [B, C, H, W], and the output's height and width."""
    height, width = (n + 2 * p - 2 for n, p in zip(input.shape[2:], padding))
    more = [4 * -(-n // 4) - n for n in (height, width)]
    d = F.pad(input, (padding[1], padding[1] + more[1], padding[0], padding[0] + more[0]))
    return d.unfold(2, 6, 4).unfold(3, 6, 4), height, width


def _reference(
    input: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, padding: Sequence[int], filters: int,
    upsample_residual: bool, relu: bool,
) -> Tensor:  # fmt: skip
    """[B, filters, H', W'] channels-last. input [B, C, H, W]; weight of `winograd_weight`; bias [filters]; residual
    [B, filters, H', W'], or of half_size with upsample_residual."""
    d, height, width = _tiles(input, padding)
    b, a = OF_INPUT.to(input), OF_OUTPUT.to(input)
    w = weight.transpose(1, 2).flatten(2)[:, : input.shape[1], :filters].to(input)
    products = torch.einsum("bcyxp,pco->boyxp", (b @ d @ b.T).flatten(4), w).unflatten(4, (6, 6))
    out = (a @ products @ a.T).transpose(3, 4).flatten(4).flatten(2, 3)[:, :, :height, :width]
    out = out if bias is None else out + bias[:, None, None]
    if residual is not None:
        out = out + (upsampled(residual, out.shape[2:]) if upsample_residual else residual)
    return (torch.relu(out) if relu else out).contiguous(memory_format=torch.channels_last)


def _fake(input, weight, bias, residual, padding, filters, *_):
    shape = input.shape[0], filters, *(n + 2 * p - 2 for n, p in zip(input.shape[2:], padding))
    return input.new_empty(shape).contiguous(memory_format=torch.channels_last)


def _gradient_reference(input: Tensor, gradient: Tensor, padding: Sequence[int], lanes: int = LANES) -> Tensor:
    """The weight's [O, C, 3, 3] from that of the output [B, O, H', W']. input [B, C, H, W]."""
    d, height, width = _tiles(input, padding)
    y = F.pad(gradient, (0, -width % 4, 0, -height % 4)).unfold(2, 4, 4).unfold(3, 4, 4)
    b, a, g = OF_INPUT.to(input), OF_OUTPUT.to(input), OF_WEIGHT.to(input)
    return g.T @ torch.einsum("bcyxij,boyxij->ocij", b @ d @ b.T, a.T @ y @ a) @ g


def _fake_gradient(input, gradient, padding, lanes=LANES):
    return input.new_empty(gradient.shape[1], input.shape[1], 3, 3)


declare("_winograd_weight", winograd_weight, _fake_weight)
declare("_conv_winograd", _reference, _fake)
declare("_winograd_weight_gradient", _gradient_reference, _fake_gradient)
points_of = torch.ops.fastrcnn._winograd_weight.default
conv_winograd = torch.ops.fastrcnn._conv_winograd.default
weight_gradient = torch.ops.fastrcnn._winograd_weight_gradient.default


def fits(weight: Tensor, stride: Sequence[int], dilation: Sequence[int], groups: int) -> bool:
    """Whether this is a convolution that the algorithm computes, and wide enough to gain by it."""
    taken = weight.shape[2:] == (3, 3) and (*stride, *dilation, groups) == (1, 1, 1, 1, 1)
    return taken and min(weight.shape[:2]) >= NARROWEST and weight.dtype == torch.float32


def pays(input: Tensor, weight: Tensor, stride, padding, dilation, groups: int) -> bool:
    """Whether that is so although the weight's points are made for this call alone: on enough pixels, in real vectors. A
    fixed rule: a training must give the same bits twice."""
    pixels = input.shape[0] * math.prod(n + 2 * p - 2 for n, p in zip(input.shape[2:], padding))
    enough = max(padding) <= 2 and pixels >= FEWEST_PIXELS
    return enough and LANES > 4 and fits(weight, stride, dilation, groups) and has_kernel("_conv_winograd", "cpu")


def convolve(
    input: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, padding: Sequence[int],
    upsample_residual: bool, relu: bool,
) -> Tensor:  # fmt: skip
    """relu(conv(input, weight) + bias + residual) with weight [O, C, 3, 3] as it stands."""
    points = points_of(weight)
    return conv_winograd(input, points, bias, residual, padding, len(weight), upsample_residual, relu)


def gradients(
    gradient: Tensor, input: Tensor, weight: Tensor, padding: Sequence[int], of_input: bool, of_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Of `input` and `weight`, where they are asked for, from that of the output [B, O, H', W']. That of the input is a
    convolution of the output's with the turned kernels."""
    found = None
    if of_input:
        turned = points_of(weight, turned=True)
        found = conv_winograd(gradient, turned, None, None, [2 - p for p in padding], weight.shape[1], False, False)
    return found, weight_gradient(input, gradient, padding) if of_weight else None
