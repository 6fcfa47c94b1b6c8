import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastrcnn.models.losses import CrossEntropyLoss, L1Loss, SmoothL1Loss, build_loss


def test_sigmoid_cross_entropy_by_hand():
    logits, target = torch.tensor([0.0, 2.0, -1.0]), torch.tensor([1, 1, 0])
    expected = math.log(2) + math.log1p(math.exp(-2)) + math.log1p(math.exp(-1))
    loss = CrossEntropyLoss(use_sigmoid=True)(logits, target, 4.0)
    assert loss.item() == pytest.approx(expected / 4, rel=1e-5)


def test_sigmoid_cross_entropy_of_classes_by_hand():
    """One column a class, the background's among them; class_weight multiplies the positives of its column."""
    logits, target = torch.tensor([[2.0, -1.0, 0.0], [0.0, 1.0, 3.0]]), torch.tensor([0, 2])
    terms = [math.log1p(math.exp(v)) for v in (-2, -1, 0, 0, 1, -3)]
    loss = CrossEntropyLoss(use_sigmoid=True)(logits, target, 2.0)
    assert loss.item() == pytest.approx(sum(terms) / 2, rel=1e-5)
    weighted = CrossEntropyLoss(use_sigmoid=True, class_weight=[3.0, 1.0, 0.5])(logits, target, 2.0)
    assert weighted.item() == pytest.approx((sum(terms) + 2 * terms[0] - 0.5 * terms[5]) / 2, rel=1e-5)
    alone = CrossEntropyLoss(use_sigmoid=True, class_weight=[3.0])(torch.tensor([2.0, 0.0]), torch.tensor([1, 0]), 1.0)
    assert alone.item() == pytest.approx(3 * terms[0] + terms[2], rel=1e-5)


def test_softmax_cross_entropy_by_hand():
    logits, target = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 3.0]]), torch.tensor([0, 1])
    expected = math.log(1 + 2 * math.exp(-1)) + math.log(2 + math.exp(3))
    loss = CrossEntropyLoss(loss_weight=2.0)(logits, target, 2.0)
    assert loss.item() == pytest.approx(2 * expected / 2, rel=1e-5)


def test_l1_and_smooth_l1_by_hand():
    pred, target = torch.tensor([[0.1, -2.0], [0.0, 0.5]]), torch.tensor([[0.0, 1.0], [0.0, 0.0]])
    assert L1Loss(loss_weight=3.0)(pred, target, 2.0).item() == pytest.approx(3 * 3.6 / 2, rel=1e-5)
    # beta 0.2: 0.1 and 0 are on the parabola, 3 and 0.5 on the line.
    expected = 0.5 * 0.01 / 0.2 + (3 - 0.1) + (0.5 - 0.1)
    assert SmoothL1Loss(beta=0.2)(pred, target, 1.0).item() == pytest.approx(expected, rel=1e-5)


def test_mean_reductions_are_torchs():
    logits, labels = torch.randn(50, 7), torch.randint(0, 7, (50,))
    torch.testing.assert_close(CrossEntropyLoss()(logits, labels, 50), F.cross_entropy(logits, labels))
    a, b = torch.randn(50, 4), torch.randn(50, 4)
    expected = F.smooth_l1_loss(a, b, beta=1 / 9, reduction="sum") / 50
    torch.testing.assert_close(SmoothL1Loss(beta=1 / 9)(a, b, 50), expected)


