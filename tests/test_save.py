"""A model that is written and read again is the same model, whoever writes it and whatever carries its state dict."""

import copy
import json
import os
import stat

import pytest
import torch
from conftest import lively, picture, tiny_model, tiny_options
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision.models import detection

import fastrcnn
from fastrcnn.checkpoints import torchvision
from fastrcnn.checkpoints.peer_options import PeerOptions
from fastrcnn.models import FasterRCNN, ResNet, faster_rcnn, from_mmdet_config, retinanet
from fastrcnn.models.build import merge
from fastrcnn.weights import export_weights, infer_model, load_weights, model_metadata, pretrained_model, save, writable

SMALL = tiny_options() | dict(test_cfg=dict(rcnn=dict(score_thr=0.0)))
# What a checkpoint may decide, each of which moves boxes.
OPTIONS = PeerOptions(mean=(1.0, 2.0, 3.0), std=(50.0, 60.0, 70.0), bgr_to_rgb=False, pad_size_divisor=64, norm_eps=0.5)
IMAGE = [picture(70, 90)]


def small(profile="mmdet", options: PeerOptions | None = None) -> FasterRCNN:
    model = tiny_model(profile=profile, test_cfg=SMALL["test_cfg"])
    if options is not None:
        model.follow(profile, options)
    return model


def of_a_config() -> FasterRCNN:
    """A model that no name stands for, and nothing in its keys tells its sampling, its loss or its input."""
    model = copy.deepcopy(small().built.arguments)
    model = {k: v for k, v in model.items() if k not in ("profile", "min_size", "max_size", "data_preprocessor")}
    model["data_preprocessor"] = dict(
        mean=[9.0, 8.0, 7.0], std=[50.0, 60.0, 70.0], bgr_to_rgb=False, pad_size_divisor=64
    )
    model["roi_head"]["bbox_roi_extractor"]["roi_layer"].update(sampling_ratio=3, aligned=False)
    model["roi_head"]["bbox_head"].update(reg_decoded_bbox=True, loss_bbox=dict(type="GIoULoss", loss_weight=10.0))
    model["backbone"]["pretrained"] = "https://example.com/start.pth"
    model["test_cfg"]["rcnn"]["nms"] = dict(type="soft_nms", iou_threshold=0.4)
    resize = dict(type="Resize", scale=(96, 64), keep_ratio=True)
    torch.manual_seed(5)
    return lively(from_mmdet_config(dict(model=model, test_pipeline=[resize], schedule=(1, "x"))))


PROFILES = ("mmdet", "torchvision", "detectron2")
MODELS = {
    **{f"{p} {bool(o)}": (lambda p=p, o=o: small(p, o)) for p in PROFILES for o in (None, OPTIONS)},
    "config": of_a_config,
    "retinanet": lambda: tiny_model("retinanet_r18_fpn", "detectron2"),
    "rpn": lambda: tiny_model("rpn_r50_fpn"),
    "dc5": lambda: tiny_model("r50_dc5", num_classes=2),
}


def assert_same(a, b) -> None:
    first, second = a.eval()(IMAGE)[0], b.eval()(IMAGE)[0]
    assert len(first["boxes"]) > 5
    for key, value in first.items():
        assert torch.equal(value, second[key]), key
    assert a.profile is b.profile and a.peer_options == b.peer_options


@pytest.mark.parametrize("kind", MODELS)
def test_a_saved_model_is_the_same_model_again(tmp_path, kind):
    model = MODELS[kind]()
    model.class_names = [f"{'ab'[i % 2]}\n{i}" for i in range(model.num_classes)]
    model.category_ids = [7 * i + 1 for i in range(model.num_classes)][::-1]
    path = save(model, tmp_path / "deeper" / ("m.pth" if kind in ("config", "rpn") else "m.safetensors"), dict(ap="50"))
    again = infer_model(path)
    assert_same(model, again)
    assert (again.class_names, again.category_ids) == (model.class_names, model.category_ids)
    assert type(again) is type(model) and repr(again) == repr(model)
    assert fastrcnn.Detector(path, device="cpu").category_ids == model.category_ids
    if kind == "config":
        assert again.config["schedule"] == [1, "x"] and again.backbone.pretrained is None
        assert type(again.roi_head.bbox_head.loss_bbox).__name__ == "GIoULoss"


