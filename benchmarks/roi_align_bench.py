"""Multi-level RoIAlign, forward and backward, against torchvision's MultiScaleRoIAlign: 256 channels, 7 x 7 bins."""

import timing
import torch
import torchvision

from fastrcnn import ops

STRIDES = [4, 8, 16, 32]


def pyramid(images: int, channels: int, device: str, quick: bool) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    height, width = (200, 336) if not quick else (40, 64)
    maps = [torch.randn(images, channels, height >> i, width >> i, generator=g) for i in range(4)]
    return [m.to(device) for m in maps]


def bench(images, per_image, args, rates):
    quick, device = args.quick, args.device
    maps = pyramid(images, 32 if quick else 256, device, quick)
    rois = timing.rois(per_image, images, device)
    if quick:
        rois[:, 1:] *= 0.18
    shape = list(maps[0].shape[2:])
    boxes = [rois[rois[:, 0] == i, 1:] for i in range(images)]
    image_size = (shape[0] * 4, shape[1] * 4)
    for sampling in (2, 0):
        rival_op = torchvision.ops.MultiScaleRoIAlign(["0", "1", "2", "3"], 7, sampling if sampling else -1)
        rival_maps = {str(i): m.clone().requires_grad_() for i, m in enumerate(maps)}
        detached = {k: v.detach() for k, v in rival_maps.items()}

        def rival(m=detached, op=rival_op):
            return op(m, boxes, [image_size] * images)

        expected = rival()
        rival_out = rival_op(rival_maps, boxes, [image_size] * images)
        grad = torch.randn(rival_out.shape, generator=torch.Generator().manual_seed(1)).to(device)
        rival_grads = torch.autograd.grad(rival_out, list(rival_maps.values()), grad, retain_graph=True)

        def rival_backward(out=rival_out, m=rival_maps, grad=grad):
            return torch.autograd.grad(out, list(m.values()), grad, retain_graph=True)

        layouts = [
            ("channels-last", torch.channels_last, torch.float32),
            ("NCHW", torch.contiguous_format, torch.float32),
        ]
        layouts += [("channels-last", torch.channels_last, torch.bfloat16)]
        for layout, memory_format, dtype in layouts:
            ours_maps = [m.to(dtype).contiguous(memory_format=memory_format) for m in maps]

            def ours(m=ours_maps, sampling=sampling):
                return ops.multilevel_roi_align(m, rois, 7, STRIDES, sampling, False, 56, "torchvision")

            name = f"{images}x{per_image} RoIs, sampling {sampling}, {layout}"
            allowed = 1e-4 if dtype == torch.float32 else 2**-7 * expected.abs().max().item()
            error = timing.check(name, (ours().float() - expected).abs().max().item(), allowed)
            times = timing.paired(ours, rival, device, quick)
            floor = rates.floor_ms(timing.count_bytes(*ours_maps) + expected.numel() * ours_maps[0].element_size())
            yield timing.row(
                "multilevel_roi_align forward",
                name,
                dtype,
                device,
                times[0],
                "torchvision fp32",
                times[1],
                floor,
                error,
            )
            leaves = [m.clone().requires_grad_() for m in ours_maps]
            out = ops.multilevel_roi_align(leaves, rois, 7, STRIDES, sampling, False, 56, "torchvision")
            g = grad.to(dtype).contiguous(memory_format=memory_format)

            def backward(out=out, leaves=leaves, g=g):
                return torch.autograd.grad(out, leaves, g, retain_graph=True)

            scale = max(r.abs().max().item() for r in rival_grads)
            error = max((a.float() - b).abs().max().item() for a, b in zip(backward(), rival_grads))
            timing.check(name, error, scale * (1e-5 if dtype == torch.float32 else 2**-7))
            times = timing.paired(backward, rival_backward, device, quick)
            yield timing.row(
                "multilevel_roi_align backward",
                name,
                dtype,
                device,
                times[0],
                "torchvision fp32",
                times[1],
                floor,
                error,
            )


def main() -> None:
    args = timing.arguments(__doc__)
    timing.require_kernel("multilevel_roi_align", args.device)
    rates = timing.Rates(args.device)
    cuda = torch.device(args.device).type == "cuda"
    rows = list(bench(8 if cuda and not args.quick else 1, 20 if args.quick else 1000, args, rates))
    timing.report(rows, args)


if __name__ == "__main__":
    main()
