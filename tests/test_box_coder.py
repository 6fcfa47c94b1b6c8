import math

import pytest
import torch
from conftest import random_boxes
from torchvision.models.detection._utils import BoxCoder

from fastrcnn.models.box_coder import DeltaXYWHBBoxCoder, build_box_coder

STDS = (0.1, 0.1, 0.2, 0.2)


def test_numbers_worked_by_hand():
    box, gt = torch.tensor([[10.0, 20.0, 30.0, 60.0]]), torch.tensor([[15.0, 10.0, 55.0, 30.0]])
    # Centre (20, 40) to (35, 20), 20 x 40 to 40 x 20.
    deltas = [15 / 20, -20 / 40, math.log(2), math.log(0.5)]
    torch.testing.assert_close(DeltaXYWHBBoxCoder().encode(box, gt), torch.tensor([deltas]))
    scaled = DeltaXYWHBBoxCoder(target_means=(0.5, 0.0, 0.0, 0.0), target_stds=STDS).encode(box, gt)
    expected = [(deltas[0] - 0.5) / 0.1, deltas[1] / 0.1, deltas[2] / 0.2, deltas[3] / 0.2]
    torch.testing.assert_close(scaled, torch.tensor([expected]))
    torch.testing.assert_close(DeltaXYWHBBoxCoder().decode(box, torch.tensor([deltas])), gt)


@pytest.mark.parametrize("means, stds", [((0.0,) * 4, (1.0,) * 4), ((0.1, -0.2, 0.3, 0.0), STDS)])
def test_decoding_undoes_encoding(means, stds, device):
    boxes, gts = random_boxes(200, seed=1).to(device), random_boxes(200, seed=2).to(device)
    coder = DeltaXYWHBBoxCoder(means, stds)
    torch.testing.assert_close(coder.decode(boxes, coder.encode(boxes, gts)), gts, rtol=1e-4, atol=1e-2)


def test_encode_and_decode_equal_torchvision(device):
    boxes, gts = random_boxes(200, seed=1).to(device), random_boxes(200, seed=2).to(device)
    theirs, ours = BoxCoder((10.0, 10.0, 5.0, 5.0)), DeltaXYWHBBoxCoder(target_stds=STDS, symmetric_clip=False)
    torch.testing.assert_close(ours.encode(boxes, gts), theirs.encode_single(gts, boxes), rtol=1e-5, atol=1e-5)
    deltas = torch.randn(200, 12, device=device) * 8  # beyond the clamp on both sides
    expected = theirs.decode_single(deltas, boxes)
    torch.testing.assert_close(ours.decode(boxes, deltas), expected, rtol=1e-5, atol=2e-3)


def test_the_clamp_is_symmetric_for_mmdetection_only():
    box, limit = torch.tensor([[0.0, 0.0, 100.0, 100.0]]), abs(math.log(16 / 1000))
    deltas = torch.tensor([[0.0, 0.0, -9.0, 9.0]])
    symmetric = DeltaXYWHBBoxCoder(symmetric_clip=True).decode(box, deltas)[0]
    one_sided = DeltaXYWHBBoxCoder(symmetric_clip=False).decode(box, deltas)[0]
    assert (symmetric[2] - symmetric[0]).item() == pytest.approx(100 * math.exp(-limit), rel=1e-4)
    assert (one_sided[2] - one_sided[0]).item() == pytest.approx(100 * math.exp(-9), rel=1e-2)
    for boxes in (symmetric, one_sided):
        assert (boxes[3] - boxes[1]).item() == pytest.approx(100 * math.exp(limit), rel=1e-4)


def test_clipping_to_the_image_is_optional():
    box, deltas = torch.tensor([[-10.0, 5.0, 50.0, 80.0]]), torch.zeros(1, 4)
    assert DeltaXYWHBBoxCoder().decode(box, deltas, (60, 40)).tolist() == [[0, 5, 40, 60]]
    assert DeltaXYWHBBoxCoder(clip_border=False).decode(box, deltas, (60, 40)).tolist() == [[-10, 5, 50, 80]]


def test_each_class_has_its_own_deltas():
    box = torch.tensor([[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 20.0, 20.0]])
    deltas = torch.tensor([[0, 0, 0, 0, 1.0, 0, 0, 0], [0, 1.0, 0, 0, 0, 0, 0, 0]])
    expected = [[0, 0, 10, 10, 10, 0, 20, 10], [0, 20, 20, 40, 0, 0, 20, 20]]
    assert DeltaXYWHBBoxCoder().decode(box, deltas).tolist() == expected


def test_low_precision_boxes_are_encoded_in_float32():
    box, gt = torch.tensor([[0.0, 0.0, 64.0, 64.0]]), torch.tensor([[1.0, 0.0, 65.0, 64.0]])
    deltas = DeltaXYWHBBoxCoder(target_stds=STDS).encode(box.bfloat16(), gt.bfloat16())
    assert deltas.dtype == torch.float32
    assert deltas[0, 0].item() == pytest.approx(10 / 64)


def test_no_boxes():
    coder = DeltaXYWHBBoxCoder()
    assert coder.encode(torch.zeros(0, 4), torch.zeros(0, 4)).shape == (0, 4)
    assert coder.decode(torch.zeros(0, 4), torch.zeros(0, 12)).shape == (0, 12)


def test_building_from_a_dict():
    coder = build_box_coder(dict(type="DeltaXYWHBBoxCoder", target_stds=STDS))
    assert coder.stds == STDS and build_box_coder(coder) is coder
    with pytest.raises(ValueError, match="bbox_coder"):
        build_box_coder(dict(type="YOLOBBoxCoder"))
