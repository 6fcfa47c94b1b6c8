import pytest
import torch
from conftest import picture, tiny_model
from torch import nn

from fastrcnn.inference.augment import View, aug_test, aug_test_rpn, det_tta, flip_boxes
from fastrcnn.models import RPN, FasterRCNN, StandardRoIHead
from fastrcnn.models.box_coder import DeltaXYWHBBoxCoder
from fastrcnn.models.build import merge
from fastrcnn.models.frame import Frame
from fastrcnn.models.padded import Padded
from fastrcnn.models.profiles import PROFILES
from fastrcnn.models.retinanet import RetinaNet

PROFILE_NAMES = ("mmdet", "torchvision", "detectron2")
SCALES, FLIPS = [(96, 64), (160, 96)], (None, "horizontal", "vertical", "diagonal")
AS_IT_IS = [(96, 64)]  # of images of 64 x 96, which are not resized
# Nothing is suppressed: sets of boxes that differ by a mirror only stay comparable to the last box.
KEEP_ALL = dict(type="nms", iou_threshold=1.0)


def two_stages(profile="mmdet", **more) -> FasterRCNN:
    proposals = dict(test_cfg=dict(rpn=dict(nms_pre=200, max_per_img=100)))
    return tiny_model("r18_fpn", profile, **merge(proposals, more))


def retina(profile="mmdet") -> RetinaNet:
    return tiny_model("retinanet_r18_fpn", profile)


def proposer(profile="mmdet") -> RPN:
    return tiny_model("rpn_r50_fpn", profile, test_cfg=dict(rpn=dict(nms_pre=200, max_per_img=100)))


DETECTORS = {"faster_rcnn": two_stages, "retinanet": retina, "rpn": proposer}


def assert_same(found: dict, expected: dict, tolerance: float = 0.0, least: int = 5) -> None:
    """The same detections; with a tolerance in any order, as equal scores leave it open."""
    assert len(expected["scores"]) >= least
    if tolerance == 0.0:
        assert set(found) == set(expected) == {"boxes", "labels", "scores"}
        for key in expected:
            assert torch.equal(found[key], expected[key]), key
        return
    assert len(found["scores"]) == len(expected["scores"])
    partner = torch.cdist(found["boxes"].double(), expected["boxes"].double(), p=torch.inf) < tolerance
    partner &= (found["scores"][:, None] - expected["scores"][None]).abs() < tolerance
    partner &= found["labels"][:, None] == expected["labels"][None]
    assert partner.any(0).all() and partner.any(1).all()


# A box in a 60 x 100 image (height, width) that is resized to 120 x 300.
MAPPED = [
    (None, [30.0, 10.0, 150.0, 40.0]),
    ("horizontal", [150.0, 10.0, 270.0, 40.0]),
    ("vertical", [30.0, 80.0, 150.0, 110.0]),
    ("diagonal", [150.0, 80.0, 270.0, 110.0]),
]


@pytest.mark.parametrize("flip, expected", MAPPED)
def test_boxes_go_into_a_view_and_back(flip, expected):
    box = torch.tensor([[10.0, 5.0, 50.0, 20.0]])
    view = View(size=(120, 300), factor=(3.0, 2.0), flip=flip)
    assert view.forward(box).tolist() == [expected]
    assert torch.equal(view.back(torch.tensor([expected])), box)
    several = box.expand(4, 3, 4)
    assert torch.equal(view.back(view.forward(several)), several)


def test_flipping_boxes_twice_gives_them_back():
    boxes = torch.tensor([[1.0, 2.0, 3.0, 5.0], [0.0, 0.0, 7.0, 9.0]])
    for flip in FLIPS:
        assert torch.equal(flip_boxes(flip_boxes(boxes, (9, 7), flip), (9, 7), flip), boxes)
    assert flip_boxes(boxes[:1], (9, 7), "diagonal").tolist() == [[4.0, 4.0, 6.0, 7.0]]
    assert flip_boxes(boxes[:0], (9, 7), "horizontal").shape == (0, 4)


class Pixels(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, batch):
        return (batch,)


class GivenProposals(nn.Module):
    """An RPN that answers with the next of `answers`: (boxes, scores) of the only image."""

    test_cfg = dict(nms_pre=10, max_per_img=3, nms=dict(type="nms", iou_threshold=0.7), min_bbox_size=0)

    def __init__(self, answers):
        super().__init__()
        self.answers = iter(answers)

    def forward(self, feats):
        return feats, feats

    def predict(self, logits, deltas, frame, cfg):
        boxes, scores = (torch.tensor(v) for v in next(self.answers))
        return boxes[None], scores[None], torch.tensor([len(scores)])


