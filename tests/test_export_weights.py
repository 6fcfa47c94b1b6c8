"""Weights handed back to a peer: the same keys it writes itself, the same detections in it, and what it cannot take."""

import pytest
import torch
from torchvision.models import detection

from fastrcnn.checkpoints import torchvision
from fastrcnn.models import faster_rcnn
from fastrcnn.models.build import merge
from fastrcnn.weights import export_weights, infer_model, load_weights

CONSTRUCTORS = [detection.fasterrcnn_resnet50_fpn, detection.fasterrcnn_resnet50_fpn_v2]


@pytest.mark.parametrize("constructor", CONSTRUCTORS)
def test_torchvision_takes_its_own_weights_back_unchanged(constructor):
    theirs = constructor(weights=None, weights_backbone=None, num_classes=5)
    state = theirs.state_dict()
    back = export_weights(infer_model(state), "torchvision")
    assert set(back) == set(state)
    theirs.load_state_dict(back, strict=True)
    unread = "roi_heads.box_predictor.bbox_pred"
    for key, value in state.items():
        kept = slice(4, None) if key.startswith(unread) else slice(None)
        expected = value if value.dim() == 0 else value[kept]
        assert torch.equal(back[key] if value.dim() == 0 else back[key][kept], expected), key


@pytest.mark.parametrize("peer", ["mmdet", "detectron2"])
def test_exported_weights_load_here_again(peer):
    model = faster_rcnn("r50_fpn", 3, peer)
    again = load_weights(faster_rcnn("r50_fpn", 3), export_weights(model, peer))
    assert again.profile.name == peer
    for key, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key


def test_another_profile_and_an_unknown_peer_are_refused():
    model = faster_rcnn("r18_fpn", 3, "mmdet")
    with pytest.raises(ValueError, match="follows the profile 'mmdet'"):
        export_weights(model, "torchvision")
    with pytest.raises(ValueError, match="peer"):
        export_weights(model, "yolo")


def test_a_layer_that_the_peer_does_not_have_is_named():
    head = dict(type="ConvFCBBoxHead", num_shared_fcs=1, num_cls_fcs=1)
    model = faster_rcnn("r18_fpn", 3, "torchvision", roi_head=dict(bbox_head=head))
    with pytest.raises(ValueError, match="cls_fcs"):
        export_weights(model, "torchvision")


def narrow(name: str, profile: str, **overrides):
    """A named model with a small backbone of bottlenecks."""
    neck = dict(in_channels=[16, 32, 64, 128], out_channels=32)
    roi_head = dict(bbox_roi_extractor=dict(out_channels=32), bbox_head=dict(in_channels=32, fc_out_channels=8))
    small = dict(backbone=dict(base_channels=4), neck=neck, rpn_head=dict(in_channels=32), roi_head=roi_head)
    return faster_rcnn(name, 3, profile, **merge(small, overrides))


@pytest.mark.parametrize(
    "peer, backbone, message",
    [
        ("torchvision", dict(style="caffe"), "style 'pytorch' as in torchvision's own models, got 'caffe'"),
        ("detectron2", dict(style="pytorch"), r"style 'caffe' .*\(MODEL.RESNETS.STRIDE_IN_1X1\), got 'pytorch'"),
        (
            "detectron2",
            dict(type="ResNeXt", groups=2, base_width=2, style="caffe"),
            r"style 'pytorch' .*\(MODEL.RESNETS.STRIDE_IN_1X1\), got 'caffe'",
        ),
    ],
)
def test_another_style_than_the_peers_own_is_refused(peer, backbone, message):
    model = narrow("r50_fpn", peer, backbone=backbone)
    with pytest.raises(ValueError, match=rf"backbone\.layer2\.0: expected {message}"):
        export_weights(model, peer)
    model.backbone.set_style("pytorch" if backbone["style"] == "caffe" else "caffe")
    assert export_weights(model, peer)


