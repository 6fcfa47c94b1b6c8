"""A region proposal network on its own."""

import torch
from torch import Tensor, nn

from fastrcnn.models.base_detector import BaseDetector
from fastrcnn.models.build import build
from fastrcnn.models.frame import Frame
from fastrcnn.models.padded import Padded
from fastrcnn.models.rpn_head import RPNHead


class RPN(BaseDetector):
    """A region proposal network on its own (MMDetection's RPN), to train or to measure the recall of.

    rpn_head: an RPNHead or MMDetection's dict; its keys are rpn_head.*, and a state dict with MMDetection 3's bbox_head.*
    loads, too. train_cfg, test_cfg: MMDetection's dicts with the key rpn (or the RPN's settings themselves); the rest as in
    BaseDetector. Objects of every class are one class, label 0.
    """

    num_classes, reads_labels = 1, False

    def __init__(
        self,
        backbone: dict | nn.Module,
        neck: dict | nn.Module | None,
        rpn_head: dict | nn.Module,
        train_cfg: dict | None = None,
        test_cfg: dict | None = None,
        profile: str = "mmdet",
        min_size: int = 800,
        max_size: int = 1333,
        data_preprocessor: dict | None = None,
    ):
        arguments = dict(locals())
        super().__init__(backbone, neck, profile, min_size, max_size, data_preprocessor)
        if not isinstance(rpn_head, nn.Module):
            train_cfg, test_cfg = ((cfg or {}).get("rpn", cfg) for cfg in (train_cfg, test_cfg))
            cfgs = dict(train_cfg=train_cfg, test_cfg=test_cfg, profile=self.profile)
            rpn_head = build({**rpn_head, "num_classes": 1, **cfgs}, {"RPNHead": RPNHead}, "rpn_head")
        self.rpn_head = rpn_head
        self._built(self.rpn_head, arguments)
        self.register_load_state_dict_pre_hook(self._rename_bbox_head)

    @staticmethod
    def _rename_bbox_head(module, state_dict: dict, prefix: str, *args) -> None:
        for key in [k for k in state_dict if k.startswith(f"{prefix}bbox_head.")]:
            state_dict[key.replace("bbox_head.", "rpn_head.", 1)] = state_dict.pop(key)

    @property
    def label_offset(self) -> int:
        return 0

    def set_profile(self, name: str) -> None:
        super().set_profile(name)
        self.rpn_head.take_defaults(self.profile)

    @torch.no_grad()
    def proposals(self, batch: Tensor, image_sizes) -> list[tuple[Tensor, Tensor]]:
        """(boxes [K, 4] xyxy pixels, scores [K]) of each image after NMS, best first. As `FasterRCNN.proposals`."""
        return [(found["boxes"], found["scores"]) for found in self.predict(batch, image_sizes)]

    def detect(self, batch: Tensor, frame: Frame, waits: bool = False) -> tuple[Padded, Tensor]:
        head = self.rpn_head
        boxes, scores, counts = head.predict(*head(self.extract_feat(batch)), frame, head.test_cfg)
        found = Padded(boxes, scores, torch.zeros_like(scores, dtype=torch.int64), counts)
        return found, torch.zeros_like(counts, dtype=torch.bool)

    def losses(self, batch: Tensor, frame: Frame, targets: list[dict]) -> dict[str, Tensor]:
        outs = self.rpn_head(self.extract_feat(batch))
        return dict(zip(self.rpn_head.loss_names, self.rpn_head.loss(*outs, frame, targets)))
