"""One golden for each item in which the three peers differ. Those that need a network's maps are in test_rpn.py,
test_roi_head.py and test_preprocess.py."""

import math
from dataclasses import FrozenInstanceError

import pytest
import torch

from fastrcnn.models import faster_rcnn
from fastrcnn.models.profiles import PROFILES, get_profile

NAMES = ("mmdet", "torchvision", "detectron2")


@pytest.mark.parametrize(
    "field, mmdet, torchvision, detectron2",
    [
        ("bgr", False, False, True),
        ("mean", (123.675, 116.28, 103.53), (0.485, 0.456, 0.406), (103.53, 116.28, 123.675)),
        ("std", (58.395, 57.12, 57.375), (0.229, 0.224, 0.225), (1.0, 1.0, 1.0)),
        ("resize", "opencv", "interpolate", "pillow"),
        ("round_anchors", False, True, False),
        ("strides_from_grid", False, True, False),
        ("symmetric_clip", True, False, False),
        ("rpn_topk_on", "sigmoid", "logits", "logits"),
        ("rpn_nms_on", "sigmoid", "sigmoid", "logits"),
        ("rpn_post_nms_train", 1000, 2000, 1000),
        ("low_quality", "last_gt", "argmax", "argmax"),
        ("min_pos_iou", 0.3, 0.0, 0.0),
        ("sampling_ratio", 0, 2, 0),
        ("aligned", True, False, True),
        ("rescale_before_nms", True, False, False),
        ("anchors_inside", True, False, False),
        ("rpn_divisor", "floored", "sampled", "num"),
        ("min_box_size", None, 1e-2, None),
        ("gt_first", True, False, False),
        ("label_offset", 0, 1, 0),
    ],
)
def test_golden(field, mmdet, torchvision, detectron2):
    assert [getattr(PROFILES[n], field) for n in NAMES] == [mmdet, torchvision, detectron2]


@pytest.mark.parametrize(
    "name, losses",
    [
        ("mmdet", {"loss_rpn_cls", "loss_rpn_bbox", "loss_cls", "loss_bbox"}),
        ("torchvision", {"loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg"}),
        ("detectron2", {"loss_rpn_cls", "loss_rpn_loc", "loss_cls", "loss_box_reg"}),
    ],
)
def test_loss_names(name, losses):
    assert set(PROFILES[name].losses) == losses


def test_torchvisions_least_proposal_is_a_thousandth_of_a_pixel():
    least = torch.tensor(1e-3)  # torchvision keeps sizes >= this in float32; ours keeps sizes > rpn_min_size
    limit = PROFILES["torchvision"].rpn_min_size
    assert least > limit
    assert not torch.nextafter(least, torch.tensor(0.0)) > torch.tensor(limit)
    assert PROFILES["mmdet"].rpn_min_size < 0 and PROFILES["detectron2"].rpn_min_size == 0


def test_an_unknown_profile_is_refused_and_the_known_ones_are_constant():
    with pytest.raises(ValueError, match=r"profile.*mmdet.*torchvision.*detectron2.*caffe2"):
        get_profile("caffe2")
    with pytest.raises(FrozenInstanceError):
        get_profile("mmdet").aligned = False


def state_of(model) -> dict:
    """All that a profile decides in a built model."""
    roi, rpn = model.roi_head, model.rpn_head
    return dict(
        profiles=(model.profile, rpn.profile, roi.profile, model.data_preprocessor.profile),
        extractor=(roi.bbox_roi_extractor.sampling_ratio, roi.bbox_roi_extractor.aligned),
        extractor_profile=roi.bbox_roi_extractor.profile,
        clip=(rpn.bbox_coder.symmetric_clip, roi.bbox_head.bbox_coder.symmetric_clip),
        losses=[(type(m).__name__, getattr(m, "beta", None)) for m in (rpn.loss_bbox, roi.bbox_head.loss_bbox)],
        assigner=rpn.train_cfg["assigner"]["min_pos_iou"],
        proposals=(model.rpn_proposal["nms_pre"], model.rpn_proposal["max_per_img"]),
        statistics=(model.data_preprocessor.mean, model.data_preprocessor.std),
        anchors=[a.tolist() for a in rpn.base_anchors(torch.device("cpu"))],
    )


@pytest.mark.parametrize("start", NAMES)
@pytest.mark.parametrize("end", NAMES)
def test_set_profile_is_the_same_as_building_with_it(start, end):
    small = dict(backbone=dict(base_channels=4), neck=dict(in_channels=[4, 8, 16, 32]))
    model, expected = (faster_rcnn("r18_fpn", 3, profile, **small) for profile in (start, end))
    model.set_profile(end)
    assert state_of(model) == state_of(expected)


def test_what_a_model_built_with_each_profile_holds():
    small = dict(backbone=dict(base_channels=4), neck=dict(in_channels=[4, 8, 16, 32]))
    states = [state_of(faster_rcnn("r18_fpn", 3, profile, **small)) for profile in NAMES]
    assert [s["extractor"] for s in states] == [(0, True), (2, False), (0, True)]
    assert [s["clip"] for s in states] == [(True, True), (False, False), (False, False)]
    smooth = [("SmoothL1Loss", 1 / 9)] * 2
    assert [s["losses"] for s in states] == [[("L1Loss", None)] * 2, smooth, [("L1Loss", None)] * 2]
    assert [s["proposals"] for s in states] == [(2000, 1000), (2000, 2000), (2000, 1000)]
    root = 16 * math.sqrt(2)
    assert states[0]["anchors"][0][0] == pytest.approx([-root, -root / 2, root, root / 2])
    assert states[1]["anchors"][0][0] == [-23, -11, 23, 11]
    assert states[2]["anchors"] == states[0]["anchors"]
