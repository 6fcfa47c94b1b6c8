"""Backbones that start from an image classifier's weights: files, short names, and what is left, kept or refused."""

import re

import pytest
import torch
import torchvision
from torch import nn

from fastrcnn.checkpoints.pretrained import SHORT_NAMES, pretrained_state
from fastrcnn.models import ResNet, faster_rcnn, from_mmdet_config
from fastrcnn.models.res_layer import ResLayer
from fastrcnn.weights import load_pretrained


@pytest.fixture(scope="module")
def classifier():
    torch.manual_seed(0)
    model = torchvision.models.resnet18(weights=None)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(std=0.1)
            m.running_var.uniform_(0.5, 1.5)
    return model.eval()


@pytest.fixture(scope="module")
def file(classifier, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.save(classifier.state_dict(), path)
    return str(path)


def start(module: nn.Module) -> None:
    """As the detector's `init_weights`, which reads the file that a part names."""
    module.init_weights(pretrained_state(*module.pretrained))


def small(depth=50, **options) -> ResNet:
    return ResNet(depth, base_channels=8, **options)


@pytest.fixture
def small_file(tmp_path):
    """A bottleneck classifier's file, and its state dict."""
    state = {**small().state_dict(), "fc.weight": torch.zeros(10, 256), "fc.bias": torch.zeros(10)}
    for value in state.values():
        if value.is_floating_point():
            value.uniform_(0.5, 1.5)
    torch.save(dict(state_dict=state), tmp_path / "small.pth")
    return str(tmp_path / "small.pth"), state


def assert_has(module: nn.Module, state: dict, but: tuple[str, ...] = ()) -> None:
    for key, value in module.state_dict().items():
        if not any(part in key for part in but):
            assert torch.equal(value, state[key]), key


@pytest.mark.parametrize("way", ["pretrained", "init_cfg"])
def test_a_resnet_starts_as_the_classifier_it_names(classifier, file, way):
    named = dict(pretrained=file) if way == "pretrained" else dict(init_cfg=dict(type="Pretrained", checkpoint=file))
    backbone = ResNet(18, **named).eval()
    assert not torch.equal(backbone.conv1.weight, classifier.conv1.weight)  # building reads nothing
    start(backbone)
    assert_has(backbone, classifier.state_dict())
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        found, expected = backbone(x)[-1], classifier.maxpool(classifier.relu(classifier.bn1(classifier.conv1(x))))
        for i in (1, 2, 3, 4):
            expected = getattr(classifier, f"layer{i}")(expected)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_building_does_not_look_for_the_file():
    backbone = ResNet(18, base_channels=4, pretrained="nowhere.pth")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth"):
        start(backbone)


def test_a_stage_that_was_not_built_is_left(classifier, file):
    backbone = ResNet(18, num_stages=3, strides=(1, 2, 2), dilations=(1, 1, 1), out_indices=(2,), pretrained=file)
    start(backbone)
    assert_has(backbone, classifier.state_dict())


def test_c4s_last_stage_starts_from_the_same_file(classifier, file):
    layer = ResLayer(18, stage=3, pretrained=file)
    start(layer)
    assert_has(layer, classifier.state_dict())
    assert set(layer.state_dict()) == {k for k in classifier.state_dict() if k.startswith("layer4.")}


def test_a_detector_gives_fresh_heads_and_the_named_backbone(small_file):
    path, state = small_file
    over = dict(
        neck=dict(in_channels=[32, 64, 128, 256], out_channels=8), rpn_head=dict(in_channels=8, feat_channels=8)
    )
    head = dict(bbox_roi_extractor=dict(out_channels=8), bbox_head=dict(in_channels=8, fc_out_channels=8))
    model = faster_rcnn("r50_fpn", 2, backbone=dict(base_channels=8, pretrained=path), roi_head=head, **over)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(3.0)
    model.init_weights()
    assert_has(model.backbone, state)
    for part in (model.neck, model.rpn_head, model.roi_head):
        assert all(p.std() > 0 or not p.any() for p in part.parameters())
    assert 0.005 < model.rpn_head.rpn_cls.weight.std() < 0.02


def test_mmdetection_2_names_the_file_beside_the_backbone(small_file):
    path, state = small_file
    rpn = dict(
        type="RPNHead", in_channels=256, feat_channels=8, anchor_generator=dict(scales=[8], ratios=[1.0], strides=[32])
    )
    backbone = dict(type="ResNet", depth=50, base_channels=8, out_indices=(3,))
    model = from_mmdet_config(dict(type="RPN", pretrained=path, backbone=backbone, neck=None, rpn_head=rpn))
    model.init_weights()
    assert_has(model.backbone, state)


@pytest.mark.parametrize("prefix", ["backbone", "backbone."])
def test_a_detectors_backbone_by_its_prefix(prefix, small_file, tmp_path):
    _, state = small_file
    torch.save({f"backbone.{k}": v for k, v in state.items()} | {"neck.x": torch.ones(1)}, tmp_path / "detector.pth")
    checkpoint = str(tmp_path / "detector.pth")
    backbone = small(init_cfg=dict(type="Pretrained", checkpoint=checkpoint, prefix=prefix))
    start(backbone)
    assert_has(backbone, state)
    with pytest.raises(ValueError, match=r"lacks bn1\.bias"):
        load_pretrained(small(), checkpoint)


def test_residual_branches_start_at_zero_only_without_a_file(small_file):
    path, _ = small_file
    assert not small().layer1[0].bn3.weight.any()
    backbone = small(pretrained=path)
    assert backbone.layer1[0].bn3.weight.all()
    start(backbone)
    assert backbone.layer1[0].bn3.weight.all()


def test_plugins_and_offsets_keep_their_own_start(small_file):
    path, state = small_file
    plugin = dict(cfg=dict(type="ContextBlock", ratio=0.25), stages=(False, True, False, False), position="after_conv3")
    dcn = dict(type="DCNv2", deform_groups=1)
    backbone = small(plugins=[plugin], dcn=dcn, stage_with_dcn=(False, False, True, True), pretrained=path)
    added = ("conv_offset", "context_block")
    own = {k: v.clone() for k, v in backbone.state_dict().items() if any(part in k for part in added)}
    assert {k.split(".")[2] for k in own} == {"conv2", "context_block"}
    load_pretrained(backbone, path)
    assert_has(backbone, state, added)
    assert_has(backbone, own | state)
    start(backbone)
    assert_has(backbone, state, added)
    assert all(not v.any() for k, v in backbone.state_dict().items() if "conv_offset" in k)


def test_what_a_file_has_for_the_added_layers_is_taken(tmp_path):
    dcn = dict(dcn=dict(type="DCN"), stage_with_dcn=(False, False, False, True))
    state = {k: torch.rand_like(v.float()) for k, v in small(**dcn).state_dict().items()}
    torch.save(state, tmp_path / "dcn.pth")
    backbone = load_pretrained(small(**dcn), tmp_path / "dcn.pth")
    assert_has(backbone, state, ("num_batches_tracked",))


def refused(module: nn.Module, path, message: str) -> None:
    before = {k: v.clone() for k, v in module.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_pretrained(module, path)
    assert_has(module, before)


def test_what_a_file_lacks_or_has_in_another_shape_is_named(small_file, tmp_path):
    _, state = small_file
    wrong = {k: v for k, v in state.items() if k not in ("layer2.1.conv2.weight", "bn1.running_mean")}
    path = tmp_path / "wrong.pth"
    torch.save(wrong, path)
    refused(small(), path, r"wrong\.pth does not fit the ResNet: it lacks bn1\.running_mean, layer2\.1\.conv2\.weight$")
    torch.save({**wrong, "conv1.weight": torch.zeros(8, 1, 7, 7)}, path)
    refused(small(), path, r"lacks .* and has conv1\.weight \[8, 1, 7, 7\], expected \[8, 3, 7, 7\]")
    offset = {"layer4.0.conv2.conv_offset.weight": torch.zeros(27, 64, 3, 3)}
    torch.save({**state, **offset}, path)
    dcn = small(dcn=dict(type="DCN"), stage_with_dcn=(False, False, False, True))
    refused(dcn, path, r"has layer4\.0\.conv2\.conv_offset\.weight \[27, 64, 3, 3\], expected \[18, 64, 3, 3\]")
    refused(ResNet(34, base_channels=8), path, "does not fit the ResNet")


def test_every_short_name_ends_in_a_checksum():
    for name, address in SHORT_NAMES.items():
        assert re.fullmatch(r"https://download\.(pytorch\.org|openmmlab\.com)/[\w/.-]+-[0-9a-f]{8}\.pth", address), name
    names = {k.removeprefix("torchvision://"): v for k, v in SHORT_NAMES.items() if k.startswith("torchvision://")}
    for name, address in names.items():
        assert address == torchvision.models.get_model_weights(name).IMAGENET1K_V1.url


def test_an_unknown_short_name_lists_the_known():
    refused(small(), "torchvision://resnet51", r"unknown name 'torchvision://resnet51'.*torchvision://resnet50, ")
