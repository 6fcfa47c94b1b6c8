"""post_process.finish against a loop over the images that follows the peers' order of steps, with torchvision's NMS."""

import pytest
import torch
from conftest import random_boxes
from torchvision.ops import box_iou
from torchvision.ops import nms as torchvision_nms

from fastrcnn.models.frame import Frame
from fastrcnn.models.padded import Padded
from fastrcnn.models.post_process import finish, lost
from fastrcnn.models.profiles import get_profile

NMS = {
    "nms": dict(type="nms", iou_threshold=0.4),
    "limited": dict(type="nms", iou_threshold=0.4, max_num=4),
    "agnostic": dict(type="nms", iou_threshold=0.4, class_agnostic=True),
    "above": dict(type="nms", iou_threshold=0.4, score_threshold=0.3),
    "soft": dict(type="soft_nms", iou_threshold=0.3, min_score=0.05),
}


def soft(boxes, scores, cfg):
    """Linear soft-NMS, a box at a time: (indices, decayed scores) of the survivors, best first."""
    kept, decayed, left = [], [], scores.clone()
    while len(left) and left.max() >= cfg["min_score"]:
        best = int(left.argmax())
        kept.append(best)
        decayed.append(left[best].item())
        iou = box_iou(boxes[best : best + 1], boxes)[0]
        left = torch.where(iou > cfg["iou_threshold"], left * (1 - iou), left)
        left[kept] = -1.0
    return torch.tensor(kept, dtype=torch.int64), torch.tensor(decayed)


def one_image(boxes, scores, labels, size, factor, cfg, most, profile, least):
    """What MMDetection (rescale, NMS), torchvision (NMS, rescale) and Detectron2 (NMS, rescale, clip) do with an image."""
    if factor is not None and profile == "mmdet":
        boxes = boxes / factor.repeat(2)
    large = ((boxes[:, 2:] - boxes[:, :2]) > least).all(1) & (scores > cfg.get("score_threshold", -1))
    boxes, scores, labels = boxes[large], scores[large], labels[large]
    kept, values = [torch.zeros(0, dtype=torch.int64)], [torch.zeros(0)]
    for group in [None] if cfg.get("class_agnostic") else labels.unique():
        own = torch.arange(len(labels)) if group is None else (labels == group).nonzero()[:, 0]
        if cfg["type"] == "soft_nms":
            inner, value = soft(boxes[own], scores[own], cfg)
        else:
            inner = torchvision_nms(boxes[own], scores[own], cfg["iou_threshold"])
            value = scores[own][inner]
        kept.append(own[inner])
        values.append(value)
    kept, values = torch.cat(kept), torch.cat(values)
    order = values.sort(descending=True, stable=True).indices[
        : min(m for m in (most, cfg.get("max_num", most)) if m > 0)
    ]
    kept, values = kept[order], values[order]
    boxes, labels = boxes[kept], labels[kept]
    if factor is not None and profile != "mmdet":
        boxes = boxes / factor.repeat(2)
    if profile == "detectron2":
        limit = (size.flip(0) / (1.0 if factor is None else factor)).round()
        boxes = torch.minimum(boxes.clamp(min=0), limit.repeat(2))
        real = (boxes[:, 2:] > boxes[:, :2]).all(1)
        boxes, values, labels = boxes[real], values[real], labels[real]
    return boxes, values, labels


@pytest.mark.parametrize("nms", NMS)
@pytest.mark.parametrize("profile", ["mmdet", "torchvision", "detectron2"])
@pytest.mark.parametrize("scaled", [False, True])
def test_a_batch_is_its_images_by_the_peers_steps(device, nms, profile, scaled):
    n, g = 200, torch.Generator().manual_seed(1)
    boxes, scores = random_boxes(4 * n, 200, 150, 120).view(4, n, 4), torch.rand(4, n, generator=g)
    labels, counts = torch.randint(0, 3, (4, n), generator=g), torch.tensor([n, 70, 0, 120])
    sizes = torch.tensor([[150, 200], [140, 180], [150, 190], [120, 200]])
    factors = torch.tensor([[0.5, 0.5], [2.0, 1.25], [1.0, 1.0], [0.8, 0.8]]) if scaled else None
    least, cfg = 12, NMS[nms]
    for most in (7, 1000):
        frame = Frame(sizes.to(device), (160, 224), None if factors is None else factors.to(device))
        given = Padded(*(t.to(device) for t in (boxes, scores, labels, counts)))
        found = finish(given, frame, dict(nms=cfg, max_per_img=most), get_profile(profile), least)
        assert found.scores.shape == (4, min(most, cfg.get("max_num", most))) and found.counts.sum() > 10
        for i, kept in enumerate(found.counts.tolist()):
            own = boxes[i, : counts[i]], scores[i, : counts[i]], labels[i, : counts[i]]
            expected = one_image(*own, sizes[i], factors[i] if scaled else None, cfg, most, profile, least)
            for actual, value in zip((found.boxes, found.scores, found.labels), expected):
                torch.testing.assert_close(actual[i, :kept].cpu(), value, rtol=1e-5, atol=1e-4)
                assert not actual[i, kept:].any()


def test_without_a_limit_every_survivor_comes_back():
    boxes = torch.tensor([[[0.0, 0, 9, 9], [20, 0, 29, 9], [40, 0, 49, 9]]])
    given = Padded(boxes, torch.tensor([[0.5, 0.7, 0.6]]), torch.zeros(1, 3, dtype=torch.int64), torch.tensor([3]))
    frame, cfg = Frame(torch.tensor([[10, 50]]), (32, 64)), dict(nms=NMS["nms"], max_per_img=-1)
    assert finish(given, frame, cfg, get_profile("mmdet")).boxes[0, :, 0].tolist() == [20, 40, 0]


@pytest.mark.parametrize("nms, most, expected", [("nms", 2, [0, 0, 1, 1]), ("nms", -1, [0, 1, 1, 1]),
                                                 ("soft", 2, [0, 1, 1, 1])])  # fmt: skip
def test_candidates_that_were_left_out_matter_where_a_detection_is_missing(nms, most, expected):
    """The last image is full, too, but of lower scores than what was left out."""
    scores = torch.tensor([[0.9, 0.0], [0.9, 0.8], [0.9, 0.0], [0.9, 0.6]])
    found = Padded(torch.zeros(4, 2, 4), scores, torch.zeros(4, 2), torch.tensor([1, 2, 1, 2]))
    left_out = torch.tensor([0.0, 0.7, 0.7, 0.7])
    assert lost(found, left_out, dict(nms=NMS[nms], max_per_img=most)).tolist() == expected
