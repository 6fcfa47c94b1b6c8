"""RetinaNet (Lin et al., "Focal Loss for Dense Object Detection", 2017): classes and boxes straight from every anchor."""

from torch import Tensor, nn

from fastrcnn.models.base_detector import BaseDetector
from fastrcnn.models.build import build
from fastrcnn.models.fpn import FPN
from fastrcnn.models.frame import Frame
from fastrcnn.models.padded import Padded
from fastrcnn.models.retina_head import RetinaHead


class RetinaNet(BaseDetector):
    """MMDetection's RetinaNet with torchvision's calling convention.

    backbone, neck, bbox_head: modules, or MMDetection's dicts of them; train_cfg, test_cfg: MMDetection's dicts; the rest
    as in BaseDetector. Labels count from 0 in every profile: torchvision's own RetinaNets have a column for their unused
    class 0 (num_classes=91 on COCO).
    """

    def __init__(
        self,
        backbone: dict | nn.Module,
        neck: dict | nn.Module | None,
        bbox_head: dict | nn.Module,
        train_cfg: dict | None = None,
        test_cfg: dict | None = None,
        profile: str = "mmdet",
        min_size: int = 800,
        max_size: int = 1333,
        data_preprocessor: dict | None = None,
    ):
        arguments = dict(locals())
        super().__init__(backbone, neck, profile, min_size, max_size, data_preprocessor)
        if not isinstance(bbox_head, nn.Module):
            cfgs = dict(train_cfg=train_cfg, test_cfg=test_cfg, profile=self.profile)
            bbox_head = build({**bbox_head, **cfgs}, {"RetinaHead": RetinaHead}, "bbox_head")
        self.bbox_head = bbox_head
        self._built(self.bbox_head, arguments)

    @property
    def num_classes(self) -> int:
        return self.bbox_head.num_classes

    @property
    def label_offset(self) -> int:
        return 0

    def set_profile(self, name: str) -> None:
        super().set_profile(name)
        self.bbox_head.take_defaults(self.profile)
        if isinstance(self.neck, FPN):
            self.neck.relu_before_extra_convs = self.profile.dense_extra_convs.get("relu_before_extra_convs", False)

    def detect(self, batch: Tensor, frame: Frame, waits: bool = False) -> tuple[Padded, Tensor]:
        return self.bbox_head.predict(*self.bbox_head(self.extract_feat(batch)), frame)

    def losses(self, batch: Tensor, frame: Frame, targets: list[dict]) -> dict[str, Tensor]:
        losses = self.bbox_head.loss(*self.bbox_head(self.extract_feat(batch)), frame, targets)
        return dict(zip(self.profile.dense_losses, losses))
