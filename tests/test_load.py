import pickle
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from conftest import picture, tiny_model, tiny_options
from safetensors.torch import save_file
from torch import nn
from torchvision.models import detection

from fastrcnn import load_weights
from fastrcnn.checkpoints.peer_options import EXTRA_STATE
from fastrcnn.models import faster_rcnn
from fastrcnn.weights import infer_model, load_checkpoint, pretrained_model, save

CLASSES = 3


def found_by(model) -> dict:
    return model.eval()([picture(64, 90)])[0]


def assert_same_model(a, b) -> None:
    first, second = found_by(a), found_by(b)
    assert len(first["boxes"]) > 20
    for key in ("boxes", "scores", "labels"):
        assert torch.equal(first[key], second[key])


def to_torchvision(state: dict, old_names: bool = False, frozen: bool = False) -> dict:
    """Our keys in torchvision's names and class order, the background first."""
    inner = "" if old_names else ".0"
    table = [
        ("backbone.", "backbone.body."),
        *((f"neck.lateral_convs.{i}.conv", f"backbone.fpn.inner_blocks.{i}{inner}") for i in range(4)),
        *((f"neck.fpn_convs.{i}.conv", f"backbone.fpn.layer_blocks.{i}{inner}") for i in range(4)),
        ("rpn_head.rpn_conv", "rpn.head.conv" if old_names else "rpn.head.conv.0.0"),
        ("rpn_head.rpn_cls", "rpn.head.cls_logits"),
        ("rpn_head.rpn_reg", "rpn.head.bbox_pred"),
        ("roi_head.bbox_head.shared_fcs.0", "roi_heads.box_head.fc6"),
        ("roi_head.bbox_head.shared_fcs.1", "roi_heads.box_head.fc7"),
        ("roi_head.bbox_head.fc_cls", "roi_heads.box_predictor.cls_score"),
        ("roi_head.bbox_head.fc_reg", "roi_heads.box_predictor.bbox_pred"),
    ]
    out = {}
    for key, value in state.items():
        if key == EXTRA_STATE or (frozen and key.endswith("num_batches_tracked")):
            continue
        ours, theirs = next((a, b) for a, b in table if key.startswith(a))
        if ".fc_cls." in key:
            value = torch.cat([value[-1:], value[:-1]])
        elif ".fc_reg." in key:
            value = torch.cat([torch.full_like(value[:4], 99.0), value])
        out[theirs + key.removeprefix(ours)] = value
    return out


def to_detectron2(state: dict) -> dict:
    out = {}
    for key, value in state.items():
        if key == EXTRA_STATE or key.endswith("num_batches_tracked"):
            continue
        part = key.split(".")
        if key.startswith("backbone.layer"):
            head = f"backbone.bottom_up.res{int(part[1][-1]) + 1}.{part[2]}"
            if part[3] == "downsample":
                new = f"{head}.shortcut.weight" if part[4] == "0" else f"{head}.shortcut.norm.{part[5]}"
            else:
                new = f"{head}.conv{part[3][-1]}." + ("norm." if part[3].startswith("bn") else "") + part[4]
        elif key.startswith("backbone."):
            new = f"backbone.bottom_up.stem.conv1.{'norm.' if part[1] == 'bn1' else ''}{part[2]}"
        elif key.startswith("neck."):
            kind = {"lateral_convs": "lateral", "fpn_convs": "output"}[part[1]]
            new = f"backbone.fpn_{kind}{int(part[2]) + 2}.{part[4]}"
        elif key.startswith("rpn_head."):
            names = {"rpn_conv": "conv", "rpn_cls": "objectness_logits", "rpn_reg": "anchor_deltas"}
            new = f"proposal_generator.rpn_head.{names[part[1]]}.{part[2]}"
        elif part[2] == "shared_fcs":
            new = f"roi_heads.box_head.fc{int(part[3]) + 1}.{part[4]}"
        else:
            new = f"roi_heads.box_predictor.{ {'fc_cls': 'cls_score', 'fc_reg': 'bbox_pred'}[part[2]] }.{part[3]}"
        out[new] = value
    return out


