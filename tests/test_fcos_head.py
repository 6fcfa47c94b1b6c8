import math

import pytest
import torch
from torch import nn

from fastrcnn.models import faster_rcnn
from fastrcnn.models.fcos_head import DistancePointBBoxCoder, FCOSHead, centerness_target
from fastrcnn.models.frame import Frame
from fastrcnn.models.profiles import PROFILES

SMALL = dict(num_classes=1, in_channels=4, feat_channels=8, stacked_convs=1, norm_cfg=dict(type="GN", num_groups=2))
LOG2 = math.log(2)


def one_level(**options) -> FCOSHead:
    """Positions every 8 pixels, at 4, 12, 20..."""
    return FCOSHead(**{**SMALL, "strides": (8,), "regress_ranges": ((-1, 1e8),), **options})


def maps_of(*sizes, channels=1, device="cpu"):
    return [torch.zeros(1, channels, h, w, device=device) for h, w in sizes]


def assigned(head, sizes, boxes, device="cpu"):
    """{(level, row, column): distances} of the positions that an object has."""
    positive, distances = head.assigned(maps_of(*sizes, device=device), [dict(boxes=boxes.to(device))])
    where = [(i, y, x) for i, (h, w) in enumerate(sizes) for y in range(h) for x in range(w)]
    return {at: d for at, yes, d in zip(where, positive[0].tolist(), distances[0].tolist()) if yes}


# --- layers


def test_state_dict_keys_are_mmdetections():
    head = FCOSHead(**{**SMALL, "stacked_convs": 2, "strides": (8, 16), "regress_ranges": ((-1, 64), (64, 1e8))})
    tower = ("conv.weight", "gn.weight", "gn.bias")
    expected = {f"{side}_convs.{i}.{key}" for side in ("cls", "reg") for i in range(2) for key in tower}
    expected |= {f"conv_{what}.{key}" for what in ("cls", "reg", "centerness") for key in ("weight", "bias")}
    expected |= {"scales.0.scale", "scales.1.scale"}
    assert set(head.state_dict()) == expected
    assert head.scales[0].scale.shape == () and head.conv_reg.weight.shape == (4, 8, 3, 3)
    plain = FCOSHead(**{**SMALL, "norm_cfg": None})
    assert "cls_convs.0.conv.bias" in plain.state_dict() and len(plain.scales) == 5
    assert "reg_convs.0.conv.bias" in FCOSHead(**SMALL, conv_bias=True).state_dict()


def test_a_fresh_head_scores_one_percent_everywhere():
    head = FCOSHead(num_classes=1, in_channels=64)
    logits, distances, middle = head([torch.randn(1, 64, 6, 6) for _ in range(5)])
    assert torch.cat([x.sigmoid().flatten() for x in logits]).mean().item() == pytest.approx(0.01, abs=0.003)
    assert head.conv_cls.weight.std().item() == pytest.approx(0.01, rel=0.1)
    for maps, channels in ((logits, 1), (distances, 4), (middle, 1)):
        assert all(x.shape == (1, channels, 6, 6) for x in maps)


def test_distances_are_exponentials_or_rectified_strides(device):
    x = [torch.randn(1, 4, 3, 3, device=device), torch.randn(1, 4, 2, 2, device=device)]
    two = dict(strides=(8, 16), regress_ranges=((-1, 64), (64, 1e8)))
    for norm_on_bbox in (False, True):
        head = FCOSHead(**SMALL, **two, norm_on_bbox=norm_on_bbox).to(device)
        nn.init.zeros_(head.conv_reg.weight)
        head.conv_reg.bias.data = torch.tensor([-1.0, 0.0, 0.5, 2.0], device=device)
        head.scales[1].scale.data.fill_(2.0)
        expected = [[math.exp(v) for v in (-1, 0, 0.5, 2)], [math.exp(v) for v in (-2, 0, 1, 4)]]
        if norm_on_bbox:
            expected = [[0.0, 0.0, 0.5, 2.0], [0.0, 0.0, 1.0, 4.0]]
        for training in (True, False):
            _, distances, _ = head.train(training)(x)
            for found, values, stride in zip(distances, expected, (8, 16)):
                factor = stride if norm_on_bbox and not training else 1
                values = torch.tensor(values, device=device) * factor
                torch.testing.assert_close(found, values[:, None, None].expand_as(found[0])[None])


