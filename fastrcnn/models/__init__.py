"""Backbones, necks, heads and detectors, with MMDetection's arguments and state-dict keys.

This face also hands on the builders that stand above the networks: named models, configurations, test-time augmentation.
"""

from fastrcnn.inference.augment import aug_test, aug_test_rpn, det_tta
from fastrcnn.models.bbox_head import ConvFCBBoxHead, Shared2FCBBoxHead, Shared4Conv1FCBBoxHead
from fastrcnn.models.faster_rcnn import FasterRCNN
from fastrcnn.models.fcos_head import FCOSHead
from fastrcnn.models.fpn import FPN
from fastrcnn.models.resnet import ResNet, ResNetV1d, ResNeXt
from fastrcnn.models.retina_head import RetinaHead
from fastrcnn.models.retinanet import RetinaNet
from fastrcnn.models.roi_extractors import GenericRoIExtractor, SingleRoIExtractor
from fastrcnn.models.roi_head import StandardRoIHead
from fastrcnn.models.rpn import RPN
from fastrcnn.models.rpn_head import RPNHead
from fastrcnn.weights.named import faster_rcnn, retinanet, rpn
from fastrcnn.zoo.mmdet_config import from_mmdet_config

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