@pytest.mark.parametrize("old_names", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_torchvision_weights_give_torchvisions_model(tmp_path, old_names, frozen):
    source = tiny_model(profile="torchvision")
    torch.save(to_torchvision(source.state_dict(), old_names, frozen), tmp_path / "model.pth")
    if frozen:  # the published weights were made with frozen norms of epsilon 0
        for m in source.backbone.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.eps = 0.0
    loaded = load_weights(tiny_model(seed=1), tmp_path / "model.pth")
    assert loaded.profile.name == "torchvision"
    assert torch.equal(loaded.roi_head.bbox_head.fc_cls.bias, source.roi_head.bbox_head.fc_cls.bias)
    assert_same_model(loaded, source)
    labels = set(found_by(loaded)["labels"].tolist())
    assert 3 in labels and 0 not in labels  # counted from 1


def test_the_norms_epsilon_can_be_given(tmp_path):
    torch.save(to_torchvision(tiny_model().state_dict(), frozen=True), tmp_path / "model.pth")
    for given, expected in ((None, 0.0), (1e-5, 1e-5), (1e-3, 1e-3)):
        model = load_weights(tiny_model(seed=1), tmp_path / "model.pth", norm_eps=given)
        assert {m.eps for m in model.backbone.modules() if isinstance(m, nn.BatchNorm2d)} == {expected}


@pytest.mark.parametrize("suffix", [".pth", ".pkl"])
def test_detectron2_weights_give_detectron2s_model(tmp_path, suffix):
    source = tiny_model("r50_fpn", "detectron2")
    state, path = to_detectron2(source.state_dict()), tmp_path / f"model{suffix}"
    if suffix == ".pkl":
        content = dict(model={k: v.numpy() for k, v in state.items()}, __author__="Detectron2 Model Zoo")
        path.write_bytes(pickle.dumps(content))
    else:
        anchors = {f"proposal_generator.anchor_generator.cell_anchors.{i}": torch.zeros(3, 4) for i in range(5)}
        torch.save(dict(model={**state, **anchors}, iteration=90000), path)
    loaded = load_weights(tiny_model("r50_fpn", seed=1), path)
    assert loaded.profile.name == "detectron2" and loaded.data_preprocessor.mean == (103.53, 116.28, 123.675)
    block = loaded.backbone.layer2[0]
    assert (block.conv1.stride, block.conv2.stride) == ((2, 2), (1, 1))
    assert_same_model(loaded, source)


class HistoryBuffer:
    """What a training log leaves in a checkpoint."""

    __module__ = "mmengine.logging.history_buffer"

    def __init__(self):
        self._log_history = np.arange(3.0)
        self._statistics_methods = dict(
            mean=self.mean
        )  # MMEngine's keeps its own methods, which a pickle names by getattr

    def mean(self):
        return self._log_history.mean()


@pytest.fixture
def history_buffer(monkeypatch):
    """Saves a checkpoint that holds an object whose class is gone when the file is read."""

    def save(content, path: Path) -> None:
        with monkeypatch.context() as context:
            for name in ("mmengine", "mmengine.logging", HistoryBuffer.__module__):
                context.setitem(sys.modules, name, types.ModuleType(name))
            sys.modules[HistoryBuffer.__module__].HistoryBuffer = HistoryBuffer
            torch.save(dict(content, message_hub=dict(loss=HistoryBuffer())), path)

    return save


@pytest.mark.parametrize("layout", ["pth", "safetensors", "ddp"])
def test_mmdetection_weights(tmp_path, layout, history_buffer):
    source = tiny_model()
    state, path = dict(source.state_dict()), tmp_path / ("m.safetensors" if layout == "safetensors" else "m.pth")
    if layout == "safetensors":
        save_file(state, path)
    else:
        if layout == "ddp":
            state = {f"module.{k}": v for k, v in state.items()}
        more = {"data_preprocessor.mean": torch.zeros(3), "ema_backbone_conv1_weight": torch.ones(3)}
        state |= {f"module.{k}": v for k, v in more.items()} if layout == "ddp" else more
        meta = dict(dataset_meta=dict(CLASSES=("rbc", "wbc", "platelet")), cfg="style='pytorch'", epoch=12)
        history_buffer(dict(meta=meta, state_dict=state), path)
    loaded = load_weights(tiny_model(seed=1), path)
    assert loaded.profile.name == "mmdet"
    assert loaded.class_names == (None if layout == "safetensors" else ["rbc", "wbc", "platelet"])
    assert_same_model(loaded, source)


CAFFE_CFG = "model = dict(backbone=dict(depth=50, norm_eval=True, style='caffe'))"


def save_mmdetection(path: Path, model, cfg: str = "") -> Path:
    torch.save(dict(meta=dict(cfg=cfg), state_dict=model.state_dict()), path)
    return path


def input_and_strides(model) -> tuple:
    p, block = model.data_preprocessor, model.backbone.layer2[0]
    eps = {m.eps for m in model.backbone.modules() if isinstance(m, nn.BatchNorm2d)}
    batch, _, _ = p([torch.arange(3 * 64 * 64).reshape(3, 64, 64).remainder(251).to(torch.uint8)])
    return p.mean, p.std, batch[0, :, 5, 5].tolist(), block.conv1.stride, block.conv2.stride, eps


def test_a_caffe_style_checkpoint_says_so(tmp_path):
    model = load_weights(tiny_model("r50_fpn"), save_mmdetection(tmp_path / "m.pth", tiny_model("r50_fpn"), CAFFE_CFG))
    mean, std, pixel, first, second, _ = input_and_strides(model)
    assert (mean, std, first, second) == ((103.53, 116.28, 123.675), (1.0, 1.0, 1.0), (2, 2), (1, 1))
    rgb = [(325 + 4096 * c) % 251 for c in range(3)]
    assert pixel == pytest.approx([v - m for v, m in zip(rgb[::-1], mean)], abs=1e-3)


@pytest.mark.parametrize("built_for", ["mmdet", "torchvision"])
@pytest.mark.parametrize("first", ["caffe", "torchvision", "detectron2"])
def test_a_second_checkpoint_leaves_nothing_of_the_first(tmp_path, first, built_for):
    source = tiny_model("r50_fpn")
    plain = save_mmdetection(tmp_path / "plain.pth", source)
    before = tmp_path / "before.pth"
    if first == "caffe":
        save_mmdetection(before, source, CAFFE_CFG)
    else:
        torch.save(to_torchvision(source.state_dict(), frozen=True) if first == "torchvision" else
                   dict(model=to_detectron2(source.state_dict())), before)  # fmt: skip
    model = tiny_model("r50_fpn", built_for, seed=1)
    load_weights(load_weights(model, before), plain)
    assert input_and_strides(model) == input_and_strides(tiny_model("r50_fpn"))
    assert_same_model(model, source)


def test_torchvision_weights_fit_a_model_built_for_detectron2(tmp_path):
    source = tiny_model("r50_fpn", "torchvision")
    torch.save(to_torchvision(source.state_dict()), tmp_path / "model.pth")
    assert_same_model(load_weights(tiny_model("r50_fpn", "detectron2", seed=1), tmp_path / "model.pth"), source)


@pytest.mark.parametrize("peer", ["torchvision", "detectron2", "mmdet"])
def test_the_peer_is_told_by_its_keys(tmp_path, peer):
    state = tiny_model("r50_fpn").state_dict()
    rename = dict(torchvision=to_torchvision, detectron2=to_detectron2, mmdet=dict)[peer]
    torch.save(rename(state), tmp_path / "model.pth")
    checkpoint = load_checkpoint(tmp_path / "model.pth")
    ours = checkpoint.state
    assert checkpoint.peer == peer
    assert set(ours) == {k for k in state if peer != "detectron2" or not k.endswith("num_batches_tracked")}
    assert all(torch.equal(ours[k], state[k]) for k in ours)


@pytest.mark.parametrize(
    "content", [dict(layer=torch.zeros(2)), dict(state_dict=dict(fc=torch.zeros(2)))], ids=["plain", "nested"]
)
def test_other_networks_are_refused(tmp_path, content):
    torch.save(content, tmp_path / "model.pth")
    with pytest.raises(ValueError, match="not a Faster R-CNN or RetinaNet of MMDetection, torchvision or Detectron2"):
        load_checkpoint(tmp_path / "model.pth")


def test_a_missing_file_and_a_file_without_tensors(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth"):
        load_weights(tiny_model(), tmp_path / "nowhere.pth")
    torch.save(dict(state_dict={}, meta={}), tmp_path / "model.pth")
    with pytest.raises(ValueError, match="no tensors"):
        load_weights(tiny_model(), tmp_path / "model.pth")
    torch.save([torch.zeros(2)], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="dict"):
        load_weights(tiny_model(), tmp_path / "list.pth")


def test_keys_that_do_not_fit_are_named_and_the_model_is_untouched(tmp_path):
    state = dict(tiny_model(seed=1).state_dict())
    del state["neck.fpn_convs.2.conv.bias"]
    state["neck.gate.weight"] = torch.zeros(3)
    state["rpn_head.rpn_conv.weight"] = torch.zeros(16, 16, 1, 1)
    torch.save(state, tmp_path / "model.pth")
    model = tiny_model("r18_fpn", "torchvision")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError) as error:
        load_weights(model, tmp_path / "model.pth")
    message = str(error.value)
    assert "missing keys: neck.fpn_convs.2.conv.bias" in message
    assert "unexpected keys: neck.gate.weight" in message
    assert "rpn_head.rpn_conv.weight [16, 16, 1, 1], expected [16, 16, 3, 3]" in message
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.profile.name == "torchvision" and model.class_names is None


def test_another_number_of_classes_is_explained(tmp_path):
    torch.save(tiny_model(num_classes=5).state_dict(), tmp_path / "model.pth")
    with pytest.raises(ValueError, match="num_classes=5"):
        load_weights(tiny_model(), tmp_path / "model.pth")
    torch.save(tiny_model().state_dict(), tmp_path / "narrow.pth")  # its classes are not what is otherwise
    with pytest.raises(ValueError, match="wrong shapes: ") as error:
        load_weights(faster_rcnn("r18_fpn", num_classes=CLASSES), tmp_path / "narrow.pth")
    assert "num_classes" not in str(error.value)


def test_a_detector_of_other_classes_keeps_all_but_its_last_layers():
    theirs = detection.fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=91)
    model = pretrained_model(theirs.state_dict(), 3)
    assert model.num_classes == 3 and model.profile.name == "torchvision"
    expected = infer_model(theirs.state_dict()).state_dict()
    for key, value in model.state_dict().items():
        last = key.startswith(("roi_head.bbox_head.fc_cls", "roi_head.bbox_head.fc_reg"))
        assert torch.equal(value, expected[key]) != last or (last and value.shape != expected[key].shape), key