@pytest.mark.parametrize("centerness_on_reg", [False, True])
def test_centerness_stands_on_one_of_the_towers(centerness_on_reg):
    head = one_level(centerness_on_reg=centerness_on_reg)
    for p in head.reg_convs[0].gn.parameters():
        nn.init.zeros_(p)  # nothing comes out of the box tower
    nn.init.constant_(head.conv_centerness.bias, 0.75)
    _, _, (out,) = head([torch.randn(1, 4, 3, 3)])
    assert bool((out == 0.75).all()) == centerness_on_reg


# --- targets


def test_targets_by_regress_range_and_by_smallest_area(device):
    head = FCOSHead(**SMALL, strides=(8, 16), regress_ranges=((-1, 12), (12, 1e8)))
    sizes = [(4, 4), (2, 2)]
    large = torch.tensor([[0.0, 0.0, 24.0, 16.0]])
    # (4, 4) has a side 20 away, too far for level 0; x = 24 lies on the border, which is outside. 12 belongs to both.
    expected = {(0, 0, 1): [12, 4, 12, 12], (0, 1, 1): [12, 12, 12, 4], (1, 0, 0): [8, 8, 16, 8]}
    assert assigned(head, sizes, large, device) == expected
    small = torch.tensor([[8.0, 0.0, 24.0, 16.0]])
    expected = {
        (0, 0, 1): [4, 4, 12, 12], (0, 0, 2): [12, 4, 4, 12], (0, 1, 1): [4, 12, 12, 4], (0, 1, 2): [12, 12, 4, 4],
        (1, 0, 0): [8, 8, 16, 8],
    }  # fmt: skip
    for both in ([large, small], [small, large]):
        assert assigned(head, sizes, torch.cat(both), device) == expected
    assert assigned(head, sizes, torch.zeros(0, 4), device) == {}


def test_center_sampling_stays_within_the_radius_and_the_box():
    whole = torch.tensor([[0.0, 0.0, 32.0, 32.0]])
    assert len(assigned(one_level(), [(4, 4)], whole)) == 16
    near = assigned(one_level(center_sampling=True), [(4, 4)], whole)  # 4 is exactly 1.5 strides from 16: outside
    assert set(near) == {(0, y, x) for y in (1, 2) for x in (1, 2)}
    assert len(assigned(one_level(center_sampling=True, center_sample_radius=1.6), [(4, 4)], whole)) == 16
    narrow = torch.tensor([[10.0, 0.0, 14.0, 32.0]])  # (4, 12) and (20, 12) are near its centre, but beside it
    assert set(assigned(one_level(center_sampling=True), [(4, 4)], narrow)) == {(0, 1, 1), (0, 2, 1)}


def test_distances_in_strides():
    head = one_level(norm_on_bbox=True)
    assert assigned(head, [(2, 2)], torch.tensor([[0.0, 0.0, 8.0, 8.0]])) == {(0, 0, 0): [0.5, 0.5, 0.5, 0.5]}


def test_centerness_values():
    distances = torch.tensor([[1.0, 1, 1, 1], [2, 3, 8, 3], [1, 4, 4, 1], [9, 1, 1, 9]])
    torch.testing.assert_close(centerness_target(distances), torch.tensor([1.0, 0.5, 0.25, 1 / 9]))
    assert centerness_target(distances[:0]).shape == (0,)


# --- losses


def six_positions(device, norm_on_bbox=False):
    """A box [0, 8, 24, 24] with positions at x = 4, 12, 20 and y = 12, 20: the middle ones predict it exactly, the others
    a square of 8 pixels inside it."""
    distances = torch.full((1, 4, 4, 4), 4.0, device=device)
    distances[0, :, 1, 1] = torch.tensor([12.0, 4, 12, 12], device=device)
    distances[0, :, 2, 1] = torch.tensor([12.0, 12, 12, 4], device=device)
    boxes = torch.tensor([[0.0, 8.0, 24.0, 24.0]], device=device)
    return distances / 8 if norm_on_bbox else distances, boxes