class KeepRoIs(nn.Module):
    def forward(self, feats, rois):
        return rois


class GivenHead(nn.Module):
    """A box head of two classes that answers with the next of `answers`, and keeps the RoIs it is asked about."""

    num_classes, reg_class_agnostic = 2, False

    def __init__(self, answers):
        super().__init__()
        self.answers, self.rois, self.bbox_coder = iter(answers), [], DeltaXYWHBBoxCoder()

    def forward(self, rois):
        self.rois.append(rois[:, 1:].tolist())
        probabilities, deltas = (torch.tensor(v) for v in next(self.answers))
        return probabilities.log(), deltas


def by_hand(proposals, answers=(), profile="mmdet", **test_cfg) -> FasterRCNN:
    head = StandardRoIHead(KeepRoIs(), GivenHead(answers), test_cfg=test_cfg, profile=profile)
    return FasterRCNN(Pixels(), None, GivenProposals(proposals), head, profile=profile).eval()


# An image of 40 x 80 at twice its size, as it is and mirrored: 160 - x. The first proposals are the same box, [10, 10, 30,
# 30]; the second view adds [100, 40, 140, 80] -> [10, 20, 30, 40], which overlaps the first by a third.
PROPOSALS = [
    ([[20.0, 20.0, 60.0, 60.0]], [0.9]),
    ([[100.0, 20.0, 140.0, 60.0], [100.0, 40.0, 140.0, 80.0]], [0.8, 0.95]),
]
IMAGE = [torch.zeros(3, 40, 80)]


def test_proposals_of_all_views_go_through_one_nms():
    ((boxes, scores),) = aug_test_rpn(by_hand(PROPOSALS), IMAGE, [(160, 80)])
    assert boxes.tolist() == [[10.0, 20.0, 30.0, 40.0], [10.0, 10.0, 30.0, 30.0]]
    assert scores.tolist() == pytest.approx([0.95, 0.9])


def test_at_most_max_per_img_proposals_are_kept():
    apart = [([[20.0 * i, 0.0, 20.0 * i + 10, 10.0] for i in range(4)], [0.1, 0.4, 0.3, 0.2])] * 2
    ((boxes, scores),) = aug_test_rpn(by_hand(apart), IMAGE, [(80, 40), (160, 80)], [None])
    assert scores.tolist() == pytest.approx([0.4, 0.4, 0.3])
    assert boxes.tolist() == [[20.0, 0.0, 30.0, 10.0], [10.0, 0.0, 15.0, 5.0], [40.0, 0.0, 50.0, 10.0]]


# Of the one proposal [10, 10, 30, 30], 40 pixels wide in the view, a move of 0.5 is 20 pixels there and 10 in the image.
# Mirrored, a move to the left by 10 is one to the right. Of class 0: [10, ..., 30] and [15, ..., 35], of class 1: [20, ...,
# 40] and [10, ..., 30]. Scores: 0.6 and 0.2, 0.3 and 0.7.
ONE = [([[20.0, 20.0, 60.0, 60.0]], [0.9]), ([[100.0, 20.0, 140.0, 60.0]], [0.9])]
ANSWERS = [
    ([[0.6, 0.3, 0.1]], [[0.0, 0.0, 0.0, 0.0, 0.5, 0.0, 0.0, 0.0]]),
    ([[0.2, 0.7, 0.1]], [[-0.25, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]]),
]


@pytest.mark.parametrize("profile", PROFILE_NAMES)
def test_boxes_and_scores_are_averaged_over_the_views(profile):
    model = by_hand(ONE, ANSWERS, profile)
    (found,) = aug_test(model, IMAGE, [(160, 80)])
    assert model.roi_head.bbox_head.rois == [[[20.0, 20.0, 60.0, 60.0]], [[100.0, 20.0, 140.0, 60.0]]]
    assert found["boxes"].tolist() == [[15.0, 10.0, 35.0, 30.0], [12.5, 10.0, 32.5, 30.0]]
    assert found["scores"].tolist() == pytest.approx([0.5, 0.4])
    assert found["labels"].tolist() == [1 + PROFILES[profile].label_offset, 0 + PROFILES[profile].label_offset]


