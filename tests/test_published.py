"""The table of published checkpoints, and which of them weights="coco" stands for."""

import pytest
import torch
from torchvision.models import detection

from fastrcnn.models.profiles import PROFILES
from fastrcnn.weights import coco_address
from fastrcnn.weights.named import named_model
from fastrcnn.zoo.published import PEERS, PUBLISHED, coco_weights, published_for
from fastrcnn.zoo.recipes import NAMES, RPNS

HOSTS = {
    "mmdet": "https://download.openmmlab.com/mmdetection/v2.0/",
    "torchvision": "https://download.pytorch.org/models/",
    "detectron2": "https://dl.fbaipublicfiles.com/detectron2/COCO-Detection/",
}
TORCHVISION = {
    "fasterrcnn_resnet50_fpn": detection.FasterRCNN_ResNet50_FPN_Weights.COCO_V1,
    "fasterrcnn_resnet50_fpn_v2": detection.FasterRCNN_ResNet50_FPN_V2_Weights.COCO_V1,
    "retinanet_resnet50_fpn": detection.RetinaNet_ResNet50_FPN_Weights.COCO_V1,
    "retinanet_resnet50_fpn_v2": detection.RetinaNet_ResNet50_FPN_V2_Weights.COCO_V1,
}


def names(rows) -> list[str]:
    return [p.name for p in rows]


def test_every_peer_is_there_and_nothing_twice():
    assert {p.profile for p in PUBLISHED} == set(PEERS) == set(PROFILES)
    assert len(set(names(PUBLISHED))) == len({p.address for p in PUBLISHED}) == len(PUBLISHED) > 90
    assert len({p.digest for p in PUBLISHED}) == len(PUBLISHED)
    assert len(set(PUBLISHED)) == len(PUBLISHED)  # hashable, overrides and all


@pytest.mark.parametrize("row", PUBLISHED, ids=names(PUBLISHED))
def test_the_facts_of_a_row(row):
    assert row.address.startswith(HOSTS[row.profile]) and row.address.endswith((".pth", ".pkl"))
    assert 0 < row.ap < 100 and row.ap == round(row.ap, 1)
    assert row.metric == ("AR@1000" if row.model in RPNS else "AP")
    assert row.model in (*NAMES, *RPNS)
    algorithm, digits = row.digest
    assert (algorithm, len(digits)) == (("md5", 6) if row.profile == "detectron2" else ("sha256", 8))
    assert row.address.rsplit(".", 1)[0].endswith(digits)
    assert row.licence in ("Apache-2.0", "BSD-3-Clause", "CC-BY-SA-3.0")
    assert row.licence_of == ("weights" if row.profile == "detectron2" else "code")


def build(row):
    with torch.device("meta"):
        return named_model(row.model, row.num_classes, row.profile, **row.overrides)


@pytest.mark.parametrize("row", PUBLISHED, ids=names(PUBLISHED))
def test_every_named_model_can_be_built(row):
    model = build(row)
    assert model.profile.name == row.profile and model.num_classes == row.num_classes


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision_says_the_same(name):
    weights = TORCHVISION[name]
    row = next(p for p in PUBLISHED if p.name == name)
    assert row.address == weights.url and row.ap == weights.meta["_metrics"]["COCO-val2017"]["box_map"]
    assert row.profile == "torchvision"
    background = 0 if name.startswith("retinanet") else 1  # a RetinaNet has no background, and gives 0 an output
    assert row.num_classes == len(weights.meta["categories"]) - background


def test_the_caffe_style_is_told_from_the_other():
    row = next(p for p in PUBLISHED if p.name == "faster_rcnn/faster-rcnn_r50-caffe_fpn_1x_coco")
    model = build(row)
    assert model.backbone.style == "caffe" and model.data_preprocessor.bgr
    assert model.data_preprocessor.std == (1.0, 1.0, 1.0)
    assert row not in published_for("r50_fpn")


@pytest.mark.parametrize(
    "name, profile, config",
    [
        ("r50_fpn", None, "fasterrcnn_resnet50_fpn"),
        ("r50_fpn", "torchvision", "fasterrcnn_resnet50_fpn"),
        ("r50_fpn_v2", None, "fasterrcnn_resnet50_fpn_v2"),
        ("r50_fpn", "mmdet", "resnet_strikes_back/faster-rcnn_r50-rsb-pre_fpn_1x_coco"),
        ("r50_fpn", "detectron2", "COCO-Detection/faster_rcnn_R_50_FPN_3x"),
        ("r101_fpn", None, "faster_rcnn/faster-rcnn_r101_fpn_ms-3x_coco"),
        ("x101_32x4d_fpn", None, "faster_rcnn/faster-rcnn_x101-32x4d_fpn_ms-3x_coco"),
        ("x101_64x4d_fpn", "mmdet", "faster_rcnn/faster-rcnn_x101-64x4d_fpn_ms-3x_coco"),
        ("r50_c4", None, "faster_rcnn/faster-rcnn_r50-caffe-c4_ms-1x_coco"),
        ("r50_c4", "detectron2", "COCO-Detection/faster_rcnn_R_50_C4_3x"),
        ("r50_dc5", None, "faster_rcnn/faster-rcnn_r50-caffe-dc5_ms-3x_coco"),
        ("rpn_r50_fpn", None, "rpn/rpn_r50_fpn_2x_coco"),
        ("retinanet_r50_fpn", "mmdet", "retinanet/retinanet_r50_fpn_ms-640-800-3x_coco"),
    ],
)
def test_coco_is_the_best_that_fits(name, profile, config):
    assert coco_weights(name, profile).name == config


def test_the_address_is_the_rows():
    assert coco_address("r50_fpn") == TORCHVISION["fasterrcnn_resnet50_fpn"].url
    assert coco_address("r50_fpn", "detectron2") == coco_weights("r50_fpn", "detectron2").address


def test_what_is_not_published_is_named_beside_what_is():
    with pytest.raises(ValueError, match=r"'r18_fpn'; they exist for r50_fpn, .*r50_c4"):
        coco_weights("r18_fpn")
    with pytest.raises(ValueError, match=r"'r101_fpn' in the profile 'torchvision'; .*R_101_FPN_3x \(detectron2\)"):
        coco_weights("r101_fpn", "torchvision")
    with pytest.raises(ValueError, match="profile: expected one of"):
        coco_weights("r50_fpn", "caffe")
