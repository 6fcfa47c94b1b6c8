"""One golden for each item in which the three peers differ, although the weights are the same.

 1 colour and statistics     test_preprocess.py::test_one_colour_in_each_peers_network
 2 size and resizing         test_preprocess.py::test_sizes
                             test_preprocess.py::test_one_picture_made_smaller_by_each_peer
 3 stride of a bottleneck    test_resnet.py::test_style_places_the_stride
                             test_profiles.py::test_the_stride_of_a_bottleneck
 4 norms                     test_profiles.py::test_norms_are_trained_in_mmdetection_only
                             test_resnet.py::test_norm_eval_leaves_the_affine_parameters_trainable
 5 frozen stages             test_resnet.py::test_frozen_stages_do_not_train
                             test_profiles.py::test_norms_are_trained_in_mmdetection_only
 6 upsampling in the FPN     test_fpn.py::test_upsampling_by_a_factor_and_by_another_mode
                             test_fpn.py::test_equals_torchvision
 7 fresh weights of the FPN  test_profiles.py::test_a_fresh_neck
 8 anchors                   test_profiles.py::test_what_a_model_built_with_each_profile_holds
                             test_profiles.py::test_the_last_cell_of_an_odd_map
 9 low-quality floor         test_rpn_head.py::test_an_object_that_overlaps_no_anchor
10 low-quality target        test_rpn_head.py::test_ties_go_to_the_last_object_in_mmdetection_and_to_the_best_elsewhere
11 RPN's box loss            test_rpn_head.py::test_losses_by_hand_with_one_positive
12 RPN's ranking             test_profiles.py::test_mmdetection_picks_by_the_sigmoid_and_the_others_by_the_logit
                             test_profiles.py::test_detectron2_suppresses_by_the_logit
13 proposals in training     test_profiles.py::test_what_a_model_built_with_each_profile_holds
14 clamp of dw and dh        test_box_coder.py::test_the_clamp_is_symmetric_for_mmdetection_only
                             test_profiles.py::test_a_proposal_shrinks_without_end_but_in_mmdetection
15 RoIAlign                  test_profiles.py::test_the_samples_of_a_bin
16 level of a RoI            test_profiles.py::test_the_level_of_a_roi_just_below_a_boundary
                             test_roi_align.py::test_levels_at_the_boundaries
17 truth among proposals     test_roi_head.py::test_ground_truth_joins_the_proposals
                             test_roi_head.py::test_twin_objects_keep_their_own_labels_in_mmdetection_only
18 background class          test_roi_head.py::test_detections_by_hand
                             test_roi_head.py::test_detections_equal_torchvision
                             test_profiles.py::test_the_first_label_is_one_in_torchvision_only
19 weights of the deltas     test_profiles.py::test_what_a_model_built_with_each_profile_holds
20 second stage's box loss   test_roi_head.py::test_losses_by_hand
21 back to the original      test_profiles.py::test_small_proposals_are_measured_in_the_original_in_mmdetection_only
                             test_profiles.py::test_detections_enter_nms_at_the_original_size_in_mmdetection_only
                             test_roi_head.py::test_nms_runs_at_the_original_size_in_mmdetection_only
22 small boxes               test_profiles.py::test_the_least_proposal
                             test_profiles.py::test_the_least_detection
                             test_roi_head.py::test_a_flat_detection
23 padding                   test_preprocess.py::test_padding_is_zero_and_follows_normalisation

What RetinaNet adds is in test_dense_head.py and test_retinanet.py.
"""

import math
import re
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest
import torch
from conftest import tiny_options
from torch import nn
from torchvision.models.detection import fasterrcnn_resnet50_fpn

from fastrcnn.models import RPNHead, StandardRoIHead, faster_rcnn
from fastrcnn.models.frame import Frame
from fastrcnn.models.matching import assign, check_assigner
from fastrcnn.models.padded import Padded
from fastrcnn.models.post_process import finish
from fastrcnn.models.profiles import PROFILES, get_profile
from fastrcnn.zoo.recipes import model_config