def test_the_last_stage_of_a_c4_has_a_style_too():
    model = faster_rcnn("r50_c4", 3, "detectron2", roi_head=dict(shared_head=dict(style="pytorch")))
    with pytest.raises(ValueError, match=r"roi_head\.shared_head\.layer4\.0: expected style 'caffe'"):
        export_weights(model, "detectron2")


@pytest.mark.parametrize("peer, style", [("torchvision", "caffe"), ("detectron2", "pytorch")])
def test_basic_blocks_have_no_style(peer, style):
    assert export_weights(faster_rcnn("r18_fpn", 3, peer, backbone=dict(style=style)), peer)


@pytest.mark.parametrize("name", ["r50_c4", "r50_dc5"])
def test_torchvision_has_no_detector_without_a_pyramid(name):
    small = {} if name == "r50_c4" else dict(roi_head=dict(bbox_head=dict(fc_out_channels=4)))
    with pytest.raises(ValueError, match="torchvision has no detector without a pyramid"):
        export_weights(faster_rcnn(name, 3, "torchvision", **small), "torchvision")


def _plugin(kind: str, **options) -> dict:
    return dict(plugins=[dict(cfg=dict(type=kind, **options), position="after_conv2")])


@pytest.mark.parametrize(
    "backbone, key",
    [
        (dict(dcn=dict(type="DCNv2"), stage_with_dcn=(False, True, True, True)), "layer2.0.conv2.conv_offset.weight"),
        (_plugin("ContextBlock", ratio=0.5), "layer1.0.context_block.conv_mask.weight"),
        (_plugin("GeneralizedAttention", num_heads=2), "layer1.0.gen_attention_block"),
        (_plugin("NonLocal2d"), "layer1.0.nonlocal_block"),
        (_plugin("ConvModule", out_channels=4, kernel_size=1), "layer1.0.conv_block"),
        (dict(type="ResNetV1d"), "stem.0.weight"),
        (dict(avg_down=True), "layer1.0.downsample.2.weight"),
    ],
)
def test_only_a_plain_resnet_has_a_place_in_torchvision(backbone, key):
    state = narrow("r50_fpn", "torchvision").state_dict()
    added = narrow("r50_fpn", "torchvision", backbone=backbone).state_dict()
    assert f"backbone.{key}" in added or any(k.startswith(f"backbone.{key}.") for k in added)
    with pytest.raises(ValueError, match=rf"torchvision's detectors have no place for backbone\.{key}"):
        torchvision.export({**state, **{k: v for k, v in added.items() if k.startswith(f"backbone.{key}")}})


def test_group_norms_and_standardised_weights_are_refused():
    gn = dict(norm_cfg=dict(type="GN", num_groups=4))
    with pytest.raises(ValueError, match=r"torchvision's detectors have no place for backbone\.gn1"):
        export_weights(narrow("r50_fpn", "torchvision", backbone=gn), "torchvision")
    with pytest.raises(ValueError, match=r"backbone\.gn1: expected the 32 groups of detectron2's group norms, got 4"):
        export_weights(narrow("r50_fpn", "detectron2", backbone=gn), "detectron2")
    for peer in ("torchvision", "detectron2"):
        with pytest.raises(ValueError, match=rf"backbone\.conv1: {peer} has no .*ConvWS"):
            export_weights(narrow("r50_fpn", peer, backbone=dict(conv_cfg=dict(type="ConvWS"))), peer)


def test_boxes_that_are_the_same_for_every_class_are_refused_by_torchvision_alone():
    agnostic = dict(roi_head=dict(bbox_head=dict(reg_class_agnostic=True)))
    with pytest.raises(ValueError, match=r"fc_reg: .* expected 12 rows, got the 4 of reg_class_agnostic"):
        export_weights(narrow("r50_fpn", "torchvision", **agnostic), "torchvision")
    state = export_weights(narrow("r50_fpn", "detectron2", **agnostic), "detectron2")
    assert len(state["roi_heads.box_predictor.bbox_pred.weight"]) == 4
    one = faster_rcnn("r18_fpn", 1, "torchvision", **agnostic)
    assert len(export_weights(one, "torchvision")["roi_heads.box_predictor.bbox_pred.weight"]) == 8
