import pytest
import torch
import torch.nn.functional as F
from conftest import random_boxes
from torch import nn
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.roi_heads import RoIHeads, fastrcnn_loss
from torchvision.ops import MultiScaleRoIAlign

from fastrcnn.models import (
    ConvFCBBoxHead,
    Shared2FCBBoxHead,
    Shared4Conv1FCBBoxHead,
    SingleRoIExtractor,
    StandardRoIHead,
    faster_rcnn,
)
from fastrcnn.models.frame import Frame
from fastrcnn.models.padded import Padded
from fastrcnn.models.post_process import check_nms, suppress
from fastrcnn.models.profiles import PROFILES
from fastrcnn.ops import nms_padded

STRIDES = [4, 8, 16, 32]
SHAPES, BATCH = [(160, 224), (160, 200)], (160, 224)


def features(device="cpu"):
    return [torch.randn(2, 8, 160 // s, 224 // s, device=device) for s in STRIDES]


def roi_head(profile="mmdet", num_classes=5, sampling_ratio=0, aligned=True, head=None, **cfg):
    extractor = dict(
        type="SingleRoIExtractor",
        roi_layer=dict(type="RoIAlign", output_size=7, sampling_ratio=sampling_ratio, aligned=aligned),
        out_channels=8,
        featmap_strides=STRIDES,
    )
    sizes = dict(in_channels=8, fc_out_channels=32, num_classes=num_classes)
    box = dict(type="Shared2FCBBoxHead", loss_bbox=PROFILES[profile].roi_loss_bbox, **sizes)
    return StandardRoIHead(extractor, {**box, **(head or {})}, profile=profile, **cfg)


def spread(head) -> None:
    nn.init.normal_(head.fc_cls.weight, std=0.5)
    nn.init.normal_(head.fc_reg.weight, std=0.3)
    nn.init.normal_(head.fc_cls.bias)
    nn.init.normal_(head.fc_reg.bias)


def torchvision_heads(ours: StandardRoIHead, num_classes=5) -> RoIHeads:
    """torchvision's RoIHeads with the weights of `ours`: its background comes first, ours last."""
    pool = MultiScaleRoIAlign(["0", "1", "2", "3"], 7, 2)
    mlp, predictor = TwoMLPHead(8 * 49, 32), FastRCNNPredictor(32, num_classes + 1)
    head = ours.bbox_head
    for a, b in ((mlp.fc6, head.shared_fcs[0]), (mlp.fc7, head.shared_fcs[1])):
        a.load_state_dict(b.state_dict())
    with torch.no_grad():
        for a, b, kept in ((predictor.cls_score, head.fc_cls, 1), (predictor.bbox_pred, head.fc_reg, 4)):
            for name in ("weight", "bias"):
                getattr(a, name)[kept:] = getattr(b, name)[: num_classes * kept]
        predictor.cls_score.weight[0], predictor.cls_score.bias[0] = head.fc_cls.weight[-1], head.fc_cls.bias[-1]
    return RoIHeads(pool, mlp, predictor, 0.5, 0.5, 10**7, 1.0, None, 0.05, 0.5, 100)


def proposals_of(device="cpu"):
    boxes = torch.stack([random_boxes(60, 200, 150, seed=i) for i in (1, 2)]).to(device)
    boxes[..., 0::2] = boxes[..., 0::2].clamp(0, 200)
    boxes[..., 1::2] = boxes[..., 1::2].clamp(0, 160)
    return boxes, torch.tensor([60, 41], device=device)


def targets_of(device="cpu"):
    boxes, _ = proposals_of(device)
    first, second = boxes[0, [3, 8, 20]] + 2.0, boxes[1, [5]]
    return [dict(boxes=first, labels=torch.tensor([0, 4, 2], device=device)),
            dict(boxes=second, labels=torch.tensor([1], device=device))]  # fmt: skip


def detections(head, *arguments) -> list[dict]:
    return Padded.lists(*head.predict(*arguments))


def test_detections_equal_torchvision(device):
    ours = roi_head("torchvision", sampling_ratio=2, aligned=False).eval().to(device)
    spread(ours.bbox_head)
    theirs = torchvision_heads(ours).eval().to(device)
    feats, (boxes, counts) = features(device), proposals_of(device)
    per_image = [b[:n] for b, n in zip(boxes, counts.tolist())]
    with torch.no_grad():
        expected, _ = theirs({str(i): f for i, f in enumerate(feats)}, per_image, SHAPES)
        got = detections(ours, feats, boxes, counts, Frame(torch.tensor(SHAPES, device=device), BATCH))
    for g, e in zip(got, expected):
        assert len(g["boxes"]) == len(e["boxes"]) > 20
        torch.testing.assert_close(g["scores"], e["scores"], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(g["boxes"], e["boxes"], rtol=0, atol=0.01)
        assert torch.equal(g["labels"] + 1, e["labels"])  # heads count from 0


def test_losses_equal_torchvision_when_everything_is_sampled(device):
    sampler = dict(type="RandomSampler", num=10**9, pos_fraction=1.0, neg_pos_ub=-1, add_gt_as_proposals=True)
    ours = roi_head("torchvision", sampling_ratio=2, aligned=False, train_cfg=dict(sampler=sampler)).to(device)
    spread(ours.bbox_head)
    theirs = torchvision_heads(ours).train().to(device)
    feats, (boxes, counts), targets = features(device), proposals_of(device), targets_of(device)
    per_image = [b[:n] for b, n in zip(boxes, counts.tolist())]
    theirs_targets = [dict(boxes=t["boxes"], labels=t["labels"] + 1) for t in targets]
    _, expected = theirs({str(i): f for i, f in enumerate(feats)}, per_image, SHAPES, theirs_targets)
    cls, box = ours.loss(feats, boxes, counts, targets)
    torch.testing.assert_close(cls, expected["loss_classifier"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(box, expected["loss_box_reg"], rtol=1e-5, atol=1e-5)


def test_the_box_heads_loss_is_torchvisions_fastrcnn_loss():
    head = Shared2FCBBoxHead(in_channels=8, num_classes=3, loss_bbox=PROFILES["torchvision"].roi_loss_bbox)
    logits, deltas = torch.randn(6, 4), torch.randn(6, 12)
    rois = torch.cat([torch.zeros(6, 1), random_boxes(6, seed=3)], 1)
    gts, labels = random_boxes(6, seed=4), torch.tensor([0, 3, 2, 2, 3, 1])
    encoded = head.bbox_coder.encode(rois[:, 1:], gts)
    first = torch.cat([logits[:, -1:], logits[:, :-1]], 1)  # background first
    all_deltas = torch.cat([torch.zeros(6, 4), deltas], 1)
    expected = fastrcnn_loss(first, all_deltas, [(labels + 1) % 4], [encoded])
    for a, b in zip(head.loss(logits, deltas, rois, labels, gts), expected):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("profile", ["mmdet", "torchvision", "detectron2"])
def test_losses_by_hand(profile):
    head = Shared2FCBBoxHead(in_channels=8, num_classes=2, loss_bbox=PROFILES[profile].roi_loss_bbox)
    logits = torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    deltas = torch.full((3, 8), 9.0)
    deltas[0, 4:] = torch.tensor([0.05, 0.0, 0.0, 3.0])
    rois = torch.tensor([[0, 10.0, 10, 30, 50]] * 3)
    cls, box = head.loss(logits, deltas, rois, torch.tensor([1, 2, 2]), rois[:, 1:])  # the target delta is zero
    expected = F.cross_entropy(logits, torch.tensor([1, 2, 2]))
    torch.testing.assert_close(cls, expected)
    beta = 1 / 9
    moved = 0.5 * 0.05**2 / beta + 3 - beta / 2 if profile == "torchvision" else 3.05
    assert box.item() == pytest.approx(moved / 3, rel=1e-5)  # over all samples, not over the positive one


def test_only_background_gives_a_zero_box_loss_with_a_gradient():
    head = Shared2FCBBoxHead(in_channels=8, num_classes=2)
    deltas = torch.randn(3, 8, requires_grad=True)
    _, box = head.loss(torch.randn(3, 3), deltas, torch.rand(3, 5), torch.full((3,), 2), torch.zeros(3, 4))
    assert box.item() == 0.0
    box.backward()
    assert torch.equal(deltas.grad, torch.zeros(3, 8))


def sampled(head: StandardRoIHead, proposals: torch.Tensor, target: dict):
    """(boxes, labels, matched ground truth) that the box head's loss is given."""
    seen = []

    def record(logits, deltas, rois, labels, boxes, pos_weight):
        seen.extend([rois, labels, boxes])
        return logits.sum(), deltas.sum()

    head.bbox_head.loss = record
    head.loss(features(), proposals[None], torch.tensor([len(proposals)]), [target])
    rois, labels, matched = (x[seen[0][:, 0] >= 0] for x in seen)
    return rois[:, 1:], labels, matched


@pytest.mark.parametrize("profile", ["mmdet", "torchvision", "detectron2"])
def test_ground_truth_joins_the_proposals(profile):
    ours = roi_head(profile)
    proposals = torch.tensor([[0.0, 0, 10, 10], [100, 100, 120, 130], [50, 50, 60, 60]])
    gts = torch.tensor([[101.0, 100, 121, 130], [0, 0, 40, 40]])
    boxes, labels, matched = sampled(ours, proposals, dict(boxes=gts, labels=torch.tensor([3, 1])))
    positives = [gts[0], gts[1], proposals[1]] if profile == "mmdet" else [proposals[1], gts[0], gts[1]]
    assert torch.equal(boxes[:3], torch.stack(positives))
    assert labels.tolist() == ([3, 1, 3] if profile == "mmdet" else [3, 3, 1]) + [5, 5]
    assert torch.equal(matched[:3], gts[[0, 1, 0]] if profile == "mmdet" else gts[[0, 0, 1]])
    assert sorted(boxes[3:].tolist()) == sorted(proposals[[0, 2]].tolist())


def test_twin_objects_keep_their_own_labels_in_mmdetection_only():
    # A box annotated twice with two labels: MMDetection matches each to itself, the others to the first by IoU.
    gts = torch.tensor([[0.0, 0, 40, 40], [0, 0, 40, 40]])
    target = dict(boxes=gts, labels=torch.tensor([3, 1]))
    for profile, expected in (("mmdet", [3, 1]), ("torchvision", [3, 3]), ("detectron2", [3, 3])):
        assert sampled(roi_head(profile), torch.zeros(0, 4), target)[1].tolist() == expected


def test_ground_truth_can_stay_out():
    sampler = dict(type="RandomSampler", num=512, pos_fraction=0.25, neg_pos_ub=-1, add_gt_as_proposals=False)
    ours = roi_head(train_cfg=dict(sampler=sampler))
    target = dict(boxes=torch.tensor([[0.0, 0, 40, 40]]), labels=torch.tensor([3]))
    boxes, labels, _ = sampled(ours, torch.tensor([[100.0, 100, 120, 120]]), target)
    assert boxes.tolist() == [[100, 100, 120, 120]] and labels.tolist() == [5]


@pytest.mark.parametrize("profile", ["mmdet", "torchvision"])
@pytest.mark.parametrize("add_gt", [False, True])
def test_a_batch_samples_what_its_images_alone_do(profile, add_gt):
    sampler = dict(type="RandomSampler", num=10**9, pos_fraction=1.0, neg_pos_ub=-1, add_gt_as_proposals=add_gt)
    ours = roi_head(profile, train_cfg=dict(sampler=sampler))
    (boxes, _), targets = proposals_of(), targets_of()
    boxes, counts = boxes[[0, 1, 1, 0]], [60, 41, 7, 0]
    nothing = dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64))
    targets = [*targets, nothing, targets[0]]
    alone = [sampled(ours, b[:n], t) for b, n, t in zip(boxes, counts, targets)]
    for b, n in zip(boxes, counts):
        b[n:] = float("nan")  # rows beyond the count are not read
    found = ours._targets(features(), boxes, torch.tensor(counts), targets)
    found = [x[found[0][:, 0] >= 0] for x in found]
    assert found[0][:, 0].long().bincount(minlength=4).tolist() == [len(labels) for _, labels, _ in alone]
    for together, parts in zip((found[0][:, 1:], *found[1:]), zip(*alone)):
        assert torch.equal(together, torch.cat(parts))


def handmade(profile, **head):
    """Two proposals of which the box head says: class 0 at 0.9, class 1 at 0.8; deltas of zero."""
    ours = roi_head(profile, num_classes=2, head=head).eval()

    class Fixed(nn.Module):
        num_classes, reg_class_agnostic, bbox_coder = 2, False, ours.bbox_head.bbox_coder

        def forward(self, x):
            probabilities = torch.tensor([[0.9, 0.04, 0.06], [0.1, 0.8, 0.1]])
            return probabilities.log(), torch.zeros(2, 8)

    ours.bbox_head = Fixed()
    return ours


@pytest.mark.parametrize("profile", ["mmdet", "torchvision", "detectron2"])
def test_detections_by_hand(profile):
    ours = handmade(profile)
    proposals = torch.tensor([[[10.0, 20, 50, 60], [100, 40, 180, 120]]])
    arguments, frame = (features(), proposals, torch.tensor([2])), Frame(torch.tensor([[160, 224]]), (160, 224))
    (found,) = detections(ours, *arguments, frame._replace(factors=torch.tensor([[2.0, 4.0]])))
    assert found["labels"].tolist() == [0, 1, 0]
    torch.testing.assert_close(found["scores"], torch.tensor([0.9, 0.8, 0.1]))
    expected = [[5.0, 5, 25, 15], [50, 10, 90, 30], [50, 10, 90, 30]]  # halved in x, quartered in y
    torch.testing.assert_close(found["boxes"], torch.tensor(expected))
    assert torch.equal(detections(ours, *arguments, frame)[0]["boxes"][0], proposals[0, 0])


@pytest.mark.parametrize("profile, kept", [("mmdet", 2), ("torchvision", 1), ("detectron2", 1)])
def test_a_flat_detection(profile, kept):
    # The first box is cut to nothing by the image's edge: torchvision and Detectron2 drop it.
    ours = handmade(profile)
    ours.test_cfg = {**ours.test_cfg, "score_thr": 0.5}
    proposals = torch.tensor([[[224.0, 20, 240, 60], [100, 40, 180, 120]]])
    arguments = features(), proposals, torch.tensor([2]), Frame(torch.tensor([[160, 224]]), (160, 224))
    assert len(detections(ours, *arguments)[0]["boxes"]) == kept


@pytest.mark.parametrize("profile, box", [("mmdet", [5, 10, 25, 30]), ("torchvision", [10, 20, 50, 60])])
def test_nms_runs_at_the_original_size_in_mmdetection_only(profile, box, monkeypatch):
    seen = []

    def recording_nms(boxes, *rest):
        seen.append(boxes[0].clone())
        return nms_padded(boxes, *rest)

    monkeypatch.setattr("fastrcnn.models.post_process.nms_padded", recording_nms)
    proposals = torch.tensor([[[10.0, 20, 50, 60], [100, 40, 180, 120]]])
    sizes, factors = torch.tensor([[160, 224]]), torch.tensor([[2.0, 2.0]])
    frame = Frame(sizes, (160, 224), factors)
    (found,) = detections(handmade(profile), features(), proposals, torch.tensor([2]), frame)
    assert seen[0][0].tolist() == box
    assert found["boxes"][0].tolist() == [5, 10, 25, 30]


def test_limits_on_score_and_number():
    ours = roi_head().eval()
    spread(ours.bbox_head)
    boxes, counts = proposals_of()
    arguments = features(), boxes, counts, Frame(torch.tensor(SHAPES), BATCH)
    ours.test_cfg = {**ours.test_cfg, "score_thr": 0.3, "max_per_img": 7}
    for found in detections(ours, *arguments):
        assert len(found["boxes"]) == 7 and found["scores"].min() > 0.3
    ours.test_cfg = {**ours.test_cfg, "score_thr": 1.0}
    for found in detections(ours, *arguments):
        assert found["boxes"].shape == (0, 4) and found["scores"].shape == found["labels"].shape == (0,)


def test_an_image_without_proposals():
    ours = roi_head().eval()
    frame = Frame(torch.tensor(SHAPES), BATCH)
    found = detections(ours, features(), torch.zeros(2, 10, 4), torch.tensor([0, 0]), frame)
    assert [f["boxes"].shape for f in found] == [(0, 4)] * 2


def test_class_agnostic_boxes():
    ours = roi_head(head=dict(reg_class_agnostic=True)).eval()
    spread(ours.bbox_head)
    assert ours.bbox_head.fc_reg.out_features == 4
    boxes, counts = proposals_of()
    found = detections(ours, features(), boxes, counts, Frame(torch.tensor(SHAPES), BATCH))
    assert all(len(f["boxes"]) > 0 for f in found)
    assert all(torch.isfinite(v) for v in ours.loss(features(), boxes, counts, targets_of()))


@pytest.mark.parametrize(
    "make, keys",
    [
        (lambda: Shared2FCBBoxHead(in_channels=8, num_classes=3), {"shared_fcs.0.weight", "shared_fcs.1.bias"}),
        (
            lambda: Shared4Conv1FCBBoxHead(in_channels=8, num_classes=3, norm_cfg=dict(type="BN"), conv_out_channels=8),
            {"shared_convs.3.conv.weight", "shared_convs.0.bn.running_var", "shared_fcs.0.weight"},
        ),
        (
            lambda: ConvFCBBoxHead(0, 0, 1, 1, 2, 0, 8, 16, in_channels=8, num_classes=3),
            {"cls_convs.0.conv.weight", "cls_fcs.0.weight", "reg_convs.1.conv.bias"},
        ),
    ],
)
def test_box_heads(make, keys, device):
    head = make().eval().to(device)
    assert keys | {"fc_cls.weight", "fc_reg.bias"} <= set(head.state_dict())
    x = torch.randn(5, 8, 7, 7, device=device)
    logits, deltas = head(x)
    assert logits.shape == (5, 4) and deltas.shape == (5, 12)

    def branch(x, convs, fcs):
        for m in convs:
            x = m.conv(x)
            x = (x if m.norm is None else m.norm(x)).relu()
        for fc in fcs:
            x = fc(x.flatten(1)).relu()
        return x

    shared = branch(x, head.shared_convs, head.shared_fcs)
    torch.testing.assert_close(logits, head.fc_cls(branch(shared, head.cls_convs, head.cls_fcs).flatten(1)))
    torch.testing.assert_close(deltas, head.fc_reg(branch(shared, head.reg_convs, head.reg_fcs).flatten(1)))
    # The smallest layer has 64 weights.
    assert head.fc_cls.weight.std().item() == pytest.approx(0.01, rel=0.3)
    assert head.fc_reg.weight.std().item() == pytest.approx(0.001, rel=0.3)


@pytest.mark.parametrize(
    "make, names",
    [
        (lambda: SingleRoIExtractor(dict(type="RoIPool", output_size=7), 8, STRIDES), "roi_layer"),
        (lambda: SingleRoIExtractor(dict(output_size=7, pool="max"), 8, STRIDES), "roi_layer"),
        (lambda: ConvFCBBoxHead(num_shared_fcs=1, num_cls_convs=1), "num_cls_convs"),
        (lambda: roi_head(head=dict(type="DoubleConvFCBBoxHead")), "bbox_head"),
        (lambda: roi_head(head=dict(loss_bbox=dict(type="DiceLoss"))), "loss"),
    ],
)
def test_bad_arguments_are_named(make, names):
    with pytest.raises(ValueError, match=names):
        make()


def test_soft_nms_keeps_overlapping_boxes_with_lower_scores():
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9], [50, 50, 60, 60], [0, 0, 10, 10]])
    scores, labels = torch.tensor([0.9, 0.8, 0.7, 0.6]), torch.tensor([1, 1, 1, 2])
    found = Padded(boxes[None], scores[None], labels[None], torch.tensor([4]))

    def kept(most=10, type="nms", **options):
        """Which of the boxes, and their scores."""
        left = suppress(found, dict(type=type, iou_threshold=0.5, **options), most)
        n, rows = int(left.counts), torch.cat([boxes, labels[:, None]], 1).tolist()
        back = torch.cat([left.boxes[0], left.labels[0, :, None]], 1)
        return [rows.index(row) for row in back[:n].tolist()], left.scores[0, :n]

    hard, hard_scores = kept()
    assert hard == [0, 2, 3] and torch.equal(hard_scores, scores[hard])
    soft, soft_scores = kept(type="soft_nms")
    assert soft == [0, 2, 3, 1]  # the other class does not decay
    assert soft_scores[3].item() == pytest.approx(0.8 * (1 - 0.9), rel=1e-5)
    assert kept(class_agnostic=True)[0] == [0, 2]
    assert kept(2, "soft_nms")[0] == kept(max_num=2)[0] == [0, 2]
    assert kept(-1)[0] == [0, 2, 3]
    assert kept(score_threshold=0.65)[0] == [0, 2]
    with pytest.raises(ValueError, match="soft_nms"):
        check_nms(dict(type="matrix_nms"), "nms")


