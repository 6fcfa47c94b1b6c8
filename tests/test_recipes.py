"""The named models, and what brings one back from a checkpoint."""

import pytest
import torch
from conftest import picture, tiny_model, tiny_options
from torch import nn
from torchvision.models.detection import fasterrcnn_resnet50_fpn, fasterrcnn_resnet50_fpn_v2

from fastrcnn.checkpoints import torchvision as torchvision_weights
from fastrcnn.checkpoints.peer_options import EXTRA_STATE
from fastrcnn.models import RPN, ResNet, ResNeXt, Shared2FCBBoxHead, Shared4Conv1FCBBoxHead, faster_rcnn
from fastrcnn.models.build import merge
from fastrcnn.weights import coco_address, infer_model, load_weights, save
from fastrcnn.weights.named import named_model, rpn
from fastrcnn.zoo.recipes import FASTER_RCNNS, NAMES, RPNS

FPN_NAMES = ("r18_fpn", "r34_fpn", "r50_fpn", "r101_fpn", "r152_fpn", "x50_32x4d_fpn", "x101_32x4d_fpn",
             "x101_64x4d_fpn", "r50_fpn_v2")  # fmt: skip


def found_by(model) -> dict:
    return model.eval()([picture(64, 90)])[0]


def test_the_names_of_the_documentation_are_there():
    assert set(FPN_NAMES) <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_name_builds_in_every_profile(name):
    for profile in ("mmdet", "torchvision", "detectron2"):
        with torch.device("meta"):
            model = named_model(name, 7, profile)
        assert model.profile.name == profile and model.num_classes == 7
        classes = model.roi_head.bbox_head.fc_cls if name in FASTER_RCNNS else model.bbox_head.retina_cls
        assert len(classes.weight) == (8 if name in FASTER_RCNNS else 7 * 9)


@pytest.mark.parametrize(
    "name, theirs", [("r50_fpn", fasterrcnn_resnet50_fpn), ("r50_fpn_v2", fasterrcnn_resnet50_fpn_v2)]
)
def test_numbers_of_parameters_are_torchvisions(name, theirs):
    with torch.device("meta"):
        ours, theirs = faster_rcnn(name, 80), theirs(weights=None, weights_backbone=None, num_classes=81)
    count, expected = (sum(p.numel() for p in model.parameters()) for model in (ours, theirs))
    assert count == expected - 4 * (1024 + 1)  # torchvision regresses a box for the background, too


@pytest.mark.parametrize(
    "make, name", [(fasterrcnn_resnet50_fpn, "r50_fpn"), (fasterrcnn_resnet50_fpn_v2, "r50_fpn_v2")]
)
def test_every_key_of_torchvisions_models_is_known(make, name):
    with torch.device("meta"):
        theirs = torchvision_weights.convert(make(weights=None, weights_backbone=None).state_dict())
        ours = faster_rcnn(name, 90).state_dict()
    assert {k: v.shape for k, v in theirs.items()} == {k: v.shape for k, v in ours.items() if k != EXTRA_STATE}


def test_what_the_names_stand_for():
    with torch.device("meta"):
        models = {name: faster_rcnn(name) for name in FPN_NAMES}
    for name, model in models.items():
        assert model.backbone.depth == int(name[1:].split("_")[0])
        assert isinstance(model.backbone, ResNeXt if name.startswith("x") else ResNet)
        assert model.backbone.frozen_stages == 1 and model.backbone.norm_eval is not name.endswith("_v2")
    assert models["x101_64x4d_fpn"].backbone.layer1[0].conv2.groups == 64
    v1, v2 = models["r50_fpn"], models["r50_fpn_v2"]
    assert (v1.profile.name, v2.profile.name) == ("mmdet", "torchvision")
    assert isinstance(v1.roi_head.bbox_head, Shared2FCBBoxHead) and isinstance(v1.rpn_head.rpn_conv, nn.Conv2d)
    assert isinstance(v2.roi_head.bbox_head, Shared4Conv1FCBBoxHead) and len(v2.rpn_head.rpn_conv) == 2
    assert v1.neck.lateral_convs[0].norm is None and v2.neck.lateral_convs[0].norm is not None


