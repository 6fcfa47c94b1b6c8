"""evaluation/recall.py: COCO's average recall of proposals."""

import math
import sys

import pytest
import torch
from coco_judge import crowded, judge, write

from fastrcnn.data import CocoDataset
from fastrcnn.evaluation.predict import Predictions, as_detector, predict
from fastrcnn.evaluation.recall import _recall, evaluate_proposals, proposal_recall
from fastrcnn.models import RPN, faster_rcnn

COCO_THRESHOLDS = [0.5 + 0.05 * i for i in range(10)]
BOUNDS = {"": (0, 1e10), "s": (0, 32**2), "m": (32**2, 96**2), "l": (96**2, 1e10)}


def boxes_of(*boxes):
    return torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)


def target_of(*boxes, ignore=()):
    return dict(boxes=boxes_of(*boxes), ignore_boxes=boxes_of(*ignore))


def proposals_of(*boxes):
    """By descending score."""
    return boxes_of(*boxes), torch.linspace(0.9, 0.1, len(boxes))


def overlap(a, b) -> float:
    width, height = (min(a[i + 2], b[i + 2]) - max(a[i], b[i]) for i in (0, 1))
    inter = max(width, 0) * max(height, 0)
    area_a, area_b = ((x[2] - x[0]) * (x[3] - x[1]) for x in (a, b))
    return inter / (area_a + area_b - inter)


def reached(objects, proposals, threshold) -> int:
    """How many objects are found: each proposal in turn takes the free object that it overlaps most."""
    taken = set()
    for p in proposals:
        free = [(overlap(p, b), j) for j, b in enumerate(objects) if j not in taken]
        if free and max(free)[0] >= threshold:
            taken.add(max(free)[1])
    return len(taken)


def naive(targets, proposals, size, most, thresholds=COCO_THRESHOLDS) -> float:
    low, high = BOUNDS[size]
    hits, total = [0] * len(thresholds), 0
    for target, (boxes, scores) in zip(targets, proposals):
        best = boxes[scores.sort(descending=True, stable=True).indices][:most].double().tolist()
        objects = [b for b in target["boxes"].double().tolist() if low <= (b[2] - b[0]) * (b[3] - b[1]) <= high]
        total += len(objects)
        for t, threshold in enumerate(thresholds):
            hits[t] += reached(objects, best, threshold)
    return 100 * sum(hits) / len(hits) / total if total else math.nan


def scattered(generator, n, smallest, largest, frame=200):
    corner = torch.rand(n, 2, generator=generator) * frame
    return torch.cat([corner, corner + smallest + torch.rand(n, 2, generator=generator) * (largest - smallest)], 1)


def crowded_images(seed):
    """Images with 0..8 objects, up to two ignore regions, and noisy copies of the objects as proposals."""
    g = torch.Generator().manual_seed(seed)
    targets, proposals = [], []
    for i in range(4):
        truth = scattered(g, (0, 8, 3, 6)[i], 5, 150)
        regions = scattered(g, (1, 2, 0, 1)[i], 20, 120)
        noise = torch.randn(60 * len(truth), 4, generator=g) * 8
        copies = truth.repeat(60, 1) + noise
        copies[:, 2:] = torch.maximum(copies[:, 2:], copies[:, :2] + 1)
        inside = regions.repeat(5, 1) * 0.5 + regions[:, :2].repeat(5, 2) * 0.5  # lie in the regions wholly
        boxes = torch.cat([copies, inside, scattered(g, 30, 5, 60)])
        targets.append(dict(boxes=truth, ignore_boxes=regions))
        proposals.append((boxes, torch.rand(len(boxes), generator=g)))
    return targets, proposals


@pytest.mark.parametrize("seed", range(3))
def test_recall_equals_a_naive_loop(seed):
    targets, proposals = crowded_images(seed)
    found = proposal_recall(targets, proposals, max_nums=(5, 20, 100))
    assert list(found) == ["AR@5", "AR@20", "AR@100", "ARs@100", "ARm@100", "ARl@100"]
    for key, value in found.items():
        size, most = key[2:].split("@")
        assert value == pytest.approx(naive(targets, proposals, size, int(most)), abs=1e-6), key
    assert 0 < found["AR@5"] < found["AR@20"] < found["AR@100"] < 100