@pytest.mark.parametrize("loss", ["GIoULoss", "IoULoss", "BoundedIoULoss"])
def test_losses_on_decoded_boxes_are_zero_for_exact_deltas(loss):
    head = ConvFCBBoxHead(num_classes=2, reg_decoded_bbox=True, loss_bbox=dict(type=loss), in_channels=4)
    rois = torch.tensor([[0, 10.0, 10, 40, 50], [0, 20, 20, 60, 50]])
    truth = torch.tensor([[12.0, 8, 44, 52], [0, 0, 0, 0]])
    labels = torch.tensor([1, 2])  # the second is background
    deltas = torch.zeros(2, 2, 4)
    deltas[0, 1] = head.bbox_coder.encode(rois[:1, 1:], truth[:1])[0]
    _, exact = head.loss(torch.zeros(2, 3), deltas.flatten(1), rois, labels, truth)
    assert exact.item() == pytest.approx(0.0, abs=1e-3)
    _, off = head.loss(torch.zeros(2, 3), torch.zeros(2, 8), rois, labels, truth)
    assert off.item() > 0.02


def test_hard_examples_are_found_with_the_heads_own_loss():
    model = faster_rcnn("r18_fpn", 3, backbone=dict(base_channels=4), neck=dict(in_channels=[4, 8, 16, 32]),
                        train_cfg=dict(rcnn=dict(sampler=dict(type="OHEMSampler", num=8, pos_fraction=0.25))))  # fmt: skip
    target = dict(boxes=torch.tensor([[4.0, 4, 40, 40], [30, 30, 60, 60]]), labels=torch.tensor([1, 2]))
    losses = model.loss(torch.randn(1, 3, 64, 64), [(64, 64)], [target])
    sum(losses.values()).backward()
    assert model.roi_head.bbox_head.fc_cls.weight.grad.abs().max() > 0
