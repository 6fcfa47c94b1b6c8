"""Named models: MMDetection's configs/faster_rcnn and configs/retinanet as dicts, built with any profile."""

import copy

from fastrcnn.models.build import merge
from fastrcnn.models.faster_rcnn import FasterRCNN
from fastrcnn.models.profiles import get_profile
from fastrcnn.models.retinanet import RetinaNet
from fastrcnn.models.rpn import RPN

_BASIC, _BOTTLENECK = (64, 128, 256, 512), (256, 512, 1024, 2048)


def _resnet(depth: int, **options) -> dict:
    return dict(
        type="ResNet", depth=depth, num_stages=4, out_indices=(0, 1, 2, 3), frozen_stages=1,
        norm_cfg=dict(type="BN", requires_grad=True), norm_eval=True, style="pytorch", **options,
    )  # fmt: skip


def _resnext(depth: int, groups: int, base_width: int) -> dict:
    return {**_resnet(depth), "type": "ResNeXt", "groups": groups, "base_width": base_width}


_FROZEN_BN = dict(type="BN", requires_grad=False)
_CAFFE = _resnet(50) | dict(style="caffe", norm_cfg=_FROZEN_BN)

# name -> (backbone, its output channels)
BACKBONES = {
    "r18_fpn": (_resnet(18), _BASIC),
    "r34_fpn": (_resnet(34), _BASIC),
    "r50_fpn": (_resnet(50), _BOTTLENECK),
    "r101_fpn": (_resnet(101), _BOTTLENECK),
    "r152_fpn": (_resnet(152), _BOTTLENECK),
    "x50_32x4d_fpn": (_resnext(50, 32, 4), _BOTTLENECK),
    "x101_32x4d_fpn": (_resnext(101, 32, 4), _BOTTLENECK),
    "x101_32x8d_fpn": (_resnext(101, 32, 8) | dict(norm_cfg=_FROZEN_BN), _BOTTLENECK),
    "x101_64x4d_fpn": (_resnext(101, 64, 4), _BOTTLENECK),
    "r50_fpn_v2": (_resnet(50), _BOTTLENECK),
    "r50_c4": (_CAFFE | dict(num_stages=3, strides=(1, 2, 2), dilations=(1, 1, 1), out_indices=(2,)), ()),
    "r50_dc5": (_CAFFE | dict(strides=(1, 2, 2, 1), dilations=(1, 1, 1, 2), out_indices=(3,)), ()),
}
FASTER_RCNNS = tuple(BACKBONES)


