import pytest
import torch
from torch import nn

from fastrcnn.layers import ConvModule
from fastrcnn.models import GenericRoIExtractor, SingleRoIExtractor
from fastrcnn.models.roi_extractors import roi_rescale
from fastrcnn.ops import multilevel_roi_align, roi_align

ALIGN = dict(type="RoIAlign", output_size=7, sampling_ratio=0, aligned=True)
STRIDES = [4, 8, 16, 32]


def pyramid(channels=6, device="cpu", dtype=torch.float32) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(2, channels, 256 // s, 320 // s, generator=g).to(device, dtype) for s in STRIDES]


def rois(device="cpu") -> torch.Tensor:
    """One for each level in mixed order, and one more: sides 600 (level 3), 40 (0), 130 (1), 250 (2), 90 (0)."""
    sides = torch.tensor([600.0, 40, 130, 250, 90])
    corner = torch.tensor([[5.0, 7], [100, 60], [30, 20], [10, 3], [200, 130]])
    image = torch.tensor([[0.0], [1], [0], [1], [1]])
    return torch.cat([image, corner, corner + sides[:, None]], 1).to(device)


def test_rescaling_keeps_the_centre():
    out = roi_rescale(torch.tensor([[1.0, 10, 20, 30, 60]]), 1.5)
    assert out.tolist() == [[1, 5, 10, 35, 70]]


def test_a_single_extractor_is_one_call_of_the_operator(device):
    feats, r = pyramid(device=device), rois(device)
    out = SingleRoIExtractor(ALIGN, 6, STRIDES)(feats, r)
    assert torch.equal(out, multilevel_roi_align(feats, r, 7, STRIDES))
    extra = [*feats, feats[-1][..., ::2, ::2]]  # P6 is not used
    assert torch.equal(SingleRoIExtractor(ALIGN, 6, STRIDES)(extra, r), out)


def test_scaled_rois_keep_the_level_of_their_own_size(device):
    """A RoI of side 90 takes level 0; at twice the side it would take level 1."""
    feats, r = pyramid(device=device), rois(device)
    out = SingleRoIExtractor(ALIGN, 6, STRIDES)(feats, r, roi_scale_factor=2.0)
    levels = [3, 0, 1, 2, 0]
    for k, level in enumerate(levels):
        expected = roi_align(feats[level], roi_rescale(r, 2.0)[k : k + 1], 7, 1 / STRIDES[level])
        torch.testing.assert_close(out[k : k + 1], expected, rtol=1e-5, atol=1e-6)


def test_rois_of_a_single_map_keep_their_size(device):
    feats, r = pyramid(device=device)[:1], rois(device)
    out = SingleRoIExtractor(ALIGN, 6, STRIDES[:1])(feats, r, roi_scale_factor=2.0)
    torch.testing.assert_close(out, roi_align(feats[0], r, 7, 1 / STRIDES[0]))


def test_each_level_has_its_own_deformable_pooling(device):
    layer = dict(type="DeformRoIPoolPack", output_size=7, output_channels=6, deform_fc_channels=16)
    torch.manual_seed(0)
    extractor = SingleRoIExtractor(layer, 6, STRIDES).to(device)
    keys = set(extractor.state_dict())
    assert keys == {
        f"roi_layers.{i}.offset_fc.{j}.{k}" for i in range(4) for j in (0, 2, 4) for k in ("weight", "bias")
    }
    feats, r = pyramid(device=device), rois(device)
    # Fresh offsets are 0: plain RoIAlign.
    torch.testing.assert_close(extractor(feats, r), multilevel_roi_align(feats, r, 7, STRIDES), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        extractor.roi_layers[2].offset_fc[4].bias.fill_(0.7)
    changed = (extractor(feats, r) - multilevel_roi_align(feats, r, 7, STRIDES)).abs().amax((1, 2, 3)) > 1e-3
    assert changed.tolist() == [False, False, False, True, False]  # the RoI of level 2


def test_the_generic_extractor_sums_or_joins_all_levels(device):
    feats, r = pyramid(device=device), rois(device)
    single = [roi_align(x, r, 7, 1 / s) for x, s in zip(feats, STRIDES)]
    summed = GenericRoIExtractor(ALIGN, 6, STRIDES)(feats, r)
    torch.testing.assert_close(summed, single[0] + single[1] + single[2] + single[3])
    joined = GenericRoIExtractor(ALIGN, 24, STRIDES, aggregation="concat")(feats, r)
    torch.testing.assert_close(joined, torch.cat(single, 1))
    scaled = GenericRoIExtractor(ALIGN, 6, STRIDES)(feats, r, roi_scale_factor=0.5)
    small = roi_rescale(r, 0.5)
    torch.testing.assert_close(scaled, sum(roi_align(x, small, 7, 1 / s) for x, s in zip(feats, STRIDES)))


def test_layers_before_and_after_the_sum():
    pre = dict(type="ConvModule", in_channels=6, out_channels=6, kernel_size=5, padding=2)
    post = dict(type="ContextBlock", in_channels=6, ratio=1 / 3)
    extractor = GenericRoIExtractor(ALIGN, 6, STRIDES, pre_cfg=pre, post_cfg=post)
    assert isinstance(extractor.pre_module, ConvModule)
    feats, r = pyramid(), rois()
    conv = nn.Conv2d(6, 6, 5, padding=2)
    conv.load_state_dict(extractor.pre_module.conv.state_dict())
    expected = sum(torch.relu(conv(roi_align(x, r, 7, 1 / s))) for x, s in zip(feats, STRIDES))
    torch.testing.assert_close(extractor(feats, r), expected)  # a fresh context block is the identity
    with torch.no_grad():
        extractor.post_module.channel_add_conv[-1].bias.fill_(0.25)
    torch.testing.assert_close(extractor(feats, r), expected + 0.25)


def test_one_level_is_left_as_it_is():
    """MMDetection aggregates nothing then, and runs no layer before or after."""
    pre = dict(type="ConvModule", in_channels=6, out_channels=6, kernel_size=1)
    extractor = GenericRoIExtractor(ALIGN, 6, [16], pre_cfg=pre)
    feats, r = pyramid()[2:3], rois()
    assert torch.equal(extractor(feats, r), roi_align(feats[0], r, 7, 1 / 16))


@pytest.mark.parametrize("kind", [SingleRoIExtractor, GenericRoIExtractor])
def test_no_rois(kind):
    assert kind(ALIGN, 6, STRIDES)(pyramid(), torch.zeros(0, 5)).shape == (0, 6, 7, 7)


def test_gradients_reach_every_level():
    feats = [x.requires_grad_() for x in pyramid()]
    SingleRoIExtractor(ALIGN, 6, STRIDES)(feats, rois(), roi_scale_factor=1.3).sum().backward()
    assert all(x.grad.abs().sum() > 0 for x in feats)


@pytest.mark.parametrize(
    "make, names",
    [
        (lambda: SingleRoIExtractor(dict(type="RoIPool", output_size=7), 6, STRIDES), "roi_layer.*RoIPool"),
        (lambda: SingleRoIExtractor(dict(ALIGN, pool_mode="max"), 6, STRIDES), "pool_mode"),
        (lambda: SingleRoIExtractor(dict(ALIGN, gamma=0.1), 6, STRIDES), "gamma"),
        (lambda: GenericRoIExtractor(ALIGN, 6, STRIDES, aggregation="mean"), "aggregation.*mean"),
        (lambda: GenericRoIExtractor(ALIGN, 6, STRIDES, aggregation="concat")(pyramid(), rois()), "out_channels.*24"),
    ],
)
def test_bad_arguments_are_named(make, names):
    with pytest.raises(ValueError, match=names):
        make()
