"""AP after a training on photographs, beside torchvision's own model and loop: the same pictures, body, weights at the
start, schedule, batch size, augmentation and number of epochs.

    python benchmarks/photograph_training.py DATA SIDE --seed 0 --out FOLDER

DATA is a folder with images/, train.json and val.json in COCO's format. SIDE is torchvision (its dataset, transforms,
model, loop and detections), plain (recipe tv: the same schedule in our trainer) or default (recipe finetune, with its own
optimizer, rate and batch). The model is a ResNet-18 of few channels with FPN, from random weights that the seed gives, all
of which train; or, with --weights, what that file holds. The weights after the last epoch are judged by pycocotools on the
held-out pictures. Prints a line of JSON.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn
from torchvision.datasets import CocoDetection, wrap_dataset_for_transforms_v2
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.resnet import BasicBlock, ResNet
from torchvision.transforms import v2

from fastrcnn import Detector
from fastrcnn.data import open_dataset
from fastrcnn.training import get_recipe, train
from fastrcnn.weights import infer_model, load_weights, model_to_train

WIDTH, CHANNELS, HIDDEN = 24, 48, 96  # of the body's first stage, of the pyramid, of the box head
BATCH, LR, DECAY = 4, 0.02, 1e-4


class NarrowResNet(ResNet):
    """torchvision's ResNet-18 with WIDTH in place of 64 channels in its first stage."""

    def __init__(self):
        super().__init__(BasicBlock, [2, 2, 2, 2])

    def _make_layer(self, block, planes, *args, **options):
        if planes == 64:
            self.inplanes, self.bn1 = WIDTH, nn.BatchNorm2d(WIDTH)
            self.conv1 = nn.Conv2d(3, WIDTH, 7, stride=2, padding=3, bias=False)
        return super()._make_layer(block, planes * WIDTH // 64, *args, **options)


def theirs(classes: int, size: int, seed: int) -> FasterRCNN:
    torch.manual_seed(seed)
    layers = {f"layer{i + 1}": str(i) for i in range(4)}
    body = BackboneWithFPN(NarrowResNet(), layers, [WIDTH * 2**i for i in range(4)], CHANNELS)
    heads = dict(box_head=TwoMLPHead(CHANNELS * 49, HIDDEN), box_predictor=FastRCNNPredictor(HIDDEN, classes + 1))
    return FasterRCNN(body, **heads, min_size=size, max_size=2 * size)


def ours(start: dict, size: int):
    """Our model of the same weights, in torchvision's profile."""
    overrides = dict(
        min_size=size, max_size=2 * size, backbone=dict(base_channels=WIDTH, frozen_stages=-1, norm_eval=False,
                      norm_cfg=dict(type="BN", requires_grad=True)),
        neck=dict(in_channels=[WIDTH * 2**i for i in range(4)], out_channels=CHANNELS),
        rpn_head=dict(in_channels=CHANNELS, feat_channels=CHANNELS),
        roi_head=dict(bbox_roi_extractor=dict(out_channels=CHANNELS),
                      bbox_head=dict(in_channels=CHANNELS, fc_out_channels=HIDDEN)),
    )  # fmt: skip
    return load_weights(infer_model(start, "r18_fpn", **overrides), start, norm_eps=1e-5)


def train_theirs(model: FasterRCNN, data: Path, epochs: int, lr: float) -> FasterRCNN:
    """torchvision's reference loop: SGD, a linear warm-up in the first epoch, drops by epochs."""
    changes = v2.Compose([v2.ToImage(), v2.RandomHorizontalFlip(), v2.ToDtype(torch.float32, scale=True)])
    pictures = CocoDetection(str(data / "images"), str(data / "train.json"), transforms=changes)
    pictures = wrap_dataset_for_transforms_v2(pictures, target_keys=("boxes", "labels"))
    loader = torch.utils.data.DataLoader(pictures, BATCH, shuffle=True, collate_fn=lambda rows: tuple(zip(*rows)))
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=DECAY)
    warm = torch.optim.lr_scheduler.LinearLR(optimizer, 0.001, total_iters=min(1000, len(loader) - 1))
    drops = torch.optim.lr_scheduler.MultiStepLR(optimizer, [round(epochs * m / 26) for m in (16, 22)])
    model.train()
    for epoch in range(epochs):
        total = 0.0
        for images, targets in loader:
            loss = sum(model(images, targets).values())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            warm.step()
            total += loss.item()
        drops.step()
        print(f"epoch {epoch + 1}  loss {total / len(loader):.3f}", flush=True)
    return model.eval()


