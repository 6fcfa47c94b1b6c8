"""Backbones, necks, heads and Faster R-CNN, with MMDetection's arguments and state-dict keys."""

from fastrcnn.models.aug_test import aug_test, aug_test_rpn, det_tta
from fastrcnn.models.config import from_mmdet_config
from fastrcnn.models.faster_rcnn import FasterRCNN
from fastrcnn.models.fcos_head import FCOSHead
from fastrcnn.models.fpn import FPN
from fastrcnn.models.resnet import ResNet, ResNetV1d, ResNeXt
from fastrcnn.models.retinanet import RetinaHead, RetinaNet
from fastrcnn.models.roi_extractors import GenericRoIExtractor, SingleRoIExtractor
from fastrcnn.models.roi_head import (
    ConvFCBBoxHead,
    Shared2FCBBoxHead,
    Shared4Conv1FCBBoxHead,
    StandardRoIHead,
)
from fastrcnn.models.rpn import RPN, RPNHead
from fastrcnn.models.zoo import faster_rcnn, retinanet, rpn

__all__ = [
    "FPN",
    "RPN",
    "ConvFCBBoxHead",
    "FCOSHead",
    "FasterRCNN",
    "GenericRoIExtractor",
    "RPNHead",
    "ResNeXt",
    "ResNet",
    "ResNetV1d",
    "RetinaHead",
    "RetinaNet",
    "Shared2FCBBoxHead",
    "Shared4Conv1FCBBoxHead",
    "SingleRoIExtractor",
    "StandardRoIHead",
    "aug_test",
    "aug_test_rpn",
    "det_tta",
    "faster_rcnn",
    "from_mmdet_config",
    "retinanet",
    "rpn",
]