def test_given_thresholds_equal_a_naive_loop():
    targets, proposals = crowded_images(5)
    for thresholds in ([0.5], [0.6, 0.9]):
        found = proposal_recall(targets, proposals, iou_thrs=thresholds)
        assert found["AR@1000"] == pytest.approx(naive(targets, proposals, "", 1000, thresholds), abs=1e-6)


A, B, C = [10.0, 10, 60, 60], [100.0, 20, 220, 160], [300.0, 300, 310, 312]  # medium, large, small
NOWHERE = [500.0, 500, 520, 520]


def test_recall_by_hand():
    found = proposal_recall([target_of(A, B, C)], [proposals_of(A, B, C)])
    assert found == pytest.approx(dict.fromkeys(found, 100.0))
    assert list(found) == ["AR@100", "AR@300", "AR@1000", "ARs@1000", "ARm@1000", "ARl@1000"]
    # One object of two is overlapped by 0.8, which reaches the thresholds 0.5, 0.55 ... 0.8, seven of ten.
    found = proposal_recall([target_of(A, B)], [proposals_of([10.0, 10, 60, 50])])
    assert found["AR@100"] == pytest.approx(35) and found["ARm@1000"] == pytest.approx(70)
    assert found["ARl@1000"] == pytest.approx(0) and math.isnan(found["ARs@1000"])


def test_only_the_best_proposals_of_each_image_count():
    # One is allowed an image: the second image's object stands behind an empty box.
    targets, proposals = [target_of(A), target_of(B)], [proposals_of(A, NOWHERE), proposals_of(NOWHERE, B)]
    found = proposal_recall(targets, proposals, max_nums=(2, 1))
    assert (found["AR@1"], found["AR@2"]) == pytest.approx((50, 100))
    boxes, scores = proposals[1]
    shuffled = [proposals[0], (boxes.flip(0), scores.flip(0))]  # the score ranks, not the order
    assert proposal_recall(targets, shuffled, max_nums=(1, 2)) == pytest.approx(found, nan_ok=True)


def test_labels_play_no_part_and_a_proposal_finds_one_object():
    targets = [dict(boxes=boxes_of(A, A), labels=torch.tensor([0, 7]))]  # without ignore_boxes, too
    assert proposal_recall(targets, [proposals_of(A)])["AR@100"] == pytest.approx(50)
    assert proposal_recall(targets, [proposals_of(A, A)])["AR@100"] == pytest.approx(100)


def test_ignore_regions_are_not_objects():
    found = proposal_recall([target_of(A, ignore=[[90.0, 10, 230, 170]])], [proposals_of(B, B, A)])
    assert found["AR@100"] == pytest.approx(100) and math.isnan(found["ARl@1000"])


def test_nothing_proposed_is_zero_and_nothing_to_find_is_nan():
    empty = proposals_of()
    assert proposal_recall([target_of(A)], [empty])["AR@1000"] == 0
    assert proposal_recall([target_of(A), target_of(B)], [empty, proposals_of(B)])["AR@1000"] == pytest.approx(50)
    for targets, proposals in (([target_of()], [proposals_of(A)]), ([target_of()], [empty]), ([], [])):
        assert all(math.isnan(v) for v in proposal_recall(targets, proposals).values())


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="proposals: expected one for each of the 2 targets, got 1"):
        proposal_recall([target_of(A), target_of(B)], [proposals_of(A)])
    for max_nums in ((), (0, 10)):
        with pytest.raises(ValueError, match="max_nums"):
            proposal_recall([target_of(A)], [proposals_of(A)], max_nums=max_nums)


def test_the_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "hotcoco", None)
    with pytest.raises(ImportError, match=r"fastrcnn\[eval\]"):
        proposal_recall([target_of(A)], [proposals_of(A)])


TINY = dict(
    backbone=dict(type="ResNet", depth=18, base_channels=8),
    neck=dict(type="FPN", in_channels=[8, 16, 32, 64], out_channels=8, num_outs=5),
    rpn_head=dict(type="RPNHead", in_channels=8, feat_channels=8),
    min_size=64,
    max_size=128,
)


def all_anchors(model):
    """Proposals that are the plain anchors: with heads of zeros their scores are alike, and NMS thins them out."""
    for conv in (model.rpn_head.rpn_cls, model.rpn_head.rpn_reg):
        torch.nn.init.zeros_(conv.weight)
    return model


