"""models/dense_head.py: what RPN and RetinaNet share; RetinaNet's losses, worked by hand on six anchors; and what a
RetinaNet built with each profile holds."""

import math

import pytest
import torch

from fastrcnn.models import FPN, RetinaHead, RPNHead, retinanet
from fastrcnn.models.box_coder import DeltaXYWHBBoxCoder
from fastrcnn.models.dense_head import flat_levels
from fastrcnn.models.frame import Frame
from fastrcnn.models.losses import GIoULoss, SmoothL1Loss, box_loss
from fastrcnn.models.profiles import PROFILES
from fastrcnn.zoo.recipes import model_config

PROFILE_NAMES = ("mmdet", "torchvision", "detectron2")
SQUARES = dict(type="AnchorGenerator", strides=[32], ratios=[1.0], scales=[1])
SIZES = torch.tensor([[64, 96]])
MAPS = [torch.zeros(1, 2, 2, 3)]  # only its shape counts
LAST, FIRST = [48.0, 16.0, 80.0, 48.0], [-16.0, -16.0, 16.0, 16.0]
# An object 70 pixels wide: anchor 2 lies in it (IoU 32 / 70 = 0.457), anchor 1 sticks out by a pixel (31 / 71 = 0.437).
WIDE = torch.tensor([[17.0, -16.0, 87.0, 16.0]])


def squares(profile="mmdet", kind=RetinaHead, **options):
    """Squares of 32 pixels around (0, 0), (32, 0), (64, 0), (0, 32), (32, 32), (64, 32)."""
    options = dict(anchor_generator=SQUARES, profile=profile) | options
    return kind(2, 4, stacked_convs=0, **options) if kind is RetinaHead else kind(4, 4, **options)


def test_levels_are_flattened_in_the_order_of_the_anchors():
    maps = [torch.randn(2, 3 * 5, 4, 6), torch.randn(2, 3 * 5, 2, 3)]  # three anchors, five columns
    flat, row = flat_levels(maps, 5), 0
    for x in maps:
        for i in range(x.shape[2]):
            for j in range(x.shape[3]):
                for a in range(3):
                    assert torch.equal(flat[:, row], x[:, a * 5 : a * 5 + 5, i, j])
                    row += 1
    assert flat.shape == (2, row, 5)
    anchors = dict(SQUARES, strides=[16, 32], ratios=[0.5, 1.0, 2.0])
    head = RetinaHead(5, 4, anchor_generator=anchors)
    grid = torch.cat(head.anchors(maps, Frame(SIZES, (64, 96))))
    assert grid.shape == (row, 4)
    centre = (grid[:, :2] + grid[:, 2:]) / 2
    ratio = (grid[:, 3] - grid[:, 1]) / (grid[:, 2] - grid[:, 0])
    at = 6 * 3 * 2 + 3 * 4 + 2  # row 2, column 4, the third shape
    assert centre[at].tolist() == [64, 32] and ratio[at].item() == pytest.approx(2)
    assert torch.equal(flat[:, at], maps[0][:, 10:, 2, 4])


@pytest.mark.parametrize("profile", PROFILE_NAMES)
def test_anchors_between_the_thresholds_are_ignored(profile):
    anchors, matches, iou = squares(profile).assigned(MAPS, Frame(SIZES, (64, 96)), [dict(boxes=WIDE)])
    assert anchors.shape == (6, 4) and anchors[2].tolist() == [48, -16, 80, 16]
    torch.testing.assert_close(iou[0, :3], torch.tensor([0.0, 31 / 71, 32 / 70]))
    assert matches.tolist() == [[-1, -2, 0, -1, -1, -1]]  # anchor 2 is the best that there is


def test_thresholds_come_from_the_assigner():
    rules = dict(type="MaxIoUAssigner", pos_iou_thr=0.43, neg_iou_thr=0.43, match_low_quality=False)
    head = squares(train_cfg=dict(assigner=rules))
    assert head.assigned(MAPS, Frame(SIZES, (64, 96)), [dict(boxes=WIDE)])[1].tolist() == [[-1, 0, 0, -1, -1, -1]]
    head = squares(train_cfg=dict(assigner=dict(rules, pos_iou_thr=0.9)))
    assert (head.assigned(MAPS, Frame(SIZES, (64, 96)), [dict(boxes=WIDE)])[1] < 0).all()


