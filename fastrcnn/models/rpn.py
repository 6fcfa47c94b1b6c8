"""Region proposal network (Ren et al., Faster R-CNN, 2015) on a feature pyramid."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastrcnn.layers import ConvModule, conv_norm_act
from fastrcnn.models.anchors import build_anchor_generator
from fastrcnn.models.box_coder import build_box_coder
from fastrcnn.models.build import settings
from fastrcnn.models.losses import build_loss
from fastrcnn.models.matching import assign
from fastrcnn.models.profiles import Profile, get_profile
from fastrcnn.models.sampling import sample
from fastrcnn.ops import decode_proposals, nms_padded

TEST_CFG = dict(nms_pre=1000, max_per_img=1000, nms=dict(type="nms", iou_threshold=0.7), min_bbox_size=0)
TRAIN_CFG = dict(
    assigner=dict(
        type="MaxIoUAssigner", pos_iou_thr=0.7, neg_iou_thr=0.3, min_pos_iou=0.3, match_low_quality=True,
        ignore_iof_thr=-1,
    ),
    sampler=dict(type="RandomSampler", num=256, pos_fraction=0.5, neg_pos_ub=-1, add_gt_as_proposals=False),
    allowed_border=-1,
    pos_weight=-1,
)  # fmt: skip


class RPNHead(nn.Module):
    """3x3 convolution(s) with ReLU, then 1x1 objectness (A channels) and deltas (4 A) on every level.

    Keys: rpn_conv, rpn_cls, rpn_reg; with num_convs > 1, rpn_conv.{i}.conv. Source: MMDetection's RPNHead.
    """

    def __init__(
        self,
        in_channels: int,
        feat_channels: int = 256,
        num_classes: int = 1,
        num_convs: int = 1,
        anchor_generator: dict = dict(
            type="AnchorGenerator", scales=[8], ratios=[0.5, 1.0, 2.0], strides=[4, 8, 16, 32, 64]
        ),
        bbox_coder: dict = dict(type="DeltaXYWHBBoxCoder"),
        loss_cls: dict = dict(type="CrossEntropyLoss", use_sigmoid=True, loss_weight=1.0),
        loss_bbox: dict = dict(type="L1Loss", loss_weight=1.0),
        reg_decoded_bbox: bool = False,
        train_cfg: dict | None = None,
        test_cfg: dict | None = None,
        profile: str | Profile = "mmdet",
    ):
        super().__init__()
        if num_classes != 1:
            raise ValueError(f"num_classes: an RPN has one class, got {num_classes}")
        self.anchor_generator = build_anchor_generator(anchor_generator)
        self.bbox_coder = build_box_coder(bbox_coder)
        self.loss_cls, self.loss_bbox = build_loss(loss_cls), build_loss(loss_bbox)
        if not getattr(self.loss_cls, "use_sigmoid", False):
            raise ValueError("loss_cls: the RPN's objectness needs use_sigmoid=True")
        self.train_cfg = settings(TRAIN_CFG, train_cfg, "rpn_head train_cfg")
        self.test_cfg = settings(TEST_CFG, test_cfg, "rpn_head test_cfg")
        self.reg_decoded_bbox = reg_decoded_bbox
        self.num_anchors = self.anchor_generator.num_base_anchors
        if num_convs == 1:
            self.rpn_conv = nn.Conv2d(in_channels, feat_channels, 3, padding=1)
        else:
            widths = [in_channels] + [feat_channels] * num_convs
            self.rpn_conv = nn.Sequential(*(ConvModule(a, b, 3, padding=1) for a, b in zip(widths, widths[1:])))
        self.rpn_cls = nn.Conv2d(feat_channels, self.num_anchors, 1)
        self.rpn_reg = nn.Conv2d(feat_channels, self.num_anchors * 4, 1)
        self.set_profile(profile)
        self.init_weights()

    def set_profile(self, profile: str | Profile) -> None:
        self.profile = get_profile(profile) if isinstance(profile, str) else profile
        self.bbox_coder.symmetric_clip = self.profile.symmetric_clip
        self._base_by_device: dict[torch.device, list[Tensor]] = {}

    def _base_anchors(self, device: torch.device) -> list[Tensor]:
        """Base anchors [A, 4] a level, in float32 whatever the weights are, copied to each device once."""
        if device not in self._base_by_device:
            base = self.anchor_generator.base_anchors(self.profile.round_anchors)
            self._base_by_device[device] = [b.to(device) for b in base]
        return self._base_by_device[device]

    def init_weights(self) -> None:
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.normal_(m.weight, std=0.01)
                if m.bias is not None:
                    nn.init.zeros_(m.bias)

    def forward(self, feats: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Per level: objectness logits [B, A, H, W] and deltas [B, 4 A, H, W]."""
        logits, deltas = [], []
        for x in feats:
            plain = isinstance(self.rpn_conv, nn.Conv2d)
            x = conv_norm_act(x, self.rpn_conv, None) if plain else self.rpn_conv(x)
            logits.append(conv_norm_act(x, self.rpn_cls, None, relu=False))
            deltas.append(conv_norm_act(x, self.rpn_reg, None, relu=False))
        return logits, deltas

    def _grid_shape(self, batch_shape: Sequence[int]) -> Sequence[int] | None:
        return batch_shape if self.profile.strides_from_grid else None

    def predict(
        self, logits: Sequence[Tensor], deltas: Sequence[Tensor], image_sizes: Tensor, batch_shape, cfg: dict
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Proposals after NMS: boxes [B, max_per_img, 4] xyxy pixels, scores [B, max_per_img], counts [B]; zeros beyond.

        image_sizes [B, 2] (height, width) before padding; batch_shape: (height, width) of the padded batch.
        """
        p = self.profile
        if cfg["nms"].get("type", "nms") != "nms":
            raise ValueError(f"rpn nms: expected type 'nms', got {cfg['nms']}")
        strides = self.anchor_generator.level_strides([x.shape[2:] for x in logits], self._grid_shape(batch_shape))
        base = self._base_anchors(logits[0].device)
        boxes, scores, levels, counts = decode_proposals(
            logits, deltas, base, strides, image_sizes, cfg["nms_pre"], self.bbox_coder.means, self.bbox_coder.stds,
            symmetric_clip=p.symmetric_clip, min_size=max(p.rpn_min_size, cfg["min_bbox_size"]), topk_on=p.rpn_topk_on,
            score=p.rpn_nms_on,
        )  # fmt: skip
        keep, counts = nms_padded(boxes, scores, levels, cfg["nms"]["iou_threshold"], cfg["max_per_img"], counts)
        kept = keep.clamp(min=0)
        boxes = boxes.gather(1, kept[..., None].expand(-1, -1, 4)) * (keep >= 0)[..., None]
        return boxes, scores.gather(1, kept) * (keep >= 0), counts

    def loss(
        self, logits: Sequence[Tensor], deltas: Sequence[Tensor], image_sizes: Tensor, batch_shape, targets: list[dict]
    ) -> tuple[Tensor, Tensor]:
        """(objectness loss, box loss), scalars. targets: dicts with boxes [M, 4] and optionally ignore_boxes [R, 4]."""
        sizes, device = [x.shape[2:] for x in logits], logits[0].device
        generator, p = self.anchor_generator, self.profile
        anchors = torch.cat(generator.grid(sizes, p.round_anchors, self._grid_shape(batch_shape), device))
        candidates: Tensor = anchors
        inside = None
        if p.anchors_inside:
            inside = generator.inside(sizes, image_sizes, self.train_cfg["allowed_border"], device)
            if not bool(inside.all()):
                nowhere = anchors.new_tensor([-1e6, -1e6, -1e6, -1e6])
                candidates = torch.where(inside[..., None], anchors, nowhere)
        matches, max_iou = assign(candidates, targets, self.train_cfg["assigner"], p)
        if inside is not None:
            matches = torch.where(inside, matches, -2)
        batch = len(matches)
        flat_logits = torch.cat([x.permute(0, 2, 3, 1).reshape(batch, -1) for x in logits], 1)
        flat_deltas = torch.cat([x.permute(0, 2, 3, 1).reshape(batch, -1, 4) for x in deltas], 1)
        picked_logits, labels, picked_deltas, box_targets, sampled, floor = [], [], [], [], 0, 0
        for i, target in enumerate(targets):
            pos, neg = sample(matches[i], self.train_cfg["sampler"], max_iou[i])
            picked_logits += [flat_logits[i, pos], flat_logits[i, neg]]
            labels += [torch.ones_like(pos), torch.zeros_like(neg)]
            picked_deltas.append(flat_deltas[i, pos])
            truth = target["boxes"][matches[i, pos]]
            if self.reg_decoded_bbox:
                picked_deltas[-1] = self.bbox_coder.decode(anchors[pos], picked_deltas[-1])
            box_targets.append(truth if self.reg_decoded_bbox else self.bbox_coder.encode(anchors[pos], truth))
            sampled += len(pos) + len(neg)
            floor += max(len(pos), 1) + max(len(neg), 1)
        divisors = dict(floored=floor, sampled=max(sampled, 1), num=self.train_cfg["sampler"]["num"] * batch)
        avg_factor = divisors[p.rpn_divisor]
        loss_cls = self.loss_cls(torch.cat(picked_logits), torch.cat(labels), avg_factor)
        return loss_cls, self.loss_bbox(torch.cat(picked_deltas), torch.cat(box_targets), avg_factor)
