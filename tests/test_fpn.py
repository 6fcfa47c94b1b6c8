from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from fastrcnn.models import FPN

CHANNELS = [8, 16, 24, 32]
SIZES = [(25, 38), (13, 19), (7, 10), (4, 5)]  # odd ones: twice a map is not the next finer map


def feature_maps(device="cpu"):
    return [torch.randn(2, c, h, w, device=device) for c, (h, w) in zip(CHANNELS, SIZES)]


def plain_fpn(fpn: FPN, inputs, used: range, mode, relu: bool, num_outs: int):
    """The definition, level by level, from the module's own convolutions."""
    laterals = [conv.conv(inputs[i]) for conv, i in zip(fpn.lateral_convs, used)]
    for i in range(len(laterals) - 1, 0, -1):
        laterals[i - 1] = laterals[i - 1] + F.interpolate(laterals[i], size=laterals[i - 1].shape[2:], mode="nearest")
    outs = [fpn.fpn_convs[i].conv(laterals[i]) for i in range(len(laterals))]
    for i in range(len(laterals), num_outs):
        if mode is False:
            outs.append(outs[-1][:, :, ::2, ::2])
            continue
        first = {"on_input": inputs[used[-1]], "on_lateral": laterals[-1], "on_output": outs[-1]}
        source = first["on_input" if mode is True else mode] if i == len(laterals) else outs[-1]
        if relu and i > len(laterals):
            source = source.clamp(min=0)
        outs.append(fpn.fpn_convs[i].conv(source))
    return outs


def test_equals_torchvision(device):
    theirs = FeaturePyramidNetwork(CHANNELS, 12, extra_blocks=LastLevelMaxPool()).to(device)
    ours = FPN(CHANNELS, 12, num_outs=5).to(device)
    renamed = {}
    for key, value in theirs.state_dict().items():
        kind, i, _, parameter = key.split(".")
        renamed[f"{ {'inner_blocks': 'lateral_convs', 'layer_blocks': 'fpn_convs'}[kind] }.{i}.conv.{parameter}"] = (
            value
        )
    ours.load_state_dict(renamed, strict=True)
    maps = feature_maps(device)
    with torch.no_grad():
        expected = theirs(OrderedDict((str(i), m) for i, m in enumerate(maps)))
        got = ours(maps)
    assert len(got) == len(expected) == 5
    for a, b in zip(got, expected.values()):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", [False, True, "on_input", "on_lateral", "on_output"])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("start, end, num_outs", [(0, -1, 4), (0, -1, 6), (1, -1, 5), (1, 3, 6), (0, 2, 3), (1, 2, 2)])
def test_every_option_against_the_plain_loop(mode, relu, start, end, num_outs):
    options = dict(start_level=start, end_level=end, add_extra_convs=mode, relu_before_extra_convs=relu)
    fpn = FPN(CHANNELS, 12, num_outs, **options)
    used = range(start, 4 if end == -1 else end + 1)
    extra = num_outs - len(used) if mode else 0
    assert (len(fpn.lateral_convs), len(fpn.fpn_convs)) == (len(used), len(used) + extra)
    maps = feature_maps()
    with torch.no_grad():
        got, expected = fpn(maps), plain_fpn(fpn, maps, used, mode, relu, num_outs)
    assert len(got) == num_outs
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    for i, m in enumerate(got[: len(used)]):
        assert m.shape == (2, 12, *SIZES[i + start])


def test_relu_before_extra_convs_spares_the_first():
    maps = feature_maps()
    fpn = FPN(CHANNELS, 12, 6, add_extra_convs="on_output")
    with torch.no_grad():
        without = fpn(maps)
        fpn.relu_before_extra_convs = True
        with_relu = fpn(maps)
    assert torch.equal(without[4], with_relu[4])
    assert not torch.equal(without[5], with_relu[5])


@pytest.mark.parametrize("no_norm_on_lateral", [False, True])
def test_norms_and_biases(no_norm_on_lateral):
    options = dict(norm_cfg=dict(type="BN"), no_norm_on_lateral=no_norm_on_lateral, add_extra_convs="on_input")
    fpn = FPN(CHANNELS, 12, 5, **options).train()
    assert [c.norm is None for c in fpn.lateral_convs] == [no_norm_on_lateral] * 4
    assert [c.conv.bias is None for c in fpn.lateral_convs] == [not no_norm_on_lateral] * 4
    assert all(c.norm is not None and c.conv.bias is None for c in fpn.fpn_convs)
    maps = feature_maps()
    lateral = fpn.lateral_convs[3]
    top = lateral.conv(maps[3]) if no_norm_on_lateral else F.batch_norm(
        lateral.conv(maps[3]), None, None, lateral.bn.weight, lateral.bn.bias, training=True
    )  # fmt: skip
    conv = fpn.fpn_convs[3]
    expected = F.batch_norm(conv.conv(top), None, None, conv.bn.weight, conv.bn.bias, training=True)
    torch.testing.assert_close(fpn(maps)[3], expected, rtol=1e-4, atol=1e-4)


