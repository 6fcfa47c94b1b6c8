"""Deformable convolution and plugins inside the residual blocks, and where the weights of a backbone come from."""

import pytest
import torch
from torch import nn

from fastrcnn.layers import (
    ContextBlock,
    DeformConv2dPack,
    GeneralizedAttention,
    ModulatedDeformConv2dPack,
    NonLocal2d,
)
from fastrcnn.models import ResNet, ResNeXt
from fastrcnn.models.resnet import Bottleneck

SMALL = dict(depth=50, base_channels=8, zero_init_residual=False)  # else every fresh block is the identity
LAST_TWO = (False, False, True, True)


def image(size=(64, 96)) -> torch.Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind, layer", [("DCN", DeformConv2dPack), ("DCNv2", ModulatedDeformConv2dPack)])
def test_the_marked_stages_are_deformable(kind, layer):
    model = ResNet(dcn=dict(type=kind, deform_groups=2), stage_with_dcn=LAST_TWO, **SMALL)
    for i, marked in enumerate(LAST_TWO, 1):
        for block in getattr(model, f"layer{i}"):
            assert type(block.conv2) is (layer if marked else nn.Conv2d)
            assert not marked or block.conv2.deform_groups == 2


def test_keys_of_deformable_blocks():
    model = ResNet(dcn=dict(type="DCN"), stage_with_dcn=(False, False, False, True), **SMALL)
    own = {k for k in model.state_dict() if k.startswith("layer4.0.conv2")}
    assert own == {f"layer4.0.conv2.{k}" for k in ("weight", "conv_offset.weight", "conv_offset.bias")}


def test_fresh_offsets_leave_a_backbone_as_it_is(device):
    """All offsets are 0, so that v1 is the plain convolution with the same weights."""
    plain = ResNet(**SMALL).eval().to(device)
    deformable = ResNet(dcn=dict(type="DCN"), stage_with_dcn=(True,) * 4, **SMALL).eval().to(device)
    missing = deformable.load_state_dict(plain.state_dict(), strict=False).missing_keys
    assert missing and all("conv_offset" in k for k in missing)
    x = image().to(device)
    with torch.no_grad():
        for a, b in zip(deformable(x), plain(x)):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * b.abs().max().item())


def test_offsets_move_the_samples():
    model = ResNet(dcn=dict(type="DCN"), stage_with_dcn=LAST_TWO, **SMALL).eval()
    with torch.no_grad():
        before = model(image())
        model.layer3[0].conv2.conv_offset.bias.fill_(0.5)
        after = model(image())
    assert torch.equal(before[1], after[1]) and not torch.allclose(before[2], after[2], rtol=1e-3)


@pytest.mark.parametrize(
    "style, fallback, strided", [("pytorch", True, nn.Conv2d), ("pytorch", False, DeformConv2dPack),
                                 ("caffe", True, DeformConv2dPack)]
)  # fmt: skip
def test_fallback_on_stride_is_for_convolutions_with_a_stride(style, fallback, strided):
    dcn = dict(type="DCN", fallback_on_stride=fallback)
    model = ResNet(dcn=dcn, stage_with_dcn=(False, True, True, True), style=style, **SMALL)
    for stage in (model.layer2, model.layer3, model.layer4):
        assert type(stage[0].conv2) is strided
        assert all(type(block.conv2) is DeformConv2dPack for block in stage[1:])
    assert dcn == dict(type="DCN", fallback_on_stride=fallback)  # the caller's dict is left alone


def test_changing_the_style_moves_the_stride_of_the_offsets_too():
    model = ResNet(dcn=dict(type="DCN"), stage_with_dcn=LAST_TWO, **SMALL).eval()
    model.set_style("caffe")
    with torch.no_grad():
        sizes = [tuple(x.shape[2:]) for x in model(image())]
    assert sizes == [(16, 24), (8, 12), (4, 6), (2, 3)]
    assert model.layer3[0].conv2.conv_offset.stride == (1, 1)


