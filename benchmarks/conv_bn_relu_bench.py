"""Fused convolution + batch norm (+ residual) + ReLU against the eager modules: the shapes of an R50-FPN detector.

On a CPU one image in float32 and bfloat16, the 3x3 convolutions that `Detector` prepares, Winograd's against oneDNN's fused
one, held against float64, and the gradients of both; on CUDA eight images in bfloat16, and, in the folded form that
`Detector` keeps, every distinct shape of R50-FPN and X101-64x4d and the stem with its pooling against cuDNN's fused calls
and torch.compile.
"""

import importlib

import conv_layers
import timing
import torch
from torch import nn

from fastrcnn import ops
from fastrcnn.ops import conv_cpu, conv_cuda
from fastrcnn.ops.conv_backward import conv_backward
from fastrcnn.ops.conv_stem import pooled, stem
from fastrcnn.ops.conv_winograd import conv_winograd, winograd_weight

conv_module = importlib.import_module("fastrcnn.ops.conv_bn_relu")
Call, operands = conv_module.Call, conv_module.operands
# (name, in, out, kernel, stride, height, width, with residual), 800 x 1344 input
SHAPES = [
    ("stem 7x7/2", 3, 64, 7, 2, 800, 1344, False),
    ("layer1 1x1", 64, 64, 1, 1, 200, 336, False),
    ("layer1 3x3", 64, 64, 3, 1, 200, 336, False),
    ("layer1 1x1 + residual", 64, 256, 1, 1, 200, 336, True),
    ("layer2 1x1", 512, 128, 1, 1, 100, 168, False),
    ("layer2 3x3/2", 128, 128, 3, 2, 200, 336, False),
    ("layer2 1x1 + residual", 128, 512, 1, 1, 100, 168, True),
    ("layer3 3x3", 256, 256, 3, 1, 50, 84, False),
    ("layer3 1x1 + residual", 256, 1024, 1, 1, 50, 84, True),
    ("layer4 3x3", 512, 512, 3, 1, 25, 42, False),
    ("layer4 1x1 + residual", 512, 2048, 1, 1, 25, 42, True),
]

# (name, in, out, height, width) of stride 1; the RPN's are those of the pyramid's outputs, with a level of 13 x 21
PREPARED = [
    ("layer1", 64, 64, 200, 336),
    ("layer2", 128, 128, 100, 168),
    ("layer3", 256, 256, 50, 84),
    ("layer4", 512, 512, 25, 42),
    *[("pyramid, RPN", 256, 256, *size) for size in ((200, 336), (100, 168), (50, 84), (25, 42), (13, 21))],
]
WHERE = (1, 1), (1, 1), (1, 1), 1  # stride, padding, dilation, groups of the prepared ones