def test_activation_follows_every_convolution_and_precedes_the_sum():
    fpn = FPN(CHANNELS, 12, 4, act_cfg=dict(type="ReLU"))
    maps = feature_maps()
    with torch.no_grad():
        top = fpn.lateral_convs[3].conv(maps[3]).relu()
        lateral = fpn.lateral_convs[2].conv(maps[2]).relu() + F.interpolate(top, size=SIZES[2], mode="nearest")
        expected = fpn.fpn_convs[2].conv(lateral).relu()
        torch.testing.assert_close(fpn(maps)[2], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sizes, halves", [(SIZES, 3), ([(16, 24), (8, 12), (4, 7), (4, 7)], 1)])
@pytest.mark.parametrize("act", [None, dict(type="ReLU")])
def test_a_coarser_map_of_half_the_size_rides_on_the_convolution(monkeypatch, sizes, halves, act):
    """No upsampled map is made then; one of another size is upsampled, and nothing passes an activation."""
    made, interpolate = [], F.interpolate
    monkeypatch.setattr(F, "interpolate", lambda *a, **k: made.append(a) or interpolate(*a, **k))
    for norm in (None, dict(type="BN")):
        fpn = FPN(CHANNELS, 12, 4, act_cfg=act, norm_cfg=norm).eval()
        for m in fpn.modules():
            if isinstance(m, torch.nn.BatchNorm2d):
                m.running_mean.normal_()
        maps = [torch.randn(2, c, *size, requires_grad=True) for c, size in zip(CHANNELS, sizes)]
        made.clear()
        got = fpn(maps)
        assert len(made) == (3 if act else 3 - halves)
        laterals = [conv(x) for conv, x in zip(fpn.lateral_convs, maps)]
        for i in (2, 1, 0):
            laterals[i] = laterals[i] + interpolate(laterals[i + 1], size=sizes[i], mode="nearest")
        expected = [conv(x) for conv, x in zip(fpn.fpn_convs, laterals)]
        gradients = [torch.autograd.grad([x.sum() for x in maps_], maps) for maps_ in (got, expected)]
        for a, b in zip([*got, *gradients[0]], [*expected, *gradients[1]]):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_upsampling_by_a_factor_and_by_another_mode():
    maps = [torch.randn(1, c, 16 >> i, 24 >> i) for i, c in enumerate(CHANNELS)]
    by_size, by_factor = FPN(CHANNELS, 12, 4), FPN(CHANNELS, 12, 4, upsample_cfg=dict(scale_factor=2, mode="nearest"))
    smooth = FPN(CHANNELS, 12, 4, upsample_cfg=dict(mode="bilinear", align_corners=False))
    for fpn in (by_factor, smooth):
        fpn.load_state_dict(by_size.state_dict())
    with torch.no_grad():
        a, b, c = by_size(maps), by_factor(maps), smooth(maps)
        top = smooth.lateral_convs[3].conv(maps[3])
        lateral = smooth.lateral_convs[2].conv(maps[2]) + F.interpolate(top, scale_factor=2, mode="bilinear")
        torch.testing.assert_close(c[2], smooth.fpn_convs[2].conv(lateral), rtol=1e-5, atol=1e-5)
    for m, n in zip(a, b):
        torch.testing.assert_close(m, n)
    with pytest.raises((RuntimeError, ValueError)):  # twice an odd map does not fit: only `size` does
        by_factor(feature_maps())


def test_initial_weights_are_xavier_uniform():
    fpn = FPN([256, 512], 256, 2)
    for conv, fan in ((fpn.lateral_convs[1].conv, 512 + 256), (fpn.fpn_convs[0].conv, 2 * 256 * 9)):
        bound = (6 / fan) ** 0.5
        assert 0.95 * bound < conv.weight.abs().max().item() <= bound
        assert conv.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
        assert torch.equal(conv.bias, torch.zeros_like(conv.bias))


@pytest.mark.parametrize(
    "options, names",
    [
        (dict(num_outs=5, add_extra_convs="on_top"), "add_extra_convs"),
        (dict(num_outs=3), "num_outs"),
        (dict(num_outs=4, end_level=2), "num_outs"),
        (dict(num_outs=4, start_level=3, end_level=1), "start_level"),
        (dict(num_outs=4, end_level=7), "end_level"),
    ],
)
def test_bad_arguments_are_named(options, names):
    with pytest.raises(ValueError, match=names):
        FPN(CHANNELS, 12, **options)


def test_the_wrong_number_of_maps_is_an_error():
    with pytest.raises(ValueError, match="inputs"):
        FPN(CHANNELS, 12, 4)(feature_maps()[:3])