def model_config(name: str, num_classes: int = 80, profile: str = "mmdet") -> dict:
    """The keyword arguments of FasterRCNN for a named model: MMDetection's `model` dict, with the profile's defaults."""
    if name not in BACKBONES:
        raise ValueError(f"name: unknown model {name!r}, expected one of {', '.join(FASTER_RCNNS)}")
    p = get_profile(profile)
    backbone, channels = copy.deepcopy(BACKBONES[name])
    if p.resnet_style == "caffe" and not name.startswith("x"):
        backbone["style"] = "caffe"  # its own ResNets have the stride on the first 1x1 convolution, its ResNeXts do not
    if not p.trains_norms:
        backbone["norm_cfg"] = _FROZEN_BN
    if name.endswith("_v2") and profile == "torchvision":  # which trains these norms, statistics and all
        backbone.update(norm_cfg=dict(type="BN", requires_grad=True), norm_eval=False)
    coder = dict(type="DeltaXYWHBBoxCoder", target_means=(0.0, 0.0, 0.0, 0.0))
    init = dict(type=p.neck_init, layer="Conv2d")
    roi_layer = dict(type="RoIAlign", output_size=7, sampling_ratio=p.sampling_ratio, aligned=p.aligned)
    config = dict(
        backbone=backbone,
        neck=dict(type="FPN", in_channels=list(channels), out_channels=256, num_outs=5, init_cfg=init),
        rpn_head=dict(
            type="RPNHead",
            in_channels=256,
            feat_channels=256,
            anchor_generator=dict(
                type="AnchorGenerator", scales=[8], ratios=[0.5, 1.0, 2.0], strides=[4, 8, 16, 32, 64]
            ),
            bbox_coder=dict(**coder, target_stds=(1.0, 1.0, 1.0, 1.0)),
            loss_cls=dict(type="CrossEntropyLoss", use_sigmoid=True, loss_weight=1.0),
            loss_bbox=dict(p.rpn_loss_bbox),
        ),
        roi_head=dict(
            type="StandardRoIHead",
            bbox_roi_extractor=dict(
                type="SingleRoIExtractor", roi_layer=roi_layer, out_channels=256, featmap_strides=[4, 8, 16, 32]
            ),
            bbox_head=dict(
                type="Shared2FCBBoxHead",
                in_channels=256,
                fc_out_channels=1024,
                roi_feat_size=7,
                num_classes=num_classes,
                bbox_coder=dict(**coder, target_stds=(0.1, 0.1, 0.2, 0.2)),
                loss_cls=dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=1.0),
                loss_bbox=dict(p.roi_loss_bbox),
            ),
        ),
        train_cfg=dict(
            rpn=dict(
                assigner=dict(
                    type="MaxIoUAssigner", pos_iou_thr=0.7, neg_iou_thr=0.3, min_pos_iou=p.min_pos_iou,
                    match_low_quality=True, ignore_iof_thr=-1,
                ),
                sampler=dict(type="RandomSampler", num=256, pos_fraction=0.5, neg_pos_ub=-1, add_gt_as_proposals=False),
                allowed_border=-1,
                pos_weight=-1,
            ),
            rpn_proposal=dict(nms_pre=2000, max_per_img=p.rpn_post_nms_train, min_bbox_size=0),
            rcnn=dict(),
        ),
        test_cfg=dict(
            rpn=dict(nms_pre=1000, max_per_img=1000, nms=dict(type="nms", iou_threshold=0.7), min_bbox_size=0),
            rcnn=dict(score_thr=0.05, nms=dict(type="nms", iou_threshold=0.5), max_per_img=100),
        ),
    )  # fmt: skip
    if name in ("r50_c4", "r50_dc5"):
        _single_level(config, name, profile)
    if name == "x101_32x8d_fpn" and profile != "torchvision":
        # Its ImageNet weights come from Caffe2, as does its input.
        statistics = dict(mean=(103.53, 116.28, 123.675), std=(57.375, 57.12, 58.395), bgr_to_rgb=False)
        config["data_preprocessor"] = statistics
    if name.endswith("_v2"):  # torchvision's second recipe (Li et al., 2021)
        norm = dict(type="BN", requires_grad=True)
        config["neck"]["norm_cfg"] = norm
        config["rpn_head"]["num_convs"] = 2
        config["roi_head"]["bbox_head"].update(type="Shared4Conv1FCBBoxHead", norm_cfg=norm)
    return config


def _single_level(config: dict, name: str, profile: str) -> None:
    """MMDetection's r50-caffe-c4 and r50-caffe-dc5: no neck, one level of stride 16, BGR input in the mmdet profile."""
    c4 = name == "r50_c4"
    channels = 1024 if c4 else 2048
    rpn, roi = config["rpn_head"], config["roi_head"]
    config["neck"] = None
    rpn.update(in_channels=channels, feat_channels=channels)
    rpn["anchor_generator"].update(scales=[2, 4, 8, 16, 32], strides=[16])
    roi["bbox_roi_extractor"].update(out_channels=channels, featmap_strides=[16])
    if c4:  # the last stage runs on the RoIs, 14 x 14 -> 7 x 7
        roi["bbox_roi_extractor"]["roi_layer"]["output_size"] = 14
        roi["shared_head"] = dict(type="ResLayer", depth=50, stage=3, stride=2, style="caffe", norm_cfg=_FROZEN_BN)
        roi["bbox_head"].pop("fc_out_channels")
        roi["bbox_head"].update(type="BBoxHead", with_avg_pool=True)
    roi["bbox_head"]["in_channels"] = 2048
    config["train_cfg"]["rpn"]["allowed_border"] = -1 if c4 else 0
    config["train_cfg"]["rpn_proposal"].update(nms_pre=12000, max_per_img=2000)
    config["test_cfg"]["rpn"]["nms_pre"] = 6000
    if profile == "mmdet":
        config["data_preprocessor"] = dict(mean=(103.53, 116.28, 123.675), std=(1.0, 1.0, 1.0), bgr_to_rgb=False)
    elif profile == "detectron2":  # without a pyramid it pads to the largest image of the batch only
        config["data_preprocessor"] = dict(pad_size_divisor=1)