@torch.inference_mode()
def detect_theirs(model: FasterRCNN, truth: COCO, folder: Path) -> list[dict]:
    pictures, found = CocoDetection(str(folder / "images"), str(folder / "val.json")), []
    for image_id, (picture, _) in zip(pictures.ids, pictures):
        out = model([v2.functional.to_dtype(v2.functional.to_image(picture), torch.float32, scale=True)])[0]
        boxes = torch.cat([out["boxes"][:, :2], out["boxes"][:, 2:] - out["boxes"][:, :2]], 1).tolist()
        for box, score, label in zip(boxes, out["scores"].tolist(), out["labels"].tolist()):
            found.append(dict(image_id=image_id, category_id=label, bbox=box, score=score))
    return found


def detect_ours(model, truth: COCO, folder: Path) -> list[dict]:
    detector, ids = Detector(model, device="cpu"), sorted(truth.imgs)
    files = [folder / "images" / truth.imgs[i]["file_name"] for i in ids]
    return [row for i, found in zip(ids, detector(files)) for row in found.to_coco(i)]


def judge(truth: COCO, found: list[dict]) -> dict[str, float]:
    judged = COCOeval(truth, truth.loadRes(found), "bbox")
    for part in (judged.evaluate, judged.accumulate, judged.summarize):
        part()
    return dict(zip(("AP", "AP50", "AP75"), (round(100 * value, 2) for value in judged.stats)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("side", choices=("torchvision", "plain", "default"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--epochs",
        type=int,
        help="[default: 13, where torchvision's drops fall to whole ones; of default its own length]",
    )
    parser.add_argument("--lr", type=float, help=f"[default: {LR}; of default its own rate]")
    parser.add_argument("--weights", help="a checkpoint that plain and default start from")
    parser.add_argument("--size", type=int, default=256, help="pixels of the short side")
    parser.add_argument("--out", type=Path, help="folder of our run")
    args = parser.parse_args()
    if args.side == "torchvision" and args.weights:
        parser.error("--weights: torchvision's side starts from random weights")
    own = args.side == "default"
    epochs, lr = args.epochs or (None if own else 13), args.lr or (None if own else LR)
    torch.set_num_threads(1)
    truth = COCO(str(args.data / "val.json"))
    if sorted(truth.cats) != list(range(1, len(truth.cats) + 1)):
        raise SystemExit("categories: expected ids 1, 2, 3, ..., which torchvision's loop takes for labels")
    start = time.perf_counter()
    if args.side == "torchvision":
        model = theirs(len(truth.cats), args.size, args.seed)
        torch.manual_seed(args.seed)
        found = detect_theirs(train_theirs(model, args.data, epochs, lr), truth, args.data)
    else:
        dataset = open_dataset(args.data / "train.json")
        torch.manual_seed(args.seed)  # of the last layers, where they are new
        if args.weights:
            sizes = dict(min_size=args.size, max_size=2 * args.size)
            model = model_to_train(None, args.weights, dataset.class_names, **sizes)
        else:
            model = ours(theirs(len(truth.cats), args.size, args.seed).state_dict(), args.size)
            assert all(p.requires_grad for p in model.parameters())
        model.class_names, model.category_ids = dataset.class_names, [int(i) for i in dataset.category_ids]
        recipe = get_recipe("finetune", epochs=epochs) if own else get_recipe("tv", epochs=epochs, batch_size=BATCH)
        model = train(model, dataset, recipe, args.out, lr=lr, seed=args.seed)
        found = detect_ours(model, truth, args.data)
    minutes = round((time.perf_counter() - start) / 60, 1)
    said = dict(
        side=args.side, seed=args.seed, epochs=epochs, size=args.size, lr=lr, weights=args.weights, minutes=minutes
    )
    print(json.dumps(said | judge(truth, found)))


if __name__ == "__main__":
    main()
