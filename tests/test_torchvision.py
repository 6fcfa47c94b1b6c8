"""RetinaNets of the three peers: torchvision's give torchvision's numbers, and every peer's keys go out and come back."""

import pytest
import torch
from conftest import tiny_model, tiny_options
from torch import nn
from torchvision.models import detection

from fastrcnn.checkpoints import detectron2
from fastrcnn.models import retinanet
from fastrcnn.weights import export_weights, infer_model, load_weights, pretrained_model

CLASSES = 4
WB = ("weight", "bias")
NAME = "retinanet_r18_fpn"
SMALL = tiny_options(NAME)


def small(profile="mmdet", seed=0, num_classes=CLASSES, **overrides):
    return tiny_model(NAME, profile, num_classes, seed, **overrides)


def scale_outputs(cls: nn.Conv2d, reg: nn.Conv2d, outputs) -> None:
    """Scores and boxes that differ from place to place: outputs, which `cls` and `reg` gave, of a fitting size."""
    for layer, maps, deviation in ((cls, outputs[0], 1.5), (reg, outputs[1], 0.2)):
        layer.weight.mul_(deviation / torch.cat([x.flatten() for x in maps]).std())
        layer.bias.fill_(-2.0 if layer is cls else 0.0)


def assert_same_state(a, b) -> None:
    assert set(a) == set(b)
    for key, value in a.items():
        assert torch.equal(value, b[key]), key


@pytest.fixture(scope="module", params=["retinanet_resnet50_fpn", "retinanet_resnet50_fpn_v2"])
def theirs(request):
    torch.manual_seed(0)
    constructor = getattr(detection, request.param)
    model = constructor(weights=None, weights_backbone=None, num_classes=91, min_size=96, max_size=128)
    model.eval()
    with torch.no_grad():
        cls, reg = model.head.classification_head, model.head.regression_head
        feats = list(model.backbone(torch.randn(1, 3, 96, 128)).values())
        scale_outputs(cls.cls_logits, reg.bbox_reg, ([cls([x]) for x in feats], [reg([x]) for x in feats]))
    return model.double()


@pytest.fixture(scope="module")
def ours(theirs):
    return infer_model({"state_dict": theirs.state_dict()}, min_size=96, max_size=128).double()


@pytest.fixture(scope="module")
def images():
    g = torch.Generator().manual_seed(1)
    return [torch.rand(3, *size, generator=g, dtype=torch.float64) for size in ((120, 170), (140, 101))]


def test_torchvisions_detections(theirs, ours, images):
    assert ours.profile.name == "torchvision" and ours.num_classes == 91
    with torch.no_grad():
        for a, b in zip(theirs(images), ours(images)):
            assert len(a["boxes"]) > 20 and len(a["labels"].unique()) > 3
            assert torch.equal(a["labels"], b["labels"])
            torch.testing.assert_close(b["scores"], a["scores"], rtol=0, atol=1e-12)
            # torchvision's scale factors are float32 whatever the images are
            torch.testing.assert_close(b["boxes"], a["boxes"], rtol=0, atol=1e-4, check_dtype=False)


def test_torchvisions_losses(theirs, ours, images):
    boxes = torch.tensor([[8.0, 10, 60, 70], [50, 20, 90, 100], [5, 60, 40, 110]], dtype=torch.float64)
    targets = [dict(boxes=boxes[:2], labels=torch.tensor([3, 90])), dict(boxes=boxes, labels=torch.tensor([1, 7, 7]))]
    theirs.train(), ours.train()
    for m in (*theirs.modules(), *ours.modules()):
        if isinstance(m, nn.BatchNorm2d):
            m.eval()
    expected, found = theirs(images, targets), ours(images, targets)
    theirs.eval(), ours.eval()
    assert set(found) == set(expected) == {"classification", "bbox_regression"}
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=0, check_dtype=False)


def test_torchvision_takes_its_own_weights_back_unchanged(theirs, ours):
    back = export_weights(ours, "torchvision")
    assert_same_state(theirs.state_dict(), back)
    theirs.load_state_dict(back, strict=True)


def test_the_first_names_of_the_towers(theirs, ours):
    """Those of towers without norms; with norms they were published under their new names, which stay as they are."""
    normalised = any(".conv.0.1." in key for key in theirs.state_dict() if key.startswith("head."))
    old = {}
    for key, value in theirs.state_dict().items():
        part = key.split(".")
        if part[0] == "head" and part[2] == "conv" and not normalised:
            key = ".".join([*part[:3], str(2 * int(part[3])), part[5]])
        old[key] = value
    assert normalised or "head.regression_head.conv.6.bias" in old
    with torch.no_grad():
        for parameter in ours.bbox_head.parameters():
            parameter.zero_()
    load_weights(ours, old)
    assert_same_state(export_weights(ours, "torchvision"), theirs.state_dict())