CARRIERS = {
    "torch": lambda m, p: torch.save(m.state_dict(), p),
    "nested": lambda m, p: torch.save(dict(model=m.state_dict(), epoch=1), p),
    "compiled": lambda m, p: torch.save(torch.compile(m).state_dict(), p),
    "averaged": lambda m, p: torch.save(torch.optim.swa_utils.AveragedModel(m).state_dict(), p),
    "parallel": lambda m, p: torch.save(nn.DataParallel(m).state_dict(), p),
    "wrapped": lambda m, p: torch.save(dict(state_dict=nn.ModuleDict(dict(model=m)).state_dict()), p),
    "copied": lambda m, p: torch.save({k: v.clone() for k, v in m.state_dict().items()}, p),
    "safetensors": lambda m, p: save_file(m.state_dict(), p),
}


@pytest.mark.parametrize("carrier", CARRIERS)
@pytest.mark.parametrize("profile", PROFILES)
def test_a_state_dict_says_whose_it_is(tmp_path, carrier, profile):
    lost = profile == "mmdet" and carrier in ("copied", "safetensors")  # MMDetection's keys and nothing else
    model = small(profile, None if lost else OPTIONS)
    CARRIERS[carrier](model, tmp_path / "m.pth")
    assert_same(infer_model(tmp_path / "m.pth", **SMALL), model)
    assert_same(load_weights(small("torchvision" if profile == "mmdet" else "mmdet"), tmp_path / "m.pth"), model)


def test_mmdetections_keys_are_the_keys():
    plain, other = small(), small("torchvision", OPTIONS)
    keys = {k for k, _ in [*plain.named_parameters(), *plain.named_buffers()]}
    assert set(small("mmdet", OPTIONS).state_dict()) == set(plain.state_dict()) == keys
    assert set(other.state_dict()) == keys | {"_extra_state"}
    plain_dict = {k: v for k, v in small().state_dict().items()}
    other.load_state_dict(plain_dict, strict=True)  # a file of MMDetection leaves the profile
    assert other.profile.name == "torchvision" and other.peer_options == small("torchvision", OPTIONS).peer_options
    theirs = nn.Module.load_state_dict
    assert theirs(nn.ModuleDict(dict(backbone=ResNet(18, base_channels=8))), small().state_dict(), strict=False)
    for peer in ("torchvision", "detectron2"):
        source = small(peer)
        assert not any("extra" in k for k in export_weights(source, peer))
        plain.load_state_dict(source.state_dict(), strict=True)
        assert_same(plain, source)


def test_what_training_has_counted_is_kept(tmp_path):
    model = MODELS["retinanet"]()
    model.bbox_head.loss_normalizer.fill_(7.0)
    assert infer_model(save(model, tmp_path / "m.pth")).bbox_head.loss_normalizer == 7
    torch.save(model.state_dict(), tmp_path / "s.pth")
    fresh = retinanet("retinanet_r18_fpn", 3, **tiny_options("retinanet_r18_fpn"))
    assert load_weights(fresh, tmp_path / "s.pth").bbox_head.loss_normalizer == 7
    assert not any("normalizer" in k for k in export_weights(model, "detectron2"))


def test_the_same_model_is_the_same_file(tmp_path):
    model, files = small(), set()
    model.class_names = ["é", "b", "c"]
    for number in range(8):  # the package safetensors has an order of its own for each
        files.add(save(model, tmp_path / f"{number}.safetensors").read_bytes())
    assert len(files) == 1
    state, own = load_file(tmp_path / "0.safetensors"), model.state_dict()
    assert all(torch.equal(value, own[key]) for key, value in state.items())
    assert infer_model(tmp_path / "0.safetensors").class_names == model.class_names


