"""conv_bn_relu on CUDA: cuDNN's fused convolution, or a tile of csrc/cuda/conv_bn_relu.cu where the plan has measured that
it is faster; and the stem of a ResNet likewise. Unmeasured, cuDNN answers.
"""

import math
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from fastrcnn._extension import has_kernel
from fastrcnn.ops import conv_plan
from fastrcnn.ops.conv_bn_relu import HALF, OPERATOR, Call, full_residual, operands
from fastrcnn.ops.conv_stem import conv_stem, separate
from fastrcnn.ops.conv_tile import FLOAT_TILES, TILES, conv_tile, out_shape

CUDNN, SEPARATE = "cudnn", "separate"


def _cuda(*args) -> Tensor:
    call = Call(*args)
    x, w, bias = operands(call)
    pixels = math.prod((shape := out_shape(x, w, *call[7:10]))[::3]) * shape[2]

    def run(name: str) -> Tensor:
        return _cudnn(call, x, w, bias) if name == CUDNN else _tile(name, call, x, w, bias)

    names = [CUDNN, *_tiles(x, w, call.groups)] if pixels else [CUDNN]
    if len(names) == 1:
        return run(CUDNN)
    residual = "" if call.residual is None else " + half residual" if call.upsample_residual else " + residual"
    epilogue = " + bias" * (bias is not None) + residual + ", relu" * call.relu
    return run(conv_plan.choose(_kind(x, w, pixels, call[7:11], epilogue), names, run))


def _kind(x: Tensor, w: Tensor, pixels: int, where: Sequence, epilogue: str) -> str:
    pairs = *map(tuple, where[:3]), where[3]
    return conv_plan.kind_of(_card(x.device), x.dtype, tuple(w.shape), pixels, pairs, epilogue)


@cache
def _card(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)


@cache
def _has(kernel: str, device: torch.device) -> bool:
    """From Ampere on."""
    return has_kernel(kernel, device.type) and torch.cuda.get_device_capability(device) >= (8, 0)


def _stem(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """conv_stem.stem: two operators one after the other, or one kernel."""

    def run(name: str) -> Tensor:
        if name == SEPARATE:
            return separate(input, weight, bias)
        return conv_stem(*(t.contiguous(memory_format=torch.channels_last) for t in (input, weight)), bias)

    takes = input.dtype in HALF and input.shape[1] == 3 and input.shape[3] % 2 == 0 and input.data_ptr() % 4 == 0
    if not takes or not input.numel() or not _has("_conv_stem", input.device):
        return run(SEPARATE)
    shape = out_shape(input, weight, *(where := ((2, 2), (3, 3), (1, 1), 1))[:3])
    epilogue = " + bias" * (bias is not None) + ", relu, max pool"
    kind = _kind(input, weight, math.prod(shape[::3]) * shape[2], where, epilogue)
    return run(conv_plan.choose(kind, [SEPARATE, "stem"], run))


if torch.backends.cudnn.is_available() and torch.version.cuda:  # on AMD cuDNN's name stands for another library
    OPERATOR.register_kernel("cuda")(_cuda)
    torch.library.impl("fastrcnn::_stem", "cuda", _stem)


def _tiles(x: Tensor, w: Tensor, groups: int) -> Sequence[str]:
    """Ours that may answer, narrow groups in a tile of their own. In float32 they are exact: three products for the one
    of cuDNN's TF32, which they neither beat nor agree with."""
    tf32 = x.dtype == torch.float32 and torch.backends.cudnn.allow_tf32
    if x.dtype == torch.float64 or tf32 or not _has("_conv_tile", x.device):
        return []
    if groups > 1 and w.shape[1] * groups == w.shape[0] and 16 % w.shape[1] == 0:
        chunks = x.data_ptr() % 16 == 0 and x.shape[1] * x.element_size() % 16 == 0
        return TILES[-1:] if chunks else []
    return FLOAT_TILES if x.dtype == torch.float32 else TILES[:-1]


def _tile(name: str, call: Call, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    residual = call.residual
    if residual is not None:
        residual = residual.contiguous(memory_format=torch.channels_last)
    return conv_tile(x, w, bias, residual, *call[7:11], call.upsample_residual, call.relu, TILES.index(name))


def _cudnn(call: Call, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    where, residual = call[7:11], full_residual(call)
    numel = max(x.numel(), math.prod(out_shape(x, w, *where[:3])))
    fused = call.relu and call.groups == 1 and 0 < numel < 2**31 and _cudnn_takes(x)
    out = _cudnn_fused(x, w, bias, residual, where) if fused else None
    if out is None:
        out = torch.conv2d(x, w, bias, *where)
        out = out if residual is None else out.add_(residual)
        out = out.relu_() if call.relu else out
    return out.contiguous(memory_format=torch.channels_last)


def _cudnn_fused(x: Tensor, w: Tensor, bias: Tensor | None, residual: Tensor | None, where) -> Tensor | None:
    """relu(conv(x, w) + bias + residual), or None: for an odd shape cuDNN may have no engine, and says so when asked."""
    try:
        if residual is None:
            return torch.cudnn_convolution_relu(x, w, bias, *where)
        return torch.cudnn_convolution_add_relu(x, w, residual, 1.0, bias, *where)
    except RuntimeError as error:
        if "unable to find an engine" not in str(error):
            raise
        return None


def _cudnn_takes(x: Tensor) -> bool:
    """Not double, and bfloat16 from Ampere on. Of cuDNN's flags the fused operators follow benchmark and TF32 alone."""
    flags = torch.backends.cudnn
    if not flags.enabled or flags.deterministic or torch.are_deterministic_algorithms_enabled():
        return False
    if x.dtype == torch.bfloat16:
        return torch.cuda.get_device_capability(x.device) >= (8, 0)
    return x.dtype in (torch.float32, torch.float16)