@pytest.mark.parametrize("kind", [RetinaHead, RPNHead])
def test_anchors_in_another_images_padding_are_left_out_in_mmdetection_only(kind):
    sizes = torch.tensor([[64, 96], [64, 32]])  # the second image fills the first column of cells
    best_outside = torch.tensor([[12.0, -16.0, 36.0, 16.0]])  # IoU 20 / 36 with anchor 1, 4 / 52 with anchor 0
    targets = [dict(boxes=torch.zeros(0, 4)), dict(boxes=best_outside)]
    for profile in PROFILE_NAMES:
        matches = squares(profile, kind).assigned([torch.zeros(2, 2, 2, 3)], Frame(sizes, (64, 96)), targets)[1]
        assert matches[0].tolist() == [-1] * 6
        # An RPN asks for an IoU of 0.3 of the best anchor, too.
        inside = [0 if kind is RetinaHead else -1, -2, -2, -1, -2, -2]
        assert matches[1].tolist() == (inside if profile == "mmdet" else [-1, 0, -1, -1, -1, -1])


def test_an_allowed_border_leaves_out_the_anchors_that_cross_it():
    for border, used in ((-1, 6), (0, 2), (17, 6)):  # two anchors lie in the picture wholly
        head = squares(train_cfg=dict(allowed_border=border))
        matches = head.assigned(MAPS, Frame(SIZES, (64, 96)), [dict(boxes=torch.zeros(0, 4))])[1]
        assert int((matches == -1).sum()) == used and int((matches == -2).sum()) == 6 - used


def test_ignore_regions_take_anchors_out_where_asked():
    target = dict(
        boxes=torch.tensor([[48.0, 16.0, 80.0, 48.0]]), ignore_boxes=torch.tensor([[-16.0, -16.0, 40.0, 16.0]])
    )
    for threshold, expected in ((-1, [-1, -1]), (0.5, [-2, -2]), (0.8, [-2, -1])):  # covers 1 and 3/4 of two anchors
        rules = dict(type="MaxIoUAssigner", pos_iou_thr=0.5, neg_iou_thr=0.4, ignore_iof_thr=threshold)
        head = squares(train_cfg=dict(assigner=rules))
        assert head.assigned(MAPS, Frame(SIZES, (64, 96)), [target])[1].tolist() == [[*expected, -1, -1, -1, 0]]


def test_boxes_are_compared_as_deltas_or_decoded():
    anchors = torch.tensor([[0.0, 0.0, 20.0, 10.0], [30.0, 30.0, 50.0, 70.0]])
    boxes = torch.tensor([[4.0, 0.0, 24.0, 10.0], [30.0, 30.0, 50.0, 70.0]])  # moved by a fifth of a width; the same
    deltas = torch.zeros(2, 4, requires_grad=True)
    assert box_loss(squares(loss_bbox=dict(type="L1Loss")), deltas, anchors, boxes, 2).item() == pytest.approx(0.2 / 2)
    decoded = squares(loss_bbox=dict(type="GIoULoss", loss_weight=3.0), reg_decoded_bbox=True)
    loss = box_loss(decoded, deltas, anchors, boxes, 2)
    # IoU 16 / 24, and no room between the union and the hull.
    assert loss.item() == pytest.approx(3 * (1 - 16 / 24) / 2, rel=1e-5)
    loss.backward()
    assert deltas.grad[0, 0] < 0 and deltas.grad.isfinite().all()
    exact = DeltaXYWHBBoxCoder().encode(anchors, boxes)
    assert box_loss(decoded, exact, anchors, boxes, 2).item() == pytest.approx(0, abs=1e-6)


def test_settings_may_be_modules():
    loss, coder = GIoULoss(), DeltaXYWHBBoxCoder(target_stds=(0.1, 0.1, 0.2, 0.2))
    head = squares(loss_bbox=loss, bbox_coder=coder)
    assert head.loss_bbox is loss and head.bbox_coder is coder
    assert type(squares().loss_bbox) is SmoothL1Loss


