"""The table of published checkpoints, and which of them weights="coco" stands for."""

import pytest
import torch
from torchvision.models import detection

from fastrcnn.checkpoints import fetch
from fastrcnn.models.profiles import PROFILES
from fastrcnn.weights import coco_address
from fastrcnn.weights.named import named_model
from fastrcnn.zoo.published import PUBLISHED, coco_weights, published_for
from fastrcnn.zoo.recipes import RECIPES, RPNS

TORCHVISION = {
    "fasterrcnn_resnet50_fpn": detection.FasterRCNN_ResNet50_FPN_Weights.COCO_V1,
    "fasterrcnn_resnet50_fpn_v2": detection.FasterRCNN_ResNet50_FPN_V2_Weights.COCO_V1,
    "retinanet_resnet50_fpn": detection.RetinaNet_ResNet50_FPN_Weights.COCO_V1,
    "retinanet_resnet50_fpn_v2": detection.RetinaNet_ResNet50_FPN_V2_Weights.COCO_V1,
}
HOSTS = dict(mmdet="https://download.openmmlab.com/mmdetection/", torchvision="https://download.pytorch.org/models/",
             detectron2="https://dl.fbaipublicfiles.com/detectron2/COCO-Detection/")  # fmt: skip


def names(rows) -> list[str]:
    return [p.name for p in rows]


def test_the_facts_of_every_row():
    """The digest is the one that a download of this name is checked by; nothing stands twice; the table is sorted out."""
    assert {p.profile for p in PUBLISHED} == set(PROFILES)
    for fact in ("name", "address", "digest"):
        assert len({getattr(p, fact) for p in PUBLISHED}) == len(PUBLISHED) > 90
    for row in PUBLISHED:
        assert fetch._digest(row.address.rpartition("/")[2]) == row.digest, row.name
        assert row.address.startswith(HOSTS[row.profile]) and row.model in RECIPES and 25 < row.ap < 65, row.name
        assert row.metric == ("AR@1000" if row.model in RPNS else "AP")
        # MMDetection's folders are called as the model is, Detectron2's and torchvision's files by the depth alone.
        depth = RECIPES[row.model].backbone["depth"] if "101" not in row.variant else 101
        assert f"{depth}" in row.address.rpartition("://")[2], row.name


@pytest.mark.parametrize("model, variant", sorted({(p.model, p.variant) for p in PUBLISHED}))
def test_every_published_model_can_be_built(model, variant):
    for row in [p for p in PUBLISHED if (p.model, p.variant) == (model, variant)][:1]:
        assert build(row).num_classes == row.num_classes


def build(row):
    with torch.device("meta"):
        return named_model(row.model, row.num_classes, row.profile, **row.overrides)


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


@pytest.mark.parametrize("name", RECIPES)
def test_coco_is_the_best_that_fits(name):
    """Torchvision's where it has any, then MMDetection's, then Detectron2's; of a peer's the best AP of the plain model."""
    plain = [p for p in PUBLISHED if p.model == name and p.variant == "-"]
    best = {peer: max((p.ap for p in plain if p.profile == peer), default=None)
            for peer in ("torchvision", "mmdet", "detectron2")}  # fmt: skip
    for profile in (None, *best):
        aps = [ap for peer, ap in best.items() if ap is not None and profile in (None, peer)]
        if not aps:
            with pytest.raises(ValueError, match="no published"):
                coco_weights(name, profile)
            continue
        found = coco_weights(name, profile)
        assert (found.ap, found.model, found.overrides) == (aps[0], name, {}) and profile in (None, found.profile)


def test_coco_of_the_plain_r50_fpn():
    """Of what is published, MMDetection's has 40.8 with its RSB backbone, Detectron2's 40.2."""
    for profile, ap in ((None, 37.0), ("torchvision", 37.0), ("mmdet", 40.8), ("detectron2", 40.2)):
        assert coco_weights("r50_fpn", profile).ap == ap


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
