"""Modulated deformable convolution (DCNv2), forward and backward, against torchvision: 3x3, C -> C channels, one image."""

import timing
import torch
import torchvision

from fastrcnn import ops

LAYOUTS = [
    ("channels-last", torch.channels_last, torch.float32),
    ("NCHW", torch.contiguous_format, torch.float32),
    ("channels-last", torch.channels_last, torch.bfloat16),
]


def multiplies(dtype: torch.dtype, device: str) -> bool:
    """Whether the operator multiplies in this dtype: on a CPU without bfloat16 it does so in float32."""
    return dtype == torch.float32 or device != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def bench(images: int, channels: int, size: tuple[int, int], args, rates):
    g, device = torch.Generator().manual_seed(0), args.device
    x = torch.randn(images, channels, *size, generator=g)
    weight = torch.randn(channels, channels, 3, 3, generator=g) / (9 * channels) ** 0.5
    offset = torch.randn(images, 18, *size, generator=g) * 2  # pixels
    mask = torch.rand(images, 9, *size, generator=g)
    grad = torch.randn(images, channels, *size, generator=g).to(device)
    tensors = [t.to(device) for t in (x, offset, weight, mask)]
    flop = 2 * images * size[0] * size[1] * channels * channels * 9
    shape = f"{images}x{channels}x{size[0]}x{size[1]}"

    def rival(x=tensors[0], offset=tensors[1], weight=tensors[2], mask=tensors[3]):
        return torchvision.ops.deform_conv2d(x, offset, weight, padding=1, mask=mask)

    rival_leaves = [t.clone().requires_grad_() for t in tensors]
    rival_out = rival(*rival_leaves)
    expected = rival_out.detach()

    def rival_backward():
        return torch.autograd.grad(rival_out, rival_leaves, grad, retain_graph=True)

    rival_grads = rival_backward()
    for layout, memory_format, dtype in LAYOUTS:
        name = f"{shape}, {layout}"
        low = tensors[0].to(dtype).contiguous(memory_format=memory_format), tensors[1], tensors[2].to(dtype), tensors[3]
        product = dtype if multiplies(dtype, device) else torch.float32
        unit = 1e-5 if dtype == torch.float32 else 2**-6

        def ours(t=low):
            return ops.deform_conv2d(t[0], t[1], t[2], padding=1, mask=t[3])

        error = (ours().float() - expected).abs().max().item()
        timing.check(name, error, unit * expected.abs().max().item())
        times = timing.paired(ours, rival, device, args.quick)
        num_bytes = timing.count_bytes(*low) + expected.numel() * low[0].element_size()
        floor = rates.floor_ms(num_bytes, flop, product)
        yield timing.row(
            "deform_conv2d forward", name, dtype, device, times[0], "torchvision fp32", times[1], floor, error
        )
        leaves = [t.clone().requires_grad_() for t in low]
        out = ours(leaves)
        low_grad = grad.to(dtype).contiguous(memory_format=memory_format)

        def backward(out=out, leaves=leaves, grad=low_grad):
            return torch.autograd.grad(out, leaves, grad, retain_graph=True)

        error = 0.0
        for a, b in zip(backward(), rival_grads):
            difference = (a.float() - b).abs().max().item()
            error = max(error, timing.check(name, difference, unit * b.abs().max().item()))
        times = timing.paired(backward, rival_backward, device, args.quick)
        # The two products, and each tensor read or written once more than forward.
        floor = rates.floor_ms(2 * num_bytes, 2 * flop, product)
        yield timing.row(
            "deform_conv2d backward", name, dtype, device, times[0], "torchvision fp32", times[1], floor, error
        )


def main() -> None:
    args = timing.arguments(__doc__)
    for op in ("deform_conv2d", "deform_conv2d_backward"):
        timing.require_kernel(op, args.device)
    rates = timing.Rates(args.device)
    shapes = [(16, (12, 20))] if args.quick else [(256, (100, 168)), (512, (50, 84))]
    images = 8 if torch.device(args.device).type == "cuda" and not args.quick else 1
    timing.report([row for channels, size in shapes for row in bench(images, channels, size, args, rates)], args)


if __name__ == "__main__":
    main()