def test_a_profile_decides_rounding_and_the_lower_clip():
    halves = dict(SQUARES, scales=[0.7])  # 22.4 pixels
    head = squares(anchor_generator=halves)
    expected = {"mmdet": 11.2, "torchvision": 11.0, "detectron2": 11.2}
    for profile in (*PROFILE_NAMES, "mmdet"):
        head.set_profile(profile)
        half = expected[profile]
        (base,) = head.base_anchors(torch.device("cpu"))
        torch.testing.assert_close(base, torch.tensor([[-half, -half, half, half]]))
        assert head.bbox_coder.symmetric_clip == (profile == "mmdet")
        (grid,) = head.anchors(MAPS, Frame(SIZES, (64, 96)))
        torch.testing.assert_close(grid[4], torch.tensor([32 - half, 32 - half, 32 + half, 32 + half]))


def test_torchvision_derives_the_strides_from_the_padded_size():
    maps = [torch.zeros(1, 2, 2, 3)]
    for profile, step in (("mmdet", [32, 32]), ("torchvision", [40, 45]), ("detectron2", [32, 32])):
        head = squares(profile)
        (grid,) = head.anchors(maps, Frame(SIZES, (90, 120)))
        assert (grid[4, :2] - grid[0, :2]).tolist() == step


def maps_of(batch=1, seed=3):
    """(logits, deltas), both with a gradient."""
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, c, 2, 3, generator=g).requires_grad_() for c in (2, 4)]


def truth(*boxes, labels=()):
    return dict(boxes=torch.tensor(boxes).reshape(-1, 4), labels=torch.tensor(labels, dtype=torch.int64))


def focal(logit: float, positive: bool) -> float:
    p = 1 / (1 + math.exp(-logit))
    return -0.25 * (1 - p) ** 2 * math.log(p) if positive else -0.75 * p**2 * math.log(1 - p)


def focal_sum(logits, positives) -> float:
    """positives: (class, row, column) of the logits [2, 2, 3] whose class is there; the others count as background."""
    where = [(c, y, x) for c in range(2) for y in range(2) for x in range(3)]
    return sum(focal(logits[at].item(), at in positives) for at in where)


def box_element(d: float, profile: str) -> float:
    d = abs(d)
    return d if profile != "detectron2" else (d - 0.05 if d > 0.1 else 0.5 * d * d / 0.1)


def with_losses(profile):
    return squares(profile, loss_bbox=PROFILES[profile].dense_loss_bbox)


@pytest.mark.parametrize("profile, divisor", [("mmdet", 1), ("torchvision", 1), ("detectron2", 0.9 * 100 + 0.1)])
def test_losses_by_hand_with_one_positive(profile, divisor):
    logits, deltas = maps_of()
    cls, box = with_losses(profile).loss([logits], [deltas], Frame(SIZES, (64, 96)), [truth(LAST, labels=[1])])
    assert cls.item() == pytest.approx(focal_sum(logits[0], {(1, 1, 2)}) / divisor, rel=1e-5)
    moved = sum(box_element(d, profile) for d in deltas[0, :, 1, 2].tolist())
    assert box.item() == pytest.approx(moved / divisor, rel=1e-5)
    (cls + box).backward()
    assert logits.grad.abs().min() > 0 and int((deltas.grad != 0).sum()) == 4


@pytest.mark.parametrize("profile", PROFILE_NAMES)
def test_divisors_of_a_batch(profile):
    # Two objects in the first image, none in the second, which mmdet counts as one positive.
    logits, deltas = maps_of(2)
    targets = [truth(FIRST, LAST, labels=[0, 1]), truth()]
    cls, box = with_losses(profile).loss([logits], [deltas], Frame(SIZES.expand(2, 2), (64, 96)), targets)
    sums = focal_sum(logits[0], {(0, 0, 0), (1, 1, 2)}), focal_sum(logits[1], set())
    moved = sum(box_element(d, profile) for at in ((0, 0), (1, 2)) for d in deltas[0, :, at[0], at[1]].tolist())
    if profile == "torchvision":  # each image by its own positives, then their mean
        expected = (sums[0] / 2 + sums[1]) / 2, moved / 2 / 2
    else:
        divisor = 3 if profile == "mmdet" else 0.9 * 100 + 0.1 * 2
        expected = sum(sums) / divisor, moved / divisor
    assert (cls.item(), box.item()) == pytest.approx(expected, rel=1e-5)


