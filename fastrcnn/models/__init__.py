"""Backbones, necks, heads and Faster R-CNN, with MMDetection's arguments and state-dict keys."""

from fastrcnn.models.config import from_mmdet_config
from fastrcnn.models.faster_rcnn import FasterRCNN
from fastrcnn.models.fpn import FPN
from fastrcnn.models.resnet import ResNet, ResNetV1d, ResNeXt
from fastrcnn.models.roi_head import (
    ConvFCBBoxHead,
    Shared2FCBBoxHead,
    Shared4Conv1FCBBoxHead,
    SingleRoIExtractor,
    StandardRoIHead,
)
from fastrcnn.models.rpn import RPNHead
from fastrcnn.models.zoo import faster_rcnn

__all__ = [
    "FPN",
    "ConvFCBBoxHead",
    "FasterRCNN",
    "RPNHead",
    "ResNeXt",
    "ResNet",
    "ResNetV1d",
    "Shared2FCBBoxHead",
    "Shared4Conv1FCBBoxHead",
    "SingleRoIExtractor",
    "StandardRoIHead",
    "faster_rcnn",
    "from_mmdet_config",
]