NAMES = ("mmdet", "torchvision", "detectron2")
SMALL = tiny_options()


def test_every_item_is_named_and_has_its_tests():
    table = re.split(r"^ ?(\d+) ", __doc__, flags=re.MULTILINE)[1:]
    assert [int(number) for number in table[::2]] == list(range(1, 24))
    for number, entry in zip(table[::2], table[1::2]):
        tests = re.findall(r"(test_\w+\.py)::(test_\w+)", entry)
        assert tests, number
        for file, name in tests:
            assert f"\ndef {name}(" in (Path(__file__).parent / file).read_text(), (number, file, name)


def test_torchvisions_constants_are_its_own():
    theirs, p = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None), PROFILES["torchvision"]
    pool, heads = theirs.roi_heads.box_roi_pool, theirs.roi_heads
    assert (list(p.mean), list(p.std)) == (theirs.transform.image_mean, theirs.transform.image_std)
    assert p.rpn_post_nms_train == theirs.rpn.post_nms_top_n() == 2000
    assert p.sampling_ratio == pool.sampling_ratio and p.min_box_size == 1e-2
    assert heads.box_coder.weights == tuple(1 / s for s in (0.1, 0.1, 0.2, 0.2))


def test_torchvisions_least_proposal_is_a_thousandth_of_a_pixel():
    least = torch.tensor(1e-3)  # torchvision keeps sizes >= this in float32; ours keeps sizes > rpn_min_size
    limit = PROFILES["torchvision"].rpn_min_size
    assert least > limit
    assert not torch.nextafter(least, torch.tensor(0.0)) > torch.tensor(limit)
    assert PROFILES["mmdet"].rpn_min_size < 0 and PROFILES["detectron2"].rpn_min_size == 0


def test_an_unknown_profile_is_refused_and_the_known_ones_are_constant():
    with pytest.raises(ValueError, match=r"profile.*mmdet.*torchvision.*detectron2.*caffe2"):
        get_profile("caffe2")
    with pytest.raises(FrozenInstanceError):
        get_profile("mmdet").aligned = False


def state_of(model) -> dict:
    """All that a profile decides in a built model."""
    roi, rpn = model.roi_head, model.rpn_head
    return dict(
        backbone=(model.backbone.style, [p.requires_grad for p in model.backbone.parameters()]),
        profiles=(model.profile, rpn.profile, roi.profile, model.data_preprocessor.profile),
        extractor=(roi.bbox_roi_extractor.sampling_ratio, roi.bbox_roi_extractor.aligned),
        extractor_profile=roi.bbox_roi_extractor.profile,
        clip=(rpn.bbox_coder.symmetric_clip, roi.bbox_head.bbox_coder.symmetric_clip),
        losses=[(type(m).__name__, getattr(m, "beta", None)) for m in (rpn.loss_bbox, roi.bbox_head.loss_bbox)],
        assigner=rpn.train_cfg["assigner"]["min_pos_iou"],
        proposals=(model.rpn_proposal["nms_pre"], model.rpn_proposal["max_per_img"]),
        stds=(rpn.bbox_coder.stds, roi.bbox_head.bbox_coder.stds),
        statistics=(model.data_preprocessor.mean, model.data_preprocessor.std),
        anchors=[a.tolist() for a in rpn.base_anchors(torch.device("cpu"))],
    )


@pytest.mark.parametrize("start", NAMES)
@pytest.mark.parametrize("end", NAMES)
def test_set_profile_is_the_same_as_building_with_it(start, end):
    model, expected = (faster_rcnn("r18_fpn", 3, profile, **SMALL) for profile in (start, end))
    model.set_profile(end)
    assert state_of(model) == state_of(expected)


