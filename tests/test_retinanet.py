"""models/retinanet.py: against torchvision's own RetinaNet, and by hand where the peers differ."""

import math
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torchvision.models.detection import RetinaNet as TorchvisionRetinaNet
from torchvision.models.detection.retinanet import _default_anchorgen

from fastrcnn.models import RetinaHead, RetinaNet
from fastrcnn.models.anchors import build_anchor_generator
from fastrcnn.models.frame import Frame
from fastrcnn.models.padded import Padded
from fastrcnn.models.profiles import PROFILES

PROFILE_NAMES = ("mmdet", "torchvision", "detectron2")
CLASSES = 5


class Pyramid(nn.Module):
    """Five maps of strides 8 to 128."""

    out_channels = 8

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 7, stride=8, padding=3)
        self.down = nn.ModuleList(nn.Conv2d(8, 8, 3, stride=2, padding=1) for _ in range(4))

    def forward(self, x):
        maps = [self.stem(x).relu()]
        for conv in self.down:
            maps.append(conv(maps[-1]).relu())
        return tuple(maps)


class Named(nn.Module):
    """The same maps, as torchvision's detectors take them."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone, self.out_channels = backbone, backbone.out_channels

    def forward(self, x):
        return OrderedDict((str(i), m) for i, m in enumerate(self.backbone(x)))


@torch.no_grad()
def spread(model: RetinaNet) -> RetinaNet:
    """Weights that do not fade, and scores and boxes that vary, as a trained model's do."""
    for m in model.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight)
            nn.init.normal_(m.bias, std=0.1)
    head, (batch, *_) = model.bbox_head, model.data_preprocessor([torch.rand(3, 128, 128)])
    for layer, outs, std, mean in zip(
        (head.retina_cls, head.retina_reg), head(model.backbone(batch)), (2, 0.3), (-4, 0)
    ):
        layer.weight.mul_(std / torch.cat([x.flatten() for x in outs]).std())
        layer.bias.normal_(std=0.1).add_(mean)
    return model


def tiny(profile="mmdet") -> RetinaNet:
    torch.manual_seed(1)
    anchors = dict(type="AnchorGenerator", **PROFILES[profile].dense_anchors)
    head = dict(type="RetinaHead", num_classes=CLASSES, in_channels=8, feat_channels=8, anchor_generator=anchors,
                loss_bbox=PROFILES[profile].dense_loss_bbox)  # fmt: skip
    cfg = dict(max_per_img=PROFILES[profile].dense_max_per_img)
    return spread(RetinaNet(Pyramid(), None, head, None, cfg, profile=profile, min_size=128, max_size=192))


def images_of(*sizes, dtype=torch.float32):
    return [torch.rand(3, *size, dtype=dtype) for size in sizes]


@pytest.fixture
def pair(device):
    """Our model in the torchvision profile and torchvision's, in float64 and with the same weights."""
    ours = tiny("torchvision").double().to(device)
    theirs = TorchvisionRetinaNet(Named(ours.backbone), CLASSES, min_size=128, max_size=192)
    head = {}
    for name, tower, last in (("classification", "cls", "cls_logits"), ("regression", "reg", "bbox_reg")):
        for kind in ("weight", "bias"):
            for i, conv in enumerate(getattr(ours.bbox_head, f"{tower}_convs")):
                head[f"{name}_head.conv.{i}.0.{kind}"] = getattr(conv.conv, kind)
            head[f"{name}_head.{last}.{kind}"] = getattr(getattr(ours.bbox_head, f"retina_{tower}"), kind)
    theirs.head.load_state_dict(head, strict=True)
    return ours, theirs.double().to(device)


