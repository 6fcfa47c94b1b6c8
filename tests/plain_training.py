"""A training step of MMDetection's and of Detectron2's Faster R-CNN written down plainly: image by image, loops, whole
matrices, torchvision's operators. Of the model under test it takes the layers and nothing else. Boxes are sampled first
come, first served."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import batched_nms, box_iou, roi_align

STRIDES, RATIOS, SCALE, CLIP = (4, 8, 16, 32, 64), (0.5, 1.0, 2.0), 8, math.log(1000 / 16)
STDS = (0.1, 0.1, 0.2, 0.2)


def anchors_of(stride: int, height: int, width: int) -> Tensor:
    """[height x width x 3, 4], row by row, a cell's three one after another; those of a cell as peers keep them, in
    float32."""
    own = [(stride * SCALE / math.sqrt(ratio) / 2, stride * SCALE * math.sqrt(ratio) / 2) for ratio in RATIOS]
    own = torch.tensor([(-w, -h, w, h) for w, h in own], dtype=torch.float32).double()
    places = [torch.tensor([x, y, x, y]) * stride for y in range(height) for x in range(width)]
    return torch.cat([own + place for place in places])


def sides(boxes: Tensor):
    w, h = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    return boxes[:, 0] + w / 2, boxes[:, 1] + h / 2, w, h


def encode(boxes: Tensor, truth: Tensor) -> Tensor:
    (x, y, w, h), (gx, gy, gw, gh) = sides(boxes), sides(truth)
    return torch.stack([(gx - x) / w, (gy - y) / h, (gw / w).log(), (gh / h).log()], 1)


def decode(boxes: Tensor, deltas: Tensor, height: int, width: int, symmetric: bool) -> Tensor:
    x, y, w, h = sides(boxes)
    dw, dh = (d.clamp(-CLIP if symmetric else None, CLIP) for d in deltas[:, 2:].T)
    x, y, w, h = x + deltas[:, 0] * w, y + deltas[:, 1] * h, w * dw.exp(), h * dh.exp()
    out = [(x - w / 2).clamp(0, width), (y - h / 2).clamp(0, height), (x + w / 2).clamp(0, width)]
    return torch.stack([*out, (y + h / 2).clamp(0, height)], 1)


def assigned(boxes: Tensor, truth: Tensor, low: float, high: float, low_quality: str | None) -> Tensor:
    """Of each box the object it is to find, -1 for background, -2 for what is between."""
    found = torch.full((len(boxes),), -1)
    if not len(truth):
        return found
    iou = box_iou(truth, boxes)
    best, owner = iou.max(0)
    found[best >= low] = -2
    found[best >= high] = owner[best >= high]
    for g, most in enumerate(iou.max(1).values):
        if low_quality == "mmdet" and most >= 0.3:
            found[iou[g] == most] = g
        if low_quality == "detectron2":
            found[iou[g] == most] = owner[iou[g] == most]
    return found


def first_come(found: Tensor, number: int, positives: int) -> tuple[Tensor, Tensor]:
    positive = (found >= 0).nonzero()[:, 0][:positives]
    return positive, (found == -1).nonzero()[:, 0][: number - len(positive)]


def losses(model, batch: Tensor, targets: list[dict], profile: str) -> dict[str, Tensor]:
    """batch [B, 3, H, W] of pictures that fill it; targets with labels from 0. Profile mmdet or detectron2."""
    mmdet, (height, width) = profile == "mmdet", batch.shape[2:]
    feats, rpn = model.neck(model.backbone(batch)), model.rpn_head
    hidden = [F.relu(rpn.rpn_conv(f)) for f in feats]
    logits = [rpn.rpn_cls(x).permute(0, 2, 3, 1).reshape(len(batch), -1) for x in hidden]
    deltas = [rpn.rpn_reg(x).permute(0, 2, 3, 1).reshape(len(batch), -1, 4) for x in hidden]
    anchors = [anchors_of(stride, *f.shape[2:]) for stride, f in zip(STRIDES, feats)]
    every = torch.cat(anchors)
    objectness, regression, divisor, rois, labels, wanted = 0, deltas[0].sum() * 0, 0, [], [], []
    for i, target in enumerate(targets):
        truth = target["boxes"].double()
        found = assigned(every, truth, 0.3, 0.7, profile)
        positive, negative = first_come(found, 256, 128)
        picked = torch.cat([positive, negative])
        answers = torch.cat([torch.ones(len(positive)), torch.zeros(len(negative))]).double()
        scores, moves = torch.cat([x[i] for x in logits]), torch.cat([x[i] for x in deltas])
        objectness += F.binary_cross_entropy_with_logits(scores[picked], answers, reduction="sum")
        if len(positive):
            regression += (moves[positive] - encode(every[positive], truth[found[positive]])).abs().sum()
        divisor += max(len(positive), 1) + max(len(negative), 1) if mmdet else 256

        boxes, ranks, levels = [], [], []
        for level, (x, d, a) in enumerate(zip(logits, deltas, anchors)):
            rank = x[i].detach().sigmoid() if mmdet else x[i].detach()
            rank, best = rank.sort(descending=True, stable=True)
            best = best[:2000]
            boxes.append(decode(a[best], d[i].detach()[best], height, width, mmdet))
            ranks.append(rank[:2000])
            levels += [level] * len(best)
        boxes, ranks, levels = torch.cat(boxes), torch.cat(ranks), torch.tensor(levels)
        real = ((boxes[:, 2:] - boxes[:, :2]) > 0).all(1)
        boxes, ranks, levels = boxes[real], ranks[real], levels[real]
        proposals = boxes[batched_nms(boxes, ranks, levels, 0.7)[:1000]]
        if mmdet:
            found = torch.cat([torch.arange(len(truth)), assigned(proposals, truth, 0.5, 0.5, None)])
            proposals = torch.cat([truth, proposals])
        else:
            proposals = torch.cat([proposals, truth])
            found = assigned(proposals, truth, 0.5, 0.5, None)
        positive, negative = first_come(found, 512, 128)
        picked = torch.cat([positive, negative])
        rois.append(torch.cat([torch.full((len(picked), 1), float(i)).double(), proposals[picked]], 1))
        background = torch.full((len(negative),), model.num_classes)
        labels.append(torch.cat([target["labels"][found[positive]], background]))
        wanted.append(encode(proposals[positive], truth[found[positive]]) / torch.tensor(STDS, dtype=torch.float64))
        wanted[-1] = F.pad(wanted[-1], (0, 0, 0, len(negative)))

    rois, labels, wanted, head = torch.cat(rois), torch.cat(labels), torch.cat(wanted), model.roi_head.bbox_head
    _, _, w, h = sides(rois[:, 1:])
    size = (w * h).sqrt()
    level = torch.floor((size / 56 + 1e-6).log2()) if mmdet else torch.floor(2 + (size / 224 + 1e-8).log2())
    pooled = torch.zeros(len(rois), feats[0].shape[1], 7, 7, dtype=torch.float64)
    for k, stride in enumerate(STRIDES[:4]):
        mine = level.clamp(0, 3) == k
        pooled[mine] = roi_align(feats[k], rois[mine], 7, 1 / stride, 0, True)
    x = pooled.flatten(1)
    for layer in head.shared_fcs:
        x = F.relu(layer(x))
    logits, moves = head.fc_cls(x), head.fc_reg(x).reshape(len(x), -1, 4)
    positive = (labels < model.num_classes).nonzero()[:, 0]
    names = model.profile.losses
    values = (objectness / divisor, regression / divisor, F.cross_entropy(logits, labels, reduction="sum") / len(labels),
              (moves[positive, labels[positive]] - wanted[positive]).abs().sum() / len(labels))  # fmt: skip
    return dict(zip(names, values))
