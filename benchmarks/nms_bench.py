"""NMS against torchvision: single, batched over pyramid levels, and a padded batch of images."""

from functools import partial

import timing
import torch
import torchvision

from fastrcnn import ops


def same_indices(ours: torch.Tensor, rival: torch.Tensor, name: str) -> float:
    return timing.check(name, 0.0 if torch.equal(ours, rival) else 1.0, 0.0)


def single(sizes, args, rates):
    for n in sizes:
        boxes = timing.detector_like_boxes(n, args.device)
        scores = torch.rand(n, generator=torch.Generator().manual_seed(1)).to(args.device)
        for threshold in (0.5, 0.7):
            name = f"N={n} iou={threshold}"
            ours = partial(ops.nms, boxes, scores, threshold)
            rival = partial(torchvision.ops.nms, boxes, scores, threshold)
            error = same_indices(ours(), rival(), name)
            times = timing.paired(ours, rival, args.device, args.quick)
            floor = rates.floor_ms(timing.count_bytes(boxes, scores))
            yield timing.row("nms", name, boxes.dtype, args.device, times[0], "torchvision", times[1], floor, error)
            # The same without the wait for the number of survivors, as the detector calls it.
            padded = partial(ops.nms_padded, boxes[None], scores[None], None, threshold, n)
            kept, count = padded()
            error = same_indices(kept[0, : count[0]], rival(), name)
            times = timing.paired(padded, rival, args.device, args.quick)
            yield timing.row(
                "nms_padded", name, boxes.dtype, args.device, times[0], "torchvision", times[1], floor, error
            )


def levels(images, args, rates):
    """RPN-like: 4,273 boxes an image in 5 levels; of several images they come by score, as decode_proposals gives them."""
    per_level = torch.tensor([1000, 1000, 1000, 1000, 273])
    groups = torch.arange(5).repeat_interleave(per_level).to(args.device)
    n = len(groups)
    boxes = torch.stack([timing.detector_like_boxes(n, args.device, i) for i in range(images)])
    scores = torch.rand(images, n, generator=torch.Generator().manual_seed(1)).to(args.device)
    if images > 1:
        scores = torch.cat([s.sort(1, descending=True).values for s in scores.split(per_level.tolist(), 1)], 1)

    def rival():
        return [torchvision.ops.batched_nms(b, s, groups, 0.7) for b, s in zip(boxes, scores)]

    if images == 1:
        op, name = "batched_nms", "N=4273 levels=5 iou=0.7"

        def ours():
            return [ops.batched_nms(boxes[0], scores[0], groups, 0.7)]
    else:
        op, name = "nms_padded", f"B={images} N=4273 levels=5 iou=0.7"
        all_groups = groups.expand(images, -1).contiguous()

        def ours():
            return ops.nms_padded(boxes, scores, all_groups, 0.7, n)[0]

    for a, b, s in zip(ours(), rival(), scores):
        # torchvision's last sort is not stable: equal scores may change places, nothing else.
        error = same_indices(a[: len(b)].sort().values, b.sort().values, name)
        error = max(error, same_indices(s[a[: len(b)]], s[b], name))
    times = timing.paired(ours, rival, args.device, args.quick)
    floor = rates.floor_ms(timing.count_bytes(boxes, scores))
    return timing.row(op, name, boxes.dtype, args.device, times[0], "torchvision", times[1], floor, error)


def main() -> None:
    args = timing.arguments(__doc__)
    for op in ("nms", "batched_nms", "nms_padded"):
        timing.require_kernel(op, args.device)
    rates = timing.Rates(args.device)
    sizes = (100,) if args.quick else (1000, 2000, 5000, 10000)
    if torch.device(args.device).type == "cuda" and not args.quick:
        sizes = (*sizes, 100000)  # torchvision's CPU kernel would take half a minute a call
    rows = [*single(sizes, args, rates), levels(1, args, rates), levels(2 if args.quick else 8, args, rates)]
    timing.report(rows, args)


if __name__ == "__main__":
    main()
