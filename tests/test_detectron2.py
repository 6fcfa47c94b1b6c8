"""Detectron2's models: their keys and order of anchors, what their files do not say, downloads checked by their MD5."""

import pickle

import pytest
import torch
from conftest import tiny_model, tiny_options
from torch import nn
from torchvision.ops import roi_align

from fastrcnn.checkpoints import detectron2
from fastrcnn.checkpoints.peer_options import EXTRA_STATE, PeerOptions
from fastrcnn.models import RPN, RPNHead, StandardRoIHead, faster_rcnn
from fastrcnn.models.build import merge
from fastrcnn.weights import export_weights, infer_model, load_weights
from fastrcnn.zoo.recipes import model_config

BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
NORM = ("weight", "bias", "running_mean", "running_var")
TINY = tiny_options("r50_dc5")


def unit(name: str, norm: str) -> set[str]:
    return {f"{name}.weight", *(f"{norm}.{part}" for part in NORM)}


def stage(name: str, blocks: int) -> set[str]:
    """Keys of a stage of Detectron2's ResNet, whose first block has the shortcut."""
    convs = {f"{name}.{i}.conv{j}" for i in range(blocks) for j in (1, 2, 3)} | {f"{name}.0.shortcut"}
    return set().union(*(unit(conv, f"{conv}.norm") for conv in convs))


def detectron2_keys(kind: str, depth: int) -> set[str]:
    layers = ["proposal_generator.rpn_head." + name for name in ("conv", "objectness_logits", "anchor_deltas")]
    layers += ["roi_heads.box_predictor." + name for name in ("cls_score", "bbox_pred")]
    layers += ["roi_heads.box_head.fc1", "roi_heads.box_head.fc2"] if kind == "dc5" else []
    keys = {f"{layer}.{part}" for layer in layers for part in ("weight", "bias")}
    keys |= unit("backbone.stem.conv1", "backbone.stem.conv1.norm")
    for i, blocks in enumerate(BLOCKS[depth], 2):
        keys |= stage("roi_heads.res5" if kind == "c4" and i == 5 else f"backbone.res{i}", blocks)
    return keys


def overrides(kind: str, depth: int) -> dict:
    deeper = dict(backbone=dict(depth=depth))
    return deeper | (dict(roi_head=dict(shared_head=dict(depth=depth))) if kind == "c4" else {})


def state_of(kind: str, depth: int, classes: int = 3) -> dict:
    """Our keys and shapes; values only in the RPN's output layers, since the rest is only renamed."""
    with torch.device("meta"):
        model = faster_rcnn(f"r50_{kind}", classes, "detectron2", **overrides(kind, depth))
    state = {k: torch.zeros(()).expand(v.shape) for k, v in model.state_dict().items() if k != EXTRA_STATE}
    return {
        k: torch.randn(v.shape) if k.startswith(("rpn_head.rpn_cls", "rpn_head.rpn_reg")) else v
        for k, v in state.items()
    }


@pytest.mark.parametrize("depth", [50, 101])
@pytest.mark.parametrize("kind", ["c4", "dc5"])
def test_the_keys_of_c4_and_dc5(kind, depth):
    ours = state_of(kind, depth)
    theirs = detectron2.export(ours)
    assert set(theirs) == detectron2_keys(kind, depth) and detectron2.detect(theirs)
    back = detectron2.convert(theirs)
    assert set(back) == {k for k in ours if not k.endswith("num_batches_tracked")}
    for key, value in back.items():
        assert value.shape == ours[key].shape and torch.equal(value, ours[key]), key
    for old, new in (("conv2.weight", "conv2.weight"), ("bn2.running_var", "conv2.norm.running_var")):
        last = "roi_heads.res5" if kind == "c4" else "backbone.res5"
        layer4 = "roi_head.shared_head.layer4" if kind == "c4" else "backbone.layer4"
        marked = {**ours, f"{layer4}.1.{old}": torch.ones_like(ours[f"{layer4}.1.{old}"])}
        assert [k for k, v in detectron2.export(marked).items() if "res5" in k and v.any()] == [f"{last}.1.{new}"]