def test_what_a_model_built_with_each_profile_holds():
    states = [state_of(faster_rcnn("r18_fpn", 3, profile, **SMALL)) for profile in NAMES]
    assert [s["extractor"] for s in states] == [(0, True), (2, False), (0, True)]
    assert [s["clip"] for s in states] == [(True, True), (False, False), (False, False)]
    smooth = [("SmoothL1Loss", 1 / 9)] * 2
    assert [s["losses"] for s in states] == [[("L1Loss", None)] * 2, smooth, [("L1Loss", None)] * 2]
    assert [s["assigner"] for s in states] == [0.3, 0, 0]
    assert [s["stds"] for s in states] == [((1, 1, 1, 1), (0.1, 0.1, 0.2, 0.2))] * 3
    assert [s["proposals"] for s in states] == [(2000, 1000), (2000, 2000), (2000, 1000)]
    root = 16 * math.sqrt(2)
    assert states[0]["anchors"][0][0] == pytest.approx([-root, -root / 2, root, root / 2])
    assert states[1]["anchors"][0][0] == [-23, -11, 23, 11]
    assert states[2]["anchors"] == states[0]["anchors"]


def losses_without_objects(model) -> dict[str, bool]:
    """Name of each loss -> whether it is above 0: the box losses are not where there is no object."""
    nothing = dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64))
    losses = model.loss(torch.zeros(1, 3, 64, 64), [(64, 64)], [nothing])
    return {name: value.item() > 0 for name, value in losses.items()}


def test_each_loss_has_its_peers_name():
    mmdet, torchvision, detectron2 = (losses_without_objects(faster_rcnn("r18_fpn", 3, p, **SMALL)) for p in NAMES)
    assert mmdet == dict(loss_rpn_cls=True, loss_rpn_bbox=False, loss_cls=True, loss_bbox=False)
    assert torchvision == dict(loss_objectness=True, loss_rpn_box_reg=False, loss_classifier=True, loss_box_reg=False)
    assert detectron2 == dict(loss_rpn_cls=True, loss_rpn_loc=False, loss_cls=True, loss_box_reg=False)


# --- backbone and neck


def bottlenecks(name: str, profile: str):
    with torch.device("meta"):
        return faster_rcnn(name, 3, profile)


def stride_of_the_first(model) -> tuple[int, int]:
    """Of the second stage's first 1x1 and of its 3x3 convolution."""
    block = model.backbone.layer2[0]
    return block.conv1.stride[0], block.conv2.stride[0]


def test_the_stride_of_a_bottleneck():
    on_1x1, on_3x3 = (2, 1), (1, 2)
    for profile, expected in zip(NAMES, (on_3x3, on_3x3, on_1x1)):
        assert stride_of_the_first(bottlenecks("r50_fpn", profile)) == expected
        assert stride_of_the_first(bottlenecks("x50_32x4d_fpn", profile)) == on_3x3
        for start in NAMES:
            model = bottlenecks("r50_fpn", start)
            model.set_profile(profile)
            assert stride_of_the_first(model) == expected
    # Without a pyramid MMDetection starts from Caffe's weights, too.
    for profile, expected in zip(NAMES, (on_1x1, on_3x3, on_1x1)):
        model = bottlenecks("r50_c4", "mmdet")
        assert stride_of_the_first(model) == on_1x1
        model.set_profile(profile)
        assert stride_of_the_first(model) == expected


def trained_norms(model) -> list[bool]:
    """Of the stem and of each stage: whether the scale of its first norm is trained."""
    b = model.backbone
    return [b.bn1.weight.requires_grad, *(getattr(b, f"layer{i}")[0].bn1.weight.requires_grad for i in (1, 2, 3, 4))]