def test_the_sizes_are_those_of_now(tmp_path):
    model = small()
    model.data_preprocessor.resize_to(48, 80)
    pixels = infer_model(save(model, tmp_path / "a.safetensors")).data_preprocessor
    assert (pixels.min_size, pixels.max_size) == (48, 80) != (model.built.arguments["min_size"], 0)


def test_loading_ones_own_state_changes_nothing_else():
    model = of_a_config()
    model.backbone.requires_grad_(False)
    model.load_state_dict(model.state_dict())
    assert type(model.roi_head.bbox_head.loss_bbox).__name__ == "GIoULoss"
    assert not any(p.requires_grad for p in model.backbone.parameters())
    broken = {**small("torchvision").state_dict(), "_extra_state": torch.zeros(3, dtype=torch.uint8)}
    with pytest.raises(RuntimeError, match="_extra_state: "):
        model.load_state_dict(broken)


def test_other_classes_start_from_a_saved_config(tmp_path):
    model = pretrained_model(save(of_a_config(), tmp_path / "m.pt"), 5, min_size=80)
    assert (
        model.num_classes == 5 and model.data_preprocessor.min_size == 80 and model.data_preprocessor.mean == (9, 8, 7)
    )
    assert torch.equal(model.backbone.conv1.weight, of_a_config().backbone.conv1.weight)


