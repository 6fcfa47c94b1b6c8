"""conv_bn_relu on CUDA: cuDNN's fused convolution, or a tile of csrc/cuda/conv_bn_relu.cu where the plan has measured that
it is faster. Unmeasured, cuDNN answers.
"""

import math

import torch
from torch import Tensor

from fastrcnn._extension import has_kernel
from fastrcnn.ops import conv_plan
from fastrcnn.ops.conv_bn_relu import OPERATOR, Call, full_residual, operands, out_shape
from fastrcnn.ops.conv_tile import FLOAT_TILES, TILES, conv_tile

CUDNN = "cudnn"


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
    tf32 = x.dtype == torch.float32 and torch.backends.cudnn.allow_tf32
    dtype = "tf32" if tf32 else str(x.dtype).removeprefix("torch.")
    kind = conv_plan.kind_of(torch.cuda.get_device_name(x.device), dtype, w.shape, pixels, call[7:11], epilogue)
    return run(conv_plan.choose(kind, names, run))


if torch.backends.cudnn.is_available() and torch.version.cuda:  # on AMD cuDNN's name stands for another library
    OPERATOR.register_kernel("cuda")(_cuda)


def _tiles(x: Tensor, w: Tensor, groups: int) -> list[str]:
    """Ours that may answer: from Ampere on, and narrow groups in a tile of their own."""
    if x.dtype == torch.float64 or not has_kernel("_conv_tile", x.device.type):
        return []
    if torch.cuda.get_device_capability(x.device) < (8, 0):
        return []
    narrow = groups > 1 and w.shape[1] * groups == w.shape[0] and 16 % w.shape[1] == 0
    dense = FLOAT_TILES if x.dtype == torch.float32 else TILES[:-1]
    return [TILES[-1]] if narrow else list(dense)


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