def test_torchvisions_anchors_are_the_profiles():
    theirs = _default_anchorgen()
    ours = build_anchor_generator(dict(type="AnchorGenerator", **PROFILES["torchvision"].dense_anchors))
    for a, b in zip(ours.base_anchors(rounded=True), theirs.cell_anchors, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("sizes", [[(128, 160)], [(120, 170), (200, 141), (333, 150)]])
def test_detections_equal_torchvision(pair, sizes, device):
    ours, theirs = (m.eval() for m in pair)
    images = [image.to(device) for image in images_of(*sizes, dtype=torch.float64)]
    with torch.no_grad():
        expected = theirs(images)
    for a, b in zip(ours(images), expected, strict=True):
        assert len(b["boxes"]) > 50 and len(b["labels"].unique()) > 2
        assert torch.equal(a["labels"], b["labels"])
        torch.testing.assert_close(a["scores"], b["scores"], rtol=0, atol=1e-10)
        # torchvision's scale factors and clipping windows are float32.
        torch.testing.assert_close(a["boxes"], b["boxes"], rtol=0, atol=1e-3, check_dtype=False)


@pytest.mark.parametrize("empty", [False, True])
def test_losses_and_gradients_equal_torchvision(pair, empty, device):
    ours, theirs = (m.train() for m in pair)
    images = [image.to(device) for image in images_of((120, 170), (200, 141), dtype=torch.float64)]
    first = [[10.0, 20.0, 70.0, 90.0], [100.0, 30.0, 140.0, 120.0], [12.0, 80.0, 40.0, 118.0]]
    second = [] if empty else [[5.0, 5.0, 120.0, 150.0]]
    targets = [
        dict(boxes=torch.tensor(b, device=device).reshape(-1, 4), labels=torch.tensor(la, device=device).long())
        for b, la in ((first, [1, 4, 0]), (second, [3] * len(second)))
    ]
    expected, found = theirs(images, targets), ours(images, targets)
    assert list(found) == ["classification", "bbox_regression"] and all(v > 0 for v in found.values())
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=0, check_dtype=False)
    head, layers = theirs.head, ours.bbox_head
    rivals = [
        (layers.retina_cls, head.classification_head.cls_logits),
        (layers.retina_reg, head.regression_head.bbox_reg),
        (layers.cls_convs[0].conv, head.classification_head.conv[0][0]),
        (layers.reg_convs[3].conv, head.regression_head.conv[3][0]),
    ]
    grads = torch.autograd.grad(sum(found.values()), [a.weight for a, _ in rivals])
    theirs_grads = torch.autograd.grad(sum(expected.values()), [b.weight for _, b in rivals])
    for a, b in zip(grads, theirs_grads):
        assert b.abs().max() > 0
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * b.abs().max().item())


# Worked by hand: squares of 32 pixels around (0, 0), (32, 0), (64, 0), (0, 32), (32, 32), (64, 32); two classes.
SQUARES = dict(type="AnchorGenerator", strides=[32], ratios=[1.0], scales=[1])


def squares(profile="mmdet", **options):
    return RetinaHead(2, 4, stacked_convs=0, anchor_generator=SQUARES, profile=profile, **options)


def detect(head, logits, deltas, size=(64, 96), scale=None):
    return Padded.lists(*head.predict([logits], [deltas], Frame(torch.tensor([size]), (64, 96), scale)))[0]


def single_boxes(boxes, scores=None):
    """Maps in which anchor i means boxes[i], of class 0; the rest scores nothing."""
    logits, deltas = torch.full((1, 2, 2, 3), -20.0), torch.zeros(1, 4, 2, 3)
    for i, (box, score) in enumerate(zip(torch.tensor(boxes), scores or [0.9, 0.8, 0.7, 0.6, 0.5])):
        y, x = divmod(i, 3)
        anchor = torch.tensor([32 * x - 16.0, 32 * y - 16, 32 * x + 16, 32 * y + 16])
        deltas[0, :, y, x] = squares().bbox_coder.encode(anchor[None], box[None])[0]
        logits[0, 0, y, x] = math.log(score / (1 - score))
    return logits, deltas


def test_channels_are_anchor_by_class():
    head = RetinaHead(2, 4, stacked_convs=0, anchor_generator=dict(SQUARES, scales=[1, 0.5]))
    logits = torch.full((1, 4, 2, 3), -20.0)
    logits[0, 3, 1, 1], logits[0, 0, 1, 2], logits[0, 2, 1, 2] = 2.0, 1.0, 0.0
    found = detect(head, logits, torch.zeros(1, 8, 2, 3))
    assert found["labels"].tolist() == [1, 0, 0]
    torch.testing.assert_close(found["scores"], torch.tensor([2.0, 1.0, 0.0]).sigmoid())
    expected = [[24.0, 24, 40, 40], [48, 16, 80, 48], [56, 24, 72, 40]]
    torch.testing.assert_close(found["boxes"], torch.tensor(expected))


def test_thresholds_and_limits():
    logits, deltas = torch.linspace(-6, 3, 12).reshape(1, 2, 2, 3), torch.zeros(1, 4, 2, 3)
    above = int((logits.sigmoid() > 0.05).sum())
    assert len(detect(squares(), logits, deltas)["scores"]) == above == 8
    assert len(detect(squares(test_cfg=dict(score_thr=0.5)), logits, deltas)["scores"]) == 4
    for cfg in (dict(nms_pre=5), dict(max_per_img=5)):
        best = detect(squares(test_cfg=cfg), logits, deltas)["scores"]
        torch.testing.assert_close(best, logits.flatten().sigmoid().sort(descending=True).values[:5])
    both = detect(squares(test_cfg=dict(nms=dict(type="nms", iou_threshold=0.5, class_agnostic=True))), logits, deltas)
    assert len(both["scores"]) == 6
    nothing = detect(squares(test_cfg=dict(score_thr=1.0)), logits, deltas)
    assert nothing["boxes"].shape == (0, 4) and nothing["labels"].dtype == torch.int64


