"""Named models: MMDetection's configs/faster_rcnn, configs/retinanet and configs/rpn as dicts, built with any profile.

One row a model: its kind, its backbone, and what it has that the plain one of its kind has not, as MMDetection lays a
config over its base. `model_config` is the plain one, with the profile's defaults.
"""

import copy
from dataclasses import dataclass, field

from fastrcnn.models.build import merge
from fastrcnn.models.faster_rcnn import FasterRCNN
from fastrcnn.models.profiles import Profile, get_profile
from fastrcnn.models.retinanet import RetinaNet
from fastrcnn.models.rpn import RPN

Detector = FasterRCNN | RetinaNet | RPN
DETECTORS = {"FasterRCNN": FasterRCNN, "RetinaNet": RetinaNet, "RPN": RPN}


@dataclass(frozen=True)
class Recipe:
    kind: type[Detector]
    backbone: dict
    channels: tuple[int, ...] = ()  # of the backbone's maps, for a pyramid
    changes: dict = field(default_factory=dict)  # laid over the plain model of this kind
    in_profile: dict[str, dict] = field(default_factory=dict)  # then, in one profile alone
    profile: str = "mmdet"  # where none is asked for


def _resnet(depth: int, **options) -> dict:
    return dict(
        type="ResNet", depth=depth, num_stages=4, out_indices=(0, 1, 2, 3), frozen_stages=1,
        norm_cfg=dict(type="BN", requires_grad=True), norm_eval=True, style="pytorch",
    ) | options  # fmt: skip


def _resnext(depth: int, groups: int, base_width: int, **options) -> dict:
    return _resnet(depth, type="ResNeXt", groups=groups, base_width=base_width, **options)


_BASIC, _BOTTLENECK = (64, 128, 256, 512), (256, 512, 1024, 2048)
_BN, _FROZEN_BN = dict(type="BN", requires_grad=True), dict(type="BN", requires_grad=False)
_ZEROS, _ONES = (0.0, 0.0, 0.0, 0.0), (1.0, 1.0, 1.0, 1.0)
_CAFFE = dict(style="caffe", norm_cfg=_FROZEN_BN)
_CAFFE_INPUT = dict(mean=(103.53, 116.28, 123.675), std=(1.0, 1.0, 1.0), bgr_to_rgb=False)
_CAFFE2_INPUT = dict(data_preprocessor=dict(_CAFFE_INPUT, std=(57.375, 57.12, 58.395)))

# torchvision's second recipes (Li et al., 2021), which train the backbone's norms, statistics and all.
_V2_NORMS = dict(torchvision=dict(backbone=dict(norm_cfg=_BN, norm_eval=False)))
_V2 = dict(
    neck=dict(norm_cfg=_BN),
    rpn_head=dict(num_convs=2),
    roi_head=dict(bbox_head=dict(type="Shared4Conv1FCBBoxHead", norm_cfg=_BN)),
)
_RETINANET_V2 = dict(  # boxes compared by their overlap, P6 from the backbone
    neck=dict(add_extra_convs="on_input"),
    bbox_head=dict(norm_cfg=dict(type="GN", num_groups=32), reg_decoded_bbox=True,
                   loss_bbox=dict(_delete_=True, type="GIoULoss", eps=1e-7, loss_weight=1.0)),
)  # fmt: skip


def _single_level(channels: int, allowed_border: int, **roi_head) -> dict:
    """MMDetection's r50-caffe-c4 and r50-caffe-dc5: no neck, one level of stride 16."""
    generator = dict(scales=[2, 4, 8, 16, 32], strides=[16])
    extractor = dict(out_channels=channels, featmap_strides=[16])
    return dict(
        neck=None,
        rpn_head=dict(in_channels=channels, feat_channels=channels, anchor_generator=generator),
        roi_head=merge(dict(bbox_roi_extractor=extractor, bbox_head=dict(in_channels=2048)), roi_head),
        train_cfg=dict(rpn=dict(allowed_border=allowed_border), rpn_proposal=dict(nms_pre=12000, max_per_img=2000)),
        test_cfg=dict(rpn=dict(nms_pre=6000)),
    )


_C4 = _single_level(  # the last stage runs on the RoIs, 14 x 14 -> 7 x 7
    1024,
    -1,
    bbox_roi_extractor=dict(roi_layer=dict(output_size=14)),
    shared_head=dict(type="ResLayer", depth=50, stage=3, stride=2, **_CAFFE),
    bbox_head=dict(type="BBoxHead", with_avg_pool=True),
)
_DC5 = _single_level(2048, 0)
# BGR input in MMDetection; without a pyramid Detectron2 pads to the largest image of the batch only.
_ALONE = dict(mmdet=dict(data_preprocessor=_CAFFE_INPUT), detectron2=dict(data_preprocessor=dict(pad_size_divisor=1)))

