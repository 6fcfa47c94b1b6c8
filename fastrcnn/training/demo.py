"""Trains the small model that `fastrcnn demo` runs: ResNet-18 of few channels + FPN, on real and rendered blood cells.

    python -m fastrcnn.training.demo --bccd path/to/bccd --out demo.safetensors

The photographs are BCCD's (MIT licence): a folder with images/, train.json and val.json in COCO format. Without --bccd it
trains on rendered cells alone. It prints AP on the held-out photographs and on held-out renders, and writes float16
weights with these numbers in the file's metadata.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset

from fastrcnn.data import CocoDataset
from fastrcnn.data.rendered_cells import render_cells
from fastrcnn.data.transforms import apply
from fastrcnn.evaluation import evaluate
from fastrcnn.evaluation.coco import require_hotcoco
from fastrcnn.models import faster_rcnn
from fastrcnn.training.loop import train
from fastrcnn.training.recipe import Recipe
from fastrcnn.weights import save, writable

CLASS_NAMES = ["RBC", "WBC", "Platelets"]
HELD_OUT_SEED = 1_000_000  # renders from here on are never trained on
OVERRIDES = dict(
    min_size=320,
    max_size=448,
    backbone=dict(base_channels=24, frozen_stages=-1, norm_eval=False),
    neck=dict(in_channels=[24, 48, 96, 192], out_channels=48),
    rpn_head=dict(in_channels=48, feat_channels=48),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=48),
        bbox_head=dict(in_channels=48, fc_out_channels=96),
    ),
)
# Without changes of pictures: `main` makes its own.
RECIPE = Recipe("demo", 24, batch_size=4, norm_decay=0.0, bias_decay=0.0, schedule="cosine", milestones=(), warmup=100,
                warmup_epochs=1.0, clip_norm=10.0, ema=0.998, flip=0.0)  # fmt: skip


class RenderedCells(Dataset):
    """`count` rendered pictures in memory, drawn once from consecutive seeds."""

    def __init__(self, count: int, first_seed: int, transforms=None):
        self.transforms, self.items = transforms, []
        for i in range(count):
            image, boxes, labels = render_cells(first_seed + i)
            target = dict(boxes=torch.from_numpy(boxes), labels=torch.from_numpy(labels))
            self.items.append((torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))), target))

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Tensor, dict]:
        image, target = self.items[index]
        return (image, target) if self.transforms is None else apply(self.transforms, image, target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bccd", type=Path, help="folder with images/, train.json and val.json")
    parser.add_argument("--out", type=Path, default=Path("demo.safetensors"))
    parser.add_argument("--epochs", type=int, default=24)
    parser.add_argument("--renders", type=int, default=300)
    args = parser.parse_args()
    writable(args.out)
    from torchvision.transforms import v2

    # Cells have no up and no left: both flips are free data.
    jitter = v2.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2, hue=0.03)
    transforms = v2.Compose([v2.RandomHorizontalFlip(), v2.RandomVerticalFlip(), jitter])
    parts: list[Dataset] = [RenderedCells(args.renders, 0, transforms)]
    if args.bccd:
        parts.append(CocoDataset(args.bccd / "train.json", transforms=transforms))
        held_out = CocoDataset(args.bccd / "val.json")
    require_hotcoco()
    torch.manual_seed(0)
    model = faster_rcnn("r18_fpn", num_classes=len(CLASS_NAMES), **OVERRIDES)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {sum(map(len, parts))} images")
    model = train(model, ConcatDataset(parts), RECIPE, epochs=args.epochs, lr=0.02)
    model.class_names = CLASS_NAMES
    model = model.half().float()  # as it will be read again
    scores = {"renders": evaluate(model, RenderedCells(60, HELD_OUT_SEED))}
    if args.bccd:
        scores["BCCD val"] = evaluate(model, held_out)
    for name, metrics in scores.items():
        print(name, {k: round(v, 1) for k, v in metrics.items()})
    ap = {name: {k: round(metrics[k], 1) for k in ("AP", "AP50", "AP75")} for name, metrics in scores.items()}
    save(model.half(), args.out, dict(ap=json.dumps(ap)))
    print(f"{args.out}: {args.out.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