BOXES = [[0.0, 0, 12, 30], [40.0, 0, 70, 30], [0.0, 32, 30, 44]]


def test_small_boxes_are_dropped_in_mmdetection_only():
    for profile in PROFILE_NAMES:
        found = detect(squares(profile, test_cfg=dict(min_bbox_size=13)), *single_boxes(BOXES))
        assert len(found["boxes"]) == (1 if profile == "mmdet" else 3)
    assert len(detect(squares(test_cfg=dict(min_bbox_size=-1)), *single_boxes(BOXES))["boxes"]) == 3


def test_small_is_measured_in_the_original_image():
    half = torch.tensor([[0.5, 0.5]])  # the originals are twice as large: sides of 24 and of 60
    for least, kept in ((13, 3), (25, 1)):
        found = detect(squares(test_cfg=dict(min_bbox_size=least)), *single_boxes(BOXES), scale=half)
        assert len(found["boxes"]) == kept


def test_detectron2_clips_after_suppressing():
    # Cut to the picture both are the same box; as predicted their IoU is 120 / 260.
    maps = single_boxes([[0.0, 0, 260, 30], [0.0, 0, 120, 30]])
    for profile, kept in (("mmdet", 1), ("torchvision", 1), ("detectron2", 2)):
        found = detect(squares(profile), *maps)["boxes"]
        torch.testing.assert_close(found, torch.tensor([[0.0, 0, 96, 30]] * kept), rtol=0, atol=1e-3)


@pytest.mark.parametrize("profile", PROFILE_NAMES)
def test_boxes_return_to_the_original_image(profile):
    maps, scale = single_boxes(BOXES), torch.tensor([[0.5, 0.25]])
    small, large = detect(squares(profile), *maps), detect(squares(profile), *maps, scale=scale)
    torch.testing.assert_close(small["boxes"], torch.tensor(BOXES), rtol=0, atol=1e-4)
    torch.testing.assert_close(large["boxes"], torch.tensor(BOXES) * torch.tensor([2.0, 4, 2, 4]), rtol=0, atol=1e-3)
    assert torch.equal(small["scores"], large["scores"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_boxes_stay_exact_where_the_network_computes_in_half(dtype):
    logits, deltas = torch.randn(1, 2, 2, 3, dtype=dtype), torch.randn(1, 4, 2, 3, dtype=dtype)
    low, exact = detect(squares(), logits, deltas), detect(squares(), logits.float(), deltas.float())
    assert len(exact["boxes"]) > 3
    for key in ("boxes", "scores", "labels"):
        torch.testing.assert_close(low[key], exact[key], rtol=0, atol=1e-3)


def test_every_score_starts_at_one_in_a_hundred():
    head = RetinaHead(3, 8, feat_channels=8)
    logits, deltas = head([torch.zeros(1, 8, 4, 4)])
    torch.testing.assert_close(logits[0].sigmoid(), torch.full_like(logits[0], 0.01))
    assert not deltas[0].any()
    assert head.cls_convs[2].conv.weight.std().item() == pytest.approx(0.01, rel=0.1)


WB = ("weight", "bias")


def test_keys_are_mmdetections():
    model = RetinaNet(nn.Identity(), None, dict(type="RetinaHead", num_classes=3, in_channels=8, feat_channels=16))
    towers = [f"bbox_head.{t}_convs.{i}.conv.{k}" for t in ("cls", "reg") for i in range(4) for k in WB]
    state = model.state_dict()
    assert sorted(state) == sorted(towers + [f"bbox_head.retina_{t}.{k}" for t in ("cls", "reg") for k in WB])
    assert state["bbox_head.cls_convs.0.conv.weight"].shape == (16, 8, 3, 3)
    assert state["bbox_head.retina_cls.weight"].shape == (9 * 3, 16, 3, 3)
    assert state["bbox_head.retina_reg.bias"].shape == (9 * 4,)


@pytest.mark.parametrize("profile", PROFILE_NAMES)
def test_a_batch_finds_what_single_images_find(profile):
    model = tiny(profile).double().eval()
    images = images_of((128, 160), (128, 160), dtype=torch.float64)
    for alone, together in zip([model([image])[0] for image in images], model(images)):
        assert len(alone["boxes"]) > 20 and torch.equal(alone["labels"], together["labels"])
        torch.testing.assert_close(alone["boxes"], together["boxes"], rtol=0, atol=1e-3)
    batch, sizes, factors = model.data_preprocessor(images, torch.float64)
    assert torch.equal(model.predict(batch, sizes.tolist(), factors.tolist())[1]["boxes"], together["boxes"])


@pytest.mark.parametrize("name", PROFILE_NAMES)
def test_another_profile_is_taken_over_whole(name):
    model, other = tiny(name).eval(), tiny("mmdet").eval()
    other.set_profile(name)
    other.load_state_dict(model.state_dict())
    images = images_of((128, 160))
    assert len(model(images)[0]["boxes"]) > 20
    torch.testing.assert_close(other(images), model(images))
    target = [dict(boxes=torch.tensor([[20.0, 30, 80, 90]]), labels=torch.tensor([2]))]
    torch.testing.assert_close(other.train()(images, target), model.train()(images, target))


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(loss_cls=dict(type="CrossEntropyLoss", use_sigmoid=True)), "loss_cls.*FocalLoss"),
        (dict(train_cfg=dict(sampler=dict(type="RandomSampler", num=256))), "sampler.*PseudoSampler"),
        (dict(feat_chanels=3), "bbox_head.*feat_chanels"),
        (dict(type="ATSSHead"), "bbox_head.*ATSSHead"),
    ],
)
def test_bad_arguments_are_named(options, message):
    train_cfg = options.pop("train_cfg", None)
    with pytest.raises(ValueError, match=message):
        RetinaNet(Pyramid(), None, dict(type="RetinaHead", num_classes=3, in_channels=8) | options, train_cfg)