def test_mmdetections_configuration_in_numbers():
    with torch.device("meta"):
        model = faster_rcnn("r50_fpn")
    assert model.num_classes == 80
    rpn, roi = model.rpn_head, model.roi_head
    assert [rpn.test_cfg[k] for k in ("nms_pre", "max_per_img", "min_bbox_size")] == [1000, 1000, 0]
    assert (rpn.test_cfg["nms"]["iou_threshold"], roi.test_cfg["nms"]["iou_threshold"]) == (0.7, 0.5)
    assert (model.rpn_proposal["nms_pre"], model.rpn_proposal["max_per_img"]) == (2000, 1000)
    assert {k: rpn.train_cfg["assigner"][k] for k in ("pos_iou_thr", "neg_iou_thr", "min_pos_iou")} == dict(
        pos_iou_thr=0.7, neg_iou_thr=0.3, min_pos_iou=0.3
    )
    assert (rpn.train_cfg["sampler"]["num"], rpn.train_cfg["sampler"]["pos_fraction"]) == (256, 0.5)
    assert (roi.train_cfg["sampler"]["num"], roi.train_cfg["sampler"]["pos_fraction"]) == (512, 0.25)
    assert roi.train_cfg["assigner"]["match_low_quality"] is False
    assert (roi.test_cfg["score_thr"], roi.test_cfg["max_per_img"]) == (0.05, 100)
    assert rpn.anchor_generator.strides == [(s, s) for s in (4, 8, 16, 32, 64)]
    assert roi.bbox_head.bbox_coder.stds == (0.1, 0.1, 0.2, 0.2)


def test_overrides_lie_over_the_named_model():
    changed = dict(neck=dict(out_channels=128), test_cfg=dict(rcnn=dict(score_thr=0.3)), min_size=640)
    changed |= dict(rpn_head=dict(in_channels=128), roi_head=dict(bbox_head=dict(in_channels=128)))
    with torch.device("meta"):
        model = faster_rcnn("r50_fpn", 4, **changed)
    assert model.neck.out_channels == 128 and model.rpn_head.rpn_conv.in_channels == 128
    assert model.roi_head.test_cfg["score_thr"] == 0.3 and model.roi_head.test_cfg["max_per_img"] == 100
    assert model.data_preprocessor.min_size == 640
    with torch.device("meta"):
        assert faster_rcnn("r50_fpn").roi_head.test_cfg["score_thr"] == 0.05  # the named model itself is unchanged


def test_merging_follows_mmdetections_rule():
    base = dict(a=dict(x=1, y=dict(z=2)), b=3)
    assert merge(base, dict(a=dict(y=dict(w=4)))) == dict(a=dict(x=1, y=dict(z=2, w=4)), b=3)
    assert merge(base, dict(a=dict(_delete_=True, q=5))) == dict(a=dict(q=5), b=3)
    assert merge(base, dict(b=dict(c=1))) == dict(a=dict(x=1, y=dict(z=2)), b=dict(c=1))
    assert base == dict(a=dict(x=1, y=dict(z=2)), b=3)


@pytest.mark.parametrize(
    "arguments, options, error, names",
    [
        (("r51_fpn",), {}, ValueError, "r51_fpn.*r50_fpn"),
        (("r50_fpn", 3, "yolo"), {}, ValueError, "profile"),
        (("r50_fpn",), dict(backbone=dict(type="VGG")), ValueError, "backbone.*VGG"),
        (("r50_fpn",), dict(neck=dict(type="PAFPN")), ValueError, "neck.*PAFPN"),
        (("r50_fpn",), dict(bakbone=dict(depth=18)), TypeError, "bakbone"),
        (("r50_fpn",), dict(neck=dict(out_chanels=8)), (TypeError, ValueError), "out_chanels"),
        (("r18_fpn",), dict(weights="coco"), ValueError, "r18_fpn.*r50_fpn"),
    ],
)
def test_bad_arguments_are_named(arguments, options, error, names):
    with torch.device("meta"), pytest.raises(error, match=names):
        faster_rcnn(*arguments, **options)


