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
