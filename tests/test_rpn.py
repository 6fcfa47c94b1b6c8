"""models/rpn.py's detector: a region proposal network on its own, which is the first stage of Faster R-CNN."""

import pytest
import torch
from conftest import tiny_options
from torch import nn

from fastrcnn.models import RPN, RPNHead, faster_rcnn
from fastrcnn.models.profiles import PROFILES

PROFILE_NAMES = ("mmdet", "torchvision", "detectron2")
EVERYTHING = dict(type="RandomSampler", num=10**6, pos_fraction=1.0, neg_pos_ub=-1, add_gt_as_proposals=False)
BOXES = torch.tensor([[5.0, 8.0, 40.0, 50.0], [30.0, 10.0, 80.0, 60.0]])


def images_of(*sizes):
    return [torch.rand(3, *size) for size in sizes]


def both(profile: str) -> tuple:
    """Faster R-CNN, and an RPN of the same modules."""
    torch.manual_seed(1)
    whole = faster_rcnn("r18_fpn", 3, profile, **tiny_options(), train_cfg=dict(rpn=dict(sampler=EVERYTHING)))
    with torch.no_grad():
        batch, _, _ = whole.eval().data_preprocessor(images_of((64, 96)))
        for layer, maps in zip(
            (whole.rpn_head.rpn_cls, whole.rpn_head.rpn_reg), whole.rpn_head(whole.extract_feat(batch))
        ):
            layer.weight.mul_(0.5 / torch.cat([x.flatten() for x in maps]).std())
    alone = RPN(whole.backbone, whole.neck, whole.rpn_head, profile=profile, min_size=64, max_size=96)
    return whole, alone.eval()


def from_dicts(**options) -> RPN:
    torch.manual_seed(1)
    return RPN(
        dict(type="ResNet", depth=18, base_channels=8),
        dict(type="FPN", in_channels=[8, 16, 32, 64], out_channels=8, num_outs=5),
        dict(type="RPNHead", in_channels=8, feat_channels=8) | options.pop("rpn_head", {}),
        **{"min_size": 64, "max_size": 96, **options},
    )


@pytest.mark.parametrize("profile", PROFILE_NAMES)
def test_proposals_are_faster_rcnns(profile):
    whole, alone = both(profile)
    batch, sizes, factors = alone.data_preprocessor(images_of((128, 160), (70, 65)))
    expected = whole.proposals(batch, sizes)
    for (boxes, scores), (same_boxes, same_scores) in zip(alone.proposals(batch, sizes), expected, strict=True):
        assert len(boxes) > 20 and torch.equal(boxes, same_boxes) and torch.equal(scores, same_scores)
    for found, (boxes, scores) in zip(alone.predict(batch, sizes), expected, strict=True):
        assert torch.equal(found["boxes"], boxes) and torch.equal(found["scores"], scores)
        assert found["labels"].tolist() == [0] * len(boxes) and found["labels"].dtype == torch.int64
    for found, (boxes, _), factor in zip(alone.predict(batch, sizes, factors), expected, factors):
        torch.testing.assert_close(found["boxes"], boxes / factor.repeat(2))


def test_the_calling_convention_gives_boxes_of_the_original_image():
    _, alone = both("mmdet")
    (found,) = alone(images_of((128, 160)))  # 128 x 160 becomes 64 x 80
    assert found["boxes"][:, 2].max() > 100 and found["boxes"][:, 2].max() <= 160
    assert (found["scores"][:-1] >= found["scores"][1:]).all() and not found["boxes"].requires_grad


def test_small_is_measured_in_the_original_image():
    _, alone = both("mmdet")
    alone.rpn_head.test_cfg = {**alone.rpn_head.test_cfg, "min_bbox_size": 20}
    images = images_of((128, 160))
    batch, sizes, factors = alone.data_preprocessor(images)

    def smallest(found):
        return (found["boxes"][:, 2:] - found["boxes"][:, :2]).min().item()

    assert 20 < smallest(alone.predict(batch, sizes)[0]) < 30
    assert 20 < smallest(alone.predict(batch, sizes, factors)[0]) < 30


@pytest.mark.parametrize("profile", PROFILE_NAMES)
def test_losses_are_the_first_of_faster_rcnns(profile):
    whole, alone = both(profile)
    batch, sizes, _ = alone.data_preprocessor(images_of((64, 90), (70, 96)))
    first = PROFILES[profile].label_offset
    target = dict(boxes=BOXES, labels=torch.tensor([0, 2]) + first, ignore_boxes=torch.tensor([[0.0, 0, 20, 20]]))
    expected = whole.loss(batch, sizes, [target] * 2)
    names = PROFILES[profile].losses[:2]
    # Labels may be any, or none at all.
    for labels in (target["labels"], torch.tensor([77, -3]), None):
        given = {k: v for k, v in dict(target, labels=labels).items() if v is not None}
        found = alone.loss(batch, sizes, [given] * 2)
        assert tuple(found) == names
        for name in names:
            torch.testing.assert_close(found[name], expected[name])
            assert found[name] > 0


