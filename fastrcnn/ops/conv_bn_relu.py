"""Convolution, batch normalisation with fixed statistics, residual and ReLU in one pass:

y = relu(conv(x, w * s) + (bn_bias - bn_mean * s) + residual),   s = bn_weight / sqrt(bn_var + eps)

The normalisation is folded into the weight: only the convolution touches the feature map. The kernels are oneDNN's (CPU)
and cuDNN's (CUDA) fused convolutions, channels-last, reached through torch's own operators. Without bn_weight, bn_mean and
bn_var nothing is normalised and bn_bias is the convolution's own: the folded form that a deployed model keeps.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastrcnn._extension import TAKES
from fastrcnn.ops._checks import check_same_device, check_tensor


def _scale(bn_weight: Tensor, bn_var: Tensor, eps: float) -> Tensor:
    return bn_weight * torch.rsqrt(bn_var + eps)


def _fold(weight: Tensor, bn_weight, bn_bias, bn_mean, bn_var, eps) -> tuple[Tensor, Tensor | None]:
    """The weight [O, I/groups, kh, kw] and bias [O] of the convolution that includes the normalisation."""
    if bn_weight is None:
        return weight, None if bn_bias is None else bn_bias.to(weight.dtype)
    # In the statistics' own precision: rounding the scale to bfloat16 first would double the error.
    scale = _scale(bn_weight, bn_var, eps)
    folded = (weight * scale.to(torch.promote_types(weight.dtype, scale.dtype))[:, None, None, None]).to(weight.dtype)
    return folded, (bn_bias - bn_mean * scale).to(weight.dtype)


def _op_reference(
    input: Tensor, weight: Tensor, bn_weight: Tensor | None, bn_bias: Tensor | None, bn_mean: Tensor | None,
    bn_var: Tensor | None, eps: float, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int],
    groups: int, residual: Tensor | None, relu: bool,
) -> Tensor:  # fmt: skip
    if bn_weight is None:
        out = torch.conv2d(input, weight, None if bn_bias is None else bn_bias.to(input.dtype), stride, padding,
                           dilation, groups)  # fmt: skip
    else:
        out = torch.conv2d(input, weight, None, stride, padding, dilation, groups)
        scale = _scale(bn_weight, bn_var, eps)
        shift = bn_bias - bn_mean * scale
        out = (out * scale[:, None, None] + shift[:, None, None]).to(input.dtype)
    if residual is not None:
        out = out + residual
    return (torch.relu(out) if relu else out).contiguous(memory_format=torch.channels_last)


_conv_bn_relu = torch.library.custom_op("fastrcnn::conv_bn_relu", _op_reference, mutates_args=())


def _operands(input: Tensor, weight: Tensor, norm: Sequence[Tensor | None], eps: float):
    """What a library's fused convolution takes: channels-last input and folded weight, and the bias."""
    folded, bias = _fold(weight, *norm, eps)
    x, w = (t.contiguous(memory_format=torch.channels_last) for t in (input, folded))
    return x, w, None if bias is None else bias.contiguous()


def _cpu(*args):
    input, weight, *norm, eps, stride, padding, dilation, groups, residual, relu = args
    if input.dtype == torch.float64 or not input.numel() or not _onednn_takes(input.dtype):
        return _op_reference(*args)
    x, w, bias = _operands(input, weight, norm, eps)
    conv, where = torch.ops.mkldnn._convolution_pointwise, (list(padding), list(stride), list(dilation), groups)
    if residual is None:
        return conv(x, w, bias, *where, "relu" if relu else "none", [], "")
    if groups > 1:  # oneDNN's operator adds inside the convolution for one group only
        out = conv(x, w, bias, *where, "none", [], "").add_(residual)
        return out.relu_() if relu else out
    r = residual.contiguous(memory_format=torch.channels_last)
    return conv.binary(x, r, w, bias, *where, "add", None, "relu" if relu else None, [], "")


if torch.backends.mkldnn.is_available():  # a torch without oneDNN keeps the reference, and `fastrcnn info` says so
    _conv_bn_relu.register_kernel("cpu")(_cpu)
    TAKES["conv_bn_relu", "cpu"] = lambda dtype: dtype != torch.float64 and _onednn_takes(dtype)