BOX = torch.tensor([[20.0, 30, 80, 90]])
BAD_TARGETS = [
    (None, "targets.*None"),
    ([], "targets: expected one for each of the 1 images, got 0"),
    ([dict(boxes=BOX)], r"targets\[0\].*labels"),
    (
        [dict(boxes=BOX, labels=torch.tensor([CLASSES]))],
        rf"targets\[0\].*labels in 0\.\.{CLASSES - 1}, got \[{CLASSES}\]",
    ),
    ([dict(boxes=BOX.flip(1), labels=torch.tensor([0]))], r"targets\[0\].*x2 > x1"),
]


@pytest.mark.parametrize("targets, message", BAD_TARGETS)
@pytest.mark.parametrize("profile", ["mmdet", "torchvision"])
def test_bad_targets_are_named(profile, targets, message):
    model, batch = tiny(profile).train(), torch.zeros(1, 3, 128, 160)
    with pytest.raises(ValueError, match=message):
        model.loss(batch, [(128, 160)], targets)
    with pytest.raises(ValueError, match="image_sizes"):
        model.loss(batch, [(128, 160)] * 2, [dict(boxes=BOX, labels=torch.tensor([0]))])


@pytest.mark.parametrize("profile", PROFILE_NAMES)
def test_a_few_steps_of_training(profile):
    model = tiny(profile).train()
    images = images_of((128, 160), (128, 128))
    other = dict(boxes=torch.tensor([[10.0, 10, 60, 40], [40, 50, 120, 120]]), labels=torch.tensor([0, 4]))
    targets = [dict(boxes=BOX, labels=torch.tensor([2])), other]
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    seen = []
    for _ in range(25):
        losses = model(images, targets)
        assert set(losses) == set(PROFILES[profile].dense_losses)
        optimizer.zero_grad()
        # Without the running divisor, which changes the scale from step to step.
        seen.append(sum(losses.values()) * (model.bbox_head.loss_normalizer if profile == "detectron2" else 1))
        seen[-1].backward()
        optimizer.step()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in model.parameters())
    assert seen[-1] < 0.5 * seen[0]


def test_the_running_mean_of_detectron2_is_in_the_state_dict_and_only_there():
    head = squares("detectron2")
    target = [dict(boxes=torch.tensor([[0.0, 0, 30, 30]]), labels=torch.tensor([1]))]
    frame = Frame(torch.tensor([[64, 96]]), (64, 96))
    losses = head.loss([torch.zeros(1, 2, 2, 3)], [torch.zeros(1, 4, 2, 3)], frame, target)
    assert {loss.dtype for loss in losses} == {torch.float32}
    state = head.state_dict()
    assert state["loss_normalizer"].item() == pytest.approx(0.9 * 100 + 0.1)
    again = squares("detectron2")
    again.load_state_dict(state)
    assert torch.equal(again.loss_normalizer, state["loss_normalizer"])
    plain = {k: v for k, v in state.items() if k != "loss_normalizer"}
    again.load_state_dict(plain)  # a peer's file lacks it
    mmdet = squares()
    mmdet.load_state_dict(state)
    assert mmdet.state_dict().keys() == plain.keys()
