"""FCOS (Tian et al., "FCOS: Fully Convolutional One-Stage Object Detection", 2019) as a region proposal network."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastrcnn.layers import ConvModule, conv_norm_act
from fastrcnn.models.build import build, settings
from fastrcnn.models.dense_head import flat_levels, init_normal
from fastrcnn.models.frame import Frame
from fastrcnn.models.losses import GIoULoss, IoULoss, avg_factor, build_loss
from fastrcnn.models.post_process import nms_limit
from fastrcnn.models.profiles import Profile, get_profile
from fastrcnn.models.rpn_head import check_proposal_cfg
from fastrcnn.ops import nms_padded
from fastrcnn.ops._boxes import take_boxes
from fastrcnn.ops._checks import coordinates

TEST_CFG = dict(nms_pre=-1, max_per_img=1000, nms=dict(type="nms", iou_threshold=0.7), min_bbox_size=-1, score_thr=0)
# What configurations give every RPN. FCOS has no anchors to match or to sample and reads none of it.
TRAIN_CFG = dict(assigner=None, sampler=None, allowed_border=-1, pos_weight=-1)


class DistancePointBBoxCoder:
    """Boxes as distances (left, top, right, bottom) from a point to their sides; MMDetection's coder."""

    def __init__(self, clip_border: bool = True):
        self.clip_border = clip_border

    def decode(self, points: Tensor, distances: Tensor, image_sizes: Tensor | None = None) -> Tensor:
        """points [B, N, 2] (x, y), distances [B, N, 4] -> [B, N, 4] xyxy pixels, clipped to image_sizes [B, 2] (height,
        width) if given."""
        boxes = torch.cat([points - distances[..., :2], points + distances[..., 2:]], -1)
        if image_sizes is None or not self.clip_border:
            return boxes
        limit = image_sizes.flip(1).repeat(1, 2)[:, None].to(boxes.dtype)
        return torch.minimum(boxes.clamp(min=0), limit)


def build_point_coder(cfg: dict | DistancePointBBoxCoder) -> DistancePointBBoxCoder:
    if isinstance(cfg, DistancePointBBoxCoder):
        return cfg
    coders = {"DistancePointBBoxCoder": DistancePointBBoxCoder}
    return build({"type": "DistancePointBBoxCoder", **cfg}, coders, "bbox_coder")