def test_norms_are_trained_in_mmdetection_only():
    for profile in NAMES:
        model, fixed = bottlenecks("r50_fpn", profile), [False] * 5
        expected = [False, False, True, True, True] if profile == "mmdet" else fixed  # the first stages are frozen
        assert trained_norms(model) == expected
        weights = [model.backbone.conv1, *(getattr(model.backbone, f"layer{i}")[0].conv1 for i in (1, 2, 3, 4))]
        assert [w.weight.requires_grad for w in weights] == [False, False, True, True, True]
        assert not any(m.training for m in model.train().backbone.modules() if isinstance(m, nn.BatchNorm2d))
        for start in NAMES:
            model = bottlenecks("r50_fpn", start)
            model.set_profile(profile)
            assert trained_norms(model) == expected


def test_a_fresh_neck():
    # A 1x1 convolution of 64 to 16 channels: uniform within sqrt(6 / (64 + 16)), or within sqrt(3 / 64).
    for profile, bound in zip(NAMES, (0.2739, 0.2165, 0.2165)):
        neck = faster_rcnn("r18_fpn", 3, profile, **SMALL).neck
        assert 0.93 * bound < neck.lateral_convs[3].conv.weight.abs().max().item() <= bound + 1e-4


# --- first stage: one square anchor a cell, around (0, 0), of 32 pixels on the first level


def propose(profile, logits, shape, deltas=None, strides=(32,), scale=1.0, factors=None, **cfg):
    """(boxes, scores) of an image of `shape` (height, width). logits: rows of each level; deltas [4, H, W] of one."""
    anchors = dict(type="AnchorGenerator", strides=strides, ratios=[1.0], scales=[scale])
    head = RPNHead(4, 4, anchor_generator=anchors, test_cfg=cfg, profile=profile)
    logits = [torch.tensor(rows)[None, None] for rows in logits]
    moves = [torch.zeros(1, 4, *x.shape[2:]) for x in logits] if deltas is None else [deltas[None]]
    boxes, scores, counts = head.predict(logits, moves, Frame(torch.tensor([shape]), shape, factors), head.test_cfg)
    return boxes[0, : counts[0]].tolist(), scores[0, : counts[0]].tolist()


@pytest.mark.parametrize("profile", NAMES)
def test_mmdetection_picks_by_the_sigmoid_and_the_others_by_the_logit(profile):
    # Both sigmoids are 1 in float32: MMDetection takes the first anchor, the others the one with the larger logit.
    boxes, _ = propose(profile, [[[40.0, 50.0]]], (32, 64), nms_pre=1)
    assert boxes == ([[0, 0, 16, 16]] if profile == "mmdet" else [[16, 0, 48, 16]])


@pytest.mark.parametrize("profile", NAMES)
def test_detectron2_suppresses_by_the_logit(profile):
    # Level 0 says 40, level 1 says 50. As sigmoids they are equal, and the first level comes first.
    boxes, scores = propose(profile, [[[40.0]], [[50.0]]], (64, 64), strides=(32, 64))
    fine, coarse = [0, 0, 16, 16], [0, 0, 32, 32]
    if profile == "detectron2":
        assert (boxes, scores) == ([coarse, fine], [50, 40])
    else:
        assert (boxes, scores) == ([fine, coarse], [1, 1])


@pytest.mark.parametrize("profile", NAMES)
def test_the_last_cell_of_an_odd_map(profile):
    # 160 pixels at stride 64 are three cells. torchvision steps by 160 // 3 = 53 pixels, the others by 64.
    logits = [[[-5.0] * 3, [-5.0] * 3, [-5.0, -5.0, 5.0]]]
    boxes, _ = propose(profile, logits, (160, 160), strides=(64,), scale=0.5, nms_pre=1)
    centre = 106 if profile == "torchvision" else 128
    assert boxes == [[centre - 16, centre - 16, centre + 16, centre + 16]]
    head = RPNHead(4, 4, anchor_generator=dict(strides=[64], ratios=[1.0], scales=[0.5]), profile=profile)
    (grid,) = head.anchors([torch.tensor(logits)[None]], Frame(None, (160, 160)))
    assert grid[-1].tolist() == boxes[0]


