"""Layers from configuration dicts."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastrcnn.layers import ConvModule, build_activation, build_conv, build_norm, fold_batch_norm
from fastrcnn.models import ResNet


def test_weight_standardisation_is_blind_to_a_filters_scale_and_offset():
    conv = build_conv(dict(type="ConvWS"), 3, 4, 3, padding=1)
    x = torch.randn(2, 3, 8, 8)
    before = conv(x)
    w = conv.weight.detach()
    mean, std = w.mean((1, 2, 3), keepdim=True), w.std((1, 2, 3), keepdim=True)
    expected = F.conv2d(x, (w - mean) / (std + 1e-5), conv.bias, padding=1)
    torch.testing.assert_close(before, expected)
    with torch.no_grad():
        conv.weight.mul_(3).add_(0.5)
    torch.testing.assert_close(conv(x), before, rtol=1e-3, atol=1e-3)


def test_a_backbone_of_standardised_convolutions_keeps_its_keys_and_is_not_folded():
    options = dict(base_channels=8, conv_cfg=dict(type="ConvWS"), norm_cfg=dict(type="GN", num_groups=4))
    net = ResNet(18, **options)
    plain = ResNet(18, base_channels=8, norm_cfg=dict(type="GN", num_groups=4))
    assert set(net.state_dict()) == set(plain.state_dict())
    x = torch.randn(1, 3, 32, 32)
    before = net(x)[-1]
    torch.testing.assert_close(fold_batch_norm(net)(x)[-1], before)
    assert isinstance(net.gn1, nn.GroupNorm)


@pytest.mark.parametrize(
    ("cfg", "postfix", "name", "kind"),
    [
        (dict(type="BN"), 1, "bn1", nn.BatchNorm2d),
        (dict(type="SyncBN", requires_grad=False), "", "bn", nn.SyncBatchNorm),
        (dict(type="GN", num_groups=2), 3, "gn3", nn.GroupNorm),
    ],
)
def test_norms_have_mmdetections_names(cfg, postfix, name, kind):
    built, norm = build_norm(cfg, 8, postfix)
    assert built == name and type(norm) is kind
    assert norm.weight.requires_grad is cfg.get("requires_grad", True)


def test_a_fresh_conv_module_keeps_the_variance_of_its_gradient():
    """Kaiming's rule by fan-out: the deviation of the weights is sqrt(2 / (out * k * k)), less for a leaky ReLU."""
    for act_cfg, gain in ((dict(type="ReLU"), 2.0), (None, 2.0), (dict(type="LeakyReLU", negative_slope=0.5), 1.6)):
        conv = ConvModule(16, 64, 3, act_cfg=act_cfg).conv
        assert conv.weight.std().item() == pytest.approx((gain / (64 * 9)) ** 0.5, rel=0.05)
        assert not conv.bias.any()


def test_norms_without_weights_are_left_alone():
    net = ResNet(18, base_channels=8, norm_cfg=dict(type="BN", affine=False)).eval()
    assert "bn1.weight" not in net.state_dict() and "layer1.0.bn2.running_mean" in net.state_dict()
    x = torch.randn(1, 3, 32, 32)
    before = net(x)[-1]
    torch.testing.assert_close(fold_batch_norm(net)(x)[-1], before)


ACTIVATIONS = [dict(type="LeakyReLU", negative_slope=0.3)] + [
    dict(type=t) for t in ("GELU", "SiLU", "Swish", "HSwish", "PReLU", "ReLU6", "ELU", "Sigmoid", "Tanh")
]


@pytest.mark.parametrize("cfg", ACTIVATIONS)
def test_another_activation_follows_the_residual(cfg):
    module = ConvModule(3, 3, 1, act_cfg=cfg).eval()
    x, r = torch.randn(1, 3, 4, 4), torch.randn(1, 3, 4, 4)
    expected = build_activation(cfg)(module.conv(x) + r)
    torch.testing.assert_close(module(x, residual=r), expected)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: build_conv(dict(type="DCNv3"), 3, 3, 3), "DCN"),
        (lambda: build_norm(dict(type="LN"), 3), "LN"),
        (lambda: build_activation(dict(type="Mish")), "Mish"),
        (lambda: build_norm(dict(requires_grad=True), 3), "type"),
    ],
)
def test_an_unknown_type_is_named(call, named):
    with pytest.raises((ValueError, TypeError), match=named):
        call()