def test_nothing_sampled_gives_zero_and_a_gradient():
    pred = torch.zeros(0, 4, requires_grad=True)
    for loss in (L1Loss(), SmoothL1Loss()):
        value = loss(pred, torch.zeros(0, 4), 0)
        assert value.item() == 0.0
        value.backward()
    assert pred.grad.shape == (0, 4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_summed_in_float32(dtype):
    pred = torch.full((5000, 4), 10.0, dtype=dtype)
    loss = L1Loss()(pred, torch.zeros(5000, 4), 1.0)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(200_000, rel=1e-5)  # beyond float16's largest number
    logits = torch.full((3,), 5.0, dtype=dtype)
    assert CrossEntropyLoss(use_sigmoid=True)(logits, torch.ones(3), 3).item() == pytest.approx(0.0067153, rel=1e-4)


def test_building_from_a_dict():
    loss = build_loss(dict(type="SmoothL1Loss", beta=0.5, loss_weight=2.0))
    assert isinstance(loss, SmoothL1Loss) and (loss.beta, loss.loss_weight) == (0.5, 2.0)
    own = nn.Identity()
    assert build_loss(own) is own
    for cfg in (dict(type="DiceLoss"), dict(loss_weight=1.0)):
        with pytest.raises(ValueError, match="loss"):
            build_loss(cfg)


BOX, TARGET = torch.tensor([[0.0, 0.0, 10.0, 10.0]]), torch.tensor([[5.0, 0.0, 15.0, 10.0]])


@pytest.mark.parametrize(
    ("cfg", "expected"),
    [
        # Intersection 50, union 150: IoU 1/3. The hull is 15 x 10, the centres are 5 apart.
        (dict(type="IoULoss"), math.log(3)),
        (dict(type="IoULoss", mode="linear"), 2 / 3),
        (dict(type="IoULoss", mode="square"), 8 / 9),
        (dict(type="GIoULoss"), 2 / 3),
        (dict(type="DIoULoss"), 2 / 3 + 25 / 325),
        (dict(type="CIoULoss"), 2 / 3 + 25 / 325),  # equal shapes, and the overlap is below one half
        # dx = 5: (10 - 10) / (10 + 10) bounds the IoU by 0, the other three terms are nearly 0.
        (dict(type="BoundedIoULoss", eps=0.0), 1 - 0.1),
    ],
)
def test_box_losses_by_hand(cfg, expected):
    loss = build_loss({**cfg, "loss_weight": 3.0})(BOX, TARGET, 2.0)
    assert loss.item() == pytest.approx(3 * expected / 2, rel=1e-5)


def test_complete_iou_counts_the_shape_where_boxes_overlap_by_half():
    a, b = torch.tensor([[0.0, 0.0, 10.0, 10.0]]), torch.tensor([[0.0, 0.0, 10.0, 8.0]])
    v = 4 / math.pi**2 * (math.atan(10 / 8) - math.atan(1)) ** 2
    expected = 1 - 0.8 + 1 / 200 + v / (1 - 0.8 + v) * v  # centres 1 apart, diagonal^2 200
    assert build_loss(dict(type="CIoULoss"))(a, b, 1.0).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", ["IoULoss", "GIoULoss", "DIoULoss", "CIoULoss", "BoundedIoULoss", "BalancedL1Loss"])
def test_box_losses_have_the_right_gradient(kind):
    g = torch.Generator().manual_seed(1)
    corner = torch.rand(6, 2, generator=g, dtype=torch.float64) * 3
    target = torch.cat([corner, corner + 4], 1)
    pred = (target + torch.rand(6, 4, generator=g, dtype=torch.float64) - 0.5).requires_grad_()
    if kind == "CIoULoss":  # its weight alpha is a constant by definition: only the value can be checked
        assert build_loss(dict(type=kind)).elements(target, target).abs().max() < 1e-6
        return
    assert torch.autograd.gradcheck(lambda p: build_loss(dict(type=kind)).elements(p, target), (pred,))


def test_balanced_l1_meets_its_line_at_beta_and_is_zero_at_zero():
    loss = build_loss(dict(type="BalancedL1Loss"))
    zero = torch.zeros(1, 4)
    assert loss(zero, zero, 1.0).item() == pytest.approx(0.0, abs=1e-6)
    below, above = (loss(torch.full((1, 4), d), zero, 1.0).item() for d in (1 - 1e-4, 1 + 1e-4))
    assert below == pytest.approx(above, rel=1e-3)
    steep = loss(torch.full((1, 4), 3.0), zero, 1.0) - loss(torch.full((1, 4), 2.0), zero, 1.0)
    assert steep.item() == pytest.approx(4 * 1.5, rel=1e-5)  # the line's slope is gamma


def test_focal_loss_by_hand_and_with_background():
    logits, target = torch.tensor([[0.0, 2.0], [1.0, -1.0]]), torch.tensor([0, 2])
    p = logits.sigmoid()
    hit = 0.25 * (1 - p[0, 0]) ** 2 * -p[0, 0].log()
    misses = [0.75 * q**2 * -(1 - q).log() for q in (p[0, 1], p[1, 0], p[1, 1])]
    assert build_loss(dict(type="FocalLoss"))(logits, target, 1.0).item() == pytest.approx(
        (hit + sum(misses)).item(), rel=1e-5
    )