def test_the_threshold_and_the_limit_hold_for_the_averages():
    (found,) = aug_test(by_hand(ONE, ANSWERS, score_thr=0.45), IMAGE, [(160, 80)])
    assert found["labels"].tolist() == [1]  # one view alone says 0.6 of class 0
    one_class = dict(type="nms", iou_threshold=0.5, class_agnostic=True)  # their IoU is 17.5 / 22.5
    for options in (dict(max_per_img=1), dict(nms=one_class)):
        (found,) = aug_test(by_hand(ONE, ANSWERS, **options), IMAGE, [(160, 80)])
        assert found["labels"].tolist() == [1]


def test_boxes_are_clipped_to_their_view_before_they_are_averaged():
    # 40 pixels to the left: [-20, ..., 20] becomes [0, ..., 20], in the image [0, ..., 10], beside [10, ..., 30].
    answers = [([[0.8, 0.1, 0.1]], [[-1.0] + [0.0] * 7]), ([[0.8, 0.1, 0.1]], [[0.0] * 8])]
    (found,) = aug_test(by_hand(ONE, answers, score_thr=0.5), IMAGE, [(160, 80)])
    assert found["boxes"].tolist() == [[5.0, 10.0, 20.0, 30.0]]


def test_detections_of_all_views_are_merged_within_each_class():
    model = by_hand([])
    answers = iter([
        ([[10.0, 10.0, 30.0, 30.0], [0.0, 0.0, 8.0, 8.0]], [0.6, 0.3]),
        ([[50.0, 10.0, 70.0, 30.0], [50.0, 10.0, 70.0, 30.0]], [0.8, 0.7]),
    ])  # fmt: skip
    asked = []

    def detect(batch, frame, waits):
        asked.append(frame)
        boxes, scores = (torch.tensor([v]) for v in next(answers))
        return Padded(boxes, scores, torch.tensor([[0, 1]]), torch.tensor([2])), torch.tensor([False])

    model.detect = detect
    (found,) = det_tta(model, IMAGE, [(160, 80)])
    assert found["boxes"].tolist() == [[10.0, 10.0, 30.0, 30.0], [10.0, 10.0, 30.0, 30.0], [0.0, 0.0, 8.0, 8.0]]
    assert found["labels"].tolist() == [0, 1, 1] and found["scores"].tolist() == pytest.approx([0.8, 0.7, 0.3])
    assert all(f.sizes.tolist() == [[80, 160]] and f.factors.tolist() == [[2.0, 2.0]] for f in asked)


def test_images_are_resized_and_then_flipped_within_the_batch():
    images = [picture(64, 96), picture(48, 96, seed=1), picture(70, 50, seed=2)]
    model, seen = by_hand([]), []
    none = torch.zeros(3, dtype=torch.int64)
    nothing = Padded(torch.zeros(3, 1, 4), torch.zeros(3, 1), torch.zeros(3, 1, dtype=torch.int64), none)
    model.detect = lambda batch, frame, waits: seen.append(batch) or (nothing, none > 0)
    det_tta(model, images, SCALES, FLIPS)
    assert len(seen) == len(SCALES) * len(FLIPS)
    sizes = [[(64, 96), (48, 96), (90, 64)], [(96, 144), (80, 160), (134, 96)]]
    for plain, horizontal, vertical, diagonal, those in zip(*(seen[i::4] for i in range(4)), sizes):
        for i, (h, w) in enumerate(those):
            one = plain[i, :, :h, :w]
            assert torch.equal(horizontal[i, :, :h, :w], one.flip(2))
            assert torch.equal(vertical[i, :, :h, :w], one.flip(1))
            assert torch.equal(diagonal[i, :, :h, :w], one.flip(1, 2))
            for batch in (plain, horizontal, vertical, diagonal):
                assert batch[i, :, h:].abs().sum() == 0 and batch[i, :, :, w:].abs().sum() == 0
    model.data_preprocessor.min_size, model.data_preprocessor.max_size = 64, 96
    assert torch.equal(model.data_preprocessor(images)[0], seen[0])


@pytest.mark.parametrize("function", [det_tta, aug_test])
def test_float_and_uint8_images_give_the_same(function):
    model, image = two_stages(), picture(70, 100)
    bytes_, floats = (function(model, [x], SCALES)[0] for x in (image, image / 255.0))
    assert_same(floats, bytes_)


