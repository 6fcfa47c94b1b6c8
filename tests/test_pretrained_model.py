"""Starting to train from a checkpoint: of a detector with other classes, of a classifier, of our own file."""

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torchvision.models import detection

from fastrcnn.models import faster_rcnn
from fastrcnn.models.build import merge
from fastrcnn.weights import infer_model, load_weights, model_metadata, pretrained_model


def test_a_detector_of_other_classes_keeps_all_but_its_last_layers():
    theirs = detection.fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=91)
    model = pretrained_model(theirs.state_dict(), 3)
    assert model.num_classes == 3 and model.profile.name == "torchvision"
    expected = infer_model(theirs.state_dict()).state_dict()
    for key, value in model.state_dict().items():
        last = key.startswith(("roi_head.bbox_head.fc_cls", "roi_head.bbox_head.fc_reg"))
        assert torch.equal(value, expected[key]) != last or (last and value.shape != expected[key].shape), key


def test_a_detector_of_the_same_classes_is_taken_whole():
    start = faster_rcnn("r18_fpn", 4, backbone=dict(base_channels=4), neck=dict(in_channels=[4, 8, 16, 32]))
    small = dict(backbone=dict(base_channels=4), neck=dict(in_channels=[4, 8, 16, 32]))
    model = pretrained_model(start.state_dict(), 4, "r18_fpn", **small)
    for key, value in start.state_dict().items():
        assert torch.equal(value, model.state_dict()[key]), key


@pytest.mark.parametrize(("name", "classifier"), [("r18_fpn", "resnet18"), ("x50_32x4d_fpn", "resnext50_32x4d")])
def test_a_classifier_becomes_the_backbone(name, classifier):
    theirs = getattr(torchvision.models, classifier)(weights=None).state_dict()
    model = pretrained_model(theirs, 2, name)
    for key, value in theirs.items():
        if not key.startswith("fc."):
            assert torch.equal(model.state_dict()[f"backbone.{key}"], value), key
    assert not model.backbone.conv1.weight.requires_grad and model.profile.name == "mmdet"


def test_our_own_file_brings_its_architecture_along(tmp_path):
    small = dict(backbone=dict(base_channels=4), neck=dict(in_channels=[4, 8, 16, 32]), min_size=64, max_size=96)
    start = faster_rcnn("r18_fpn", 3, **small)
    save_file(start.state_dict(), tmp_path / "a.safetensors", model_metadata("r18_fpn", start, small))
    model = pretrained_model(tmp_path / "a.safetensors", 5, min_size=80)
    assert model.num_classes == 5 and model.backbone.conv1.out_channels == 4
    assert (model.data_preprocessor.min_size, model.data_preprocessor.max_size) == (80, 96)
    again = tmp_path / "b.safetensors"
    save_file(model.state_dict(), again, model_metadata(model.zoo_name, model, model.zoo_overrides))
    for key, value in model.state_dict().items():
        assert torch.equal(value, infer_model(again).state_dict()[key]), key


def test_a_classifier_of_another_depth_is_named_key_by_key():
    theirs = torchvision.models.resnet18(weights=None).state_dict()
    with pytest.raises(ValueError, match=r"missing keys: backbone\.layer1\.2\.conv1\.weight"):
        pretrained_model(theirs, 2, "r34_fpn")


def test_a_file_of_an_unknown_profile_leaves_the_model_untouched(tmp_path):
    small = dict(backbone=dict(base_channels=4), neck=dict(in_channels=[4, 8, 16, 32]))
    save_file(faster_rcnn("r18_fpn", 3, **small).state_dict(), tmp_path / "a.safetensors", dict(profile="yolo"))
    model = faster_rcnn("r18_fpn", 3, **small)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"a\.safetensors: profile: expected one of .*'yolo'"):
        load_weights(model, tmp_path / "a.safetensors")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_our_own_files_style_and_input_go_into_a_model_that_has_others(tmp_path):
    small = dict(backbone=dict(base_channels=4), neck=dict(in_channels=[16, 32, 64, 128], out_channels=8))
    pixels = dict(mean=(1.0, 2.0, 3.0), std=(1.0, 1.0, 1.0), bgr_to_rgb=False)
    start = faster_rcnn("r50_fpn", 3, **merge(small, dict(backbone=dict(style="caffe"), data_preprocessor=pixels)))
    save_file(start.state_dict(), tmp_path / "a.safetensors", model_metadata("r50_fpn", start, small))
    model = load_weights(faster_rcnn("r50_fpn", 3, **small), tmp_path / "a.safetensors")
    assert model.backbone.style == "caffe" and model.data_preprocessor.bgr
    assert model.data_preprocessor.mean == (1.0, 2.0, 3.0)