def test_detectron2s_divisor_runs_from_a_hundred():
    head, normalizer = with_losses("detectron2"), 100.0
    logits, deltas = maps_of()
    for target, count in ((truth(FIRST, LAST, labels=[0, 1]), 2), (truth(), 1), (truth(LAST, labels=[0]), 1)):
        where = {0: set(), 1: {(0, 1, 2)}, 2: {(0, 0, 0), (1, 1, 2)}}[len(target["boxes"])]
        normalizer = 0.9 * normalizer + 0.1 * count
        cls, _ = head.loss([logits], [deltas], Frame(SIZES, (64, 96)), [target])
        assert cls.item() == pytest.approx(focal_sum(logits[0], where) / normalizer, rel=1e-5)
        assert head.loss_normalizer == pytest.approx(normalizer)
    assert normalizer == pytest.approx(73.252)


@pytest.mark.parametrize("profile", PROFILE_NAMES)
def test_anchors_between_the_thresholds_have_no_loss(profile):
    # Anchor 2 is the best (32 / 70), anchor 1 lies between 0.4 and 0.5 (31 / 71).
    logits, deltas = maps_of()
    cls, box = with_losses(profile).loss(
        [logits], [deltas], Frame(SIZES, (64, 96)), [dict(truth(labels=[0]), boxes=WIDE)]
    )
    (cls + box).backward()
    assert (logits.grad[0] != 0).any(0).tolist() == [[True, False, True], [True, True, True]]
    assert (deltas.grad[0] != 0).any(0).tolist() == [[False, False, True], [False, False, False]]
    assert logits.grad[0, 0, 0, 2] < 0 < logits.grad[0, 1, 0, 2]


def test_pos_weight_weighs_the_positives_in_every_class():
    logits, deltas = maps_of()
    losses = {}
    for weight in (-1, 0, 1, 3):
        head = squares(train_cfg=dict(pos_weight=weight))
        losses[weight] = head.loss([logits], [deltas], Frame(SIZES, (64, 96)), [truth(LAST, labels=[1])])
    positive = focal(logits[0, 0, 1, 2].item(), False) + focal(logits[0, 1, 1, 2].item(), True)
    assert losses[-1] == losses[0] == losses[1]
    assert (losses[3][0] - losses[1][0]).item() == pytest.approx(2 * positive, rel=1e-4)
    assert losses[3][1] == losses[1][1]


@pytest.mark.parametrize("kind", [RetinaHead, RPNHead])
@pytest.mark.parametrize(
    "options, message",
    [
        (dict(profile="yolo"), "profile"),
        (dict(anchor_generator=dict(type="YOLOAnchorGenerator")), "anchor_generator.*YOLOAnchorGenerator"),
        (dict(bbox_coder=dict(type="TBLRBBoxCoder")), "bbox_coder.*TBLRBBoxCoder"),
        (dict(loss_bbox=dict(type="Huber")), "loss.*Huber"),
        (dict(train_cfg=dict(assinger=None)), "train_cfg.*assinger"),
        (dict(test_cfg=dict(nms_post=10)), "test_cfg.*nms_post"),
    ],
)
def test_bad_arguments_are_named(kind, options, message):
    with pytest.raises(ValueError, match=message):
        squares(**{"kind": kind, **options})


# --- a named RetinaNet: built with a profile, and one that takes the profile over


def named(profile, start=None, **head):
    """With one class; `start`: the profile that it is built with first."""
    model = retinanet(
        "retinanet_r18_fpn", 1, start or profile, backbone=dict(base_channels=4),
        neck=dict(in_channels=[4, 8, 16, 32], out_channels=4),
        bbox_head=dict(in_channels=4, feat_channels=4, stacked_convs=1, **head),
        test_cfg=dict(nms=dict(type="nms", iou_threshold=1.0)),
    )  # fmt: skip
    if start is not None:
        model.set_profile(profile)
    return model


BUILT = [(profile, None) for profile in PROFILE_NAMES]
TAKEN_OVER = [(end, start) for end in PROFILE_NAMES for start in PROFILE_NAMES if start != end]


