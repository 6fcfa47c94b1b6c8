"""The second stage: RoI features, box heads, and their predictions and losses (MMDetection's StandardRoIHead)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from fastrcnn.layers import ConvModule
from fastrcnn.models.box_coder import build_box_coder
from fastrcnn.models.build import build, settings
from fastrcnn.models.losses import build_loss, positive_weight
from fastrcnn.models.matching import assign, check_assigner
from fastrcnn.models.post_process import check_nms, finish
from fastrcnn.models.profiles import Profile, get_profile
from fastrcnn.models.resnet import ResNet, init_convs_and_norms, make_res_layer, pretrained_source
from fastrcnn.models.roi_extractors import ROI_EXTRACTORS
from fastrcnn.models.sampling import check_sampler, sample_images
from fastrcnn.ops._checks import coordinates

TEST_CFG = dict(score_thr=0.05, nms=dict(type="nms", iou_threshold=0.5), max_per_img=100)
TRAIN_CFG = dict(
    assigner=dict(
        type="MaxIoUAssigner", pos_iou_thr=0.5, neg_iou_thr=0.5, min_pos_iou=0.5, match_low_quality=False,
        ignore_iof_thr=-1,
    ),
    sampler=dict(type="RandomSampler", num=512, pos_fraction=0.25, neg_pos_ub=-1, add_gt_as_proposals=True),
    pos_weight=-1,
)  # fmt: skip


class ConvFCBBoxHead(nn.Module):
    """Shared convolutions and fully connected layers, then optional own ones for classes and for boxes.

    num_classes counts foreground; the background is the last class. Keys: shared_convs.{i}.conv, shared_fcs.{i}, cls_*,
    reg_*, fc_cls, fc_reg. Source: MMDetection's ConvFCBBoxHead.
    """

    def __init__(
        self,
        num_shared_convs: int = 0,
        num_shared_fcs: int = 0,
        num_cls_convs: int = 0,
        num_cls_fcs: int = 0,
        num_reg_convs: int = 0,
        num_reg_fcs: int = 0,
        conv_out_channels: int = 256,
        fc_out_channels: int = 1024,
        conv_cfg: dict | None = None,
        norm_cfg: dict | None = None,
        in_channels: int = 256,
        roi_feat_size: int | tuple[int, int] = 7,
        num_classes: int = 80,
        with_avg_pool: bool = False,
        reg_class_agnostic: bool = False,
        reg_decoded_bbox: bool = False,
        bbox_coder: dict = dict(
            type="DeltaXYWHBBoxCoder", target_means=(0.0, 0.0, 0.0, 0.0), target_stds=(0.1, 0.1, 0.2, 0.2)
        ),
        loss_cls: dict = dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=1.0),
        loss_bbox: dict = dict(type="SmoothL1Loss", beta=1.0, loss_weight=1.0),
    ):
        super().__init__()
        self.num_classes, self.reg_class_agnostic = num_classes, reg_class_agnostic
        self.with_avg_pool, self.reg_decoded_bbox = with_avg_pool, reg_decoded_bbox
        self.bbox_coder = build_box_coder(bbox_coder)
        self.loss_cls, self.loss_bbox = build_loss(loss_cls), build_loss(loss_bbox)
        height, width = roi_feat_size if isinstance(roi_feat_size, Sequence) else (roi_feat_size, roi_feat_size)
        area = 1 if with_avg_pool else height * width
        convs = dict(conv_cfg=conv_cfg, norm_cfg=norm_cfg)

        def branch(num_convs, num_fcs, channels, is_map):
            """(convs, fcs, width out, whether the output is still a map)."""
            widths = [channels] + [conv_out_channels] * num_convs
            conv_list = nn.ModuleList(ConvModule(a, b, 3, padding=1, **convs) for a, b in zip(widths, widths[1:]))
            width = widths[-1] * (area if is_map and num_fcs else 1)
            fc_widths = [width] + [fc_out_channels] * num_fcs
            fcs = nn.ModuleList(nn.Linear(a, b) for a, b in zip(fc_widths, fc_widths[1:]))
            return conv_list, fcs, fc_widths[-1], is_map and not num_fcs

        self.shared_convs, self.shared_fcs, width, is_map = branch(num_shared_convs, num_shared_fcs, in_channels, True)
        if not is_map and (num_cls_convs or num_reg_convs):
            raise ValueError("num_cls_convs, num_reg_convs: expected 0 after shared fully connected layers")
        self.cls_convs, self.cls_fcs, cls_width, cls_map = branch(num_cls_convs, num_cls_fcs, width, is_map)
        self.reg_convs, self.reg_fcs, reg_width, reg_map = branch(num_reg_convs, num_reg_fcs, width, is_map)
        self.fc_cls = nn.Linear(cls_width * (area if cls_map else 1), num_classes + 1)
        self.fc_reg = nn.Linear(reg_width * (area if reg_map else 1), 4 * (1 if reg_class_agnostic else num_classes))
        self.init_weights()

    def init_weights(self) -> None:
        for name, m in self.named_modules():
            if isinstance(m, nn.Linear) and name not in ("fc_cls", "fc_reg"):
                nn.init.xavier_uniform_(m.weight)
                nn.init.zeros_(m.bias)
            elif isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
                if m.bias is not None:
                    nn.init.zeros_(m.bias)
        for layer, std in ((self.fc_cls, 0.01), (self.fc_reg, 0.001)):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)

    def _flat(self, x: Tensor) -> Tensor:
        """A map [K, C, h, w] as a vector a RoI: averaged with with_avg_pool, else row by row."""
        return x.mean((2, 3)) if self.with_avg_pool and x.dim() == 4 else x.flatten(1)

    def _run(self, x: Tensor, convs: nn.ModuleList, fcs: nn.ModuleList) -> Tensor:
        for conv in convs:
            x = conv(x)
        for fc in fcs:
            x = torch.relu(fc(self._flat(x)))
        return x

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """RoI features [K, C, 7, 7] -> class logits [K, num_classes + 1], deltas [K, 4 * num_classes] (or [K, 4])."""
        x = self._run(x, self.shared_convs, self.shared_fcs)
        cls, reg = self._run(x, self.cls_convs, self.cls_fcs), self._run(x, self.reg_convs, self.reg_fcs)
        return self.fc_cls(self._flat(cls)), self.fc_reg(self._flat(reg))

    def loss(
        self, logits: Tensor, deltas: Tensor, rois: Tensor, labels: Tensor, gt_boxes: Tensor, pos_weight: float = -1
    ):
        """(class loss, box loss). rois [K, 5], labels [K] with num_classes for background, gt_boxes [K, 4] (background
        rows are not read); pos_weight: of the positives in the class loss, where it is above 0."""
        count = max(len(labels), 1)
        positive = labels < self.num_classes
        loss_cls = self.loss_cls(logits, labels, count, positive_weight(positive, pos_weight))
        pos = positive.nonzero()[:, 0]
        if len(pos) == 0:
            return loss_cls, deltas.sum() * 0.0
        picked = deltas.view(len(deltas), -1, 4)
        column = torch.zeros_like(labels[pos]) if self.reg_class_agnostic else labels[pos]
        picked, boxes, truth = picked[pos, column], rois[pos, 1:], gt_boxes[pos]
        if self.reg_decoded_bbox:
            return loss_cls, self.loss_bbox(self.bbox_coder.decode(boxes, picked), truth, count)
        return loss_cls, self.loss_bbox(picked, self.bbox_coder.encode(boxes, truth), count)


class BBoxHead(ConvFCBBoxHead):
    """No layers of its own: classes and boxes straight from the (averaged) RoI features, as behind a shared head."""


class Shared2FCBBoxHead(ConvFCBBoxHead):
    """Two shared fully connected layers."""

    def __init__(self, fc_out_channels: int = 1024, **kwargs):
        super().__init__(num_shared_fcs=2, fc_out_channels=fc_out_channels, **kwargs)


class Shared4Conv1FCBBoxHead(ConvFCBBoxHead):
    """Four shared convolutions and one shared fully connected layer."""

    def __init__(self, fc_out_channels: int = 1024, **kwargs):
        super().__init__(num_shared_convs=4, num_shared_fcs=1, fc_out_channels=fc_out_channels, **kwargs)


BBOX_HEADS = {c.__name__: c for c in (BBoxHead, ConvFCBBoxHead, Shared2FCBBoxHead, Shared4Conv1FCBBoxHead)}


class ResLayer(nn.Module):
    """One ResNet stage on RoI features: the shared head of C4 detectors. Keys layer{stage + 1}.*"""

    def __init__(
        self,
        depth: int,
        stage: int = 3,
        stride: int = 2,
        dilation: int = 1,
        style: str = "pytorch",
        norm_cfg: dict = dict(type="BN", requires_grad=True),
        norm_eval: bool = True,
        with_cp: bool = False,
        dcn: dict | None = None,
        pretrained: str | None = None,
        init_cfg: dict | None = None,
    ):
        super().__init__()
        self.pretrained = pretrained_source(pretrained, init_cfg)
        if depth not in ResNet.arch_settings:
            raise ValueError(f"depth: expected one of {sorted(ResNet.arch_settings)}, got {depth}")
        block, num_blocks = ResNet.arch_settings[depth]
        planes = 64 * 2**stage
        inplanes, self.norm_eval, self.name = planes // 2 * block.expansion, norm_eval, f"layer{stage + 1}"
        layer = make_res_layer(
            block,
            inplanes,
            planes,
            num_blocks[stage],
            stride,
            dilation,
            norm_cfg=norm_cfg,
            style=style,
            with_cp=with_cp,
            dcn=dcn,
        )
        self.add_module(self.name, layer)
        init_convs_and_norms(self)

    def init_weights(self) -> None:
        """Fresh weights, or those that `pretrained` or init_cfg name (see ResNet)."""
        init_convs_and_norms(self)
        if self.pretrained is not None:
            from fastrcnn.weights import load_pretrained  # weights are read into models: a local import

            load_pretrained(self, *self.pretrained)

    def train(self, mode: bool = True):
        super().train(mode)
        if self.norm_eval:
            for m in self.modules():
                if isinstance(m, nn.modules.batchnorm._BatchNorm):
                    m.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self, self.name)(x)


class StandardRoIHead(nn.Module):
    """RoI extractor, optional shared head, box head; `predict` gives detections, `loss` the two losses."""

    def __init__(
        self,
        bbox_roi_extractor: dict | nn.Module,
        bbox_head: dict | nn.Module,
        shared_head: dict | nn.Module | None = None,
        train_cfg: dict | None = None,
        test_cfg: dict | None = None,
        profile: str | Profile = "mmdet",
    ):
        super().__init__()
        self.bbox_roi_extractor = build(bbox_roi_extractor, ROI_EXTRACTORS, "bbox_roi_extractor")
        self.bbox_head = build(bbox_head, BBOX_HEADS, "bbox_head")
        self.shared_head = None if shared_head is None else build(shared_head, {"ResLayer": ResLayer}, "shared_head")
        self.train_cfg = settings(TRAIN_CFG, train_cfg, "roi_head train_cfg")
        self.test_cfg = settings(TEST_CFG, test_cfg, "roi_head test_cfg")
        check_nms(self.test_cfg["nms"], "roi_head test_cfg nms")
        check_assigner(self.train_cfg["assigner"])
        check_sampler(self.train_cfg["sampler"])
        self.set_profile(profile)

    def init_weights(self) -> None:
        """Fresh weights for every part (see `BaseDetector.init_weights`)."""
        for m in self.children():
            if hasattr(m, "init_weights"):
                m.init_weights()

    def set_profile(self, profile: str | Profile) -> None:
        self.profile = get_profile(profile) if isinstance(profile, str) else profile
        self.bbox_roi_extractor.profile = self.profile
        self.bbox_head.bbox_coder.symmetric_clip = self.profile.symmetric_clip

    def take_defaults(self, profile: Profile) -> None:
        """`set_profile`, and the peer's defaults of what MMDetection makes an argument: RoIAlign's and the box loss."""
        self.set_profile(profile)
        self.bbox_roi_extractor.take_defaults(profile)
        self.bbox_head.loss_bbox = build_loss(profile.roi_loss_bbox)

    def forward(self, feats: Sequence[Tensor], rois: Tensor) -> tuple[Tensor, Tensor]:
        """rois [K, 5] = (image index, xyxy pixels) -> class logits, deltas."""
        x = self.bbox_roi_extractor(feats, rois)
        return self.bbox_head(x if self.shared_head is None else self.shared_head(x))

    def predict(
        self,
        feats: Sequence[Tensor],
        proposals: Tensor,
        counts: Tensor,
        image_sizes: Tensor,
        scale_factors: Tensor | None,
    ) -> list[dict[str, Tensor]]:
        """Detections of each image: dict of boxes [N, 4] xyxy pixels, scores [N], labels [N], by descending score.

        proposals [B, P, 4], of which counts[b] rows are valid; image_sizes [B, 2] (height, width) before padding;
        scale_factors [B, 2] (width, height): boxes come back in the coordinates of the unscaled image.
        """
        batch, most, _ = proposals.shape
        valid = torch.arange(most, device=counts.device)[None] < counts[:, None]  # [B, P]
        image = torch.arange(batch, device=counts.device, dtype=proposals.dtype)[:, None, None].expand(-1, most, 1)
        rois = torch.cat([image, proposals], -1)[valid]
        logits, deltas = self(feats, rois)
        scores = F.softmax(coordinates(logits), -1)[:, :-1]  # the background is last
        # Candidates first, decoding after: most class scores are far below the threshold.
        row, column, label = self.candidates(scores)
        images, moves = rois[row, 0].long(), deltas.unflatten(1, (-1, 4))[row, column]
        limits = image_sizes.float()[images]
        boxes = self.bbox_head.bbox_coder.decode(rois[row, None, 1:], moves[:, None], limits)[:, 0]
        return self.finish(boxes, scores[row, label], label, images, image_sizes, scale_factors)

    def candidates(self, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(row, column of its box, label) of each of the scores [R, classes] above the threshold."""
        row, label = (scores > self.test_cfg["score_thr"]).nonzero(as_tuple=True)
        return row, torch.zeros_like(label) if self.bbox_head.reg_class_agnostic else label, label

    def finish(
        self,
        boxes: Tensor,
        scores: Tensor,
        label: Tensor,
        images: Tensor,
        image_sizes: Tensor,
        scale_factors: Tensor | None,
    ) -> list[dict[str, Tensor]]:
        """Detections of each image from the candidates of all: `post_process.finish`, labels in the profile's numbers."""
        p = self.profile
        if p.min_box_size is not None:
            # As indices: a mask would be counted, and waited for, at each of the four.
            keep = ((boxes[:, 2:] - boxes[:, :2]) >= p.min_box_size).all(-1).nonzero()[:, 0]
            boxes, scores, label, images = boxes[keep], scores[keep], label[keep], images[keep]
        found = finish(boxes, scores, label, images, image_sizes, scale_factors, self.test_cfg, p)
        return [{**f, "labels": f["labels"] + p.label_offset} for f in found]

    def loss(
        self, feats: Sequence[Tensor], proposals: Tensor, counts: Tensor, targets: list[dict]
    ) -> tuple[Tensor, Tensor]:
        """(class loss, box loss). targets: dicts with boxes [M, 4] and labels [M] counted from 0."""
        rois, labels, gt_boxes = self._targets(feats, proposals, counts, targets)
        return self.bbox_head.loss(*self(feats, rois), rois, labels, gt_boxes, self.train_cfg["pos_weight"])

    def _assigned(
        self, proposals: Tensor, counts: Tensor, gts: Tensor, targets: list[dict]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(boxes [B, N, 4] to sample from, ground-truth index of each [B, N], or -1 background or -2 ignored, best IoU
        [B, N]). The boxes are the proposals and, with add_gt_as_proposals, gts [B, M, 4]; padding is ignored."""
        valid = torch.arange(proposals.shape[1], device=counts.device) < counts[:, None]
        boxes = torch.where(valid[..., None], proposals, 0.0)
        own = pad_sequence([torch.arange(len(t["boxes"]), device=gts.device) for t in targets], True, -2)  # [B, M]
        add_gt = self.train_cfg["sampler"].get("add_gt_as_proposals", True)
        if add_gt and not self.profile.gt_first:
            boxes, valid = torch.cat([boxes, gts], 1), torch.cat([valid, own >= 0], 1)
        matches, max_iou = assign(boxes, targets, self.train_cfg["assigner"], self.profile)
        matches = torch.where(valid, matches, -2)
        if add_gt and self.profile.gt_first:
            boxes, matches = torch.cat([gts, boxes], 1), torch.cat([own, matches], 1)
            max_iou = torch.cat([(own >= 0).to(max_iou), max_iou], 1)
        return boxes, matches, max_iou

    @torch.no_grad()
    def _targets(
        self, feats: Sequence[Tensor], proposals: Tensor, counts: Tensor, targets: list[dict]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Sampled RoIs [K, 5], their labels [K] and matched ground truth [K, 4], image by image, positives first."""
        background = self.bbox_head.num_classes
        gts = pad_sequence([t["boxes"] for t in targets], True)  # [B, M, 4]
        labels = pad_sequence([t["labels"] for t in targets], True, background)
        boxes, matches, max_iou = self._assigned(proposals, counts, gts, targets)
        # What index -1 reads: background has its label and a box of zeros.
        gts, labels = F.pad(gts, (0, 0, 0, 1)), F.pad(labels, (0, 1), value=background)

        def rois_of(image: int, indices: Tensor) -> Tensor:
            picked = boxes[image, indices]
            return torch.cat([picked.new_full((len(picked), 1), image), picked], 1)

        def loss_of(image: int, indices: Tensor) -> Tensor:
            logits, _ = self(feats, rois_of(image, indices))
            losses = self.bbox_head.loss_cls.elements(logits, labels[image, matches[image, indices]])
            return losses.reshape(len(indices), -1).sum(1)

        found = []
        for i, sides in enumerate(sample_images(matches, self.train_cfg["sampler"], max_iou, loss_of)):
            chosen = torch.cat(sides)
            owner = matches[i, chosen]
            found.append((rois_of(i, chosen), labels[i, owner], gts[i, owner]))
        return tuple(torch.cat(column) for column in zip(*found))