@pytest.mark.parametrize("peer", ["mmdet", "detectron2", "torchvision"])
def test_exported_weights_load_here_again(peer):
    source = small(peer)
    state = export_weights(source, peer)
    again = load_weights(small(seed=1), state)
    assert (
        again.profile.name == peer
        and again.bbox_head.test_cfg["max_per_img"] == source.bbox_head.test_cfg["max_per_img"]
    )
    assert_same_state(source.state_dict(), again.state_dict())
    image = [torch.rand(3, 64, 90)]
    first, second = source(image)[0], again(image)[0]
    assert len(first["boxes"]) > 5
    for key in first:
        assert torch.equal(first[key], second[key])


def test_detectron2s_own_names():
    state = export_weights(small("detectron2"), "detectron2")
    subnets = {f"head.{kind}_subnet.{i}.{part}" for kind in ("cls", "bbox") for i in (0, 2, 4, 6) for part in WB}
    pyramid = {f"backbone.fpn_{kind}{i}.{part}" for kind in ("lateral", "output") for i in (3, 4, 5) for part in WB}
    blocks = {f"backbone.top_block.p{i}.{part}" for i in (6, 7) for part in WB}
    last = {f"head.{kind}.{part}" for kind in ("cls_score", "bbox_pred") for part in WB}
    assert {k for k in state if not k.startswith("backbone.bottom_up.")} == subnets | pyramid | blocks | last


def test_norms_in_a_retinanets_pyramid():
    rows = torch.zeros(1)
    theirs = {f"backbone.fpn_{layer}3.norm.weight": rows for layer in ("lateral", "output")}
    ours = {f"neck.{layer}_convs.0.gn.weight": rows for layer in ("lateral", "fpn")}
    assert set(detectron2.convert({**theirs, "head.cls_subnet.0.weight": rows})) >= set(ours)
    retina = {"bbox_head.retina_cls.weight": rows}
    assert set(detectron2.export({**ours, **retina})) == {*theirs, "head.cls_score.weight"}
    with pytest.raises(ValueError, match=r"no place for neck\.fpn_convs\.3\.gn"):  # P6 and P7 have none there
        detectron2.export({"neck.fpn_convs.3.gn.weight": rows, **retina})


def test_mmdetections_names_and_classes_are_read():
    source = small()
    checkpoint = dict(state_dict=source.state_dict(), meta=dict(dataset_meta=dict(classes=tuple("abcd"))))
    model = infer_model(checkpoint, **SMALL)
    assert model.backbone.depth == 18 and model.profile.name == "mmdet"
    assert model.class_names == list("abcd")
    assert_same_state(source.state_dict(), model.state_dict())


def test_a_named_model_takes_the_files_classes(tmp_path):
    torch.save(small(num_classes=7).state_dict(), tmp_path / "a.pth")
    model = retinanet("retinanet_r18_fpn", weights=str(tmp_path / "a.pth"), **SMALL)
    assert model.num_classes == 7 and not model.training
    with pytest.raises(ValueError, match=r"retina_cls.*num_classes=7"):
        retinanet("retinanet_r18_fpn", 3, weights=str(tmp_path / "a.pth"), **SMALL)


def test_other_classes_leave_only_the_class_layer_fresh():
    source = small("torchvision")
    model = pretrained_model(export_weights(source, "torchvision"), 9, **SMALL)
    assert model.num_classes == 9 and model.profile.name == "torchvision"
    for key, value in model.state_dict().items():
        if not key.startswith("bbox_head.retina_cls."):
            assert torch.equal(value, source.state_dict()[key]), key
    scores = model.bbox_head.retina_cls.bias.sigmoid()
    torch.testing.assert_close(scores, torch.full((9 * 9,), 0.01))
    assert 0.005 < model.bbox_head.retina_cls.weight.std() < 0.02


def test_the_same_classes_are_taken_whole():
    source = small()
    assert_same_state(source.state_dict(), pretrained_model(source.state_dict(), CLASSES, **SMALL).state_dict())


def test_a_classifier_becomes_the_backbone():
    start = small(seed=3).backbone.state_dict()
    model = pretrained_model(start, 2, "retinanet_r18_fpn", **SMALL)
    assert_same_state(start, model.backbone.state_dict())