@pytest.mark.parametrize("profile", NAMES)
def test_a_proposal_shrinks_without_end_but_in_mmdetection(profile):
    # dw = -8 around (16, 0): 32 * e^-8 wide, or 32 * 16 / 1000.
    deltas = torch.tensor([0.5, 0, -8, 0]).reshape(4, 1, 1)
    (box,), _ = propose(profile, [[[1.0]]], (32, 32), deltas, min_bbox_size=0)
    width = 0.512 if profile == "mmdet" else 32 * math.exp(-8)
    assert box[2] - box[0] == pytest.approx(width, abs=1e-5)


@pytest.mark.parametrize("profile, tops", [("mmdet", [0, 16, 48]), ("torchvision", [48]), ("detectron2", [16, 48])])
def test_the_least_proposal(profile, tops):
    # One above the other, cut by the left border to widths of 0, of half a thousandth and of 16 pixels.
    deltas = torch.zeros(4, 3, 1)
    deltas[0, :, 0] = torch.tensor([-0.5, -0.5 + 0.0005 / 32, 0.0])
    boxes, _ = propose(profile, [[[3.0], [2.0], [1.0]]], (96, 32), deltas, min_bbox_size=-1)
    assert [box[1] for box in boxes] == tops
    boxes, _ = propose(profile, [[[3.0], [2.0], [1.0]]], (96, 32), deltas, min_bbox_size=0)
    assert [box[1] for box in boxes] == [top for top in tops if top > 0]


@pytest.mark.parametrize("profile", NAMES)
def test_small_proposals_are_measured_in_the_original_in_mmdetection_only(profile):
    half = torch.tensor([[0.5, 0.5]])  # 16 pixels of the network's image are 32 of the original's
    for least, kept in ((10, True), (20, profile == "mmdet"), (40, False)):
        boxes, _ = propose(profile, [[[1.0]]], (32, 32), factors=half, min_bbox_size=least)
        assert boxes == ([[0, 0, 32, 32]] if kept else [])


@pytest.mark.parametrize("profile", NAMES)
def test_the_overlap_of_boxes_almost_without_area(profile):
    # Twice the same box of area 1e-8: MMDetection counts a union of at least 1e-6.
    box, rules = torch.tensor([[0.0, 0.0, 1e-4, 1e-4]]), dict(type="MaxIoUAssigner", match_low_quality=False)
    matches, iou = assign(box, [dict(boxes=box)], check_assigner(rules), get_profile(profile))
    assert iou.item() == pytest.approx(0.01 if profile == "mmdet" else 1.0)
    assert matches.item() == (-1 if profile == "mmdet" else 0)


# --- second stage