@pytest.mark.parametrize("profile", PROFILE_NAMES)
@pytest.mark.parametrize("kind", DETECTORS)
def test_one_plain_view_merged_is_the_models_own_result(kind, profile):
    model, images = DETECTORS[kind](profile), [picture(64, 90), picture(70, 60, seed=1)]
    # An RPN suppresses within levels, which it then forgets; Detectron2's RetinaNet suppresses before it clips: their
    # results overlap. No profile keeps more than 300.
    overlap = kind == "rpn" or (kind, profile) == ("retinanet", "detectron2")
    nms = KEEP_ALL if overlap else dict(type="nms", iou_threshold=0.5)
    for found, own in zip(det_tta(model, images, AS_IT_IS, [None], nms, 300), model(images)):
        assert_same(found, own, 0.0 if profile == "mmdet" else 1e-3)


def test_one_plain_view_averaged_is_the_models_own_result():
    model = two_stages(test_cfg=dict(rpn=dict(nms=KEEP_ALL)))
    images = [picture(64, 96), picture(64, 96, seed=1)]
    for found, own in zip(aug_test(model, images, AS_IT_IS, [None]), model(images)):
        assert_same(found, own)
    # Resized, the boxes are carried back and forth, and the last digit with them.
    images = [picture(50, 90), picture(70, 60, seed=1)]
    for found, own in zip(aug_test(model, images, AS_IT_IS, [None]), model(images)):
        assert_same(found, own, 1e-3)


@pytest.mark.parametrize("profile", PROFILE_NAMES)
def test_one_plain_view_averaged_is_the_second_stage_on_the_merged_proposals(profile):
    model, image = two_stages(profile), picture(64, 96)
    ((boxes, _),) = aug_test_rpn(model, [image], AS_IT_IS, [None])
    batch, sizes, factors = model.data_preprocessor([image])
    ((proposed, _),) = model.proposals(batch, sizes)
    assert 5 < len(boxes) < len(proposed)  # levels suppress one another
    feats, count = model.extract_feat(batch), torch.tensor([len(boxes)])
    with torch.no_grad():
        found = model.roi_head.predict(feats, boxes[None], count, Frame(sizes, (64, 96), factors))
        (own,) = model.outside(Padded.lists(*found))
    assert_same(aug_test(model, [image], AS_IT_IS, [None])[0], own, 0.0 if profile == "mmdet" else 1e-3)


@pytest.mark.parametrize("profile", PROFILE_NAMES)
@pytest.mark.parametrize("flip", FLIPS[1:])
@pytest.mark.parametrize("function", [det_tta, aug_test])
def test_a_mirrored_image_gives_mirrored_boxes(function, flip, profile):
    model, image = two_stages(profile), picture(64, 96)
    mirrored = image.flip({"horizontal": (2,), "vertical": (1,), "diagonal": (1, 2)}[flip])
    straight = function(model, [image], AS_IT_IS, (None, flip))[0]
    other = function(model, [mirrored], AS_IT_IS, (None, flip))[0]
    assert_same({**other, "boxes": flip_boxes(other["boxes"], (64, 96), flip)}, straight, 1e-3)


@pytest.mark.parametrize("function", [det_tta, aug_test])
def test_a_symmetric_image_gives_symmetric_boxes(function):
    rcnn = dict(nms=KEEP_ALL, max_per_img=100_000)
    model = two_stages(test_cfg=dict(rpn=dict(nms=KEEP_ALL, max_per_img=100_000), rcnn=rcnn))
    half = picture(64, 48)
    image = torch.cat([half, half.flip(2)], 2)
    options = dict(nms=KEEP_ALL, max_per_img=100_000) if function is det_tta else {}
    (found,) = function(model, [image], AS_IT_IS, **options)
    assert_same({**found, "boxes": flip_boxes(found["boxes"], (64, 96), "horizontal")}, found, 1e-3)


