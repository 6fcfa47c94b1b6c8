"""Named models with weights: `faster_rcnn("r50_fpn", weights="coco")`."""

from fastrcnn.models.faster_rcnn import FasterRCNN
from fastrcnn.models.retinanet import RetinaNet
from fastrcnn.models.rpn import RPN
from fastrcnn.weights.load import coco_address, infer_model, load_weights
from fastrcnn.zoo.recipes import FASTER_RCNNS, RETINANETS, RPNS, recipe

_NAMES = {FasterRCNN: FASTER_RCNNS, RetinaNet: RETINANETS, RPN: RPNS}


def _named(kind, name, num_classes, profile, weights, overrides):
    if name not in _NAMES[kind]:
        raise ValueError(f"name: unknown model {name!r}, expected one of {', '.join(_NAMES[kind])}")
    return named_model(name, num_classes, profile, weights, **overrides)


def faster_rcnn(
    name: str, num_classes: int | None = None, profile: str | None = None, weights: str | None = None, **overrides
) -> FasterRCNN:
    """A named Faster R-CNN, in evaluation mode when `weights` are given.

    num_classes counts foreground classes (default: those of the weights, else 80). profile: "mmdet" (default;
    "torchvision" for r50_fpn_v2), "torchvision" or "detectron2". weights: a checkpoint file or https address of any of the
    three peers, whose profile is then taken over, or "coco" for published ones (see `fastrcnn models`), of the peer that
    `profile` names. overrides: FasterRCNN's arguments, dicts laid over the named model's own, as in
    `faster_rcnn("r50_fpn", neck=dict(out_channels=128), test_cfg=dict(rcnn=dict(score_thr=0.3)), min_size=640)`.
    Raises ValueError for an unknown name, profile or type, TypeError for an unknown argument.
    """
    return _named(FasterRCNN, name, num_classes, profile, weights, overrides)


def retinanet(
    name: str, num_classes: int | None = None, profile: str | None = None, weights: str | None = None, **overrides
) -> RetinaNet:
    """A named RetinaNet ("retinanet_r50_fpn"); arguments and errors as in `faster_rcnn`."""
    return _named(RetinaNet, name, num_classes, profile, weights, overrides)


def rpn(
    name: str, num_classes: int | None = None, profile: str | None = None, weights: str | None = None, **overrides
) -> RPN:
    """A named RPN on its own ("rpn_r50_fpn"), of one class; arguments and errors as in `faster_rcnn`."""
    return _named(RPN, name, num_classes, profile, weights, overrides)


def named_model(
    name: str, num_classes: int | None = None, profile: str | None = None, weights: str | None = None, **overrides
) -> FasterRCNN | RetinaNet | RPN:
    """`retinanet`, `rpn` or `faster_rcnn`, as the name says."""
    source = coco_address(name, profile) if weights == "coco" else weights
    if source is not None and num_classes is None:
        return infer_model(source, name, **overrides)
    model = recipe(name, num_classes, profile, **overrides)
    return model if source is None else load_weights(model, source).eval()