class Scale(nn.Module):
    """Times one learned number, which starts at 1. Key: scale."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class FCOSHead(nn.Module):
    """Two towers of 3x3 convolutions; on them 3x3 convolutions for the objectness (1 channel), the distances from each
    position to the four sides of its box (4) and the centerness (1), the same weights on every level.

    strides: pixels between positions, a level; regress_ranges: a level, the smallest and largest distance to the farthest
    side that it learns; center_sampling: learn only within center_sample_radius strides of an object's centre;
    norm_on_bbox: distances in strides through a ReLU instead of pixels through exp; centerness_on_reg: centerness on the
    box tower; dcn_on_last_conv: DCNv2 at the end of both towers. train_cfg: an RPN's, none of which is read. FCOS is
    MMDetection's alone: every profile has its semantics, and its names of the losses.

    Keys: cls_convs.{i}.conv, cls_convs.{i}.gn, reg_convs likewise, conv_cls, conv_reg, conv_centerness, scales.{i}.scale.
    Source: MMDetection's FCOSHead.
    """

    loss_names = ("rpn_loss_cls", "rpn_loss_bbox", "rpn_loss_centerness")

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        feat_channels: int = 256,
        stacked_convs: int = 4,
        strides: Sequence[float] = (4, 8, 16, 32, 64),
        regress_ranges: Sequence[tuple[float, float]] = ((-1, 64), (64, 128), (128, 256), (256, 512), (512, 1e8)),
        center_sampling: bool = False,
        center_sample_radius: float = 1.5,
        norm_on_bbox: bool = False,
        centerness_on_reg: bool = False,
        dcn_on_last_conv: bool = False,
        conv_bias: bool | str = "auto",
        bbox_coder: dict | DistancePointBBoxCoder = dict(type="DistancePointBBoxCoder"),
        loss_cls: dict | nn.Module = dict(type="FocalLoss", use_sigmoid=True, gamma=2.0, alpha=0.25, loss_weight=1.0),
        loss_bbox: dict | nn.Module = dict(type="IoULoss", loss_weight=1.0),
        loss_centerness: dict | nn.Module = dict(type="CrossEntropyLoss", use_sigmoid=True, loss_weight=1.0),
        conv_cfg: dict | None = None,
        norm_cfg: dict | None = dict(type="GN", num_groups=32, requires_grad=True),
        train_cfg: dict | None = None,
        test_cfg: dict | None = None,
        profile: str | Profile = "mmdet",
    ):
        super().__init__()
        if num_classes != 1:
            raise ValueError(f"num_classes: an FCOS that proposes has one class, got {num_classes}")
        if any(not isinstance(s, int | float) for s in strides):
            raise ValueError(f"strides: expected one number a level, got {strides}")
        if len(regress_ranges) != len(strides) or any(len(r) != 2 for r in regress_ranges):
            raise ValueError(f"regress_ranges: expected {len(strides)} pairs, one a stride, got {regress_ranges}")
        if conv_bias != "auto" and not isinstance(conv_bias, bool):
            raise ValueError(f"conv_bias: expected 'auto', True or False, got {conv_bias!r}")
        self.num_classes, self.strides, self.regress_ranges = num_classes, tuple(strides), tuple(regress_ranges)
        self.center_sampling, self.center_sample_radius = center_sampling, center_sample_radius
        self.norm_on_bbox, self.centerness_on_reg = norm_on_bbox, centerness_on_reg
        self.bbox_coder = build_point_coder(bbox_coder)
        self.loss_cls, self.loss_bbox = build_loss(loss_cls), build_loss(loss_bbox)
        self.loss_centerness = build_loss(loss_centerness)
        for name in ("loss_cls", "loss_centerness"):
            if not getattr(getattr(self, name), "use_sigmoid", False):
                raise ValueError(f"{name}: expected a loss with use_sigmoid=True")
        if not isinstance(self.loss_bbox, IoULoss | GIoULoss):
            raise ValueError(f"loss_bbox: expected one of the IoU losses with one number a box, got {loss_bbox}")
        self.train_cfg = settings(TRAIN_CFG, train_cfg, "rpn_head train_cfg")
        self.test_cfg = settings(TEST_CFG, test_cfg, "rpn_head test_cfg")
        check_proposal_cfg(self.test_cfg, "rpn_head test_cfg")
        self.set_profile(profile)

        widths = [in_channels] + [feat_channels] * stacked_convs
        kinds = [conv_cfg] * stacked_convs
        if dcn_on_last_conv and stacked_convs:
            kinds[-1] = dict(type="DCNv2")

        def tower() -> nn.ModuleList:
            return nn.ModuleList(
                ConvModule(a, b, 3, padding=1, bias=conv_bias, conv_cfg=kind, norm_cfg=norm_cfg)
                for a, b, kind in zip(widths, widths[1:], kinds)
            )

        self.cls_convs, self.reg_convs = tower(), tower()
        self.conv_cls = nn.Conv2d(widths[-1], 1, 3, padding=1)
        self.conv_reg = nn.Conv2d(widths[-1], 4, 3, padding=1)
        self.conv_centerness = nn.Conv2d(widths[-1], 1, 3, padding=1)
        self.scales = nn.ModuleList(Scale() for _ in self.strides)
        self.init_weights()

    def set_profile(self, profile: str | Profile) -> None:
        self.profile = get_profile(profile) if isinstance(profile, str) else profile

    def take_defaults(self, profile: Profile) -> None:
        """`set_profile`: no peer has other defaults for FCOS."""
        self.set_profile(profile)

    def init_weights(self) -> None:
        """Small random weights; the class bias makes every position start at a score of 0.01."""
        init_normal(self)
        for m in self.modules():
            if isinstance(m, nn.GroupNorm):
                m.reset_parameters()
            elif isinstance(m, Scale):
                nn.init.ones_(m.scale)
        nn.init.constant_(self.conv_cls.bias, -math.log((1 - 0.01) / 0.01))

    def forward(self, feats: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Per level: objectness logits [B, 1, H, W], distances [B, 4, H, W] >= 0 and centerness logits [B, 1, H, W].

        Distances are in pixels; with norm_on_bbox and in training, in strides (MMDetection proposes from those, too).
        """
        if len(feats) != len(self.strides):
            raise ValueError(f"feats: expected {len(self.strides)} levels, one a stride, got {len(feats)}")
        levels = (self._level(x, scale, stride) for x, scale, stride in zip(feats, self.scales, self.strides))
        logits, distances, centerness = zip(*levels)
        return list(logits), list(distances), list(centerness)

    def _level(self, x: Tensor, scale: Scale, stride: float) -> tuple[Tensor, Tensor, Tensor]:
        cls, reg = x, x
        for conv in self.cls_convs:
            cls = conv(cls)
        for conv in self.reg_convs:
            reg = conv(reg)
        logits = conv_norm_act(cls, self.conv_cls, None, relu=False)
        centerness = conv_norm_act(reg if self.centerness_on_reg else cls, self.conv_centerness, None, relu=False)
        # In float32 from here on: exp leaves the range of float16 at 11.
        raw = coordinates(scale(conv_norm_act(reg, self.conv_reg, None, relu=False)))
        if not self.norm_on_bbox:
            return logits, raw.exp(), centerness
        return logits, raw.clamp(min=0) * (1 if self.training else stride), centerness

    def points(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """The positions [H * W, 2] (x, y) in pixels of each level, the centres of cells of stride x stride."""
        levels = []
        for x, stride in zip(maps, self.strides):
            ys, xs = ((torch.arange(n, dtype=torch.float32, device=x.device) + 0.5) * stride for n in x.shape[2:])
            levels.append(torch.stack(torch.meshgrid(xs, ys, indexing="xy"), -1).reshape(-1, 2))
        return levels

    def predict(
        self,
        cls_scores: Sequence[Tensor],
        bbox_preds: Sequence[Tensor],
        centernesses: Sequence[Tensor],
        frame: Frame,
        cfg: dict,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Proposals after NMS: boxes [B, max_per_img, 4] xyxy pixels of the batch, scores [B, max_per_img], counts [B];
        zeros beyond.

        Of each level the nms_pre best (all where it is not above 0) by objectness alone, above score_thr; then NMS over
        all levels on objectness times centerness.
        """
        levels = []
        for logit, distance, factor, points in zip(cls_scores, bbox_preds, centernesses, self.points(cls_scores)):
            score = coordinates(logit).sigmoid().flatten(1)  # [B, H * W]
            most = torch.sym_min(cfg["nms_pre"] if cfg["nms_pre"] > 0 else score.shape[1], score.shape[1])
            score, best = (x.narrow(1, 0, most) for x in score.sort(dim=1, descending=True, stable=True))
            moves = take_boxes(distance.flatten(2).transpose(1, 2), best)
            boxes = self.bbox_coder.decode(points[best], moves, frame.sizes)
            valid = score > cfg.get("score_thr", 0)
            levels.append((boxes, score * coordinates(factor).sigmoid().flatten(1).gather(1, best), valid))
        boxes, scores, valid = (torch.cat(column, 1) for column in zip(*levels))
        if cfg["min_bbox_size"] >= 0:
            valid = valid & (boxes[..., 2:] - boxes[..., :2] > cfg["min_bbox_size"]).all(-1)
        # Shapes stay static: the valid ones are counted, the others sort behind them by a score below any sigmoid's.
        scores, order = torch.where(valid, scores, -1.0).sort(dim=1, descending=True, stable=True)
        boxes = take_boxes(boxes, order)
        most = nms_limit(cfg["nms"], cfg["max_per_img"])
        keep, counts = nms_padded(boxes, scores, None, cfg["nms"]["iou_threshold"], most, valid.sum(1))
        kept, beyond = keep.clamp(min=0), keep < 0
        boxes = take_boxes(boxes, kept).masked_fill(beyond[..., None], 0)
        return boxes, scores.gather(1, kept).masked_fill(beyond, 0), counts

    @torch.no_grad()
    def assigned(self, maps: Sequence[Tensor], targets: list[dict]) -> tuple[Tensor, Tensor]:
        """(which positions of all levels [B, N] lie in an object, the distances [B, N, 4] to its sides).

        An object takes the positions inside it whose farthest side is within the level's regress_ranges; where several
        do, the smallest. Distances are in pixels, with norm_on_bbox in strides; those of other positions mean nothing.
        """
        levels = self.points(maps)
        points = torch.cat(levels)[:, None]  # [N, 1, 2]
        level = torch.arange(len(levels)).repeat_interleave(torch.tensor([len(p) for p in levels]))
        ranges, strides = (torch.tensor(x, dtype=points.dtype)[level] for x in (self.regress_ranges, self.strides))
        ranges, strides = ranges[:, None].to(points.device), strides[:, None].to(points.device)  # [N, 1, 2], [N, 1]
        positive, distances = [], []
        for target in targets:
            boxes = coordinates(target["boxes"])  # [M, 4]
            if not len(boxes):
                positive.append(points.new_zeros(len(points), dtype=torch.bool))
                distances.append(boxes.new_zeros(len(points), 4))
                continue
            sides = torch.cat([points - boxes[:, :2], boxes[:, 2:] - points], -1)  # [N, M, 4]
            inside = sides.amin(-1) > 0
            if self.center_sampling:
                off_centre = (points - (boxes[:, :2] + boxes[:, 2:]) / 2).abs().amax(-1)
                inside &= off_centre < strides * self.center_sample_radius
            farthest = sides.amax(-1)
            inside &= (farthest >= ranges[..., 0]) & (farthest <= ranges[..., 1])
            areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
            area, owner = torch.where(inside, areas, math.inf).min(1)
            sides = sides[torch.arange(len(sides), device=sides.device), owner]
            positive.append(area < math.inf)
            distances.append(sides / strides if self.norm_on_bbox else sides)
        return torch.stack(positive), torch.stack(distances)

    def loss(
        self,
        cls_scores: Sequence[Tensor],
        bbox_preds: Sequence[Tensor],
        centernesses: Sequence[Tensor],
        frame: Frame,
        targets: list[dict],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(objectness loss, box loss, centerness loss), scalars. targets: dicts with boxes [M, 4], all one class. Every
        position of the batch counts, those in the padding (outside frame.sizes) as background."""
        positive, distances = self.assigned(cls_scores, targets)
        positive, distances = positive.flatten(), distances.flatten(0, 1)
        count = avg_factor(positive.sum(), 1, self.training)
        # What is in no object compares a box with itself, and has no weight.
        truth, moves = (
            torch.where(positive[:, None], x, 1.0) for x in (distances, flat_levels(bbox_preds, 4).flatten(0, 1))
        )
        centered = centerness_target(truth)
        weight = centered * positive
        # An IoU does not depend on where the point is: boxes around the origin.
        signs = torch.arange(4, device=truth.device) // 2 * 2 - 1  # -1, -1, 1, 1
        box = self.loss_bbox(moves * signs, truth * signs, avg_factor(weight.sum(), 1e-6, self.training), weight)
        return (
            self.loss_cls(flat_levels(cls_scores, 1).flatten(), positive.long(), count),
            box,
            self.loss_centerness(flat_levels(centernesses, 1).flatten(), centered, count, positive),
        )


def centerness_target(distances: Tensor) -> Tensor:
    """How far in the middle of its box a point is: 1 at the centre, 0 on the border. distances [P, 4] > 0 -> [P]."""
    pairs = distances.reshape(-1, 2, 2)  # left, top; right, bottom
    return (pairs.amin(1) / pairs.amax(1)).prod(1).sqrt()
