"""Faster R-CNN (Ren et al., 2015): preprocess -> backbone -> neck -> RPN -> RoI head."""

import torch
from torch import Tensor, nn

from fastrcnn.models.base_detector import BaseDetector
from fastrcnn.models.build import build, settings
from fastrcnn.models.fcos_head import FCOSHead
from fastrcnn.models.frame import Frame
from fastrcnn.models.padded import Padded
from fastrcnn.models.roi_head import StandardRoIHead
from fastrcnn.models.rpn_head import RPNHead, check_proposal_cfg


class FasterRCNN(BaseDetector):
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
        arguments = dict(locals())
        super().__init__(backbone, neck, profile, min_size, max_size, data_preprocessor)
        train_cfg = settings(dict.fromkeys(("rpn", "rpn_proposal", "rcnn")), train_cfg, "train_cfg")
        test_cfg = settings(dict.fromkeys(("rpn", "rcnn")), test_cfg, "test_cfg")
        if not isinstance(rpn_head, nn.Module):
            cfgs = dict(train_cfg=train_cfg["rpn"], test_cfg=test_cfg["rpn"], profile=self.profile)
            # One class whatever the config says, as MMDetection forces on every head that proposes.
            rpn_head = build(
                {**rpn_head, "num_classes": 1, **cfgs}, {"RPNHead": RPNHead, "FCOSHead": FCOSHead}, "rpn_head"
            )
        if not isinstance(roi_head, nn.Module):
            cfgs = dict(train_cfg=train_cfg["rcnn"], test_cfg=test_cfg["rcnn"], profile=self.profile)
            roi_head = build({**roi_head, **cfgs}, {"StandardRoIHead": StandardRoIHead}, "roi_head")
        self.rpn_head, self.roi_head = rpn_head, roi_head
        # Without settings of its own, training proposes as testing does; with some, the others have no effect.
        proposal = train_cfg["rpn_proposal"]
        unsaid = {} if proposal is None else dict(nms_pre=-1, min_bbox_size=-1)
        self.rpn_proposal = settings({**rpn_head.test_cfg, **unsaid}, proposal, "train_cfg rpn_proposal")
        check_proposal_cfg(self.rpn_proposal, "train_cfg rpn_proposal")
        self._built(self.rpn_head, arguments)

    @property
    def num_classes(self) -> int:
        return self.roi_head.bbox_head.num_classes

    def set_profile(self, name: str) -> None:
        default = self.profile.rpn_post_nms_train
        super().set_profile(name)
        p = self.profile
        self.rpn_head.take_defaults(p)
        self.roi_head.take_defaults(p)
        if self.rpn_proposal["max_per_img"] == default:  # C4 and DC5 have their own
            self.rpn_proposal["max_per_img"] = p.rpn_post_nms_train

    @torch.no_grad()
    def proposals(self, batch: Tensor, image_sizes) -> list[tuple[Tensor, Tensor]]:
        """The RPN's (boxes [K, 4] xyxy pixels, scores [K]) of each image after NMS, by descending score.

        batch [B, 3, H, W], normalised and padded; image_sizes [B, 2] (height, width) before padding. Scores are sigmoids,
        in the detectron2 profile logits.
        """
        frame, head = Frame.of(batch, image_sizes), self.rpn_head
        boxes, scores, counts = head.predict(*head(self.extract_feat(batch)), frame, head.test_cfg)
        return [(b[:n], s[:n]) for b, s, n in zip(boxes, scores, counts.tolist())]

    def detect(self, batch: Tensor, frame: Frame, waits: bool = False) -> tuple[Padded, Tensor]:
        feats, head = self.extract_feat(batch), self.rpn_head
        # Proposals stay in pixels of the batch, whatever the detections come back in.
        boxes, _, counts = head.predict(*head(feats), frame._replace(factors=None), head.test_cfg)
        if waits:  # rows that no image fills would go through the box head for nothing
            boxes = boxes[:, : max(int(counts.max()), 1)]
        return self.roi_head.predict(feats, boxes, counts, frame)

    def losses(self, batch: Tensor, frame: Frame, targets: list[dict]) -> dict[str, Tensor]:
        feats = self.extract_feat(batch)
        outs = self.rpn_head(feats)
        rpn_losses = self.rpn_head.loss(*outs, frame, targets)
        with torch.no_grad():
            boxes, _, counts = self.rpn_head.predict(*outs, frame, self.rpn_proposal)
        roi_losses = self.roi_head.loss(feats, boxes, counts, targets)
        return dict(zip((*self.rpn_head.loss_names, *self.profile.losses[2:]), (*rpn_losses, *roi_losses)))