def test_published_weights_have_https_addresses():
    for name in ("r50_fpn", "r50_fpn_v2"):
        assert coco_address(name).startswith("https://download.pytorch.org/models/fasterrcnn_resnet50_fpn")


@pytest.mark.parametrize("name", ["r18_fpn", "r50_fpn", "r101_fpn", "x50_32x4d_fpn", "r50_fpn_v2"])
def test_the_model_is_told_by_a_checkpoints_keys(tmp_path, name):
    source = tiny_model(name, "mmdet")
    torch.save(dict(state_dict=source.state_dict()), tmp_path / "model.pth")
    model = infer_model(tmp_path / "model.pth", **tiny_options(name))
    assert not model.training and model.num_classes == 3 and model.profile.name == "mmdet"
    with torch.device("meta"):
        expected = faster_rcnn(name, 3, "mmdet", **tiny_options(name))
    assert repr(model.backbone) == repr(expected.backbone) and repr(model.roi_head) == repr(expected.roi_head)
    first, second = found_by(model), found_by(source)
    assert len(first["boxes"]) > 20 and torch.equal(first["boxes"], second["boxes"])
    with pytest.raises(ValueError, match="does not fit"):
        infer_model(tmp_path / "model.pth", "r34_fpn", **tiny_options(name))


def test_an_unknown_depth_asks_for_the_name(tmp_path):
    state = {k: v for k, v in tiny_model("r50_fpn").state_dict().items() if not k.startswith("backbone.layer3.5.")}
    torch.save(state, tmp_path / "model.pth")
    with pytest.raises(ValueError, match="cannot tell the model"):
        infer_model(tmp_path / "model.pth")


@pytest.mark.parametrize("profile", ["mmdet", "torchvision", "detectron2"])
def test_our_own_files_bring_back_the_whole_model(tmp_path, profile):
    source = tiny_model("r18_fpn", profile)
    source.class_names = ["red", "white", "small one"]
    save(source, tmp_path / "model.safetensors")
    model = infer_model(tmp_path / "model.safetensors")
    assert (model.profile, model.class_names) == (source.profile, source.class_names)
    first, second = found_by(model), found_by(source)
    assert len(first["boxes"]) > 20
    assert all(torch.equal(first[k], second[k]) for k in first)
    stricter = infer_model(tmp_path / "model.safetensors", test_cfg=dict(rcnn=dict(score_thr=0.9)))
    assert stricter.roi_head.test_cfg["score_thr"] == 0.9


@pytest.mark.parametrize("peer", ["frozen torchvision", "caffe"])
def test_our_own_files_keep_what_a_peers_checkpoint_decided(tmp_path, peer):
    # Both move the numbers: torchvision's published epsilon of 0, and MMDetection's caffe input.
    model = tiny_model("r50_fpn", test_cfg=dict(rcnn=dict(score_thr=0.0)))
    meta = dict(cfg="style='caffe'") if peer == "caffe" else {}
    torch.save(dict(meta=meta, state_dict=tiny_model("r50_fpn", seed=1).state_dict()), tmp_path / "peer.pth")
    load_weights(model, tmp_path / "peer.pth", norm_eps=None if peer == "caffe" else 0.0)
    save(model, tmp_path / "model.safetensors")
    again = infer_model(tmp_path / "model.safetensors")
    first, second = found_by(model), found_by(again)
    assert len(first["boxes"]) > 20 and torch.equal(first["scores"], second["scores"])
    assert torch.equal(first["boxes"], second["boxes"])


@pytest.mark.parametrize("profile, style, trained", [("mmdet", "pytorch", True), ("torchvision", "pytorch", False),
                                                     ("detectron2", "caffe", False)])  # fmt: skip
