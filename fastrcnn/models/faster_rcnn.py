"""Faster R-CNN (Ren et al., 2015): preprocess -> backbone -> neck -> RPN -> RoI head."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastrcnn.models.build import build, settings
from fastrcnn.models.fpn import FPN
from fastrcnn.models.losses import build_loss
from fastrcnn.models.preprocess import DataPreprocessor
from fastrcnn.models.profiles import get_profile
from fastrcnn.models.resnet import ResNet, ResNetV1d, ResNeXt
from fastrcnn.models.roi_head import StandardRoIHead
from fastrcnn.models.rpn import RPNHead
from fastrcnn.ops._checks import coordinates

BACKBONES = {"ResNet": ResNet, "ResNeXt": ResNeXt, "ResNetV1d": ResNetV1d}


class FasterRCNN(nn.Module):
    """MMDetection's FasterRCNN with torchvision's calling convention.

    backbone, neck (or None), rpn_head, roi_head: modules, or MMDetection's dicts of them; train_cfg, test_cfg:
    MMDetection's dicts with the keys rpn, rpn_proposal and rcnn. profile: whose semantics, "mmdet", "torchvision" or
    "detectron2".
    """

    def __init__(
        self,
        backbone: dict | nn.Module,
        neck: dict | nn.Module | None,
        rpn_head: dict | nn.Module,
        roi_head: dict | nn.Module,
        train_cfg: dict | None = None,
        test_cfg: dict | None = None,
        profile: str = "mmdet",
        min_size: int = 800,
        max_size: int = 1333,
        data_preprocessor: dict | None = None,
    ):
        super().__init__()
        train_cfg, test_cfg = train_cfg or {}, test_cfg or {}
        self.profile = get_profile(profile)
        self.data_preprocessor = DataPreprocessor(self.profile, min_size, max_size, **(data_preprocessor or {}))
        self.backbone = build(backbone, BACKBONES, "backbone")
        self.neck = None if neck is None else build(neck, {"FPN": FPN}, "neck")
        if not isinstance(rpn_head, nn.Module):
            cfgs = dict(train_cfg=train_cfg.get("rpn"), test_cfg=test_cfg.get("rpn"), profile=self.profile)
            rpn_head = build({**rpn_head, **cfgs}, {"RPNHead": RPNHead}, "rpn_head")
        if not isinstance(roi_head, nn.Module):
            cfgs = dict(train_cfg=train_cfg.get("rcnn"), test_cfg=test_cfg.get("rcnn"), profile=self.profile)
            roi_head = build({**roi_head, **cfgs}, {"StandardRoIHead": StandardRoIHead}, "roi_head")
        self.rpn_head, self.roi_head = rpn_head, roi_head
        self.rpn_proposal = {**self.rpn_head.test_cfg, "nms_pre": 2000, "max_per_img": self.profile.rpn_post_nms_train}
        self.rpn_proposal = settings(self.rpn_proposal, train_cfg.get("rpn_proposal"), "train_cfg rpn_proposal")
        self.class_names: list[str] | None = None
        self.built_with = self.profile.name, self.peer_options()

    @property
    def num_classes(self) -> int:
        return self.roi_head.bbox_head.num_classes

    @property
    def dtype(self) -> torch.dtype:
        return self.rpn_head.rpn_cls.weight.dtype

    def set_profile(self, name: str) -> None:
        """Takes over every default of a peer, those that are constructor arguments in MMDetection included."""
        self.profile = p = get_profile(name)
        self.data_preprocessor.set_profile(p)
        self.rpn_head.set_profile(p)
        self.roi_head.set_profile(p)
        extractor = self.roi_head.bbox_roi_extractor
        extractor.sampling_ratio, extractor.aligned = p.sampling_ratio, p.aligned
        self.rpn_head.loss_bbox = build_loss(p.rpn_loss_bbox)
        self.roi_head.bbox_head.loss_bbox = build_loss(p.roi_loss_bbox)
        assigner = {**self.rpn_head.train_cfg["assigner"], "min_pos_iou": p.min_pos_iou}
        self.rpn_head.train_cfg = {**self.rpn_head.train_cfg, "assigner": assigner}
        self.rpn_proposal["max_per_img"] = p.rpn_post_nms_train

    def peer_options(self) -> dict:
        """What a checkpoint decides beside its profile: the backbone's style, its norms' epsilon, the pixel statistics."""
        p = self.data_preprocessor
        options: dict = dict(data_preprocessor=dict(mean=p.mean, std=p.std, bgr_to_rgb=not p.bgr))
        if isinstance(self.backbone, ResNet):
            options["style"] = self.backbone.style
        eps = [m.eps for m in self.backbone.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        return {**options, "norm_eps": eps[0]} if eps else options

    def set_peer_options(self, data_preprocessor: dict | None = None, style: str | None = None, norm_eps=None) -> None:
        self.data_preprocessor.set_profile(self.profile, **(data_preprocessor or {}))
        if style is not None and isinstance(self.backbone, ResNet):
            self.backbone.set_style(style)
        for m in self.backbone.modules() if norm_eps is not None else ():
            if isinstance(m, nn.modules.batchnorm._BatchNorm):
                m.eps = norm_eps

    def extract_feat(self, batch: Tensor) -> tuple[Tensor, ...]:
        """batch [B, 3, H, W], normalised and padded -> the maps of the neck (or backbone), finest first."""
        feats = self.backbone(batch.to(self.dtype))
        return feats if self.neck is None else self.neck(feats)

    def _sizes(self, image_sizes, batch: Tensor) -> Tensor:
        sizes = torch.as_tensor(image_sizes, device=batch.device)
        if sizes.shape != (len(batch), 2):
            raise ValueError(f"image_sizes: expected [{len(batch)}, 2] (height, width), got {list(sizes.shape)}")
        return sizes

    def _propose(self, feats, sizes: Tensor, batch: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.rpn_head.predict(*self.rpn_head(feats), sizes, batch.shape[2:], self.rpn_head.test_cfg)

    @torch.no_grad()
    def proposals(self, batch: Tensor, image_sizes) -> list[tuple[Tensor, Tensor]]:
        """The RPN's (boxes [K, 4] xyxy pixels, scores [K]) of each image after NMS, by descending score.

        batch [B, 3, H, W], normalised and padded; image_sizes [B, 2] (height, width) before padding. Scores are sigmoids,
        in the detectron2 profile logits.
        """
        sizes = self._sizes(image_sizes, batch)
        boxes, scores, counts = self._propose(self.extract_feat(batch), sizes, batch)
        return [(b[:n], s[:n]) for b, s, n in zip(boxes, scores, counts.tolist())]

    @torch.no_grad()
    def predict(self, batch: Tensor, image_sizes, scale_factors=None) -> list[dict[str, Tensor]]:
        """Detections of each image: dict of boxes [N, 4] xyxy pixels, scores [N], labels [N], by descending score.

        batch [B, 3, H, W], normalised and padded; image_sizes [B, 2] (height, width) before padding; scale_factors [B, 2]
        (width, height), new over old: boxes come back in the old image's coordinates; None leaves them as they are.
        """
        sizes = self._sizes(image_sizes, batch)
        if scale_factors is not None:
            scale_factors = torch.as_tensor(scale_factors, dtype=torch.float32, device=batch.device)
        feats = self.extract_feat(batch)
        boxes, _, counts = self._propose(feats, sizes, batch)
        return self.roi_head.predict(feats, boxes, counts, sizes, scale_factors)

    def loss(self, batch: Tensor, image_sizes, targets: list[dict]) -> dict[str, Tensor]:
        """The four losses under the profile's names.

        batch [B, 3, H, W], normalised and padded; image_sizes [B, 2] (height, width) before padding; targets: dicts with
        boxes [M, 4] xyxy pixels of the batch, labels [M] (from 0, in the torchvision profile from 1), and optionally
        ignore_boxes [R, 4]. Raises ValueError naming the target.
        """
        sizes = self._sizes(image_sizes, batch)
        targets = self._checked(targets, batch)
        feats = self.extract_feat(batch)
        logits, deltas = self.rpn_head(feats)
        rpn_losses = self.rpn_head.loss(logits, deltas, sizes, batch.shape[2:], targets)
        with torch.no_grad():
            boxes, _, counts = self.rpn_head.predict(logits, deltas, sizes, batch.shape[2:], self.rpn_proposal)
        roi_losses = self.roi_head.loss(feats, boxes, counts, targets)
        return dict(zip(self.profile.losses, (*rpn_losses, *roi_losses)))

    def _checked(self, targets, batch: Tensor) -> list[dict]:
        """Targets with labels counted from 0, on the batch's device."""
        if targets is None or len(targets) != len(batch):
            got = None if targets is None else len(targets)
            raise ValueError(f"targets: expected one for each of the {len(batch)} images, got {got}")
        checked = []
        for i, target in enumerate(targets):
            missing = {"boxes", "labels"} - set(target)
            if missing:
                raise ValueError(f"targets[{i}]: expected the keys boxes and labels, missing {sorted(missing)}")
            boxes = coordinates(target["boxes"].to(batch.device)).reshape(-1, 4)
            labels = target["labels"].to(batch.device).long() - self.profile.label_offset
            if len(boxes) != len(labels):
                raise ValueError(f"targets[{i}]: {len(boxes)} boxes but {len(labels)} labels")
            degenerate = ~(boxes[:, 2:] > boxes[:, :2]).all(1)
            if bool(degenerate.any()):
                box = boxes[degenerate][0].tolist()
                raise ValueError(f"targets[{i}]: expected boxes with x2 > x1 and y2 > y1, got {box}")
            if bool(((labels < 0) | (labels >= self.num_classes)).any()):
                low = self.profile.label_offset
                raise ValueError(f"targets[{i}]: expected labels in {low}..{low + self.num_classes - 1}, "
                                 f"got {sorted(set(target['labels'].tolist()))}")  # fmt: skip
            one = dict(boxes=boxes, labels=labels)
            if "ignore_boxes" in target:
                one["ignore_boxes"] = coordinates(target["ignore_boxes"].to(batch.device)).reshape(-1, 4)
            checked.append(one)
        return checked

    def forward(self, images: Sequence[Tensor], targets: list[dict] | None = None):
        """torchvision's convention. images: list of [3, H, W] RGB, float in 0..1 (or uint8), of any sizes.

        Training: targets (boxes in the pixels of these images) -> dict of losses. Evaluation: list of dicts boxes [N, 4]
        xyxy pixels of the original image, labels [N], scores [N].
        """
        batch, sizes, scale_factors = self.data_preprocessor(images, self.dtype)
        if not self.training:
            return self.predict(batch, sizes, scale_factors)
        if targets is None:
            raise ValueError("targets: expected one for each image in training mode, got None")
        scaled = []
        for target, factor in zip(targets, scale_factors):
            target = dict(target)
            for key in ("boxes", "ignore_boxes"):
                if key in target:
                    target[key] = coordinates(target[key].to(batch.device)) * factor.repeat(2)
            scaled.append(target)
        return self.loss(batch, sizes, scaled)