@pytest.mark.parametrize("norm_on_bbox", [False, True])
def test_losses_by_hand(norm_on_bbox, device):
    head = one_level(norm_on_bbox=norm_on_bbox)
    distances, boxes = six_positions(device, norm_on_bbox)
    logits, middle = torch.zeros(1, 1, 4, 4, device=device), torch.full((1, 1, 4, 4), 2.0, device=device)
    # Labels are not read: all objects are one class.
    targets = [dict(boxes=boxes, labels=torch.tensor([5], device=device))]
    cls, box, center = head.loss([logits], [distances], [middle], Frame(torch.tensor([[32, 32]]), (32, 32)), targets)
    assert cls.item() == pytest.approx((6 * 0.25 + 10 * 0.75) * 0.25 * LOG2 / 6, rel=1e-5)
    side, mid = math.sqrt(1 / 5 * 1 / 3), math.sqrt(1 / 3)  # centerness at the sides and in the middle
    assert box.item() == pytest.approx(4 * side * math.log(6) / (4 * side + 2 * mid), rel=1e-5)
    entropy = math.log(1 + math.exp(2)) - 2 * (4 * side + 2 * mid) / 6
    assert center.item() == pytest.approx(entropy, rel=1e-5)


def test_weights_of_the_losses():
    losses = dict(
        loss_cls=dict(type="FocalLoss", loss_weight=3.0),
        loss_bbox=dict(type="IoULoss", mode="linear", loss_weight=0.5),
        loss_centerness=dict(type="CrossEntropyLoss", use_sigmoid=True, loss_weight=2.0),
    )
    distances, boxes = six_positions("cpu")
    maps = [torch.zeros(1, 1, 4, 4)], [distances], [torch.zeros(1, 1, 4, 4)]
    cls, box, center = one_level(**losses).loss(*maps, Frame(torch.tensor([[32, 32]]), (32, 32)), [dict(boxes=boxes)])
    side, mid = math.sqrt(1 / 15), math.sqrt(1 / 3)
    assert cls.item() == pytest.approx(3 * (6 * 0.25 + 10 * 0.75) * 0.25 * LOG2 / 6, rel=1e-5)
    assert box.item() == pytest.approx(0.5 * (5 / 6) * 4 * side / (4 * side + 2 * mid), rel=1e-5)
    assert center.item() == pytest.approx(2 * LOG2, rel=1e-5)


def test_images_without_objects(device):
    maps = [[torch.zeros(2, c, 4, 4, device=device, requires_grad=True)] for c in (1, 4, 1)]
    sizes = torch.tensor([[32, 32], [32, 32]], device=device)
    nothing = dict(boxes=torch.zeros(0, 4, device=device))
    losses = one_level().loss(*maps, Frame(sizes, (32, 32)), [nothing, nothing])
    assert losses[0].item() == pytest.approx(32 * 0.75 * 0.25 * LOG2, rel=1e-5)  # divided by 1
    assert losses[1].item() == losses[2].item() == 0.0
    sum(losses).backward()
    (logits,), (distances,), (middle,) = maps
    assert logits.grad.abs().min() > 0 and not distances.grad.any() and not middle.grad.any()
    distances, boxes = six_positions(device)
    maps = (
        [torch.zeros(2, 1, 4, 4, device=device)],
        [distances.repeat(2, 1, 1, 1)],
        [torch.zeros(2, 1, 4, 4).to(device)],
    )
    cls, _, center = one_level().loss(*maps, Frame(sizes, (32, 32)), [nothing, dict(boxes=boxes)])
    assert cls.item() == pytest.approx((6 * 0.25 + 26 * 0.75) * 0.25 * LOG2 / 6, rel=1e-5)
    assert center.item() == pytest.approx(LOG2, rel=1e-5)


# --- proposals


def test_decode_clips_to_each_image():
    points, distances = torch.tensor([[[12.0, 4.0]]] * 2), torch.tensor([[[20.0, 1.0, 10.0, 30.0]]] * 2)
    sizes = torch.tensor([[20, 16], [50, 40]])
    expected = torch.tensor([[[0.0, 3.0, 16.0, 20.0]], [[0.0, 3.0, 22.0, 34.0]]])
    torch.testing.assert_close(DistancePointBBoxCoder().decode(points, distances, sizes), expected)
    free = torch.tensor([[[-8.0, 3.0, 22.0, 34.0]]] * 2)
    torch.testing.assert_close(DistancePointBBoxCoder(clip_border=False).decode(points, distances, sizes), free)
    torch.testing.assert_close(DistancePointBBoxCoder().decode(points, distances), free)


