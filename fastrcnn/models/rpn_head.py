"""Region proposal network (Ren et al., Faster R-CNN, 2015) on a feature pyramid."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from fastrcnn.layers import ConvModule, conv_norm_act
from fastrcnn.models.build import settings
from fastrcnn.models.dense_head import DenseHead, flat_levels, init_normal
from fastrcnn.models.frame import Frame
from fastrcnn.models.losses import avg_factor, box_loss, build_loss, positive_weight
from fastrcnn.models.post_process import check_nms, nms_limit
from fastrcnn.models.profiles import Profile
from fastrcnn.models.sampling import build_sampler, sample_images
from fastrcnn.ops import decode_proposals, nms_padded
from fastrcnn.ops._boxes import take_boxes

TEST_CFG = dict(nms_pre=1000, max_per_img=1000, nms=dict(type="nms", iou_threshold=0.7), min_bbox_size=-1)
TRAIN_CFG = dict(
    assigner=dict(
        type="MaxIoUAssigner", pos_iou_thr=0.7, neg_iou_thr=0.3, min_pos_iou=0.3, match_low_quality=True,
        ignore_iof_thr=-1,
    ),
    sampler=dict(type="RandomSampler", num=256, pos_fraction=0.5, neg_pos_ub=-1, add_gt_as_proposals=False),
    allowed_border=-1,
    pos_weight=-1,
)  # fmt: skip


def check_proposal_cfg(cfg: dict, what: str) -> None:
    """Raises ValueError for an NMS other than the plain one, or without a limit: shapes are static."""
    check_nms(cfg["nms"], f"{what} nms", {"nms": {"iou_threshold"}})
    if cfg["max_per_img"] < 1:
        raise ValueError(f"{what} max_per_img: expected at least 1, got {cfg['max_per_img']}")


class RPNHead(DenseHead):
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
        loss_bbox: dict = dict(type="SmoothL1Loss", beta=1.0 / 9.0, loss_weight=1.0),
        reg_decoded_bbox: bool = False,
        train_cfg: dict | None = None,
        test_cfg: dict | None = None,
        profile: str | Profile = "mmdet",
    ):
        if num_classes != 1:
            raise ValueError(f"num_classes: an RPN has one class, got {num_classes}")
        train_cfg = settings(TRAIN_CFG, train_cfg, "rpn_head train_cfg")
        test_cfg = settings(TEST_CFG, test_cfg, "rpn_head test_cfg")
        super().__init__(
            anchor_generator, bbox_coder, loss_cls, loss_bbox, reg_decoded_bbox, train_cfg, test_cfg, profile
        )
        check_proposal_cfg(test_cfg, "rpn_head test_cfg")
        self.sampler = build_sampler(train_cfg["sampler"])
        if not self.bbox_coder.clip_border:
            raise ValueError("bbox_coder: an RPN's boxes are clipped to the image, expected clip_border=True")
        if not getattr(self.loss_cls, "use_sigmoid", False):
            raise ValueError("loss_cls: the RPN's objectness needs use_sigmoid=True")
        if num_convs == 1:
            self.rpn_conv = nn.Conv2d(in_channels, feat_channels, 3, padding=1)
        else:
            widths = [in_channels] + [feat_channels] * num_convs
            self.rpn_conv = nn.Sequential(*(ConvModule(a, b, 3, padding=1) for a, b in zip(widths, widths[1:])))
        self.rpn_cls = nn.Conv2d(feat_channels, self.num_anchors, 1)
        self.rpn_reg = nn.Conv2d(feat_channels, self.num_anchors * 4, 1)
        self.rpn_both: nn.Conv2d | None = None
        self.init_weights()

    def take_defaults(self, profile: Profile) -> None:
        """`set_profile`, and the peer's defaults of what MMDetection makes an argument: box loss and min_pos_iou."""
        self.set_profile(profile)
        self.loss_bbox = build_loss(profile.rpn_loss_bbox)
        assigner = {**self.train_cfg["assigner"], "min_pos_iou": profile.min_pos_iou}
        self.train_cfg = {**self.train_cfg, "assigner": assigner}

    @property
    def loss_names(self) -> tuple[str, str]:
        return self.profile.losses[:2]

    def init_weights(self) -> None:
        init_normal(self)

    @torch.no_grad()
    def join_outputs(self) -> None:
        """Makes the two 1x1 convolutions one, `rpn_both`, in their place: for a model that will only predict. Its outputs
        are a multiple of 8, the last ones zeros: a pixel of them is a whole number of 16 bytes."""
        if self.rpn_both is None:
            convs = self.rpn_cls, self.rpn_reg
            outputs = sum(c.out_channels for c in convs)
            self.rpn_both = nn.Conv2d(convs[0].in_channels, outputs + -outputs % 8, 1)
            for name in ("weight", "bias"):
                rows = [getattr(c, name) for c in convs]
                rows.append(rows[0].new_zeros(-outputs % 8, *rows[0].shape[1:]))
                setattr(self.rpn_both, name, nn.Parameter(torch.cat(rows), False))
            del self.rpn_cls, self.rpn_reg

    def _outputs(self, x: Tensor) -> Sequence[Tensor]:
        if self.rpn_both is None:
            return [conv_norm_act(x, conv, None, relu=False) for conv in (self.rpn_cls, self.rpn_reg)]
        both = conv_norm_act(x, self.rpn_both, None, relu=False)
        a = self.num_anchors
        return both[:, :a], both[:, a : 5 * a]

    def forward(self, feats: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Per level: objectness logits [B, A, H, W] and deltas [B, 4 A, H, W]."""
        logits, deltas = [], []
        for x in feats:
            plain = isinstance(self.rpn_conv, nn.Conv2d)
            x = conv_norm_act(x, self.rpn_conv, None) if plain else self.rpn_conv(x)
            both = self._outputs(x)
            logits.append(both[0]), deltas.append(both[1])
        return logits, deltas

    def predict(
        self, logits: Sequence[Tensor], deltas: Sequence[Tensor], frame: Frame, cfg: dict
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Proposals after NMS: boxes [B, max_per_img, 4] xyxy pixels, scores [B, max_per_img], counts [B]; zeros beyond.

        cfg: nms_pre, min_bbox_size, nms and max_per_img. With frame.factors boxes come back in pixels of the original
        image.
        """
        p, factors = self.profile, frame.factors
        # Where boxes are scaled back before NMS, min_bbox_size counts the original's pixels.
        early = factors is not None and p.rescale_before_nms
        shape = self.grid_shape(frame)
        strides = self.anchor_generator.strides if shape is None else None
        base = self.base_anchors(logits[0].device)
        boxes, scores, levels, counts = decode_proposals(
            logits, deltas, base, strides, frame.sizes, cfg["nms_pre"], self.bbox_coder.means, self.bbox_coder.stds,
            symmetric_clip=p.symmetric_clip, topk_on=p.rpn_topk_on, score=p.rpn_nms_on,
            min_size=p.rpn_min_size if early else max(p.rpn_min_size, cfg["min_bbox_size"]), batch_shape=shape,
        )  # fmt: skip
        factor = None if factors is None else (1.0 / factors).repeat(1, 2)[:, None]
        if early:
            boxes = boxes * factor
            large = (boxes[..., 2:] - boxes[..., :2] > cfg["min_bbox_size"]).all(-1) & (levels >= 0)
            # Shapes stay static: the large ones move to the front and are counted.
            counts, first = large.sum(1), large.int().sort(dim=1, descending=True, stable=True).indices
            boxes, scores, levels = take_boxes(boxes, first), scores.gather(1, first), levels.gather(1, first)
        groups = None if cfg["nms"].get("class_agnostic") else levels
        most = nms_limit(cfg["nms"], cfg["max_per_img"])
        keep, counts = nms_padded(boxes, scores, groups, cfg["nms"]["iou_threshold"], most, counts)
        kept = keep.clamp(min=0)
        boxes = take_boxes(boxes, kept) * (keep >= 0)[..., None]
        if factor is not None and not early:
            boxes = boxes * factor
        return boxes, scores.gather(1, kept) * (keep >= 0), counts

    def loss(
        self, logits: Sequence[Tensor], deltas: Sequence[Tensor], frame: Frame, targets: list[dict]
    ) -> tuple[Tensor, Tensor]:
        """(objectness loss, box loss), scalars. targets: dicts with boxes [M, 4] and optionally ignore_boxes [R, 4]."""
        anchors, matches, max_iou = self.assigned(logits, frame, targets)
        flat_logits, flat_deltas = flat_levels(logits, 1)[..., 0], flat_levels(deltas, 4)
        indices, counts = sample_images(matches, self.sampler, max_iou)
        divisor = dict(floored=counts.clamp(min=1), sampled=counts, num=torch.full_like(counts[:, 0], self.sampler.num))
        factor = avg_factor(divisor[self.profile.rpn_divisor].sum(), 1, self.training)
        picked = indices.clamp(min=0)  # of what is no sample the weight is zero
        owners = matches.gather(1, picked)
        labels = (owners >= 0).long().flatten()
        weight = positive_weight(labels > 0, self.train_cfg["pos_weight"]) * (indices >= 0).flatten()
        loss_cls = self.loss_cls(flat_logits.gather(1, picked).flatten(), labels, factor, weight)
        # Positives come first, and no more than that.
        first = picked[:, : int(self.sampler.num * self.sampler.pos_fraction)]
        positive = torch.arange(first.shape[1], device=first.device) < counts[:, :1]
        rows = [F.pad(t["boxes"], (0, 0, 0, 1)) for t in targets]  # a row more: of what has no object
        gts = pad_sequence(rows, True)
        truth = take_boxes(gts, owners[:, : first.shape[1]].clamp(min=0)).flatten(0, 1)
        moves = take_boxes(flat_deltas, first).flatten(0, 1)
        return loss_cls, box_loss(self, moves, anchors[first].flatten(0, 1), truth, factor, positive.flatten())