_C4_BODY = _resnet(50, **_CAFFE, num_stages=3, strides=(1, 2, 2), dilations=(1, 1, 1), out_indices=(2,))
_DC5_BODY = _resnet(50, **_CAFFE, strides=(1, 2, 2, 1), dilations=(1, 1, 1, 2), out_indices=(3,))
_X101_32X8D = _resnext(101, 32, 8, norm_cfg=_FROZEN_BN)  # its ImageNet weights come from Caffe2, as does its input

RECIPES = {
    "r18_fpn": Recipe(FasterRCNN, _resnet(18), _BASIC),
    "r34_fpn": Recipe(FasterRCNN, _resnet(34), _BASIC),
    "r50_fpn": Recipe(FasterRCNN, _resnet(50), _BOTTLENECK),
    "r101_fpn": Recipe(FasterRCNN, _resnet(101), _BOTTLENECK),
    "r152_fpn": Recipe(FasterRCNN, _resnet(152), _BOTTLENECK),
    "x50_32x4d_fpn": Recipe(FasterRCNN, _resnext(50, 32, 4), _BOTTLENECK),
    "x101_32x4d_fpn": Recipe(FasterRCNN, _resnext(101, 32, 4), _BOTTLENECK),
    "x101_32x8d_fpn": Recipe(
        FasterRCNN, _X101_32X8D, _BOTTLENECK, in_profile=dict(mmdet=_CAFFE2_INPUT, detectron2=_CAFFE2_INPUT)
    ),
    "x101_64x4d_fpn": Recipe(FasterRCNN, _resnext(101, 64, 4), _BOTTLENECK),
    "r50_fpn_v2": Recipe(FasterRCNN, _resnet(50), _BOTTLENECK, _V2, _V2_NORMS, "torchvision"),
    "r50_c4": Recipe(FasterRCNN, _C4_BODY, (), _C4, _ALONE),
    "r50_dc5": Recipe(FasterRCNN, _DC5_BODY, (), _DC5, _ALONE),
    "retinanet_r18_fpn": Recipe(RetinaNet, _resnet(18), _BASIC),
    "retinanet_r50_fpn": Recipe(RetinaNet, _resnet(50), _BOTTLENECK),
    "retinanet_r101_fpn": Recipe(RetinaNet, _resnet(101), _BOTTLENECK),
    "retinanet_x101_32x4d_fpn": Recipe(RetinaNet, _resnext(101, 32, 4), _BOTTLENECK),
    "retinanet_x101_64x4d_fpn": Recipe(RetinaNet, _resnext(101, 64, 4), _BOTTLENECK),
    "retinanet_r50_fpn_v2": Recipe(RetinaNet, _resnet(50), _BOTTLENECK, _RETINANET_V2, _V2_NORMS, "torchvision"),
    "rpn_r50_fpn": Recipe(RPN, _resnet(50), _BOTTLENECK),
    "rpn_r101_fpn": Recipe(RPN, _resnet(101), _BOTTLENECK),
    "rpn_x101_32x4d_fpn": Recipe(RPN, _resnext(101, 32, 4), _BOTTLENECK),
    "rpn_x101_64x4d_fpn": Recipe(RPN, _resnext(101, 64, 4), _BOTTLENECK),
}


def names_of(kind: type[Detector]) -> tuple[str, ...]:
    return tuple(name for name, row in RECIPES.items() if row.kind is kind)


FASTER_RCNNS, RETINANETS, RPNS = names_of(FasterRCNN), names_of(RetinaNet), names_of(RPN)
NAMES = (*FASTER_RCNNS, *RETINANETS)


def _rpn_head(p: Profile) -> dict:
    return dict(
        type="RPNHead",
        in_channels=256,
        feat_channels=256,
        anchor_generator=dict(type="AnchorGenerator", scales=[8], ratios=[0.5, 1.0, 2.0], strides=[4, 8, 16, 32, 64]),
        bbox_coder=dict(type="DeltaXYWHBBoxCoder", target_means=_ZEROS, target_stds=_ONES),
        loss_cls=dict(type="CrossEntropyLoss", use_sigmoid=True, loss_weight=1.0),
        loss_bbox=dict(p.rpn_loss_bbox),
    )


def _rpn_cfgs(p: Profile, nms_pre: int) -> tuple[dict, dict]:
    """(train_cfg, test_cfg) of an RPN."""
    assigner = dict(
        type="MaxIoUAssigner", pos_iou_thr=0.7, neg_iou_thr=0.3, min_pos_iou=p.min_pos_iou, match_low_quality=True,
        ignore_iof_thr=-1,
    )  # fmt: skip
    sampler = dict(type="RandomSampler", num=256, pos_fraction=0.5, neg_pos_ub=-1, add_gt_as_proposals=False)
    nms = dict(type="nms", iou_threshold=0.7)
    train_cfg = dict(assigner=assigner, sampler=sampler, allowed_border=-1, pos_weight=-1)
    return train_cfg, dict(nms_pre=nms_pre, max_per_img=1000, nms=nms, min_bbox_size=0)


