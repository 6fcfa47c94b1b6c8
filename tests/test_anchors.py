import pytest
import torch
from torchvision.models.detection.anchor_utils import AnchorGenerator as TorchvisionAnchors
from torchvision.models.detection.image_list import ImageList

from fastrcnn.models.anchors import AnchorGenerator, build_anchor_generator

STRIDES = [4, 8, 16, 32, 64]
FPN_ANCHORS = dict(strides=STRIDES, ratios=[0.5, 1.0, 2.0], scales=[8])


def test_base_anchors_of_the_finest_level():
    expected = [[-22.627417, -11.3137085, 22.627417, 11.3137085], [-16, -16, 16, 16]]
    expected.append([-11.3137085, -22.627417, 11.3137085, 22.627417])
    torch.testing.assert_close(AnchorGenerator(**FPN_ANCHORS).base_anchors()[0], torch.tensor(expected))


def test_rounded_base_anchors_are_torchvisions():
    ours = AnchorGenerator(**FPN_ANCHORS).base_anchors(rounded=True)
    assert ours[0].tolist() == [[-23, -11, 23, 11], [-16, -16, 16, 16], [-11, -23, 11, 23]]
    theirs = TorchvisionAnchors(((32,), (64,), (128,), (256,), (512,)), ((0.5, 1.0, 2.0),) * 5)
    for a, b in zip(ours, theirs.cell_anchors):
        assert torch.equal(a, b)


@pytest.mark.parametrize("height, width", [(192, 256), (160, 352), (32, 32)])
def test_the_grid_is_torchvisions_in_its_profile(height, width, device):
    sizes = [(-(-height // s), -(-width // s)) for s in STRIDES]
    maps = [torch.zeros(1, 1, *s, device=device) for s in sizes]
    theirs = TorchvisionAnchors(((32,), (64,), (128,), (256,), (512,)), ((0.5, 1.0, 2.0),) * 5)
    images = ImageList(torch.zeros(1, 3, height, width, device=device), [(height, width)])
    expected = theirs(images, maps)[0]
    generator = AnchorGenerator(**FPN_ANCHORS)
    bases = [base.to(device) for base in generator.base_anchors(rounded=True)]
    grid = generator.grid(sizes, batch_shape=(height, width), device=device, bases=bases)
    assert torch.equal(torch.cat(grid), expected)


def test_strides_follow_the_grid_only_when_a_batch_shape_is_given():
    generator = AnchorGenerator(strides=[4, 64], ratios=[1.0], scales=[8])
    sizes = [(40, 88), (3, 6)]
    assert generator.level_strides(sizes, None) == [(4, 4), (64, 64)]
    assert generator.level_strides(sizes, (160, 352)) == [(4, 4), (58, 53)]


def test_the_grid_counts_in_the_order_row_column_anchor():
    generator = AnchorGenerator(strides=[(4, 8)], ratios=[1.0, 4.0], scales=[2])
    (grid,) = generator.grid([(2, 3)])
    # Base size is the smaller stride: a square of 8 pixels, and 4 wide, 16 high.
    expected = [
        [x - w / 2, y - h / 2, x + w / 2, y + h / 2] for y in (0, 8) for x in (0, 4, 8) for w, h in ((8, 8), (4, 16))
    ]
    torch.testing.assert_close(grid, torch.tensor(expected, dtype=torch.float32))


def test_scale_major_and_ratio_major_order():
    options = dict(strides=[16], ratios=[0.25, 4.0], scales=[1, 2])
    (scale_major,) = AnchorGenerator(**options).base_anchors()
    (ratio_major,) = AnchorGenerator(**options, scale_major=False).base_anchors()
    widths = [32, 64, 8, 16]  # each ratio with its scales
    assert (scale_major[:, 2] - scale_major[:, 0]).tolist() == widths
    assert (ratio_major[:, 2] - ratio_major[:, 0]).tolist() == [widths[i] for i in (0, 2, 1, 3)]


def test_octave_scales_centre_offset_and_centers():
    octave = AnchorGenerator(strides=[8], ratios=[1.0], octave_base_scale=4, scales_per_octave=2)
    torch.testing.assert_close(octave.base_anchors()[0][:, 2], torch.tensor([16.0, 16 * 2**0.5]))
    offset = AnchorGenerator(strides=[8], ratios=[1.0], scales=[1], center_offset=0.5)
    assert offset.base_anchors()[0].tolist() == [[0, 0, 8, 8]]
    centred = AnchorGenerator(strides=[8], ratios=[1.0], scales=[1], base_sizes=[2], centers=[(3, 5)])
    assert centred.base_anchors()[0].tolist() == [[2, 4, 4, 6]]


def test_inside_marks_the_cells_of_each_images_own_padded_area():
    generator = AnchorGenerator(strides=[16, 32], ratios=[1.0, 2.0], scales=[1])
    sizes = [(4, 6), (2, 3)]
    flags = generator.inside(sizes, torch.tensor([[64, 96], [33, 20]]), allowed_border=-1)
    assert flags.shape == (2, (4 * 6 + 2 * 3) * 2)
    assert flags[0].all()
    # 33 x 20 pixels pad to 64 x 32: two columns of the first level, one of the second, all rows.
    first, second = flags[1, :48].reshape(4, 6, 2), flags[1, 48:].reshape(2, 3, 2)
    assert first[:, :2].all() and not first[:, 2:].any()
    assert second[:, :1].all() and not second[:, 1:].any()


def test_inside_with_a_border_leaves_out_anchors_that_reach_over_it():
    generator = AnchorGenerator(strides=[16], ratios=[1.0], scales=[1])  # squares of 16 around the cell's corner
    flags = generator.inside([(4, 4)], torch.tensor([[64, 50]]), allowed_border=0).reshape(4, 4)
    expected = torch.zeros(4, 4, dtype=torch.bool)
    expected[1:, 1:3] = True  # the anchor at column 48 ends at 56, beyond the 50 pixels of the image
    assert torch.equal(flags, expected)
    wide = generator.inside([(4, 4)], torch.tensor([[64, 50]]), allowed_border=8).reshape(4, 4)
    assert wide[:, :4].sum() == 16


@pytest.mark.parametrize(
    "options, names",
    [
        (dict(strides=[4], ratios=[1.0]), "scales"),
        (dict(strides=[4], ratios=[1.0], scales=[8], octave_base_scale=4, scales_per_octave=3), "scales"),
        (dict(strides=[4, 8], ratios=[1.0], scales=[8], base_sizes=[4]), "base_sizes"),
        (dict(type="SSDAnchorGenerator"), "anchor_generator"),
    ],
)
def test_bad_arguments_are_named(options, names):
    with pytest.raises(ValueError, match=names):
        build_anchor_generator(options)
