"""Soft-NMS against its reference, a plain torch loop: torchvision has none, and mmcv's runs on the CPU."""

from functools import partial

import timing
import torch

from fastrcnn import ops


def bench(n, method, args, rates):
    boxes = timing.detector_like_boxes(n, args.device)
    scores = torch.rand(n, generator=torch.Generator().manual_seed(1)).to(args.device)
    ours = partial(ops.soft_nms, boxes, scores, method=method)
    rival = partial(ops.soft_nms_reference, boxes, scores, method=method)
    (dets, _), (expected, _) = ours(), rival()
    name = f"N={n} {method}"
    timing.check(f"{name}: number kept", abs(len(dets) - len(expected)), 0)
    error = timing.check(name, (dets[:, 4] - expected[:, 4]).abs().max().item(), 1e-5)
    times = timing.paired(ours, rival, args.device, args.quick, budget_s=2.0)
    floor = rates.floor_ms(timing.count_bytes(boxes, scores, dets))
    return timing.row("soft_nms", name, boxes.dtype, args.device, times[0], "reference", times[1], floor, error)


def main() -> None:
    args = timing.arguments(__doc__)
    timing.require_kernel("soft_nms", args.device)
    rates = timing.Rates(args.device)
    sizes = (50,) if args.quick else (1000, 2000)
    timing.report([bench(n, method, args, rates) for n in sizes for method in ("linear", "gaussian")], args)


if __name__ == "__main__":
    main()