def _onednn_takes(dtype: torch.dtype) -> bool:
    """Half precision needs AVX-512 at least; elsewhere the reference's own convolution is the faster one."""
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_fp16_supported()


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


def _cuda(*args):
    input, weight, *norm, eps, stride, padding, dilation, groups, residual, relu = args
    x, w, bias = _operands(input, weight, norm, eps)
    where = stride, padding, dilation, groups
    numel = max(x.numel(), math.prod(_out_shape(x, w, stride, padding, dilation)))
    fused = relu and groups == 1 and 0 < numel < 2**31 and _cudnn_takes(x)
    out = _cudnn_fused(x, w, bias, residual, where) if fused else None
    if out is None:
        out = torch.conv2d(x, w, bias, *where)
        out = out if residual is None else out.add_(residual)
        out = out.relu_() if relu else out
    return out.contiguous(memory_format=torch.channels_last)


if torch.backends.cudnn.is_available() and torch.version.cuda:  # on AMD cuDNN's name stands for another library
    _conv_bn_relu.register_kernel("cuda")(_cuda)


def _cudnn_takes(x: Tensor) -> bool:
    """Not double, and bfloat16 from Ampere on. Of cuDNN's flags the fused operators follow benchmark and TF32 alone."""
    flags = torch.backends.cudnn
    if not flags.enabled or flags.deterministic or torch.are_deterministic_algorithms_enabled():
        return False
    if x.dtype == torch.bfloat16:
        return torch.cuda.get_device_capability(x.device) >= (8, 0)
    return x.dtype in (torch.float32, torch.float16)