_RETINA_BACKBONES = ("r18_fpn", "r50_fpn", "r101_fpn", "x101_32x4d_fpn", "x101_64x4d_fpn", "r50_fpn_v2")
RETINANETS = tuple(f"retinanet_{name}" for name in _RETINA_BACKBONES)
NAMES = (*FASTER_RCNNS, *RETINANETS)
RPNS = ("rpn_r50_fpn", "rpn_r101_fpn", "rpn_x101_32x4d_fpn", "rpn_x101_64x4d_fpn")


def retinanet_config(name: str, num_classes: int = 80, profile: str = "mmdet") -> dict:
    """The keyword arguments of RetinaNet for a named model: MMDetection's `model` dict, with the profile's defaults."""
    if name not in RETINANETS:
        raise ValueError(f"name: unknown model {name!r}, expected one of {', '.join(RETINANETS)}")
    p = get_profile(profile)
    base = model_config(name.removeprefix("retinanet_"), num_classes, profile)
    norm = dict(norm_cfg=dict(type="GN", num_groups=32)) if name.endswith("_v2") else {}
    head = dict(
        type="RetinaHead", num_classes=num_classes, in_channels=256, stacked_convs=4, feat_channels=256, **norm,
        anchor_generator=dict(type="AnchorGenerator", **p.dense_anchors),
        bbox_coder=dict(type="DeltaXYWHBBoxCoder", target_means=(0.0, 0.0, 0.0, 0.0), target_stds=(1.0, 1.0, 1.0, 1.0)),
        loss_cls=dict(type="FocalLoss", use_sigmoid=True, gamma=2.0, alpha=0.25, loss_weight=1.0),
        loss_bbox=dict(p.dense_loss_bbox),
    )  # fmt: skip
    if name.endswith("_v2"):  # torchvision's second recipe: boxes compared by their overlap, P6 from the backbone
        head.update(reg_decoded_bbox=True, loss_bbox=dict(type="GIoULoss", eps=1e-7, loss_weight=1.0))
    neck = {key: value for key, value in base["neck"].items() if key != "norm_cfg"}
    extra = {**p.dense_extra_convs, **(dict(add_extra_convs="on_input") if name.endswith("_v2") else {})}
    return dict(
        backbone=base["backbone"],
        neck={**neck, "start_level": 1, **extra},
        bbox_head=head,
        test_cfg=dict(min_bbox_size=0, max_per_img=p.dense_max_per_img),
    )


def rpn_config(name: str, num_classes: int = 1, profile: str = "mmdet") -> dict:
    """The keyword arguments of RPN for a named model: MMDetection's `model` dict, with the profile's defaults."""
    if name not in RPNS:
        raise ValueError(f"name: unknown model {name!r}, expected one of {', '.join(RPNS)}")
    if num_classes != 1:
        raise ValueError(f"num_classes: an RPN has one class, got {num_classes}")
    base = model_config(name.removeprefix("rpn_"), 1, profile)
    config = {key: base[key] for key in ("backbone", "neck", "rpn_head")}
    train_cfg, test_cfg = base["train_cfg"]["rpn"], {**base["test_cfg"]["rpn"], "nms_pre": 2000}
    return dict(config, train_cfg=dict(rpn=train_cfg), test_cfg=dict(rpn=test_cfg))


Detector = FasterRCNN | RetinaNet | RPN


def kind_of(name: str) -> type[Detector]:
    """The detector that a model's name stands for."""
    return RetinaNet if name.startswith("retinanet_") else RPN if name.startswith("rpn_") else FasterRCNN


def recipe(name: str, num_classes: int | None = None, profile: str | None = None, **overrides) -> Detector:
    """A named model with fresh weights; arguments and errors as in `fastrcnn.models.faster_rcnn`, without `weights`."""
    kind = kind_of(name)
    config_of = {FasterRCNN: model_config, RetinaNet: retinanet_config, RPN: rpn_config}[kind]
    profile = profile or ("torchvision" if name.endswith("_v2") else "mmdet")
    counted = () if num_classes is None else (num_classes,)
    model = kind(profile=profile, **merge(config_of(name, *counted, profile=profile), overrides))
    model.zoo_name, model.zoo_overrides = name, overrides  # what a saved file needs to build it again
    return model
