"""Fused convolution + batch norm (+ residual) + ReLU against the eager modules: the shapes of an R50-FPN detector.

On a CPU one image in float32 and bfloat16; on CUDA eight images in bfloat16, also with the norm folded beforehand, which is
the form that `Detector` keeps.
"""

import timing
import torch
from torch import nn

from fastrcnn import ops

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


def main() -> None:
    args = timing.arguments(__doc__)
    timing.require_kernel("conv_bn_relu", args.device)
    rates = timing.Rates(args.device)
    shapes = SHAPES[1:4] if args.quick else SHAPES
    kinds = [(torch.float32, False), (torch.bfloat16, False)]
    images = 1
    if torch.device(args.device).type == "cuda":
        kinds, images = [(torch.bfloat16, False), (torch.bfloat16, True)], 8
    rows = [bench(shape, *kind, images, args, rates) for kind in kinds for shape in shapes]
    timing.report(rows, args)


if __name__ == "__main__":
    main()