def test_a_file_is_whole_or_not_there(tmp_path, monkeypatch):
    path, old = tmp_path / "m.pth", os.umask(0o027)
    try:
        save(small(), path)
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    before = path.read_bytes()
    monkeypatch.setattr(torch, "save", lambda content, file: file.write(b"half") and 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save(small(), path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["m.pth"]


def test_what_cannot_be_written_is_said_before(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.pth").mkdir()
    suffixes = r"m\.onnx: expected a name that ends in \.safetensors, \.pth or \.pt"
    for name, error, words in (("m.onnx", ValueError, suffixes), ("file/m.pth", OSError, "cannot be written"),
                               ("folder.pth", OSError, "is no file")):  # fmt: skip
        for refuse in (writable, lambda path: save(small(), path)):
            with pytest.raises(error, match=words):
                refuse(tmp_path / name)
    parts = {k: v for k, v in small().built.arguments.items() if k != "type"}
    model = FasterRCNN(**{**parts, "backbone": ResNet(18, base_channels=8)})
    with pytest.raises(ValueError, match="backbone: a ResNet was handed in as a module"):
        save(model, tmp_path / "m.pth")
    model = small()
    model.class_names = ["one"]
    with pytest.raises(ValueError, match="class_names: expected one for each of the 3 classes, got 1"):
        save(model, tmp_path / "m.pth")
    assert not (tmp_path / "m.pth").exists()


def meta_of(path) -> tuple[dict, dict]:
    with safe_open(path, "pt") as file:
        return load_file(path), dict(file.metadata())


HOSTILE = dict(
    list=[1], null=None, text="x", type=dict(type="os.system"), unknown=dict(nosuch=1),
    weights=dict(weights="https://x/y"),
    backbone=dict(backbone="x"), neck=dict(neck=[dict(type="FPN")] * 3), classes=dict(num_classes=7),
    layers=dict(roi_head=dict(type="StandardRoIHead", bbox_roi_extractor={}, bbox_head=dict(num_shared_convs=10**9))),
    channels=dict(neck=dict(SMALL["neck"], type="FPN", out_channels=10**9)),
    memory=dict(neck=dict(SMALL["neck"], type="FPN", out_channels=10**5, num_outs=5)),
    depth=dict(backbone=dict(type="ResNet", depth=152)),
)  # fmt: skip


@pytest.mark.parametrize("key", ["detector", "overrides"])
@pytest.mark.parametrize("kind", HOSTILE)
def test_metadata_cannot_describe_another_model(tmp_path, key, kind):
    tensors, meta = meta_of(save(small(), tmp_path / "m.safetensors"))
    whole = json.loads(meta.pop("detector"))
    if key == "overrides":
        meta.pop("peer")
        whole = SMALL
        meta |= dict(model="r18_fpn", profile="mmdet", class_names="a\nb\nc")
    save_file(tensors, tmp_path / "m.safetensors", {**meta, key: json.dumps(whole)})
    assert infer_model(tmp_path / "m.safetensors").data_preprocessor.min_size == 64
    content = {**whole, **HOSTILE[kind]} if isinstance(HOSTILE[kind], dict) else HOSTILE[kind]
    save_file(tensors, tmp_path / "m.safetensors", {**meta, key: json.dumps(content)})
    with pytest.raises(ValueError, match=r"m\.safetensors"):
        infer_model(tmp_path / "m.safetensors")


@pytest.mark.parametrize("key, text", [
    ("detector", "[" * 100_000), ("categories", "{}"), ("categories", "[1]"), ("mmdet_config", "[]"), ("peer", "3"),
    *(("peer", json.dumps(dict(profile="mmdet") | said)) for said in (dict(profile="yolo"), dict(norm_eps=float("nan")),
                                                                      dict(mean=[1, 2]), dict(style="x"), dict(a=1))),
])  # fmt: skip
def test_metadata_that_are_not_understood_are_named(tmp_path, key, text):
    tensors, meta = meta_of(save(small(), tmp_path / "m.safetensors"))
    save_file(tensors, tmp_path / "m.safetensors", {**meta, key: text})
    with pytest.raises(ValueError, match=r"m\.safetensors: "):
        infer_model(tmp_path / "m.safetensors")


@pytest.mark.parametrize("profile", PROFILES)
def test_files_in_the_form_of_version_0_1(tmp_path, profile):
    model = small(profile)
    model.class_names = ["a", "b", "c"]
    state = {k: v.contiguous() for k, v in model.state_dict().items()}
    save_file(state, tmp_path / "m.safetensors", model_metadata("r18_fpn", model, model.zoo_overrides))
    again = infer_model(tmp_path / "m.safetensors")
    assert_same(model, again)
    assert again.class_names == model.class_names


CONSTRUCTORS = [detection.fasterrcnn_resnet50_fpn, detection.fasterrcnn_resnet50_fpn_v2]


@pytest.mark.parametrize("constructor", CONSTRUCTORS)
def test_torchvision_takes_its_own_weights_back_unchanged(constructor):
    theirs = constructor(weights=None, weights_backbone=None, num_classes=5)
    state = {k: v.clone() for k, v in theirs.state_dict().items()}  # what is loaded below would change it
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
    model = tiny_model("r50_fpn", peer)
    again = load_weights(tiny_model("r50_fpn", seed=1), export_weights(model, peer))
    assert again.profile.name == peer
    for key, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key


def test_another_profile_and_an_unknown_peer_are_refused():
    model = tiny_model()
    with pytest.raises(ValueError, match="follows the profile 'mmdet'"):
        export_weights(model, "torchvision")
    with pytest.raises(ValueError, match="peer"):
        export_weights(model, "yolo")


def test_a_layer_that_the_peer_does_not_have_is_named():
    head = dict(type="ConvFCBBoxHead", num_shared_fcs=1, num_cls_fcs=1)
    model = narrow("r18_fpn", "torchvision", roi_head=dict(bbox_head=head))
    with pytest.raises(ValueError, match="cls_fcs"):
        export_weights(model, "torchvision")


def narrow(name: str, profile: str, **overrides):
    """A small model as it is born."""
    return faster_rcnn(name, 3, profile, **merge(tiny_options(name), overrides))


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
    assert export_weights(narrow("r18_fpn", peer, backbone=dict(style=style)), peer)


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
