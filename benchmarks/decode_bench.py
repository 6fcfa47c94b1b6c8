"""Anchors + top-k + decode + clip + filter against the eager chain of torchvision's RPN, and box decoding by itself."""

import timing
import torch
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork, concat_box_prediction_layers
from torchvision.ops import boxes as box_ops

from fastrcnn import ops
from fastrcnn.models.anchors import AnchorGenerator as OurAnchors
from fastrcnn.models.profiles import get_profile


def proposals(images, args, rates):
    height, width = (800, 1344) if not args.quick else (128, 192)
    g = torch.Generator().manual_seed(0)
    sizes = [(-(-height // s), -(-width // s)) for s in (4, 8, 16, 32, 64)]
    # Distinct logits: where they tie, torch.topk may keep either.
    logits = [
        torch.stack([torch.randperm(3 * h * w, generator=g) for _ in range(images)]).view(images, 3, h, w)
        for h, w in sizes
    ]
    logits = [(x / x[0].numel() * 16 - 12).to(args.device) for x in logits]
    deltas = [torch.randn(images, 12, h, w, generator=g).to(args.device) * 0.3 for h, w in sizes]
    generator = AnchorGenerator(((32,), (64,), (128,), (256,), (512,)), ((0.5, 1.0, 2.0),) * 5)
    rpn = RegionProposalNetwork(generator, None, 0.7, 0.3, 256, 0.5, dict(training=2000, testing=1000),
                                dict(training=2000, testing=1000), 0.7).eval()  # fmt: skip
    image_list = ImageList(
        torch.empty(images, 3, height, width, device=args.device), [(height - 5, width - 9)] * images
    )

    def rival():
        """torchvision's RPN from the maps up to, but without, its NMS."""
        anchors = generator(image_list, logits)
        counts = [x[0].numel() for x in logits]
        flat_logits, flat_deltas = concat_box_prediction_layers(logits, deltas)
        boxes = rpn.box_coder.decode(flat_deltas, anchors).view(images, -1, 4)
        objectness = flat_logits.view(images, -1)
        top = rpn._get_top_n_idx(objectness, counts)
        rows = torch.arange(images, device=top.device)[:, None]
        out = []
        for b, s in zip(boxes[rows, top], objectness[rows, top].sigmoid()):
            b = box_ops.clip_boxes_to_image(b, image_list.image_sizes[0])
            keep = box_ops.remove_small_boxes(b, rpn.min_size)
            out.append((b[keep], s[keep]))
        return out

    p = get_profile("torchvision")
    ours_anchors = OurAnchors(strides=[4, 8, 16, 32, 64], ratios=[0.5, 1.0, 2.0], scales=[8])
    base = [a.to(args.device) for a in ours_anchors.base_anchors(rounded=True)]
    strides = ours_anchors.level_strides(sizes, (height, width))
    image_sizes = torch.tensor(image_list.image_sizes, device=args.device)

    def ours():
        return ops.decode_proposals(logits, deltas, base, strides, image_sizes, 1000, symmetric_clip=False,
                                    min_size=p.rpn_min_size, topk_on="logits")  # fmt: skip

    boxes, scores, _, counts = ours()
    error = 0.0
    for b, s, n, (rb, rs) in zip(boxes, scores, counts.tolist(), rival()):
        timing.check("number of proposals", abs(n - len(rb)), 0)
        # By score, and within a level: order among equal scores is free.
        error = max(error, timing.check("scores", (s[:n] - rs).abs().max().item(), 1e-6))
        error = max(error, timing.check("boxes", (b[:n] - rb).abs().max().item(), 1e-2))
    times = timing.paired(ours, rival, args.device, args.quick)
    floor = rates.floor_ms(timing.count_bytes(*logits) + timing.count_bytes(boxes, scores))
    name = f"B={images}, {height}x{width}, {sum(x[0].numel() for x in logits)} anchors, top 1000"
    return timing.row("decode_proposals", name, torch.float32, args.device, times[0], "torchvision RPN chain", times[1],
                      floor, error)  # fmt: skip


def boxes(args, rates):
    n, classes = (100, 5) if args.quick else (1000, 91)
    g = torch.Generator().manual_seed(0)
    anchors = timing.detector_like_boxes(n, args.device)
    deltas = torch.randn(n, 4 * classes, generator=g).to(args.device)
    coder = BoxCoder((10.0, 10.0, 5.0, 5.0))
    limit = torch.tensor([800.0, 1344.0], device=args.device)  # on the device, as a model has it

    def rival():
        return box_ops.clip_boxes_to_image(coder.decode(deltas, [anchors]), (800, 1344))

    def ours():
        stds = (0.1, 0.1, 0.2, 0.2)
        return ops.decode_boxes(anchors, deltas, limit, stds=stds, symmetric_clip=False)

    error = timing.check("decode_boxes", (ours().view(n, classes, 4) - rival()).abs().max().item(), 1e-2)
    times = timing.paired(ours, rival, args.device, args.quick)
    floor = rates.floor_ms(2 * timing.count_bytes(deltas))
    return timing.row("decode_boxes", f"{n} x {classes}", torch.float32, args.device, times[0], "torchvision BoxCoder",
                      times[1], floor, error)  # fmt: skip


def matching(images, args, rates):
    """One image with boxes in random order, or a batch with an RPN's anchors, which neighbours in memory are in space."""
    from torchvision.models.detection._utils import Matcher

    m = 10 if args.quick else (20 if images == 1 else 100)
    if images == 1:
        anchors = timing.detector_like_boxes(2000 if args.quick else 268569, args.device, 2)
    else:
        height, width = (800, 1344) if not args.quick else (128, 192)
        sizes = [(-(-height // s), -(-width // s)) for s in (4, 8, 16, 32, 64)]
        generator = OurAnchors(strides=[4, 8, 16, 32, 64], ratios=[0.5, 1.0, 2.0], scales=[8])
        anchors = torch.cat(generator.grid(sizes, device=args.device))
    truth = torch.stack([timing.detector_like_boxes(m, args.device, 3 + i) for i in range(images)])
    matcher = Matcher(0.7, 0.3, allow_low_quality_matches=True)

    def rival():
        return torch.stack([matcher(box_ops.box_iou(t, anchors)) for t in truth])

    def ours():
        return ops.match_boxes(anchors, truth, min_pos_iou=0.0, low_quality="argmax", iou_eps=0.0)[0]

    error = timing.check("match_boxes", (ours() != rival()).float().max().item(), 0)
    times = timing.paired(ours, rival, args.device, args.quick)
    floor = rates.floor_ms(timing.count_bytes(anchors, truth) + 12 * images * len(anchors))
    shape = f"{len(anchors)} anchors x {m} boxes" + (f" x {images} images" if images > 1 else "")
    rival_name = "torchvision box_iou + Matcher" + (", image by image" if images > 1 else "")
    return timing.row("match_boxes", shape, torch.float32, args.device, times[0], rival_name, times[1], floor,
                      error)  # fmt: skip


def main() -> None:
    args = timing.arguments(__doc__)
    for op in ("decode_proposals", "decode_boxes", "match_boxes"):
        timing.require_kernel(op, args.device)
    rates = timing.Rates(args.device)
    rows = [proposals(1, args, rates), proposals(2 if args.quick else 8, args, rates), boxes(args, rates)]
    timing.report([*rows, matching(1, args, rates), matching(2 if args.quick else 8, args, rates)], args)


if __name__ == "__main__":
    main()