@pytest.mark.parametrize("profile", NAMES)
def test_the_samples_of_a_bin(profile):
    # A map of stride 4 that is 1 in column 10 and 0 elsewhere; RoIs of 28 pixels, whose bins are one cell wide. From
    # x = 40 the first bin is 9.5..10.5 and its one sample at 10; torchvision has it at 10..11 and samples 10.25 and 10.75.
    # From x = 38 it is 9..10 with a sample at 9.5, or 9.5..10.5 with samples at 9.75 and 10.25.
    extractor = faster_rcnn("r18_fpn", 3, profile, **SMALL).roi_head.bbox_roi_extractor
    feats = [torch.zeros(1, 1, 128 // s, 128 // s) for s in (4, 8, 16, 32)]
    feats[0][..., 10] = 1
    rois = torch.tensor([[0, 40.0, 40, 68, 68], [0, 38.0, 40, 66, 68]])
    first = extractor(feats, rois)[:, 0, 3, 0].tolist()
    assert first == pytest.approx([0.5, 0.75] if profile == "torchvision" else [1, 0.5])


@pytest.mark.parametrize("profile, levels", [("mmdet", [1, 1]), ("torchvision", [1, 2]), ("detectron2", [0, 1])])
def test_the_level_of_a_roi_just_below_a_boundary(profile, levels):
    # Squares 4e-7 smaller than 112 and 224 pixels: each peer adds its own epsilon, before or after the logarithm.
    extractor = faster_rcnn("r18_fpn", 3, profile, **SMALL).roi_head.bbox_roi_extractor
    feats = [torch.full((1, 1, 256 // s, 256 // s), float(i)).double() for i, s in enumerate((4, 8, 16, 32))]
    sides = [side * (1 - 4e-7) for side in (112, 224)]
    rois = torch.tensor([[0, 0, 0, side, side] for side in sides], dtype=torch.float64)
    assert extractor(feats, rois)[:, 0, 3, 3].tolist() == pytest.approx(levels)


def detect(profile, boxes) -> dict:
    """What a second stage finds that is sure of its only class and moves nothing, in an image of 64 x 64 pixels."""
    cfg = model_config("r18_fpn", 1, profile)["roi_head"]
    head = StandardRoIHead(
        {**cfg["bbox_roi_extractor"], "out_channels": 4},
        {**cfg["bbox_head"], "in_channels": 4, "fc_out_channels": 4},
        profile=profile,
    ).eval()
    for layer in (head.bbox_head.fc_cls, head.bbox_head.fc_reg):
        nn.init.zeros_(layer.weight)
    nn.init.constant_(head.bbox_head.fc_cls.bias[:1], 3.0)
    feats = [torch.zeros(1, 4, 64 // s, 64 // s) for s in (4, 8, 16, 32)]
    frame = Frame(torch.tensor([[64, 64]]), (64, 64))
    with torch.no_grad():
        return Padded.lists(*head.predict(feats, torch.tensor([boxes]), torch.tensor([len(boxes)]), frame))[0]


def test_the_least_detection():
    boxes = [[10.0, 0, 10.005, 20], [10.0, 20, 10.02, 40], [10.0, 40, 30, 60]]
    for profile, tops in zip(NAMES, ([0, 20, 40], [20, 40], [0, 20, 40])):
        assert sorted(detect(profile, boxes)["boxes"][:, 1].tolist()) == tops


def test_the_first_label_is_one_in_torchvision_only():
    for profile, label in zip(NAMES, (0, 1, 0)):
        model = faster_rcnn("r18_fpn", 1, profile, **SMALL).eval()
        nn.init.constant_(model.roi_head.bbox_head.fc_cls.bias[:1], 9.0)
        (found,) = model.predict(torch.zeros(1, 3, 64, 64), [(64, 64)])
        assert set(found["labels"].tolist()) == {label}
        model.train()
        target = dict(boxes=torch.tensor([[8.0, 8, 40, 40]]), labels=torch.tensor([label]))
        assert len(model.loss(torch.zeros(1, 3, 64, 64), [(64, 64)], [target])) == 4
        with pytest.raises(ValueError, match=rf"expected labels in {label}\.\.{label}, got \[{1 - label}\]"):
            model.loss(torch.zeros(1, 3, 64, 64), [(64, 64)], [{**target, "labels": torch.tensor([1 - label])}])


@pytest.mark.parametrize("profile", NAMES)
def test_detections_enter_nms_at_the_original_size_in_mmdetection_only(profile):
    box, cfg = torch.tensor([[[0.0, 0, 10, 10]]]), dict(nms=dict(type="nms", iou_threshold=0.5), max_per_img=5)
    scores, labels, count, size, half = (torch.tensor(v) for v in ([[0.9]], [[0]], [1], [[32, 32]], [[0.5, 0.5]]))
    for least, kept in ((-1, True), (5, True), (10, profile == "mmdet"), (15, profile == "mmdet"), (20, False)):
        one = Padded(box, scores, labels, count)
        found = finish(one, Frame(size, (32, 32), half), cfg, get_profile(profile), least)
        assert found.boxes[0, : int(found.counts)].tolist() == ([[0, 0, 20, 20]] if kept else [])
