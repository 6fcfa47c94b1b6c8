import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.models.detection.rpn import RPNHead as TorchvisionHead
from torchvision.ops import box_iou

from fastrcnn.layers import fold_batch_norm
from fastrcnn.models import RPNHead
from fastrcnn.models.frame import Frame
from fastrcnn.models.profiles import PROFILES

SIZES = [(150, 200), (160, 130)]
BATCH_SHAPE = (160, 224)
MAPS = [(40, 56), (20, 28), (10, 14), (5, 7), (3, 4)]
EVERYTHING = dict(type="RandomSampler", num=10**9, pos_fraction=1.0, neg_pos_ub=-1, add_gt_as_proposals=False)


def spread(head) -> None:
    """Scores and deltas that vary, as those of a trained head do."""
    for conv, std in ((head.rpn_conv, 0.05), (head.rpn_cls, 0.3), (head.rpn_reg, 0.06)):
        nn.init.normal_(conv.weight, std=std)
        nn.init.normal_(conv.bias, std=0.1)


def features(channels=16, device="cpu"):
    return [torch.randn(2, channels, *size, device=device) for size in MAPS]


def targets_of(device="cpu"):
    first = [[10.0, 20.0, 70.0, 90.0], [100.0, 30.0, 140.0, 120.0], [12.0, 100.0, 40.0, 118.0]]
    return [dict(boxes=torch.tensor(b, device=device)) for b in (first, [[5.0, 5.0, 120.0, 150.0]])]


def torchvision_pair(device="cpu"):
    """Our head in the torchvision profile and torchvision's whole RPN, with the same weights, sampling everything."""
    train = dict(
        assigner=dict(type="MaxIoUAssigner", pos_iou_thr=0.7, neg_iou_thr=0.3, min_pos_iou=0.0), sampler=EVERYTHING
    )
    loss = PROFILES["torchvision"].rpn_loss_bbox
    ours = RPNHead(16, 16, train_cfg=train, loss_bbox=loss, profile="torchvision").to(device)
    spread(ours)
    anchors = AnchorGenerator(((32,), (64,), (128,), (256,), (512,)), ((0.5, 1.0, 2.0),) * 5)
    head = TorchvisionHead(16, 3)
    names = {"rpn_conv": "conv.0.0", "rpn_cls": "cls_logits", "rpn_reg": "bbox_pred"}
    head.load_state_dict({f"{names[k.split('.')[0]]}.{k.split('.')[1]}": v for k, v in ours.state_dict().items()})
    top = dict(training=2000, testing=1000)
    theirs = RegionProposalNetwork(anchors, head, 0.7, 0.3, 10**7, 1.0, top, top, 0.7).to(device)
    return ours, theirs