def test_proposals_by_hand(device):
    # Squares of 8 pixels side by side around x = 4, 12, 20; the last one is cut to 2 pixels by the image.
    def proposals(**changes):
        cfg = {**head.test_cfg, **changes}
        found = head.predict(
            [logits], [distances], [middle], Frame(torch.tensor([[8, 18]], device=device), (8, 24)), cfg
        )
        boxes, scores, counts = found
        n = int(counts)
        assert not boxes[:, n:].any() and not scores[:, n:].any()
        assert boxes.shape == (1, cfg["max_per_img"], 4)
        return boxes[0, :n].tolist(), scores[0, :n].tolist()

    head = one_level(test_cfg=dict(max_per_img=5, nms=dict(type="nms", iou_threshold=0.5)))
    odds = torch.tensor([8.0, 4.0, 1.0], device=device)  # scores 8/9, 4/5, 1/2
    logits = odds.log().reshape(1, 1, 1, 3)
    middle = torch.tensor([0.125, 1.0, 999.0], device=device).log().reshape(1, 1, 1, 3)  # 1/9, 1/2, 0.999
    distances = torch.full((1, 4, 1, 3), 4.0, device=device)
    first, second, third = [0, 0, 8, 8], [8, 0, 16, 8], [16, 0, 18, 8]
    boxes, scores = proposals()
    assert boxes == [third, second, first]
    assert scores == pytest.approx([0.4995, 0.4, 8 / 81], rel=1e-5)
    assert proposals(nms_pre=2)[0] == [second, first]  # chosen by the class alone, ranked by the product
    assert proposals(max_per_img=1)[0] == [third]
    assert proposals(score_thr=0.5)[0] == [second, first]  # of the class alone, and it must be above
    assert proposals(min_bbox_size=2)[0] == [second, first]  # must be larger
    assert proposals(min_bbox_size=1.9)[0] == [third, second, first]
    assert proposals(min_bbox_size=10) == ([], [])
    logits[0, 0, 0, 1] = -200.0  # a score of 0 is not above 0
    assert proposals()[0] == [third, first]
    logits[0, 0, 0, 1] = 4.0
    distances[0, :, 0, 1] = torch.tensor([12.0, 4.0, 0.0, 4.0], device=device)  # [0, 0, 12, 8]: IoU 2/3 with the first
    assert proposals()[0] == [third, [0, 0, 12, 8]]
    assert len(proposals(nms=dict(type="nms", iou_threshold=0.7))[0]) == 3


def test_suppression_goes_across_levels():
    head = FCOSHead(**SMALL, strides=(8, 16), regress_ranges=((-1, 64), (64, 1e8)))
    logits = [torch.tensor([[[[0.0]]]]), torch.tensor([[[[1.0]]]])]
    distances = [torch.tensor([4.0, 4, 12, 12]).reshape(1, 4, 1, 1), torch.full((1, 4, 1, 1), 8.0)]  # the same box
    frame = Frame(torch.tensor([[16, 16]]), (16, 16))
    boxes, scores, counts = head.predict(logits, distances, maps_of((1, 1), (1, 1)), frame, head.test_cfg)
    assert counts.tolist() == [1] and boxes[0, 0].tolist() == [0, 0, 16, 16]
    assert scores[0, 0].item() == pytest.approx(0.5 / (1 + math.exp(-1)), rel=1e-5)