@pytest.mark.parametrize("profile, start", BUILT + TAKEN_OVER)
def test_anchors_of_three_sizes_an_octave(profile, start):
    # Half widths at stride 8: of sizes 32 to 51 and ratios 1/2, 1, 2.
    wide, octave = (math.sqrt(2), 1, math.sqrt(0.5)), [2 ** (i / 3) for i in range(3)]
    half_widths = {
        "mmdet": [16 * w * size for w in wide for size in octave],
        "torchvision": [23, 28, 35, 16, 20, 25, 11, 14, 18],  # of 32, 40 and 50 pixels, rounded again
        "detectron2": [16 * w * size for size in octave for w in wide],
    }
    base = named(profile, start).bbox_head.base_anchors(torch.device("cpu"))
    assert base[0][:, 2].tolist() == pytest.approx(half_widths[profile])
    assert base[0][:, 0].tolist() == pytest.approx([-w for w in half_widths[profile]])
    assert [len(level) for level in base] == [9] * 5
    assert base[4][0, 2].item() == pytest.approx(362 if profile == "torchvision" else 256 * math.sqrt(2))


@pytest.mark.parametrize("profile, p6, p7", [("mmdet", -1, -1), ("torchvision", -6, 0), ("detectron2", -1, 0)])
def test_where_p6_and_p7_come_from(profile, p6, p7):
    # C5 is 1 everywhere; a lateral doubles it, an output convolution triples that; P6 negates its source, P7 keeps it.
    cfg = model_config("retinanet_r18_fpn", 1, profile)["neck"]
    fpn = FPN(**{k: v for k, v in cfg.items() if k != "type"} | dict(in_channels=[1] * 4, out_channels=1))
    with torch.no_grad():
        for conv in (*fpn.lateral_convs, *fpn.fpn_convs):
            conv.conv.weight.zero_()
        for conv in fpn.lateral_convs:
            conv.conv.weight.fill_(2)
        for conv, centre in zip(fpn.fpn_convs, (3, 3, 3, -1, 1)):
            conv.conv.weight[0, 0, 1, 1] = centre
        outs = fpn([*(torch.zeros(1, 1, size, size) for size in (16, 8, 4)), torch.ones(1, 1, 2, 2)])
    assert len(outs) == 5 and outs[2].tolist() == [[[[6, 6], [6, 6]]]]
    assert (outs[3].item(), outs[4].item()) == (p6, p7)


@pytest.mark.parametrize("profile, start", BUILT + TAKEN_OVER)
def test_the_relu_before_p7_is_taken_over(profile, start):
    assert named(profile, start).neck.relu_before_extra_convs == (profile != "mmdet")


@pytest.mark.parametrize("profile, start", BUILT + TAKEN_OVER)
def test_how_many_detections_are_kept(profile, start):
    head, sides = named(profile, start).bbox_head, (8, 4, 2, 1, 1)
    maps = [[torch.zeros(1, n * 9, side, side) for side in sides] for n in (1, 4)]  # 774 anchors of score 1/2
    found, _ = head.predict(*maps, Frame(torch.tensor([[64, 64]]), (64, 64)))
    assert found.counts.tolist() == [found.boxes.shape[1]] == [300 if profile == "torchvision" else 100]


@pytest.mark.parametrize("profile, start", BUILT + TAKEN_OVER)
def test_box_losses_and_their_divisor_by_hand(profile, start):
    head = named(profile, start, anchor_generator=dict(SQUARES, _delete_=True)).bbox_head
    if start is not None:  # which has brought the profile's own anchors
        head.anchor_generator = squares().anchor_generator
    deltas = torch.zeros(1, 4, 2, 3)
    deltas[0, :2, 1, 2] = torch.tensor([0.5, 0.05])
    _, box = head.loss([torch.zeros(1, 1, 2, 3)], [deltas], Frame(SIZES, (64, 96)), [truth(LAST, labels=[0])])
    # Detectron2 has a smooth L1 of beta 0.1, and counts the one positive after a hundred.
    smooth = (0.5 - 0.1 / 2) + 0.5 * 0.05**2 / 0.1
    assert box.item() == pytest.approx(smooth / 90.1 if profile == "detectron2" else 0.55)


def test_each_loss_has_its_peers_name():
    names = dict(mmdet=("loss_cls", "loss_bbox"), torchvision=("classification", "bbox_regression"),
                 detectron2=("loss_cls", "loss_box_reg"))  # fmt: skip
    for profile, (cls, box) in names.items():
        losses = named(profile).loss(torch.zeros(1, 3, 64, 64), [(64, 64)], [truth()])
        assert {name: value.item() > 0 for name, value in losses.items()} == {cls: True, box: False}