@pytest.mark.parametrize("kind", DETECTORS)
@pytest.mark.parametrize("profile", PROFILE_NAMES)
def test_batches_of_several_sizes_find_boxes_within_the_images(kind, profile):
    model = DETECTORS[kind](profile)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    images = [picture(64, 90), picture(120, 60, seed=1)]
    kept = [image.clone() for image in images]
    functions = (det_tta, aug_test) if kind == "faster_rcnn" else (det_tta,)
    labels = {model.label_offset + i for i in range(model.num_classes)}
    for function in functions:
        results = function(model, images, SCALES, FLIPS)
        for found, image in zip(results, images):
            height, width = image.shape[1:]
            assert 0 < len(found["boxes"]) <= 100 and found["boxes"].shape == (len(found["scores"]), 4)
            assert found["boxes"].min() >= -1e-3 and set(found["labels"].tolist()) <= labels
            assert found["boxes"][:, 2].max() <= width + 1e-3 and found["boxes"][:, 3].max() <= height + 1e-3
            assert (found["scores"][:-1] >= found["scores"][1:]).all() and not found["boxes"].requires_grad
    if kind != "retinanet":
        for (boxes, scores), image in zip(aug_test_rpn(model, images, SCALES, FLIPS), images):
            assert 0 < len(boxes) == len(scores) <= 100 and (scores[:-1] >= scores[1:]).all()
            assert boxes[:, 2].max() <= image.shape[2] + 1e-3 and boxes[:, 3].max() <= image.shape[1] + 1e-3
    assert (model.data_preprocessor.min_size, model.data_preprocessor.max_size) == (64, 96)
    assert all(torch.equal(image, k) for image, k in zip(images, kept))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("function", [det_tta, aug_test])
def test_nothing_found_is_an_empty_result(function):
    for stage, cfg in (("rpn_head", dict(min_bbox_size=10_000)), ("roi_head", dict(score_thr=1.0))):
        head = getattr(model := two_stages(), stage)
        head.test_cfg = {**head.test_cfg, **cfg}
        for found in function(model, [picture(64, 90), picture(60, 60)], SCALES):
            assert found["boxes"].shape == (0, 4)
            assert found["scores"].shape == found["labels"].shape == (0,) and found["labels"].dtype == torch.int64


def test_soft_nms_merges_too():
    model = two_stages()
    soft = dict(type="soft_nms", iou_threshold=0.5, min_score=0.05)
    (hard,), (found,) = (det_tta(model, [picture(64, 96)], SCALES, nms=n, max_per_img=1000) for n in (KEEP_ALL, soft))
    assert 0 < len(found["scores"]) <= len(hard["scores"]) and found["scores"].sum() < hard["scores"].sum()


def test_a_head_that_knows_no_classes_averages_one_box():
    model = two_stages(roi_head=dict(bbox_head=dict(reg_class_agnostic=True)))
    (found,) = aug_test(model, [picture(64, 96)], SCALES)
    assert len(found["boxes"]) > 5 and set(found["labels"].tolist()) <= {0, 1, 2}


BAD = [
    (dict(images=[]), ValueError, "images"),
    (dict(images=[torch.zeros(1, 64, 96)]), ValueError, r"images\[0\]"),
    (dict(scales=[]), ValueError, "scales"),
    (dict(scales=(96, 64)), ValueError, r"scales\[0\].*96"),
    (dict(scales=[(96, 64), (96,)]), ValueError, r"scales\[1\]"),
    (dict(scales=[(96, 0)]), ValueError, r"scales\[0\]"),
    (dict(flips=()), ValueError, "flips"),
    (dict(flips=[None, "sideways"]), ValueError, r"flips\[1\].*sideways"),
    (dict(flips="horizontal"), ValueError, r"flips\[0\]"),
]


@pytest.mark.parametrize("wrong, error, message", BAD)
@pytest.mark.parametrize("function", [det_tta, aug_test, aug_test_rpn])
def test_a_wrong_argument_is_named(function, wrong, error, message):
    arguments = {**dict(images=[picture(64, 96)], scales=AS_IT_IS, flips=[None]), **wrong}
    with pytest.raises(error, match=message):
        function(two_stages(), **arguments)


def test_a_wrong_model_is_named():
    for function, model in ((aug_test, retina()), (aug_test, proposer()), (aug_test_rpn, retina()), (det_tta, None)):
        with pytest.raises(TypeError, match=r"model: expected a .*, got"):
            function(model, [picture(64, 96)], AS_IT_IS)
    for function in (det_tta, aug_test, aug_test_rpn):
        with pytest.raises(ValueError, match=r"model.*eval"):
            function(two_stages().train(), [picture(64, 96)], AS_IT_IS)
    with pytest.raises(ValueError, match=r"nms.*matrix"):
        det_tta(two_stages(), [picture(64, 96)], AS_IT_IS, nms=dict(type="matrix"))
