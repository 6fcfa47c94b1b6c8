"""Convolution, batch normalisation with fixed statistics, residual and ReLU in one pass:

y = relu(conv(x, w * s) + (bn_bias - bn_mean * s) + residual),   s = bn_weight / sqrt(bn_var + eps)

The normalisation is folded into the weight: only the convolution touches the feature map, channels-last. On a CPU it is
oneDNN's fused convolution through torch's own operators; conv_cuda.py has CUDA's. Without bn_weight, bn_mean and bn_var
nothing is normalised and bn_bias is the convolution's own: the folded form that a deployed model keeps.
"""

import inspect
from collections import namedtuple
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrcnn.ops._bind import bind
from fastrcnn.ops._checks import check_flag, check_int, check_number, check_pair, check_same_device, check_tensor
from fastrcnn.ops.conv_backward import conv_backward
from fastrcnn.ops.conv_tile import half_size, out_shape, upsampled

HALF = {torch.float16: ("fp16", -1024), torch.bfloat16: ("bf16", -128)}  # oneDNN's name; -infinity's bits as an int16


def _checked(
    op, input: Tensor, weight: Tensor, bn_weight: Tensor | None, bn_bias: Tensor | None, bn_mean: Tensor | None,
    bn_var: Tensor | None, eps: float = 1e-5, stride: int | Sequence[int] = 1, padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1, groups: int = 1, residual: Tensor | None = None, relu: bool = True,
    upsample_residual: bool = False,
) -> Tensor:  # fmt: skip
    """[B, O, H', W'] in the dtype of `input`, channels-last. Differentiable in everything but the flags.

    input [B, C, H, W] and weight [O, C / groups, kh, kw] of one dtype; bn_* [O] (float32 beside a half-precision weight
    is best) or None as the module's docstring says; residual [B, O, H', W'] is added before the ReLU, which keeps NaN.
    With upsample_residual it is [B, O, ceil(H' / 2), ceil(W' / 2)], read by nearest neighbour (pixel i is its i // 2): a
    feature pyramid's lateral in one pass. Raises TypeError or ValueError naming the argument.
    """
    check_tensor("input", input, "B, C, H, W")
    check_tensor("weight", weight, "O, C / groups, kh, kw")
    groups, channels = check_int("groups", groups, 1), input.shape[1]
    if min(weight.shape) < 1 or weight.shape[1] * groups != channels or weight.shape[0] % groups:
        raise ValueError(f"weight: expected [O, {channels} / {groups}, kh, kw] for an input with {channels} channels and "
                         f"{groups} groups, got {list(weight.shape)}")  # fmt: skip
    if weight.dtype != input.dtype:
        raise TypeError(f"weight: expected the dtype {input.dtype} of input, got {weight.dtype}")
    norm = {"bn_weight": bn_weight, "bn_bias": bn_bias, "bn_mean": bn_mean, "bn_var": bn_var}
    if bn_weight is None and (bn_mean is not None or bn_var is not None):
        raise ValueError("bn_weight: None with bn_mean or bn_var given; pass all four, or bn_bias alone")
    for name, value in norm.items():
        if value is None and bn_weight is not None:
            raise ValueError(f"{name}: None with bn_weight given; pass all four, or bn_bias alone")
        if value is not None:
            check_tensor(name, value, "O", last=weight.shape[0])
    where = check_pair("stride", stride, 1), check_pair("padding", padding, 0), check_pair("dilation", dilation, 1)
    shape = out_shape(input, weight, *where)
    if min(shape[2:]) < 1 or min(input.shape[2:]) < 1:
        raise ValueError(f"input: {list(input.shape)} is smaller than the kernel {list(weight.shape[2:])}")
    if any(p > d * k for k, p, d in zip(weight.shape[2:], *where[1:])) and shape[2] * shape[3] >= 2**31:
        raise ValueError(f"padding: expected maps of fewer than 2**31 pixels with it, got {padding}: {shape[2:]}")
    upsample_residual = check_flag("upsample_residual", upsample_residual)
    if residual is not None:
        if upsample_residual:
            shape[2:] = map(half_size, shape[2:])
        check_tensor("residual", residual, "B, O, H', W'")
        if residual.dtype != input.dtype:
            raise TypeError(f"residual: expected the dtype {input.dtype} of input, got {residual.dtype}")
        if list(residual.shape) != shape:
            half = "half " * upsample_residual
            raise ValueError(f"residual: expected {half}the output's shape {shape}, got {list(residual.shape)}")
    elif upsample_residual:
        raise ValueError("upsample_residual: True without a residual")
    check_same_device(input=input, weight=weight, residual=residual, **norm)
    eps, relu = check_number("eps", eps, 0), check_flag("relu", relu)
    return op(input, weight, *norm.values(), eps, *where, groups, residual, relu, upsample_residual)


_, *_PARAMETERS = inspect.signature(_checked).parameters.values()
Call = namedtuple("Call", [p.name for p in _PARAMETERS])  # the operator's arguments, or their gradients


def full_residual(call: Call) -> Tensor | None:
    """[B, O, H', W'], or None."""
    if not call.upsample_residual:
        return call.residual
    return upsampled(call.residual, out_shape(*call[:2], *call[7:10])[2:])


def _scale(call: Call) -> Tensor:
    return call.bn_weight * torch.rsqrt(call.bn_var + call.eps)