def _out_shape(input, weight, stride, padding, dilation):
    axes = zip(input.shape[2:], weight.shape[2:], stride, padding, dilation)
    return [input.shape[0], weight.shape[0], *((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in axes)]


@_conv_bn_relu.register_fake
def _(input, weight, bn_weight, bn_bias, bn_mean, bn_var, eps, stride, padding, dilation, groups, residual, relu):
    shape = _out_shape(input, weight, stride, padding, dilation)
    return input.new_empty(shape).contiguous(memory_format=torch.channels_last)


def _setup_context(ctx, inputs, output):
    input, weight, bn_weight, bn_bias, bn_mean, bn_var, ctx.eps, *ctx.where, residual, ctx.relu = inputs
    ctx.has_residual = residual is not None
    ctx.save_for_backward(input, weight, bn_weight, bn_bias, bn_mean, bn_var, output if ctx.relu else None)


def _backward(ctx, grad):
    input, weight, bn_weight, bn_bias, bn_mean, bn_var, output = ctx.saved_tensors
    stride, padding, dilation, groups = ctx.where
    if ctx.relu:
        grad = grad * (output > 0)
    need = ctx.needs_input_grad
    folded, _ = _fold(weight, bn_weight, bn_bias, bn_mean, bn_var, ctx.eps)
    need_weight = need[1] or need[2] or need[5]
    grad_input, grad_folded, _ = torch.ops.aten.convolution_backward(
        grad, input, folded, None, stride, padding, dilation, False, [0, 0], groups, [need[0], need_weight, False]
    )
    grad_bias = grad.sum((0, 2, 3), dtype=torch.float64 if grad.dtype == torch.float64 else torch.float32)
    grads = [None] * 5  # weight, bn_weight, bn_bias, bn_mean, bn_var
    if bn_weight is None:
        grads[0] = grad_folded if need[1] else None
        grads[2] = grad_bias.to(bn_bias.dtype) if bn_bias is not None else None
    else:
        scale = _scale(bn_weight, bn_var, ctx.eps)
        grads[2], grads[3] = grad_bias.to(bn_bias.dtype), (-grad_bias * scale).to(bn_mean.dtype)
        if need_weight:
            if need[1]:
                grads[0] = (grad_folded * scale.to(grad_bias.dtype)[:, None, None, None]).to(weight.dtype)
            grad_scale = (grad_folded * weight).sum((1, 2, 3), dtype=grad_bias.dtype) - grad_bias * bn_mean
            inverse = torch.rsqrt(bn_var + ctx.eps)
            grads[1] = (grad_scale * inverse).to(bn_weight.dtype)
            grads[4] = (grad_scale * bn_weight * -0.5 * inverse**3).to(bn_var.dtype)
    grad_residual = grad if ctx.has_residual else None
    return grad_input, *grads, None, None, None, None, None, grad_residual, None


_conv_bn_relu.register_autograd(_backward, setup_context=_setup_context)


def _pair(name: str, value: int | Sequence[int], least: int) -> list[int]:
    pair = [value, value] if isinstance(value, int) else list(value)
    if len(pair) != 2 or min(pair) < least:
        raise ValueError(f"{name}: expected an int >= {least} or a pair of them, got {value!r}")
    return pair


def _call(
    op, input, weight, bn_weight, bn_bias, bn_mean, bn_var, eps, stride, padding, dilation, groups, residual, relu
):
    check_tensor("input", input, "B, C, H, W")
    check_tensor("weight", weight, "O, C / groups, kh, kw")
    if weight.shape[1] * groups != input.shape[1] or weight.shape[0] % groups:
        raise ValueError(f"weight: expected [O, {input.shape[1]} / {groups}, kh, kw] for an input with "
                         f"{input.shape[1]} channels, got {list(weight.shape)}")  # fmt: skip
    if weight.dtype != input.dtype:
        raise TypeError(f"weight: expected the dtype {input.dtype} of input, got {weight.dtype}")
    norm = {"bn_weight": bn_weight, "bn_bias": bn_bias, "bn_mean": bn_mean, "bn_var": bn_var}
    if bn_weight is None and (bn_mean is not None or bn_var is not None):
        raise ValueError("bn_weight: None with bn_mean or bn_var given; pass all four, or bn_bias alone")
    for name, value in norm.items():
        if value is None and bn_weight is not None:
            raise ValueError(f"{name}: None with bn_weight given; pass all four, or bn_bias alone")
        if value is not None:
            check_tensor(name, value, "O")
        if value is not None and value.shape != weight.shape[:1]:
            raise ValueError(f"{name}: expected shape [{weight.shape[0]}], got {list(value.shape)}")
    where = [_pair(*a) for a in (("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1))]
    shape = _out_shape(input, weight, *where)
    if residual is not None:
        check_tensor("residual", residual, "B, O, H, W")
    if residual is not None and residual.dtype != input.dtype:
        raise TypeError(f"residual: expected the dtype {input.dtype} of input, got {residual.dtype}")
    if residual is not None and list(residual.shape) != shape:
        raise ValueError(f"residual: expected the output's shape {shape}, got {list(residual.shape)}")
    if min(shape[2:]) < 1:
        raise ValueError(f"input: {list(input.shape)} is smaller than the kernel {list(weight.shape[2:])}")
    check_same_device(input=input, weight=weight, residual=residual, **norm)
    return op(input, weight, bn_weight, bn_bias, bn_mean, bn_var, float(eps), *where, groups, residual, relu)


def conv_bn_relu_reference(
    input: Tensor, weight: Tensor, bn_weight: Tensor | None, bn_bias: Tensor | None, bn_mean: Tensor | None,
    bn_var: Tensor | None, eps: float = 1e-5, stride: int | Sequence[int] = 1, padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1, groups: int = 1, residual: Tensor | None = None, relu: bool = True,
) -> Tensor:  # fmt: skip
    return _call(_op_reference, input, weight, bn_weight, bn_bias, bn_mean, bn_var, eps, stride, padding, dilation,
                 groups, residual, relu)  # fmt: skip


def conv_bn_relu(
    input: Tensor,
    weight: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    bn_mean: Tensor | None,
    bn_var: Tensor | None,
    eps: float = 1e-5,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    residual: Tensor | None = None,
    relu: bool = True,
) -> Tensor:
    """[B, O, H', W'] in the dtype of `input`, channels-last. Differentiable in everything but the flags.

    input [B, C, H, W] and weight [O, C / groups, kh, kw] of one dtype; bn_* [O] (float32 beside a half-precision weight
    is best) or None as the module's docstring says; residual [B, O, H', W'] is added before the ReLU.
    Raises TypeError or ValueError naming the argument.
    """
    op = torch.ops.fastrcnn.conv_bn_relu
    return _call(op, input, weight, bn_weight, bn_bias, bn_mean, bn_var, eps, stride, padding, dilation, groups,
                 residual, relu)  # fmt: skip