def test_a_detector_of_the_same_classes_is_taken_whole():
    start = tiny_model(num_classes=4)
    model = pretrained_model(start.state_dict(), 4, "r18_fpn", **tiny_options())
    for key, value in start.state_dict().items():
        assert torch.equal(value, model.state_dict()[key]), key


def test_last_layers_of_classes_in_another_order_start_afresh(tmp_path):
    start, key = tiny_model(num_classes=2), "roi_head.bbox_head.fc_cls.weight"
    start.class_names = ["cat", "dog"]
    path = save(start, tmp_path / "a.safetensors")
    for names, kept in ((["cat", "dog"], True), (["dog", "cat"], False), (["cat", "cow"], False), (None, True)):
        model = pretrained_model(path, 2, class_names=names)
        assert torch.equal(model.state_dict()[key], start.state_dict()[key]) == kept
        assert torch.equal(model.backbone.conv1.weight, start.backbone.conv1.weight)


@pytest.mark.parametrize(("name", "classifier"), [("r18_fpn", "resnet18"), ("x50_32x4d_fpn", "resnext50_32x4d")])
def test_a_classifier_becomes_the_backbone(name, classifier):
    theirs = getattr(torchvision.models, classifier)(weights=None).state_dict()
    model = pretrained_model(theirs, 2, name)
    for key, value in theirs.items():
        if not key.startswith("fc."):
            assert torch.equal(model.state_dict()[f"backbone.{key}"], value), key
    assert not model.backbone.conv1.weight.requires_grad and model.profile.name == "mmdet"