def test_proposals_equal_torchvision(device):
    ours, theirs = (m.eval() for m in torchvision_pair(device))
    feats = features(device=device)
    images = ImageList(torch.zeros(2, 3, *BATCH_SHAPE, device=device), SIZES)
    with torch.no_grad():
        expected, _ = theirs(images, {str(i): f for i, f in enumerate(feats)})
        sizes = torch.tensor(SIZES, device=device)
        boxes, scores, counts = ours.predict(*ours(feats), Frame(sizes, BATCH_SHAPE), ours.test_cfg)
    for i, (height, width) in enumerate(SIZES):
        n = int(counts[i])
        assert n == len(expected[i]) > 200
        # Sorted by score on both sides; the two may swap neighbours whose scores agree in all but the last digits.
        distance = torch.cdist(boxes[i, :n], expected[i], p=torch.inf)
        assert (distance.min(1).values < 0.01).all() and (distance.min(0).values < 0.01).all()
        torch.testing.assert_close(boxes[i, : n // 4], expected[i][: n // 4], atol=0.01, rtol=0)
        assert (scores[i, : n - 1] >= scores[i, 1:n]).all()
        assert boxes[i, :n, 0::2].max() <= width and boxes[i, :n, 1::2].max() <= height
        assert not boxes[i, n:].any() and not scores[i, n:].any()


def test_losses_equal_torchvision_when_everything_is_sampled(device):
    ours, theirs = (m.train() for m in torchvision_pair(device))
    feats, targets = features(device=device), targets_of(device)
    images = ImageList(torch.zeros(2, 3, *BATCH_SHAPE, device=device), SIZES)
    _, expected = theirs(images, {str(i): f for i, f in enumerate(feats)}, targets)
    cls, box = ours.loss(*ours(feats), Frame(torch.tensor(SIZES, device=device), BATCH_SHAPE), targets)
    torch.testing.assert_close(cls, expected["loss_objectness"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(box, expected["loss_rpn_box_reg"], rtol=1e-4, atol=1e-6)
    (cls + box).backward()
    (expected["loss_objectness"] + expected["loss_rpn_box_reg"]).backward()
    torch.testing.assert_close(ours.rpn_conv.weight.grad, theirs.head.conv[0][0].weight.grad, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(ours.rpn_reg.weight.grad, theirs.head.bbox_pred.weight.grad, rtol=1e-3, atol=1e-5)


def one_level(profile, **train_cfg):
    """Squares of 32 pixels every 32 pixels on a 2 x 3 map: six anchors that tile the picture but for half a cell."""
    anchors = dict(type="AnchorGenerator", strides=[32], ratios=[1.0], scales=[1])
    box = PROFILES[profile].rpn_loss_bbox
    return RPNHead(4, 4, anchor_generator=anchors, loss_bbox=box, train_cfg=train_cfg, profile=profile)


@pytest.mark.parametrize(
    "profile, cls_factor, box_factor", [("mmdet", 6, 6), ("torchvision", 6, 6), ("detectron2", 256, 256)]
)
def test_losses_by_hand_with_one_positive(profile, cls_factor, box_factor):
    head = one_level(profile)
    logits = torch.tensor([1.0, -2.0, 0.5, 3.0, 0.0, -1.0]).reshape(1, 1, 2, 3)
    deltas = torch.zeros(1, 4, 2, 3)
    deltas[0, :, 1, 2] = torch.tensor([0.5, 0.0, 0.05, 0.0])
    target = [dict(boxes=torch.tensor([[48.0, 16.0, 80.0, 48.0]]))]  # the last anchor exactly
    cls, box = head.loss([logits], [deltas], Frame(torch.tensor([[64, 96]]), (64, 96)), target)
    expected = F.binary_cross_entropy_with_logits(logits.flatten(), torch.tensor([0.0, 0, 0, 0, 0, 1]), reduction="sum")
    assert cls.item() == pytest.approx(expected.item() / cls_factor, rel=1e-5)
    beta = 1 / 9
    moved = (0.5 - beta / 2) + 0.5 * 0.05**2 / beta if profile == "torchvision" else 0.55
    assert box.item() == pytest.approx(moved / box_factor, rel=1e-5)


def test_detectron2_divides_by_the_whole_of_an_odd_number_of_samples():
    sampler = dict(type="RandomSampler", num=255, pos_fraction=0.5, neg_pos_ub=-1, add_gt_as_proposals=False)
    head = one_level("detectron2", sampler=sampler)
    target, maps = [dict(boxes=torch.zeros(0, 4))] * 2, ([torch.zeros(2, 1, 2, 3)], [torch.zeros(2, 4, 2, 3)])
    cls, _ = head.loss(*maps, Frame(torch.tensor([[64, 96]] * 2), (64, 96)), target)
    assert cls.item() == pytest.approx(12 * math.log(2) / (2 * 255), rel=1e-6)


@pytest.mark.parametrize("profile, factor", [("mmdet", 6 + 1), ("torchvision", 6), ("detectron2", 256)])
def test_an_image_without_objects_counts_one_positive_in_mmdetection_only(profile, factor):
    head = one_level(profile)
    logits = torch.linspace(-1, 1, 6).reshape(1, 1, 2, 3).requires_grad_()
    deltas = torch.zeros(1, 4, 2, 3, requires_grad=True)
    target = [dict(boxes=torch.zeros(0, 4))]
    cls, box = head.loss([logits], [deltas], Frame(torch.tensor([[64, 96]]), (64, 96)), target)
    expected = F.binary_cross_entropy_with_logits(logits, torch.zeros_like(logits), reduction="sum")
    torch.testing.assert_close(cls, expected / factor)
    assert box.item() == 0.0
    (cls + box).backward()
    assert logits.grad.abs().min() > 0 and not deltas.grad.any()


@pytest.mark.parametrize("profile, positives", [("mmdet", 0), ("torchvision", 6), ("detectron2", 6)])
def test_an_object_that_overlaps_no_anchor(profile, positives):
    # MMDetection's floor on the best IoU leaves it out; the others' low-quality rule takes every anchor of IoU 0.
    head = one_level(
        profile, assigner=dict(pos_iou_thr=0.7, neg_iou_thr=0.3, min_pos_iou=PROFILES[profile].min_pos_iou)
    )
    logits = torch.full((1, 1, 2, 3), 2.0, requires_grad=True)
    target = [dict(boxes=torch.tensor([[200.0, 200.0, 220.0, 220.0]]))]
    cls, _ = head.loss([logits], [torch.zeros(1, 4, 2, 3)], Frame(torch.tensor([[64, 96]]), (64, 96)), target)
    cls.backward()
    assert int((logits.grad < 0).sum()) == positives  # a positive pulls its logit up


class Targets(nn.Module):
    """In place of the box loss: shows what the deltas are compared with."""

    def forward(self, pred, target, avg_factor, positive):
        return target[positive]


def test_ties_go_to_the_last_object_in_mmdetection_and_to_the_best_elsewhere():
    # Both objects have their best IoU with anchor 0: the first overlaps it more.
    boxes = torch.tensor([[-16.0, -16.0, 16.0, 8.0], [-16.0, -16.0, 0.0, 16.0]])
    for profile, winner in (("mmdet", 1), ("torchvision", 0), ("detectron2", 0)):
        head = one_level(profile, assigner=dict(pos_iou_thr=0.9, neg_iou_thr=0.3, min_pos_iou=0.3))
        head.loss_bbox = Targets()
        logits = torch.zeros(1, 1, 2, 3)
        _, encoded = head.loss(
            [logits], [torch.zeros(1, 4, 2, 3)], Frame(torch.tensor([[64, 96]]), (64, 96)), [dict(boxes=boxes)]
        )
        anchor = torch.tensor([[-16.0, -16.0, 16.0, 16.0]])
        torch.testing.assert_close(encoded, head.bbox_coder.encode(anchor, boxes[winner : winner + 1]))


def test_anchors_in_another_images_padding_take_no_part_in_mmdetection_only():
    sizes = torch.tensor([[64, 96], [64, 32]])
    targets = [dict(boxes=torch.zeros(0, 4))] * 2
    for profile, used in (("mmdet", 2), ("torchvision", 6), ("detectron2", 6)):
        logits = torch.zeros(2, 1, 2, 3, requires_grad=True)
        cls, _ = one_level(profile).loss([logits], [torch.zeros(2, 4, 2, 3)], Frame(sizes, (64, 96)), targets)
        cls.backward()
        assert [int((g != 0).sum()) for g in logits.grad] == [6, used]


def test_ignore_regions_take_anchors_out():
    target = [dict(boxes=torch.zeros(0, 4), ignore_boxes=torch.tensor([[-16.0, -16.0, 48.0, 16.0]]))]
    both = [dict(target[0], boxes=torch.tensor([[48.0, 16.0, 80.0, 48.0]]))]
    for ignore_iof_thr, used in ((0.5, 4), (-1, 6)):
        head = one_level("mmdet", assigner=dict(pos_iou_thr=0.7, neg_iou_thr=0.3, ignore_iof_thr=ignore_iof_thr))
        logits = torch.zeros(1, 1, 2, 3, requires_grad=True)
        cls, _ = head.loss([logits], [torch.zeros(1, 4, 2, 3)], Frame(torch.tensor([[64, 96]]), (64, 96)), both)
        cls.backward()
        assert int((logits.grad != 0).sum()) == used


@pytest.mark.parametrize("num_convs", [1, 2])
def test_forward_is_the_plain_layers(num_convs, device):
    head = RPNHead(16, 12, num_convs=num_convs).to(device)
    x = torch.randn(2, 16, 9, 7, device=device)
    convs = [head.rpn_conv] if num_convs == 1 else [m.conv for m in head.rpn_conv]
    hidden = x
    for conv in convs:
        hidden = conv(hidden).relu()
    (logits,), (deltas,) = head([x])
    torch.testing.assert_close(logits, head.rpn_cls(hidden), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(deltas, head.rpn_reg(hidden), rtol=1e-4, atol=1e-6)
    expected = {"rpn_conv.weight"} if num_convs == 1 else {"rpn_conv.0.conv.weight", "rpn_conv.1.conv.weight"}
    assert expected <= set(head.state_dict())
    assert not any("anchor" in k for k in head.state_dict())
    assert head.rpn_cls.weight.std().item() == pytest.approx(0.01, rel=0.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_anchors_stay_exact_in_a_low_precision_model(dtype):
    head = RPNHead(4, 4, anchor_generator=dict(strides=[64], ratios=[0.5, 2.0], scales=[8])).eval()
    maps = [torch.zeros(1, 2, 20, 20, dtype=dtype)], [torch.zeros(1, 8, 20, 20, dtype=dtype)]
    sizes, cfg = torch.tensor([[1280, 1280]]), {**head.test_cfg, "nms": dict(type="nms", iou_threshold=1.0)}
    exact, _, _ = head.predict(*maps, Frame(sizes, (1280, 1280)), cfg)
    rounded, _, _ = head.to(dtype).predict(*maps, Frame(sizes, (1280, 1280)), cfg)
    torch.testing.assert_close(rounded, exact, rtol=0, atol=1e-3)


def test_nms_may_forget_the_levels_and_keep_fewer():
    head = RPNHead(16, 16).eval()
    spread(head)

    outs = head(features())

    def found(**nms):
        cfg = {**head.test_cfg, "nms": dict(type="nms", iou_threshold=0.7, **nms)}
        boxes, _, counts = head.predict(*outs, Frame(torch.tensor(SIZES), BATCH_SHAPE), cfg)
        return boxes[0, : counts[0]]

    def crowded(boxes):
        return (box_iou(boxes, boxes).fill_diagonal_(0) > 0.7).any().item()

    assert crowded(found()) and not crowded(found(class_agnostic=True))
    assert torch.equal(found(max_num=30), found()[:30])


def test_boxes_without_area_go_only_where_they_are_asked_to():
    head = one_level("mmdet")
    maps = [torch.zeros(1, 1, 2, 3)], [torch.zeros(1, 4, 2, 3)]
    outside = [maps[0], [maps[1][0] + torch.tensor([50.0, 0, 0, 0]).view(1, 4, 1, 1)]]  # clipped to the right border
    for least, kept in ((-1, 1), (0, 0)):
        cfg = {**head.test_cfg, "min_bbox_size": least}
        boxes, _, counts = head.predict(*outside, Frame(torch.tensor([[64, 96]]), (64, 96)), cfg)
        assert (counts[0] > 0) == kept and (boxes[0, : counts[0], 0] == 96).all()


def test_proposals_keep_to_their_limits():
    head = RPNHead(16, 16).eval()
    spread(head)
    cfg = {**head.test_cfg, "nms_pre": 50, "max_per_img": 20, "min_bbox_size": 12}
    boxes, scores, counts = head.predict(*head(features()), Frame(torch.tensor(SIZES), BATCH_SHAPE), cfg)
    assert boxes.shape == (2, 20, 4) and scores.shape == (2, 20) and counts.tolist() == [20, 20]
    assert (boxes[..., 2:] - boxes[..., :2]).min() > 12
    assert ((scores > 0) & (scores < 1)).all()


@pytest.mark.parametrize(
    "options, names",
    [
        (dict(num_classes=2), "num_classes"),
        (dict(loss_cls=dict(type="CrossEntropyLoss")), "loss_cls"),
        (dict(profile="yolo"), "profile"),
    ],
)
def test_bad_arguments_are_named(options, names):
    with pytest.raises(ValueError, match=names):
        RPNHead(4, 4, **options)


def test_unknown_nms_and_assigner_are_refused():
    for assigner in (dict(type="ATSSAssigner"), dict(pos_iou=0.7), dict(ignore_wrt_candidates=False)):
        with pytest.raises(ValueError, match="assigner"):
            RPNHead(4, 4, train_cfg=dict(assigner=assigner))
    for sampler in (dict(type="PseudoSampler"), dict(nums=3)):
        with pytest.raises(ValueError, match="sampler"):
            RPNHead(4, 4, train_cfg=dict(sampler=sampler))
    for nms in (dict(type="soft_nms"), dict(type="nms"), dict(iou_threshold=0.7, score_threshold=0.1), None):
        with pytest.raises(ValueError, match="rpn_head test_cfg nms"):
            RPNHead(4, 4, test_cfg=dict(nms=nms))
    with pytest.raises(ValueError, match="max_per_img"):
        RPNHead(4, 4, test_cfg=dict(max_per_img=-1))
    with pytest.raises(ValueError, match="clip_border"):
        RPNHead(4, 4, bbox_coder=dict(clip_border=False))


def test_a_folded_head_has_one_output_convolution(device):
    """The same maps, as views of one; the keys of a model that is not folded stay MMDetection's."""
    head = RPNHead(8, feat_channels=16).to(device).eval()
    with torch.no_grad():
        for conv in (head.rpn_cls, head.rpn_reg):
            conv.weight.normal_()
            conv.bias.normal_()
    feats = [torch.randn(2, 8, *size, device=device) for size in ((6, 8), (3, 4))]
    before, keys = head(feats), set(head.state_dict())
    assert {"rpn_cls.weight", "rpn_reg.bias"} <= keys and not any("both" in key for key in keys)
    after = fold_batch_norm(fold_batch_norm(head))(feats)
    assert {key.split(".")[0] for key in head.state_dict()} == {"rpn_conv", "rpn_both"}
    for a, b in zip([*before[0], *before[1]], [*after[0], *after[1]]):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    logits, deltas = after[0][0], after[1][0]
    assert deltas.data_ptr() - logits.data_ptr() == 3 * 4 and logits.stride(3) == deltas.stride(3) == 16
