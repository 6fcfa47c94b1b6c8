"""conv_bn_relu on a CPU: oneDNN's fused convolution through torch's own operators, and Winograd's (conv_winograd.py) for
the 3x3 ones where it is faster.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from fastrcnn._extension import TAKES, has_kernel
from fastrcnn.ops import conv_plan, conv_winograd
from fastrcnn.ops.conv_bn_relu import HALF, OPERATOR, Call, _reference, full_residual, narrow, operands

SAMPLE = 64, 128  # pixels of a map, at most, on which the two ways are measured


def _cpu(*args, winograd: bool = True) -> Tensor:
    call = Call(*args)
    dtype = call.input.dtype
    if dtype == torch.float64 or not call.input.numel() or narrow(call):
        return _reference(*args)
    if dtype in HALF and not getattr(torch.ops.mkldnn, f"_is_mkldnn_{HALF[dtype][0]}_supported")():
        # Without AVX-512 float32 is several times faster than torch's half precision.
        wide = (t.float() if isinstance(t, Tensor) and t.dtype == dtype else t for t in args)
        return _cpu(*wide, winograd=winograd).to(dtype)
    x, w, bias = operands(call)
    if not _finite(w):  # what is left of it beside zeros is the library's to choose
        return _reference(*args)
    if winograd and conv_winograd.pays(x, w, *call[7:11]) and _finite(x):  # a bad pixel would spoil its tile
        residual = call.residual
        return conv_winograd.convolve(x, w, bias, residual, call.padding, call.upsample_residual, call.relu)
    conv = torch.ops.mkldnn._convolution_pointwise
    where = list(call.padding), list(call.stride), list(call.dilation), call.groups
    if call.residual is None or call.groups > 1:  # oneDNN's operator adds inside the convolution for one group only
        out = conv(x, w, bias, *where, "none", [], "")
        out = out if call.residual is None else out.add_(full_residual(call))
    else:
        residual = full_residual(call).contiguous(memory_format=torch.channels_last)
        out = conv.binary(x, residual, w, bias, *where, "add", None, None, [], "")
    return _relu_(out) if call.relu else out


def _finite(x: Tensor) -> bool:
    return bool(torch.linalg.vector_norm(x).isfinite())


def _relu_(x: Tensor) -> Tensor:
    """In place and keeping NaN, which oneDNN's turns into 0. Half precision by its bits, in less than half the time: read
    as int16, everything from -0 to -infinity is at most -infinity, and a negative NaN is above it."""
    if x.dtype not in HALF:
        return x.relu_()
    return torch.threshold_(x.view(torch.int16), HALF[x.dtype][1], 0).view(x.dtype)


_direct = _reference
if torch.backends.mkldnn.is_available():  # a torch without oneDNN keeps the reference, and `fastrcnn info` says so
    OPERATOR.register_kernel("cpu")(_cpu)
    TAKES["conv_bn_relu", "cpu"] = lambda dtype: dtype != torch.float64
    _direct = partial(_cpu, winograd=False)


def prepared(weight: Tensor, stride: Sequence[int], dilation: Sequence[int], groups: int) -> Tensor | None:
    """`winograd_weight` for `conv_prepared`, or None where it has nothing to gain: for another convolution than a 3x3 of
    stride 1, another dtype than float32, a device or build without the kernel."""
    if not conv_winograd.fits(weight, stride, dilation, groups) or not has_kernel("_conv_winograd", weight.device.type):
        return None
    return conv_winograd.winograd_weight(weight)


def conv_prepared(
    input: Tensor, weight: Tensor, winograd: Tensor, bias: Tensor | None, padding: Sequence[int],
    residual: Tensor | None = None, relu: bool = True, upsample_residual: bool = False,
) -> Tensor:  # fmt: skip
    """conv_bn_relu of folded weights, winograd = prepared(weight, ...), without a gradient: by Winograd's way or oneDNN's,
    whichever the plan has measured to be faster. In deterministic mode and under a compiler nothing is measured, and
    Winograd's answers."""

    where = (1, 1), tuple(padding), (1, 1), 1

    def run(
        name: str, x: Tensor = input, residual: Tensor | None = residual, upsample: bool = upsample_residual
    ) -> Tensor:
        if name == "winograd":
            return conv_winograd.conv_winograd(x, winograd, bias, residual, padding, len(weight), upsample, relu)
        return _direct(x, weight, None, bias, None, None, 0.0, *where, residual, relu, upsample)

    if torch.compiler.is_compiling() or torch.are_deterministic_algorithms_enabled():
        return run("winograd")
    height, width = map(min, input.shape[2:], SAMPLE)
    device = f"CPU {conv_winograd.CAPABILITY} x {torch.get_num_threads()}"
    kind = conv_plan.kind_of(device, torch.float32, tuple(weight.shape), height * width, where, "")

    def sample(name: str) -> Tensor:
        return run(name, input.new_ones(1, height, width, input.shape[1]).permute(0, 3, 1, 2), None, False)

    return run(conv_plan.choose(kind, ("onednn", "winograd"), sample, conv_plan.host_milliseconds))