def test_our_own_file_brings_its_architecture_along(tmp_path):
    start = tiny_model()
    save(start, tmp_path / "a.safetensors")
    model = pretrained_model(tmp_path / "a.safetensors", 5, min_size=80)
    assert model.num_classes == 5 and model.backbone.conv1.out_channels == 8
    assert (model.data_preprocessor.min_size, model.data_preprocessor.max_size) == (80, 96)
    again = tmp_path / "b.safetensors"
    save(model, again)
    found = infer_model(again).state_dict()
    for key, value in model.state_dict().items():
        assert torch.equal(value, found[key]), key


def test_a_classifier_of_another_depth_is_named_key_by_key():
    theirs = torchvision.models.resnet18(weights=None).state_dict()
    with pytest.raises(ValueError, match=r"missing keys: backbone\.layer1\.2\.conv1\.weight"):
        pretrained_model(theirs, 2, "r34_fpn")


def test_a_file_of_an_unknown_profile_leaves_the_model_untouched(tmp_path):
    save_file(tiny_model().state_dict(), tmp_path / "a.safetensors", dict(profile="yolo"))
    model = tiny_model()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"a\.safetensors: profile: expected one of .*'yolo'"):
        load_weights(model, tmp_path / "a.safetensors")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_our_own_files_style_and_input_go_into_a_model_that_has_others(tmp_path):
    pixels = dict(mean=(1.0, 2.0, 3.0), std=(1.0, 1.0, 1.0), bgr_to_rgb=False)
    start = tiny_model("r50_fpn", backbone=dict(style="caffe"), data_preprocessor=pixels)
    save(start, tmp_path / "a.safetensors")
    model = load_weights(tiny_model("r50_fpn", seed=1), tmp_path / "a.safetensors")
    assert model.backbone.style == "caffe" and model.data_preprocessor.bgr
    assert model.data_preprocessor.mean == (1.0, 2.0, 3.0)
