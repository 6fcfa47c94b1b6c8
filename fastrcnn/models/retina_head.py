"""RetinaNet (Lin et al., "Focal Loss for Dense Object Detection", 2017): classes and boxes straight from every anchor."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from fastrcnn.layers import ConvModule, conv_norm_act
from fastrcnn.models.anchors import build_anchor_generator
from fastrcnn.models.build import settings
from fastrcnn.models.dense_head import DenseHead, flat_levels, init_normal
from fastrcnn.models.frame import Frame
from fastrcnn.models.losses import avg_factor, box_loss, build_loss, positive_weight, processes
from fastrcnn.models.padded import Padded
from fastrcnn.models.post_process import MOST_CANDIDATES, check_nms, finish, lost
from fastrcnn.models.profiles import Profile
from fastrcnn.ops import select_candidates
from fastrcnn.ops._boxes import take_boxes
from fastrcnn.ops._checks import coordinates

TEST_CFG = dict(
    nms_pre=1000, min_bbox_size=-1, score_thr=0.05, nms=dict(type="nms", iou_threshold=0.5), max_per_img=100
)
TRAIN_CFG = dict(
    assigner=dict(
        type="MaxIoUAssigner",
        pos_iou_thr=0.5,
        neg_iou_thr=0.4,
        min_pos_iou=0,
        match_low_quality=True,
        ignore_iof_thr=-1,
    ),
    sampler=dict(type="PseudoSampler"),  # focal loss: every anchor counts
    allowed_border=-1,
    pos_weight=-1,
)


class RetinaHead(DenseHead):
    """Two towers of 3x3 convolutions, then a 3x3 for the classes (A * C channels, sigmoid) and one for the boxes (A * 4).

    num_classes counts foreground. Keys: cls_convs.{i}.conv, reg_convs.{i}.conv, retina_cls, retina_reg. Source:
    MMDetection's RetinaHead.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        stacked_convs: int = 4,
        feat_channels: int = 256,
        conv_cfg: dict | None = None,
        norm_cfg: dict | None = None,
        anchor_generator: dict = dict(
            type="AnchorGenerator", octave_base_scale=4, scales_per_octave=3, ratios=[0.5, 1.0, 2.0],
            strides=[8, 16, 32, 64, 128],
        ),
        bbox_coder: dict = dict(type="DeltaXYWHBBoxCoder"),
        loss_cls: dict = dict(type="FocalLoss", use_sigmoid=True, gamma=2.0, alpha=0.25, loss_weight=1.0),
        loss_bbox: dict = dict(type="SmoothL1Loss", beta=1.0 / 9.0, loss_weight=1.0),
        reg_decoded_bbox: bool = False,
        train_cfg: dict | None = None,
        test_cfg: dict | None = None,
        profile: str | Profile = "mmdet",
    ):  # fmt: skip
        train_cfg = settings(TRAIN_CFG, train_cfg, "bbox_head train_cfg")
        test_cfg = settings(TEST_CFG, test_cfg, "bbox_head test_cfg")
        super().__init__(
            anchor_generator, bbox_coder, loss_cls, loss_bbox, reg_decoded_bbox, train_cfg, test_cfg, profile
        )
        check_nms(test_cfg["nms"], "bbox_head test_cfg nms")
        if train_cfg["sampler"] != dict(type="PseudoSampler"):
            raise ValueError(f"sampler: RetinaNet trains on every anchor (PseudoSampler), got {train_cfg['sampler']}")
        if type(self.loss_cls).__name__ != "FocalLoss":
            raise ValueError(f"loss_cls: expected FocalLoss, got {loss_cls}")
        self.num_classes = num_classes
        widths = [in_channels] + [feat_channels] * stacked_convs

        def tower() -> nn.ModuleList:
            convs = dict(conv_cfg=conv_cfg, norm_cfg=norm_cfg)
            return nn.ModuleList(ConvModule(a, b, 3, padding=1, **convs) for a, b in zip(widths, widths[1:]))

        self.cls_convs, self.reg_convs = tower(), tower()
        self.retina_cls = nn.Conv2d(widths[-1], self.num_anchors * num_classes, 3, padding=1)
        self.retina_reg = nn.Conv2d(widths[-1], self.num_anchors * 4, 3, padding=1)
        self.register_load_state_dict_pre_hook(self._keep_normalizer)
        self.init_weights()

    def set_profile(self, profile: str | Profile) -> None:
        """Where the profile divides by a running mean of the number of positives (Detectron2's starts at 100), training
        goes on from it, and it is part of the state dict; elsewhere the keys are MMDetection's alone."""
        super().set_profile(profile)
        mean = getattr(self, "loss_normalizer", torch.tensor(100.0))
        self.register_buffer("loss_normalizer", mean, persistent=self.profile.dense_divisor == "running")

    @staticmethod
    def _keep_normalizer(module, state_dict: dict, prefix: str, *args) -> None:
        """Checkpoints without it, Detectron2's among them, load strictly all the same."""
        if module.profile.dense_divisor == "running":
            state_dict.setdefault(f"{prefix}loss_normalizer", module.loss_normalizer)
        else:
            state_dict.pop(f"{prefix}loss_normalizer", None)

    def take_defaults(self, profile: Profile) -> None:
        """`set_profile`, and the peer's defaults of what MMDetection makes an argument: anchors, box loss, detections."""
        self.anchor_generator = build_anchor_generator(profile.dense_anchors)
        self.set_profile(profile)
        self.loss_bbox = build_loss(profile.dense_loss_bbox)
        self.test_cfg = {**self.test_cfg, "max_per_img": profile.dense_max_per_img}

    def init_weights(self) -> None:
        """Small random weights; the class biases make every anchor start at a score of 0.01."""
        init_normal(self)
        nn.init.constant_(self.retina_cls.bias, -math.log((1 - 0.01) / 0.01))

    def forward(self, feats: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Per level: class logits [B, A * C, H, W] and deltas [B, A * 4, H, W]."""
        logits, deltas = [], []
        for x in feats:
            cls, reg = x, x
            for conv in self.cls_convs:
                cls = conv(cls)
            for conv in self.reg_convs:
                reg = conv(reg)
            logits.append(conv_norm_act(cls, self.retina_cls, None, relu=False))
            deltas.append(conv_norm_act(reg, self.retina_reg, None, relu=False))
        return logits, deltas

    def predict(self, logits: Sequence[Tensor], deltas: Sequence[Tensor], frame: Frame) -> tuple[Padded, Tensor]:
        """Detections (see `BaseDetector.detect`), labels from 0: of each level the nms_pre best scores above score_thr (all
        where it is not above 0), then NMS within each class."""
        cfg, levels, left_out = self.test_cfg, [], torch.zeros_like(frame.sizes[:, 0], dtype=torch.float32)
        limits = None if self.profile.clip_after_rescale else frame.sizes.float()  # Detectron2 clips at the end only
        for logit, delta, anchors in zip(logits, deltas, self.anchors(logits, frame)):
            scores = coordinates(logit.permute(0, 2, 3, 1).flatten(1)).sigmoid()
            wanted = cfg["nms_pre"] if cfg["nms_pre"] > 0 else scores.shape[1]
            most = torch.sym_min(torch.sym_min(wanted, scores.shape[1]), MOST_CANDIDATES)
            scores, index, counts, number = select_candidates(scores, cfg["score_thr"], most)
            left_out = torch.where(number.clamp(max=wanted) > most, torch.maximum(left_out, scores[:, -1]), left_out)
            index = index.clamp(min=0)
            row = index // self.num_classes
            moves = coordinates(take_boxes(delta.permute(0, 2, 3, 1).reshape(delta.shape[0], -1, 4), row))
            boxes = self.bbox_coder.decode(anchors.to(moves.dtype)[row], moves, limits)
            levels.append(Padded(boxes, scores, index % self.num_classes, counts))
        least = cfg["min_bbox_size"] if self.profile.dense_drops_small else -1
        found = finish(Padded.cat(levels), frame, cfg, self.profile, least)
        return found, lost(found, left_out, cfg)

    def loss(
        self, logits: Sequence[Tensor], deltas: Sequence[Tensor], frame: Frame, targets: list[dict]
    ) -> tuple[Tensor, Tensor]:
        """(class loss, box loss), scalars. targets: dicts with boxes [M, 4], labels [M], optionally ignore_boxes [R, 4]."""
        anchors, matches, _ = self.assigned(logits, frame, targets)
        flat_logits, flat_deltas = flat_levels(logits, self.num_classes), flat_levels(deltas, 4)
        # A row more, which background reads: no box, and the label of the background.
        gts = pad_sequence([F.pad(t["boxes"], (0, 0, 0, 1)) for t in targets], True)
        labels = pad_sequence(
            [F.pad(t["labels"], (0, 1), value=self.num_classes) for t in targets], True, self.num_classes
        )
        owners = matches.clamp(min=-1) % gts.shape[1]
        rows = (
            flat_logits,
            labels.gather(1, owners),
            flat_deltas,
            anchors.expand_as(flat_deltas),
            take_boxes(gts, owners),
        )
        counts = (matches >= 0).sum(1)  # [B]
        if self.profile.dense_divisor == "image":
            images = avg_factor(torch.full_like(counts[:1], len(counts)), 1, self.training)
            divisors = counts.clamp(min=1) * images
            losses = [self._losses(*row, divisor) for *row, divisor in zip(*rows, matches, divisors)]
            return sum(a for a, _ in losses), sum(b for _, b in losses)
        if self.profile.dense_divisor == "positives":
            count = avg_factor(counts.clamp(min=1).sum(), 1, self.training)
        else:  # "running": the mean is of the joined batch's positives, the divisor a process's share of it
            share = processes() if self.training else 1
            count = avg_factor(counts.sum(), 1, self.training) * share
            count = self.loss_normalizer.mul_(0.9).add_(0.1 * count) / share
        return self._losses(*(x.flatten(0, 1) for x in (*rows, matches)), count)

    def _losses(self, logits, labels, deltas, anchors, boxes, matches, divisor) -> tuple[Tensor, Tensor]:
        positive = matches >= 0
        weight = positive_weight(positive, self.train_cfg["pos_weight"]) * (matches >= -1)
        return self.loss_cls(logits, labels, divisor, weight), box_loss(self, deltas, anchors, boxes, divisor, positive)
