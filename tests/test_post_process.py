"""post_process.finish: a batch is what its images are one by one."""

import pytest
import torch
from conftest import random_boxes

from fastrcnn.models.post_process import finish
from fastrcnn.models.profiles import get_profile

NMS = {
    "nms": dict(type="nms", iou_threshold=0.4),
    "limited": dict(type="nms", iou_threshold=0.4, max_num=4),
    "agnostic": dict(type="nms", iou_threshold=0.4, class_agnostic=True),
    "above": dict(type="nms", iou_threshold=0.4, score_threshold=0.3),
    "soft": dict(type="soft_nms", iou_threshold=0.3, min_score=0.05),
}


@pytest.mark.parametrize("nms", NMS)
@pytest.mark.parametrize("profile", ["mmdet", "torchvision", "detectron2"])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("most", [7, -1])
def test_a_batch_is_its_images_one_by_one(device, nms, profile, scaled, most):
    n, g = 200, torch.Generator().manual_seed(1)
    boxes = random_boxes(n, 200, 150, 120).to(device)
    scores = torch.rand(n, generator=g).mul(20).round().div(20).to(device)  # with ties
    labels = torch.randint(0, 3, (n,), generator=g).to(device)
    images = torch.tensor([0, 1, 3])[torch.randint(0, 3, (n,), generator=g)].to(device)  # the third has none
    sizes = torch.tensor([[150, 200], [140, 180], [150, 190], [120, 200]], device=device)
    scales = torch.tensor([[0.5, 0.5], [2.0, 1.9], [1.0, 1.0], [0.7, 0.8]], device=device) if scaled else None
    rules = dict(nms=NMS[nms], max_per_img=most), get_profile(profile), 12
    found = finish(boxes, scores, labels, images, sizes, scales, *rules)
    assert len(found) == 4
    assert len(found[2]["boxes"]) == 0
    for i, actual in enumerate(found):
        own = images == i
        scale = None if scales is None else scales[i : i + 1]
        zeros = torch.zeros_like(images[own])
        (alone,) = finish(boxes[own], scores[own], labels[own], zeros, sizes[i : i + 1], scale, *rules)
        for key, value in alone.items():
            assert torch.equal(actual[key], value)
        assert most < 0 or len(actual["boxes"]) <= most
    assert sum(len(f["boxes"]) for f in found) > 10