def dataset_of(*sizes):
    """Each picture holds one object: the anchor of 32 pixels (of the picture of 64) around the middle of the picture."""
    pairs = []
    for height, width in sizes:
        unit = min(height, width) / 64
        x, y = width / unit // 8 * 4, 32
        box = torch.tensor([[x - 16.0, y - 16, x + 16, y + 16]]) * unit
        pairs.append((torch.zeros(3, height, width, dtype=torch.uint8), dict(boxes=box, labels=torch.tensor([5]))))
    return pairs


def test_recall_on_a_file_is_pycocotools(tmp_path):
    """Areas, crowds, slivers and boxes over the edge count as they are written, whatever their classes."""
    content, rows = crowded(4)
    rows = [[[*row[:5], 0] for row in r] for r in rows]
    found = [torch.as_tensor(r, dtype=torch.float64).reshape(-1, 6) for r in rows]
    results = [
        dict(boxes=torch.cat([r[:, :2], r[:, :2] + r[:, 2:4]], 1), scores=r[:, 4], labels=r[:, 5]) for r in found
    ]
    dataset = CocoDataset(write(tmp_path, content))
    ids, images = sorted(c["id"] for c in content["categories"]), [i["id"] for i in content["images"]]
    ours = _recall(images, dataset.truth(range(len(images))), Predictions.of(results), (5, 20, 100))
    recall = judge(content, rows, ids, useCats=0, maxDets=[5, 20, 100]).eval["recall"][:, 0].mean(0)  # [sizes, numbers]
    assert list(ours.values()) == pytest.approx([*(100 * recall[0]), *(100 * recall[1:, 2])], abs=1e-9)
    assert 0 < ours["AR@5"] < ours["AR@20"] < ours["AR@100"] < 100


@pytest.mark.parametrize("training", [True, False])
def test_proposals_are_measured_in_the_pixels_of_the_dataset(training):
    model = all_anchors(RPN(**TINY, test_cfg=dict(rpn=dict(nms=dict(iou_threshold=0.95))))).train(training)
    dataset = dataset_of((64, 96), (128, 128), (192, 320))
    found = evaluate_proposals(model, dataset, batch_size=2)
    assert list(found) == ["AR@100", "AR@300", "AR@1000", "ARs@1000", "ARm@1000", "ARl@1000"]
    assert found["AR@1000"] == pytest.approx(100)
    assert model.training == training
    # The same objects at twice the place and size are elsewhere.
    moved = [(image, dict(target, boxes=target["boxes"] * 2)) for image, target in dataset]
    assert evaluate_proposals(model, moved)["AR@1000"] < 80


def test_proposals_whose_scores_are_logits_all_count():
    """Detectron2 ranks by logits, most of which are below 0."""
    detector = as_detector(RPN(**TINY, profile="detectron2"))
    found = predict(detector, dataset_of((64, 96)))
    assert (found.scores < 0).any() and (found.scores > 0).any()


def test_the_batch_size_changes_nothing_and_both_detectors_are_measured():
    heads = dict(bbox_roi_extractor=dict(out_channels=8), bbox_head=dict(in_channels=8))
    model = faster_rcnn("r18_fpn", 3, **TINY, roi_head=heads).eval()
    g = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (5, 3, 128, 192), generator=g, dtype=torch.uint8)  # halved by the model
    dataset = [(image, dict(boxes=scattered(g, 12, 40, 100, frame=120))) for image in images]
    found = [evaluate_proposals(model, dataset, batch_size=size) for size in (1, 2, 5)]
    assert 0 < found[0]["AR@100"] < 100
    # Half of one object at one threshold: what the order of a convolution's sums may move.
    assert found[1] == pytest.approx(found[0], abs=0.5, nan_ok=True) == found[2]
    alone = RPN(model.backbone, model.neck, model.rpn_head, min_size=64, max_size=128)
    assert evaluate_proposals(alone, dataset, batch_size=5) == pytest.approx(found[2], nan_ok=True)
    assert evaluate_proposals(torch.nn.DataParallel(alone), dataset, batch_size=5) == pytest.approx(
        found[2], nan_ok=True
    )
    with pytest.raises(TypeError, match=r"model: expected an RPN.*got Linear"):
        evaluate_proposals(torch.nn.Linear(1, 1), dataset)
