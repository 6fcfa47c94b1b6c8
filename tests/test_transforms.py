"""data/transforms.py: what happens to a picture happens to its boxes."""

import pytest
import torch
from torchvision.transforms import v2

from fastrcnn.data.transforms import (
    apply,
    colour_jitter,
    crop_with_boxes,
    flip,
    large_scale_jitter,
    multi_scale,
    photometric,
)

BOXES = torch.tensor([[5.0, 4, 15, 14], [30, 20, 60, 40], [0, 0, 60, 40]])


def marked(boxes=BOXES, size=(40, 60)):
    """A picture that is bright in the first box alone, and its target."""
    image = torch.zeros(3, *size, dtype=torch.uint8)
    x0, y0, x1, y1 = boxes[0].int().tolist()
    image[:, y0:y1, x0:x1] = 255
    return image, dict(boxes=boxes.clone(), labels=torch.arange(len(boxes)), ignore_boxes=boxes[:1].clone(), image_id=7)


def bright_box(image):
    ys, xs = torch.nonzero(image[0] > 127, as_tuple=True)
    return torch.tensor([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]).float() if len(xs) else None


@pytest.mark.parametrize("transform", [
    flip(1.0), multi_scale([30, 55, 80], 100), large_scale_jitter(48, (0.6, 2.0)), crop_with_boxes(),
    v2.Compose([flip(), large_scale_jitter(64), crop_with_boxes()]),
])  # fmt: skip
def test_boxes_go_where_their_pixels_go(transform):
    seen = 0
    for _ in range(40):
        image, target = apply(transform, *marked())
        assert image.dtype == torch.uint8 and type(image) is torch.Tensor and target["image_id"] == 7
        boxes, sides = target["boxes"], torch.tensor(image.shape[-1:0:-1]).repeat(2)
        assert type(boxes) is torch.Tensor and (boxes >= 0).all() and (boxes <= sides).all()
        assert (boxes[:, 2:] - boxes[:, :2] >= 1).all() and len(boxes) == len(target["labels"])
        bright = bright_box(image)
        if bright is not None and 0 in target["labels"]:
            place = target["labels"].tolist().index(0)
            assert (boxes[place] - bright).abs().max() <= 1.5 and (
                target["ignore_boxes"][0] - bright
            ).abs().max() <= 1.5
            seen += 1
    assert seen > 5


def test_the_scales_of_each():
    image, target = torch.zeros(3, 40, 60, dtype=torch.uint8), marked()[1]
    assert {min(apply(multi_scale([30, 50], 500), image, target)[0].shape[1:]) for _ in range(30)} == {30, 50}
    assert max(apply(multi_scale([80], 90), image, target)[0].shape[1:]) == 90
    shapes = [apply(large_scale_jitter(64), image, target)[0].shape[1:] for _ in range(200)]
    assert max(map(max, shapes)) == 64 and min(map(max, shapes)) < 16  # 0.1 and 2 times 64, cut to 64
    assert 70 < sum(max(shape) == 64 for shape in shapes) < 140  # scales above 1: 10 of 19
    shapes = {tuple(apply(crop_with_boxes(0.5), image, target)[0].shape[1:]) for _ in range(50)}
    assert len(shapes) > 20 and min(h for h, _ in shapes) >= 20 and min(w for _, w in shapes) >= 30


def test_a_crop_holds_the_middle_of_a_box_or_is_the_whole_picture():
    only = dict(boxes=torch.tensor([[50.0, 30, 60, 40]]), labels=torch.tensor([0]))
    image = torch.zeros(3, 40, 60, dtype=torch.uint8)
    assert all(len(apply(crop_with_boxes(0.2), image, only)[1]["boxes"]) == 1 for _ in range(50))
    empty = dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64))
    assert apply(crop_with_boxes(0.2), image, empty)[0].shape == image.shape


@pytest.mark.parametrize("change", [photometric(), colour_jitter(0.4)])
def test_colours_change_and_other_channels_do_not(change):
    image, target = torch.randint(0, 256, (3, 40, 60), dtype=torch.uint8), marked()[1]
    changed = [apply(change, image, target) for _ in range(10)]
    assert sum(not torch.equal(found, image) for found, _ in changed) > 5
    assert all(torch.equal(t["boxes"], BOXES) and found.shape == image.shape for found, t in changed)
    for channels in (1, 4, 6):
        other = torch.randint(0, 256, (channels, 40, 60), dtype=torch.uint8)
        assert all(torch.equal(apply(change, other, target)[0], other) for _ in range(5))


def test_jittered_colours_keep_their_order():
    purple = torch.tensor([120, 40, 160], dtype=torch.uint8)[:, None, None].expand(3, 8, 8)
    target = dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64))
    found = torch.stack([apply(colour_jitter(0.2), purple, target)[0][:, 0, 0] for _ in range(50)])
    assert (found[:, 2] > found[:, 0]).all() and (found[:, 0] > found[:, 1]).all()
    assert len(found.unique(dim=0)) > 25


def test_regions_to_ignore_that_leave_the_frame_are_gone():
    target = dict(
        boxes=BOXES[1:2], labels=torch.tensor([0]), ignore_boxes=torch.tensor([[0.0, 0, 5, 5], [20, 10, 40, 30]])
    )
    _, moved = apply(v2.CenterCrop((20, 30)), torch.zeros(3, 40, 60, dtype=torch.uint8), target)
    assert moved["ignore_boxes"].tolist() == [[5, 0, 25, 20]]
