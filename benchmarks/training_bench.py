"""One training step against torchvision's own model and loop: the losses, losses and gradients, and the whole step with
clipping and optimizer. The same weights, pictures and samples; losses are compared first.

python benchmarks/training_bench.py [--device cuda] [--quick]
"""

import torch
from timing import Rates, arguments, check, paired, report, require_kernel, row
from torch import nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead

from fastrcnn.data.rendered_cells import render_cells
from fastrcnn.models import sampling
from fastrcnn.training.state import Losses
from fastrcnn.weights import infer_model, load_weights
from fastrcnn.zoo.complexity import complexity

CLASSES = 3


def pictures(count: int, height: int, width: int):
    """(images uint8 [3, H, W], targets with labels from 0)."""
    drawn = [render_cells(i, height, width) for i in range(count)]
    images = [torch.from_numpy(image).permute(2, 0, 1).contiguous() for image, _, _ in drawn]
    return images, [dict(boxes=torch.from_numpy(b), labels=torch.from_numpy(labels)) for _, b, labels in drawn]


class Side:
    """A model with its losses and its optimizer."""

    def __init__(self, model: nn.Module, losses):
        self.losses, self.trained = losses, [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(self.trained, lr=1e-4, momentum=0.9, weight_decay=1e-4)

    def loss(self):
        return sum(self.losses().values())

    def gradients(self):
        self.optimizer.zero_grad(set_to_none=True)
        self.loss().backward()

    def step(self):
        self.gradients()
        nn.utils.clip_grad_norm_(self.trained, 10.0)
        self.optimizer.step()


def sides(device: str, min_size: int, batch: int, height: int, width: int) -> tuple[Side, Side, int]:
    """(ours, torchvision's, FLOP of a picture's forward pass)."""
    torch.manual_seed(0)
    sizes = dict(min_size=min_size, max_size=2 * min_size)
    backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None, trainable_layers=3)
    width_of_head = 1024 if min_size > 64 else 64
    heads = dict(
        box_head=TwoMLPHead(256 * 49, width_of_head), box_predictor=FastRCNNPredictor(width_of_head, CLASSES + 1)
    )
    rival = FasterRCNN(backbone, **heads, **sizes).to(device).train()
    ours = infer_model(rival.state_dict(), **sizes, roi_head=dict(bbox_head=dict(fc_out_channels=width_of_head)))
    ours = load_weights(ours, rival.state_dict(), norm_eps=1e-5).to(device).train()
    images, targets = pictures(batch, height, width)
    images = [image.to(device) for image in images]
    targets = [{k: v.to(device) for k, v in target.items()} for target in targets]
    with torch.no_grad():
        frames = [tuple(size) for size in ours.prepare(images)[1].sizes.tolist()]
    floats = [image.float() / 255 for image in images]
    shifted = [dict(boxes=t["boxes"], labels=t["labels"] + 1) for t in targets]
    losses = Losses(ours)
    sides = Side(ours, lambda: losses(images, targets, frames, (1, 1))), Side(rival, lambda: rival(floats, shifted))
    return *sides, complexity(ours, *frames[0])["flops"]


def difference(ours: Side, rival: Side) -> float:
    """The largest relative difference of a loss, both sides sampling the first boxes that fit."""
    permutation, keys = torch.randperm, sampling._random_keys
    torch.randperm = lambda n, **options: torch.arange(n, device=options.get("device"))
    sampling._random_keys = lambda matches, front: torch.linspace(
        0, 0.9, matches.shape[1], dtype=torch.float64, device=matches.device
    ).expand(matches.shape)
    try:
        with torch.no_grad():
            found, expected = ours.losses(), rival.losses()
    finally:
        torch.randperm, sampling._random_keys = permutation, keys
    return max(abs(found[k].item() - v.item()) / max(abs(v.item()), 1e-6) for k, v in expected.items())


def main() -> None:
    args = arguments(__doc__.partition("\n\n")[0])
    for op in ("nms_padded", "match_boxes", "decode_proposals", "multilevel_roi_align"):
        require_kernel(op, args.device)
    rates, rows = Rates(args.device), []
    cases = [(64, 1, 64, 96)] if args.quick else [(320, 2, 320, 427), (320, 4, 480, 640)]
    for min_size, batch, height, width in cases:
        ours, rival, flops = sides(args.device, min_size, batch, height, width)
        error = check("losses", difference(ours, rival), 2e-3)
        shape = f"r18_fpn {min_size} px, {batch} pictures of {width}x{height}"
        for name in ("loss", "gradients", "step"):
            times = paired(getattr(ours, name), getattr(rival, name), args.device, args.quick)
            floor = rates.floor_ms(0, batch * flops * (1 if name == "loss" else 3))  # a gradient is two more passes
            rows.append(
                row(
                    f"training {name}",
                    shape,
                    torch.float32,
                    args.device,
                    times[0],
                    "torchvision",
                    times[1],
                    floor,
                    error,
                )
            )
    report(rows, args)


if __name__ == "__main__":
    main()