def test_resnext_is_deformable_in_its_groups():
    options = dict(groups=4, base_width=2, dcn=dict(type="DCN"), stage_with_dcn=LAST_TWO)
    model = ResNeXt(**SMALL, **options).eval()
    conv = model.layer3[0].conv2
    assert conv.groups == 4 and conv.weight.shape[1] * 4 == conv.in_channels
    with torch.no_grad():
        assert model(image())[3].shape == (2, 256, 2, 3)


PLUGINS = [
    dict(cfg=dict(type="ContextBlock", ratio=1 / 4), stages=(False, True, True, True), position="after_conv3"),
    dict(cfg=dict(type="NonLocal2d"), position="after_conv1"),
    dict(cfg=dict(type="GeneralizedAttention", num_heads=8, attention_type="0010"), stages=LAST_TWO,
         position="after_conv2"),
    dict(cfg=dict(type="ContextBlock", ratio=1 / 2, postfix="_2"), stages=LAST_TWO, position="after_conv3"),
]  # fmt: skip


def test_plugins_stand_where_they_are_asked_for():
    model = ResNet(plugins=PLUGINS, **SMALL)
    kinds = {"context_block": ContextBlock, "context_block_2": ContextBlock, "nonlocal_block": NonLocal2d,
             "gen_attention_block": GeneralizedAttention}  # fmt: skip
    stages = {"context_block": (2, 3, 4), "context_block_2": (3, 4), "nonlocal_block": (1, 2, 3, 4),
              "gen_attention_block": (3, 4)}  # fmt: skip
    for stage in (1, 2, 3, 4):
        for block in getattr(model, f"layer{stage}"):
            there = {name for name in kinds if hasattr(block, name)}
            assert there == {name for name in kinds if stage in stages[name]}
            assert all(type(getattr(block, name)) is kinds[name] for name in there)
    block = model.layer3[0]  # 32 channels inside, 128 after the last convolution
    assert block.nonlocal_block.theta.conv.in_channels == 32
    assert block.context_block.conv_mask.in_channels == 128


@pytest.mark.parametrize("position, channels", [("after_conv1", 8), ("after_conv2", 8), ("after_conv3", 16)])
def test_a_plugin_is_as_wide_as_the_grouped_convolution_before_it(position, channels):
    plugin = dict(cfg=dict(type="ContextBlock", ratio=1 / 4), position=position)
    block = Bottleneck(4, 4, groups=4, base_width=32, plugins=[plugin])  # floor(4 * 32 / 64) * 4 channels inside
    assert block.context_block.conv_mask.in_channels == channels
    assert block.conv2.out_channels == 8 and block.conv3.out_channels == 16


def test_fresh_plugins_leave_a_backbone_as_it_is(device):
    """Each of them starts as the identity."""
    plain = ResNet(**SMALL).eval().to(device)
    plugged = ResNet(plugins=PLUGINS, **SMALL).eval().to(device)
    plugged.load_state_dict(plain.state_dict(), strict=False)
    x = image().to(device)
    with torch.no_grad():
        for a, b in zip(plugged(x), plain(x)):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * b.abs().max().item())


@pytest.mark.parametrize("position", ["after_conv1", "after_conv2", "after_conv3"])
def test_a_plugin_acts_at_its_position(position, monkeypatch):
    """A block of known arithmetic: a stand-in plugin of factor 10 where the convolutions are identities."""

    class Tenfold(nn.Module):
        def __init__(self, in_channels):
            super().__init__()

        def forward(self, x):
            return 10 * x

    monkeypatch.setitem(
        __import__("fastrcnn.layers.plugins", fromlist=["PLUGINS"]).PLUGINS, "Tenfold", ("ten", Tenfold)
    )
    block = Bottleneck(4, 1, plugins=[dict(cfg=dict(type="Tenfold"), position=position)]).eval()
    for m in block.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.zeros_(m.weight)
    with torch.no_grad():
        block.conv1.weight[0, 0] = 1.0
        block.conv2.weight[0, 0, 1, 1] = 1.0
        block.conv3.weight[:, 0] = 1.0
        x = torch.full((1, 4, 2, 2), 3.0)
        out = block(x)
    scale = (1 + 1e-5) ** -1.5  # three norms with variance 1 and eps 1e-5
    torch.testing.assert_close(out, torch.full_like(x, 10 * 3 * scale + 3), rtol=1e-5, atol=0)