def test_an_image_has_the_same_proposals_alone_and_in_a_batch(device):
    two = dict(strides=(8, 16), regress_ranges=((-1, 64), (64, 1e8)))
    head = FCOSHead(**SMALL, **two, test_cfg=dict(nms_pre=40, max_per_img=30)).to(device).eval()
    for conv in (head.conv_cls, head.conv_reg, head.conv_centerness):
        nn.init.normal_(conv.weight, std=0.2)
    nn.init.constant_(head.conv_reg.bias, 2.5)
    feats = [torch.randn(2, 4, 12, 16, device=device), torch.randn(2, 4, 6, 8, device=device)]
    sizes = torch.tensor([[96, 120], [70, 128]], device=device)
    with torch.no_grad():
        boxes, scores, counts = head.predict(*head(feats), Frame(sizes, (96, 128)), head.test_cfg)
        for i, (height, width) in enumerate(sizes.tolist()):
            outs = head([x[i : i + 1] for x in feats])
            alone = head.predict(*outs, Frame(sizes[i : i + 1], (96, 128)), head.test_cfg)
            assert alone[2].item() == counts[i].item() > 5
            torch.testing.assert_close(alone[0][0], boxes[i], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(alone[1][0], scores[i], rtol=1e-4, atol=1e-6)
            assert boxes[i, :, 0::2].max() <= width and boxes[i, :, 1::2].max() <= height and boxes.min() >= 0
            assert (scores[i].diff() <= 0).all()


def test_positions_stay_exact_in_a_low_precision_model():
    head, size = one_level(test_cfg=dict(nms_pre=10**5, max_per_img=10**5)), torch.tensor([[8, 4096]])
    for dtype in (torch.bfloat16, torch.float16):
        maps = [x.to(dtype) for x in maps_of((1, 512))]
        boxes, _, counts = head.to(dtype).predict(maps, [torch.full((1, 4, 1, 512), 4.0)], maps, Frame(size, (8, 4096)),
                                                  head.test_cfg)  # fmt: skip
        assert counts.tolist() == [512] and boxes[0, :512, 0].sort().values.tolist() == list(range(0, 4096, 8))
        _, (distances,), _ = head([torch.zeros(1, 4, 1, 2, dtype=dtype)])
        assert distances.dtype == torch.float32


# --- errors, and the whole detector


@pytest.mark.parametrize(
    "options, names",
    [
        (dict(num_classes=80), "num_classes"),
        (dict(strides=((8, 8),)), "strides"),
        (dict(strides=(8, 16)), "regress_ranges"),
        (dict(conv_bias="yes"), "conv_bias"),
        (dict(bbox_coder=dict(type="DeltaXYWHBBoxCoder")), "bbox_coder"),
        (dict(loss_cls=dict(type="CrossEntropyLoss")), "loss_cls"),
        (dict(loss_centerness=dict(type="CrossEntropyLoss")), "loss_centerness"),
        (dict(loss_bbox=dict(type="L1Loss")), "loss_bbox"),
        (dict(train_cfg=dict(sampling=True)), "train_cfg.*sampling"),
        (dict(test_cfg=dict(nms_post=10)), "test_cfg.*nms_post"),
        (dict(profile="yolo"), "profile"),
    ],
)
def test_bad_arguments_are_named(options, names):
    with pytest.raises(ValueError, match=names):
        one_level(**options)


def test_bad_calls_are_named():
    head = one_level()
    with pytest.raises(ValueError, match="feats"):
        head(maps_of((2, 2), (1, 1), channels=4))
    for options in (dict(nms=dict(type="soft_nms")), dict(max_per_img=0)):
        with pytest.raises(ValueError, match=next(iter(options))):
            one_level(test_cfg=options)


@pytest.mark.parametrize("profile", PROFILES)
def test_a_detector_trains_and_predicts_with_it(profile):
    strides = [8, 16, 32, 64, 128]
    fcos = dict(_delete_=True, type="FCOSHead", num_classes=3, in_channels=32, feat_channels=32, strides=strides)
    extractor = dict(out_channels=32, featmap_strides=strides)
    neck = dict(in_channels=[16, 32, 64, 128], out_channels=32, start_level=1, add_extra_convs="on_output",
                relu_before_extra_convs=True)  # fmt: skip
    model = faster_rcnn(
        "r18_fpn", 3, profile, min_size=64, max_size=96, backbone=dict(base_channels=16), neck=neck, rpn_head=fcos,
        roi_head=dict(bbox_roi_extractor=extractor, bbox_head=dict(in_channels=32, fc_out_channels=64)),
    ).train()  # fmt: skip
    images = [torch.rand(3, 64, 90), torch.rand(3, 70, 96)]
    offset = PROFILES[profile].label_offset
    boxes = torch.tensor([[5.0, 8.0, 40.0, 50.0], [30.0, 10.0, 80.0, 60.0]])
    labels = torch.tensor([0, 2]) + offset
    targets = [dict(boxes=boxes, labels=labels), dict(boxes=boxes[:1], labels=labels[:1])]
    losses = model(images, targets)
    assert set(losses) == {*FCOSHead.loss_names, *PROFILES[profile].losses[2:]}
    assert all(v.dim() == 0 and torch.isfinite(v) for v in losses.values())
    sum(losses.values()).backward()
    grads = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
    assert all(torch.isfinite(g).all() for g in grads.values())
    assert {f"rpn_head.{k}" for k, _ in model.rpn_head.named_parameters()} <= set(grads)
    torch.optim.SGD(model.parameters(), lr=0.01).step()
    model.eval()
    for image, found in zip(images, model(images)):
        assert set(found) == {"boxes", "scores", "labels"} and torch.isfinite(found["boxes"]).all()
        height, width = image.shape[1:]
        assert len(found["boxes"]) == 0 or (found["boxes"] <= torch.tensor([width, height] * 2) + 0.01).all()
    batch, sizes, _ = model.data_preprocessor(images)
    assert all(0 < len(b) <= 1000 and len(b) == len(s) for b, s in model.proposals(batch, sizes))