def test_a_c4_of_101_layers_is_told_by_its_keys():
    theirs = detectron2.export(state_of("c4", 101))
    model = infer_model({"model": theirs})
    assert model.backbone.depth == 101 and model.num_classes == 3
    assert len(model.roi_head.shared_head.layer4) == 3 and model.backbone.style == "caffe"
    back = export_weights(model, "detectron2")
    assert all(torch.equal(v, back[k]) for k, v in theirs.items())


def cell_anchors(sizes, ratios) -> torch.Tensor:
    """Detectron2's: size by size, the ratios (height / width) within each."""
    wh = [(s / r**0.5, s * r**0.5) for s in sizes for r in ratios]
    return torch.tensor([[-w / 2, -h / 2, w / 2, h / 2] for w, h in wh])


@pytest.mark.parametrize("sizes, ratios", [((32, 64, 128, 256, 512), (0.5, 1.0, 2.0)), ((16, 48), (0.5, 2.0))])
def test_every_anchor_keeps_its_score_and_deltas(sizes, ratios):
    """Biases that tell which anchor a row belongs to end up at that anchor, and weights with them."""
    anchors = cell_anchors(sizes, ratios)
    rows = torch.arange(len(anchors) * 4.0)
    head = "proposal_generator.rpn_head."
    theirs = {
        f"{head}objectness_logits.bias": anchors[:, 2],
        f"{head}objectness_logits.weight": anchors[:, 2, None, None, None].expand(-1, 8, 1, 1),
        f"{head}anchor_deltas.bias": anchors.flatten(),
        f"{head}anchor_deltas.weight": rows[:, None, None, None].expand(-1, 8, 1, 1),
        "proposal_generator.anchor_generator.cell_anchors.0": anchors,
    }
    generator = dict(type="AnchorGenerator", scales=[s / 16 for s in sizes], ratios=list(ratios), strides=[16])
    model = RPNHead(8, 8, anchor_generator=generator)
    base = model.anchor_generator.base_anchors()[0]
    ours = detectron2.convert(theirs)
    assert not torch.allclose(base, anchors)  # another order
    torch.testing.assert_close(ours["rpn_head.rpn_reg.bias"].reshape(-1, 4), base)
    torch.testing.assert_close(ours["rpn_head.rpn_cls.bias"], base[:, 2])
    torch.testing.assert_close(ours["rpn_head.rpn_cls.weight"][:, 3, 0, 0], base[:, 2])
    owner = (ours["rpn_head.rpn_reg.weight"][:, 0, 0, 0] // 4).long()[::4]  # the row in Detectron2's order
    torch.testing.assert_close(anchors[owner], base)
    back = detectron2.export(ours, len(ratios))
    assert all(torch.equal(back[k], v) for k, v in theirs.items() if "anchor_generator" not in k)


def test_one_size_a_level_needs_no_other_order():
    rows = torch.randn(3)
    key = "proposal_generator.rpn_head.objectness_logits.weight"
    assert torch.equal(detectron2.convert({key: rows})["rpn_head.rpn_cls.weight"], rows)


def test_exporting_asks_the_model_for_its_order_of_anchors():
    anchors = dict(scales=[2, 4], ratios=[0.5, 1.0, 2.0], strides=[32])
    for scale_major, order in ((True, [0, 2, 4, 1, 3, 5]), (False, [0, 1, 2, 3, 4, 5])):
        model = proposer("detectron2", **anchors, scale_major=scale_major)
        with torch.no_grad():
            model.rpn_head.rpn_cls.bias.copy_(torch.arange(6.0))
        exported = export_weights(model, "detectron2")["proposal_generator.rpn_head.objectness_logits.bias"]
        assert exported.tolist() == order


def proposer(profile: str, **anchors) -> RPN:
    backbone = dict(type="ResNet", depth=50, base_channels=4, out_indices=(3,), style="caffe")
    head = dict(
        type="RPNHead", in_channels=128, feat_channels=8, anchor_generator=dict(type="AnchorGenerator", **anchors)
    )
    return RPN(backbone, None, head, profile=profile, min_size=64, max_size=96).eval()


def test_a_lone_rpn_goes_out_and_comes_back():
    anchors = dict(scales=[1, 2, 4, 8, 16], ratios=[0.5, 1.0, 2.0], strides=[32])
    source, image = proposer("detectron2", **anchors), [torch.rand(3, 64, 90)]
    nn.init.normal_(source.rpn_head.rpn_cls.bias)
    state = export_weights(source, "detectron2")
    loaded = load_weights(proposer("mmdet", **anchors), state)
    assert loaded.profile.name == "detectron2"
    for key, value in source(image)[0].items():
        assert torch.equal(value, loaded(image)[0][key])
    with pytest.raises(ValueError, match=r"from_mmdet_config.*load_weights"):
        infer_model(state)


def test_a_dc5_in_a_pickle_of_numpy_arrays(tmp_path):
    source = tiny_model("r50_dc5", "detectron2")
    state = {k: v.numpy() for k, v in export_weights(source, "detectron2").items()}
    cells = cell_anchors((32, 64, 128, 256, 512), (0.5, 1.0, 2.0)).numpy()
    state["proposal_generator.anchor_generator.cell_anchors.0"] = cells
    (tmp_path / "model_final.pkl").write_bytes(pickle.dumps(dict(model=state, __author__="Detectron2 Model Zoo")))
    loaded = infer_model(tmp_path / "model_final.pkl", **TINY)
    assert loaded.profile.name == "detectron2" and loaded.backbone.style == "caffe"
    image = [torch.rand(3, 64, 90)]
    found, expected = loaded(image)[0], source(image)[0]
    assert len(found["boxes"]) > 20
    for key in found:
        assert torch.equal(found[key], expected[key])


def test_the_second_stage_of_c4():
    """14 x 14 values of each box from the one map of stride 16, the last stage with stride 2, the mean over 7 x 7."""
    config = model_config("r50_c4", 3, "detectron2")["roi_head"]
    head = StandardRoIHead(**{k: v for k, v in config.items() if k != "type"}, profile="detectron2").eval()
    feat, rois = torch.rand(1, 1024, 5, 6), torch.tensor([[0, 3.0, 5, 70, 60], [0, 20.0, 10, 90, 77]])
    stage5 = head.shared_head.layer4
    assert (stage5[0].conv1.stride, stage5[0].conv2.stride) == ((2, 2), (1, 1))
    with torch.no_grad():
        scores, deltas = head([feat], rois)
        pooled = stage5(roi_align(feat, rois, 14, 1 / 16, 0, True))
        assert pooled.shape[2:] == (7, 7)
        x = pooled.mean((2, 3))
        torch.testing.assert_close(scores, head.bbox_head.fc_cls(x), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(deltas, head.bbox_head.fc_reg(x), rtol=1e-4, atol=1e-4)


def test_the_networks_of_the_configurations():
    for name in ("r50_c4", "r50_dc5"):
        with torch.device("meta"):
            model = faster_rcnn(name, 80, "detectron2")
        assert model.rpn_head.test_cfg["nms_pre"] == 6000 and model.rpn_head.test_cfg["max_per_img"] == 1000
        assert (model.rpn_proposal["nms_pre"], model.rpn_proposal["max_per_img"]) == (12000, 2000)
        generator = model.rpn_head.anchor_generator
        assert [16 * s for s in generator.scales[0]] == [32, 64, 128, 256, 512] and generator.strides == [(16, 16)]
    assert {b.conv2.dilation for b in model.backbone.layer4} == {(2, 2)}


SMALL = tiny_options("r50_fpn", 32)  # channels that 32 groups divide


def small(profile="mmdet", name="r50_fpn", **overrides):
    return faster_rcnn(name, 3, profile, **merge(SMALL, overrides))


@pytest.fixture(scope="module")
def plain():
    """A small Faster R-CNN in Detectron2's keys, without statistics of the input."""
    return detectron2.export(small().state_dict())


def strides(model) -> tuple:
    block = model.backbone.layer2[0]
    return block.conv1.stride[0], block.conv2.stride[0]


def test_a_file_leaves_the_style_of_a_model_built_for_detectron2(plain):
    assert strides(load_weights(small("detectron2", backbone=dict(style="pytorch")), plain)) == (1, 2)
    assert strides(load_weights(small("detectron2"), plain)) == (2, 1)
    assert strides(infer_model(plain, **merge(SMALL, dict(backbone=dict(style="pytorch"))))) == (1, 2)


def test_elsewhere_detectron2s_own_style_is_taken(plain):
    assert strides(infer_model(plain, **SMALL)) == (2, 1)
    for built_for in ("mmdet", "torchvision"):
        assert strides(load_weights(small(built_for, backbone=dict(style="pytorch")), plain)) == (2, 1)
    wide = dict(backbone=dict(type="ResNeXt", groups=2, base_width=32))  # grouped, under a plain ResNet's name
    grouped = detectron2.export(small(**wide).state_dict())
    for model in (load_weights(small(**wide), grouped), infer_model(grouped, "r50_fpn", **merge(SMALL, wide))):
        assert strides(model) == (1, 2)


@pytest.mark.parametrize("built_for", ["mmdet", "detectron2"])
@pytest.mark.parametrize("mean, bgr", [((1.0, 2.0, 3.0), True), ((3.0, 2.0, 1.0), False), ((2.0, 3.0, 2.0), True)])
def test_the_inputs_statistics_and_order_are_taken_from_the_file(plain, built_for, mean, bgr):
    pixels = dict(pixel_mean=torch.tensor(mean)[:, None, None], pixel_std=torch.full((3, 1, 1), 57.0))
    p = load_weights(small(built_for), {**plain, **pixels}).data_preprocessor
    assert (p.mean, p.std, p.bgr) == (mean, (57.0, 57.0, 57.0), bgr)


def test_means_that_tell_no_order_leave_it_to_the_model(plain):
    own = dict(mean=(1, 2, 3), std=(1, 1, 1), bgr_to_rgb=True)
    state = {**plain, "pixel_mean": torch.full((3,), 127.0)}
    p = load_weights(small("detectron2", data_preprocessor=own), state).data_preprocessor
    assert (p.mean, p.std, p.bgr) == ((127.0,) * 3, (1, 1, 1), False)


def test_the_input_of_x101_32x8d():
    narrow = dict(neck=dict(in_channels=[32, 64, 128, 256]))
    theirs = detectron2.export(small(name="x101_32x8d_fpn", backbone=dict(base_channels=8), **narrow).state_dict())
    for name, extra in (("x101_32x8d_fpn", {}), ("r101_fpn", dict(type="ResNeXt", groups=32, base_width=8))):
        model = small(name=name, backbone=dict(base_channels=8, **extra), **narrow)
        p = load_weights(model, theirs).data_preprocessor
        assert (p.mean, p.std, p.bgr) == ((103.53, 116.28, 123.675), (57.375, 57.12, 58.395), True)
    for blocks, width in ((36, 8), (23, 4)):  # X152's input is not divided, and 32x4d is none of Detectron2's
        state = {f"backbone.layer3.{i}.conv1.weight": torch.zeros(1) for i in range(blocks)}
        state["backbone.layer1.0.conv2.weight"] = torch.zeros(32 * width, width, 3, 3)
        assert detectron2.defaults(state) == PeerOptions(style="pytorch")


def test_without_a_pyramid_images_are_padded_to_the_largest_only(plain):
    def pads(model) -> tuple[int, int]:
        return model.data_preprocessor.pad_size_divisor, model.rpn_head.pad_size_divisor

    model, theirs = tiny_model("r50_dc5"), export_weights(tiny_model("r50_dc5", "detectron2"), "detectron2")
    assert pads(model) == (32, 32) and pads(load_weights(model, theirs)) == (1, 1)
    assert load_weights(model, theirs).data_preprocessor([torch.rand(3, 65, 90)])[0].shape[2:] == (64, 89)
    assert pads(load_weights(model, tiny_model("r50_dc5").state_dict())) == (32, 32)
    own = faster_rcnn("r50_dc5", 3, "detectron2", **merge(TINY, dict(data_preprocessor=dict(pad_size_divisor=16))))
    assert pads(load_weights(own, tiny_model("r50_dc5").state_dict())) == (32, 32)
    assert pads(load_weights(own, theirs)) == (16, 16)
    assert pads(load_weights(small(data_preprocessor=dict(pad_size_divisor=64)), plain)) == (64, 64)


@pytest.mark.parametrize("kind, planes", [("DCN", 18), ("DCNv2", 27)])
def test_deformable_convolutions_go_out_and_come_back(kind, planes):
    dcn = dict(backbone=dict(dcn=dict(type=kind, deform_groups=2), stage_with_dcn=(False, True, True, True)))
    source = small("detectron2", **dcn)
    for name, parameter in source.named_parameters():
        if "conv_offset" in name:
            nn.init.normal_(parameter, std=0.1)
    theirs = export_weights(source, "detectron2")
    body = "backbone.bottom_up.res3.0."
    assert {k for k in theirs if k.startswith(f"{body}conv2")} == unit(f"{body}conv2", f"{body}conv2.norm") | {
        f"{body}conv2_offset.weight",
        f"{body}conv2_offset.bias",
    }
    assert theirs[f"{body}conv2_offset.weight"].shape == (2 * planes, 64, 3, 3)
    assert torch.equal(theirs[f"{body}conv2_offset.bias"], source.backbone.layer2[0].conv2.conv_offset.bias)
    assert not any("res2." in k and "offset" in k for k in theirs)
    loaded = load_weights(small(**dcn), theirs)
    assert loaded.profile.name == "detectron2" and loaded.backbone.layer2[0].conv2.conv_offset.stride == (1, 1)
    assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in source.state_dict().items())
    with pytest.raises(ValueError, match=r"unexpected keys: backbone\.layer2\.0\.conv2\.conv_offset\.weight"):
        infer_model(theirs, **SMALL)


def test_a_c4s_last_stage_has_no_deformable_convolutions():
    key = "roi_head.shared_head.layer4.0.conv2.conv_offset.weight"
    with pytest.raises(ValueError, match=f"no place for {key}"):
        detectron2.export({key: torch.zeros(18, 4, 3, 3)})


@pytest.mark.parametrize("kind", ["GN", "BN", None])
def test_norms_in_the_pyramid_and_the_head_go_out_and_come_back(kind):
    norm = None if kind is None else dict(type=kind, **(dict(num_groups=32) if kind == "GN" else {}))
    head = dict(bbox_head=dict(type="Shared4Conv1FCBBoxHead", norm_cfg=norm))
    layers = dict(neck=dict(norm_cfg=norm), roi_head=head)
    if kind == "GN":
        layers["backbone"] = dict(norm_cfg=norm)
    source = small("detectron2", **layers)
    for parameter in source.parameters():
        nn.init.normal_(parameter, std=0.1)
    theirs = export_weights(source, "detectron2")
    parts = dict(GN=("weight", "bias"), BN=NORM)[kind] if kind else ()
    for name in ("backbone.fpn_lateral2", "backbone.fpn_output5", "roi_heads.box_head.conv1"):
        expected = {f"{name}.weight", *(f"{name}.norm.{part}" for part in parts)} | (
            set() if kind else {f"{name}.bias"}
        )
        assert {k for k in theirs if k.startswith(f"{name}.")} == expected
    assert {k for k in theirs if ".fc" in k} == {"roi_heads.box_head.fc1.weight", "roi_heads.box_head.fc1.bias"}
    first = source.roi_head.bbox_head.shared_convs[0]
    assert torch.equal(theirs["roi_heads.box_head.conv1.weight"], first.conv.weight)
    loaded = load_weights(small(**layers), theirs)
    assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in source.state_dict().items() if "tracked" not in k)
    stem = {"backbone.gn1.weight", "backbone.gn1.bias"}
    assert {k for k in detectron2.convert(theirs) if k.startswith("backbone.gn1.")} == (stem if kind == "GN" else set())