@pytest.mark.parametrize("profile", PROFILE_NAMES)
def test_images_without_objects_train(profile):
    _, alone = both(profile)
    alone.train()
    losses = alone(images_of((64, 90)), [dict(boxes=torch.zeros(0, 4))])
    cls, box = (losses[name] for name in PROFILES[profile].losses[:2])
    assert cls > 0 and box == 0
    (cls + box).backward()
    assert all(p.grad.isfinite().all() for p in alone.parameters() if p.grad is not None)
    assert alone.rpn_head.rpn_cls.weight.grad.any() and not alone.rpn_head.rpn_reg.weight.grad.any()


def test_keys_are_the_first_stages():
    whole, _ = both("mmdet")
    state = from_dicts().state_dict()
    assert set(state) == {k for k in whole.state_dict() if not k.startswith("roi_head")}
    assert state["rpn_head.rpn_conv.weight"].shape == (8, 8, 3, 3)
    assert state["rpn_head.rpn_cls.weight"].shape == (3, 8, 1, 1) and "neck.fpn_convs.3.conv.weight" in state


def test_settings_reach_the_head_with_or_without_their_name():
    train, test = dict(allowed_border=0), dict(nms_pre=50, max_per_img=7)
    for wrap in (lambda cfg: cfg, lambda cfg: dict(rpn=cfg)):
        model = from_dicts(train_cfg=wrap(train), test_cfg=wrap(test)).eval()
        assert model.rpn_head.train_cfg["allowed_border"] == 0 and model.rpn_head.test_cfg["nms_pre"] == 50
        assert model.rpn_head.test_cfg["nms"]["iou_threshold"] == 0.7
        assert len(model(images_of((64, 90)))[0]["boxes"]) == 7
    assert isinstance(from_dicts(rpn_head=dict(num_classes=80)).rpn_head, RPNHead)  # one class all the same


@pytest.mark.parametrize("name", PROFILE_NAMES)
def test_another_profile_is_taken_over_whole(name):
    built = from_dicts(profile=name, rpn_head=dict(loss_bbox=PROFILES[name].rpn_loss_bbox),
                       train_cfg=dict(sampler=EVERYTHING))  # fmt: skip
    other = from_dicts(train_cfg=dict(sampler=EVERYTHING))
    other.load_state_dict(built.state_dict())
    other.set_profile(name)
    images, targets = images_of((64, 90)), [dict(boxes=BOXES)]
    torch.testing.assert_close(other.eval()(images), built.eval()(images))
    torch.testing.assert_close(other.train()(images, targets), built.train()(images, targets))
    assert other.label_offset == built.label_offset == 0 and other.num_classes == 1


BAD_TARGETS = [
    (None, "targets.*got None"),
    ([], "targets: expected one for each of the 1 images, got 0"),
    ([dict(labels=torch.tensor([0]))], r"targets\[0\].*boxes"),
    ([dict(boxes=BOXES.flip(1))], r"targets\[0\].*x2 > x1"),
]


@pytest.mark.parametrize("targets, message", BAD_TARGETS)
def test_bad_targets_are_named(targets, message):
    model = from_dicts()
    with pytest.raises(ValueError, match=message):
        model.loss(torch.zeros(1, 3, 64, 96), [(64, 96)], targets)
    with pytest.raises(ValueError, match="targets"):
        model.train()(images_of((64, 90)))


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(rpn_head=dict(type="GARPNHead")), "rpn_head.*GARPNHead"),
        (dict(rpn_head=dict(feat_chanels=8)), "rpn_head.*feat_chanels"),
        (dict(test_cfg=dict(rpn=dict(score_thr=0.5))), "rpn_head test_cfg.*score_thr"),
        (dict(profile="yolo"), "profile"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        from_dicts(**options)
    model = from_dicts()
    with pytest.raises(ValueError, match="image_sizes"):
        model.proposals(torch.zeros(2, 3, 64, 96), [(64, 96)])


@pytest.mark.parametrize("profile", PROFILE_NAMES)
def test_a_few_steps_of_training(profile):
    model = from_dicts(profile=profile, train_cfg=dict(sampler=EVERYTHING))
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.requires_grad_(True)
    model.train()
    images, targets = images_of((64, 90), (64, 96)), [dict(boxes=BOXES), dict(boxes=BOXES[:1])]
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    seen = []
    for _ in range(12):
        losses = model(images, targets)
        optimizer.zero_grad()
        seen.append(sum(losses.values()))
        seen[-1].backward()
        optimizer.step()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert seen[-1] < 0.7 * seen[0]