def test_a_profile_decides_the_stride_and_the_norms_of_a_bottleneck(profile, style, trained):
    small = dict(backbone=dict(base_channels=4), neck=dict(in_channels=[16, 32, 64, 128], out_channels=8))

    def facts(model):
        block = model.backbone.layer2[0]
        norms = [model.backbone.layer4[0].bn1.weight.requires_grad, model.backbone.layer1[0].bn1.weight.requires_grad]
        return model.backbone.style, block.conv1.stride, block.conv2.stride, norms

    expected = style, *(((1, 1), (2, 2)) if style == "pytorch" else ((2, 2), (1, 1))), [trained, False]
    assert facts(faster_rcnn("r50_fpn", 3, profile, **small)) == expected
    other = faster_rcnn("r50_fpn", 3, "mmdet" if profile != "mmdet" else "detectron2", **small)
    other.set_profile(profile)
    assert facts(other) == expected


def test_a_grouped_bottleneck_keeps_its_stride_and_a_model_without_a_pyramid_its_style():
    with torch.device("meta"):
        grouped, c4 = faster_rcnn("x50_32x4d_fpn", profile="detectron2"), faster_rcnn("r50_c4", profile="detectron2")
        assert grouped.backbone.style == "pytorch" and c4.backbone.style == "caffe"
        grouped.set_profile("detectron2")
        c4.set_profile("mmdet")
        assert grouped.backbone.style == "pytorch" and c4.backbone.style == "caffe"
        assert not c4.backbone.layer3[0].bn1.weight.requires_grad  # caffe-style norms are constants in MMDetection, too


@pytest.mark.parametrize("profile, bound", [("mmdet", 6 / (64 * 9 * 2)), ("torchvision", 3 / (64 * 9)),
                                            ("detectron2", 3 / (64 * 9))])  # fmt: skip
def test_a_profile_decides_how_a_pyramid_starts(profile, bound):
    """Xavier: uniform within sqrt(6 / (fan in + fan out)); Kaiming of gain 1: within sqrt(3 / fan in)."""
    neck = dict(in_channels=[16, 32, 64, 128], out_channels=64)
    weight = (
        faster_rcnn("r18_fpn", 3, profile, backbone=dict(base_channels=16), neck=neck).neck.fpn_convs[0].conv.weight
    )
    assert weight.abs().max().item() == pytest.approx(bound**0.5, rel=0.01) and weight.abs().max() <= bound**0.5


def test_torchvisions_second_recipe_trains_its_norms_statistics_and_all():
    with torch.device("meta"):
        model = faster_rcnn("r50_fpn_v2").train()
    assert model.backbone.layer4[0].bn1.training and model.backbone.layer4[0].bn1.weight.requires_grad
    assert not model.backbone.layer1[0].bn1.training


@pytest.mark.parametrize("name", RPNS)
def test_a_proposal_network_is_the_first_stage_of_the_detector(name):
    with torch.device("meta"):
        alone, whole = named_model(name), faster_rcnn(name.removeprefix("rpn_"))
    assert set(alone.state_dict()) == {k for k in whole.state_dict() if not k.startswith("roi_head.")}
    assert alone.rpn_head.test_cfg == {**whole.rpn_head.test_cfg, "nms_pre": 2000}  # as MMDetection's configs/rpn
    assert alone.rpn_head.train_cfg == whole.rpn_head.train_cfg


def test_a_proposal_network_loads_a_file_and_has_one_class(tmp_path):
    small = dict(backbone=dict(base_channels=8, depth=18), neck=dict(in_channels=[8, 16, 32, 64]))
    model = rpn("rpn_r50_fpn", **small)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "rpn.pth")
    again = rpn("rpn_r50_fpn", weights=tmp_path / "rpn.pth", **small)
    assert not again.training and torch.equal(again.rpn_head.rpn_cls.weight, model.rpn_head.rpn_cls.weight)
    full = rpn("rpn_r50_fpn")
    told = infer_model(full.state_dict())
    assert isinstance(told, RPN) and torch.equal(told.rpn_head.rpn_cls.bias, full.rpn_head.rpn_cls.bias)
    with pytest.raises(ValueError, match=r"num_classes.*one class, got 3"):
        rpn("rpn_r50_fpn", 3)
    with pytest.raises(ValueError, match="rpn_r18_fpn"):
        rpn("rpn_r18_fpn")
