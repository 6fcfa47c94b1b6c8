"""relu(conv(input, weight) + bias + residual) for 3x3 kernels of stride 1 by Winograd's F(4x4, 3x3), in float32:

y = A^T [sum over channels of (G w G^T) * (B^T d B)] A

for tiles y of 4x4 outputs, d their 6x6 inputs, w the kernel: 36 products in place of 144. The kernel is
csrc/cpu/conv_winograd.cpp.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrcnn._extension import has_kernel
from fastrcnn.ops import conv_plan
from fastrcnn.ops._bind import declare
from fastrcnn.ops.conv_bn_relu import conv_bn_relu
from fastrcnn.ops.conv_tile import upsampled

# Of the CPU as torch sees it (ATEN_CPU_CAPABILITY=avx2 in the environment takes it down), and floats in its vectors.
CAPABILITY = torch.backends.cpu.get_cpu_capability()
LANES = {"AVX512": 16, "AVX2": 8}.get(CAPABILITY, 4)
NARROWEST = 16  # channels and filters from which tiles pay for their transforms
SAMPLE = 64, 128  # pixels of a map, at most, on which the two ways are measured

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


def winograd_weight(weight: Tensor, lanes: int = LANES) -> Tensor:
    """weight [O, C, 3, 3] as the kernel reads it, float32 [36 points, panels of 2 * lanes filters, C, 2 * lanes]: filters
    and channels are filled up with zeros to whole panels and whole `lanes`. Four times the numbers of `weight`."""
    filters, channels = weight.shape[:2]
    g = OF_WEIGHT.to(weight.device)
    points = (g @ weight.double() @ g.T).flatten(2).permute(2, 1, 0)  # [36, C, O]
    points = F.pad(points, (0, -filters % (2 * lanes), 0, -channels % lanes))
    return points.unflatten(2, (-1, 2 * lanes)).transpose(1, 2).float().contiguous()


def _reference(
    input: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, padding: Sequence[int], filters: int,
    upsample_residual: bool, relu: bool,
) -> Tensor:  # fmt: skip
    """[B, filters, H', W'] channels-last. input [B, C, H, W]; weight of `winograd_weight`; bias [filters]; residual
    [B, filters, H', W'], or of half_size with upsample_residual."""
    height, width = (n + 2 * p - 2 for n, p in zip(input.shape[2:], padding))
    more = [4 * -(-n // 4) - n for n in (height, width)]
    d = F.pad(input, (padding[1], padding[1] + more[1], padding[0], padding[0] + more[0]))
    d = d.unfold(2, 6, 4).unfold(3, 6, 4)  # [B, C, rows of tiles, columns of tiles, 6, 6]
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


declare("_conv_winograd", _reference, _fake)
conv_winograd = torch.ops.fastrcnn._conv_winograd.default


def prepared(weight: Tensor, stride: Sequence[int], dilation: Sequence[int], groups: int) -> Tensor | None:
    """`winograd_weight` for `conv_prepared`, or None where it has nothing to gain: for another convolution than a 3x3 of
    stride 1, another dtype than float32, a device or build without the kernel."""
    fits = weight.shape[2:] == (3, 3) and (*stride, *dilation, groups) == (1, 1, 1, 1, 1)
    if not fits or min(weight.shape[:2]) < NARROWEST or weight.dtype != torch.float32:
        return None
    return winograd_weight(weight) if has_kernel("_conv_winograd", weight.device.type) else None


def conv_prepared(
    input: Tensor, weight: Tensor, winograd: Tensor, bias: Tensor | None, padding: Sequence[int],
    residual: Tensor | None = None, relu: bool = True, upsample_residual: bool = False,
) -> Tensor:  # fmt: skip
    """conv_bn_relu of folded weights, winograd = prepared(weight, ...), without a gradient: by Winograd's way or oneDNN's,
    whichever the plan has measured to be faster. In deterministic mode and under a compiler nothing is measured, and
    Winograd's answers."""

    def run(
        name: str, x: Tensor = input, residual: Tensor | None = residual, upsample: bool = upsample_residual
    ) -> Tensor:
        if name == "winograd":
            return conv_winograd(x, winograd, bias, residual, padding, len(weight), upsample, relu)
        return conv_bn_relu(x, weight, None, bias, None, None, 0.0, 1, padding, 1, 1, residual, relu, upsample)

    if torch.compiler.is_compiling() or torch.are_deterministic_algorithms_enabled():
        return run("winograd")
    height, width = map(min, input.shape[2:], SAMPLE)
    device = f"CPU {CAPABILITY} x {torch.get_num_threads()}"
    where = (1, 1), tuple(padding), (1, 1), 1
    kind = conv_plan.kind_of(device, torch.float32, tuple(weight.shape), height * width, where, "")

    def sample(name: str) -> Tensor:
        x = torch.ones(1, height, width, input.shape[1]).permute(0, 3, 1, 2)
        return run(name, x, None, False)

    return run(conv_plan.choose(kind, ("onednn", "winograd"), sample, conv_plan.host_milliseconds))