def _fold(call: Call) -> tuple[Tensor, Tensor | None]:
    """The weight [O, I/groups, kh, kw] and bias [O] of the convolution that includes the normalisation."""
    weight, bias = call.weight, call.bn_bias
    if call.bn_weight is None:
        return weight, None if bias is None else bias.to(weight.dtype)
    # In the statistics' own precision: rounding the scale to bfloat16 first would double the error.
    scale = _scale(call)
    folded = (weight * scale.to(torch.promote_types(weight.dtype, scale.dtype))[:, None, None, None]).to(weight.dtype)
    return folded, (bias - call.bn_mean * scale).to(weight.dtype)


def narrow(call: Call) -> bool:
    """Where oneDNN fails, in torch's own convolution, too: an output that may see padding alone ends the process, a stride
    along outputs at most two wide gives wrong bfloat16 on AMX, forward and backward. float64 never goes to oneDNN."""
    axes = zip(call.input.shape[2:], call.weight.shape[2:], call.padding, call.dilation)
    alone = any(p > d * (k - 1) or (p > 0 and d > n) for n, k, p, d in axes)
    return alone or (call.stride[1] > 1 and out_shape(*call[:2], *call[7:10])[3] <= 2)


def _reference(*args) -> Tensor:
    call = Call(*args)
    dtype = torch.float64 if narrow(call) else call.input.dtype
    bias = call.bn_bias.to(dtype) if call.bn_weight is None and call.bn_bias is not None else None
    out = torch.conv2d(call.input.to(dtype), call.weight.to(dtype), bias, *call[7:11]).to(call.input.dtype)
    if call.bn_weight is not None:
        scale = _scale(call)
        shift = call.bn_bias - call.bn_mean * scale
        out = (out * scale[:, None, None] + shift[:, None, None]).to(call.input.dtype)
    if call.residual is not None:
        out = out + full_residual(call)
    return (torch.relu(out) if call.relu else out).contiguous(memory_format=torch.channels_last)


# What torch reads the operator's schema from: the public parameters, none left out and their numbers in lists.
_LISTS = {int | Sequence[int]: Sequence[int]}
_reference.__signature__ = inspect.Signature(
    [p.replace(default=p.empty, annotation=_LISTS.get(p.annotation, p.annotation)) for p in _PARAMETERS],
    return_annotation=Tensor,
)
OPERATOR = torch.library.custom_op("fastrcnn::conv_bn_relu", _reference, mutates_args=())


def operands(call: Call) -> tuple[Tensor, Tensor, Tensor | None]:
    """What a library's fused convolution takes: channels-last input and folded weight, and the bias."""
    folded, bias = _fold(call)
    x, w = (t.contiguous(memory_format=torch.channels_last) for t in (call.input, folded))
    return x, w, None if bias is None else bias.contiguous()


@OPERATOR.register_fake
def _(*args):
    return args[0].new_empty(out_shape(*args[:2], *args[7:10])).contiguous(memory_format=torch.channels_last)


def _setup_context(ctx, inputs, output):
    call = Call(*inputs)
    ctx.flags = *call[6:11], None, call.relu, call.upsample_residual  # the residual itself is not needed
    ctx.save_for_backward(*call[:6], output if call.relu else None)


def _gradients(ctx, grad):
    *tensors, output = ctx.saved_tensors
    call, need, found = Call(*tensors, *ctx.flags), Call(*ctx.needs_input_grad), dict.fromkeys(Call._fields)
    if call.relu:
        grad = torch.ops.aten.threshold_backward(grad, output, 0)
    of_scale = call.bn_weight is not None and (need.bn_weight or need.bn_var)
    operands = grad, call.input, _fold(call)[0]
    if narrow(call):
        operands = [t.double() for t in operands]
    found["input"], folded = conv_backward(*operands, *call[7:11], need.input, need.weight or of_scale)
    found["input"] = found["input"].to(call.input.dtype) if need.input else None
    found["residual"] = grad if need.residual else None
    if need.residual and call.upsample_residual:  # of up to four pixels each
        found["residual"] = F.avg_pool2d(grad, 2, ceil_mode=True, divisor_override=1)
    found["weight"] = folded.to(call.weight.dtype) if need.weight else None
    sums = torch.float64 if grad.dtype == torch.float64 else torch.float32
    if need.bn_bias or of_scale or need.bn_mean:  # where the norm is frozen nobody reads the whole map for them
        shift = grad.sum((0, 2, 3), dtype=sums)
        found["bn_bias"] = shift.to(call.bn_bias.dtype) if need.bn_bias else None
    if call.bn_weight is not None:
        scale = _scale(call)
        if need.weight:
            found["weight"] = (folded * scale.to(sums)[:, None, None, None]).to(call.weight.dtype)
        if need.bn_mean:
            found["bn_mean"] = (-shift * scale).to(call.bn_mean.dtype)
        if of_scale:
            inverse = torch.rsqrt(call.bn_var + call.eps)
            slope = (folded * call.weight).sum((1, 2, 3), dtype=shift.dtype) - shift * call.bn_mean
            found["bn_weight"] = (slope * inverse).to(call.bn_weight.dtype)
            found["bn_var"] = (slope * call.bn_weight * -0.5 * inverse**3).to(call.bn_var.dtype)
    return tuple(found.values())


OPERATOR.register_autograd(_gradients, setup_context=_setup_context)

conv_bn_relu = bind(_checked, torch.ops.fastrcnn.conv_bn_relu.default, "conv_bn_relu")
conv_bn_relu_reference = bind(_checked, _reference, "conv_bn_relu_reference")