def _faster_rcnn(p: Profile, num_classes: int) -> dict:
    roi_layer = dict(type="RoIAlign", output_size=7, sampling_ratio=p.sampling_ratio, aligned=p.aligned)
    train_cfg, test_cfg = _rpn_cfgs(p, 1000)
    return dict(
        rpn_head=_rpn_head(p),
        roi_head=dict(
            type="StandardRoIHead",
            bbox_roi_extractor=dict(
                type="SingleRoIExtractor", roi_layer=roi_layer, out_channels=256, featmap_strides=[4, 8, 16, 32]
            ),
            bbox_head=dict(
                type="Shared2FCBBoxHead",
                in_channels=256,
                roi_feat_size=7,
                num_classes=num_classes,
                bbox_coder=dict(type="DeltaXYWHBBoxCoder", target_means=_ZEROS, target_stds=(0.1, 0.1, 0.2, 0.2)),
                loss_cls=dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=1.0),
                loss_bbox=dict(p.roi_loss_bbox),
            ),
        ),
        train_cfg=dict(
            rpn=train_cfg,
            rpn_proposal=dict(nms_pre=2000, max_per_img=p.rpn_post_nms_train, min_bbox_size=0),
            rcnn=dict(),
        ),
        test_cfg=dict(
            rpn=test_cfg,
            rcnn=dict(score_thr=0.05, nms=dict(type="nms", iou_threshold=0.5), max_per_img=100),
        ),
    )


def _retinanet(p: Profile, num_classes: int) -> dict:
    return dict(
        neck=dict(start_level=1, **p.dense_extra_convs),
        bbox_head=dict(
            type="RetinaHead",
            num_classes=num_classes,
            in_channels=256,
            stacked_convs=4,
            feat_channels=256,
            anchor_generator=dict(type="AnchorGenerator", **p.dense_anchors),
            bbox_coder=dict(type="DeltaXYWHBBoxCoder", target_means=_ZEROS, target_stds=_ONES),
            loss_cls=dict(type="FocalLoss", use_sigmoid=True, gamma=2.0, alpha=0.25, loss_weight=1.0),
            loss_bbox=dict(p.dense_loss_bbox),
        ),
        test_cfg=dict(min_bbox_size=0, max_per_img=p.dense_max_per_img),
    )


def _rpn(p: Profile, num_classes: int) -> dict:
    if num_classes != 1:
        raise ValueError(f"num_classes: an RPN has one class, got {num_classes}")
    train_cfg, test_cfg = _rpn_cfgs(p, 2000)
    return dict(rpn_head=_rpn_head(p), train_cfg=dict(rpn=train_cfg), test_cfg=dict(rpn=test_cfg))


_PLAIN = {FasterRCNN: (_faster_rcnn, 80), RetinaNet: (_retinanet, 80), RPN: (_rpn, 1)}


def model_config(name: str, num_classes: int | None = None, profile: str = "mmdet") -> dict:
    """The keyword arguments of a named model's class: MMDetection's `model` dict, with the profile's defaults.

    num_classes: default COCO's 80, an RPN's one. Raises ValueError for an unknown name or profile.
    """
    if name not in RECIPES:
        raise ValueError(f"name: unknown model {name!r}, expected one of {', '.join(RECIPES)}")
    row, p = RECIPES[name], get_profile(profile)
    plain, classes = _PLAIN[row.kind]
    body = dict(row.backbone) if p.trains_norms else dict(row.backbone, norm_cfg=_FROZEN_BN)
    if p.resnet_style == "caffe" and body["type"] == "ResNet":
        body["style"] = "caffe"  # its own ResNets have the stride on the first 1x1 convolution, its ResNeXts do not
    init = dict(type=p.neck_init, layer="Conv2d")
    neck = dict(type="FPN", in_channels=list(row.channels), out_channels=256, num_outs=5, init_cfg=init)
    base = merge(dict(backbone=body, neck=neck), plain(p, classes if num_classes is None else num_classes))
    return copy.deepcopy(merge(merge(base, row.changes), row.in_profile.get(profile, {})))


def recipe_config(name: str, num_classes: int | None, profile: str, *overrides: dict) -> dict:
    """`model_config` with its class as `type`, its profile, and dicts laid over it one after the other: what `detector`
    builds."""
    config = model_config(name, num_classes, profile)
    for changes in overrides:
        config = merge(config, changes)
    return {"type": RECIPES[name].kind.__name__, "profile": profile, **config}


def detector(config: dict) -> Detector:
    """The detector of a configuration: dict(type="FasterRCNN", backbone=...). Raises what its class raises."""
    config = dict(config)
    return DETECTORS[config.pop("type")](**config)


def recipe(name: str, num_classes: int | None = None, profile: str | None = None, **overrides) -> Detector:
    """A named model with fresh weights; arguments and errors as in `fastrcnn.models.faster_rcnn`, without `weights`."""
    profile = profile or (RECIPES[name].profile if name in RECIPES else "mmdet")
    return detector(recipe_config(name, num_classes, profile, overrides))