def test_gradients_reach_every_parameter_of_dcn_and_plugins():
    model = ResNet(dcn=dict(type="DCNv2"), stage_with_dcn=LAST_TWO, plugins=PLUGINS, **SMALL)
    for name, p in model.named_parameters():
        if p.abs().sum() == 0 and "bn" not in name:
            nn.init.normal_(p, std=0.02)  # what starts at zero hides what lies behind it
    sum(x.square().sum() for x in model.train()(image())).backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
    assert not without
    offset = model.layer3[0].conv2.conv_offset.weight.grad
    assert offset.abs().sum() > 0


@pytest.mark.parametrize("with_cp", [False, True])
def test_checkpointing_reaches_plugins(with_cp):
    torch.manual_seed(0)
    model = ResNet(plugins=PLUGINS, with_cp=with_cp, **SMALL).train()
    with torch.no_grad():
        model.layer2[0].context_block.channel_add_conv[-1].weight.fill_(0.01)
    x = image().requires_grad_()
    model(x)[3].sum().backward()
    assert torch.isfinite(x.grad).all() and model.layer2[0].context_block.conv_mask.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "options, names",
    [
        (dict(depth=18, dcn=dict(type="DCN"), stage_with_dcn=LAST_TWO), "dcn.*bottleneck"),
        (dict(depth=34, plugins=PLUGINS[:1]), "plugins.*bottleneck"),
        (dict(SMALL, dcn=dict(type="DCN"), stage_with_dcn=(True, False)), "stage_with_dcn.*4"),
        (dict(SMALL, dcn=dict(type="DCNv3"), stage_with_dcn=LAST_TWO), "DCNv3"),
        (dict(SMALL, dcn=dict(type="DCN"), stage_with_dcn=LAST_TWO, conv_cfg=dict(type="ConvWS")), "conv_cfg.*dcn"),
        (dict(SMALL, plugins=[dict(cfg=dict(type="ContextBlock", ratio=1), position="after_conv4")]), "after_conv4"),
        (dict(SMALL, plugins=[dict(cfg=dict(type="SEBlock"), position="after_conv3")]), "SEBlock"),
        (dict(SMALL, plugins=[dict(PLUGINS[0], stages=(True, False))]), "stages"),
        (dict(SMALL, plugins=[PLUGINS[0], PLUGINS[0]]), "context_block.*postfix"),
        (dict(SMALL, plugins=[dict(PLUGINS[0], stage=2)]), "plugins"),
        (dict(SMALL, init_cfg=dict(type="Xavier")), "init_cfg.*Pretrained"),
        (dict(SMALL, pretrained="a.pth", init_cfg=dict(type="Pretrained", checkpoint="b.pth")), "init_cfg"),
    ],
)
def test_bad_options_are_named(options, names):
    with pytest.raises(ValueError, match=names):
        ResNet(**options)


def test_init_weights_takes_a_state_and_reads_no_file():
    source = ResNet(**SMALL)
    for named in (dict(pretrained="absent.pth"), dict(init_cfg=dict(type="Pretrained", checkpoint="absent.pth"))):
        model = ResNet(**SMALL, **named)
        assert not torch.equal(model.conv1.weight, source.conv1.weight)
        with pytest.raises(ValueError, match=r"starts from absent\.pth: hand in its state dict"):
            model.init_weights()
        model.init_weights(source.state_dict())
        assert all(torch.equal(v, source.state_dict()[k]) for k, v in model.state_dict().items())