@torch.no_grad()
def bench(shape, dtype, folded, images, args, rates):
    name, cin, cout, k, stride, height, width, with_residual = shape
    if args.quick:
        height, width = height // 10, width // 10
    conv = nn.Conv2d(cin, cout, k, stride, k // 2, bias=False).to(args.device)
    norm = nn.BatchNorm2d(cout).to(args.device).eval()
    norm.running_mean.normal_(0, 0.1)
    norm.running_var.uniform_(0.5, 1.5)
    x = torch.randn(images, cin, height, width, device=args.device).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    exact = norm(conv(x.float()))
    residual = torch.randn_like(exact).to(dtype) if with_residual else None
    exact = torch.relu(exact if residual is None else exact + residual.float())
    scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    statistics = norm.weight, norm.bias, norm.running_mean, norm.running_var
    weight = conv.weight
    if folded:
        weight = weight * scale[:, None, None, None]
        statistics = None, (norm.bias - norm.running_mean * scale).to(dtype), None, None
    weight = weight.to(dtype).contiguous(memory_format=torch.channels_last)
    conv = conv.to(dtype, memory_format=torch.channels_last)
    eager_norm = nn.BatchNorm2d(cout).to(args.device).eval()
    eager_norm.load_state_dict(norm.state_dict())
    eager_norm = eager_norm.to(dtype)

    def rival():
        out = eager_norm(conv(x))
        return torch.relu_(out if residual is None else out.add_(residual))

    def ours():
        return ops.conv_bn_relu(x, weight, *statistics, norm.eps, stride, k // 2, residual=residual)

    error = (ours().float() - exact).abs().max().item()
    allowed = 1e-4 * exact.abs().max().item()
    if dtype != torch.float32:
        allowed = 2 * (rival().float() - exact).abs().max().item()
    timing.check(name, error, allowed)
    times = timing.paired(ours, rival, args.device, args.quick, budget_s=2.0)
    flop = 2 * cin * k * k * exact.numel()
    moved = timing.count_bytes(x, weight) + exact.numel() * x.element_size() * (2 if with_residual else 1)
    floor = rates.floor_ms(moved, flop, dtype)
    title = f"{name} {cin}->{cout} {height}x{width}" + (f" B={images}" if images > 1 else "")
    title += ", norm folded" if folded else ""
    return timing.row("conv_bn_relu", title, dtype, args.device, times[0], "eager channels-last", times[1], floor,
                      error)  # fmt: skip


def cudnn(*call):
    call = Call(*call)
    return conv_cuda._cudnn(call, *operands(call))


@torch.no_grad()
def bench_stem(images, args, rates, library=cudnn):
    """7x7/2, ReLU and pooling: as the plan chooses, against cuDNN's fused call and torch's pooling."""
    height, width = (64, 96) if args.quick else conv_layers.SIZE
    x = (
        torch.randn(images, 3, height, width, device=args.device)
        .bfloat16()
        .contiguous(memory_format=torch.channels_last)
    )
    weight, bias = torch.randn(64, 3, 7, 7, device=args.device) / 147**0.5, torch.randn(64, device=args.device)
    exact = pooled(torch.relu(torch.conv2d(x.float(), weight.bfloat16().float(), bias.bfloat16().float(), 2, 3)))
    weight, bias = weight.bfloat16().contiguous(memory_format=torch.channels_last), bias.bfloat16()

    def rival():
        where = [2, 2], [3, 3], [1, 1], 1
        return pooled(library(x, weight, None, bias, None, None, 0.0, *where, None, True, False))

    error = (stem(x, weight, bias).float() - exact).abs().max().item()
    timing.check("stem", error, 2 * (rival().float() - exact).abs().max().item())
    times = timing.paired(lambda: stem(x, weight, bias), rival, args.device, args.quick, budget_s=2.0)
    floor = rates.floor_ms(timing.count_bytes(x) + exact.numel() * 2, 2 * 147 * 4 * exact.numel(), torch.bfloat16)
    title, library_name = f"stem 7x7/2, max pool 3->64 {height}x{width} B={images}", "cuDNN fused + max_pool2d"
    return timing.row("stem", title, torch.bfloat16, args.device, times[0], library_name, times[1], floor, error)


@torch.no_grad()
def bench_prepared(shape, args, rates):
    name, cin, cout, height, width = shape
    x = torch.randn(1, cin, height, width).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(cout, cin, 3, 3) / (9 * cin) ** 0.5, torch.randn(cout)
    packed, weight = winograd_weight(weight), weight.contiguous(memory_format=torch.channels_last)

    def rival():
        return conv_cpu._direct(x, weight, None, bias, None, None, 0.0, *WHERE, None, True, False)

    def ours():
        return conv_winograd(x, packed, bias, None, (1, 1), cout, False, True)

    rows = slice(0, min(height, 10))  # float64 takes its time
    exact = torch.relu(torch.conv2d(x.double()[:, :, : rows.stop + 1], weight.double(), bias.double(), 1, 1))[:, :, :-1]
    errors = [(side()[:, :, : exact.shape[2]] - exact).abs().max().item() for side in (ours, rival)]
    error = timing.check(name, errors[0], 1e-5 * exact.abs().max().item())
    times = timing.paired(ours, rival, args.device, args.quick, budget_s=4.0)
    flop = 18 * cin * cout * height * width / 4  # of 36 products for 16 pixels, not 144
    floor = rates.floor_ms(timing.count_bytes(x, weight) * 2, flop)
    title = f"{name} 3x3 {cin}->{cout} {height}x{width}, folded; oneDNN's error {errors[1]:.2g}"
    return timing.row("conv_winograd", title, torch.float32, args.device, times[0], "oneDNN", times[1], floor, error)


def bench_gradients(shape, args, rates):
    """Those of input and weight, the weight's points made anew, against torch's own (oneDNN's)."""
    name, cin, cout, height, width = shape
    x, gradient = (torch.randn(2, n, height, width).contiguous(memory_format=torch.channels_last) for n in (cin, cout))
    weight = torch.randn(cout, cin, 3, 3) / (9 * cin) ** 0.5

    def rival(*tensors):
        return torch.ops.aten.convolution_backward(*tensors, None, *WHERE[:3], False, [0, 0], 1, [True, True, False])

    def ours():
        return conv_backward(gradient, x, weight, *WHERE, True, True)

    part = gradient[:1, :, :9, :21], x[:1, :, :9, :21], weight  # float64 takes its time
    errors = [
        (a - b).abs().max().item() / b.abs().max().item()
        for a, b in zip(conv_backward(*part, *WHERE, True, True), rival(*(t.double() for t in part))[:2])
    ]
    error = timing.check(name, max(errors), 1e-5)
    times = timing.paired(ours, lambda: rival(gradient, x, weight), args.device, args.quick, budget_s=4.0)
    floor = rates.floor_ms(0, 2 * 2 * 18 * cin * cout * height * width / 4)
    title = f"{name} 3x3 {cin}->{cout} {height}x{width} B=2, input and weight"
    return timing.row("conv_backward", title, torch.float32, args.device, times[0], "oneDNN", times[1], floor, error)


def main() -> None:
    args = timing.arguments(__doc__)
    timing.require_kernel("conv_bn_relu", args.device)
    rates = timing.Rates(args.device)
    shapes = SHAPES[1:4] if args.quick else SHAPES
    kinds = [(torch.float32, False), (torch.bfloat16, False)]
    images = 1
    if torch.device(args.device).type == "cuda":
        kinds, images = [(torch.bfloat16, False)], 8
    rows = [bench(shape, *kind, images, args, rates) for kind in kinds for shape in shapes]
    if torch.device(args.device).type == "cuda":
        parts = [part for name in ("r50_fpn", "x101_64x4d_fpn") for part in conv_layers.layers_of(name).values()]
        layers = dict.fromkeys(layer for part in parts for layer in part)
        for layer in list(layers)[:3] if args.quick else layers:
            rows += conv_layers.rows_of(layer, images, torch.bfloat16, cudnn, args, rates)
        rows.append(bench_stem(images, args, rates))
    if torch.device(args.device).type == "cpu":
        timing.require_kernel("_conv_winograd", args.device)
        rows += [bench_prepared(shape, args, rates) for shape in (PREPARED[-1:] if args.quick else PREPARED)]
        rows += [bench_gradients(shape, args, rates) for shape in (PREPARED[-2:-1] if args.quick else PREPARED[:-1])]
    timing.report(rows, args)


if __name__ == "__main__":
    main()
